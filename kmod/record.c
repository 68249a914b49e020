// SPDX-License-Identifier: GPL-2.0-only
/*
 * From a source's draft to a record in a ring.
 *
 * Sources report from hard interrupts, threaded interrupts, work items and
 * system calls. None of them may wait for us, so drafts come from a fixed pool,
 * and what cannot be done in the caller's context (finding owners from an
 * interrupt) goes to a work item. When the pool is empty the error is counted
 * as a loss that every reader is told of: nothing is dropped in silence.
 *
 * Three small tables, each under one raw lock and bounded:
 *   queue     drafts for the work item
 *   recent    corrected errors of the last second, for coalescing
 *   linked    memory hit within the last seconds, to link sources
 */
#include <linux/kernel.h>
#include <linux/ktime.h>
#include <linux/overflow.h>
#include <linux/pci.h>
#include <linux/preempt.h>
#include <linux/sched.h>
#include <linux/siphash.h>
#include <linux/slab.h>
#include <linux/random.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>

#include "hwerr.h"
#include "record.h"
#include "ring.h"

#define POOL_DRAFTS	64	/* bits of pool.free */
/* Those of them that corrected errors leave to uncorrected ones. */
#define POOL_RESERVED	GENMASK_ULL(15, 0)
/*
 * What a storm of interrupts may cost beside the interrupts: the work item pauses
 * for as long as it ran. Until then what does not fit the pool is counted as lost.
 */
#define QUEUE_RUN_NS	(10 * NSEC_PER_MSEC)
#define QUEUE_PAUSE	max(msecs_to_jiffies(10), 1UL)
#define TEXT_ROOM	256	/* of a line, its NUL included; a multiple of 8 */
#define RECENT_ERRORS	32
#define LINKED_MAX	64
#define COALESCE_NS	NSEC_PER_SEC
#define LINK_NS		(10ULL * NSEC_PER_SEC)

static struct {
	atomic64_t free;		/* a bit for each of @drafts */
	raw_spinlock_t lock;		/* guards the queue */
	struct list_head queue;
	struct hwerr_draft *drafts;	/* constant */
} pool;

/**
 * struct hwerr_recent - a corrected error that may repeat
 * @ident: which; 0 if the entry is free
 * @until: end of its window, CLOCK_MONOTONIC
 * @pending: repetitions within the window
 * @mono_ns: time of the last
 * @real_ns: likewise
 * @id: of the first record, 0 until that is in the ring
 * @linked: another source tells the same errors, and they are counted there
 * @rec: room of that record; constant
 *
 * The record is elsewhere, because every corrected error looks at all entries.
 */
struct hwerr_recent {
	u64 ident;
	u64 until;
	u64 mono_ns;
	u64 real_ns;
	u64 id;
	struct hwerr_record *rec;
	u32 pending;
	bool linked;
};

static struct {
	raw_spinlock_t lock;		/* guards all entries and their records */
	struct hwerr_recent entry[RECENT_ERRORS];
	u8 *records;			/* constant */
} recent;

static struct {
	raw_spinlock_t lock;		/* guards the entries */
	struct {
		u64 addr;
		u64 len;
		u64 id;
		u64 mono_ns;
		u32 sources;		/* that reported it, bits */
		u8 severity;		/* the worst of them, which the totals have */
	} entry[LINKED_MAX];
	unsigned int next;
} linked;

static struct workqueue_struct *hwerr_wq;
static siphash_key_t ident_key;

static void queue_fn(struct work_struct *work);
static void recent_fn(struct work_struct *work);
static DECLARE_DELAYED_WORK(queue_work_item, queue_fn);
static DECLARE_DELAYED_WORK(recent_work, recent_fn);

static u64 ident_of(u8 source, u64 a, u64 b, u64 c, u64 d)
{
	u64 v[] = { source, a, b, c, d };

	return siphash(v, sizeof(v), &ident_key) | 1;
}

void hwerr_draft_ident(struct hwerr_draft *draft, u64 a, u64 b, u64 c, u64 d)
{
	if (draft->rec.severity <= HWERR_SEV_CORRECTED)
		draft->ident = ident_of(draft->rec.source, a, b, c, d);
}

static inline struct hwerr_draft *pool_get(u64 but)
{
	s64 free = atomic64_read(&pool.free);
	int i;

	/* Pairs with hwerr_draft_put(): what was done to the draft is done. */
	do {
		if (!(free & ~but))
			return NULL;
		i = __ffs64(free & ~but);
	} while (!atomic64_try_cmpxchg(&pool.free, &free, free & ~BIT_ULL(i)));
	return &pool.drafts[i];
}

