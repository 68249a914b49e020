// SPDX-License-Identifier: GPL-2.0-only
/*
 * A process that runs a VM is killed by a signal, and by whom.
 *
 * Its VM file is closed on the way out, in the context of the thread that exits last:
 * nobody else's exit is looked at.
 */
#include "direct.h"

#define SIGHUP		1
#define SIGINT		2
#define SIGQUIT		3
#define SIGKILL		9
#define SIGTERM		15
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

#define NAMES		32

static const char names[NAMES][12] = {
	"0", "SIGHUP", "SIGINT", "SIGQUIT", "SIGILL", "SIGTRAP", "SIGABRT", "SIGBUS",
	"SIGFPE", "SIGKILL", "SIGUSR1", "SIGSEGV", "SIGUSR2", "SIGPIPE", "SIGALRM", "SIGTERM",
	"SIGSTKFLT", "SIGCHLD", "SIGCONT", "SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGURG",
	"SIGXCPU", "SIGXFSZ", "SIGVTALRM", "SIGPROF", "SIGWINCH", "SIGIO", "SIGPWR", "SIGSYS",
};

/* A signal that somebody sends on purpose. */
static __always_inline bool deliberate(__u32 signal)
{
	return signal == SIGKILL || signal == SIGTERM || signal == SIGINT || signal == SIGHUP ||
	       signal == SIGQUIT;
}

static __always_inline void publish(struct hwerr_scratch *s)
{
	const struct hwerr_probe_death *e = &s->death;
	__u8 severity = HWERR_SEV_RECOVERABLE;
	__u32 signal = e->signal & 0x7f;
	long n;

	if (deliberate(signal) && !e->oom && e->sender)
		severity = HWERR_SEV_INFO;
	hwerr_draft_head(s, &e->head, HWERR_SRC_KVM, severity, 0x10000 | signal);
	if (signal < NAMES)
		__builtin_memcpy(s->at, names[signal], sizeof(names[0]));
	else
		BPF_SNPRINTF(s->at, sizeof(s->at), "signal %u", signal);
	if (e->oom)
		BPF_SNPRINTF(s->more, sizeof(s->more), ", because memory was short");
	else if (e->sender > 0)
		BPF_SNPRINTF(s->more, sizeof(s->more), " from %s (pid %d)", e->sender_comm,
			     e->sender);
	else if (!e->sender)
		BPF_SNPRINTF(s->more, sizeof(s->more), " from the kernel");
	if (e->core)
		BPF_SNPRINTF(s->what, sizeof(s->what), ", and left a core");
	n = BPF_SNPRINTF(s->line.text, sizeof(s->line.text),
			 "the VM's process was killed by %s%s%s", s->at, s->more, s->what);
	hwerr_publish(s, &s->line, n, HWERR_PROBE_DEATH);
}

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

static __always_inline void fill(struct hwerr_probe_death *e, struct task_struct *task, int code)
{
	struct sender *sender;
	__u32 tgid = task->tgid;

	e->signal = code & 0x7f;
	e->core = !!(code & 0x80);
	e->oom = !!task->signal->oom_mm;
	e->sender = -1;
	sender = bpf_map_lookup_elem(&hwerr_killers, &tgid);
	if (sender && e->signal == SIGKILL) {
		e->sender = sender->tgid;
		__builtin_memcpy(e->sender_comm, sender->comm, sizeof(e->sender_comm));
	}
}

SEC("fentry/kvm_vm_release")
int BPF_PROG(hwerr_vm_release)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct hwerr_probe_death *e;
	int code;

	if (!(task->flags & PF_EXITING))
		return 0;
	code = task->signal->group_exit_code;
	if (!(code & 0x7f))
		return 0;
	if (hwerr_direct) {
		e = hwerr_draft(HWERR_PROBE_DEATH, sizeof(*e), task);
		if (e) {
			fill(e, task, code);
			publish((void *)e);
		}
		return 0;
	}
	e = hwerr_reserve(HWERR_PROBE_DEATH, sizeof(*e), task);
	if (e) {
		fill(e, task, code);
		HWERR_EMIT(e);
	}
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
