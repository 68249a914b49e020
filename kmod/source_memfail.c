// SPDX-License-Identifier: GPL-2.0-only
/*
 * Pages taken out of use, from memory_failure() and its tracepoint.
 *
 * memory_failure_event tells the outcome, when the page is unmapped and nobody can
 * be found any more. So a kprobe at the entry finds the owners, and puts the draft
 * aside by page frame; the tracepoint completes it. Without kprobes the
 * tracepoint alone makes the record.
 *
 * memory_failure() is process context. The kprobe's handler runs with preemption
 * off, and so does the tracepoint's probe.
 */
#include <linux/kprobes.h>
#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/nodemask.h>
#include <linux/ptrace.h>
#include <linux/sched.h>

#include "classify.h"
#include "hwerr.h"

/* Calls of memory_failure() under way, or that ended without an outcome. */
#define ASIDE		16
/* Poisoned pages that are reported at load. */
#define EARLIER_MAX	256

static DEFINE_RAW_SPINLOCK(aside_lock);		/* guards the table */
static struct {
	struct hwerr_draft *d;
	u64 pfn;
	bool action_required;
} aside[ASIDE];
static unsigned int aside_next;

static struct hwerr_draft *draft(u64 pfn)
{
	struct hwerr_draft *d = hwerr_draft_get(HWERR_SRC_MEMORY_FAILURE, HWERR_SEV_FATAL);

	if (d) {
		d->rec.component = HWERR_COMP_MEMORY;
		hwerr_draft_memory(d, pfn << PAGE_SHIFT, PAGE_SIZE);
	}
	return d;
}

/* Takes the draft of @pfn, or makes room for one more: the oldest goes. */
static struct hwerr_draft *aside_take(u64 pfn, bool *action_required)
{
	struct hwerr_draft *d = NULL;
	unsigned long flags;
	int i;

	raw_spin_lock_irqsave(&aside_lock, flags);
	for (i = 0; i < ASIDE; i++) {
		if (aside[i].d && aside[i].pfn == pfn) {
			d = aside[i].d;
			*action_required = aside[i].action_required;
			aside[i].d = NULL;
			break;
		}
	}
	raw_spin_unlock_irqrestore(&aside_lock, flags);
	return d;
}

static void aside_put(u64 pfn, struct hwerr_draft *d, bool action_required)
{
	struct hwerr_draft *old;
	unsigned long flags;
	int i;

	raw_spin_lock_irqsave(&aside_lock, flags);
	i = aside_next++ % ASIDE;
	old = aside[i].d;
	aside[i].d = d;
	aside[i].pfn = pfn;
	aside[i].action_required = action_required;
	raw_spin_unlock_irqrestore(&aside_lock, flags);
	if (old)
		hwerr_draft_put(old);
}

/* int memory_failure(unsigned long pfn, int flags) */
static int enter(struct kprobe *p, struct pt_regs *regs)
{
	u64 pfn = regs_get_kernel_argument(regs, 0);
	bool action_required = regs_get_kernel_argument(regs, 1) & MF_ACTION_REQUIRED;
	struct hwerr_draft *d, *old;
	bool unused;

	/* Left by a call that ended without an outcome. */
	old = aside_take(pfn, &unused);
	if (old)
		hwerr_draft_put(old);
	d = draft(pfn);
	if (!d)
		return 0;
	hwerr_owners_resolve(d);
	d->phys_len = 0;
	aside_put(pfn, d, action_required);
	return 0;
}

static void outcome(void *data, unsigned long pfn, int type, int result)
{
	bool action_required = false;
	struct hwerr_info_memory *m;
	struct hwerr_draft *d;
	struct hwerr_class c;

	d = aside_take(pfn, &action_required);
	if (!d)
		d = draft(pfn);
	if (!d)
		return;
	c = hwerr_class_memory_failure(result, action_required);
	d->rec.severity = c.severity;
	if (c.action_required)
		d->rec.flags |= HWERR_F_ACTION_REQUIRED;
	d->rec.raw_severity = result;
	m = hwerr_record_find(&d->rec, HWERR_INFO_MEMORY);
	if (m) {
		m->mf_type = type;
		m->mf_result = result;
	}
	hwerr_submit(d);
}

/* Pages that were poisoned before the module was loaded. Process context. */
static void earlier(void)
{
	unsigned int found = 0;
	unsigned long pfn;
	int node;

	for_each_online_node(node) {
		for (pfn = node_start_pfn(node); pfn < node_end_pfn(node); pfn++) {
			struct page *page;
			struct hwerr_draft *d;

			if (!(pfn % 4096)) {
				cond_resched();
				if (hwerr_exiting())
					return;
			}
			page = pfn_to_online_page(pfn);
			if (!page || !PageHWPoison(page))
				continue;
			if (++found > EARLIER_MAX)
				return;
			d = draft(pfn);
			if (!d)
				continue;
			d->rec.severity = HWERR_SEV_RECOVERABLE;
			d->rec.flags |= HWERR_F_EARLIER;
			d->rec.cpu = -1;
			d->rec.time_mono_ns = 0;
			d->rec.time_real_ns = 0;
			d->no_link = true;
			d->phys_len = 0;
			hwerr_submit(d);
		}
	}
}

static struct kprobe memory_failure_kp = {
	.symbol_name = "memory_failure",
	.pre_handler = enter,
};

static bool have_kprobe;
static struct hwerr_tp memory_failure_tp = { .name = "memory_failure_event", .probe = outcome };

static int memfail_init(void)
{
	int err = hwerr_tp_attach(&memory_failure_tp);

	if (err)
		return err;
	memory_failure_kp.addr = NULL;
	memory_failure_kp.flags = 0;
	have_kprobe = !register_kprobe(&memory_failure_kp);
	return 0;
}

static void memfail_exit(void)
{
	int i;

	if (have_kprobe)
		unregister_kprobe(&memory_failure_kp);
	hwerr_tp_detach(&memory_failure_tp);
	for (i = 0; i < ASIDE; i++) {
		if (aside[i].d)
			hwerr_draft_put(aside[i].d);
		aside[i].d = NULL;
	}
}

const struct hwerr_source_ops hwerr_source_memfail = {
	.name = "memory_failure",
	.sources = BIT_ULL(HWERR_SRC_MEMORY_FAILURE),
	.init = memfail_init,
	.exit = memfail_exit,
	.earlier = earlier,
};
