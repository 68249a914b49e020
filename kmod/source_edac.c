// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory controller errors, from the mc_event tracepoint; at load, what the
 * controllers have counted until then.
 */
#include <linux/device.h>
#include <linux/edac.h>
#include <linux/kernel.h>
#include <linux/module.h>
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
	hwerr_draft_ident(d, address, syndrome,
			  (u64)mc << 32 | (u8)top << 16 | (u8)mid << 8 | (u8)low, err_type);
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
	hwerr_draft_line(d, msg, detail);
	hwerr_submit(d);
}

static struct hwerr_tp mc_tp = { .name = "mc_event", .probe = mc_probe };

static int edac_source_init(void)
{
	check_trace_callback_type_mc_event(mc_probe);
	return hwerr_tp_attach(&mc_tp);
}

static void edac_source_exit(void)
{
	hwerr_tp_detach(&mc_tp);
}

/* @dimm: NULL for errors of which the controller did not know where. */
static void report_count(const struct mem_ctl_info *mci, const struct dimm_info *dimm,
			 enum hw_event_mc_err_type type, u32 count)
{
	struct hwerr_class class = hwerr_class_edac(type);
	s32 at[3] = { -1, -1, -1 };
	struct hwerr_info_edac *e;
	struct hwerr_draft *d;
	unsigned int i;

	if (!count)
		return;
	d = hwerr_draft_get(HWERR_SRC_EDAC, class.severity);
	if (!d)
		return;
	d->rec.kind = class.kind;
	d->rec.component = class.component;
	d->rec.flags |= class.flags | HWERR_F_EARLIER | HWERR_F_OWNERS_UNKNOWN;
	d->rec.raw_severity = type;
	d->rec.count = count;
	d->rec.cpu = -1;
	d->rec.time_mono_ns = 0;
	d->rec.time_real_ns = 0;
	e = hwerr_draft_info(d, HWERR_INFO_EDAC, sizeof(*e));
	if (e) {
		for (i = 0; dimm && i < min_t(unsigned int, mci->n_layers, ARRAY_SIZE(at)); i++)
			at[i] = dimm->location[i];
		e->mc = mci->mc_idx;
		e->top = at[0];
		e->mid = at[1];
		e->low = at[2];
		if (dimm) {
			e->grain = dimm->grain;
			strscpy(e->label, dimm->label, sizeof(e->label));
		}
	}
	hwerr_draft_text(d, "counted by the memory controller before hwerr was loaded");
	hwerr_submit(d);
}

/* The walk holds a reference to @dev, which is the controller's lifetime. */
static int earlier_mc(struct device *dev, void *unused)
{
	struct mem_ctl_info *mci = container_of(dev, struct mem_ctl_info, dev);
	struct dimm_info *dimm;
	unsigned int idx;
	char rest;

	if (sscanf(dev_name(dev), "mc%u%c", &idx, &rest) != 1)
		return 0;
	mci_for_each_dimm(mci, dimm) {
		report_count(mci, dimm, HW_EVENT_ERR_CORRECTED, READ_ONCE(dimm->ce_count));
		report_count(mci, dimm, HW_EVENT_ERR_UNCORRECTED, READ_ONCE(dimm->ue_count));
	}
	report_count(mci, NULL, HW_EVENT_ERR_CORRECTED, READ_ONCE(mci->ce_noinfo_count));
	report_count(mci, NULL, HW_EVENT_ERR_UNCORRECTED, READ_ONCE(mci->ue_noinfo_count));
	return hwerr_exiting();
}

/*
 * Task context, sleeps. The probe is attached by now: an error of this very
 * moment may be told by it, and be in the count.
 */
static void edac_earlier(void)
{
	typeof(edac_get_sysfs_subsys) *bus = symbol_get(edac_get_sysfs_subsys);
	struct device *all;

	if (!bus)
		return;
	all = bus_find_device_by_name(bus(), NULL, "mc");
	if (all) {
		device_for_each_child(all, NULL, earlier_mc);
		put_device(all);
	}
	symbol_put(edac_get_sysfs_subsys);
}

const struct hwerr_source_ops hwerr_source_edac = {
	.name = "edac",
	.sources = BIT_ULL(HWERR_SRC_EDAC),
	.init = edac_source_init,
	.exit = edac_source_exit,
	.earlier = edac_earlier,
};
