/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the probes tell their loader, through the ring buffer "hwerr_events", and what those
 * that publish by themselves make a record of.
 *
 * Included after the kernel's types on either side; same bytes on both, no padding
 * that is not named. Each struct begins with its head.
 */
#ifndef HWERR_BPF_PROBE_H
#define HWERR_BPF_PROBE_H

enum hwerr_probe_type {
	HWERR_PROBE_KVM		= 0,	/* KVM_RUN ended in what a guest does not survive */
	HWERR_PROBE_PANIC	= 1,	/* the guest said that it panicked */
	HWERR_PROBE_DEATH	= 2,	/* a signal killed a process that runs a VM */
	HWERR_PROBE_SIGBUS	= 3,
	HWERR_PROBE_BLOCK	= 4,
	HWERR_PROBE_COUNT	= 5,
};

/* Events of a type that pass within a second: a storm must not wash the rest away. */
#define HWERR_PROBE_RATE	200

/**
 * struct hwerr_probe_count - element of the array "hwerr_counts", by type
 * @emitted: put into the ring buffer, or published
 * @dropped: not, because there was no room or they were too many in a second
 * @second: CLOCK_MONOTONIC in seconds that @recent is of
 * @recent: events in that second
 */
struct hwerr_probe_count {
	__u64 emitted;
	__u64 dropped;
	__u64 second;
	__u64 recent;
};

/**
 * struct hwerr_probe_told - element of the array "hwerr_told", by type; the loader's
 * @told: of what was lost, what it has made known
 * @missed: lost with programs that were replaced: runs that the kernel left out, events unread
 * @direct: the probe publishes by itself, through the module's function for it
 */
struct hwerr_probe_told {
	__u64 told;
	__u64 missed;
	__u64 direct;
};

/**
 * struct hwerr_probe_head
 * @time_ns: CLOCK_MONOTONIC
 * @start_ns: start of the process, CLOCK_BOOTTIME
 * @type: enum hwerr_probe_type
 * @cpu: where it was seen
 * @tgid: process concerned, initial PID namespace; 0 for none
 * @tid: thread concerned
 * @comm: of the process
 */
struct hwerr_probe_head {
	__u64 time_ns;
	__u64 start_ns;
	__u32 type;
	__s32 cpu;
	__s32 tgid;
	__s32 tid;
	char comm[16];
};

#define HWERR_PROBE_RIP		0x1	/* @rip is known */

/**
 * struct hwerr_probe_kvm - KVM_RUN's outcome; also for HWERR_PROBE_PANIC
 * @rip: of the guest
 * @detail: hardware reason of a failed entry or unknown exit, type of a system
 *	event, byte written to pvpanic
 * @vcpu: number
 * @exit_reason: KVM_EXIT_* of linux/kvm.h
 * @suberror: KVM_INTERNAL_ERROR_*
 * @error: negative errno that KVM_RUN returned, or 0
 * @flags: HWERR_PROBE_RIP
 * @insn_len: valid bytes of @insn
 * @insn: instruction that could not be emulated
 */
struct hwerr_probe_kvm {
	struct hwerr_probe_head head;
	__u64 rip;
	__u64 detail;
	__s32 vcpu;
	__u32 exit_reason;
	__u32 suberror;
	__s32 error;
	__u32 flags;
	__u32 insn_len;
	__u8 insn[16];
};

/**
 * struct hwerr_probe_death - end of a process that ran a VM
 * @signal: that killed it
 * @oom: the kernel chose it because memory was short
 * @sender: process that sent SIGKILL, 0 for the kernel, -1 if not known
 * @core: a core was dumped
 * @sender_comm: its name
 */
struct hwerr_probe_death {
	struct hwerr_probe_head head;
	__s32 signal;
	__u32 oom;
	__s32 sender;
	__u32 core;
	char sender_comm[16];
};

/**
 * struct hwerr_probe_sigbus - a poisoned page was signalled
 * @addr: address in the process
 * @code: BUS_MCEERR_AR (4) or BUS_MCEERR_AO (5)
 * @lsb: log2 of the range
 * @result: TRACE_SIGNAL_* of trace/events/signal.h: 0 is delivered
 * @pad: zero
 */
struct hwerr_probe_sigbus {
	struct hwerr_probe_head head;
	__u64 addr;
	__s32 code;
	__u32 lsb;
	__s32 result;
	__u32 pad;
};

/**
 * struct hwerr_probe_block - a block device did not do what it was asked
 * @sector: first, of 512 bytes
 * @cgroup: of who asked, inode number; 0 if not known
 * @bytes: that failed
 * @major: of the whole disk
 * @minor: of the whole disk
 * @op: REQ_OP_*
 * @status: BLK_STS_*
 * @pad: zero
 * @disk: name
 */
struct hwerr_probe_block {
	struct hwerr_probe_head head;
	__u64 sector;
	__u64 cgroup;
	__u32 bytes;
	__u32 major;
	__u32 minor;
	__u32 op;
	__u32 status;
	__u32 pad;
	char disk[32];
};

#endif
