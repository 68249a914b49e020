/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What an error is: severity, kind, component, from the source's own numbers.
 *
 * Pure functions of fixed-size integers, without a kernel call: compiled into the
 * module, into BPF and into the host-side tests. SDM is Intel's, volume 3B,
 * chapter "Machine-Check Architecture" (16, numbers as of 2024).
 */
#ifndef _HWERR_CLASSIFY_H
#define _HWERR_CLASSIFY_H

#include "uapi/hwerr.h"

/* IA32_MCi_STATUS, SDM figure 16-6 */
#define HWERR_MCI_VAL		(1ULL << 63)
#define HWERR_MCI_OVER		(1ULL << 62)
#define HWERR_MCI_UC		(1ULL << 61)
#define HWERR_MCI_EN		(1ULL << 60)
#define HWERR_MCI_MISCV		(1ULL << 59)
#define HWERR_MCI_ADDRV		(1ULL << 58)
#define HWERR_MCI_PCC		(1ULL << 57)
#define HWERR_MCI_S		(1ULL << 56)	/* Intel: signalled by #MC */
#define HWERR_MCI_AR		(1ULL << 55)	/* Intel: action required */
#define HWERR_MCI_DEFERRED	(1ULL << 44)	/* AMD: bad data, not consumed */
#define HWERR_MCG_CAP_SER_P	(1ULL << 24)	/* software error recovery */
#define HWERR_MCG_STATUS_MCIP	(1ULL << 2)	/* in a machine check handler */

/* X86_VENDOR_* of arch/x86/include/asm/processor.h */
#define HWERR_VENDOR_INTEL	0
#define HWERR_VENDOR_AMD	2
#define HWERR_VENDOR_HYGON	9

/**
 * struct hwerr_class - the classifier's answer
 * @severity: enum hwerr_severity
 * @kind: enum hwerr_kind
 * @component: enum hwerr_component
 * @action_required: 1 if what was hit cannot go on without an action
 */
struct hwerr_class {
	__u8 severity;
	__u8 kind;
	__u8 component;
	__u8 action_required;
};

/*
 * Simple and compound error codes, SDM tables 16-8 and 16-9; AMD's TLB, memory and
 * bus codes have the same form (APM 2, 9.3.3). Bit 12 is the filter bit of
 * corrected errors. AMD's UMC (hardware id 0x96 in MCA_IPID) is DRAM whatever
 * its code says.
 */
static inline __u8 hwerr_mce_component(__u64 status, __u64 ipid)
{
	__u32 code = status & 0xefff;

	if (((ipid >> 32) & 0xfff) == 0x096)
		return HWERR_COMP_MEMORY;
	if (code == 0x0e0b)
		return HWERR_COMP_IO;
	if ((code & 0xf800) == 0x0800)
		return HWERR_COMP_BUS;
	if ((code & 0xff80) == 0x0280 || (code & 0xff80) == 0x0080)
		return HWERR_COMP_MEMORY;
	if ((code & 0xff00) == 0x0100 || (code & 0xfffc) == 0x000c)
		return HWERR_COMP_CACHE;
	if ((code & 0xfff0) == 0x0010)
		return HWERR_COMP_TLB;
	if ((code & 0xfc00) == 0x0400 || (code >= 0x0002 && code <= 0x0007))
		return HWERR_COMP_PROCESSOR;
	return HWERR_COMP_UNKNOWN;
}

/* The order is that of mce_severity_amd() in arch/x86/kernel/cpu/mce/severity.c. */
static inline void hwerr_class_mce_amd(struct hwerr_class *c, __u64 status, __u64 mcgstatus)
{
	if (status & HWERR_MCI_PCC) {
		c->severity = HWERR_SEV_FATAL;
	} else if (status & HWERR_MCI_DEFERRED) {
		c->severity = HWERR_SEV_DEFERRED;
	} else if (status & HWERR_MCI_UC) {
		c->severity = HWERR_SEV_RECOVERABLE;
		c->action_required = !!(mcgstatus & HWERR_MCG_STATUS_MCIP);
	} else {
		c->severity = HWERR_SEV_CORRECTED;
	}
}

/*
 * SDM 16.6.3 and the severities table of severity.c. A record that has S or AR set
 * comes from a CPU with software recovery, whatever MCG_CAP it was logged with.
 */
static inline void hwerr_class_mce_intel(struct hwerr_class *c, __u64 status, __u64 mcgcap)
{
	int ser = !!(mcgcap & HWERR_MCG_CAP_SER_P) || status & (HWERR_MCI_S | HWERR_MCI_AR);

	if (status & HWERR_MCI_PCC) {
		c->severity = HWERR_SEV_FATAL;
		return;
	}
	if (!(status & HWERR_MCI_UC)) {
		c->severity = HWERR_SEV_CORRECTED;
		return;
	}
	c->severity = HWERR_SEV_RECOVERABLE;
	if (!ser) {
		/* Uncorrected on a CPU that cannot recover. */
		c->severity = HWERR_SEV_FATAL;
	} else if (!(status & (HWERR_MCI_S | HWERR_MCI_AR))) {
		c->kind = HWERR_KIND_UCNA;
	} else if (!(status & HWERR_MCI_S)) {
		/* AR without S is no combination the SDM knows: PANIC there too. */
		c->severity = HWERR_SEV_FATAL;
	} else if (status & HWERR_MCI_AR) {
		c->kind = HWERR_KIND_SRAR;
		c->action_required = 1;
		if (status & HWERR_MCI_OVER)	/* with lost events */
			c->severity = HWERR_SEV_FATAL;
	} else {
		c->kind = HWERR_KIND_SRAO;
	}
}

