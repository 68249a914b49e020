// SPDX-License-Identifier: GPL-2.0-only
/*
 * What firmware recorded: extended MCA log, GHES sections that no kernel driver
 * knows, and ARM processor errors.
 *
 * Memory errors of GHES come as a made-up machine check, see source_mce.c; its
 * PCIe errors as AER events, see source_aer.c.
 */
#include <linux/cper.h>
#include <linux/kernel.h>
#include <linux/string.h>
#include <linux/uuid.h>
#include <acpi/ghes.h>

#include "classify.h"
#include "compat.h"
#include "hwerr.h"

static struct hwerr_info_cper *cper_fill(struct hwerr_draft *d, const guid_t *section,
					 const guid_t *fru, const char *fru_text,
					 const void *data, u32 len)
{
	u32 room = sizeof(d->buf) - d->rec.len;
	struct hwerr_info_cper *i;
	u32 n = len;

	/* Leave room for MEMORY and owners of the usual number. */
	if (n > room / 2) {
		n = ALIGN_DOWN(room / 2, 8);
		d->rec.flags |= HWERR_F_INFO_TRUNCATED;
	}
	i = hwerr_draft_info(d, HWERR_INFO_CPER, sizeof(*i) + n);
	if (!i)
		return NULL;
	export_guid(i->section, section);
	if (fru)
		export_guid(i->fru_id, fru);
	/* 20 bytes in the record, not always terminated (UEFI N.2.2). */
	if (fru_text)
		memcpy(i->fru_text, fru_text, strnlen(fru_text, 20));
	i->data_len = n;
	memcpy(i->data, data, n);
	return i;
}

/* @mem as in memory, @len bytes of it; false: it has no physical address. */
static bool cper_memory(struct hwerr_draft *d, struct hwerr_info_cper *i,
			const struct cper_sec_mem_err *mem, u32 len)
{
	u64 bytes = PAGE_SIZE;

	if (len < offsetofend(struct cper_sec_mem_err, error_type))
		return false;
	if (i && (mem->validation_bits & CPER_MEM_VALID_ERROR_TYPE))
		i->etype = mem->error_type;
	if (!(mem->validation_bits & CPER_MEM_VALID_PA))
		return false;
	/* The mask has ones where the address is exact. */
	if ((mem->validation_bits & CPER_MEM_VALID_PA_MASK) && mem->physical_addr_mask)
		bytes = 1ULL << __ffs64(mem->physical_addr_mask);
	hwerr_draft_memory(d, mem->physical_addr & ~(bytes - 1), bytes);
	return true;
}

static struct hwerr_draft *cper_draft(struct hwerr_class class, u32 raw)
{
	struct hwerr_draft *d = hwerr_draft_get(HWERR_SRC_CPER, class.severity);

	if (d) {
		d->rec.component = class.component;
		d->rec.raw_severity = raw;
	}
	return d;
}

/* Work item: the machine check decode chain, at MCE_PRIO_EXTLOG. Preemption off. */
static void extlog_probe(void *data, struct cper_sec_mem_err *mem, u32 err_seq,
			 const guid_t *fru_id, const char *fru_text, u8 sev)
{
	static const guid_t section = CPER_SEC_PLATFORM_MEM;
	struct hwerr_draft *d;
	struct hwerr_info_cper *i;

	d = cper_draft(hwerr_class_cper(sev, HWERR_COMP_MEMORY), sev);
	if (!d)
		return;
	hwerr_draft_ident(d, mem->physical_addr, mem->validation_bits,
			  (u64)mem->node << 48 | (u64)mem->card << 32 |
			  (u64)mem->module << 16 | mem->bank, sev);
	i = cper_fill(d, &section, fru_id, fru_text, mem, sizeof(*mem));
	if (!cper_memory(d, i, mem, sizeof(*mem)))
		d->rec.flags |= HWERR_F_OWNERS_UNKNOWN;
	hwerr_submit(d);
}

