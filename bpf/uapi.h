/* SPDX-License-Identifier: GPL-2.0-only */
/* The record's definition and the classifier, for BPF: vmlinux.h has the types they include. */
#ifndef HWERR_BPF_UAPI_H
#define HWERR_BPF_UAPI_H

#define _LINUX_TYPES_H
#define _LINUX_IOCTL_H
#include "hwerr.h"

/* They are called from one place each, and structs are not returned by calls. */
#define inline __always_inline
#include "classify.h"
#undef inline

#endif
