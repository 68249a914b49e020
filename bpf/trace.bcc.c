// SPDX-License-Identifier: GPL-2.0-only
/*
 * Raw tracepoints, for hwerr-trace: the entry as the kernel filled it, with time, CPU and
 * task, and nothing else; user space reads its fields by the kernel's own description
 * (events/.../format), so a field that this file knows nothing of is shown as well.
 *
 * Compiled by bcc when hwerr-trace starts, and told everything by -D:
 *
 *	TRACE_x			attach x; its value is what user space knows it by
 *	x_FIELD			offset of a field that a filter looks at
 *	ONLY_BANK, ONLY_CPU, ONLY_PID, ONLY_SEVERITY
 *				let only this pass (severity: this and worse)
 *	ONLY_NAME_0..7	let only this device or DIMM pass: 64 bytes, filled with
 *				zeros, as eight words
 *	MCE_FACTS		HWERR_MCE_*, what is known of the CPU
 *	STACKS			stack of each
 *
 * The severity is that of classify.h, the same as the module's; what the tracepoint does
 * not carry (was it an exception, was there a fixup) it cannot take into account.
 */
#include <linux/errno.h>

/* bcc links no functions: all of the classifier has to be inlined. */
#pragma push_macro("inline")
#undef inline
#define inline __always_inline
#include "classify.h"
#pragma pop_macro("inline")

#define RAW_MAX		1024
#define NAME_WORDS	8

/* Laid out for user space: hwerr_notify/tracepoint.py. */
struct hwerr_trace_event {
	u64 time_ns;
	u32 event;
	u32 cpu;
	u32 tgid;
	u32 tid;
	s32 stack;
	u32 pad;
	char comm[16];
	u8 raw[RAW_MAX];
};

BPF_RINGBUF_OUTPUT(events, RING_PAGES);
BPF_ARRAY(lost, u64, 1);
#ifdef STACKS
BPF_STACK_TRACE(stacks, 1024);
#endif

#define FIELD(ctx, type, offset)						\
({										\
	type field_ = 0;							\
										\
	bpf_probe_read_kernel(&field_, sizeof(field_), (void *)(ctx) + (offset)); \
	field_;									\
})

static __always_inline int severe(u8 severity)
{
#ifdef ONLY_SEVERITY
	return severity >= ONLY_SEVERITY;
#else
	return 1;
#endif
}

#ifdef ONLY_NAME_0
/* @at: offset of a string's offset (__data_loc). */
static __always_inline int named(void *ctx, u32 at)
{
	u64 name[NAME_WORDS] = {};
	u32 loc = FIELD(ctx, u32, at);

	bpf_probe_read_kernel_str(name, sizeof(name), ctx + (loc & 0xffff));
	return name[0] == ONLY_NAME_0 && name[1] == ONLY_NAME_1 &&
	       name[2] == ONLY_NAME_2 && name[3] == ONLY_NAME_3 &&
	       name[4] == ONLY_NAME_4 && name[5] == ONLY_NAME_5 &&
	       name[6] == ONLY_NAME_6 && name[7] == ONLY_NAME_7;
}
#endif

static __always_inline int emit(void *ctx, u32 event)
{
	u64 id = bpf_get_current_pid_tgid();
	struct hwerr_trace_event *e;

#ifdef ONLY_PID
	if (id >> 32 != ONLY_PID)
		return 0;
#endif
#ifdef ONLY_CPU
	if (bpf_get_smp_processor_id() != ONLY_CPU)
		return 0;
#endif
	e = events.ringbuf_reserve(sizeof(*e));
	if (!e) {
		lost.atomic_increment(0);
		return 0;
	}
	e->time_ns = bpf_ktime_get_ns();
	e->event = event;
	e->cpu = bpf_get_smp_processor_id();
	e->tgid = id >> 32;
	e->tid = id;
	e->pad = 0;
#ifdef STACKS
	e->stack = stacks.get_stackid(ctx, 0);
#else
	e->stack = -1;
#endif
	bpf_get_current_comm(e->comm, sizeof(e->comm));
	/* The trace buffer is longer than this; the first word is not the entry's. */
	bpf_probe_read_kernel(e->raw, sizeof(e->raw), ctx);
	events.ringbuf_submit(e, 0);
	return 0;
}

#ifdef TRACE_MCE_RECORD
int trace_mce_record(void *ctx)
{
#ifdef ONLY_BANK
	if (FIELD(ctx, u8, MCE_RECORD_BANK) != ONLY_BANK)
		return 0;
#endif
#ifdef ONLY_SEVERITY
	struct hwerr_info_mce m = {
		.status = FIELD(ctx, u64, MCE_RECORD_STATUS),
		.addr = FIELD(ctx, u64, MCE_RECORD_ADDR),
		.misc = FIELD(ctx, u64, MCE_RECORD_MISC),
		.mcgstatus = FIELD(ctx, u64, MCE_RECORD_MCGSTATUS),
		.mcgcap = FIELD(ctx, u64, MCE_RECORD_MCGCAP),
		.ipid = FIELD(ctx, u64, MCE_RECORD_IPID),
		.cpuid = FIELD(ctx, u32, MCE_RECORD_CPUID),
		.bank = FIELD(ctx, u8, MCE_RECORD_BANK),
		.vendor = FIELD(ctx, u8, MCE_RECORD_CPUVENDOR),
		.cs = FIELD(ctx, u8, MCE_RECORD_CS),
	};

	if (!severe(hwerr_class_mce(&m, MCE_FACTS).severity))
		return 0;
#endif
	return emit(ctx, TRACE_MCE_RECORD);
}
#endif

