// SPDX-License-Identifier: GPL-2.0-only
/*
 * Two byte rings with one sequence, and any number of cursors over them.
 *
 * Why bytes and not slots: records are between 72 bytes and a page, and what a
 * late reader finds is history, so room is worth the arithmetic. Why two: a
 * DIMM that corrects a thousand errors a second must not push out the one
 * uncorrected error that somebody will ask about. Why one raw spinlock: pushes
 * come from hard interrupts and hold it for one memcpy; readers hold it for one
 * memcpy or HWERR_STEPS headers, whatever they ask for. The one exception is a privileged
 * reader's seek to a number, which is a walk over the headers of both rings and what
 * limits their size.
 *
 * Positions are 64-bit byte counts that only grow; a position modulo the ring's
 * size is an offset. A record is contiguous: where it would cross the end, a
 * zero length marks the rest as filler.
 *
 * Loss is not counted when a record is evicted, which would be work per reader,
 * but when a reader finds its cursor behind the tail. Everything that ever left
 * a ring is counted by class in @evicted; everything a reader has stepped over
 * or taken is counted by class in its @passed, from the same zero. Records leave
 * in the order readers meet them, so while a cursor is behind the tail,
 * evicted - passed is what this reader missed, and summing over the classes its
 * filter admits is exact.
 */
#include <linux/hashtable.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/random.h>
#include <linux/siphash.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "hwerr.h"
#include "ring.h"

/* What is looked at in one hold of the lock: so many headers, fewer if they have many infos. */
#define HWERR_STEPS	64

/**
 * struct hwerr_ring - one of the two
 * @buf: storage
 * @head: where the next record goes
 * @tail: oldest record
 */
struct hwerr_ring {
	u8 *buf;
	u64 head;
	u64 tail;
};

static struct {
	raw_spinlock_t lock;		/* guards all below */
	u32 size;			/* of each ring, power of two; constant */
	struct hwerr_ring ring[2];
	u64 next_seq;
	u64 readers;
	unsigned int audiences;
	struct hwerr_matrix evicted;
	struct hwerr_matrix pushed;
	struct hwerr_matrix dropped;
	u64 n_dropped;
	struct hwerr_ioc_stats total;	/* its reader_ fields are unused */
	siphash_key_t key;		/* constant */
	DECLARE_HASHTABLE(audience, 12);
} core;

/* All readers but those of HWERR_SCOPE_SELF. */
static DECLARE_WAIT_QUEUE_HEAD(waitq);

static int ring_of(u8 severity)
{
	return severity > HWERR_SEV_CORRECTED;
}

static struct hwerr_record *ring_at(struct hwerr_ring *ring, u64 pos)
{
	return (struct hwerr_record *)(ring->buf + (pos & (core.size - 1)));
}

/* The first record at or after @pos, which moves there; NULL at the head. */
static __always_inline struct hwerr_record *ring_skip_filler(struct hwerr_ring *ring, u64 *pos)
{
	struct hwerr_record *rec;

	if (*pos == ring->head)
		return NULL;
	rec = ring_at(ring, *pos);
	if (rec->len)
		return rec;
	*pos = (*pos | (core.size - 1)) + 1;
	return *pos == ring->head ? NULL : ring_at(ring, *pos);
}

static bool is_owner(const struct hwerr_info *info)
{
	/* TASK and GUEST agree on these fields; see the build check in init. */
	return info->type == HWERR_INFO_GUEST || info->type == HWERR_INFO_TASK;
}

static bool info_of(const struct hwerr_info *info, s32 tgid, u64 start_ns)
{
	const struct hwerr_info_task *t = (const void *)info;

	return is_owner(info) && t->tgid == tgid &&
	       (!start_ns || t->start_ns == start_ns);
}

/* Of HWERR_STEPS: its infos may all have to be looked at. */
static int cost(const struct hwerr_record *rec)
{
	return 1 + rec->len / 256;
}