struct hwerr_draft *hwerr_draft_get(u8 source, u8 severity)
{
	struct hwerr_draft *d = pool_get(severity <= HWERR_SEV_CORRECTED ? POOL_RESERVED : 0);

	if (!d) {
		hwerr_ring_drop(severity, source);
		return NULL;
	}
	/* Whoever appends to @buf clears what it takes. */
	d->ident = 0;
	d->phys_addr = 0;
	d->phys_len = 0;
	d->pdev = NULL;
	d->no_link = false;
	d->recent = NULL;
	d->rec.len = sizeof(d->rec);
	d->rec.hdr_len = sizeof(d->rec);
	d->rec.version = HWERR_ABI_VERSION;
	d->rec.severity = severity;
	d->rec.source = source;
	d->rec.kind = 0;
	d->rec.component = 0;
	d->rec.flags = 0;
	d->rec.lost = 0;
	d->rec.seq = 0;
	d->rec.id = HWERR_NO_ID;
	d->rec.time_mono_ns = ktime_get_ns();
	d->rec.time_real_ns = ktime_mono_to_real(d->rec.time_mono_ns);
	d->rec.cpu = raw_smp_processor_id();
	d->rec.count = 1;
	d->rec.raw_severity = 0;
	d->rec.pad = 0;
	return d;
}

void hwerr_draft_put(struct hwerr_draft *d)
{
	/* Never the last reference: the device is bound or being reported. */
	if (d->pdev)
		pci_dev_put(d->pdev);
	d->pdev = NULL;
	/* Pairs with the exchange in pool_get(): whoever gets it has it alone. */
	smp_mb__before_atomic();
	atomic64_or(BIT_ULL(d - pool.drafts), &pool.free);
}

void *hwerr_draft_info(struct hwerr_draft *d, u16 type, size_t len)
{
	size_t room = sizeof(d->buf) - d->rec.len;
	struct hwerr_info *info;

	len = ALIGN(len, 8);
	if (len > room) {
		d->rec.flags |= HWERR_F_INFO_TRUNCATED;
		return NULL;
	}
	info = (void *)d->buf + d->rec.len;
	hwerr_clear(info, len);
	info->len = len;
	info->type = type;
	d->rec.len += len;
	return info;
}

/* Appends to the line of @n characters in @t, which has room for @room; its length. */
static size_t text_add(struct hwerr_draft *d, char *t, size_t n, size_t room, const char *s)
{
	ssize_t more = strscpy(t + n, s, room - n);

	if (more >= 0)
		return n + more;
	d->rec.flags |= HWERR_F_INFO_TRUNCATED;
	return room - 1;
}

void hwerr_draft_line(struct hwerr_draft *d, const char *a, const char *b)
{
	struct hwerr_info_text *t = (void *)d->buf + d->rec.len;
	size_t room = sizeof(d->buf) - d->rec.len;
	size_t n = 0, len;

	if (room < sizeof(*t) + 8) {
		d->rec.flags |= HWERR_F_INFO_TRUNCATED;
		return;
	}
	room = min_t(size_t, room - sizeof(*t), TEXT_ROOM);
	if (a)
		n = text_add(d, t->text, n, room, a);
	if (b && *b) {
		if (n)
			n = text_add(d, t->text, n, room, ": ");
		n = text_add(d, t->text, n, room, b);
	}
	if (!n)
		return;
	len = ALIGN(sizeof(*t) + n + 1, 8);
	memset(t->text + n, 0, len - sizeof(*t) - n);
	t->head.len = len;
	t->head.type = HWERR_INFO_TEXT;
	t->head.flags = 0;
	d->rec.len += len;
}

void hwerr_draft_text(struct hwerr_draft *d, const char *fmt, ...)
{
	char line[TEXT_ROOM];
	va_list args;

	va_start(args, fmt);
	if (vsnprintf(line, sizeof(line), fmt, args) >= sizeof(line))
		d->rec.flags |= HWERR_F_INFO_TRUNCATED;
	va_end(args);
	hwerr_draft_line(d, line, NULL);
}

void *hwerr_record_find(struct hwerr_record *rec, u16 type)
{
	void *end = (void *)rec + rec->len;
	struct hwerr_info *info;

	for (info = (void *)rec + rec->hdr_len; (void *)info < end;
	     info = (void *)info + info->len)
		if (info->type == type)
			return info;
	return NULL;
}

