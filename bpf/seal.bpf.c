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
 * Nor does it open what it was released from: no image, and no block or character
 * device in whatever mode, because what is open for reading takes locks that bar
 * others, and requests to a device (SG_IO, TUNSETIFF, VFIO's) need no more. So who
 * has another monitor of QEMU's cannot have it take its disk back. Other files it
 * may open and make, a dump for instance. What it could still do is to start a
 * program that opens them in its place, or be handed an open file.
 *
 * For everybody else the price is one comparison an ioctl, one lookup an open and one
 * per return to a guest.
 */
#include "hwerr_bpf.h"
#include "seal.h"

#define KVM_RUN		0xae80	/* _IO(KVMIO, 0x80), linux/kvm.h */
#define NSEC_PER_TICK	10000000ULL	/* of USER_HZ */

/* linux/stat.h, linux/major.h */
#define S_IFMT		0170000
#define S_IFBLK		0060000
#define S_IFCHR		0020000
#define MEM_MAJOR	1
#define TTY_MAJOR	4
#define TTYAUX_MAJOR	5
#define UNIX98_PTY_SLAVE_MAJOR	136

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, HWERR_SEALS_MAX);
	__type(key, __u32);
	__type(value, struct hwerr_seal);
} hwerr_seals SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, HWERR_KEPT_OUT_MAX);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct hwerr_kept_out);
	__type(value, __u64);
} hwerr_kept_out SEC(".maps");

/* The seal of the process that runs, NULL if it has none. */
static __always_inline struct hwerr_seal *sealed(__u32 *tgid)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct hwerr_seal *seal;

	*tgid = task->tgid;
	seal = bpf_map_lookup_elem(&hwerr_seals, tgid);
	if (!seal)
		return NULL;
	/* The leader may change by exec, which keeps its start. */
	if (task->group_leader->start_boottime / NSEC_PER_TICK != seal->start_ns / NSEC_PER_TICK)
		return NULL;
	return seal;
}

static __always_inline int refuse(unsigned int cmd, int ret)
{
	struct hwerr_seal *seal;
	__u32 tgid;

	if (ret || cmd != KVM_RUN)
		return ret;
	seal = sealed(&tgid);
	if (!seal)
		return 0;
	__sync_fetch_and_add(&seal->refusals, 1);
	return -EPERM;
}

/* Character devices behind which there is nobody: null and its like, and terminals. */
static __always_inline bool harmless(__u32 dev)
{
	__u32 major = dev >> 20, minor = dev & 0xfffff;

	switch (major) {
	case MEM_MAJOR:
		return minor == 3 || minor == 5 || (minor >= 7 && minor <= 9);
	case TTY_MAJOR:
	case TTYAUX_MAJOR:
		return true;
	default:
		return major >= UNIX98_PTY_SLAVE_MAJOR && major < UNIX98_PTY_SLAVE_MAJOR + 8;
	}
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

SEC("lsm/file_open")
int BPF_PROG(hwerr_seal_open, struct file *file, int ret)
{
	struct hwerr_kept_out key = {};
	struct inode *inode;
	__u64 *refusals;
	__u32 type;

	if (ret || !sealed(&key.tgid))
		return ret;
	inode = file->f_inode;
	type = inode->i_mode & S_IFMT;
	if (type != S_IFBLK && (type != S_IFCHR || harmless(inode->i_rdev))) {
		key.dev = inode->i_sb->s_dev;
		key.ino = inode->i_ino;
		refusals = bpf_map_lookup_elem(&hwerr_kept_out, &key);
		if (!refusals)
			return 0;
	} else {
		refusals = bpf_map_lookup_elem(&hwerr_kept_out, &key);
	}
	if (refusals)
		__sync_fetch_and_add(refusals, 1);
	return -EPERM;
}

char LICENSE[] SEC("license") = "GPL";