#define for_each_info(info, rec)						\
	for (info = (void *)(rec) + (rec)->hdr_len;				\
	     (void *)(info) < (void *)(rec) + (rec)->len;			\
	     info = (void *)(info) + (info)->len)

static bool hits(struct hwerr_record *rec, s32 tgid, u64 start_ns)
{
	struct hwerr_info *info;

	for_each_info(info, rec)
		if (info_of(info, tgid, start_ns))
			return true;
	return false;
}

/* No earlier info of @rec is of that process; with no @start_ns, of that number. */
static bool first_of(const struct hwerr_record *rec, const struct hwerr_info *of, u64 start_ns)
{
	const struct hwerr_info_task *t = (const void *)of;
	const struct hwerr_info *info;

	for_each_info(info, rec) {
		if (info == of)
			return true;
		if (info_of(info, t->tgid, start_ns))
			return false;
	}
	return true;
}

/* Keyed: a process may leave as many audiences as it likes, but not choose whom they slow. */
static u32 audience_hash(s32 tgid, u64 start_ns)
{
	return siphash_2u64(tgid, start_ns, &core.key);
}

/* Ring lock held, or RCU. Whoever wants what hits that process: it alone, or any of its number. */
static struct hwerr_audience *audience_find(s32 tgid, u64 start_ns)
{
	struct hwerr_audience *a;

	hash_for_each_possible_rcu(core.audience, a, node, audience_hash(tgid, start_ns),
				   lockdep_is_held(&core.lock))
		if (a->tgid == tgid && a->start_ns == start_ns)
			return a;
	return NULL;
}

static void audience_evict(struct hwerr_record *rec)
{
	struct hwerr_info *info;

	for_each_info(info, rec) {
		const struct hwerr_info_task *t = (const void *)info;
		struct hwerr_audience *a;

		if (!is_owner(info))
			continue;
		if (t->start_ns && first_of(rec, info, t->start_ns)) {
			a = audience_find(t->tgid, t->start_ns);
			if (a)
				a->evicted.n[rec->severity][rec->source]++;
		}
		if (first_of(rec, info, 0)) {
			a = audience_find(t->tgid, 0);
			if (a)
				a->evicted.n[rec->severity][rec->source]++;
		}
	}
}

static __always_inline void ring_evict(struct hwerr_ring *ring)
{
	struct hwerr_record *rec = ring_skip_filler(ring, &ring->tail);

	if (!rec)
		return;
	core.evicted.n[rec->severity][rec->source]++;
	core.total.evicted++;
	if (core.audiences)
		audience_evict(rec);
	ring->tail += rec->len;
}

static void count_errors(u8 severity, u8 source, u64 n)
{
	core.total.errors += n;
	core.total.by_severity[severity] += n;
	core.total.by_source[source] += n;
}

void hwerr_ring_put(struct hwerr_record *rec, bool count)
{
	struct hwerr_ring *ring = &core.ring[ring_of(rec->severity)];
	unsigned long flags;
	u32 room;

	rec->lost = 0;
	raw_spin_lock_irqsave(&core.lock, flags);
	room = core.size - (ring->head & (core.size - 1));
	if (room < rec->len) {
		while (ring->head + room - ring->tail > core.size)
			ring_evict(ring);
		ring_at(ring, ring->head)->len = 0;
		ring->head += room;
	}
	while (ring->head + rec->len - ring->tail > core.size)
		ring_evict(ring);
	/* Filler left at the tail would hide that the ring is empty. */
	ring_skip_filler(ring, &ring->tail);

	rec->seq = core.next_seq;
	if (rec->id == HWERR_NO_ID)
		rec->id = rec->seq;
	hwerr_copy(ring_at(ring, ring->head), rec, rec->len);
	ring->head += rec->len;
	core.pushed.n[rec->severity][rec->source]++;
	core.total.records++;
	if (rec->flags & HWERR_F_LINKED)
		core.total.linked++;
	else if (count)
		count_errors(rec->severity, rec->source, rec->count);
	if (rec->flags & HWERR_F_OWNERS_UNKNOWN)
		core.total.owners_unknown++;
	WRITE_ONCE(core.next_seq, rec->seq + 1);
	raw_spin_unlock_irqrestore(&core.lock, flags);
}