struct hwerr_info_memory *hwerr_draft_memory(struct hwerr_draft *d, u64 addr, u64 len)
{
	struct hwerr_info_memory *m;

	m = hwerr_draft_info(d, HWERR_INFO_MEMORY, sizeof(*m));
	if (!m)
		return NULL;
	m->phys_addr = addr;
	m->phys_len = len;
	m->mf_type = -1;
	m->mf_result = -1;
	d->phys_addr = addr;
	d->phys_len = len;
	return m;
}

/*
 * If this corrected error is one of the last second, counts it there and
 * returns true. Else makes an entry for it, unless all have repetitions to tell, so
 * that the next finds it: *@entry, to be completed by recent_first().
 */
static bool recent_repeats(struct hwerr_record *rec, u64 ident, struct hwerr_recent **entry)
{
	u64 now = ktime_get_ns();
	struct hwerr_recent *e, *room = NULL;
	unsigned long flags;
	bool repeats = false;
	bool counted = false;
	bool arm = false;
	u32 n = rec->count, pending;

	*entry = NULL;
	raw_spin_lock_irqsave(&recent.lock, flags);
	for (e = recent.entry; e < recent.entry + RECENT_ERRORS; e++) {
		if (e->ident && !e->pending && e->until <= now)
			e->ident = 0;
		if (e->ident == ident) {
			/* A program may claim four thousand million at once. */
			repeats = !check_add_overflow(e->pending, n, &pending);
			room = NULL;
			break;
		}
		/* Free, else the one that began longest ago and has nothing to tell. */
		if (!e->pending &&
		    (!room || (room->ident && (!e->ident || e->until < room->until))))
			room = e;
	}
	if (repeats) {
		arm = !e->pending;
		counted = e->linked;
		e->pending = pending;
		e->mono_ns = rec->time_mono_ns;
		e->real_ns = rec->time_real_ns;
	} else if (room) {
		room->ident = ident;
		room->until = now + COALESCE_NS;
		room->pending = 0;
		room->id = 0;
		room->linked = false;
		*entry = room;
	}
	raw_spin_unlock_irqrestore(&recent.lock, flags);

	if (repeats)
		hwerr_ring_coalesced(rec->severity, rec->source, n, counted);
	if (arm)
		queue_delayed_work(hwerr_wq, &recent_work,
				   nsecs_to_jiffies(COALESCE_NS) + 1);
	return repeats;
}

/*
 * With @id 0 the work item leaves the entry alone. It may have been given to
 * another error meanwhile: then @ident is another, and nothing is completed.
 */
static void recent_first(struct hwerr_recent *e, u64 ident, struct hwerr_record *rec)
{
	unsigned long flags;

	raw_spin_lock_irqsave(&recent.lock, flags);
	if (e->ident == ident && !e->id) {
		e->id = rec->id;
		e->linked = rec->flags & HWERR_F_LINKED;
		if (e->linked)	/* not known when they came */
			hwerr_ring_uncount(rec->severity, rec->source, e->pending);
		hwerr_copy(e->rec, rec, rec->len);
	}
	raw_spin_unlock_irqrestore(&recent.lock, flags);
}

/*
 * Who was hit by the first error need not be who is hit by the last: the record
 * in @d, a copy of the first one's, gets its owners anew.
 */
static void resolve_again(struct hwerr_draft *d)
{
	void *to = d->buf + d->rec.hdr_len, *end = d->buf + d->rec.len, *from;
	const struct hwerr_info_memory *m;
	const struct hwerr_info_pci *p;
	u32 len;

	d->phys_len = 0;
	d->pdev = NULL;
	m = hwerr_record_find(&d->rec, HWERR_INFO_MEMORY);
	if (m) {
		d->phys_addr = m->phys_addr;
		d->phys_len = m->phys_len;
	}
	p = hwerr_record_find(&d->rec, HWERR_INFO_PCI);
	if (p)
		d->pdev = pci_get_domain_bus_and_slot(p->domain, p->bus, p->devfn);
	if (d->rec.flags & HWERR_F_SOFTWARE || (!d->phys_len && !d->pdev))
		return;
	for (from = to; from < end; from += len) {
		const struct hwerr_info *info = from;

		len = info->len;
		if (info->type == HWERR_INFO_GUEST || info->type == HWERR_INFO_TASK)
			continue;
		memmove(to, from, len);
		to += len;
	}
	d->rec.len = to - (void *)d->buf;
	d->rec.flags &= ~(HWERR_F_OWNERS_UNKNOWN | HWERR_F_OWNERS_TRUNCATED);
	hwerr_owners_resolve(d, true);
}

