// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM_RUN that ends in what a guest does not survive: internal error (emulation
 * failure among them), shutdown (triple fault), failed entry, unknown exit, error of
 * the call itself; and the guest's own word that it panicked.
 *
 * On the way out to user space only: what KVM handles by itself costs nothing (but for
 * ports, where a panic is looked for). By tracepoints, which say what is wanted in registers:
 * an exit that is no failure costs two comparisons, and not the detour of a function that is
 * traced at its end. They do not have the vCPU; who calls has, as the file of its ioctl().
 */
#include "direct.h"

#define EINTR			4
#define EIO			5
#define EAGAIN			11
#define ENOMEM			12
#define EFAULT			14
#define EINVAL			22
#define EHWPOISON		133

/* linux/kvm.h */
#define KVM_EXIT_UNKNOWN	0
#define KVM_EXIT_IO		2
#define KVM_EXIT_SHUTDOWN	8
#define KVM_EXIT_FAIL_ENTRY	9
#define KVM_EXIT_INTERNAL_ERROR	17
#define KVM_EXIT_SYSTEM_EVENT	24
#define KVM_EXIT_MEMORY_FAULT	39
#define KVM_PIO_OUT		1	/* kvm/trace.h */
#define KVM_SYSTEM_EVENT_CRASH	3
#define KVM_INTERNAL_ERROR_EMULATION	1
#define KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES	1

/* QEMU's docs/specs/pvpanic: its port, unless moved, and what is written there. */
#define PVPANIC_PORT		0x505
#define PVPANIC_PANICKED	0x1
#define PVPANIC_CRASHLOADED	0x2

#define TS_COMPAT		0x2	/* asm/thread_info.h */
#define VCPU_REGS_RIP		16	/* asm/kvm_host.h */

/*
 * Where the vCPU's RIP is, and whether it is known: on Intel it is fetched from the VMCS
 * only when somebody asked for it. Up to 6.x it is one of the registers, and a word says
 * which are there; in 7.2 it has a field of its own, and the word is a bitmap.
 */
struct kvm_vcpu_arch___6 {
	unsigned long regs[VCPU_REGS_RIP + 1];
	__u32 regs_avail;
} __attribute__((preserve_access_index));

struct kvm_vcpu___6 {
	struct kvm_vcpu_arch___6 arch;
} __attribute__((preserve_access_index));

struct kvm_vcpu_arch___7 {
	unsigned long rip;
	unsigned long regs_avail[1];
} __attribute__((preserve_access_index));

struct kvm_vcpu___7 {
	struct kvm_vcpu_arch___7 arch;
} __attribute__((preserve_access_index));

static __always_inline bool get_rip(void *vcpu, __u64 *rip)
{
	struct kvm_vcpu___6 *v6 = vcpu;
	struct kvm_vcpu___7 *v7 = vcpu;
	unsigned long avail = 0;

	if (bpf_core_field_exists(v7->arch.rip)) {
		avail = BPF_CORE_READ(v7, arch.regs_avail[0]);
		*rip = BPF_CORE_READ(v7, arch.rip);
	} else if (bpf_core_field_exists(v6->arch.regs_avail)) {
		avail = BPF_CORE_READ(v6, arch.regs_avail);
		*rip = BPF_CORE_READ(v6, arch.regs[VCPU_REGS_RIP]);
	}
	return avail & 1UL << VCPU_REGS_RIP;
}

static __always_inline void insn(struct hwerr_probe_kvm *e, struct kvm_run *run)
{
	__u32 words = BPF_CORE_READ(run, emulation_failure.ndata);
	__u64 flags = BPF_CORE_READ(run, emulation_failure.flags);
	__u32 len = BPF_CORE_READ(run, emulation_failure.insn_size);

	/* 64-bit words of data: the flags, then size and bytes in two. */
	if (words < 3 || !(flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES))
		return;
	e->insn_len = len < 15 ? len : 15;
	bpf_core_read(e->insn, 15, &run->emulation_failure.insn_bytes);
}

static __always_inline void fill(struct hwerr_probe_kvm *e, struct kvm_vcpu *vcpu,
				 struct kvm_run *run, __u32 reason, int ret, __u64 detail,
				 __u32 suberror)
{
	__u64 rip = 0;

	e->vcpu = BPF_CORE_READ(vcpu, vcpu_id);
	e->exit_reason = reason;
	e->error = ret < 0 ? ret : 0;
	e->detail = detail;
	e->suberror = suberror;
	if (get_rip(vcpu, &rip)) {
		e->rip = rip;
		e->flags |= HWERR_PROBE_RIP;
	}
	if (ret >= 0 && reason == KVM_EXIT_INTERNAL_ERROR &&
	    suberror == KVM_INTERNAL_ERROR_EMULATION)
		insn(e, run);
}

/* Words of a KVM_INTERNAL_ERROR_*. */
#define SUBERRORS	5

