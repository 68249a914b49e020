// SPDX-License-Identifier: GPL-2.0-only
/*
 * A process that runs a VM is killed by a signal, and by whom.
 *
 * Its VM file is closed on the way out, in the context of the thread that exits last:
 * nobody else's exit is looked at.
 */
#include "emit.h"

#define SIGKILL		9
#define PF_EXITING	0x4

struct sender {
	__s32 tgid;	/* 0: the kernel */
	char comm[16];
};

/* Who sent SIGKILL, by the process it went to. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct sender);
} hwerr_killers SEC(".maps");

SEC("tp_btf/signal_generate")
int BPF_PROG(hwerr_signal_kill, int sig, struct kernel_siginfo *info, struct task_struct *task)
{
	struct sender sender = {};
	__u32 tgid;

	if (sig != SIGKILL)
		return 0;
	tgid = task->tgid;
	/* SEND_SIG_PRIV is 1: on the kernel's own account, whoever runs just now. */
	if ((unsigned long)info != 1) {
		sender.tgid = bpf_get_current_pid_tgid() >> 32;
		bpf_get_current_comm(sender.comm, sizeof(sender.comm));
	}
	bpf_map_update_elem(&hwerr_killers, &tgid, &sender, BPF_ANY);
	return 0;
}

SEC("fentry/kvm_vm_release")
int BPF_PROG(hwerr_vm_release)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct hwerr_probe_death *e;
	struct sender *sender;
	__u32 tgid;
	int code;

	if (!(task->flags & PF_EXITING))
		return 0;
	code = task->signal->group_exit_code;
	if (!(code & 0x7f))
		return 0;
	e = hwerr_reserve(HWERR_PROBE_DEATH, sizeof(*e), task);
	if (!e)
		return 0;
	e->signal = code & 0x7f;
	e->core = !!(code & 0x80);
	e->oom = !!task->signal->oom_mm;
	e->sender = -1;
	tgid = task->tgid;
	sender = bpf_map_lookup_elem(&hwerr_killers, &tgid);
	if (sender && e->signal == SIGKILL) {
		e->sender = sender->tgid;
		__builtin_memcpy(e->sender_comm, sender->comm, sizeof(e->sender_comm));
	}
	HWERR_EMIT(e);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
