/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _HWERR_RING_H
#define _HWERR_RING_H

#include <linux/mutex.h>
#include <linux/rcupdate.h>
#include <linux/refcount.h>
#include <linux/wait.h>

#include "uapi/hwerr.h"

/* Records by class; which ring a class lives in follows from the severity. */
struct hwerr_matrix {
	u64 n[HWERR_SEV_COUNT][HWERR_SRC_COUNT];
};

/**
 * struct hwerr_audience - who wants the records that hit one process
 * @node: in the hash of ring.c
 * @tgid: process
 * @start_ns: and its start, 0 for any process of that number
 * @evicted: records that hit it and were evicted since this was made
 * @users: readers
 * @waitq: where those of HWERR_SCOPE_SELF wait: what does not concern them, wakes none of them
 * @rcu: a waker may still look at one that nobody uses
 *
 * All guarded by the ring lock, but for @waitq. It lets a reader that filters by process
 * know its loss exactly without any work per reader when a record is evicted. A reader of
 * HWERR_SCOPE_SELF has the same one as long as it is open.
 */
struct hwerr_audience {
	struct hlist_node node;
	s32 tgid;
	u64 start_ns;
	struct hwerr_matrix evicted;
	unsigned int users;
	wait_queue_head_t waitq;
	struct rcu_head rcu;
};

/**
 * struct hwerr_reader - one open file
 * @lock: taken before the ring lock
 * @pos: cursor in each ring
 * @taken: behind the last record read, or where it was set to
 * @passed: records that this reader wants, by class, that lie behind its
 *	cursor, counted from the same zero as the @evicted it is held against
 * @count: the next @passed, while it is counted
 * @dropped: of the ring's @dropped, what this reader has accounted for
 * @pending: lost, not yet told
 * @lost: lost, ever
 * @read: given, ever
 * @turns: changes of the filter and the cursor by ioctl; read without the lock
 *	by a read() that waits
 * @waitq: who waits for that; for records they wait on
 *	hwerr_reader_waitq()
 * @filter: what it wants
 * @scope: HWERR_SCOPE_*; constant
 * @pid: opener's process; a reference; constant
 * @tgid: its number; constant
 * @start_ns: its start; constant
 * @guards: guards that end with this file; under the lock of guard.c
 * @audience: if @filter.tgid or @scope narrow it to a process
 * @bounce: the record on its way to user space
 */
struct hwerr_reader {
	struct mutex lock;		/* guards all below */
	u64 pos[2];
	u64 taken[2];
	struct hwerr_matrix passed;
	struct hwerr_matrix count;
	struct hwerr_matrix dropped;
	u64 pending;
	u64 lost;
	u64 read;
	u32 turns;
	wait_queue_head_t waitq;
	struct hwerr_ioc_filter filter;
	u32 scope;
	struct pid *pid;
	s32 tgid;
	u64 start_ns;
	unsigned int guards;
	struct hwerr_audience *audience;
	u8 bounce[HWERR_RECORD_MAX] __aligned(8);
};

/**
 * struct hwerr_peek - a record found, not yet taken
 * @ring: where
 * @next: cursor behind it
 * @severity: its class
 * @source: its class
 * @len: bytes in the ring; what a scoped reader gets is shorter
 */
struct hwerr_peek {
	int ring;
	u64 next;
	u8 severity;
	u8 source;
	u32 len;
};

/* Where to wait for records; the same as long as the file is open. */
wait_queue_head_t *hwerr_reader_waitq(struct hwerr_reader *r);

/*
 * Records and infos are whole words, mostly too few for string instructions to
 * pay; volatile, or the compiler makes it a memcpy() again.
 */
static inline void hwerr_copy(void *to, const void *from, u32 len)
{
	const u64 *end = from + len;
	const u64 *f = from;
	u64 *t = to;

	while (f < end)
		WRITE_ONCE(*t++, *f++);
}

static inline void hwerr_clear(void *to, u32 len)
{
	const u64 *end = to + len;
	u64 *t = to;

	while (t < end)
		WRITE_ONCE(*t++, 0);
}

int hwerr_ring_init(unsigned int bytes);
void hwerr_ring_exit(void);

/*
 * Any context but NMI. Sets @rec->seq, and @rec->id if 0. Readers are woken by
 * hwerr_ring_wake(), which no raw lock may be held for.
 */
void hwerr_ring_put(struct hwerr_record *rec, bool count_errors);
void hwerr_ring_wake(const struct hwerr_record *rec);
/* An error of this class that no record could be made of. */
void hwerr_ring_drop(u8 severity, u8 source);
/* @n more errors went into another record's count; @counted: another source's. */
void hwerr_ring_coalesced(u8 severity, u8 source, u32 n, bool counted);
/* @n errors that were counted are another source's. */
void hwerr_ring_uncount(u8 severity, u8 source, u32 n);
/* An error counted as @from turned out worse. */
void hwerr_ring_regrade(u8 from, u8 to);

/* Grows with every push: what a reader compares to know that it should look. */
u64 hwerr_ring_version(void);

/* Process context, @r->lock held. */
void hwerr_reader_start(struct hwerr_reader *r, u32 whence, u64 seq);
bool hwerr_reader_peek(struct hwerr_reader *r, struct hwerr_peek *p, bool copy);
void hwerr_reader_take(struct hwerr_reader *r, const struct hwerr_peek *p);
int hwerr_reader_filter(struct hwerr_reader *r, const struct hwerr_ioc_filter *f);
void hwerr_reader_stats(struct hwerr_reader *r, struct hwerr_ioc_stats *s);
void hwerr_reader_info(struct hwerr_reader *r, struct hwerr_ioc_info *i);

struct hwerr_reader *hwerr_reader_new(u32 scope);
void hwerr_reader_free(struct hwerr_reader *r);

#endif /* _HWERR_RING_H */
