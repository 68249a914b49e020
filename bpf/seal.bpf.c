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
 * may open and make, a dump for instance.
 *
 * Nor does it write to them or lock them through what it has open or is handed, nor write
 * to a VFIO device, whose configuration space is written so: bus mastering stays off.
 * VFIO's own ioctls are left alone, because QEMU ends itself when some of them fail, and its
 * guest's memory goes with it; none of them gives bus mastering. Nor does it tell a vhost
 * worker to begin again. Nor does it connect a socket, over which disks are reached as well.
 *
 * What it could still do is to start a program that does so in its place.
 *
 * For everybody else the price is two comparisons an ioctl, and one lookup an open, a
 * connect, a write, a lock and a return to a guest.
 */
#include "hwerr_bpf.h"
#include "seal.h"

#define KVM_RUN		0xae80	/* _IO(KVMIO, 0x80), linux/kvm.h */
#define VHOST_VIRTIO	0xaf	/* the type of its ioctls, linux/vhost.h */
#define NSEC_PER_TICK	10000000ULL	/* of USER_HZ */

#define MAY_WRITE	2	/* linux/fs.h */
#define F_UNLCK		2	/* asm-generic/fcntl.h */
#define ANON_INODE_FS_MAGIC 0x09041934	/* linux/magic.h */

/* What drivers/vfio calls it, with the byte that ends it. */
#define VFIO_NAME	"[vfio-device]"
#define VFIO_NAME_LEN	sizeof(VFIO_NAME)

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

/* Counts on one of the process's own entries, and refuses. */
static __always_inline int refuse_of(__u32 tgid, __u64 what)
{
	struct hwerr_kept_out key = { .tgid = tgid, .ino = what };
	__u64 *refusals = bpf_map_lookup_elem(&hwerr_kept_out, &key);

	if (refusals)
		__sync_fetch_and_add(refusals, 1);
	return -EPERM;
}

static __always_inline int refuse(unsigned int cmd, int ret)
{
	struct hwerr_seal *seal;
	__u32 tgid;

	if (ret || (cmd != KVM_RUN && (cmd >> 8 & 0xff) != VHOST_VIRTIO))
		return ret;
	seal = sealed(&tgid);
	if (!seal)
		return 0;
	if (cmd != KVM_RUN)
		return refuse_of(tgid, HWERR_KEPT_OUT_DEVICES);
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

/* Refuses what is a device, or is named in the map. */
static __always_inline int keep_out(__u32 tgid, struct inode *inode)
{
	struct hwerr_kept_out key = { .tgid = tgid };
	__u32 type = inode->i_mode & S_IFMT;
	__u64 *refusals;

	if (type == S_IFBLK || (type == S_IFCHR && !harmless(inode->i_rdev)))
		return refuse_of(tgid, HWERR_KEPT_OUT_DEVICES);
	key.dev = inode->i_sb->s_dev;
	key.ino = inode->i_ino;
	refusals = bpf_map_lookup_elem(&hwerr_kept_out, &key);
	if (!refusals)
		return 0;
	__sync_fetch_and_add(refusals, 1);
	return -EPERM;
}

/* A short name is within its dentry, since 6.15 (58cf9c383c5c) under another name. */
struct dentry___iname {
	unsigned char d_iname[1];
} __attribute__((preserve_access_index));

struct dentry___shortname {
	struct {
		unsigned char string[1];
	} d_shortname;
} __attribute__((preserve_access_index));

/*
 * Whether it is a device that was got from a VFIO group. Its inode is that of all files
 * without one of their own, eventfds for instance; the name is its own.
 */
static __always_inline bool vfio_device(struct file *file)
{
	struct dentry *dentry = file->f_path.dentry;
	struct dentry___shortname *after = (void *)dentry;
	struct dentry___iname *before = (void *)dentry;
	const unsigned char *name = (void *)dentry;
	unsigned int i;

	if (file->f_inode->i_sb->s_magic != ANON_INODE_FS_MAGIC)
		return false;
	/* By its place only: its size differs, which a load of the field would have to match. */
	if (bpf_core_field_exists(after->d_shortname))
		name += bpf_core_field_offset(after->d_shortname);
	else
		name += bpf_core_field_offset(before->d_iname);
#pragma unroll
	for (i = 0; i < VFIO_NAME_LEN; i++)
		if (name[i] != VFIO_NAME[i])
			return false;
	return true;
}

SEC("lsm/file_open")
int BPF_PROG(hwerr_seal_open, struct file *file, int ret)
{
	__u32 tgid;

	if (ret || !sealed(&tgid))
		return ret;
	return keep_out(tgid, file->f_inode);
}

/* Of every write, and of what else changes a file through a descriptor. */
SEC("lsm/file_permission")
int BPF_PROG(hwerr_seal_write, struct file *file, int mask, int ret)
{
	__u32 tgid;

	if (ret || !(mask & MAY_WRITE) || !sealed(&tgid))
		return ret;
	if (vfio_device(file))
		return refuse_of(tgid, HWERR_KEPT_OUT_DEVICES);
	return keep_out(tgid, file->f_inode);
}

/* What is locked bars others from it, whoever has opened it. Letting go is nobody's harm. */
SEC("lsm/file_lock")
int BPF_PROG(hwerr_seal_lock, struct file *file, unsigned int cmd, int ret)
{
	__u32 tgid;

	if (ret || cmd == F_UNLCK || !sealed(&tgid))
		return ret;
	return keep_out(tgid, file->f_inode);
}

SEC("lsm/socket_connect")
int BPF_PROG(hwerr_seal_connect, struct socket *sock, struct sockaddr *address, int addrlen,
	     int ret)
{
	__u32 tgid;

	if (ret || !sealed(&tgid))
		return ret;
	return refuse_of(tgid, HWERR_KEPT_OUT_SOCKETS);
}

char LICENSE[] SEC("license") = "GPL";