/* A machine check bank. One without VAL holds no error: it is passed on as info. */
static inline struct hwerr_class hwerr_class_mce(__u8 vendor, __u64 status, __u64 mcgstatus,
						 __u64 mcgcap, __u64 ipid)
{
	struct hwerr_class c = { HWERR_SEV_INFO, HWERR_KIND_NONE,
				 hwerr_mce_component(status, ipid), 0 };

	if (!(status & HWERR_MCI_VAL))
		return c;
	if (vendor == HWERR_VENDOR_AMD || vendor == HWERR_VENDOR_HYGON)
		hwerr_class_mce_amd(&c, status, mcgstatus);
	else
		hwerr_class_mce_intel(&c, status, mcgcap);
	return c;
}

/*
 * Bytes around MCi_ADDR that are hit: 1 << MISC[5:0] where MISC[8:6] says "physical
 * address" (SDM 16.3.2.4), else the page, which is what the kernel acts on.
 */
static inline __u64 hwerr_mce_range(__u64 status, __u64 misc)
{
	__u32 lsb = misc & 0x3f;

	if (status & HWERR_MCI_MISCV && ((misc >> 6) & 7) == 2 && lsb < 48)
		return 1ULL << lsb;
	return 4096;
}

/* aer_event's severity: AER_NONFATAL 0, AER_FATAL 1, AER_CORRECTABLE 2 (linux/aer.h). */
static inline struct hwerr_class hwerr_class_aer(__u32 severity)
{
	struct hwerr_class c = { HWERR_SEV_FATAL, HWERR_KIND_NONE, HWERR_COMP_PCIE, 0 };

	if (severity == 0) {
		c.severity = HWERR_SEV_RECOVERABLE;
		c.kind = HWERR_KIND_NONFATAL;
	} else if (severity == 2) {
		c.severity = HWERR_SEV_CORRECTED;
	}
	return c;
}

/* enum hw_event_mc_err_type of linux/edac.h; a number it does not have is fatal. */
static inline struct hwerr_class hwerr_class_edac(__u32 type)
{
	static const __u8 severity[] = {
		HWERR_SEV_CORRECTED, HWERR_SEV_RECOVERABLE, HWERR_SEV_DEFERRED,
		HWERR_SEV_FATAL, HWERR_SEV_INFO,
	};
	struct hwerr_class c = { HWERR_SEV_FATAL, HWERR_KIND_NONE, HWERR_COMP_MEMORY, 0 };

	if (type < sizeof(severity))
		c.severity = severity[type];
	return c;
}

/*
 * enum mf_result of linux/mm.h: 0 ignored 1 failed 2 delayed 3 recovered. A page that
 * could not be taken out of use is still there to be consumed: not contained.
 */
static inline struct hwerr_class hwerr_class_memory_failure(__s32 result, int action_required)
{
	struct hwerr_class c = { HWERR_SEV_FATAL, HWERR_KIND_NONE, HWERR_COMP_MEMORY, 0 };

	if (result == 2 || result == 3)
		c.severity = HWERR_SEV_RECOVERABLE;
	c.action_required = !!action_required;
	return c;
}

/* CPER_SEV_*: 0 recoverable 1 fatal 2 corrected 3 informational (UEFI N.2.1). */
static inline struct hwerr_class hwerr_class_cper(__u32 severity, __u8 component)
{
	static const __u8 map[] = { HWERR_SEV_RECOVERABLE, HWERR_SEV_FATAL,
				    HWERR_SEV_CORRECTED, HWERR_SEV_INFO };
	struct hwerr_class c = { HWERR_SEV_FATAL, HWERR_KIND_NONE, component, 0 };

	if (severity < sizeof(map))
		c.severity = map[severity];
	return c;
}

/* GHES_SEV_*: 0 none 1 corrected 2 recoverable 3 panic (acpi/ghes.h). */
static inline struct hwerr_class hwerr_class_ghes(__u32 severity, __u8 component)
{
	static const __u8 map[] = { HWERR_SEV_INFO, HWERR_SEV_CORRECTED,
				    HWERR_SEV_RECOVERABLE, HWERR_SEV_FATAL };
	struct hwerr_class c = { HWERR_SEV_FATAL, HWERR_KIND_NONE, component, 0 };

	if (severity < sizeof(map))
		c.severity = map[severity];
	return c;
}

#endif /* _HWERR_CLASSIFY_H */
