// SPDX-License-Identifier: GPL-2.0-only
/*
 * Pages that the kernel took out: memory_failure().
 *
 * Its result is told by the memory_failure_event tracepoint; then the page is
 * unmapped and nobody owns it any more. So a return probe looks at its start:
 * the entry handler makes the draft and finds the owners, the tracepoint, in the
 * same task and inside the call, completes and submits it, and the return
 * handler gives up a draft whose call ended without a result (page outside the
 * kernel's control, test filter). Without the probe the tracepoint alone makes
 * the record, with owners unknown.
 *
 * soft_offline_page() moves a page that still works: not an error of its own.
 */
#include <linux/kprobes.h>
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/memory_hotplug.h>
#include <linux/preempt.h>
#include <linux/sched.h>
#include <linux/spinlock.h>

#include "classify.h"
#include "compat.h"
#include "hwerr.h"

#define CALLS_MAX	16
#define SEEN_MAX	64

/**
 * struct memfail_call - a call of memory_failure() under way
 * @task: caller, NULL if the slot is free
 * @pfn: its page
 * @flags: enum mf_flags
 * @draft: NULL once submitted, or if there was none (counted as a loss)
 */
struct memfail_call {
	struct task_struct *task;
	unsigned long pfn;
	int flags;
	struct hwerr_draft *draft;
};

static struct {
	raw_spinlock_t lock;			/* guards the rest */
	struct memfail_call call[CALLS_MAX];
	unsigned long seen[SEEN_MAX];		/* pages told live, plus one */
	unsigned int next_seen;
} memfail = {
	.lock = __RAW_SPIN_LOCK_UNLOCKED(memfail.lock),
};

static struct hwerr_draft *memfail_draft(unsigned long pfn)
{
	struct hwerr_draft *d = hwerr_draft_get(HWERR_SRC_MEMORY_FAILURE,
						HWERR_SEV_RECOVERABLE);

	if (!d)
		return NULL;
	hwerr_draft_memory(d, PFN_PHYS(pfn), PAGE_SIZE);
	/* What is poisoned is a page; what its owners lose may be more. */
	d->phys_len = hwerr_huge_size(pfn);
	d->phys_addr = PFN_PHYS(pfn) & ~(d->phys_len - 1);
	return d;
}

/* The draft is complete but for the result: no more lookups, the page is gone. */
static void owners_done(struct hwerr_draft *d)
{
	d->phys_len = 0;
}

/*
 * Task context (memory_failure() may sleep), preemption off. @ri->data: the slot.
 * With a breakpoint instead of an ftrace call the context counts as NMI; then
 * the tracepoint is left to itself.
 */
static int memfail_enter(struct kretprobe_instance *ri, struct pt_regs *regs)
{
	struct memfail_call **slot = (void *)ri->data;
	unsigned long pfn = regs_get_kernel_argument(regs, 0);
	struct memfail_call *c = NULL;
	unsigned long irq;
	int i;

	*slot = NULL;
	if (in_nmi())
		return 1;
	raw_spin_lock_irqsave(&memfail.lock, irq);
	for (i = 0; i < CALLS_MAX && !c; i++)
		if (!memfail.call[i].task)
			c = &memfail.call[i];
	if (c) {
		c->pfn = pfn;
		c->flags = regs_get_kernel_argument(regs, 1);
		c->draft = NULL;
		/* Looked at without the lock: for its own task only, in call_of_current(). */
		WRITE_ONCE(c->task, current);
	}
	raw_spin_unlock_irqrestore(&memfail.lock, irq);
	if (!c)
		return 1;
	*slot = c;
	/* The slot is this task's until the return: nobody else writes it. */
	c->draft = memfail_draft(pfn);
	if (c->draft) {
		hwerr_owners_resolve(c->draft, false);
		owners_done(c->draft);
	}
	return 0;
}

/* The call is over, or is not seen any more: of what it drafted no result will be told. */
static void memfail_end(struct memfail_call *c)
{
	struct hwerr_draft *d;
	unsigned long irq;

	raw_spin_lock_irqsave(&memfail.lock, irq);
	d = c->draft;
	c->draft = NULL;
	WRITE_ONCE(c->task, NULL);
	raw_spin_unlock_irqrestore(&memfail.lock, irq);
	if (d && d->rec.flags & HWERR_F_STOPPED) {
		/* A guarded VM was stopped for it: that is told in any case. */
		hwerr_draft_text(d, "memory_failure() ended without a result");
		hwerr_submit(d);
	} else if (d) {
		hwerr_draft_put(d);
	}
}

static int memfail_return(struct kretprobe_instance *ri, struct pt_regs *regs)
{
	struct memfail_call *c = *(struct memfail_call **)ri->data;

	if (c)
		memfail_end(c);
	return 0;
}

static struct kretprobe memfail_probe = {
	.kp.symbol_name = "memory_failure",
	.entry_handler = memfail_enter,
	.handler = memfail_return,
	.data_size = sizeof(struct memfail_call *),
	.maxactive = CALLS_MAX,
};

static bool probe_on;

static struct memfail_call *call_of_current(unsigned long pfn)
{
	struct memfail_call *c;

	for (c = memfail.call; c < memfail.call + CALLS_MAX; c++)
		if (READ_ONCE(c->task) == current)
			return c->pfn == pfn ? c : NULL;
	return NULL;
}

