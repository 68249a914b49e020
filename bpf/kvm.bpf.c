// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM_RUN that ends in what a guest does not survive: internal error (emulation
 * failure among them), shutdown (triple fault), failed entry, unknown exit, error of
 * the call itself; and the guest's own word that it panicked.
 *
 * On the way out to user space only: what KVM handles by itself costs nothing. The
 * function is where every vendor's path ends, and has the vCPU at hand, which the
 * tracepoint kvm_userspace_exit has not.
 */
#include "emit.h"

#define EINTR			4
#define EIO			5
#define EAGAIN			11

/* linux/kvm.h */
#define KVM_EXIT_UNKNOWN	0
#define KVM_EXIT_IO		2
#define KVM_EXIT_SHUTDOWN	8
#define KVM_EXIT_FAIL_ENTRY	9
#define KVM_EXIT_INTERNAL_ERROR	17
#define KVM_EXIT_SYSTEM_EVENT	24
#define KVM_EXIT_IO_OUT		1
#define KVM_SYSTEM_EVENT_CRASH	3
#define KVM_INTERNAL_ERROR_EMULATION	1
#define KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES	1

/* QEMU's docs/specs/pvpanic: its port, unless moved, and what is written there. */
#define PVPANIC_PORT		0x505
#define PVPANIC_PANICKED	0x1
#define PVPANIC_CRASHLOADED	0x2

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

static __always_inline void fill(struct hwerr_probe_kvm *e, struct kvm_vcpu *vcpu,
				 __u32 reason, int ret)
{
	__u64 rip = 0;

	e->vcpu = BPF_CORE_READ(vcpu, vcpu_id);
	e->exit_reason = reason;
	e->error = ret < 0 ? ret : 0;
	if (get_rip(vcpu, &rip)) {
		e->rip = rip;
		e->flags |= HWERR_PROBE_RIP;
	}
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

/* What the guest said by this exit: HWERR_PROBE_COUNT if it is not about a panic. */
static __always_inline __u32 panic(struct kvm_vcpu *vcpu, struct kvm_run *run, __u32 reason,
				   __u64 *detail)
{
	__u8 byte = 0;

	if (reason == KVM_EXIT_SYSTEM_EVENT) {
		*detail = BPF_CORE_READ(run, system_event.type);
		return *detail == KVM_SYSTEM_EVENT_CRASH ? HWERR_PROBE_PANIC : HWERR_PROBE_COUNT;
	}
	if (BPF_CORE_READ(run, io.port) != PVPANIC_PORT ||
	    BPF_CORE_READ(run, io.direction) != KVM_EXIT_IO_OUT)
		return HWERR_PROBE_COUNT;
	/* The page that user space sees behind @run is one of its own in the kernel. */
	bpf_probe_read_kernel(&byte, 1, BPF_CORE_READ(vcpu, arch.pio_data));
	*detail = byte;
	return byte & (PVPANIC_PANICKED | PVPANIC_CRASHLOADED) ? HWERR_PROBE_PANIC
							       : HWERR_PROBE_COUNT;
}

SEC("fexit/kvm_arch_vcpu_ioctl_run")
int BPF_PROG(hwerr_kvm_run, struct kvm_vcpu *vcpu, int ret)
{
	__u32 type = HWERR_PROBE_KVM, suberror = 0, reason;
	struct hwerr_probe_kvm *e;
	struct kvm_run *run;
	__u64 detail = 0;

	/* EIO is the answer to a VM that was stopped for good: told by who did it. */
	if (ret == -EINTR || ret == -EAGAIN || ret == -EIO)
		return 0;
	run = BPF_CORE_READ(vcpu, run);
	reason = BPF_CORE_READ(run, exit_reason);
	if (ret >= 0) {
		switch (reason) {
		case KVM_EXIT_IO:
		case KVM_EXIT_SYSTEM_EVENT:
			type = panic(vcpu, run, reason, &detail);
			if (type == HWERR_PROBE_COUNT)
				return 0;
			break;
		case KVM_EXIT_UNKNOWN:
			detail = BPF_CORE_READ(run, hw.hardware_exit_reason);
			break;
		case KVM_EXIT_FAIL_ENTRY:
			detail = BPF_CORE_READ(run, fail_entry.hardware_entry_failure_reason);
			break;
		case KVM_EXIT_INTERNAL_ERROR:
			suberror = BPF_CORE_READ(run, internal.suberror);
			break;
		case KVM_EXIT_SHUTDOWN:
			break;
		default:
			return 0;
		}
	}
	e = hwerr_reserve(type, sizeof(*e), bpf_get_current_task_btf());
	if (!e)
		return 0;
	fill(e, vcpu, reason, ret);
	e->detail = detail;
	e->suberror = suberror;
	if (ret >= 0 && reason == KVM_EXIT_INTERNAL_ERROR &&
	    suberror == KVM_INTERNAL_ERROR_EMULATION)
		insn(e, run);
	HWERR_EMIT(e);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
