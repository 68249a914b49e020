// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory controllers, from the mc_event tracepoint.
 *
 * Raised by edac_raw_mc_handle_error(): process context for drivers that poll or
 * sit on the decode chain, hard interrupt for those with an interrupt of their
 * own and for ghes_edac. Probes run with preemption off.
 */
#include <linux/edac.h>
#include <linux/kernel.h>
#include <linux/string.h>

#include "classify.h"
#include "hwerr.h"

static void mc_probe(void *data, const unsigned int type, const char *msg, const char *label,
		     const int count, const u8 mc, const s8 top, const s8 mid, const s8 low,
		     unsigned long address, const u8 grain_bits, unsigned long syndrome,
		     const char *detail)
{
	struct hwerr_class c = hwerr_class_edac(type);
	struct hwerr_info_edac *i;
	struct hwerr_draft *d;
	u64 grain = grain_bits < 63 ? 1ULL << grain_bits : 0;

	d = hwerr_draft_get(HWERR_SRC_EDAC, c.severity);
	if (!d)
		return;
	d->rec.kind = c.kind;
	d->rec.component = c.component;
	d->rec.raw_severity = type;
	if (count > 0)
		d->rec.count = count;
	i = hwerr_draft_info(d, HWERR_INFO_EDAC, sizeof(*i));
	i->mc = mc;
	i->top = top;
	i->mid = mid;
	i->low = low;
	i->syndrome = syndrome;
	i->grain = grain;
	strscpy(i->label, label ?: "", sizeof(i->label));
	/* Drivers that know no address give page 0, offset 0. */
	if (address) {
		u64 len = clamp_t(u64, grain, 1, PAGE_SIZE);

		hwerr_draft_memory(d, address & ~(len - 1), len);
	}
	if (msg && *msg)
		hwerr_draft_text(d, "%s%s%s", msg, detail && *detail ? ": " : "", detail ?: "");
	d->ident = hwerr_ident(HWERR_SRC_EDAC, (u64)type << 32 | mc,
			       (u64)(u8)top << 16 | (u8)mid << 8 | (u8)low, address, syndrome);
	hwerr_submit(d);
}

static struct hwerr_tp mc_tp = { .name = "mc_event", .probe = mc_probe };

static int edac_init(void)
{
	return hwerr_tp_attach(&mc_tp);
}

static void edac_exit(void)
{
	hwerr_tp_detach(&mc_tp);
}

const struct hwerr_source_ops hwerr_source_edac = {
	.name = "edac",
	.sources = BIT_ULL(HWERR_SRC_EDAC),
	.init = edac_init,
	.exit = edac_exit,
};
