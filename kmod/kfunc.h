/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _HWERR_KFUNC_H
#define _HWERR_KFUNC_H

#include <linux/types.h>

/* For BPF programs; see there. */
int bpf_hwerr_publish(const void *record, u32 record__sz);

#if IS_ENABLED(CONFIG_DEBUG_INFO_BTF_MODULES) && IS_ENABLED(CONFIG_BPF_SYSCALL)
/* Last in the load: from then on programs may call. It cannot fail, only be without. */
void hwerr_kfunc_init(void);
void hwerr_kfunc_exit(void);
#else
static inline void hwerr_kfunc_init(void) { }
static inline void hwerr_kfunc_exit(void) { }
#endif

#endif /* _HWERR_KFUNC_H */
