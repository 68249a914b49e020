/* SPDX-License-Identifier: GPL-2.0-only */
/* The way out of a probe: one ring buffer, and counters of what it had no room for. */
#ifndef HWERR_BPF_EMIT_H
#define HWERR_BPF_EMIT_H

#include "hwerr_bpf.h"
#include "probe.h"

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 * 1024);
} hwerr_events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, HWERR_PROBE_COUNT);
	__type(key, __u32);
	__type(value, struct hwerr_probe_count);
} hwerr_counts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, HWERR_PROBE_COUNT);
	__type(key, __u32);
	__type(value, struct hwerr_probe_told);
} hwerr_told SEC(".maps");

/*
 * Whether one more of this type may pass; counted as lost, if not. Two CPUs that begin a
 * second together may let a few more through: a limit, no promise.
 */
static __always_inline bool hwerr_pass(struct hwerr_probe_count *count, __u64 now)
{
	if (count->second != now / 1000000000) {
		count->second = now / 1000000000;
		count->recent = 0;
	}
	if (__sync_fetch_and_add(&count->recent, 1) < HWERR_PROBE_RATE)
		return true;
	__sync_fetch_and_add(&count->dropped, 1);
	return false;
}

/* Counts one as lost. */
static __always_inline void hwerr_lose(__u32 type)
{
	struct hwerr_probe_count *count = bpf_map_lookup_elem(&hwerr_counts, &type);

	if (count)
		__sync_fetch_and_add(&count->dropped, 1);
}

/* Zeroes an event of @size bytes and fills its head. */
static __always_inline void hwerr_begin(struct hwerr_probe_head *head, __u64 size, __u32 type,
					__u64 now, struct task_struct *task)
{
	__builtin_memset(head, 0, size);
	head->time_ns = now;
	head->type = type;
	head->cpu = bpf_get_smp_processor_id();
	if (task) {
		head->tgid = task->tgid;
		head->tid = task->pid;
		head->start_ns = task->group_leader->start_boottime;
		BPF_CORE_READ_STR_INTO(&head->comm, task, group_leader, comm);
	}
}

/* Room for an event, zeroed but for its head. NULL, and counted, if there is none. */
static __always_inline void *hwerr_reserve(__u32 type, __u64 size, struct task_struct *task)
{
	struct hwerr_probe_count *count = bpf_map_lookup_elem(&hwerr_counts, &type);
	struct hwerr_probe_head *head;
	__u64 now = bpf_ktime_get_ns();

	if (!count || !hwerr_pass(count, now))
		return NULL;
	head = bpf_ringbuf_reserve(&hwerr_events, size, 0);
	if (!head) {
		__sync_fetch_and_add(&count->dropped, 1);
		return NULL;
	}
	__sync_fetch_and_add(&count->emitted, 1);
	hwerr_begin(head, size, type, now, task);
	return head;
}

#define HWERR_EMIT(event) bpf_ringbuf_submit(event, 0)

#endif