static const char suberrors[SUBERRORS][48] = {
	[1] = "emulation failure",
	[2] = "an exception while another was delivered",
	[3] = "an event could not be delivered",
	[4] = "an exit it does not know",
};

static __always_inline long line_errno(struct hwerr_scratch *s, char *text, __u32 size, int err)
{
	switch (err) {
	case ENOMEM:
		return BPF_SNPRINTF(text, size, "KVM_RUN failed%s: Cannot allocate memory", s->at);
	case EFAULT:
		return BPF_SNPRINTF(text, size, "KVM_RUN failed%s: Bad address", s->at);
	case EINVAL:
		return BPF_SNPRINTF(text, size, "KVM_RUN failed%s: Invalid argument", s->at);
	case EHWPOISON:
		return BPF_SNPRINTF(text, size,
				    "KVM_RUN failed%s: Memory page has hardware error", s->at);
	}
	return BPF_SNPRINTF(text, size, "KVM_RUN failed%s: error %d", s->at, err);
}

static __always_inline long line_internal(struct hwerr_scratch *s, char *text, __u32 size)
{
	const struct hwerr_probe_kvm *e = &s->kvm;
	__u32 n = e->suberror;
	int i;

	if (!n || n >= SUBERRORS)
		return BPF_SNPRINTF(text, size, "KVM internal error%s: suberror %u", s->at, n);
	if (!e->insn_len)
		return BPF_SNPRINTF(text, size, "KVM internal error%s: %s", s->at, suberrors[n]);
#pragma unroll
	for (i = 0; i < 15; i++) {
		__u8 high = e->insn[i] >> 4, low = e->insn[i] & 0xf;

		if ((__u32)i >= e->insn_len)
			break;
		s->more[3 * i] = ' ';
		s->more[3 * i + 1] = high + (high < 10 ? '0' : 'a' - 10);
		s->more[3 * i + 2] = low + (low < 10 ? '0' : 'a' - 10);
	}
	return BPF_SNPRINTF(text, size, "KVM internal error%s: %s, instruction%s", s->at,
			    suberrors[n], s->more);
}

static __always_inline long line_kvm(struct hwerr_scratch *s, char *text, __u32 size)
{
	const struct hwerr_probe_kvm *e = &s->kvm;

	if (e->flags & HWERR_PROBE_RIP)
		BPF_SNPRINTF(s->at, sizeof(s->at), " at 0x%llx", e->rip);
	if (e->error)
		return line_errno(s, text, size, -e->error);
	switch (e->exit_reason) {
	case KVM_EXIT_INTERNAL_ERROR:
		return line_internal(s, text, size);
	case KVM_EXIT_SHUTDOWN:
		return BPF_SNPRINTF(text, size, "the guest shut down by a triple fault%s", s->at);
	case KVM_EXIT_FAIL_ENTRY:
		return BPF_SNPRINTF(text, size,
				    "KVM could not enter the guest%s, hardware reason 0x%llx",
				    s->at, e->detail);
	}
	return BPF_SNPRINTF(text, size, "KVM left the guest%s for an unknown reason 0x%llx",
			    s->at, e->detail);
}

static __always_inline long line_panic(struct hwerr_scratch *s, char *text, __u32 size)
{
	if (s->kvm.exit_reason == KVM_EXIT_SYSTEM_EVENT)
		return BPF_SNPRINTF(text, size, "the guest panicked, as it says by a system event");
	if (s->kvm.detail & PVPANIC_PANICKED)
		return BPF_SNPRINTF(text, size, "the guest panicked, as it says through pvpanic");
	return BPF_SNPRINTF(text, size,
			    "the guest panicked and runs its crash kernel, as it says through pvpanic");
}

static __always_inline void publish(struct hwerr_scratch *s, __u32 type)
{
	const struct hwerr_probe_kvm *e = &s->kvm;
	long n;

	if (type == HWERR_PROBE_PANIC)
		hwerr_draft_head(s, &e->head, HWERR_SRC_PANIC, HWERR_SEV_RECOVERABLE, e->detail);
	else
		hwerr_draft_head(s, &e->head, HWERR_SRC_KVM, HWERR_SEV_RECOVERABLE, e->exit_reason);
	s->vcpu.head.len = sizeof(s->vcpu);
	s->vcpu.head.type = HWERR_INFO_VCPU;
	s->vcpu.vcpu = e->vcpu;
	s->vcpu.exit_reason = e->exit_reason;
	s->vcpu.suberror = e->suberror;
	s->vcpu.error = e->error;
	s->vcpu.rip = e->rip;
	s->vcpu.detail = e->detail;
	s->vcpu.flags = e->flags & HWERR_PROBE_RIP ? HWERR_VCPU_RIP : 0;
	s->vcpu.insn_len = e->insn_len;
	__builtin_memcpy(s->vcpu.insn, e->insn, sizeof(s->vcpu.insn));
	if (type == HWERR_PROBE_PANIC)
		n = line_panic(s, s->vcpu_line.text, sizeof(s->vcpu_line.text));
	else
		n = line_kvm(s, s->vcpu_line.text, sizeof(s->vcpu_line.text));
	hwerr_publish(s, &s->vcpu_line, n, type);
}

