/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the parts of hwerr.ko know of each other.
 *
 *	source_*.c --> draft (record.c) --> owners.c --> ring.c --> chardev.c
 *
 * A source fills a draft from its notifier or tracepoint and submits it.
 * hwerr_submit() resolves owners at once where the context allows (task
 * context, interrupts on), else from a work item, and pushes the record.
 */
#ifndef _HWERR_H
#define _HWERR_H

#include <linux/types.h>
#include <linux/list.h>
#include <linux/poll.h>
#include <linux/time64.h>
#include <linux/uuid.h>

#include "uapi/hwerr.h"

#define HWERR_NO_ID		0

struct pci_dev;
struct task_struct;
struct hwerr_recent;

/**
 * struct hwerr_draft - a record while it is made
 * @node: in the free list or the queue of record.c; guarded by its lock
 * @ident: what makes two corrected errors "the same"; 0: never coalesced
 * @phys_addr: range to find the owners of, if @phys_len is not zero
 * @phys_len: bytes
 * @pdev: device to find the holders of; a reference, put with the draft
 * @no_link: do not look for an earlier record of the same memory
 * @recent: entry that counts its repetitions; record.c's
 * @rec: the record; infos follow in @buf
 * @buf: room of the record
 *
 * A draft belongs to one context at a time; nothing in it needs a lock.
 */
struct hwerr_draft {
	struct list_head node;
	u64 ident;
	u64 phys_addr;
	u64 phys_len;
	struct pci_dev *pdev;
	bool no_link;
	struct hwerr_recent *recent;
	union {
		struct hwerr_record rec;
		u8 buf[HWERR_RECORD_MAX];
	} __aligned(8);
};

/* record.c: any context but NMI */

/* An empty draft stamped with time and CPU, or NULL, which is counted as a loss. */
struct hwerr_draft *hwerr_draft_get(u8 source, u8 severity);
/* Gives up a draft that shall not be submitted. */
void hwerr_draft_put(struct hwerr_draft *d);
/*
 * Appends a zeroed info of @len bytes (rounded up to eight, head included) and
 * returns it with its head filled; NULL and HWERR_F_INFO_TRUNCATED if it does
 * not fit. Never called for a second info of a kind that may occur once.
 */
void *hwerr_draft_info(struct hwerr_draft *d, u16 type, size_t len);
/* Appends a TEXT info, cut at what fits; a NULL or empty @fmt result adds none. */
__printf(2, 3) void hwerr_draft_text(struct hwerr_draft *d, const char *fmt, ...);
/* Likewise "a: b", or that of both which is not empty or NULL. */
void hwerr_draft_line(struct hwerr_draft *d, const char *a, const char *b);
/* What makes a corrected error the same as another of its source; others have none. */
void hwerr_draft_ident(struct hwerr_draft *draft, u64 a, u64 b, u64 c, u64 d);
/* Finds the first info of @type, or NULL. */
void *hwerr_record_find(struct hwerr_record *rec, u16 type);
/* Appends a MEMORY info, and has the owners of the range looked up. */
struct hwerr_info_memory *hwerr_draft_memory(struct hwerr_draft *d, u64 addr, u64 len);
/* Consumes @d: owners, link, coalesce, push, wake. */
void hwerr_submit(struct hwerr_draft *d);

int hwerr_record_init(void);
void hwerr_record_exit(void);
/* Waits until every draft submitted so far is in its ring. */
void hwerr_record_flush(void);

/*
 * owners.c: task context, may be with preemption off if not @may_sleep. (A kernel that
 * does not count preemption never knows that it may.) Appends GUEST and TASK infos to @d
 * for every process that maps part of @d->phys_addr, and for holders of @d->pdev; sets
 * HWERR_F_OWNERS_UNKNOWN and HWERR_F_OWNERS_TRUNCATED; fills resolve_ns.
 */
void hwerr_owners_resolve(struct hwerr_draft *d, bool may_sleep);
/*
 * Stops the KVM guests of @task's process; process context. 0, -ENXIO: there are
 * none, -ESRCH, -EBUSY: not all of its files were seen.
 */
int hwerr_owners_stop(struct task_struct *task, struct hwerr_info_stop *stop);
/*
 * owners_rmap.c: bytes of what leaves its owners with page @pfn, a power of two, and it
 * begins at a multiple of it: a page, or all of the hugetlb page that it is part of; any
 * context but NMI.
 */
u64 hwerr_huge_size(unsigned long pfn);
int hwerr_owners_init(void);
void hwerr_owners_exit(void);

/* chardev.c */
int hwerr_chardev_init(void);
void hwerr_chardev_exit(void);
/* Checks records of a program: 0 or -EINVAL. Pure; any context. */
int hwerr_record_check(const void *buf, size_t len);

/*
 * Sources. Each init returns 0 or the reason why the source is absent, which
 * does not keep the module from loading; exit is called for those that
 * returned 0, and waits until no callback runs.
 */
struct hwerr_source_ops {
	const char *name;
	u64 sources;		/* bits of enum hwerr_source it feeds */
	int (*init)(void);
	void (*exit)(void);
	/* Reports what the kernel still holds from before; task context, may sleep. */
	void (*earlier)(void);
};

extern const struct hwerr_source_ops hwerr_source_mce;
extern const struct hwerr_source_ops hwerr_source_aer;
extern const struct hwerr_source_ops hwerr_source_edac;
extern const struct hwerr_source_ops hwerr_source_memfail;
extern const struct hwerr_source_ops hwerr_source_cper;

/**
 * struct hwerr_lastboot - where a record of an earlier boot was kept
 * @store: in a word
 * @id: its number there, 0 if it has none
 * @time: seconds since the epoch, 0 if not known
 * @simulated: an injected error
 */
struct hwerr_lastboot {
	const char *store;
	u64 id;
	time64_t time;
	bool simulated;
};

/* lastboot.c: publishes what the platform kept; task context, sleeps. */
void hwerr_lastboot_report(void);
/* Makes @d, complete but for the text, an event of an earlier boot, @time its time. */
void hwerr_lastboot_mark(struct hwerr_draft *d, const struct hwerr_lastboot *from, time64_t time);
/* Publish a struct mce, and another section, of such a record. */
void hwerr_mce_lastboot(const struct hwerr_lastboot *from, const void *data, u32 len);
void hwerr_cper_lastboot(const struct hwerr_lastboot *from, const guid_t *section,
			 const guid_t *fru, const char *fru_text, const void *data, u32 len,
			 u32 severity);

/* True once the module goes: long walks in earlier() end. */
bool hwerr_exiting(void);
/* Bits of the sources attached now. */
u64 hwerr_sources_attached(void);

/*
 * tracepoint.c: a tracepoint by name, exported or not. @probe gets (void *data,
 * TP_PROTO...). Several sources share one lookup.
 */
struct tracepoint;

struct hwerr_tp {
	const char *name;
	void *probe;
	struct tracepoint *tp;	/* NULL while not attached */
};

int hwerr_tp_attach(struct hwerr_tp *t);	/* -ENOENT: this kernel has none */
void hwerr_tp_detach(struct hwerr_tp *t);

#endif /* _HWERR_H */
