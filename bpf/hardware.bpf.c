// SPDX-License-Identifier: GPL-2.0-only
/*
 * Hardware errors where hwerr.ko cannot be loaded: the tracepoints that its sources are
 * made of, the same classifier, the same records but for what docs/moduleless.md says.
 *
 * mce_record is raised by the first notifier of the decode chain behind the corrected-error
 * collector, so before memory_failure() takes the page from its owners. memory_failure()
 * itself is looked at when it is called, for the same reason; its own tracepoint comes
 * when it is done.
 *
 * A program that its reader loaded goes with its reader.
 */
#include "owners.h"

#define MCJ_EXCEPTION		0x8		/* asm/mce.h */
#define MCE_IN_KERNEL_RECOV	0x40
#define FEATURE_OVERFLOW_RECOV	(17 * 32 + 0)	/* asm/cpufeatures.h */
#define FEATURE_SUCCOR		(17 * 32 + 1)
#define FEATURE_SMCA		(17 * 32 + 3)
#define CPER_SEV_RECOVERABLE	0		/* linux/cper.h */
#define CPER_SEV_FATAL		1
#define CPER_SEV_CORRECTED	2
#define CPER_MEM_VALID_PA	0x2
#define CPER_MEM_VALID_PA_MASK	0x4
#define CPER_MEM_VALID_ERROR_TYPE 0x4000
#define MF_ACTION_REQUIRED	0x2	/* enum mf_flags, linux/mm.h */
#define MF_SW_SIMULATED		0x20

#define CALLS_MAX	16

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 512 * 1024);
} hwerr_minor SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1024 * 1024);
} hwerr_major SEC(".maps");

/* Samples for which there was no room, by class. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hwerr_hw_dropped);
} hwerr_dropped SEC(".maps");

/* Calls of memory_failure() under way, by thread. */
struct call {
	struct hwerr_hw hw;
	struct hwerr_hw_who who[HWERR_HW_WHOS];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, CALLS_MAX);
	__type(key, __u32);
	__type(value, struct call);
} hwerr_calls SEC(".maps");

__u64 hwerr_order;

static __always_inline struct room *begin(__u32 place, __u8 source)
{
	struct room *r = room_of(place);

	if (!r)
		return NULL;
	__builtin_memset(&r->hw, 0, offsetof(struct hwerr_hw, text));
	__builtin_memset(r->hw.body, 0, sizeof(r->hw.body));
	r->hw.text[0] = 0;
	r->hw.detail[0] = 0;
	r->hw.time_ns = bpf_ktime_get_ns();
	r->hw.cpu = bpf_get_smp_processor_id();
	r->hw.count = 1;
	r->hw.mf_type = -1;
	r->hw.mf_result = -1;
	r->hw.source = source;
	return r;
}

static __always_inline void classify(struct hwerr_hw *hw, struct hwerr_class class)
{
	hw->severity = class.severity;
	hw->kind = class.kind;
	hw->component = class.component;
	hw->flags |= class.flags;
}

static __always_inline void ident(struct hwerr_hw *hw, __u64 a, __u64 b, __u64 c, __u64 d)
{
	if (hw->severity > HWERR_SEV_CORRECTED)
		return;
	hw->ident[0] = a;
	hw->ident[1] = b;
	hw->ident[2] = c;
	hw->ident[3] = d;
}

static __always_inline void emit(struct hwerr_hw *hw, __u64 tail)
{
	__u64 len = sizeof(*hw) + tail;
	__u64 class = hw->severity * 16 + hw->source;
	struct hwerr_hw_dropped *dropped;
	__u32 zero = 0;
	long err;

	if (len > sizeof(struct call))
		len = sizeof(struct call);
	hw->order = __sync_fetch_and_add(&hwerr_order, 1);
	if (hw->severity <= HWERR_SEV_CORRECTED)
		err = bpf_ringbuf_output(&hwerr_minor, hw, len, 0);
	else
		err = bpf_ringbuf_output(&hwerr_major, hw, len, 0);
	if (!err)
		return;
	dropped = bpf_map_lookup_elem(&hwerr_dropped, &zero);
	/* The verifier is to see the mask, whatever the compiler knows. */
	barrier_var(class);
	class &= 127;
	if (dropped)
		__sync_fetch_and_add(&dropped->n[class], 1);
}