#ifdef TRACE_AER_EVENT
int trace_aer_event(void *ctx)
{
#ifdef ONLY_NAME_0
	if (!named(ctx, AER_EVENT_DEV_NAME))
		return 0;
#endif
	if (!severe(hwerr_class_aer(FIELD(ctx, u8, AER_EVENT_SEVERITY)).severity))
		return 0;
	return emit(ctx, TRACE_AER_EVENT);
}
#endif

#ifdef TRACE_MC_EVENT
int trace_mc_event(void *ctx)
{
#ifdef ONLY_NAME_0
	if (!named(ctx, MC_EVENT_LABEL))
		return 0;
#endif
	if (!severe(hwerr_class_edac(FIELD(ctx, u32, MC_EVENT_ERROR_TYPE)).severity))
		return 0;
	return emit(ctx, TRACE_MC_EVENT);
}
#endif

#ifdef TRACE_MEMORY_FAILURE_EVENT
int trace_memory_failure_event(void *ctx)
{
	if (!severe(hwerr_class_memfail(FIELD(ctx, s32, MEMORY_FAILURE_EVENT_RESULT), 0).severity))
		return 0;
	return emit(ctx, TRACE_MEMORY_FAILURE_EVENT);
}
#endif

#ifdef TRACE_EXTLOG_MEM_EVENT
int trace_extlog_mem_event(void *ctx)
{
	if (!severe(hwerr_class_cper(FIELD(ctx, u8, EXTLOG_MEM_EVENT_SEV), 0).severity))
		return 0;
	return emit(ctx, TRACE_EXTLOG_MEM_EVENT);
}
#endif

#ifdef TRACE_NON_STANDARD_EVENT
int trace_non_standard_event(void *ctx)
{
	if (!severe(hwerr_class_ghes(FIELD(ctx, u8, NON_STANDARD_EVENT_SEV), 0).severity))
		return 0;
	return emit(ctx, TRACE_NON_STANDARD_EVENT);
}
#endif

#ifdef TRACE_ARM_EVENT
/* Old kernels' entry does not say how severe it is: shown whatever is asked for. */
int trace_arm_event(void *ctx)
{
#ifdef ARM_EVENT_SEV
	if (!severe(hwerr_class_ghes(FIELD(ctx, u8, ARM_EVENT_SEV), 0).severity))
		return 0;
#endif
	return emit(ctx, TRACE_ARM_EVENT);
}
#endif

/* A vCPU that cannot go on: what hwerr-probe takes for an error, see kvm.bpf.c. */
#ifdef TRACE_KVM_USERSPACE_EXIT
#define KVM_EXIT_UNKNOWN	0
#define KVM_EXIT_SHUTDOWN	8
#define KVM_EXIT_FAIL_ENTRY	9
#define KVM_EXIT_INTERNAL_ERROR	17
#define KVM_EXIT_MEMORY_FAULT	39

int trace_kvm_userspace_exit(void *ctx)
{
	u32 reason = FIELD(ctx, u32, KVM_USERSPACE_EXIT_REASON);
	s32 error = FIELD(ctx, s32, KVM_USERSPACE_EXIT_ERRNO);

	/* Interrupted, by a signal or another vCPU: nothing failed. */
	if (error == -EINTR || error == -EAGAIN)
		return 0;
	/* Memory that a confidential guest shares, or takes back: user space converts it. */
	if (error == -EFAULT && reason == KVM_EXIT_MEMORY_FAULT)
		return 0;
	if (!error && reason != KVM_EXIT_UNKNOWN && reason != KVM_EXIT_SHUTDOWN &&
	    reason != KVM_EXIT_FAIL_ENTRY && reason != KVM_EXIT_INTERNAL_ERROR)
		return 0;
	if (!severe(HWERR_SEV_RECOVERABLE))
		return 0;
	return emit(ctx, TRACE_KVM_USERSPACE_EXIT);
}
#endif

#ifdef TRACE_KVM_EMULATE_INSN
int trace_kvm_emulate_insn(void *ctx)
{
	if (!FIELD(ctx, u8, KVM_EMULATE_INSN_FAILED) || !severe(HWERR_SEV_RECOVERABLE))
		return 0;
	return emit(ctx, TRACE_KVM_EMULATE_INSN);
}
#endif

/* Events of these groups that this file knows nothing of. */
#ifdef TRACE_OTHER_0
int trace_other_0(void *ctx)
{
	return emit(ctx, TRACE_OTHER_0);
}
#endif

#ifdef TRACE_OTHER_1
int trace_other_1(void *ctx)
{
	return emit(ctx, TRACE_OTHER_1);
}
#endif

#ifdef TRACE_OTHER_2
int trace_other_2(void *ctx)
{
	return emit(ctx, TRACE_OTHER_2);
}
#endif

#ifdef TRACE_OTHER_3
int trace_other_3(void *ctx)
{
	return emit(ctx, TRACE_OTHER_3);
}
#endif