/* Task context, in memory_failure(), preemption off. */
static void memfail_event(void *data, unsigned long pfn, int type, int result)
{
	struct memfail_call *c = call_of_current(pfn);
	struct hwerr_info_memory *m;
	struct hwerr_class class;
	struct hwerr_draft *d;
	unsigned long irq;
	const char *name;

	raw_spin_lock_irqsave(&memfail.lock, irq);
	memfail.seen[memfail.next_seen++ % SEEN_MAX] = pfn + 1;
	raw_spin_unlock_irqrestore(&memfail.lock, irq);
	if (c) {
		d = c->draft;
		c->draft = NULL;
	} else {
		d = memfail_draft(pfn);
		if (d) {
			d->rec.flags |= HWERR_F_OWNERS_UNKNOWN;
			owners_done(d);
		}
	}
	if (!d)
		return;
	class = hwerr_class_memfail(result, c && c->flags & MF_ACTION_REQUIRED);
	d->rec.severity = class.severity;
	d->rec.kind = class.kind;
	d->rec.component = class.component;
	d->rec.flags |= class.flags;
	d->rec.raw_severity = result;
	m = hwerr_record_find(&d->rec, HWERR_INFO_MEMORY);
	if (m) {
		m->mf_type = type;
		m->mf_result = result;
	}
	name = hwerr_mf_type_name(type);
	hwerr_draft_text(d, "%s%s", name ? name : "page of a type not known here",
			 c && c->flags & MF_SW_SIMULATED ? " (simulated)" : "");
	hwerr_submit(d);
}

static struct hwerr_tp memfail_tp = {
	.name = "memory_failure_event",
	.probe = memfail_event,
};

static int memfail_source_init(void)
{
	int err;

	/* A probe that was unregistered is not fit to be registered again. */
	memfail_probe.kp.addr = NULL;
	memfail_probe.kp.flags = 0;
	memfail_probe.nmissed = 0;
	probe_on = !register_kretprobe(&memfail_probe);
	check_trace_callback_type_memory_failure_event(memfail_event);
	err = hwerr_tp_attach(&memfail_tp);
	if (err && probe_on) {
		unregister_kretprobe(&memfail_probe);
		probe_on = false;
	}
	return err;
}

static void memfail_source_exit(void)
{
	int i;

	hwerr_tp_detach(&memfail_tp);
	if (!probe_on)
		return;
	unregister_kretprobe(&memfail_probe);
	probe_on = false;
	/* Calls that were under way will not come back to the return handler. */
	for (i = 0; i < CALLS_MAX; i++)
		memfail_end(&memfail.call[i]);
}

static bool was_seen(unsigned long pfn)
{
	bool seen = false;
	unsigned long irq;
	int i;

	raw_spin_lock_irqsave(&memfail.lock, irq);
	for (i = 0; i < SEEN_MAX && !seen; i++)
		seen = memfail.seen[i] == pfn + 1;
	raw_spin_unlock_irqrestore(&memfail.lock, irq);
	return seen;
}

/**
 * struct poisoned - adjacent pages that are poisoned
 * @pfn: the first
 * @nr: how many
 */
struct poisoned {
	unsigned long pfn;
	unsigned int nr;
};

static void report_poisoned(struct poisoned *run)
{
	struct hwerr_draft *d;
	struct hwerr_class class;

	if (!run->nr)
		return;
	/* Which result it had is not kept; the page is out, as if delayed. */
	class = hwerr_class_memfail(MF_DELAYED, 0);
	d = hwerr_draft_get(HWERR_SRC_MEMORY_FAILURE, class.severity);
	if (!d)
		goto out;
	hwerr_draft_memory(d, PFN_PHYS(run->pfn), (u64)run->nr << PAGE_SHIFT);
	d->rec.kind = class.kind;
	d->rec.component = class.component;
	d->rec.flags |= class.flags | HWERR_F_EARLIER;
	d->rec.raw_severity = MF_DELAYED;
	d->rec.count = run->nr;
	d->rec.cpu = -1;
	d->rec.time_mono_ns = 0;
	d->rec.time_real_ns = 0;
	d->no_link = true;
	owners_done(d);
	/* soft_offline_page() marks them in the same way. */
	hwerr_draft_text(d, "%s poisoned or retired before hwerr was loaded",
			 run->nr > 1 ? "pages were" : "page was");
	hwerr_submit(d);
out:
	run->nr = 0;
}

/* Pages that are poisoned already; task context, sleeps. */
static void memfail_earlier(void)
{
	struct poisoned run = {};
	unsigned long pfn, end;
	int nid;

	for_each_online_node(nid) {
		end = node_end_pfn(nid);
		for (pfn = node_start_pfn(nid); pfn < end; pfn++) {
			struct page *page = pfn_to_online_page(pfn);

			if (page && PageHWPoison(page) && !was_seen(pfn)) {
				if (!run.nr)
					run.pfn = pfn;
				run.nr++;
			} else {
				report_poisoned(&run);
			}
			/* Nothing online in the rest of the section. */
			if (!page)
				pfn = ALIGN(pfn + 1, PAGES_PER_SECTION) - 1;
			if (pfn % 1024 == 1023) {
				if (hwerr_exiting())
					return;
				cond_resched();
			}
		}
		report_poisoned(&run);
	}
}

const struct hwerr_source_ops hwerr_source_memfail = {
	.name = "memory_failure",
	.sources = BIT_ULL(HWERR_SRC_MEMORY_FAILURE),
	.init = memfail_source_init,
	.exit = memfail_source_exit,
	.earlier = memfail_earlier,
};