static __always_inline __u64 whos(struct hwerr_hw *hw)
{
	return (hw->whos & (2 * HWERR_HW_WHOS - 1)) * sizeof(struct hwerr_hw_who);
}

static __always_inline void body(struct hwerr_hw *hw, struct hwerr_info *head, __u16 type,
				 __u32 len)
{
	head->len = len;
	head->type = type;
	hw->body_len = len;
}

/* Machine checks: kmod/source_mce.c */

static __always_inline __u32 mce_facts(struct mce *m)
{
	__u32 facts = 0;

	if (BPF_CORE_READ(m, inject_flags) & MCJ_EXCEPTION)
		facts |= HWERR_MCE_EXCEPTION;
	if (BPF_CORE_READ(m, kflags) & MCE_IN_KERNEL_RECOV)
		facts |= HWERR_MCE_KERNEL_RECOV;
	if (cpu_has(FEATURE_SMCA))
		facts |= HWERR_MCE_SMCA;
	if (cpu_has(FEATURE_OVERFLOW_RECOV))
		facts |= HWERR_MCE_OVERFLOW_RECOV;
	if (cpu_has(FEATURE_SUCCOR))
		facts |= HWERR_MCE_SUCCOR;
	return facts;
}

static __always_inline void mce_fill(struct hwerr_info_mce *i, struct mce *m)
{
	i->status = BPF_CORE_READ(m, status);
	i->addr = BPF_CORE_READ(m, addr);
	i->misc = BPF_CORE_READ(m, misc);
	i->mcgstatus = BPF_CORE_READ(m, mcgstatus);
	i->mcgcap = BPF_CORE_READ(m, mcgcap);
	i->synd = BPF_CORE_READ(m, synd);
	i->ipid = BPF_CORE_READ(m, ipid);
	i->ppin = BPF_CORE_READ(m, ppin);
	i->tsc = BPF_CORE_READ(m, tsc);
	i->ip = BPF_CORE_READ(m, ip);
	i->cpuid = BPF_CORE_READ(m, cpuid);
	i->microcode = BPF_CORE_READ(m, microcode);
	i->socket = BPF_CORE_READ(m, socketid);
	i->apicid = BPF_CORE_READ(m, apicid);
	i->bank = BPF_CORE_READ(m, bank);
	i->vendor = BPF_CORE_READ(m, cpuvendor);
	i->cs = BPF_CORE_READ(m, cs);
}

/*
 * From 6.13 on the argument is a struct mce_hw_err, which begins with the struct mce
 * (750fd23926f1, "x86/mce: Add wrapper for struct mce to export vendor specific info"):
 * it is read as memory, not by the type that the kernel says it has.
 */
SEC("raw_tp/mce_record")
int hwerr_mce(struct bpf_raw_tracepoint_args *ctx)
{
	struct room *r = begin(PLACE_MCE, HWERR_SRC_MCE);
	struct mce *m = (void *)ctx->args[0];
	struct hwerr_info_mce *i;
	__u64 len;
	__u32 facts;

	if (!r)
		return 0;
	i = (void *)r->hw.body;
	mce_fill(i, m);
	body(&r->hw, &i->head, HWERR_INFO_MCE, sizeof(*i));
	facts = mce_facts(m);
	classify(&r->hw, hwerr_class_mce(i, facts));
	r->hw.raw_severity = BPF_CORE_READ(m, severity);
	r->hw.count = hwerr_mce_count(i);
	r->hw.cpu = BPF_CORE_READ(m, extcpu);
	if (hwerr_mce_is_firmware(i)) {
		r->hw.source = HWERR_SRC_CPER;
		if (i->status & HWERR_MCI_PCC)
			r->hw.raw_severity = CPER_SEV_FATAL;
		else
			r->hw.raw_severity = i->status & HWERR_MCI_UC ? CPER_SEV_RECOVERABLE :
									CPER_SEV_CORRECTED;
	}
	ident(&r->hw, i->bank | (__u64)r->hw.cpu << 8, hwerr_mce_status_ident(i), i->addr, i->misc);
	if (hwerr_mce_addr_is_physical(i, facts)) {
		len = hwerr_mce_addr_len(i);
		/* Above the physical bits there are keys of memory encryption. */
		r->hw.phys_addr = i->addr & phys_mask() & ~(len - 1);
		r->hw.phys_len = len;
	} else if (hwerr_mce_is_memory(i, facts)) {
		r->hw.flags |= HWERR_F_OWNERS_UNKNOWN;
	}
	if (hwerr_mce_is_yellow(i))
		__builtin_memcpy(r->hw.text,
				 "corrected errors above the threshold (status yellow)", 53);
	hwerr_resolve(PLACE_MCE);
	emit(&r->hw, whos(&r->hw));
	return 0;
}

