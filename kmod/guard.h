/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _HWERR_GUARD_H
#define _HWERR_GUARD_H

#include "uapi/hwerr.h"

struct hwerr_reader;

/* Any context but NMI: shall an error of this severity stop the process's VMs? */
bool hwerr_guard_wants(s32 tgid, u64 start_ns, u8 severity);
/* It did. */
void hwerr_guard_stopped(s32 tgid, u64 start_ns, u64 mono_ns);

/* The ioctls; process context. */
int hwerr_guard_set(struct hwerr_reader *r, const struct hwerr_ioc_guard *arg);
int hwerr_guard_stop(const struct hwerr_reader *r, struct hwerr_ioc_stop *arg);
int hwerr_guard_list(const struct hwerr_reader *r, struct hwerr_ioc_guards *arg);
/* Guards that end with this file. */
void hwerr_guard_release(struct hwerr_reader *r);

/* No file is open, and no source attached. */
void hwerr_guard_exit(void);

#endif /* _HWERR_GUARD_H */
