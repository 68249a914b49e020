/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the parts of the owner lookup know of each other.
 *
 *	owners.c        range -> pages, owners -> infos
 *	owners_rmap.c   page -> (mm, address), verified in the page tables
 *	owners_ksm.c    the same for pages merged by KSM
 *	owners_files.c  process -> open files
 *	owners_kvm.c    (mm, address) -> guest-physical address
 *	owners_vfio.c   PCI device -> process
 */
#ifndef _HWERR_OWNERS_H
#define _HWERR_OWNERS_H

#include <linux/mm_types.h>
#include <linux/types.h>

struct file;
struct folio;
struct pci_dev;
struct task_struct;
struct hwerr_draft;

/* Mappings of one range that are told apart; the rest is OWNERS_TRUNCATED. */
#define HWERR_OWNERS_MAX	24
/* Mappings looked at for one range: the bound of the walk. */
#define HWERR_OWNERS_VISITS	8192
/* Guest-physical places of one mapping. */
#define HWERR_VM_HITS		8
/* VMs of one process that are waited for when it is stopped. */
#define HWERR_VM_STOPS		4
/* Threads of a process whose files are looked at if they have their own. */
#define HWERR_OWNERS_THREADS	16

enum hwerr_owner_kind {
	HWERR_OWNER_GONE,	/* its address space is being torn down */
	HWERR_OWNER_KVM,
	HWERR_OWNER_QEMU,	/* an emulator without KVM */
	HWERR_OWNER_TASK,
};

/**
 * struct hwerr_owner - a stretch of the range in one address space
 * @mm: the address space; a reference (mmgrab)
 * @va: where it is mapped
 * @len: bytes
 * @next: the page that would continue it
 * @vm: it may be a guest's: MMU notifiers, as KVM has, or QEMU's program
 * @kind: enum hwerr_owner_kind
 * @stopped: its VMs were stopped for this error
 * @stop_flags: and HWERR_GUEST_STOPPED if so
 * @attempt: when it was last found, see struct hwerr_owners
 */
struct hwerr_owner {
	struct mm_struct *mm;
	unsigned long va;
	unsigned long len;
	unsigned long next;
	u32 attempt;
	bool vm;
	bool stopped;
	u8 kind;
	u32 stop_flags;
};

/**
 * struct hwerr_owners - state of one lookup; on the stack of its only user
 * @d: the draft to extend
 * @may_sleep: the caller could be preempted
 * @waits: times that may still be waited for a lock
 * @visits: mappings that may still be looked at
 * @files_ns: time spent on open files
 * @attempt: number of the walk over the current page
 * @flags: HWERR_F_OWNERS_*, for the record
 * @nr: entries of @at in use
 * @at: what was found
 */
struct hwerr_owners {
	struct hwerr_draft *d;
	bool may_sleep;
	unsigned int waits;
	unsigned int visits;
	u64 files_ns;
	u32 attempt;
	u32 flags;
	unsigned int nr;
	struct hwerr_owner at[HWERR_OWNERS_MAX];
};

/**
 * struct hwerr_piece - bytes of one page, or of one hugetlb page
 * @pfn: the (base) page of the first
 * @off: first byte in it
 * @len: bytes
 */
struct hwerr_piece {
	unsigned long pfn;
	unsigned int off;
	unsigned int len;
};

/* owners.c */

/*
 * Adds a mapping of @p at page address @va; the caller keeps @mm from being
 * freed. False if this walk had found it before.
 */
bool hwerr_owners_add(struct hwerr_owners *o, struct mm_struct *mm,
		      unsigned long va, const struct hwerr_piece *p);
/* Waits a little if that is allowed; false when the lookup has waited enough. */
bool hwerr_owners_wait(struct hwerr_owners *o);

/* owners_rmap.c */

/*
 * Adds all owners of @p. 0; -EBUSY: a lock was taken or the page is in
 * motion, try again, and what is not found then is unknown; -EAGAIN: looks
 * free, but try again.
 */
int hwerr_rmap_page(struct hwerr_owners *o, const struct hwerr_piece *p);

enum hwerr_pt {
	HWERR_PT_OTHER,		/* not this page */
	HWERR_PT_PRESENT,	/* mapped */
	HWERR_PT_ENTRY,		/* a migration or hwpoison entry that names it */
};

/*
 * What the page tables of @vma have for page address @va. The caller holds a
 * lock under which @vma is reached from its reverse map.
 */
enum hwerr_pt hwerr_pt_lookup(struct vm_area_struct *vma, unsigned long va,
			      unsigned long pfn);

/*
 * owners_ksm.c: as hwerr_rmap_page(); counts present entries in @present.
 * -EINVAL: this kernel's KSM is not the one we know.
 */
int hwerr_ksm_page(struct hwerr_owners *o, struct folio *folio,
		   const struct hwerr_piece *p, int *present);

/* owners_files.c */

/*
 * Calls @fn for every open file of @task, and of its threads that have files
 * of their own, until it returns true. @fn runs under files->file_lock: the
 * file stays open. Returns 1 if @fn returned true, 0, or -EBUSY if not all
 * files could be looked at.
 */
int hwerr_files_each(struct hwerr_owners *o, struct task_struct *task,
		     bool (*fn)(struct file *file, void *arg), void *arg);

/* owners_kvm.c */

/**
 * struct hwerr_vm_hit - where an address lies in a guest
 * @vm_id: of the guest
 * @hva: first byte in the process
 * @gpa: first byte in the guest
 * @len: bytes
 * @slot: as in struct hwerr_info_guest
 */
struct hwerr_vm_hit {
	u64 vm_id;
	u64 hva;
	u64 gpa;
	u64 len;
	u32 slot;
};

/**
 * struct hwerr_vm_search - what to look for in a process, and what was found
 * @mm: the address space
 * @va: in it
 * @len: bytes; 0: only whether there is a guest
 * @stop: tell its vCPUs to leave the guest
 * @nr_stops: out: entries of @stops; each file a reference
 * @vcpus: out: how many were told
 * @unwaited: out: of them, those of VMs beyond @stops, which are not waited for
 * @stops: out: VMs that were told
 * @vm_id: out: a guest of @mm, 0 if there is none
 * @nr: out: entries of @hit
 * @more: out: there were more
 * @hit: out
 */
struct hwerr_vm_search {
	struct mm_struct *mm;
	unsigned long va;
	unsigned long len;
	bool stop;
	unsigned int nr_stops;
	unsigned int vcpus;
	unsigned int unwaited;
	struct file *stops[HWERR_VM_STOPS];
	u64 vm_id;
	unsigned int nr;
	bool more;
	struct hwerr_vm_hit hit[HWERR_VM_HITS];
};

/* 0, or -EBUSY if some file of @task was not seen. */
int hwerr_kvm_search(struct hwerr_owners *o, struct task_struct *task,
		     struct hwerr_vm_search *s);
/* Puts @s->stops. The vCPUs of them that were not seen out of the guest. */
unsigned int hwerr_kvm_stopped(struct hwerr_vm_search *s);
void hwerr_kvm_init(void);

/* owners_vfio.c: calls @found for every process that has @pdev open. */
void hwerr_vfio_holders(struct hwerr_owners *o, struct pci_dev *pdev,
			void (*found)(struct hwerr_owners *o,
				      struct task_struct *task));

#endif /* _HWERR_OWNERS_H */
