// SPDX-License-Identifier: GPL-2.0-only
/* SIGBUS for a poisoned page: who really got it, and where. */
#include "emit.h"

#define SIGBUS		7
#define BUS_MCEERR_AR	4
#define BUS_MCEERR_AO	5

SEC("tp_btf/signal_generate")
int BPF_PROG(hwerr_signal_bus, int sig, struct kernel_siginfo *info, struct task_struct *task,
	     int group, int result)
{
	struct hwerr_probe_sigbus *e;
	int code;

	/* 0 and 1 stand for a siginfo that says nothing. */
	if (sig != SIGBUS || (unsigned long)info <= 1)
		return 0;
	code = BPF_CORE_READ(info, si_code);
	if (code != BUS_MCEERR_AR && code != BUS_MCEERR_AO)
		return 0;
	e = hwerr_reserve(HWERR_PROBE_SIGBUS, sizeof(*e), task);
	if (!e)
		return 0;
	e->code = code;
	e->addr = (__u64)BPF_CORE_READ(info, _sifields._sigfault._addr);
	e->lsb = (__u32)BPF_CORE_READ(info, _sifields._sigfault._addr_lsb);
	e->result = result;
	HWERR_EMIT(e);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