/*
 * The vCPU of the ioctl() that @task is in. Another thread may have put another file in the place
 * of the one whose ioctl() it is; then what is found is no vCPU of a VM of its own, and not taken
 * for one.
 */
static __always_inline struct kvm_vcpu *vcpu_of(struct task_struct *task)
{
	struct pt_regs *regs = (void *)bpf_task_pt_regs(task);
	struct kvm_vcpu *vcpu;
	struct fdtable *fdt;
	struct file **files;
	struct file *file;
	__u32 fd;

	if (BPF_CORE_READ(task, thread_info.status) & TS_COMPAT)
		fd = BPF_CORE_READ(regs, bx);
	else
		fd = BPF_CORE_READ(regs, di);
	fdt = BPF_CORE_READ(task, files, fdt);
	if (fd >= BPF_CORE_READ(fdt, max_fds))
		return NULL;
	files = BPF_CORE_READ(fdt, fd);
	if (bpf_probe_read_kernel(&file, sizeof(file), files + fd))
		return NULL;
	vcpu = BPF_CORE_READ(file, private_data);
	return BPF_CORE_READ(vcpu, kvm, mm) == task->mm ? vcpu : NULL;
}

static __always_inline void tell(__u32 type, __u32 reason, int ret, __u64 detail)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct kvm_vcpu *vcpu = vcpu_of(task);
	struct hwerr_probe_kvm *e;
	struct kvm_run *run;
	__u32 suberror = 0;

	if (!vcpu) {
		hwerr_lose(type);
		return;
	}
	run = BPF_CORE_READ(vcpu, run);
	if (ret >= 0) {
		switch (reason) {
		case KVM_EXIT_UNKNOWN:
			detail = BPF_CORE_READ(run, hw.hardware_exit_reason);
			break;
		case KVM_EXIT_FAIL_ENTRY:
			detail = BPF_CORE_READ(run, fail_entry.hardware_entry_failure_reason);
			break;
		case KVM_EXIT_INTERNAL_ERROR:
			suberror = BPF_CORE_READ(run, internal.suberror);
			break;
		case KVM_EXIT_SYSTEM_EVENT:
			detail = BPF_CORE_READ(run, system_event.type);
			if (detail != KVM_SYSTEM_EVENT_CRASH)
				return;
		}
	}
	if (hwerr_direct) {
		e = hwerr_draft(type, sizeof(*e), task);
		if (e) {
			fill(e, vcpu, run, reason, ret, detail, suberror);
			publish((void *)e, type);
		}
		return;
	}
	e = hwerr_reserve(type, sizeof(*e), task);
	if (e) {
		fill(e, vcpu, run, reason, ret, detail, suberror);
		HWERR_EMIT(e);
	}
}

SEC("tp_btf/kvm_userspace_exit")
int BPF_PROG(hwerr_kvm_run, __u32 reason, int ret)
{
	if (ret < 0) {
		/* EIO is the answer to a VM that was stopped for good: told by who did it. */
		if (ret == -EINTR || ret == -EAGAIN || ret == -EIO)
			return 0;
		/* Memory that a confidential guest shares: user space converts it. */
		if (ret == -EFAULT && reason == KVM_EXIT_MEMORY_FAULT)
			return 0;
		tell(HWERR_PROBE_KVM, reason, ret, 0);
		return 0;
	}
	switch (reason) {
	case KVM_EXIT_UNKNOWN:
	case KVM_EXIT_FAIL_ENTRY:
	case KVM_EXIT_INTERNAL_ERROR:
	case KVM_EXIT_SHUTDOWN:
		tell(HWERR_PROBE_KVM, reason, 0, 0);
		break;
	case KVM_EXIT_SYSTEM_EVENT:
		tell(HWERR_PROBE_PANIC, reason, 0, 0);
	}
	return 0;
}

SEC("tp_btf/kvm_pio")
int BPF_PROG(hwerr_kvm_pio, unsigned int rw, unsigned int port)
{
	void *data = NULL;
	__u8 byte = 0;

	if (port != PVPANIC_PORT || rw != KVM_PIO_OUT)
		return 0;
	/* The fifth argument is a void *, which 6.1 does not let be loaded. */
	bpf_probe_read_kernel(&data, sizeof(data), ctx + 4);
	bpf_probe_read_kernel(&byte, 1, data);
	if (byte & (PVPANIC_PANICKED | PVPANIC_CRASHLOADED))
		tell(HWERR_PROBE_PANIC, KVM_EXIT_IO, 0, byte);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