static void wake(wait_queue_head_t *wq)
{
	/* Pairs with the barrier in poll_wait() and prepare_to_wait(). */
	if (wq_has_sleeper(wq))
		wake_up_interruptible_poll(wq, EPOLLIN | EPOLLRDNORM);
}

void hwerr_ring_wake(const struct hwerr_record *rec)
{
	const struct hwerr_info *info;
	struct hwerr_audience *a;

	wake(&waitq);
	/* Under the ring lock: who is not seen here was no reader yet when @rec was put. */
	if (!READ_ONCE(core.audiences))
		return;
	/* An audience that is left is freed after a grace period. */
	rcu_read_lock();
	for_each_info(info, rec) {
		const struct hwerr_info_task *t = (const void *)info;

		if (!is_owner(info) || !first_of(rec, info, t->start_ns))
			continue;
		a = audience_find(t->tgid, t->start_ns);
		if (a)
			wake(&a->waitq);
	}
	rcu_read_unlock();
}

wait_queue_head_t *hwerr_reader_waitq(struct hwerr_reader *r)
{
	return r->scope == HWERR_SCOPE_SELF ? &r->audience->waitq : &waitq;
}

void hwerr_ring_drop(u8 severity, u8 source)
{
	unsigned long flags;

	raw_spin_lock_irqsave(&core.lock, flags);
	core.dropped.n[severity][source]++;
	core.n_dropped++;
	core.total.dropped++;
	count_errors(severity, source, 1);
	raw_spin_unlock_irqrestore(&core.lock, flags);
}

void hwerr_ring_coalesced(u8 severity, u8 source, u32 n, bool counted)
{
	unsigned long flags;

	raw_spin_lock_irqsave(&core.lock, flags);
	core.total.coalesced += n;
	if (!counted)
		count_errors(severity, source, n);
	raw_spin_unlock_irqrestore(&core.lock, flags);
}

void hwerr_ring_uncount(u8 severity, u8 source, u32 n)
{
	unsigned long flags;

	raw_spin_lock_irqsave(&core.lock, flags);
	count_errors(severity, source, -(u64)n);
	raw_spin_unlock_irqrestore(&core.lock, flags);
}

void hwerr_ring_regrade(u8 from, u8 to)
{
	unsigned long flags;

	raw_spin_lock_irqsave(&core.lock, flags);
	core.total.by_severity[from]--;
	core.total.by_severity[to]++;
	raw_spin_unlock_irqrestore(&core.lock, flags);
}

u64 hwerr_ring_version(void)
{
	return READ_ONCE(core.next_seq);
}

static bool wants_class(const struct hwerr_reader *r, u8 severity, u8 source)
{
	return (!r->filter.severities || r->filter.severities & BIT_ULL(severity)) &&
	       (!r->filter.sources || r->filter.sources & BIT_ULL(source));
}

static const struct hwerr_matrix *evicted_for(const struct hwerr_audience *a)
{
	return a ? &a->evicted : &core.evicted;
}

/* Ring lock held. Is @rec one of those that a reader of @a counts in its @passed? */
static bool counted(const struct hwerr_audience *a, struct hwerr_record *rec)
{
	return !a || hits(rec, a->tgid, a->start_ns);
}

static void lose(struct hwerr_reader *r, u64 n)
{
	r->pending += n;
	r->lost += n;
}

