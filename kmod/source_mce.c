// SPDX-License-Identifier: GPL-2.0-only
/*
 * Machine checks, from the kernel's decode chain.
 *
 * The chain, not the mce_record tracepoint: it runs in a work item (mce_work),
 * with the kernel's own severity, and at our priority before the notifier that
 * calls memory_failure(): the page is still mapped, and its owners are found.
 * EDAC comes after us and is not kept from it. The Corrected Errors Collector has the same
 * priority and was there first: it only counts, and asks for pages to be moved later.
 *
 * A firmware (GHES) memory error comes here too, as a made-up machine check of
 * bank 255 (apei_mce_report_mem_error()). It is published as what it is, a
 * firmware record, and only from here: its other face in the kernel, mc_event
 * of ghes_edac, is linked to it by its page.
 */
#include <linux/cper.h>
#include <linux/notifier.h>
#include <linux/slab.h>
#include <acpi/apei.h>
#include <asm/cpufeature.h>
#include <asm/mce.h>
#include <asm/processor.h>

#include "classify.h"
#include "compat.h"
#include "hwerr.h"

static u32 mce_facts(const struct mce *m)
{
	u32 facts = 0;

	if (m->inject_flags & MCJ_EXCEPTION)
		facts |= HWERR_MCE_EXCEPTION;
	if (m->kflags & MCE_IN_KERNEL_RECOV)
		facts |= HWERR_MCE_KERNEL_RECOV;
	if (boot_cpu_has(X86_FEATURE_SMCA))
		facts |= HWERR_MCE_SMCA;
	if (boot_cpu_has(X86_FEATURE_OVERFLOW_RECOV))
		facts |= HWERR_MCE_OVERFLOW_RECOV;
	if (boot_cpu_has(X86_FEATURE_SUCCOR))
		facts |= HWERR_MCE_SUCCOR;
	return facts;
}

static void mce_fill(struct hwerr_info_mce *i, const struct mce *m)
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

/* Firmware's own severity, as apei_mce_report_mem_error() put it into the status. */
static u32 firmware_severity(const struct mce *m)
{
	if (m->status & MCI_STATUS_PCC)
		return CPER_SEV_FATAL;
	return m->status & MCI_STATUS_UC ? CPER_SEV_RECOVERABLE : CPER_SEV_CORRECTED;
}

/* Task context. @from: the record of an earlier boot that @m is from, or NULL. */
static void mce_publish(struct mce *m, const struct hwerr_lastboot *from)
{
	struct hwerr_info_mce info = {};
	struct hwerr_info_mce *i;
	u32 facts = mce_facts(m);
	struct hwerr_class class;
	struct hwerr_draft *d;
	bool firmware, physical;

	mce_fill(&info, m);
	class = hwerr_class_mce(&info, facts);
	firmware = hwerr_mce_is_firmware(&info);
	d = hwerr_draft_get(firmware ? HWERR_SRC_CPER : HWERR_SRC_MCE, class.severity);
	if (!d)
		return;
	d->rec.kind = class.kind;
	d->rec.component = class.component;
	d->rec.flags |= class.flags;
	d->rec.raw_severity = firmware ? firmware_severity(m) : m->severity;
	d->rec.count = hwerr_mce_count(&info);
	d->rec.cpu = m->extcpu;
	hwerr_draft_ident(d, m->bank | (u64)m->extcpu << 8, hwerr_mce_status_ident(&info),
			  m->addr, m->misc);

	i = hwerr_draft_info(d, HWERR_INFO_MCE, sizeof(*i));
	if (i) {
		info.head = i->head;
		*i = info;
	}
	/* On kernels before 6.7 their answer is too generous for AMD; see there. */
	physical = hwerr_mce_addr_is_physical(&info, facts) &&
		   (firmware || mce_usable_address(m));
	if (physical) {
		u64 len = hwerr_mce_addr_len(&info);
		/* Above the physical bits there are keys of memory encryption. */
		u64 addr = m->addr & GENMASK_ULL(boot_cpu_data.x86_phys_bits - 1, 0);

		hwerr_draft_memory(d, addr & ~(len - 1), len);
	} else if (mce_is_memory_error(m)) {
		d->rec.flags |= HWERR_F_OWNERS_UNKNOWN;
	}
	if (from)
		hwerr_lastboot_mark(d, from, m->time);
	else if (hwerr_mce_is_yellow(&info))
		hwerr_draft_text(d, "corrected errors above the threshold (status yellow)");
	hwerr_submit(d);
}

void hwerr_mce_lastboot(const struct hwerr_lastboot *from, const void *data, u32 len)
{
	struct mce m = {};

	/* The kernel that wrote it may have had fewer fields or more, at the end. */
	if (len < offsetofend(struct mce, mcgcap))
		return;
	memcpy(&m, data, min_t(u32, len, sizeof(m)));
	mce_publish(&m, from);
}

/* Work item (mce_gen_pool_process()), may sleep. @data: struct mce, also from 6.13 on. */
static int mce_notify(struct notifier_block *nb, unsigned long val, void *data)
{
	struct mce *m = data;

	if (!m)
		return NOTIFY_DONE;
	mce_publish(m, NULL);
	return NOTIFY_OK;
}

static struct notifier_block mce_nb = {
	.notifier_call = mce_notify,
	.priority = MCE_PRIO_HIGHEST,
};

static int mce_source_init(void)
{
	mce_register_decode_chain(&mce_nb);
	return 0;
}

/* Waits for a running callback: the chain's rwsem is taken for writing. */
static void mce_source_exit(void)
{
	mce_unregister_decode_chain(&mce_nb);
}

const struct hwerr_source_ops hwerr_source_mce = {
	.name = "mce",
	.sources = BIT_ULL(HWERR_SRC_MCE),
	.init = mce_source_init,
	.exit = mce_source_exit,
};
