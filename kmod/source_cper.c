// SPDX-License-Identifier: GPL-2.0-only
/*
 * Firmware records, from the tracepoints of GHES and of the extended MCA log.
 *
 * extlog_mem_event is raised from the decode chain (process context),
 * non_standard_event by ghes_do_proc(): hard interrupt, softirq timer, irq work or
 * process context, by the kind of notification. Probes run with preemption off.
 */
#include <linux/cper.h>
#include <linux/kernel.h>
#include <linux/string.h>
#include <linux/uuid.h>

#include "classify.h"
#include "hwerr.h"

static struct hwerr_info_cper *cper_info(struct hwerr_draft *d, const guid_t *section,
					 const guid_t *fru_id, const char *fru_text,
					 const void *data, u32 len)
{
	u32 room = sizeof(d->buf) - d->rec.len - sizeof(struct hwerr_info_cper) -
		   sizeof(struct hwerr_info_memory) - 1024;
	struct hwerr_info_cper *i;

	if (len > room) {
		len = round_down(room, 8);
		d->rec.flags |= HWERR_F_INFO_TRUNCATED;
	}
	i = hwerr_draft_info(d, HWERR_INFO_CPER, sizeof(*i) + len);
	if (!i)
		return NULL;
	memcpy(i->section, section, sizeof(i->section));
	if (fru_id)
		memcpy(i->fru_id, fru_id, sizeof(i->fru_id));
	strscpy(i->fru_text, fru_text ?: "", sizeof(i->fru_text));
	memcpy(i->data, data, len);
	i->data_len = len;
	return i;
}

static void extlog_probe(void *data, struct cper_sec_mem_err *mem, u32 err_seq,
			 const guid_t *fru_id, const char *fru_text, u8 sev)
{
	struct hwerr_class c = hwerr_class_cper(sev, HWERR_COMP_MEMORY);
	struct hwerr_draft *d = hwerr_draft_get(HWERR_SRC_CPER, c.severity);
	struct hwerr_info_cper *i;
	guid_t section = CPER_SEC_PLATFORM_MEM;

	if (!d)
		return;
	d->rec.component = c.component;
	d->rec.raw_severity = sev;
	i = cper_info(d, &section, fru_id, fru_text, mem, sizeof(*mem));
	if (i && mem->validation_bits & CPER_MEM_VALID_ERROR_TYPE)
		i->etype = mem->error_type;
	if (mem->validation_bits & CPER_MEM_VALID_PA) {
		u64 mask = mem->validation_bits & CPER_MEM_VALID_PA_MASK ?
			   mem->physical_addr_mask : PAGE_MASK;
		u64 len = clamp_t(u64, ~mask + 1, 1, PAGE_SIZE);

		hwerr_draft_memory(d, mem->physical_addr & ~(len - 1), len);
	}
	d->ident = hwerr_ident(HWERR_SRC_CPER, sev, mem->physical_addr,
			       (u64)mem->card << 32 | mem->module,
			       (u64)mem->bank << 32 | mem->node);
	hwerr_submit(d);
}

static void non_standard_probe(void *data, const guid_t *section, const guid_t *fru_id,
			       const char *fru_text, const u8 sev, const u8 *err, const u32 len)
{
	struct hwerr_class c = hwerr_class_ghes(sev, HWERR_COMP_FIRMWARE);
	struct hwerr_draft *d = hwerr_draft_get(HWERR_SRC_CPER, c.severity);
	struct hwerr_info_cper *i;

	if (!d)
		return;
	d->rec.component = c.component;
	d->rec.raw_severity = sev;
	i = cper_info(d, section, fru_id, fru_text, err, len);
	if (i)
		i->flags = HWERR_CPER_GHES_SEV;
	hwerr_submit(d);
}

static struct hwerr_tp tps[] = {
	{ .name = "extlog_mem_event", .probe = extlog_probe },
	{ .name = "non_standard_event", .probe = non_standard_probe },
};

static int cper_init(void)
{
	int i, err, n = 0;

	for (i = 0; i < ARRAY_SIZE(tps); i++) {
		err = hwerr_tp_attach(&tps[i]);
		n += !err;
	}
	return n ? 0 : err;
}

static void cper_exit(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(tps); i++)
		hwerr_tp_detach(&tps[i]);
}

const struct hwerr_source_ops hwerr_source_cper = {
	.name = "cper",
	.sources = BIT_ULL(HWERR_SRC_CPER),
	.init = cper_init,
	.exit = cper_exit,
};
