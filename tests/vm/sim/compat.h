/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HWERR_SIM_COMPAT_H
#define HWERR_SIM_COMPAT_H

#include <asm/mce.h>
#include <linux/edac.h>
#include <linux/version.h>

/* Split off from linux/kernel.h and asm/processor.h. */
#if __has_include(<linux/hex.h>)
#include <linux/hex.h>
#endif
#if __has_include(<asm/cpuid/api.h>)
#include <asm/cpuid/api.h>
#endif

/* drivers/edac/edac_mc.h, which no headers package ships; exported to modules. */
struct mem_ctl_info *edac_mc_alloc(unsigned int mc_num, unsigned int n_layers,
				   struct edac_mc_layer *layers, unsigned int sz_pvt);
int edac_mc_add_mc_with_groups(struct mem_ctl_info *mci,
			       const struct attribute_group **groups);
struct mem_ctl_info *edac_mc_del_mc(struct device *dev);
void edac_mc_free(struct mem_ctl_info *mci);
void edac_mc_handle_error(const enum hw_event_mc_err_type type, struct mem_ctl_info *mci,
			  const u16 error_count, const unsigned long page_frame_number,
			  const unsigned long offset_in_page, const unsigned long syndrome,
			  const int top_layer, const int mid_layer, const int low_layer,
			  const char *msg, const char *other_detail);

/* 750fd23926f1 ("x86/mce: Add wrapper for struct mce to export vendor specific info"), v6.13 */
static inline void hwerr_sim_mce_log(struct mce *m)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
	struct mce_hw_err err = { .m = *m };

	mce_log(&err);
#else
	mce_log(m);
#endif
}

#endif
