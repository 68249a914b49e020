/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the programs of the mode without the module tell their reader, through two
 * ring buffers: one for info and corrected errors, one for the rest.
 *
 * A sample is a struct hwerr_hw, and behind it @whos of struct hwerr_hw_who, or @data_len
 * bytes of a firmware section. Same bytes on both sides, no padding that is not named.
 */
#ifndef HWERR_BPF_HARDWARE_H
#define HWERR_BPF_HARDWARE_H

#define HWERR_HW_BODY		176	/* the longest info but for a section's bytes */
#define HWERR_HW_TEXT		256
#define HWERR_HW_WHOS		64	/* a power of two */
#define HWERR_HW_DATA		2048	/* likewise */

#define HWERR_HW_KVM		0x1	/* there is a KVM VM in this address space: @vm */
#define HWERR_HW_SLOT		0x2	/* a guest-physical place of the entry @owner */
#define HWERR_HW_GONE		0x4	/* its process is going: nobody to name */

/**
 * struct hwerr_hw - a record while it is made, as struct hwerr_record has it
 * @order: 0, 1, ... over both ring buffers
 * @time_ns: CLOCK_MONOTONIC
 * @ident: what makes two corrected errors of a source the same; all 0: nothing does
 * @phys_addr: range hit, if @phys_len is not 0
 * @phys_len: bytes
 * @flags: HWERR_F_*
 * @raw_severity: in the source's numbering
 * @count: errors
 * @cpu: that reported
 * @resolve_ns: time spent on finding the owners
 * @mf_type: memory_failure only, else -1
 * @mf_result: likewise
 * @severity: enum hwerr_severity
 * @source: enum hwerr_source
 * @kind: enum hwerr_kind
 * @component: enum hwerr_component
 * @body_len: bytes of @body that are valid
 * @whos: entries behind
 * @data_len: bytes behind that belong to the info in @body
 * @pfn: memory_failure only: the page
 * @mf_flags: memory_failure only: how it was called
 * @pad: zero
 * @text: two lines, or parts of one; NUL terminated. Of AER: the device's name
 * @body: one whole info, head included
 */
struct hwerr_hw {
	__u64 order;
	__u64 time_ns;
	__u64 ident[4];
	__u64 phys_addr;
	__u64 phys_len;
	__u32 flags;
	__u32 raw_severity;
	__u32 count;
	__s32 cpu;
	__u32 resolve_ns;
	__s32 mf_type;
	__s32 mf_result;
	__u8 severity;
	__u8 source;
	__u8 kind;
	__u8 component;
	__u32 body_len;
	__u32 whos;
	__u32 data_len;
	__u32 mf_flags;
	__u64 pfn;
	char text[HWERR_HW_TEXT];
	char detail[HWERR_HW_TEXT];
	__u8 body[HWERR_HW_BODY];
};

/**
 * struct hwerr_hw_who - one stretch of the range in one address space, or a slot of it
 * @mm: the address space; compared only
 * @vm: the VM; compared only
 * @va: where it is mapped
 * @len: bytes
 * @next: the page that would continue it
 * @gpa: guest-physical address, HWERR_HW_SLOT only
 * @start_ns: start of the process, CLOCK_BOOTTIME
 * @tgid: process
 * @flags: HWERR_HW_*
 * @slot: KVM address space << 16 | id, HWERR_HW_SLOT only
 * @owner: entry that this is a slot of, HWERR_HW_SLOT only
 * @comm: name of the process
 * @exe: name of its program's file
 */
struct hwerr_hw_who {
	__u64 mm;
	__u64 vm;
	__u64 va;
	__u64 len;
	__u64 next;
	__u64 gpa;
	__u64 start_ns;
	__s32 tgid;
	__u32 flags;
	__u32 slot;
	__u32 owner;
	char comm[16];
	char exe[16];
};

/* By severity * 16 + source. */
struct hwerr_hw_dropped {
	__u64 n[128];
};

#endif
