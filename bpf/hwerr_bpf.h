/* SPDX-License-Identifier: GPL-2.0-only */
/* What every program here includes first. */
#ifndef HWERR_BPF_H
#define HWERR_BPF_H

/* Kernels from 6.18 on have a struct of their own of this name. */
#define hwerr_info hwerr_info___kernel
#include "vmlinux.h"
#undef hwerr_info
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

#define EPERM	1

#endif
