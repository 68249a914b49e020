// SPDX-License-Identifier: GPL-2.0-only
/*
 * The seal: KVM_RUN is refused to the processes in a map, so that their vCPUs
 * never run again, whatever is told to them.
 *
 * Why here: the LSM hook is before the file's own ioctl, so KVM learns nothing,
 * and what keeps working is everything else, reset and dump included. Marking the
 * VM dead in KVM makes QEMU abort at the next reset, and its memory is gone.
 *
 * It ends with its pins, not with its loader. A process is known by number and
 * start, so an entry that outlives it hits nobody. KVM itself refuses a vCPU to
 * who does not have the VM's memory map; what a sealed process could do is to
 * hand the map to a child made with CLONE_VM without CLONE_THREAD. No VMM does, and
 * who can run code of his own in it can write its memory out anyway.
 *
 * For everybody else the price is one comparison an ioctl, and one lookup per
 * return to a guest.
 */
#include "hwerr_bpf.h"
#include "seal.h"

#define KVM_RUN		0xae80	/* _IO(KVMIO, 0x80), linux/kvm.h */
#define NSEC_PER_TICK	10000000ULL	/* of USER_HZ */

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, HWERR_SEALS_MAX);
	__type(key, __u32);
	__type(value, struct hwerr_seal);
} hwerr_seals SEC(".maps");

static __always_inline int refuse(unsigned int cmd, int ret)
{
	struct task_struct *task;
	struct hwerr_seal *seal;
	__u32 tgid;

	if (ret || cmd != KVM_RUN)
		return ret;
	task = bpf_get_current_task_btf();
	tgid = task->tgid;
	seal = bpf_map_lookup_elem(&hwerr_seals, &tgid);
	if (!seal)
		return 0;
	/* The leader may change by exec, which keeps its start. */
	if (task->group_leader->start_boottime / NSEC_PER_TICK != seal->start_ns / NSEC_PER_TICK)
		return 0;
	__sync_fetch_and_add(&seal->refusals, 1);
	return -EPERM;
}

SEC("lsm/file_ioctl")
int BPF_PROG(hwerr_seal_ioctl, struct file *file, unsigned int cmd, unsigned long arg, int ret)
{
	return refuse(cmd, ret);
}

/* Since 6.8 (f1bb47a31dff) and in stable kernels; before it, both calls took the one above. */
SEC("lsm/file_ioctl_compat")
int BPF_PROG(hwerr_seal_ioctl_compat, struct file *file, unsigned int cmd, unsigned long arg,
	     int ret)
{
	return refuse(cmd, ret);
}

char LICENSE[] SEC("license") = "GPL";