/* Any context but NMI: what GHES is notified by; NMI goes through irq_work. */
static void non_standard_probe(void *data, const guid_t *section, const guid_t *fru_id,
			       const char *fru_text, const u8 sev, const u8 *err,
			       const u32 len)
{
	struct hwerr_info_cper *i;
	struct hwerr_draft *d;
	u8 guid[16];

	export_guid(guid, section);
	d = cper_draft(hwerr_class_ghes(sev, hwerr_cper_component(guid)), sev);
	if (!d)
		return;
	i = cper_fill(d, section, fru_id, fru_text, err, len);
	if (i)
		i->flags |= HWERR_CPER_GHES_SEV;
	hwerr_submit(d);
}

/* @len: of the section from @proc on; @sev in GHES numbering */
static void arm_publish(const struct cper_sec_proc_arm *proc, u32 len, u8 sev, int cpu)
{
	static const guid_t section = CPER_SEC_PROC_ARM;
	struct hwerr_info_cper *i;
	struct hwerr_draft *d;

	d = cper_draft(hwerr_class_ghes(sev, HWERR_COMP_PROCESSOR), sev);
	if (!d)
		return;
	if (cpu >= 0)
		d->rec.cpu = cpu;
	i = cper_fill(d, &section, NULL, NULL, proc, len);
	if (i)
		i->flags |= HWERR_CPER_GHES_SEV;
	hwerr_submit(d);
}

/* Context of both as non_standard_probe(). The error infos follow @proc. */
static void arm_probe(void *data, const struct cper_sec_proc_arm *proc, const u8 *pei,
		      const u32 pei_len, const u8 *ctx, const u32 ctx_len,
		      const u8 *oem, const u32 oem_len, u8 sev, int cpu)
{
	arm_publish(proc, sizeof(*proc) + pei_len, sev, cpu);
}

/* The event does not say how bad it is: uncorrected until known better. */
static void arm_probe_short(void *data, const struct cper_sec_proc_arm *proc)
{
	arm_publish(proc, sizeof(*proc), GHES_SEV_RECOVERABLE, -1);
}

void hwerr_cper_lastboot(const struct hwerr_lastboot *from, const guid_t *section,
			 const guid_t *fru, const char *fru_text, const void *data, u32 len,
			 u32 severity)
{
	struct hwerr_info_cper *i;
	struct hwerr_draft *d;
	u8 guid[16];

	export_guid(guid, section);
	d = cper_draft(hwerr_class_cper(severity, hwerr_cper_component(guid)), severity);
	if (!d)
		return;
	i = cper_fill(d, section, fru, fru_text, data, len);
	if (guid_equal(section, &CPER_SEC_PLATFORM_MEM))
		cper_memory(d, i, data, len);
	hwerr_lastboot_mark(d, from, from->time);
	hwerr_submit(d);
}

static struct hwerr_tp cper_tp[] = {
	{ .name = "extlog_mem_event", .probe = extlog_probe },
	{ .name = "non_standard_event", .probe = non_standard_probe },
	{
		.name = "arm_event",
		.probe = HWERR_ARM_EVENT_HAS_SEVERITY ? (void *)arm_probe
						      : (void *)arm_probe_short,
	},
};

/* Firmware memory errors come by source_mce.c, so none of these is essential. */
static int cper_source_init(void)
{
	int i, n = 0, err = 0;

#if IS_ENABLED(CONFIG_ACPI_EXTLOG)
	check_trace_callback_type_extlog_mem_event(extlog_probe);
#endif
	check_trace_callback_type_non_standard_event(non_standard_probe);
	for (i = 0; i < ARRAY_SIZE(cper_tp); i++) {
		int e = hwerr_tp_attach(&cper_tp[i]);

		if (e)
			err = e;
		else
			n++;
	}
	return n ? 0 : err;
}

static void cper_source_exit(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(cper_tp); i++)
		hwerr_tp_detach(&cper_tp[i]);
}

const struct hwerr_source_ops hwerr_source_cper = {
	.name = "cper",
	.sources = BIT_ULL(HWERR_SRC_CPER),
	.init = cper_source_init,
	.exit = cper_source_exit,
};
