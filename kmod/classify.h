/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What a hardware error means: severity, kind, component, action required.
 *
 * Pure functions of what the hardware or firmware said, with fixed types only:
 * compiled into the module, into BPF programs and on the host. Nothing is read
 * but the arguments, and nothing is ever dropped: what no rule knows gets a
 * class too.
 *
 * Sources, by short name:
 *   SDM    Intel 64 and IA-32 Architectures Software Developer's Manual, volume
 *          3B, chapters "Machine-Check Architecture" and "Interpreting Machine
 *          Check Error Codes" (15 and 16, from 2022 on 16 and 17)
 *   PPR    AMD Processor Programming Reference, "Machine Check Architecture"
 *   grade  the kernel's own table, arch/x86/kernel/cpu/mce/severity.c
 *   UEFI   UEFI specification, appendix N "Common Platform Error Record"
 *   PCIe   PCI Express Base Specification, 6.2 and 7.8.4
 */
#ifndef _HWERR_CLASSIFY_H
#define _HWERR_CLASSIFY_H

#ifndef _UAPI_HWERR_H
#include "uapi/hwerr.h"
#endif

/**
 * struct hwerr_class - what an error means
 * @severity: enum hwerr_severity
 * @kind: enum hwerr_kind
 * @component: enum hwerr_component
 * @flags: HWERR_F_ACTION_REQUIRED or 0
 */
struct hwerr_class {
	__u8 severity;
	__u8 kind;
	__u8 component;
	__u32 flags;
};

