// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory controller errors, from the mc_event tracepoint.
 */
#include <linux/kernel.h>
#include <linux/string.h>

#include "classify.h"
#include "compat.h"
#include "hwerr.h"

/*
 * Any context but NMI: drivers report from work items, timers, the machine check
 * decode chain and hard interrupts; ghes_edac from whatever GHES is notified by
 * (NMI goes through irq_work).
 */
static void mc_probe(void *data, const unsigned int err_type, const char *msg,
		     const char *label, const int count, const u8 mc, const s8 top,
		     const s8 mid, const s8 low, unsigned long address,
		     const u8 grain_bits, unsigned long syndrome, const char *detail)
{
	struct hwerr_class class = hwerr_class_edac(err_type);
	u64 grain = grain_bits < 48 ? 1ULL << grain_bits : 0;
	struct hwerr_info_edac *i;
	struct hwerr_draft *d;

	d = hwerr_draft_get(HWERR_SRC_EDAC, class.severity);
	if (!d)
		return;
	d->rec.kind = class.kind;
	d->rec.component = class.component;
	d->rec.flags |= class.flags;
	d->rec.raw_severity = err_type;
	d->rec.count = max(count, 1);
	d->ident = hwerr_ident(HWERR_SRC_EDAC, address, syndrome,
			       (u64)mc << 32 | (u8)top << 16 | (u8)mid << 8 | (u8)low,
			       err_type);
	i = hwerr_draft_info(d, HWERR_INFO_EDAC, sizeof(*i));
	if (i) {
		i->mc = mc;
		i->top = top;
		i->mid = mid;
		i->low = low;
		i->syndrome = syndrome;
		i->grain = grain;
		strscpy(i->label, label ?: "", sizeof(i->label));
	}
	/*
	 * A driver that knows no address leaves it zero; nobody but firmware has
	 * the first page, so it is never taken for one.
	 */
	if (address) {
		u64 len = grain ?: PAGE_SIZE;

		hwerr_draft_memory(d, address & ~(len - 1), len);
	} else {
		d->rec.flags |= HWERR_F_OWNERS_UNKNOWN;
	}
	msg = msg ?: "";
	detail = detail ?: "";
	hwerr_draft_text(d, "%s%s%s", msg, *msg && *detail ? ": " : "", detail);
	hwerr_submit(d);
}

static struct hwerr_tp mc_tp = { .name = "mc_event", .probe = mc_probe };

static int edac_source_init(void)
{
	return hwerr_tp_attach(&mc_tp);
}

static void edac_source_exit(void)
{
	hwerr_tp_detach(&mc_tp);
}

const struct hwerr_source_ops hwerr_source_edac = {
	.name = "edac",
	.sources = BIT_ULL(HWERR_SRC_EDAC),
	.init = edac_source_init,
	.exit = edac_source_exit,
};
