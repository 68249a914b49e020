/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Kernel differences. The only file that looks at LINUX_VERSION_CODE; each
 * case names the upstream commit that made it. A section for each user.
 */
#ifndef _HWERR_COMPAT_H
#define _HWERR_COMPAT_H

#include <linux/version.h>

/*
 * owners_*.c: what the page structures look like
 */
#include <linux/hugetlb.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/sched.h>

/* 6.17, df25569d401e ("mm: rename PAGE_MAPPING_* to FOLIO_MAPPING_*") */
#ifndef PAGE_MAPPING_ANON
#define PAGE_MAPPING_ANON	FOLIO_MAPPING_ANON
#define PAGE_MAPPING_KSM	FOLIO_MAPPING_KSM
#define PAGE_MAPPING_FLAGS	FOLIO_MAPPING_FLAGS
#endif

/* First page of @folio in its mapping, in base pages. */
static inline pgoff_t hwerr_folio_pgoff(const struct folio *folio)
{
	/* 6.7, a08c7193e4f1 ("mm/filemap: remove hugetlb special casing in filemap.c") */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 7, 0)
	if (folio_test_hugetlb((struct folio *)folio))
		return READ_ONCE(folio->index) << folio_order((struct folio *)folio);
#endif
	/* Of a page that is migrated to, it is set while we look. */
	return READ_ONCE(folio->index);
}

/* Page table entries that map @page, a reference to whose @folio is held. */
static inline int hwerr_page_mapcount(struct folio *folio, struct page *page)
{
	/* 6.2, cb67f4282bf9 ("mm,thp,rmap: simplify compound page mapcount handling") */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 2, 0)
	return page_mapcount(page);
#else
	/* The head's count is the page type (6.9 on). */
	if (folio_test_hugetlb(folio))
		return folio_entire_mapcount(folio);
	/* 6.15, 749492229e3b ("mm: stop maintaining the per-page mapcount of large folios") */
#ifdef CONFIG_NO_PAGE_MAPCOUNT
	if (folio_test_large(folio))
		return folio_entire_mapcount(folio);
#endif
	return atomic_read(&page->_mapcount) + 1 +
	       (folio_test_large(folio) ? folio_entire_mapcount(folio) : 0);
#endif
}

/*
 * Page table entries that are not present and name a page all the same: it
 * migrates, or is poisoned.
 */
#if __has_include(<linux/leafops.h>)
/* 6.19, 68aa2fdbf57f ("mm: introduce leaf entry type and use to simplify leaf entry logic") */
#include <linux/leafops.h>
#define hwerr_leaf_pte(pte)	softleaf_from_pte(pte)
#define hwerr_leaf_pmd(pmd)	softleaf_from_pmd(pmd)

static inline bool hwerr_leaf_names(softleaf_t entry, unsigned long pfn)
{
	return (softleaf_is_migration(entry) || softleaf_is_hwpoison(entry)) &&
	       softleaf_to_pfn(entry) == pfn;
}
#else
#include <linux/swapops.h>
#define hwerr_leaf_pte(pte)	pte_to_swp_entry(pte)
#define hwerr_leaf_pmd(pmd)	pmd_to_swp_entry(pmd)

static inline bool hwerr_leaf_names(swp_entry_t entry, unsigned long pfn)
{
	return (is_migration_entry(entry) || is_hwpoison_entry(entry)) &&
	       swp_offset_pfn(entry) == pfn;
}
#endif

/* A file whose pages no process can map: guest_memfd. */
static inline bool hwerr_mapping_inaccessible(struct address_space *mapping)
{
	/* 6.11, 27e6a24a4cf3 ("mm, virt: merge AS_UNMOVABLE and AS_INACCESSIBLE") */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 11, 0)
	return false;
#else
	return mapping_inaccessible(mapping);
#endif
}

/* Under RCU: the task that owns @mm, or NULL. */
static inline struct task_struct *hwerr_mm_owner(struct mm_struct *mm)
{
#ifdef CONFIG_MEMCG
	return rcu_dereference(mm->owner);
#else
	return NULL;
#endif
}

/*
 * guard.c, owners_kvm.c: processes and vCPUs
 */
#include <linux/err.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/kvm_host.h>
#include <linux/magic.h>
#include <linux/pid.h>

#ifndef PID_FS_MAGIC
#define PID_FS_MAGIC		0x50494446
#endif

/*
 * The process that a pidfd stands for; a reference, or -EBADF. The functions
 * that do this are not exported; a pidfd is known by its file system, or by a
 * name that no program can give a file.
 */