/* Tells the repetitions of every window that is over; process context. */
static void recent_fn(struct work_struct *work)
{
	struct hwerr_draft *d = pool_get(0);
	bool again = false;
	int i;

	for (i = 0; i < RECENT_ERRORS; i++) {
		struct hwerr_recent *e = &recent.entry[i];
		u64 now = ktime_get_ns();
		bool due;

		raw_spin_lock_irq(&recent.lock);
		due = d && e->ident && e->pending && e->id && e->until <= now;
		if (due) {
			hwerr_copy(d->buf, e->rec, e->rec->len);
			d->rec.count = e->pending;
			d->rec.id = e->id;
			d->rec.time_mono_ns = e->mono_ns;
			d->rec.time_real_ns = e->real_ns;
			d->rec.flags |= HWERR_F_COALESCED;
			e->pending = 0;
			e->until = now + COALESCE_NS;
		}
		again |= e->ident && e->pending;
		raw_spin_unlock_irq(&recent.lock);
		if (!due)
			continue;
		resolve_again(d);
		hwerr_ring_put(&d->rec, false);
		hwerr_ring_wake(&d->rec);
		pci_dev_put(d->pdev);
		d->pdev = NULL;
	}
	if (d) {
		d->pdev = NULL;
		hwerr_draft_put(d);
	}
	if (again)
		queue_delayed_work(hwerr_wq, &recent_work, HZ / 10);
}

/*
 * Lock held. Looks for an earlier record of the same memory by another source, of an error
 * that was corrected as this one was, or was not as this one was not: then sets
 * @id and HWERR_F_LINKED. A source that already reported it reports a new error with it.
 * Returns the severity that the totals have of it.
 */
static u8 link_find(struct hwerr_record *rec, u64 addr, u64 len)
{
	bool corrected = rec->severity <= HWERR_SEV_CORRECTED;
	u8 severity = rec->severity;
	u64 now = ktime_get_ns();
	int i;

	for (i = 1; i <= LINKED_MAX; i++) {
		int n = (linked.next + LINKED_MAX - i) % LINKED_MAX;
		bool was_corrected = linked.entry[n].severity <= HWERR_SEV_CORRECTED;

		if (!linked.entry[n].id || now - linked.entry[n].mono_ns > LINK_NS ||
		    addr + len <= linked.entry[n].addr ||
		    linked.entry[n].addr + linked.entry[n].len <= addr ||
		    corrected != was_corrected)
			continue;
		if (!(linked.entry[n].sources & BIT(rec->source))) {
			linked.entry[n].sources |= BIT(rec->source);
			severity = linked.entry[n].severity;
			linked.entry[n].severity = max(severity, rec->severity);
			rec->id = linked.entry[n].id;
			rec->flags |= HWERR_F_LINKED;
		}
		break;
	}
	return severity;
}

/* Lock held. */
static void link_add(struct hwerr_record *rec, u64 addr, u64 len)
{
	int n = linked.next++ % LINKED_MAX;

	linked.entry[n].addr = addr;
	linked.entry[n].len = len;
	linked.entry[n].id = rec->id;
	linked.entry[n].mono_ns = ktime_get_ns();
	linked.entry[n].sources = BIT(rec->source);
	linked.entry[n].severity = rec->severity;
}

/*
 * As hwerr_ring_put(). Two sources that tell of one error at the same time, on two CPUs,
 * find each other: the later one looks when the earlier one has its number.
 */
static void put_linked(struct hwerr_record *rec, const struct hwerr_info_memory *m)
{
	unsigned long flags;
	u8 counted;

	raw_spin_lock_irqsave(&linked.lock, flags);
	counted = link_find(rec, m->phys_addr, m->phys_len);
	hwerr_ring_put(rec, true);
	if (counted < rec->severity)
		hwerr_ring_regrade(counted, rec->severity);
	if (!(rec->flags & HWERR_F_LINKED))
		link_add(rec, m->phys_addr, m->phys_len);
	raw_spin_unlock_irqrestore(&linked.lock, flags);
}

static __always_inline void publish(struct hwerr_record *rec, struct hwerr_recent *entry,
				    u64 ident, bool link)
{
	struct hwerr_info_memory *m = NULL;

	if (link)
		m = hwerr_record_find(rec, HWERR_INFO_MEMORY);
	if (m)
		put_linked(rec, m);
	else
		hwerr_ring_put(rec, true);
	hwerr_ring_wake(rec);
	if (entry)
		recent_first(entry, ident, rec);
}

