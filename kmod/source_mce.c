// SPDX-License-Identifier: GPL-2.0-only
/*
 * Machine checks, from the decode chain.
 *
 * The chain runs in process context, from the work item that empties the pool
 * into which the #MC handler, the CMCI handler and the poller put records, so
 * the callback may wait. At the highest priority it runs before
 * uc_decode_notifier() calls memory_failure(): the page is still mapped, and who
 * maps it can be found. It always lets the others go on.
 */
#include <linux/notifier.h>
#include <asm/mce.h>
#include <asm/processor.h>

#include "classify.h"
#include "hwerr.h"

/*
 * apei_mce_report_mem_error() dresses a corrected memory error of the firmware as a
 * machine check of bank -1, so that the kernel's own consumers see it.
 */
static bool from_firmware(const struct mce *m)
{
	return m->bank == 0xff;
}

static void fill(struct hwerr_info_mce *i, const struct mce *m)
{
	i->status = m->status;
	i->addr = m->addr;
	i->misc = m->misc;
	i->mcgstatus = m->mcgstatus;
	i->mcgcap = m->mcgcap;
	i->synd = m->synd;
	i->ipid = m->ipid;
	i->ppin = m->ppin;
	i->tsc = m->tsc;
	i->ip = m->ip;
	i->cpuid = m->cpuid;
	i->microcode = m->microcode;
	i->socket = m->socketid;
	i->apicid = m->apicid;
	i->bank = m->bank;
	i->vendor = m->cpuvendor;
	i->cs = m->cs;
}

/* Process context. */
static int mce_notify(struct notifier_block *nb, unsigned long val, void *data)
{
	struct mce *m = data;
	struct hwerr_class c;
	struct hwerr_info_mce *i;
	struct hwerr_draft *d;

	if (!m)
		return NOTIFY_DONE;
	c = hwerr_class_mce(m->cpuvendor, m->status, m->mcgstatus, m->mcgcap, m->ipid);
	d = hwerr_draft_get(from_firmware(m) ? HWERR_SRC_CPER : HWERR_SRC_MCE, c.severity);
	if (!d)
		return NOTIFY_DONE;
	d->rec.kind = c.kind;
	d->rec.component = c.component;
	if (c.action_required)
		d->rec.flags |= HWERR_F_ACTION_REQUIRED;
	d->rec.cpu = m->extcpu;
	d->rec.raw_severity = m->severity;
	i = hwerr_draft_info(d, HWERR_INFO_MCE, sizeof(*i));
	if (i)
		fill(i, m);
	/*
	 * Whether MCi_ADDR is a physical address is the vendor's to say, and the
	 * kernel's to know: by hand it is gotten wrong (e.g. AMD before Zen).
	 */
	if (mce_usable_address(m)) {
		u64 len = hwerr_mce_range(m->status, m->misc);

		hwerr_draft_memory(d, m->addr & ~(len - 1), len);
	}
	d->ident = hwerr_ident(d->rec.source, (u64)m->extcpu << 32 | m->bank, m->status,
			       m->addr, m->misc);
	hwerr_submit(d);
	return NOTIFY_DONE;
}

static struct notifier_block mce_nb = {
	.notifier_call = mce_notify,
	.priority = MCE_PRIO_HIGHEST,
};

static int mce_init(void)
{
	mce_register_decode_chain(&mce_nb);
	return 0;
}

/* Waits for a callback that runs: the chain is a blocking one. */
static void mce_exit(void)
{
	mce_unregister_decode_chain(&mce_nb);
}

const struct hwerr_source_ops hwerr_source_mce = {
	.name = "mce",
	.sources = BIT_ULL(HWERR_SRC_MCE),
	.init = mce_init,
	.exit = mce_exit,
};