/* Ring lock held. Accounts for what left @ring under the cursor. */
static void settle(struct hwerr_reader *r, int ring)
{
	const struct hwerr_matrix *evicted = evicted_for(r->audience);
	int sev, src;
	u64 n = 0;

	if (likely(r->pos[ring] >= core.ring[ring].tail))
		return;
	for (sev = 0; sev < HWERR_SEV_COUNT; sev++) {
		if (ring_of(sev) != ring)
			continue;
		for (src = 0; src < HWERR_SRC_COUNT; src++) {
			if (wants_class(r, sev, src))
				n += evicted->n[sev][src] - r->passed.n[sev][src];
			r->passed.n[sev][src] = evicted->n[sev][src];
		}
	}
	r->pos[ring] = core.ring[ring].tail;
	lose(r, n);
}

static void settle_dropped(struct hwerr_reader *r)
{
	int sev, src;

	for (sev = 0; sev < HWERR_SEV_COUNT; sev++)
		for (src = 0; src < HWERR_SRC_COUNT; src++)
			if (wants_class(r, sev, src))
				lose(r, core.dropped.n[sev][src] -
					r->dropped.n[sev][src]);
	r->dropped = core.dropped;
}

/**
 * struct count - a walk over what lies behind a cursor that is to be set
 * @at: how far it is, in each ring; in the end, the cursor
 * @to: where it ends, at the latest at the head
 * @seq: or at the first record with a number of at least this
 */
struct count {
	u64 at[2];
	u64 to[2];
	u64 seq;
};

/* Ring lock held. All that ever left @ring is behind a cursor at its tail. */
static void count_from_tail(struct hwerr_reader *r, const struct hwerr_matrix *evicted,
			    struct count *c, int ring)
{
	int sev;

	c->at[ring] = core.ring[ring].tail;
	for (sev = 0; sev < HWERR_SEV_COUNT; sev++)
		if (ring_of(sev) == ring)
			memcpy(r->count.n[sev], evicted->n[sev], sizeof(r->count.n[sev]));
}

/*
 * Ring lock held. Counts some more of those that @a is about; false if that was not all. If it
 * was, both cursors are where they shall be at this moment, whatever came during the walk.
 */
static bool count_some(struct hwerr_reader *r, const struct hwerr_audience *a, struct count *c)
{
	int i, steps = HWERR_STEPS;

	for (i = 0; i < 2; i++) {
		struct hwerr_ring *ring = &core.ring[i];

		if (c->at[i] < ring->tail)
			count_from_tail(r, evicted_for(a), c, i);
		while (c->at[i] < c->to[i]) {
			struct hwerr_record *rec = ring_skip_filler(ring, &c->at[i]);

			if (!rec || c->at[i] >= c->to[i] || rec->seq >= c->seq)
				break;
			if (steps <= 0)
				return false;
			steps -= cost(rec);
			if (counted(a, rec))
				r->count.n[rec->severity][rec->source]++;
			c->at[i] += rec->len;
		}
	}
	return true;
}

/*
 * Reader's lock held. Leaves in @r->count, by class, those of @a's records that lie behind
 * the cursors @c->at, and returns with the ring lock held, so that this is so. It is held
 * for HWERR_STEPS at a time: anybody may ask for this, again and again. Where the tail
 * overtakes the walk it goes on from there: as if it had been asked for later. open() is
 * called under a lock of all misc devices, so this does not give the CPU away.
 */
static void count_behind(struct hwerr_reader *r, const struct hwerr_audience *a, struct count *c)
	__acquires(&core.lock)
{
	int i;

	raw_spin_lock_irq(&core.lock);
	for (i = 0; i < 2; i++)
		count_from_tail(r, evicted_for(a), c, i);
	while (!count_some(r, a, c)) {
		raw_spin_unlock_irq(&core.lock);
		cpu_relax();
		raw_spin_lock_irq(&core.lock);
	}
}

/* Ring lock held: records held with a number of at least @seq. */
static u64 held_from(u64 seq)
{
	u64 n = 0;
	int i;

	for (i = 0; i < 2; i++) {
		u64 pos = core.ring[i].tail;
		struct hwerr_record *rec;

		while ((rec = ring_skip_filler(&core.ring[i], &pos))) {
			n += rec->seq >= seq;
			pos += rec->len;
		}
	}
	return n;
}

