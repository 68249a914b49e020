// SPDX-License-Identifier: GPL-2.0-only
/* Calls bpf_hwerr_publish() from where a test wants it. */
#include "hwerr_bpf.h"
#include "uapi.h"

extern int bpf_hwerr_publish(const void *record, __u32 record__sz) __ksym;

#define TIMES	48

/**
 * struct call - what to publish, and what came of it
 * @tgid: process that calls by getpgid()
 * @len: bytes given to the call
 * @armed: the next of the other programs shall do it
 * @calls: that were made
 * @refused: of them
 * @result: of the last, or the first that was refused
 * @record: the bytes
 */
struct call {
	__u32 tgid;
	__u32 len;
	__u32 armed;
	__u32 calls;
	__u32 refused;
	__s32 result;
	__u8 record[2 * HWERR_RECORD_MAX];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct call);
} hwerr_call SEC(".maps");

static __always_inline struct call *the_call(void)
{
	__u32 key = 0;

	return bpf_map_lookup_elem(&hwerr_call, &key);
}

static __always_inline void publish(struct call *c)
{
	__u32 len = c->len & (sizeof(c->record) - 1);
	int err = bpf_hwerr_publish(c->record, len);

	c->calls++;
	if (err) {
		c->refused++;
		c->result = err;
	}
}

SEC("fentry/__x64_sys_getpgid")
int BPF_PROG(hwerr_in_task)
{
	struct call *c = the_call();

	if (c && c->tgid == bpf_get_current_pid_tgid() >> 32)
		publish(c);
	return 0;
}

/* Interrupts off, and a run queue's lock held: what is woken here takes it. */
SEC("tp_btf/sched_switch")
int BPF_PROG(hwerr_in_switch)
{
	struct call *c = the_call();
	int i;

	if (!c || !__sync_val_compare_and_swap(&c->armed, 1, 0))
		return 0;
	for (i = 0; i < TIMES; i++)
		publish(c);
	return 0;
}

SEC("tp_btf/nmi_handler")
int BPF_PROG(hwerr_in_nmi)
{
	struct call *c = the_call();

	if (c)
		publish(c);
	return 0;
}

/* For each record that is published, another one. */
SEC("fentry/hwerr_ring_put")
int BPF_PROG(hwerr_in_itself)
{
	struct call *c = the_call();

	if (c)
		publish(c);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