static inline struct pid *hwerr_pidfd_pid(int fd)
{
	struct file *file = fget(fd);
	const struct dentry *dentry;
	struct pid *pid = NULL;

	if (!file)
		return ERR_PTR(-EBADF);
	dentry = file->f_path.dentry;
	/* 6.9, cb12fd8e0dab ("pidfd: add pidfs") */
	if (dentry->d_sb->s_magic == PID_FS_MAGIC)
		pid = file_inode(file)->i_private;
	else if (dentry->d_sb->s_magic == ANON_INODE_FS_MAGIC &&
		 dentry->d_name.len == strlen("[pidfd]") &&
		 !memcmp(dentry->d_name.name, "[pidfd]", strlen("[pidfd]")))
		pid = file->private_data;
	get_pid(pid);
	fput(file);
	return pid ?: ERR_PTR(-EBADF);
}

/* Under RCU: the thread that runs @vcpu, or NULL. */
static inline struct task_struct *hwerr_vcpu_task(struct kvm_vcpu *vcpu)
{
	/* 6.13, 3e7f43188ee2 ("KVM: Protect vCPU's "last run PID" with rwlock, not RCU") */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 13, 0)
	return pid_task(rcu_dereference(vcpu->pid), PIDTYPE_PID);
#else
	struct task_struct *task;

	if (!read_trylock(&vcpu->pid_lock))
		return NULL;
	task = pid_task(vcpu->pid, PIDTYPE_PID);
	read_unlock(&vcpu->pid_lock);
	return task;
#endif
}

/*
 * source_*.c: what the kernel's error reports look like
 */
#include <linux/cper.h>
#include <ras/ras_event.h>
#if __has_include(<trace/events/memory-failure.h>)
/* 6.19, 31807483d395 ("mm/memory-failure: remove the selection of RAS") */
#undef TRACE_INCLUDE_FILE
#include <trace/events/memory-failure.h>
#endif

/*
 * What the tracepoints give. They are attached to by name, and take any function: so the type of
 * each is compared with that of its probe, here or in the source.
 */
struct aer_header_log_regs;
struct pcie_tlp_log;

#define HWERR_AER_EVENT_IS(...)							\
	__builtin_types_compatible_p(typeof(trace_aer_event),			\
				     void (const char *, u32, u8, u8, __VA_ARGS__))

/*
 * 6.10, 0a5a46a6a61b ("PCI/AER: Generalize TLP Header Log reading"): another name of the header
 * log. 7.0, 83cba5b31e6b ("PCI/AER: Report CXL or PCIe bus type in AER trace logging"): one
 * argument more, the last.
 */
static_assert(HWERR_AER_EVENT_IS(struct aer_header_log_regs *) ||
	      HWERR_AER_EVENT_IS(struct pcie_tlp_log *) ||
	      HWERR_AER_EVENT_IS(struct pcie_tlp_log *, const char *));

/*
 * arm_event tells severity and CPU since 05954511b73e ("RAS: Report all ARM
 * processor CPER information to userspace"), which stable kernels have as well:
 * so its type is looked at, not the version.
 */
#define HWERR_ARM_EVENT_HAS_SEVERITY						\
	(!__builtin_types_compatible_p(typeof(trace_arm_event),			\
				       void (const struct cper_sec_proc_arm *)))

/* enum mf_action_page_type in words; NULL if not known. */
static inline const char *hwerr_mf_type_name(int type)
{
	/* See the list. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
#define HWERR_MF_TYPES_6_11
#endif
#define HWERR_MF_TYPE(name, words)	[name] = words,
	static const char * const names[] = {
#include "mf_types.h"
	};
#undef HWERR_MF_TYPE

	return type >= 0 && type < ARRAY_SIZE(names) ? names[type] : NULL;
}

/*
 * kfunc.c: how a function is offered to BPF programs
 */
#include <linux/btf.h>
#include <linux/btf_ids.h>

/* 6.3, 57e7c169cd6a ("bpf: Add __bpf_kfunc tag for marking kernel functions as kfuncs") */
#ifndef __bpf_kfunc
#define __bpf_kfunc		__used noinline
#endif

/* 6.9, 6f3189f38a3e ("bpf: treewide: Annotate BPF kfuncs in BTF") */
#ifndef BTF_KFUNCS_START
#define BTF_KFUNCS_START(name)	BTF_SET8_START(name)
#define BTF_KFUNCS_END(name)	BTF_SET8_END(name)
#endif

#endif /* _HWERR_COMPAT_H */