static u64 oldest_held(void)
{
	u64 seq = 0;
	int i;

	for (i = 0; i < 2; i++) {
		u64 pos = core.ring[i].tail;
		struct hwerr_record *rec = ring_skip_filler(&core.ring[i], &pos);

		if (rec && (!seq || rec->seq < seq))
			seq = rec->seq;
	}
	return seq;
}

void hwerr_reader_start(struct hwerr_reader *r, u32 whence, u64 seq)
{
	struct count c = { .to = { U64_MAX, U64_MAX }, .seq = U64_MAX };
	int i;

	lockdep_assert_held(&r->lock);
	if (whence == HWERR_SEEK_NOW && !r->audience) {
		raw_spin_lock_irq(&core.lock);
		for (i = 0; i < 2; i++)
			c.at[i] = core.ring[i].head;
		r->count = core.pushed;
	} else {
		if (whence == HWERR_SEEK_OLDEST)
			memset(c.to, 0, sizeof(c.to));
		/* Behind what is older: evicted later, it is nobody's loss. */
		if (whence == HWERR_SEEK_SEQ)
			c.seq = seq;
		count_behind(r, r->audience, &c);
	}
	memcpy(r->pos, c.at, sizeof(r->pos));
	memcpy(r->taken, c.at, sizeof(r->taken));
	r->passed = r->count;
	r->dropped = core.dropped;
	r->lost -= r->pending;
	r->pending = 0;
	if (whence == HWERR_SEEK_SEQ && r->scope == HWERR_SCOPE_ALL &&
	    seq && seq < core.next_seq)
		lose(r, core.next_seq - seq - held_from(seq));
	raw_spin_unlock_irq(&core.lock);
}

static bool stop_of(const struct hwerr_info *info, s32 tgid, u64 start_ns)
{
	const struct hwerr_info_stop *s = (const void *)info;

	return info->type == HWERR_INFO_STOP && s->tgid == tgid && s->start_ns == start_ns;
}

/* The header log of a request downstream has the host-physical address of a BAR. */
static void redact_pci(struct hwerr_info_pci *pci)
{
	memset(pci->tlp, 0, sizeof(pci->tlp));
	pci->flags &= ~HWERR_PCI_TLP;
}

/* Leaves of @rec what a scoped reader may see. */
static void redact(struct hwerr_record *rec, const struct hwerr_reader *r)
{
	void *to = (void *)rec + rec->hdr_len;
	void *end = (void *)rec + rec->len;
	void *from;
	u32 len;

	for (from = to; from < end; from += len) {
		struct hwerr_info *info = from;

		len = info->len;
		if (info->type == HWERR_INFO_PCI || info->type == HWERR_INFO_VCPU ||
		    stop_of(info, r->tgid, r->start_ns) ||
		    info_of(info, r->tgid, r->start_ns)) {
			if (info->type == HWERR_INFO_PCI)
				redact_pci((struct hwerr_info_pci *)info);
			memmove(to, from, len);
			to += len;
		}
	}
	rec->len = to - (void *)rec;
	rec->cpu = -1;
	rec->flags |= HWERR_F_REDACTED;
}

/*
 * Ring lock held. Moves the cursor of @ring over what @r does not want.
 * Returns the record it stops at, or NULL; @steps is used up if it gave up early.
 */
static struct hwerr_record *advance(struct hwerr_reader *r, int ring, int *steps)
{
	struct hwerr_record *rec;

	settle(r, ring);
	while (*steps > 0) {
		bool mine;

		rec = ring_skip_filler(&core.ring[ring], &r->pos[ring]);
		if (!rec)
			return NULL;
		mine = counted(r->audience, rec);
		if (mine && wants_class(r, rec->severity, rec->source))
			return rec;
		if (mine)
			r->passed.n[rec->severity][rec->source]++;
		*steps -= cost(rec);
		r->pos[ring] += rec->len;
	}
	return NULL;
}