#define HWERR_CLASS_OF(sev, kind, component, flags)	\
	((struct hwerr_class){ HWERR_SEV_##sev, HWERR_KIND_##kind, component, flags })

#define HWERR_CLASS_BIT(n)	(1ULL << (n))

/*
 * Machine checks
 */

/* IA32_MCi_STATUS, SDM "IA32_MCi_STATUS MSRS"; DEFERRED and POISON: PPR */
#define HWERR_MCI_VAL		HWERR_CLASS_BIT(63)
#define HWERR_MCI_OVER		HWERR_CLASS_BIT(62)
#define HWERR_MCI_UC		HWERR_CLASS_BIT(61)
#define HWERR_MCI_EN		HWERR_CLASS_BIT(60)
#define HWERR_MCI_MISCV		HWERR_CLASS_BIT(59)
#define HWERR_MCI_ADDRV		HWERR_CLASS_BIT(58)
#define HWERR_MCI_PCC		HWERR_CLASS_BIT(57)
#define HWERR_MCI_S		HWERR_CLASS_BIT(56)
#define HWERR_MCI_AR		HWERR_CLASS_BIT(55)
#define HWERR_MCI_DEFERRED	HWERR_CLASS_BIT(44)	/* AMD, Hygon */
#define HWERR_MCI_POISON	HWERR_CLASS_BIT(43)	/* AMD, Hygon */
#define HWERR_MCI_CEC_SHIFT	38			/* Intel, bits 52:38 */
#define HWERR_MCI_CEC_MASK	(0x7fffULL << HWERR_MCI_CEC_SHIFT)
#define HWERR_MCI_THRESHOLD(s)	(((s) >> 53) & 3)	/* Intel, not UC */

/* IA32_MCG_STATUS and IA32_MCG_CAP, SDM "Machine-Check Global Control MSRs" */
#define HWERR_MCG_RIPV		HWERR_CLASS_BIT(0)
#define HWERR_MCG_EIPV		HWERR_CLASS_BIT(1)
#define HWERR_MCG_MCIP		HWERR_CLASS_BIT(2)
#define HWERR_MCG_SEAM_NR	HWERR_CLASS_BIT(12)
#define HWERR_MCG_CAP_CMCI	HWERR_CLASS_BIT(10)
#define HWERR_MCG_CAP_TES	HWERR_CLASS_BIT(11)
#define HWERR_MCG_CAP_SER	HWERR_CLASS_BIT(24)

/* The kernel's X86_VENDOR_*, which are in struct mce and so are ABI. */
#define HWERR_VENDOR_INTEL	0
#define HWERR_VENDOR_AMD	2
#define HWERR_VENDOR_HYGON	9
#define HWERR_VENDOR_ZHAOXIN	10

/* apei_mce_report_mem_error(): a firmware record dressed as a machine check. */
#define HWERR_MCE_BANK_FIRMWARE	255

/* What is known beside the registers. */
#define HWERR_MCE_EXCEPTION	0x01	/* signalled by #MC, whatever MCIP says */
#define HWERR_MCE_KERNEL_RECOV	0x02	/* hit kernel code that has a fixup */
#define HWERR_MCE_SMCA		0x04	/* AMD: scalable MCA */
#define HWERR_MCE_OVERFLOW_RECOV 0x08	/* AMD: CPUID 80000007 EBX[0] */
#define HWERR_MCE_SUCCOR	0x10	/* AMD: CPUID 80000007 EBX[1] */

enum hwerr_mce_context {
	HWERR_MCE_CONTEXT_UNKNOWN,
	HWERR_MCE_CONTEXT_USER,
	HWERR_MCE_CONTEXT_KERNEL,
	HWERR_MCE_CONTEXT_RECOV,
};

static inline int hwerr_mce_is_amd(const struct hwerr_info_mce *m)
{
	return m->vendor == HWERR_VENDOR_AMD || m->vendor == HWERR_VENDOR_HYGON;
}

static inline int hwerr_mce_is_intel(const struct hwerr_info_mce *m)
{
	return m->vendor == HWERR_VENDOR_INTEL || m->vendor == HWERR_VENDOR_ZHAOXIN;
}

static inline int hwerr_mce_is_firmware(const struct hwerr_info_mce *m)
{
	return m->bank == HWERR_MCE_BANK_FIRMWARE && (m->status & 0xffff) == 0x9f;
}

/* MCIP is set in #MC and only there (SDM "IA32_MCG_STATUS MSR"). */
static inline int hwerr_mce_is_exception(const struct hwerr_info_mce *m, __u32 facts)
{
	return (m->mcgstatus & HWERR_MCG_MCIP) || (facts & HWERR_MCE_EXCEPTION);
}

/*
 * grade, error_context(). A polled bank says nothing of the code that was hit;
 * the kernel's table takes that for kernel code, which would make a bank that
 * is left over from before a reset fatal in hindsight: here it stays unknown.
 */
static inline enum hwerr_mce_context
hwerr_mce_context(const struct hwerr_info_mce *m, __u32 facts)
{
	if (!hwerr_mce_is_exception(m, facts))
		return HWERR_MCE_CONTEXT_UNKNOWN;
	if ((m->cs & 3) == 3)
		return HWERR_MCE_CONTEXT_USER;
	if (facts & HWERR_MCE_KERNEL_RECOV)
		return HWERR_MCE_CONTEXT_RECOV;
	return HWERR_MCE_CONTEXT_KERNEL;
}

/*
 * MCACOD, SDM "Simple Error Codes" and "Compound Error Codes". Bit 12, "F", says
 * that corrected errors are filtered, nothing of the error. AMD's error code is
 * built alike (PPR "Error Codes"): TLB, memory (which is the cache hierarchy)
 * and bus.
 */
static inline __u8 hwerr_mce_component_code(__u64 status)
{
	__u32 code = status & 0xefff;

	if ((code & 0xf800) == 0x0800)		/* 000F 1PPT RRRR IILL, II 2: I/O */
		return ((code >> 2) & 3) == 2 ? HWERR_COMP_IO : HWERR_COMP_BUS;
	if ((code & 0xfc00) == 0x0400)		/* internal timer, unclassified */
		return HWERR_COMP_PROCESSOR;
	if ((code & 0xff80) == 0x0280)		/* 000F 0010 1MMM CCCC: near memory */
		return HWERR_COMP_MEMORY;
	if ((code & 0xff00) == 0x0100)		/* 000F 0001 RRRR TTLL */
		return HWERR_COMP_CACHE;
	if ((code & 0xff80) == 0x0080)		/* 000F 0000 1MMM CCCC */
		return HWERR_COMP_MEMORY;
	if ((code & 0xfff0) == 0x0010)		/* 000F 0000 0001 TTLL */
		return HWERR_COMP_TLB;
	if ((code & 0xfffc) == 0x000c)		/* 000F 0000 0000 11LL */
		return HWERR_COMP_CACHE;
	switch (code) {
	case 0x0002:				/* microcode ROM parity */
	case 0x0004:				/* functional redundancy */
	case 0x0005:				/* internal parity */
	case 0x0007:				/* internal */
		return HWERR_COMP_PROCESSOR;
	case 0x0003:				/* external: BINIT# of another processor */
		return HWERR_COMP_BUS;
	case 0x0006:				/* SMM code left its ranges */
		return HWERR_COMP_FIRMWARE;
	}
	return HWERR_COMP_UNKNOWN;
}

/*
 * MCA_IPID: hardware id in bits 43:32, type in 63:48; the pairs are those of
 * smca_hwid_mcatypes[] in arch/x86/kernel/cpu/mce/amd.c. A type that is not here
 * is left to the error code.
 */
static inline __u8 hwerr_mce_component_smca(const struct hwerr_info_mce *m)
{
	__u32 hwid = (m->ipid >> 32) & 0xfff;
	__u32 type = (m->ipid >> 48) & 0xffff;

	switch (hwid) {
	case 0xb0:	/* core */
		switch (type) {
		case 0x00:	/* load-store */
		case 0x10:
		case 0x01:	/* instruction fetch */
			return hwerr_mce_component_code(m->status) == HWERR_COMP_TLB ?
			       HWERR_COMP_TLB : HWERR_COMP_CACHE;
		case 0x02:	/* L2 */
		case 0x07:	/* L3 */
			return HWERR_COMP_CACHE;
		case 0x03:	/* decode */
		case 0x05:	/* execution */
		case 0x06:	/* floating point */
			return HWERR_COMP_PROCESSOR;
		}
		break;
	case 0x2e:	/* data fabric: coherent station, PIE, memory-side cache */
		return type == 0x04 ? HWERR_COMP_CACHE : HWERR_COMP_BUS;
	case 0x96:	/* unified memory controller */
		return HWERR_COMP_MEMORY;
	case 0x05:	/* parameter block */
	case 0xff:	/* platform security processor */
	case 0x01:	/* system management unit, MP5, MPDMA */
		return HWERR_COMP_FIRMWARE;
	case 0x46:	/* PCI Express */
		return HWERR_COMP_PCIE;
	case 0x18:	/* northbridge I/O */
	case 0x6c:	/* NBIF */
	case 0x80:	/* system hub */
	case 0xa8:	/* SATA */
	case 0xaa:	/* USB */
		return HWERR_COMP_IO;
	case 0x50:	/* links between dies and sockets: xGMI, USR, GMI, WAFL */
	case 0x170:
	case 0x180:
	case 0x241:
	case 0x259:
	case 0x267:
	case 0x269:
		return HWERR_COMP_BUS;
	}
	return HWERR_COMP_UNKNOWN;
}

/* Before Zen: DRAM is the northbridge, bank 4, with extended error code 8. */
static inline int hwerr_mce_is_amd_dram(const struct hwerr_info_mce *m)
{
	return m->bank == 4 && ((m->status >> 16) & 0x1f) == 8;
}

static inline __u8 hwerr_mce_component(const struct hwerr_info_mce *m, __u32 facts)
{
	__u8 component;

	if (!(m->status & HWERR_MCI_VAL))
		return HWERR_COMP_UNKNOWN;
	if (hwerr_mce_is_firmware(m))
		return HWERR_COMP_MEMORY;
	if (!hwerr_mce_is_amd(m))
		return hwerr_mce_component_code(m->status);
	if (facts & HWERR_MCE_SMCA) {
		component = hwerr_mce_component_smca(m);
		if (component != HWERR_COMP_UNKNOWN)
			return component;
	} else if (hwerr_mce_is_amd_dram(m)) {
		return HWERR_COMP_MEMORY;
	}
	return hwerr_mce_component_code(m->status);
}

/*
 * Patrol scrub errors that Skylake and Cascade Lake servers report as corrected,
 * with a signature of their own; grade, "Uncorrected Patrol Scrub Error".
 */
static inline int hwerr_mce_is_skx_scrub(const struct hwerr_info_mce *m)
{
	__u32 family = (m->cpuid >> 8) & 0xf;
	__u32 model = ((m->cpuid >> 12) & 0xf0) | ((m->cpuid >> 4) & 0xf);
	__u64 valid = HWERR_MCI_ADDRV | HWERR_MCI_MISCV;

	return m->vendor == HWERR_VENDOR_INTEL && family == 6 && model == 0x55 &&
	       (m->cpuid & 0xf) >= 4 && m->bank >= 13 && m->bank <= 18 &&
	       (m->status & (HWERR_MCI_UC | valid | 0xffffeff0)) == (valid | 0x001000c0);
}

/*
 * Can the code that was hit not go on? grade, the rules on MCG_STATUS, for an
 * uncorrected error; a corrected one that lies in another bank is not to blame.
 */
static inline int hwerr_mce_is_lost(const struct hwerr_info_mce *m, __u32 facts)
{
	if (!hwerr_mce_is_exception(m, facts))
		return 0;
	if (!(m->mcgstatus & HWERR_MCG_MCIP))
		return 1;
	if (!(m->mcgstatus & (HWERR_MCG_RIPV | HWERR_MCG_EIPV)))
		return 1;
	return hwerr_mce_context(m, facts) != HWERR_MCE_CONTEXT_USER &&
	       !(m->mcgstatus & HWERR_MCG_RIPV);
}

/*
 * SDM "Error Severity Classes", for an uncorrected error with PCC clear; grade, the
 * rules that require MCG_SER_P.
 */
static inline struct hwerr_class hwerr_mce_grade_ser(const struct hwerr_info_mce *m,
						     __u32 facts, __u8 component)
{
	const struct hwerr_class fatal = HWERR_CLASS_OF(FATAL, NONE, component, 0);
	const struct hwerr_class srao = HWERR_CLASS_OF(RECOVERABLE, SRAO, component, 0);
	const __u64 valid = HWERR_MCI_ADDRV | HWERR_MCI_MISCV;
	enum hwerr_mce_context context = hwerr_mce_context(m, facts);
	__u64 ip = m->mcgstatus & (HWERR_MCG_RIPV | HWERR_MCG_EIPV);
	__u32 code = m->status & 0xefff;

	if (!(m->status & HWERR_MCI_AR)) {
		/* Scrubber and cache write-back: optional whether S is set or not. */
		if ((m->status & HWERR_MCI_S) || (code & 0xfff0) == 0x00c0 || code == 0x017a)
			return srao;
		return HWERR_CLASS_OF(RECOVERABLE, UCNA, component, 0);
	}
	/* No such class; required, with others lost; required, nobody knows where. */
	if (!(m->status & HWERR_MCI_S) || (m->status & HWERR_MCI_OVER) ||
	    (m->status & valid) != valid)
		return fatal;
	/* Seen by a thread that did not consume it. */
	if (ip == HWERR_MCG_RIPV)
		return HWERR_CLASS_OF(RECOVERABLE, SRAR, component, 0);
	/* Data load, instruction fetch: the only codes with a way out. */
	if (code != 0x0134 && code != 0x0150)
		return fatal;
	if (context == HWERR_MCE_CONTEXT_KERNEL && !(m->mcgstatus & HWERR_MCG_SEAM_NR))
		return fatal;
	/* A fixup is for data that code of the kernel loads. */
	if (context == HWERR_MCE_CONTEXT_RECOV && code != 0x0134)
		return fatal;
	return HWERR_CLASS_OF(RECOVERABLE, SRAR, component, HWERR_F_ACTION_REQUIRED);
}

static inline struct hwerr_class hwerr_mce_grade_intel(const struct hwerr_info_mce *m,
						       __u32 facts, __u8 component)
{
	enum hwerr_mce_context context = hwerr_mce_context(m, facts);

	if (hwerr_mce_is_skx_scrub(m))
		return HWERR_CLASS_OF(RECOVERABLE, SRAO, component, 0);
	if (!(m->status & HWERR_MCI_UC))
		return HWERR_CLASS_OF(CORRECTED, NONE, component, 0);
	if (hwerr_mce_is_lost(m, facts))
		return HWERR_CLASS_OF(FATAL, NONE, component, 0);
	/* Without capabilities (a file) recovery is assumed, as since Nehalem-EX. */
	if (!m->mcgcap || (m->mcgcap & HWERR_MCG_CAP_SER))
		return hwerr_mce_grade_ser(m, facts, component);
	/* Bits 56 and 55 are nothing here: grade, the last rules. */
	if ((m->status & HWERR_MCI_OVER) || context == HWERR_MCE_CONTEXT_KERNEL)
		return HWERR_CLASS_OF(FATAL, NONE, component, 0);
	return HWERR_CLASS_OF(RECOVERABLE, NONE, component,
			      context == HWERR_MCE_CONTEXT_USER ? HWERR_F_ACTION_REQUIRED : 0);
}

/*
 * PPR "Machine Check Error Handling"; grade, mce_severity_amd(). What it says of
 * recovery is about #MC. An uncorrected error that was found by polling has
 * stopped nobody: it is told as contained, without an action.
 */
static inline struct hwerr_class hwerr_mce_grade_amd(const struct hwerr_info_mce *m,
						     __u32 facts, __u8 component)
{
	if (m->status & HWERR_MCI_DEFERRED)
		return HWERR_CLASS_OF(DEFERRED, NONE, component, 0);
	if (!(m->status & HWERR_MCI_UC))
		return HWERR_CLASS_OF(CORRECTED, NONE, component, 0);
	if (!hwerr_mce_is_exception(m, facts))
		return HWERR_CLASS_OF(RECOVERABLE, NONE, component, 0);
	if (((m->status & HWERR_MCI_OVER) && !(facts & HWERR_MCE_OVERFLOW_RECOV)) ||
	    !(facts & HWERR_MCE_SUCCOR) ||
	    hwerr_mce_context(m, facts) == HWERR_MCE_CONTEXT_KERNEL)
		return HWERR_CLASS_OF(FATAL, NONE, component, 0);
	return HWERR_CLASS_OF(RECOVERABLE, SRAR, component, HWERR_F_ACTION_REQUIRED);
}

/**
 * hwerr_class_mce() - class of a machine check
 * @m: the bank as it was
 * @facts: HWERR_MCE_*
 *
 * A bank that is not valid says nothing, and is told as such (info).
 */
static inline struct hwerr_class hwerr_class_mce(const struct hwerr_info_mce *m, __u32 facts)
{
	__u8 component = hwerr_mce_component(m, facts);

	if (!(m->status & HWERR_MCI_VAL))
		return HWERR_CLASS_OF(INFO, NONE, component, 0);
	if (m->status & HWERR_MCI_PCC)
		return HWERR_CLASS_OF(FATAL, NONE, component, 0);
	/* No S, AR or SUCCOR in a register that firmware never wrote. */
	if (hwerr_mce_is_firmware(m))
		return m->status & HWERR_MCI_UC ?
		       HWERR_CLASS_OF(RECOVERABLE, NONE, component, 0) :
		       HWERR_CLASS_OF(CORRECTED, NONE, component, 0);
	if (hwerr_mce_is_amd(m))
		return hwerr_mce_grade_amd(m, facts, component);
	return hwerr_mce_grade_intel(m, facts, component);
}

/*
 * Is MCi_ADDR a physical address? SDM "IA32_MCi_MISC MSRs": if MISC says so, and
 * for what is at most a page. On AMD never by itself, a memory controller's is
 * that of the channel: only where poison was consumed, and before Zen for DRAM
 * (amd_mce_usable_address(), 6.7 on, 48da1ad8ba95). Kernels before that, and
 * all of them for other vendors, take any address; so their own answer is asked
 * as well, and both must agree.
 */
static inline int hwerr_mce_addr_is_physical(const struct hwerr_info_mce *m, __u32 facts)
{
	if (!(m->status & HWERR_MCI_VAL) || !(m->status & HWERR_MCI_ADDRV))
		return 0;
	if (hwerr_mce_is_firmware(m))
		return 1;
	if (hwerr_mce_is_intel(m))
		return (m->status & HWERR_MCI_MISCV) && (m->misc & 0x3f) <= 12 &&
		       ((m->misc >> 6) & 7) == 2;
	if (!hwerr_mce_is_amd(m))
		return 1;
	if (!(facts & HWERR_MCE_SMCA)) {
		if (hwerr_mce_is_amd_dram(m))
			return 1;
		if (m->bank == 4)
			return 0;
	}
	return !!(m->status & HWERR_MCI_POISON);
}

/* Is the address, physical or not, that of data in memory? As mce_is_memory_error(). */
static inline int hwerr_mce_is_memory(const struct hwerr_info_mce *m, __u32 facts)
{
	__u8 component = hwerr_mce_component(m, facts);

	if (hwerr_mce_is_amd(m))
		return component == HWERR_COMP_MEMORY;
	return component == HWERR_COMP_MEMORY || component == HWERR_COMP_CACHE;
}

/*
 * Bytes from MCi_ADDR (rounded down) on: SDM "IA32_MCi_MISC MSRs", "Recoverable
 * Address LSB" where the mode is physical, else the page. AMD has no such
 * fields; the bits are reserved there and zero, which is another mode.
 */
static inline __u64 hwerr_mce_addr_len(const struct hwerr_info_mce *m)
{
	if ((m->status & HWERR_MCI_MISCV) && ((m->misc >> 6) & 7) == 2)
		return 1ULL << (m->misc & 0x3f);
	return 4096;
}

/* Errors that a bank stands for: SDM, "Corrected Error Count", with MCG_CMCI_P. */
static inline __u32 hwerr_mce_count(const struct hwerr_info_mce *m)
{
	__u32 count = (m->status & HWERR_MCI_CEC_MASK) >> HWERR_MCI_CEC_SHIFT;

	if (!hwerr_mce_is_intel(m) || !(m->mcgcap & HWERR_MCG_CAP_CMCI) ||
	    !(m->status & HWERR_MCI_VAL) || (m->status & HWERR_MCI_UC) || !count)
		return 1;
	return count;
}

/* The bank's status without what only counts: equal for repetitions. */
static inline __u64 hwerr_mce_status_ident(const struct hwerr_info_mce *m)
{
	__u64 status = m->status & ~HWERR_MCI_OVER;

	return hwerr_mce_is_amd(m) ? status : status & ~HWERR_MCI_CEC_MASK;
}

/* More corrected errors than the threshold: SDM "Threshold-Based Error Status". */
static inline int hwerr_mce_is_yellow(const struct hwerr_info_mce *m)
{
	return hwerr_mce_is_intel(m) && (m->mcgcap & HWERR_MCG_CAP_TES) &&
	       (m->status & HWERR_MCI_VAL) && !(m->status & HWERR_MCI_UC) &&
	       HWERR_MCI_THRESHOLD(m->status) == 2;
}

/*
 * The other sources say how bad it is, each in its own numbers. A number that
 * is not known here is taken for the worst.
 */

/**
 * hwerr_class_aer() - class of an AER event
 * @severity: of the aer_event tracepoint: 0 nonfatal, 1 fatal, 2 corrected
 *
 * The status has no part in it, whatever number of bits it has: the device has
 * decided by its severity register (PCIe 7.8.4.4).
 */
static inline struct hwerr_class hwerr_class_aer(__u32 severity)
{
	switch (severity) {
	case 0:
		return HWERR_CLASS_OF(RECOVERABLE, NONFATAL, HWERR_COMP_PCIE, 0);
	case 2:
		return HWERR_CLASS_OF(CORRECTED, NONE, HWERR_COMP_PCIE, 0);
	}
	return HWERR_CLASS_OF(FATAL, NONE, HWERR_COMP_PCIE, 0);
}

/**
 * hwerr_class_edac() - class of a memory controller's event
 * @type: enum hw_event_mc_err_type: 0 corrected 1 uncorrected 2 deferred 3 fatal
 *	4 info
 */
static inline struct hwerr_class hwerr_class_edac(__u32 type)
{
	switch (type) {
	case 0:
		return HWERR_CLASS_OF(CORRECTED, NONE, HWERR_COMP_MEMORY, 0);
	case 1:
		return HWERR_CLASS_OF(RECOVERABLE, NONE, HWERR_COMP_MEMORY, 0);
	case 2:
		return HWERR_CLASS_OF(DEFERRED, NONE, HWERR_COMP_MEMORY, 0);
	case 4:
		return HWERR_CLASS_OF(INFO, NONE, HWERR_COMP_MEMORY, 0);
	}
	return HWERR_CLASS_OF(FATAL, NONE, HWERR_COMP_MEMORY, 0);
}

/**
 * hwerr_class_memfail() - class of a page that the kernel took out
 * @result: enum mf_result: 0 ignored 1 failed 2 delayed 3 recovered
 * @action_required: a CPU stands before the data (MF_ACTION_REQUIRED)
 *
 * By the words at action_name[] in mm/memory-failure.c. Delayed, recovered: the
 * page is out of reach, nobody reads the bad data. Failed: users were killed,
 * but the page is still reachable, and whoever reaches it is killed at once:
 * contained, at the price of the context. Ignored: it is the kernel's or nobody
 * knows whose, nothing was done, and the next access reads bad data or raises a
 * machine check in the kernel: not contained.
 */
static inline struct hwerr_class hwerr_class_memfail(__s32 result, int action_required)
{
	__u32 flags = action_required ? HWERR_F_ACTION_REQUIRED : 0;

	switch (result) {
	case 1:
		flags = HWERR_F_ACTION_REQUIRED;
		return HWERR_CLASS_OF(RECOVERABLE, NONE, HWERR_COMP_MEMORY, flags);
	case 2:
	case 3:
		return HWERR_CLASS_OF(RECOVERABLE, NONE, HWERR_COMP_MEMORY, flags);
	}
	return HWERR_CLASS_OF(FATAL, NONE, HWERR_COMP_MEMORY, flags);
}

/*
 * Firmware records
 */

/* A GUID in memory: the first three fields are little endian, the last is as written. */
static inline int hwerr_guid_is(const __u8 *guid, __u32 a, __u16 b, __u16 c, __u64 d)
{
	__u64 tail = 0;
	int i;

	for (i = 8; i < 16; i++)
		tail = tail << 8 | guid[i];
	return (guid[0] | guid[1] << 8 | guid[2] << 16 | (__u32)guid[3] << 24) == a &&
	       (guid[4] | guid[5] << 8) == b && (guid[6] | guid[7] << 8) == c && tail == d;
}

/**
 * hwerr_cper_component() - which part a firmware section speaks of
 * @guid: its type (UEFI N.2.2, "Section Descriptor"), as in memory
 */
static inline __u8 hwerr_cper_component(const __u8 *guid)
{
	/* platform memory; platform memory 2 */
	if (hwerr_guid_is(guid, 0xa5bc1114, 0x6f64, 0x4ede, 0xb8633e83ed7c83b1ULL) ||
	    hwerr_guid_is(guid, 0x61ec04fc, 0x48e6, 0xd813, 0x25c98daa44750b12ULL))
		return HWERR_COMP_MEMORY;
	/* processor, generic; processor, IA32/X64; processor, ARM */
	if (hwerr_guid_is(guid, 0x9876ccad, 0x47b4, 0x4bdb, 0xb65e16f193c4f3dbULL) ||
	    hwerr_guid_is(guid, 0xdc3ea0b0, 0xa144, 0x4797, 0xb95b53fa242b6e1dULL) ||
	    hwerr_guid_is(guid, 0xe19e3d16, 0xbc11, 0x11e4, 0x9caac2051d5d46b0ULL))
		return HWERR_COMP_PROCESSOR;
	/* PCI Express */
	if (hwerr_guid_is(guid, 0xd995e954, 0xbbc1, 0x430f, 0xad91b44dcb3c6f35ULL))
		return HWERR_COMP_PCIE;
	/* PCI/PCI-X bus */
	if (hwerr_guid_is(guid, 0xc5753963, 0x3b84, 0x4095, 0xbf78eddad3f9c9ddULL))
		return HWERR_COMP_BUS;
	/* PCI component; DMA remapping, generic; DMA remapping, VT-d; DMA remapping, IOMMU */
	if (hwerr_guid_is(guid, 0xeb5e4685, 0xca66, 0x4769, 0xb6a226068b001326ULL) ||
	    hwerr_guid_is(guid, 0x5b51fef7, 0xc79d, 0x4434, 0x8f1baa62de3e2c64ULL) ||
	    hwerr_guid_is(guid, 0x71761d37, 0x32b2, 0x45cd, 0xa7d0b0fedd93e8cfULL) ||
	    hwerr_guid_is(guid, 0x036f84e1, 0x7f37, 0x428c, 0xa79e575fdfaa84ecULL))
		return HWERR_COMP_IO;
	/* firmware error record reference */
	if (hwerr_guid_is(guid, 0x81212a96, 0x09ed, 0x4996, 0x94718d729c8e69edULL))
		return HWERR_COMP_FIRMWARE;
	return HWERR_COMP_UNKNOWN;
}

/**
 * hwerr_class_cper() - class of a firmware record
 * @severity: UEFI N.2.1: 0 recoverable 1 fatal 2 corrected 3 info
 * @component: hwerr_cper_component() of its section
 */
static inline struct hwerr_class hwerr_class_cper(__u32 severity, __u8 component)
{
	switch (severity) {
	case 0:
		return HWERR_CLASS_OF(RECOVERABLE, NONE, component, 0);
	case 2:
		return HWERR_CLASS_OF(CORRECTED, NONE, component, 0);
	case 3:
		return HWERR_CLASS_OF(INFO, NONE, component, 0);
	}
	return HWERR_CLASS_OF(FATAL, NONE, component, 0);
}

/**
 * hwerr_class_ghes() - class of a firmware record, as the kernel's GHES numbers it
 * @severity: include/acpi/ghes.h: 0 none 1 corrected 2 recoverable 3 panic
 * @component: hwerr_cper_component() of its section
 */
static inline struct hwerr_class hwerr_class_ghes(__u32 severity, __u8 component)
{
	switch (severity) {
	case 0:
		return HWERR_CLASS_OF(INFO, NONE, component, 0);
	case 1:
		return HWERR_CLASS_OF(CORRECTED, NONE, component, 0);
	case 2:
		return HWERR_CLASS_OF(RECOVERABLE, NONE, component, 0);
	}
	return HWERR_CLASS_OF(FATAL, NONE, component, 0);
}

#endif /* _HWERR_CLASSIFY_H */
