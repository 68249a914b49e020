/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The other way out, of probes that can name by themselves whom it hits: a record, handed
 * to the module (kmod/kfunc.c). It is there whatever became of the loader.
 *
 * A program takes one way or the other from the first to the last: where both meet with an
 * event in hand it is asked once more whether there is one, and 6.1's verifier
 * does not know that what the ring buffer gave is not NULL.
 *
 * The text is that which hwerr_notify/probe.py makes of the same event.
 */
#ifndef HWERR_BPF_DIRECT_H
#define HWERR_BPF_DIRECT_H

#include "emit.h"
#include "uapi.h"

extern int bpf_hwerr_publish(const void *record, __u32 record__sz) __ksym __weak;

/*
 * Whether the module offers it: set before the load, so that the verifier removes the way
 * that is not taken. bpf_ksym_exists() would say so by itself, from 6.4 on: until
 * 58aa2afbb1e6 ("bpf: Allow ld_imm64 instruction to point to kfunc.") no program may
 * ask for the address.
 */
const volatile __u32 hwerr_direct SEC(".rodata.direct") = 0;

struct hwerr_line {
	struct hwerr_info head;
	char text[256];
};

/**
 * struct hwerr_scratch - where a record is made
 * @kvm: first of all, what was seen
 * @death: likewise
 * @rec: the record, from here on
 * @guest: its first info
 * @vcpu: and further ones, of KVM_RUN's outcome
 * @vcpu_line: likewise
 * @line: of a death
 * @at: part of a text
 * @what: likewise
 * @more: likewise
 *
 * One for each CPU and object: a program does not run twice on a CPU at once, and one of
 * an object only has a use for it.
 */
struct hwerr_scratch {
	union {
		struct hwerr_probe_kvm kvm;
		struct hwerr_probe_death death;
	};
	struct hwerr_record rec;
	struct hwerr_info_guest guest;
	union {
		struct {
			struct hwerr_info_vcpu vcpu;
			struct hwerr_line vcpu_line;
		};
		struct hwerr_line line;
	};
	char at[32];
	char what[32];
	char more[64];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hwerr_scratch);
} hwerr_scratch SEC(".maps");

/* As hwerr_reserve(), for an event that is to be published: first in the scratch. */
static __always_inline void *hwerr_draft(__u32 type, __u64 size, struct task_struct *task)
{
	struct hwerr_probe_count *count = bpf_map_lookup_elem(&hwerr_counts, &type);
	__u64 now = bpf_ktime_get_ns();
	struct hwerr_scratch *s;
	__u32 key = 0;

	s = bpf_map_lookup_elem(&hwerr_scratch, &key);
	if (!s || !count || !hwerr_pass(count, now))
		return NULL;
	__builtin_memset((void *)s + size, 0, sizeof(*s) - size);
	hwerr_begin((void *)s, size, type, now, task);
	return s;
}

/* Fills the head of the record, but for its length, and names the VM. Times are the module's. */
static __always_inline void hwerr_draft_head(struct hwerr_scratch *s,
					     const struct hwerr_probe_head *head, __u8 source,
					     __u8 severity, __u32 raw_severity)
{
	s->rec.hdr_len = sizeof(s->rec);
	s->rec.version = HWERR_ABI_VERSION;
	s->rec.severity = severity;
	s->rec.source = source;
	s->rec.component = HWERR_COMP_GUEST;
	s->rec.flags = severity == HWERR_SEV_INFO ? 0 : HWERR_F_ACTION_REQUIRED;
	s->rec.cpu = head->cpu;
	s->rec.raw_severity = raw_severity;
	s->guest.head.len = sizeof(s->guest);
	s->guest.head.type = HWERR_INFO_GUEST;
	s->guest.tgid = head->tgid;
	s->guest.flags = HWERR_GUEST_KVM;
	s->guest.start_ns = head->start_ns;
	s->guest.gpa = HWERR_NO_GPA;
	__builtin_memcpy(s->guest.comm, head->comm, sizeof(s->guest.comm));
}

/* Ends the record with @line, of which @n bytes are used, NUL included; hands it over. */
static __always_inline void hwerr_publish(struct hwerr_scratch *s, struct hwerr_line *line,
					  long n, __u32 type)
{
	struct hwerr_probe_count *count = bpf_map_lookup_elem(&hwerr_counts, &type);
	__u32 len;

	if (!count)
		return;
	if (n < 2)	/* it could not be written: better without */
		n = -(long)sizeof(line->head);
	else if (n > (long)sizeof(line->text))
		n = sizeof(line->text);
	line->head.len = sizeof(line->head) + ((n + 7) & ~7);
	line->head.type = HWERR_INFO_TEXT;
	len = (void *)line - (void *)&s->rec + line->head.len;
	/* For the verifier, which does not follow the above. */
	asm volatile("" : "+r"(len));
	if (len > sizeof(*s) - __builtin_offsetof(struct hwerr_scratch, rec))
		return;
	s->rec.len = len;
	if (bpf_hwerr_publish(&s->rec, len))
		__sync_fetch_and_add(&count->dropped, 1);
	else
		__sync_fetch_and_add(&count->emitted, 1);
}

#endif