/* memory_failure(): kmod/source_memfail.c */

#define HWERR_MF_TYPES_6_11
#define HWERR_MF_TYPE(name, ...)	name##___hw,
enum mf_action_page_type___hw {
#include "mf_types.h"
};

#undef HWERR_MF_TYPE

#define MF_IS(type, name)							\
	(bpf_core_enum_value_exists(enum mf_action_page_type___hw, name) &&	\
	 (type) == (int)bpf_core_enum_value(enum mf_action_page_type___hw, name))

static __always_inline void memfail_text(struct hwerr_hw *hw, int type)
{
#define HWERR_MF_TYPE(name, words)						\
	MF_IS(type, name##___hw) ? (void)__builtin_memcpy(hw->text, words, sizeof(words)) :

#include "mf_types.h"
	(void)__builtin_memcpy(hw->text, "page of a type not known here", 30);
#undef HWERR_MF_TYPE
}

static __always_inline void memfail_done(struct hwerr_hw *hw, int type, int result, __u32 flags)
{
	classify(hw, hwerr_class_memfail(result, !!(flags & MF_ACTION_REQUIRED)));
	hw->raw_severity = result;
	hw->mf_type = type;
	hw->mf_result = result;
	hw->mf_flags = flags & MF_SW_SIMULATED;
	memfail_text(hw, type);
}

SEC("fentry/memory_failure")
int BPF_PROG(hwerr_memfail_enter, unsigned long pfn, int flags)
{
	struct room *r = begin(PLACE_MEMFAIL, HWERR_SRC_MEMORY_FAILURE);
	__u32 tid = bpf_get_current_pid_tgid();
	__u64 lost = piece_size(pfn);

	if (!r)
		return 0;
	r->hw.pfn = pfn;
	r->hw.mf_flags = flags;
	/* What its owners lose; what is poisoned is a page. */
	r->hw.phys_addr = pfn << PAGE_SHIFT & ~(lost - 1);
	r->hw.phys_len = lost;
	hwerr_resolve(PLACE_MEMFAIL);
	r->hw.phys_addr = pfn << PAGE_SHIFT;
	r->hw.phys_len = PAGE_SIZE;
	bpf_map_update_elem(&hwerr_calls, &tid, r, BPF_ANY);
	return 0;
}

SEC("fexit/memory_failure")
int BPF_PROG(hwerr_memfail_exit)
{
	__u32 tid = bpf_get_current_pid_tgid();

	bpf_map_delete_elem(&hwerr_calls, &tid);
	return 0;
}

SEC("raw_tp/memory_failure_event")
int hwerr_memfail(struct bpf_raw_tracepoint_args *ctx)
{
	unsigned long pfn = ctx->args[0];
	int type = ctx->args[1], result = ctx->args[2];
	__u32 tid = bpf_get_current_pid_tgid();
	struct call *c = bpf_map_lookup_elem(&hwerr_calls, &tid);
	struct room *r;

	if (c && c->hw.pfn == pfn && c->hw.mf_result == -1) {
		memfail_done(&c->hw, type, result, c->hw.mf_flags);
		emit(&c->hw, whos(&c->hw));
		return 0;
	}
	/* Its beginning was not seen, or it is another page of the same call. */
	r = begin(PLACE_MEMFAIL_EVENT, HWERR_SRC_MEMORY_FAILURE);
	if (!r)
		return 0;
	r->hw.pfn = pfn;
	r->hw.phys_addr = pfn << PAGE_SHIFT;
	r->hw.phys_len = PAGE_SIZE;
	r->hw.flags |= HWERR_F_OWNERS_UNKNOWN;
	memfail_done(&r->hw, type, result, 0);
	emit(&r->hw, 0);
	return 0;
}

/* PCI Express: kmod/source_aer.c */

SEC("raw_tp/aer_event")
int hwerr_aer(struct bpf_raw_tracepoint_args *ctx)
{
	struct room *r = begin(PLACE_AER, HWERR_SRC_AER);
	struct hwerr_info_pci *i;
	__u32 severity = (__u8)ctx->args[2];

	if (!r)
		return 0;
	classify(&r->hw, hwerr_class_aer(severity));
	r->hw.raw_severity = severity;
	i = (void *)r->hw.body;
	body(&r->hw, &i->head, HWERR_INFO_PCI, sizeof(*i));
	i->status = ctx->args[1];
	/* Four words, in every kernel's type. */
	if ((__u8)ctx->args[3] && ctx->args[4]) {
		i->flags = HWERR_PCI_TLP;
		bpf_probe_read_kernel(i->tlp, sizeof(i->tlp), (void *)ctx->args[4]);
	}
	bpf_probe_read_kernel_str(r->hw.text, sizeof(r->hw.text), (void *)ctx->args[0]);
	emit(&r->hw, 0);
	return 0;
}

/* Memory controllers: kmod/source_edac.c */

SEC("raw_tp/mc_event")
int hwerr_edac(struct bpf_raw_tracepoint_args *ctx)
{
	struct room *r = begin(PLACE_EDAC, HWERR_SRC_EDAC);
	__u32 type = ctx->args[0];
	__s32 count = ctx->args[3];
	__u64 address = ctx->args[8], grain = 0, len;
	__u8 bits = ctx->args[9];
	struct hwerr_info_edac *i;

	if (!r)
		return 0;
	if (bits < 48)
		grain = 1ULL << bits;
	classify(&r->hw, hwerr_class_edac(type));
	r->hw.raw_severity = type;
	r->hw.count = count < 1 ? 1 : count;
	i = (void *)r->hw.body;
	body(&r->hw, &i->head, HWERR_INFO_EDAC, sizeof(*i));
	i->mc = (__u8)ctx->args[4];
	i->top = (__s8)ctx->args[5];
	i->mid = (__s8)ctx->args[6];
	i->low = (__s8)ctx->args[7];
	i->syndrome = ctx->args[10];
	i->grain = grain;
	bpf_probe_read_kernel_str(i->label, sizeof(i->label), (void *)ctx->args[2]);
	ident(&r->hw, address, i->syndrome,
	      (__u64)(__u8)i->mc << 32 | (__u8)i->top << 16 | (__u8)i->mid << 8 | (__u8)i->low,
	      type);
	if (address) {
		len = grain ? grain : PAGE_SIZE;
		r->hw.phys_addr = address & ~(len - 1);
		r->hw.phys_len = len;
	} else {
		r->hw.flags |= HWERR_F_OWNERS_UNKNOWN;
	}
	bpf_probe_read_kernel_str(r->hw.text, sizeof(r->hw.text), (void *)ctx->args[1]);
	bpf_probe_read_kernel_str(r->hw.detail, sizeof(r->hw.detail), (void *)ctx->args[11]);
	hwerr_resolve(PLACE_EDAC);
	emit(&r->hw, whos(&r->hw));
	return 0;
}

/* Firmware records: kmod/source_cper.c */

static __always_inline struct hwerr_info_cper *cper_fill(struct room *r, void *section,
							 void *fru, void *fru_text)
{
	struct hwerr_info_cper *i = (void *)r->hw.body;

	body(&r->hw, &i->head, HWERR_INFO_CPER, sizeof(*i));
	if (section)
		bpf_probe_read_kernel(i->section, 16, section);
	if (fru)
		bpf_probe_read_kernel(i->fru_id, 16, fru);
	/* 20 bytes in the record, not always terminated (UEFI N.2.2). */
	if (fru_text)
		bpf_probe_read_kernel_str(i->fru_text, 21, fru_text);
	return i;
}

SEC("raw_tp/extlog_mem_event")
int hwerr_extlog(struct bpf_raw_tracepoint_args *ctx)
{
	static const __u8 platform_memory[16] = {
		0x14, 0x11, 0xbc, 0xa5, 0x64, 0x6f, 0xde, 0x4e,
		0xb8, 0x63, 0x3e, 0x83, 0xed, 0x7c, 0x83, 0xb1,
	};
	struct room *r = begin(PLACE_EXTLOG, HWERR_SRC_CPER);
	struct cper_sec_mem_err mem = {};
	__u8 severity = ctx->args[4];
	struct hwerr_info_cper *i;
	__u64 mask;

	if (!r)
		return 0;
	classify(&r->hw, hwerr_class_cper(severity, HWERR_COMP_MEMORY));
	r->hw.raw_severity = severity;
	bpf_probe_read_kernel(&mem, sizeof(mem), (void *)ctx->args[0]);
	i = cper_fill(r, (void *)platform_memory, (void *)ctx->args[2], (void *)ctx->args[3]);
	i->data_len = sizeof(mem);
	__builtin_memcpy(i->data, &mem, sizeof(mem));
	i->head.len += sizeof(mem);
	r->hw.body_len += sizeof(mem);
	ident(&r->hw, mem.physical_addr, mem.validation_bits,
	      (__u64)mem.node << 48 | (__u64)mem.card << 32 | (__u64)mem.module << 16 | mem.bank,
	      severity);
	if (mem.validation_bits & CPER_MEM_VALID_ERROR_TYPE)
		i->etype = mem.error_type;
	if (mem.validation_bits & CPER_MEM_VALID_PA) {
		/* The mask has ones where the address is exact. */
		mask = PAGE_SIZE;
		if (mem.validation_bits & CPER_MEM_VALID_PA_MASK && mem.physical_addr_mask)
			mask = mem.physical_addr_mask & -mem.physical_addr_mask;
		r->hw.phys_addr = mem.physical_addr & ~(mask - 1);
		r->hw.phys_len = mask;
	} else {
		r->hw.flags |= HWERR_F_OWNERS_UNKNOWN;
	}
	hwerr_resolve(PLACE_EXTLOG);
	emit(&r->hw, whos(&r->hw));
	return 0;
}

SEC("raw_tp/non_standard_event")
int hwerr_firmware(struct bpf_raw_tracepoint_args *ctx)
{
	struct room *r = begin(PLACE_FIRMWARE, HWERR_SRC_CPER);
	__u8 severity = ctx->args[3];
	__u64 len = (__u32)ctx->args[5];
	struct hwerr_info_cper *i;

	if (!r)
		return 0;
	i = cper_fill(r, (void *)ctx->args[0], (void *)ctx->args[1], (void *)ctx->args[2]);
	i->flags = HWERR_CPER_GHES_SEV;
	classify(&r->hw, hwerr_class_ghes(severity, hwerr_cper_component(i->section)));
	r->hw.raw_severity = severity;
	/* As much as the module takes: half of what a record has room for, in whole words. */
	if (len > ((HWERR_RECORD_MAX - sizeof(struct hwerr_record)) / 2 & ~7UL)) {
		len = (HWERR_RECORD_MAX - sizeof(struct hwerr_record)) / 2 & ~7UL;
		r->hw.flags |= HWERR_F_INFO_TRUNCATED;
	}
	bpf_probe_read_kernel(r->data, len & (HWERR_HW_DATA - 1), (void *)ctx->args[4]);
	i->data_len = len;
	r->hw.data_len = len;
	emit(&r->hw, len & (HWERR_HW_DATA - 1));
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