bool hwerr_reader_peek(struct hwerr_reader *r, struct hwerr_peek *p, bool copy)
{
	struct hwerr_record *rec[2], *best;
	int steps;

	lockdep_assert_held(&r->lock);
	do {
		steps = HWERR_STEPS;
		raw_spin_lock_irq(&core.lock);
		if (core.n_dropped)
			settle_dropped(r);
		rec[0] = advance(r, 0, &steps);
		rec[1] = advance(r, 1, &steps);
		best = rec[0];
		if (!best || (rec[1] && rec[1]->seq < best->seq))
			best = rec[1];
		if (best && steps > 0) {
			p->ring = best == rec[1];
			p->next = r->pos[p->ring] + best->len;
			p->severity = best->severity;
			p->source = best->source;
			p->len = best->len;
			if (copy)
				hwerr_copy(r->bounce, best, best->len);
		}
		raw_spin_unlock_irq(&core.lock);
		cond_resched();
	} while (steps <= 0);

	if (!best)
		return false;
	if (copy) {
		struct hwerr_record *out = (void *)r->bounce;

		out->lost = r->pending;
		if (r->scope == HWERR_SCOPE_SELF)
			redact(out, r);
	}
	return true;
}

/* The record may be gone from the ring by now: it still counts as passed. */
void hwerr_reader_take(struct hwerr_reader *r, const struct hwerr_peek *p)
{
	lockdep_assert_held(&r->lock);
	r->pos[p->ring] = p->next;
	r->taken[p->ring] = p->next;
	r->passed.n[p->severity][p->source]++;
	r->pending = 0;
	r->read++;
}

/* Ring lock held. Returns what the caller shall free. */
static struct hwerr_audience *audience_leave(struct hwerr_audience *a)
{
	if (!a || --a->users)
		return NULL;
	hash_del_rcu(&a->node);
	WRITE_ONCE(core.audiences, core.audiences - 1);
	return a;
}

int hwerr_reader_filter(struct hwerr_reader *r, const struct hwerr_ioc_filter *f)
{
	bool self = r->scope == HWERR_SCOPE_SELF;
	struct hwerr_audience *fresh = NULL, *gone, *a = NULL;
	s32 tgid = self ? r->tgid : f->tgid;
	u64 start_ns = self ? r->start_ns : 0;
	struct count c = { .seq = U64_MAX };
	int i;

	lockdep_assert_held(&r->lock);
	if (tgid) {
		fresh = kzalloc(sizeof(*fresh), GFP_KERNEL_ACCOUNT);
		if (!fresh)
			return -ENOMEM;
		fresh->tgid = tgid;
		fresh->start_ns = start_ns;
		init_waitqueue_head(&fresh->waitq);
		raw_spin_lock_irq(&core.lock);
		a = audience_find(tgid, start_ns);
		if (!a) {
			a = fresh;
			fresh = NULL;
			hash_add_rcu(core.audience, &a->node, audience_hash(tgid, start_ns));
			WRITE_ONCE(core.audiences, core.audiences + 1);
		}
		a->users++;
		raw_spin_unlock_irq(&core.lock);
		kfree(fresh);
	}

	/* What the old filter stepped over, poll() included, was not read. */
	for (i = 0; i < 2; i++)
		c.to[i] = r->taken[i];
	count_behind(r, a, &c);
	for (i = 0; i < 2; i++) {
		/* What was lost until now, was lost under the old filter. */
		settle(r, i);
		r->pos[i] = c.at[i];
	}
	settle_dropped(r);
	gone = audience_leave(r->audience);
	/* A scoped reader's stays, see hwerr_reader_waitq(). */
	if (r->audience != a)
		r->audience = a;
	r->filter = *f;
	r->passed = r->count;
	raw_spin_unlock_irq(&core.lock);
	if (gone)
		kfree_rcu(gone, rcu);
	return 0;
}

