/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * /dev/hwerr - hardware errors as events on a pollable file
 *
 * Reading
 * -------
 * read(2) returns whole records, as many as fit, oldest first. A record is a
 * struct hwerr_record of @hdr_len bytes followed by info records, each a struct
 * hwerr_info header and its payload. Every length is a multiple of eight and
 * counts its own header:
 *
 *	for (r = buf; n >= sizeof(*r); n -= r->len, r = next(r))
 *		for (i = r + r->hdr_len; i < r + r->len; i += i->len)
 *			switch (i->type) ...
 *
 * Step with @hdr_len, @len and the info's @len, never with sizeof(): later
 * versions append fields and add info types. Skip an info type, and keep a
 * severity, source, kind or component, that you do not know. Fields and bits
 * that are not described are zero.
 *
 * A buffer of HWERR_RECORD_MAX bytes always holds the next record. A smaller
 * one that does not is refused with EINVAL, a bad pointer with EFAULT; neither
 * consumes anything. With O_NONBLOCK an empty file gives EAGAIN. There is no
 * end of file.
 *
 * poll(2) reports EPOLLIN while a record that passes this reader's filter and
 * scope is there. It changes nothing, and is right under edge-triggered epoll.
 *
 * Each open(2) has a cursor, a filter and a loss counter of its own, shared
 * by dup(2) and fork(2). A new reader starts at "now"; HWERR_IOC_SEEK moves it
 * to the oldest record held, or to a sequence number.
 *
 * Loss
 * ----
 * Records live in two rings of fixed size, one for corrected and informational
 * ones, one for the rest, so that no storm of the former evicts the latter. The
 * oldest of a ring goes when a new one needs the room. A record's @lost says
 * how many records, of those that pass this reader's filter and scope, it
 * missed since the record before; hwerr_stats.reader_pending is what no
 * record has carried yet. At any time, for a reader opened before the first
 * record: published = read + lost + still to read. An error for which there was no room
 * to make a record (hwerr_stats.dropped) is in the loss of every reader that wants its
 * severity and source, because nobody knows whom it hit.
 *
 * Identical errors, corrected or less, within a second of the first become one more
 * record with HWERR_F_COALESCED, @id of that first record and their number in
 * @count, and with those it hits by then. So the sum of @count is the number of
 * errors, but for HWERR_F_LINKED ones.
 *
 * One physical error that several sources report (a machine check, then
 * memory_failure) makes several records with the same @id; all but the first
 * have HWERR_F_LINKED, and the totals count it once, as the worst of them. It is
 * taken for one if the memory overlaps, within ten seconds, and both were
 * corrected or neither was.
 *
 * Scope
 * -----
 * A reader whose opener lacked CAP_SYS_ADMIN (in the initial user namespace)
 * sees a record only if it hits the process that opened the file: not a child
 * that inherited it, so open it after daemon(3). Records whose owners could not be
 * determined are not among them. A file that a privileged process passes on
 * keeps that process's scope and rights. While the opener's process may more than the
 * opener might (it has executed a set-uid program, say), and when it has ended, others who
 * have the file get EPERM from read(2), HWERR_IOC_GUARD and HWERR_IOC_STOP. While it is in
 * the middle of an execve(2), they wait, or get EAGAIN (O_NONBLOCK).
 *
 * Of a record that hits the opener's process, a reader of that scope
 * sees the header, the PCI and VCPU info and its own GUEST and TASK infos;
 * @cpu is -1, HWERR_F_REDACTED is set and no host-physical address is in it (nor
 * another process's STOP info; the header log of PCI).
 * Process numbers are those of the initial PID namespace.
 *
 * Publishing
 * ----------
 * write(2) takes one or more whole records, at most 64 KiB, as read(2) gives them, of this
 * version, and without what only the kernel may say (STOP, HWERR_F_STOPPED,
 * HWERR_F_REDACTED, HWERR_GUEST_STOPPED). All are checked before the first is
 * published; EINVAL means none was. The kernel
 * sets @seq and @lost, always HWERR_F_SOFTWARE, @id if 0, @count if 0, and
 * the times if @time_mono_ns is 0. It takes CAP_SYS_ADMIN of the opener.
 * What a BPF program publishes by the module's function for it is held to the same.
 *
 * Guarding
 * --------
 * HWERR_IOC_GUARD arms a process: an error that hits it and is severe enough
 * stops its KVM guests before the record is there. A stopped vCPU's KVM_RUN
 * returns EIO, once; the VMM decides what follows (QEMU goes to internal-error
 * and refuses to continue without a reset). Keeping it stopped whatever the VMM
 * is told is not this file's work. An error for which there was no room to make
 * a record (hwerr_stats.dropped) stops nobody: whom it hit was not looked for.
 *
 * Ioctls
 * ------
 * Structures grow at their end. The size is in the ioctl's number: a caller
 * with an older, shorter structure is served; with a longer one too, if what
 * this kernel does not know is zero (else E2BIG). Shorter than the first
 * version is EINVAL, an unknown command ENOTTY, an unknown flag or non-zero
 * padding EINVAL.
 */
#ifndef _UAPI_HWERR_H
#define _UAPI_HWERR_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define HWERR_ABI_VERSION	1

/* The longest record: a read buffer of this size is never too small. */
#define HWERR_RECORD_MAX	4096

/* hwerr_info_guest.gpa: the process runs no KVM guest that maps this address. */
#define HWERR_NO_GPA		0xffffffffffffffffULL

/* One ladder for every source; a greater number is worse. */
enum hwerr_severity {
	HWERR_SEV_INFO		= 0,	/* nothing went wrong */
	HWERR_SEV_CORRECTED	= 1,	/* repaired by the hardware */
	HWERR_SEV_DEFERRED	= 2,	/* bad data found, not consumed yet (AMD) */
	HWERR_SEV_RECOVERABLE	= 3,	/* uncorrected, contained */
	HWERR_SEV_FATAL		= 4,	/* uncorrected, not contained */
	HWERR_SEV_COUNT,
};

enum hwerr_source {
	HWERR_SRC_MCE		= 0,	/* machine check architecture */
	HWERR_SRC_AER		= 1,	/* PCIe advanced error reporting */
	HWERR_SRC_EDAC		= 2,	/* memory controller drivers (mc_event) */
	HWERR_SRC_MEMORY_FAILURE = 3,	/* mm/memory-failure.c took a page out */
	HWERR_SRC_CPER		= 4,	/* firmware records: GHES, extlog, ERST */
	HWERR_SRC_KVM		= 5,	/* KVM could not go on with a vCPU */
	HWERR_SRC_SIGBUS	= 6,	/* a poisoned page was signalled */
	HWERR_SRC_BLOCK		= 7,	/* block I/O error */
	HWERR_SRC_PANIC		= 8,	/* guest panic */
	HWERR_SRC_USER		= 9,	/* published by a program, on its own account */
	HWERR_SRC_COUNT,
};

/* What the source proves beyond the severity. */
enum hwerr_kind {
	HWERR_KIND_NONE		= 0,
	HWERR_KIND_UCNA		= 1,	/* SDM 3B 16.6.3: uncorrected, no action */
	HWERR_KIND_SRAO		= 2,	/* software recoverable, action optional */
	HWERR_KIND_SRAR		= 3,	/* software recoverable, action required */
	HWERR_KIND_NONFATAL	= 4,	/* PCIe 6.2.2.2.2: link still reliable */
	HWERR_KIND_COUNT,
};

enum hwerr_component {
	HWERR_COMP_UNKNOWN	= 0,
	HWERR_COMP_MEMORY	= 1,
	HWERR_COMP_CACHE	= 2,
	HWERR_COMP_TLB		= 3,
	HWERR_COMP_BUS		= 4,	/* bus or interconnect */
	HWERR_COMP_PROCESSOR	= 5,	/* core internal */
	HWERR_COMP_PCIE		= 6,
	HWERR_COMP_IO		= 7,	/* other I/O */
	HWERR_COMP_STORAGE	= 8,
	HWERR_COMP_GUEST	= 9,	/* the virtual machine itself */
	HWERR_COMP_FIRMWARE	= 10,
	HWERR_COMP_COUNT,
};

/* hwerr_record.flags */
#define HWERR_F_ACTION_REQUIRED	0x00000001	/* the context hit cannot go on */
#define HWERR_F_SOFTWARE	0x00000002	/* came in by write(2), or BPF */
#define HWERR_F_OWNERS_UNKNOWN	0x00000004	/* some owner could not be determined */
#define HWERR_F_OWNERS_TRUNCATED 0x00000008	/* more owners than the record lists */
#define HWERR_F_COALESCED	0x00000010	/* @count repetitions of record @id */
#define HWERR_F_LINKED		0x00000020	/* same physical error as record @id */
#define HWERR_F_EARLIER		0x00000040	/* from before the module was loaded */
#define HWERR_F_REDACTED	0x00000080	/* parts withheld, see Scope */
#define HWERR_F_STOPPED		0x00000100	/* a guarded VM was stopped, see STOP */
#define HWERR_F_INFO_TRUNCATED	0x00000200	/* an info did not fit and was left out or cut */
#define HWERR_F_OTHER_BOOT	0x00000400	/* with EARLIER: from a boot before this one */
#define HWERR_F_ALL		0x000007ff

/**
 * struct hwerr_record - head of a record
 * @len: bytes of the whole record, infos included
 * @hdr_len: bytes of this head; the first info is there
 * @version: HWERR_ABI_VERSION of the kernel
 * @severity: enum hwerr_severity
 * @source: enum hwerr_source
 * @kind: enum hwerr_kind
 * @component: enum hwerr_component
 * @flags: HWERR_F_*
 * @lost: records this reader missed since the record before
 * @seq: 1, 2, ... over both rings since the module was loaded
 * @id: @seq of the first record of the same error (its own, if it is that)
 * @time_mono_ns: CLOCK_MONOTONIC, ns; of the last one where @count > 1; 0 where
 *	the time was of another boot, or is not known
 * @time_real_ns: CLOCK_REALTIME, ns since the epoch; 0 where unknown
 * @cpu: CPU that reported, -1 unknown or withheld
 * @count: errors that this record stands for, at least 1
 * @raw_severity: severity in the source's own numbering; what it means depends
 *	on @source: mce enum severity_level of the kernel, aer 0 nonfatal 1 fatal
 *	2 corrected, edac 0 corrected 1 uncorrected 2 deferred 3 fatal 4 info,
 *	cper 0 recoverable 1 fatal 2 corrected 3 info (non_standard and arm
 *	events: GHES 0 none 1 corrected 2 recoverable 3 panic, with
 *	HWERR_CPER_GHES_SEV), memory_failure the action result, kvm KVM_EXIT_* or
 *	0x10000 + the signal that killed the process, sigbus si_code, block BLK_STS_*
 * @pad: zero
 */
struct hwerr_record {
	__u32 len;
	__u16 hdr_len;
	__u16 version;
	__u8 severity;
	__u8 source;
	__u8 kind;
	__u8 component;
	__u32 flags;
	__u64 lost;
	__u64 seq;
	__u64 id;
	__u64 time_mono_ns;
	__u64 time_real_ns;
	__s32 cpu;
	__u32 count;
	__u32 raw_severity;
	__u32 pad;
};

enum hwerr_info_type {
	HWERR_INFO_MCE		= 1,
	HWERR_INFO_PCI		= 2,
	HWERR_INFO_EDAC		= 3,
	HWERR_INFO_MEMORY	= 4,
	HWERR_INFO_GUEST	= 5,
	HWERR_INFO_TASK		= 6,
	HWERR_INFO_TEXT		= 7,
	HWERR_INFO_CPER		= 8,
	HWERR_INFO_STOP		= 9,
	HWERR_INFO_VCPU		= 10,
	HWERR_INFO_BLOCK	= 11,
	HWERR_INFO_COUNT,
};

/**
 * struct hwerr_info - head of an info
 * @len: bytes of the info, this head included, multiple of eight
 * @type: enum hwerr_info_type
 * @flags: zero
 */
struct hwerr_info {
	__u32 len;
	__u16 type;
	__u16 flags;
};

/**
 * struct hwerr_info_mce - HWERR_INFO_MCE: the machine check bank as it was
 * @status: IA32_MCi_STATUS
 * @addr: IA32_MCi_ADDR, valid if ADDRV (bit 58); a physical address only if
 *	there is a HWERR_INFO_MEMORY
 * @misc: IA32_MCi_MISC, valid if MISCV (bit 59)
 * @mcgstatus: IA32_MCG_STATUS
 * @mcgcap: IA32_MCG_CAP
 * @synd: MCA_SYND (AMD SMCA)
 * @ipid: MCA_IPID (AMD SMCA)
 * @ppin: protected processor inventory number, 0 if not known
 * @tsc: time stamp counter at the error, 0 if polled
 * @ip: instruction pointer, valid if EIPV of @mcgstatus
 * @cpuid: CPUID leaf 1 EAX
 * @microcode: revision
 * @socket: physical package
 * @apicid: initial APIC id
 * @bank: 255 is the kernel's stand-in for a firmware memory error
 * @vendor: X86_VENDOR_* of the kernel (0 Intel, 2 AMD, 9 Hygon, 10 Zhaoxin)
 * @cs: code segment
 * @pad: zero
 */
struct hwerr_info_mce {
	struct hwerr_info head;
	__u64 status;
	__u64 addr;
	__u64 misc;
	__u64 mcgstatus;
	__u64 mcgcap;
	__u64 synd;
	__u64 ipid;
	__u64 ppin;
	__u64 tsc;
	__u64 ip;
	__u32 cpuid;
	__u32 microcode;
	__u32 socket;
	__u32 apicid;
	__u8 bank;
	__u8 vendor;
	__u8 cs;
	__u8 pad[5];
};

#define HWERR_PCI_TLP		0x1	/* @tlp is valid */

/**
 * struct hwerr_info_pci - HWERR_INFO_PCI: the device that reported, and whose holders are named
 * @domain: PCI segment
 * @bus: bus number
 * @devfn: device << 3 | function
 * @pad: zero
 * @status: AER status register, correctable or uncorrectable by @raw_severity
 * @tlp: header log
 * @flags: HWERR_PCI_*
 * @vendor: PCI vendor id, 0xffff if not known
 * @device: PCI device id
 */
struct hwerr_info_pci {
	struct hwerr_info head;
	__u32 domain;
	__u8 bus;
	__u8 devfn;
	__u8 pad[2];
	__u32 status;
	__u32 flags;
	__u32 tlp[4];
	__u16 vendor;
	__u16 device;
	__u32 pad2;
};

#define HWERR_LABEL_MAX		64

/**
 * struct hwerr_info_edac - HWERR_INFO_EDAC: where the memory controller saw it
 * @mc: memory controller
 * @top: topmost layer (see the driver), -1 unknown; then @mid and @low
 * @syndrome: driver's syndrome
 * @grain: resolution of the address, bytes
 * @label: DIMM label, NUL terminated, cut if longer
 */
struct hwerr_info_edac {
	struct hwerr_info head;
	__s32 mc;
	__s32 top;
	__s32 mid;
	__s32 low;
	__u64 syndrome;
	__u64 grain;
	char label[HWERR_LABEL_MAX];
};

/**
 * struct hwerr_info_memory - HWERR_INFO_MEMORY: the physical range hit
 * @phys_addr: first byte
 * @phys_len: bytes, as precisely as the source says
 * @resolve_ns: time spent on finding the owners
 * @mf_type: memory_failure: enum mf_action_page_type of the kernel, else -1
 * @mf_result: memory_failure: 0 ignored 1 failed 2 delayed 3 recovered, else -1
 * @pad: zero
 */
struct hwerr_info_memory {
	struct hwerr_info head;
	__u64 phys_addr;
	__u64 phys_len;
	__u32 resolve_ns;
	__s32 mf_type;
	__s32 mf_result;
	__u32 pad;
};

#define HWERR_GUEST_KVM		0x1	/* runs under KVM */
#define HWERR_GUEST_DEVICE	0x2	/* hit through the passed-through device in PCI */
#define HWERR_GUEST_STOPPED	0x4	/* no vCPU of it ran when the record came, see STOP */

/**
 * struct hwerr_info_guest - HWERR_INFO_GUEST: a process that runs a VM
 * @tgid: process
 * @flags: HWERR_GUEST_*
 * @start_ns: start of the process, CLOCK_BOOTTIME; with @tgid its identity
 * @vm_id: tells VMs apart, also within one process; means nothing else; 0 where it
 *	is not known
 * @hva: address in the process, 0 for HWERR_GUEST_DEVICE
 * @gpa: guest-physical address, or HWERR_NO_GPA
 * @len: bytes of the range at @hva, 0 for HWERR_GUEST_DEVICE; more than those of MEMORY
 *	where memory_failure() took out a hugetlb page: all of it
 * @slot: memslot: KVM address space << 16 | id; 0 without a gpa
 * @pad: zero
 * @comm: name of the process
 */
struct hwerr_info_guest {
	struct hwerr_info head;
	__s32 tgid;
	__u32 flags;
	__u64 start_ns;
	__u64 vm_id;
	__u64 hva;
	__u64 gpa;
	__u64 len;
	__u32 slot;
	__u32 pad;
	char comm[16];
};

#define HWERR_TASK_DEVICE	0x1	/* holds the device in PCI */

/**
 * struct hwerr_info_task - HWERR_INFO_TASK: another process that maps the range
 * @tgid: process
 * @flags: HWERR_TASK_*
 * @start_ns: start of the process, CLOCK_BOOTTIME
 * @va: address in the process
 * @len: bytes of the range at @va, as for a guest
 * @comm: name of the process
 */
struct hwerr_info_task {
	struct hwerr_info head;
	__s32 tgid;
	__u32 flags;
	__u64 start_ns;
	__u64 va;
	__u64 len;
	char comm[16];
};

/**
 * struct hwerr_info_text - HWERR_INFO_TEXT: one line for a person
 * @text: UTF-8 or bytes, padded with NUL to a multiple of eight, at least one
 */
struct hwerr_info_text {
	struct hwerr_info head;
	char text[];
};

#define HWERR_CPER_GHES_SEV	0x1	/* @raw_severity is in GHES numbering */

/**
 * struct hwerr_info_cper - HWERR_INFO_CPER: what firmware recorded (UEFI N.2)
 * @section: section type GUID, as in memory
 * @fru_id: GUID of the replaceable unit, zero if not given
 * @fru_text: NUL terminated
 * @flags: HWERR_CPER_*
 * @etype: memory error type (UEFI table N.31), 0 if not given
 * @data_len: bytes of @data that are valid
 * @pad: zero
 * @data: the section, cut at what fits
 */
struct hwerr_info_cper {
	struct hwerr_info head;
	__u8 section[16];
	__u8 fru_id[16];
	char fru_text[24];
	__u32 flags;
	__u32 etype;
	__u32 data_len;
	__u32 pad;
	__u8 data[];
};

/**
 * struct hwerr_info_stop - HWERR_INFO_STOP: the VMs of a process were stopped
 * @tgid: process
 * @vcpus: vCPUs that were told to end KVM_RUN, which then gives EIO once
 * @start_ns: start of the process, CLOCK_BOOTTIME
 * @mono_ns: when the last of them was out of the guest, CLOCK_MONOTONIC
 * @running: of them, those not seen out of the guest within some milliseconds;
 *	they leave it as soon as their CPU takes an interrupt
 * @pad: zero
 */
struct hwerr_info_stop {
	struct hwerr_info head;
	__s32 tgid;
	__u32 vcpus;
	__u64 start_ns;
	__u64 mono_ns;
	__u32 running;
	__u32 pad;
};

#define HWERR_VCPU_RIP		0x1	/* @rip is known */

/**
 * struct hwerr_info_vcpu - HWERR_INFO_VCPU: how KVM_RUN ended, of the VM in GUEST
 * @vcpu: number
 * @exit_reason: KVM_EXIT_* of linux/kvm.h
 * @suberror: KVM_INTERNAL_ERROR_* for an internal error
 * @error: negative errno that KVM_RUN returned, 0 if it returned an exit
 * @rip: of the guest, valid if HWERR_VCPU_RIP
 * @detail: hardware reason of a failed entry or an unknown exit; type of a system
 *	event; byte that the guest wrote to pvpanic
 * @flags: HWERR_VCPU_*
 * @insn_len: valid bytes of @insn, 0 if the kernel has none
 * @insn: instruction that could not be emulated
 */
struct hwerr_info_vcpu {
	struct hwerr_info head;
	__s32 vcpu;
	__u32 exit_reason;
	__u32 suberror;
	__s32 error;
	__u64 rip;
	__u64 detail;
	__u32 flags;
	__u32 insn_len;
	__u8 insn[16];
};

/**
 * struct hwerr_info_block - HWERR_INFO_BLOCK: the request of a block device that failed
 * @major: of the whole disk
 * @minor: of the whole disk
 * @sector: first that failed, of 512 bytes
 * @bytes: that failed
 * @op: REQ_OP_* of the kernel: 0 read, 1 write, 2 flush, 3 discard, ...
 * @status: BLK_STS_* of the kernel
 * @disk: name, NUL terminated
 */
struct hwerr_info_block {
	struct hwerr_info head;
	__u32 major;
	__u32 minor;
	__u64 sector;
	__u64 bytes;
	__u32 op;
	__u32 status;
	char disk[32];
};

#define HWERR_SCOPE_ALL		0	/* every record */
#define HWERR_SCOPE_SELF	1	/* those that hit the opener's process */

/**
 * struct hwerr_ioc_info - what this file is
 * @abi_version: HWERR_ABI_VERSION of the kernel
 * @record_max: HWERR_RECORD_MAX of the kernel
 * @sources: attached sources, bit by enum hwerr_source
 * @oldest_seq: oldest record held, 0 if none; 0 under HWERR_SCOPE_SELF
 * @next_seq: number the next record will have; 0 under HWERR_SCOPE_SELF
 * @ring_bytes: size of the ring for info and corrected, and of the other
 * @scope: HWERR_SCOPE_*
 * @pad: zero
 */
struct hwerr_ioc_info {
	__u32 abi_version;
	__u32 record_max;
	__u64 sources;
	__u64 oldest_seq;
	__u64 next_seq;
	__u64 ring_bytes[2];
	__u32 scope;
	__u32 pad;
};

/**
 * struct hwerr_ioc_stats - totals since the module was loaded, and the reader's
 * @records: records published
 * @errors: errors, linked ones counted once
 * @linked: records with HWERR_F_LINKED
 * @coalesced: errors that went into another record's @count
 * @evicted: records that made room for newer ones
 * @dropped: errors for which no record could be made; each is in every
 *	reader's loss
 * @owners_unknown: records with HWERR_F_OWNERS_UNKNOWN
 * @by_severity: @errors, by enum hwerr_severity
 * @by_source: @errors, by enum hwerr_source
 * @readers: open files
 * @reader_read: records this reader was given
 * @reader_lost: records this reader missed, pending ones included
 * @reader_pending: missed and not yet told by a record's @lost
 *
 * Under HWERR_SCOPE_SELF all but the reader_ ones are zero.
 */
struct hwerr_ioc_stats {
	__u64 records;
	__u64 errors;
	__u64 linked;
	__u64 coalesced;
	__u64 evicted;
	__u64 dropped;
	__u64 owners_unknown;
	__u64 by_severity[8];
	__u64 by_source[16];
	__u64 readers;
	__u64 reader_read;
	__u64 reader_lost;
	__u64 reader_pending;
};

/**
 * struct hwerr_ioc_filter - what this reader wants to see
 * @severities: bit by enum hwerr_severity, 0 for all
 * @sources: bit by enum hwerr_source, 0 for all
 * @tgid: only what hits this process, 0 for all. Under HWERR_SCOPE_SELF 0 or
 *	the opener's, else EPERM
 * @flags: zero
 *
 * It holds for what lies behind the last record read, in each of the two rings
 * (corrected or less, and worse), so that a record of the other ring may come with
 * a lower number than the last one. Bits of no known severity or source are EINVAL.
 */
struct hwerr_ioc_filter {
	__u64 severities;
	__u64 sources;
	__s32 tgid;
	__u32 flags;
};

#define HWERR_SEEK_NOW		0	/* after the newest */
#define HWERR_SEEK_OLDEST	1	/* at the oldest held */
#define HWERR_SEEK_SEQ		2	/* at @seq, or the next there is */

/**
 * struct hwerr_ioc_seek - move this reader's cursor
 * @whence: HWERR_SEEK_*
 * @flags: zero
 * @seq: for HWERR_SEEK_SEQ, else zero. Beyond the next number is EINVAL,
 *	but not under HWERR_SCOPE_SELF, which is not told that number. If
 *	records from @seq on are no longer held, they count as lost, all of them,
 *	whatever the filter.
 *
 * What was pending as lost is forgotten.
 */
struct hwerr_ioc_seek {
	__u32 whence;
	__u32 flags;
	__u64 seq;
};

#define HWERR_GUARD_KEEP	0x1	/* outlives the file; else it ends with it */
#define HWERR_GUARD_REMOVE	0x2	/* disarm */

/**
 * struct hwerr_ioc_guard - arm a process, or disarm it
 * @pidfd: the process, from pidfd_open(2)
 * @severity: least enum hwerr_severity that stops its KVM guests, deferred or
 *	more; zero with HWERR_GUARD_REMOVE
 * @flags: HWERR_GUARD_*
 * @pad: zero
 *
 * The next error that hits the process, by its memory or a device it holds, and
 * is as severe, stops its VMs before the record can be read, and before
 * memory_failure() for a machine check; memory_failure() itself counts as
 * HWERR_SEV_RECOVERABLE there, whatever it comes to. There is one guard for a process: arming
 * it again replaces the severity and the flags. It ends with the process. What an
 * opener with CAP_SYS_ADMIN has armed, only such a one changes or disarms.
 *
 * Errors: EBADF no pidfd, ESRCH no such process any more, EPERM neither
 * CAP_SYS_ADMIN nor the opener's own process, or armed with CAP_SYS_ADMIN, EINVAL,
 * ENOSPC 4096 guards, or 2048 without CAP_SYS_ADMIN, ENOENT nothing to disarm.
 */
struct hwerr_ioc_guard {
	__s32 pidfd;
	__u32 severity;
	__u32 flags;
	__u32 pad;
};

/**
 * struct hwerr_ioc_stop - stop the KVM guests of a process now
 * @pidfd: the process
 * @flags: zero
 * @stopped_ns: out: as hwerr_info_stop.mono_ns
 * @vcpus: out: likewise
 * @running: out: likewise
 *
 * Errors as for a guard, and ENXIO: it has no KVM guest; EBUSY: its files could
 * not be looked at, try again.
 */
struct hwerr_ioc_stop {
	__s32 pidfd;
	__u32 flags;
	__u64 stopped_ns;
	__u32 vcpus;
	__u32 running;
};

/**
 * struct hwerr_guard_entry - one guard
 * @tgid: process
 * @severity: least one that stops it
 * @start_ns: start of the process, CLOCK_BOOTTIME
 * @flags: HWERR_GUARD_KEEP
 * @stops: how often it was stopped
 * @stopped_ns: when last, CLOCK_MONOTONIC; 0: never
 */
struct hwerr_guard_entry {
	__s32 tgid;
	__u32 severity;
	__u64 start_ns;
	__u32 flags;
	__u32 stops;
	__u64 stopped_ns;
};

/**
 * struct hwerr_ioc_guards - list the guards
 * @entries: array of struct hwerr_guard_entry, as pointer
 * @count: in: its elements; out: guards there are, which may be more
 * @pad: zero
 *
 * Without CAP_SYS_ADMIN only that of the opener's process.
 */
struct hwerr_ioc_guards {
	__u64 entries;
	__u32 count;
	__u32 pad;
};

#define HWERR_IOC_MAGIC		0xb7
#define HWERR_IOC_INFO		_IOR(HWERR_IOC_MAGIC, 0, struct hwerr_ioc_info)
#define HWERR_IOC_STATS		_IOR(HWERR_IOC_MAGIC, 1, struct hwerr_ioc_stats)
#define HWERR_IOC_GET_FILTER	_IOR(HWERR_IOC_MAGIC, 2, struct hwerr_ioc_filter)
#define HWERR_IOC_SET_FILTER	_IOW(HWERR_IOC_MAGIC, 3, struct hwerr_ioc_filter)
#define HWERR_IOC_SEEK		_IOW(HWERR_IOC_MAGIC, 4, struct hwerr_ioc_seek)
#define HWERR_IOC_GUARD		_IOW(HWERR_IOC_MAGIC, 5, struct hwerr_ioc_guard)
#define HWERR_IOC_STOP		_IOWR(HWERR_IOC_MAGIC, 6, struct hwerr_ioc_stop)
#define HWERR_IOC_GUARDS	_IOWR(HWERR_IOC_MAGIC, 7, struct hwerr_ioc_guards)

#if defined(__STDC_VERSION__) && __STDC_VERSION__ >= 201112L && !defined(__cplusplus)
#define HWERR_ABI_SIZE(type, bytes) \
	_Static_assert(sizeof(struct type) == (bytes), #type " has another size")
#define HWERR_ABI_OFFSET(type, field, bytes) \
	_Static_assert(__builtin_offsetof(struct type, field) == (bytes), \
		       #type "." #field " has moved")
HWERR_ABI_SIZE(hwerr_record, 72);
HWERR_ABI_SIZE(hwerr_info, 8);
HWERR_ABI_SIZE(hwerr_info_mce, 112);
HWERR_ABI_SIZE(hwerr_info_pci, 48);
HWERR_ABI_SIZE(hwerr_info_edac, 104);
HWERR_ABI_SIZE(hwerr_info_memory, 40);
HWERR_ABI_SIZE(hwerr_info_guest, 80);
HWERR_ABI_SIZE(hwerr_info_task, 56);
HWERR_ABI_SIZE(hwerr_info_text, 8);
HWERR_ABI_SIZE(hwerr_info_cper, 80);
HWERR_ABI_SIZE(hwerr_info_stop, 40);
HWERR_ABI_SIZE(hwerr_ioc_guard, 16);
HWERR_ABI_SIZE(hwerr_ioc_stop, 24);
HWERR_ABI_SIZE(hwerr_guard_entry, 32);
HWERR_ABI_SIZE(hwerr_ioc_guards, 16);
HWERR_ABI_SIZE(hwerr_info_vcpu, 64);
HWERR_ABI_SIZE(hwerr_info_block, 72);
HWERR_ABI_SIZE(hwerr_ioc_info, 56);
HWERR_ABI_SIZE(hwerr_ioc_stats, 280);
HWERR_ABI_SIZE(hwerr_ioc_filter, 24);
HWERR_ABI_SIZE(hwerr_ioc_seek, 16);
HWERR_ABI_OFFSET(hwerr_record, severity, 8);
HWERR_ABI_OFFSET(hwerr_record, flags, 12);
HWERR_ABI_OFFSET(hwerr_record, lost, 16);
HWERR_ABI_OFFSET(hwerr_record, seq, 24);
HWERR_ABI_OFFSET(hwerr_record, id, 32);
HWERR_ABI_OFFSET(hwerr_record, time_mono_ns, 40);
HWERR_ABI_OFFSET(hwerr_record, time_real_ns, 48);
HWERR_ABI_OFFSET(hwerr_record, cpu, 56);
HWERR_ABI_OFFSET(hwerr_record, raw_severity, 64);
#endif

#endif /* _UAPI_HWERR_H */