static __always_inline void finish(struct hwerr_draft *d, bool may_sleep)
{
	if (d->phys_len || d->pdev)
		hwerr_owners_resolve(d, may_sleep);
	publish(&d->rec, d->recent, d->ident, !d->no_link);
	hwerr_draft_put(d);
}

static void queue_fn(struct work_struct *work)
{
	u64 until = ktime_get_ns() + QUEUE_RUN_NS;
	struct hwerr_draft *d;

	for (;;) {
		if (ktime_get_ns() >= until) {
			queue_delayed_work(hwerr_wq, &queue_work_item, QUEUE_PAUSE);
			return;
		}
		raw_spin_lock_irq(&pool.lock);
		d = list_first_entry_or_null(&pool.queue, struct hwerr_draft, node);
		if (d)
			list_del(&d->node);
		raw_spin_unlock_irq(&pool.lock);
		if (!d)
			return;
		finish(d, true);
		cond_resched();
	}
}

void hwerr_submit(struct hwerr_draft *d)
{
	unsigned long flags;

	/* Before the queue, which a storm of one error would fill. */
	if (d->ident && !(d->rec.flags & HWERR_F_EARLIER) &&
	    recent_repeats(&d->rec, d->ident, &d->recent)) {
		hwerr_draft_put(d);
		return;
	}
	/*
	 * Owners are behind locks that are not taken from interrupts, and the
	 * holders of a device are looked for among all processes.
	 */
	if (((d->phys_len || d->pdev) && (!in_task() || irqs_disabled())) ||
	    (d->pdev && !preemptible())) {
		raw_spin_lock_irqsave(&pool.lock, flags);
		list_add_tail(&d->node, &pool.queue);
		raw_spin_unlock_irqrestore(&pool.lock, flags);
		queue_delayed_work(hwerr_wq, &queue_work_item, 0);
		return;
	}
	finish(d, preemptible());
}

void hwerr_publish_user(struct hwerr_record *rec)
{
	struct hwerr_recent *entry = NULL;
	u64 ident = 0;

	rec->lost = 0;
	rec->flags |= HWERR_F_SOFTWARE;
	if (!rec->count)
		rec->count = 1;
	if (!rec->time_mono_ns) {
		rec->time_mono_ns = ktime_get_ns();
		rec->time_real_ns = ktime_get_real_ns();
	}
	/* A record that says of itself what it belongs to is left as it is. */
	if (rec->severity <= HWERR_SEV_CORRECTED && !rec->id) {
		u64 class = (u64)rec->severity << 48 | (u64)rec->kind << 40 |
			    (u64)rec->component << 32 | rec->raw_severity;

		ident = siphash((void *)rec + rec->hdr_len,
				rec->len - rec->hdr_len, &ident_key);
		ident = ident_of(rec->source, class, ident, rec->flags, rec->cpu);
		if (recent_repeats(rec, ident, &entry))
			return;
	}
	publish(rec, entry, ident, false);
}

void hwerr_record_flush(void)
{
	/* It may have paused before the end of the queue. */
	while (flush_delayed_work(&queue_work_item))
		;
}

int hwerr_record_init(void)
{
	int i;

	raw_spin_lock_init(&pool.lock);
	raw_spin_lock_init(&recent.lock);
	raw_spin_lock_init(&linked.lock);
	INIT_LIST_HEAD(&pool.queue);
	get_random_bytes(&ident_key, sizeof(ident_key));

	hwerr_wq = alloc_workqueue("hwerr", WQ_HIGHPRI | WQ_MEM_RECLAIM | WQ_UNBOUND, 1);
	pool.drafts = vzalloc(array_size(POOL_DRAFTS, sizeof(*pool.drafts)));
	recent.records = vzalloc(array_size(RECENT_ERRORS, HWERR_RECORD_MAX));
	if (!hwerr_wq || !pool.drafts || !recent.records) {
		hwerr_record_exit();
		return -ENOMEM;
	}
	for (i = 0; i < RECENT_ERRORS; i++)
		recent.entry[i].rec = (void *)recent.records + i * HWERR_RECORD_MAX;
	atomic64_set(&pool.free, ~0ULL);
	return 0;
}

/* Sources are gone, and so is every reader. */
void hwerr_record_exit(void)
{
	if (hwerr_wq) {
		hwerr_record_flush();
		cancel_delayed_work_sync(&recent_work);
		destroy_workqueue(hwerr_wq);
		hwerr_wq = NULL;
	}
	vfree(recent.records);
	vfree(pool.drafts);
	recent.records = NULL;
	pool.drafts = NULL;
}