void hwerr_reader_stats(struct hwerr_reader *r, struct hwerr_ioc_stats *s)
{
	int i;

	raw_spin_lock_irq(&core.lock);
	for (i = 0; i < 2; i++)
		settle(r, i);
	settle_dropped(r);
	if (r->scope == HWERR_SCOPE_ALL) {
		*s = core.total;
		s->readers = core.readers;
	} else {
		memset(s, 0, sizeof(*s));
	}
	raw_spin_unlock_irq(&core.lock);
	s->reader_read = r->read;
	s->reader_lost = r->lost;
	s->reader_pending = r->pending;
}

void hwerr_reader_info(struct hwerr_reader *r, struct hwerr_ioc_info *i)
{
	memset(i, 0, sizeof(*i));
	i->abi_version = HWERR_ABI_VERSION;
	i->record_max = HWERR_RECORD_MAX;
	i->scope = r->scope;
	i->sources = hwerr_sources_attached();
	i->ring_bytes[0] = core.size;
	i->ring_bytes[1] = core.size;
	if (r->scope != HWERR_SCOPE_ALL)
		return;
	raw_spin_lock_irq(&core.lock);
	i->oldest_seq = oldest_held();
	i->next_seq = core.next_seq;
	raw_spin_unlock_irq(&core.lock);
}

struct hwerr_reader *hwerr_reader_new(u32 scope)
{
	struct hwerr_reader *r = kvzalloc(sizeof(*r), GFP_KERNEL_ACCOUNT);
	struct hwerr_ioc_filter none = {};

	if (!r)
		return NULL;
	mutex_init(&r->lock);
	init_waitqueue_head(&r->waitq);
	r->scope = scope;
	r->pid = get_pid(task_tgid(current));
	r->tgid = task_tgid_nr(current);
	r->start_ns = current->group_leader->start_boottime;
	mutex_lock(&r->lock);
	if (hwerr_reader_filter(r, &none)) {
		mutex_unlock(&r->lock);
		mutex_destroy(&r->lock);
		put_pid(r->pid);
		kvfree(r);
		return NULL;
	}
	hwerr_reader_start(r, HWERR_SEEK_NOW, 0);
	mutex_unlock(&r->lock);
	raw_spin_lock_irq(&core.lock);
	core.readers++;
	raw_spin_unlock_irq(&core.lock);
	return r;
}

void hwerr_reader_free(struct hwerr_reader *r)
{
	struct hwerr_audience *gone;

	raw_spin_lock_irq(&core.lock);
	core.readers--;
	gone = audience_leave(r->audience);
	raw_spin_unlock_irq(&core.lock);
	if (gone)
		kfree_rcu(gone, rcu);
	mutex_destroy(&r->lock);
	put_pid(r->pid);
	kvfree(r);
}

int hwerr_ring_init(unsigned int bytes)
{
	int i;

	BUILD_BUG_ON(offsetof(struct hwerr_info_guest, tgid) !=
		     offsetof(struct hwerr_info_task, tgid));
	BUILD_BUG_ON(offsetof(struct hwerr_info_guest, start_ns) !=
		     offsetof(struct hwerr_info_task, start_ns));

	raw_spin_lock_init(&core.lock);
	hash_init(core.audience);
	get_random_bytes(&core.key, sizeof(core.key));
	core.size = bytes;
	core.next_seq = 1;
	for (i = 0; i < 2; i++) {
		core.ring[i].buf = vzalloc(bytes);
		if (!core.ring[i].buf) {
			hwerr_ring_exit();
			return -ENOMEM;
		}
	}
	return 0;
}

void hwerr_ring_exit(void)
{
	int i;

	for (i = 0; i < 2; i++) {
		vfree(core.ring[i].buf);
		core.ring[i].buf = NULL;
	}
}
