// SPDX-License-Identifier: GPL-2.0-only
/*
 * From a page to every address space that maps it.
 *
 * The reverse map gives candidates: after fork, mremap, COW or a collapse an
 * anon_vma also leads to areas that do not have the page, and an address_space
 * to areas that never touched it, or have a private copy. So each candidate is
 * looked up in the page tables, and only what is there is named. In the other
 * direction the page's own mapcount says how many there must be; if fewer were
 * found, something moved underneath, and the page is looked at again.
 *
 * What keeps things alive while they are looked at:
 *
 * folio	a reference (folio_try_get).
 *
 * anon_vma	as in folio_lock_anon_vma_read() of mm/rmap.c: while the folio
 *		is mapped its anon_vma is not freed, and the slab is
 *		SLAB_TYPESAFE_BY_RCU, so that a trylock of root->rwsem between
 *		two folio_mapped() under RCU touches a live rwsem, or that of
 *		another anon_vma, which is harmless. If the folio is mapped
 *		after the lock was taken, the lock pins the anon_vma: see
 *		anon_vma_free(). Without folio_mapped() nothing protects the
 *		pointer, and it is not followed.
 *
 * mapping	an inode is freed after an RCU grace period, and a folio
 *		that is still in the mapping after rcu_read_lock() proves
 *		that the inode's had not begun: the argument of
 *		get_futex_key(). RCU is held until i_mmap_rwsem is released.
 *		The folio lock is not needed, which matters because the context
 *		that was interrupted may hold it.
 *
 * vma, mm	unlink_anon_vmas() and unlink_file_vma() take the lock we hold
 *		for writing before a vma is freed, and the mm outlives its
 *		vmas. vm_start, vm_end and vm_pgoff change under the same lock.
 *		So mm_count is not zero, and mmgrab() is allowed; mm_users may
 *		be. The vma may be that of a child that fork() has yet to
 *		finish, or to give up: see mm_task() in owners.c.
 *
 * page tables	free_pgtables() unlinks the vma before it frees tables below it,
 *		hugetlb PMD unsharing takes i_mmap_rwsem for writing, and
 *		whoever frees a table of a living vma (khugepaged,
 *		madvise) makes it wait for walkers that have interrupts off:
 *		see "Fast GUP" in mm/gup.c, tlb_remove_table_sync_one() in
 *		mm/mmu_gather.c, and pte_free_defer(), whose grace period
 *		interrupts that are off hold up as well. So tables are read as
 *		gup_fast reads them. An entry that is moved meanwhile (mremap())
 *		is found at the old address or missed, and if it is missed the
 *		page's mapcount tells.
 */
#include <linux/hugetlb.h>
#include <linux/interval_tree_generic.h>
#include <linux/ksm.h>
#include <linux/memory_hotplug.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/pagemap.h>
#include <linux/pgtable.h>
#include <linux/rmap.h>
#include <linux/swapops.h>
#include <linux/uaccess.h>

#include "compat.h"
#include "hwerr.h"
#include "owners.h"

static inline unsigned long vma_first_pgoff(struct vm_area_struct *vma)
{
	return vma->vm_pgoff;
}

static inline unsigned long vma_end_pgoff(struct vm_area_struct *vma)
{
	return vma->vm_pgoff + vma_pages(vma) - 1;
}

static inline unsigned long avc_first_pgoff(struct anon_vma_chain *avc)
{
	return vma_first_pgoff(avc->vma);
}

static inline unsigned long avc_end_pgoff(struct anon_vma_chain *avc)
{
	return vma_end_pgoff(avc->vma);
}

/* The kernel's instances of these (mm/interval_tree.c) are not exported. */
INTERVAL_TREE_DEFINE(struct vm_area_struct, shared.rb, unsigned long,
		     shared.rb_subtree_last, vma_first_pgoff, vma_end_pgoff,
		     static __maybe_unused, file_tree)
INTERVAL_TREE_DEFINE(struct anon_vma_chain, rb, unsigned long, rb_subtree_last,
		     avc_first_pgoff, avc_end_pgoff,
		     static __maybe_unused, anon_tree)

/* A huge page's entry at some level, present or not; @head: pfn it must name. */
static enum hwerr_pt huge_entry(pte_t pte, unsigned long head)
{
	if (pte_none(pte))
		return HWERR_PT_OTHER;
	if (pte_present(pte))
		return pte_pfn(pte) == head ? HWERR_PT_PRESENT : HWERR_PT_OTHER;
	return hwerr_leaf_names(hwerr_leaf_pte(pte), head) ? HWERR_PT_ENTRY : HWERR_PT_OTHER;
}

static enum hwerr_pt pt_walk(struct vm_area_struct *vma, unsigned long va,
			     unsigned long pfn)
{
	bool hugetlb = data_race(is_vm_hugetlb_page(vma));	/* never changes */
	pgd_t *pgdp = pgd_offset(vma->vm_mm, va);
	p4d_t *p4dp, p4d;
	pud_t *pudp, pud;
	pmd_t *pmdp, pmd;
	pte_t pte;

	if (pgd_none(READ_ONCE(*pgdp)))
		return HWERR_PT_OTHER;
	/* Folded into the pgd with four levels. */
	p4dp = p4d_offset(pgdp, va);
	p4d = READ_ONCE(*p4dp);
	if (!p4d_present(p4d))
		return HWERR_PT_OTHER;

	pudp = pud_offset(&p4d, va);
	pud = READ_ONCE(*pudp);
	if (pud_none(pud))
		return HWERR_PT_OTHER;
	if (hugetlb && huge_page_size(hstate_vma(vma)) == PUD_SIZE)
		return huge_entry(__pte(pud_val(pud)),
				  pfn & ~((PUD_SIZE >> PAGE_SHIFT) - 1));
	if (!pud_present(pud))
		return HWERR_PT_OTHER;
	if (pud_leaf(pud))
		return pud_pfn(pud) + ((va & ~PUD_MASK) >> PAGE_SHIFT) == pfn ?
		       HWERR_PT_PRESENT : HWERR_PT_OTHER;

	pmdp = pmd_offset(&pud, va);
	pmd = READ_ONCE(*pmdp);
	if (pmd_none(pmd))
		return HWERR_PT_OTHER;
	if (hugetlb)
		return huge_entry(__pte(pmd_val(pmd)),
				  pfn & ~((PMD_SIZE >> PAGE_SHIFT) - 1));
	if (!pmd_present(pmd))
		return hwerr_leaf_names(hwerr_leaf_pmd(pmd),
					pfn & ~((PMD_SIZE >> PAGE_SHIFT) - 1)) ?
		       HWERR_PT_ENTRY : HWERR_PT_OTHER;
	if (pmd_leaf(pmd))
		return pmd_pfn(pmd) + ((va & ~PMD_MASK) >> PAGE_SHIFT) == pfn ?
		       HWERR_PT_PRESENT : HWERR_PT_OTHER;
	if (pmd_bad(pmd))
		return HWERR_PT_OTHER;

	pte = READ_ONCE(*pte_offset_kernel(&pmd, va));
	return huge_entry(pte, pfn);
}

enum hwerr_pt hwerr_pt_lookup(struct vm_area_struct *vma, unsigned long va,
			      unsigned long pfn)
{
	unsigned long flags;
	enum hwerr_pt pt;

	local_irq_save(flags);
	pt = pt_walk(vma, va, pfn);
	local_irq_restore(flags);
	return pt;
}

/**
 * struct rmap_walk - one page on its way through the reverse map
 * @o: the lookup
 * @p: the bytes
 * @pgoff: the page's place in the mapping, in base pages
 * @present: present entries found
 */
struct rmap_walk {
	struct hwerr_owners *o;
	const struct hwerr_piece *p;
	unsigned long pgoff;
	int present;
};

/* False when the walk has looked at as much as it may. */
static bool visit(struct rmap_walk *w, struct vm_area_struct *vma)
{
	unsigned long va;
	enum hwerr_pt pt;

	if (!w->o->visits) {
		w->o->flags |= HWERR_F_OWNERS_TRUNCATED;
		return false;
	}
	w->o->visits--;

	va = vma->vm_start + ((w->pgoff - vma->vm_pgoff) << PAGE_SHIFT);
	if (va < vma->vm_start || va >= vma->vm_end)
		return true;
	pt = hwerr_pt_lookup(vma, va, w->p->pfn);
	if (pt == HWERR_PT_OTHER)
		return true;
	if (pt == HWERR_PT_PRESENT)
		w->present++;
	hwerr_owners_add(w->o, vma->vm_mm, va, w->p);
	return true;
}

static int walk_anon(struct rmap_walk *w, struct folio *folio,
		     unsigned long mapping)
{
	struct anon_vma *anon_vma = (void *)(mapping - PAGE_MAPPING_ANON);
	struct anon_vma *root;
	struct anon_vma_chain *avc;
	int ret = -EBUSY;

	rcu_read_lock();
	if ((unsigned long)READ_ONCE(folio->mapping) != mapping ||
	    !folio_mapped(folio))
		goto out;
	root = READ_ONCE(anon_vma->root);
	if (!down_read_trylock(&root->rwsem))
		goto out;
	/* folio_move_anon_rmap() may have given it to a child's anon_vma. */
	if (folio_mapped(folio) &&
	    (unsigned long)READ_ONCE(folio->mapping) == mapping) {
		ret = 0;
		for (avc = anon_tree_iter_first(&anon_vma->rb_root, w->pgoff, w->pgoff);
		     avc && visit(w, avc->vma);
		     avc = anon_tree_iter_next(avc, w->pgoff, w->pgoff))
			;
	}
	up_read(&root->rwsem);
out:
	rcu_read_unlock();
	return ret;
}

static int walk_file(struct rmap_walk *w, struct folio *folio,
		     struct address_space *mapping)
{
	struct vm_area_struct *vma;
	struct inode *host;
	int ret = -EBUSY;

	rcu_read_lock();
	if (READ_ONCE(folio->mapping) != mapping)
		goto out;
	/* Only an inode's own mapping can be mapped by a process. */
	if (copy_from_kernel_nofault(&host, &mapping->host, sizeof(host)) ||
	    !host || &host->i_data != mapping) {
		ret = 0;
		goto out;
	}
	/*
	 * Page cache that nobody maps is done here; but what is in motion, and
	 * what memory_failure() took out, has left entries to be found.
	 */
	if (!folio_mapped(folio) && !folio_test_locked(folio) &&
	    !folio_test_hugetlb(folio) && !PageHWPoison(&folio->page)) {
		if (hwerr_mapping_inaccessible(mapping))
			w->o->flags |= HWERR_F_OWNERS_UNKNOWN;	/* guest_memfd */
		/* Unlocked because a migration gave up and mapped it again? */
		ret = folio_mapped(folio) ? -EBUSY : 0;
		goto out;
	}
	if (!i_mmap_trylock_read(mapping))
		goto out;
	if (READ_ONCE(folio->mapping) == mapping) {
		ret = 0;
		for (vma = file_tree_iter_first(&mapping->i_mmap, w->pgoff, w->pgoff);
		     vma && visit(w, vma);
		     vma = file_tree_iter_next(vma, w->pgoff, w->pgoff))
			;
	}
	i_mmap_unlock_read(mapping);
out:
	rcu_read_unlock();
	return ret;
}

/*
 * An anonymous page that no page table maps. It has no owner if its last one
 * just left it; else there is one, which cannot be found from the page.
 */
static int anon_unmapped(struct hwerr_owners *o, struct folio *folio,
			 struct page *page)
{
	if (PageHWPoison(page) || PageHWPoison(&folio->page)) {
		o->flags |= HWERR_F_OWNERS_UNKNOWN;	/* unmapped by memory_failure() */
		return 0;
	}
	/* On its way elsewhere, or back: what unlocks it has mapped it again before. */
	if (folio_test_locked(folio) || folio_mapped(folio))
		return -EBUSY;
	if (folio_test_swapcache(folio) || folio_maybe_dma_pinned(folio))
		o->flags |= HWERR_F_OWNERS_UNKNOWN;
	return 0;
}

static int rmap_folio(struct hwerr_owners *o, struct folio *folio,
		      struct page *page, const struct hwerr_piece *p)
{
	unsigned long mapping;
	struct rmap_walk w = { .o = o, .p = p };
	int expected, ret;

	/* Other uses of struct page have something else where the mapping is. */
	if (folio_test_slab(folio) || folio_test_reserved(folio) ||
	    (page_has_type(&folio->page) && !folio_test_hugetlb(folio)))
		return 0;

	expected = hwerr_page_mapcount(folio, page);
	mapping = (unsigned long)READ_ONCE(folio->mapping);
	if (!mapping) {
		/* Inserted by a driver: mapped, with no way back. */
		if (expected > 0)
			o->flags |= HWERR_F_OWNERS_UNKNOWN;
		return 0;
	}
	w.pgoff = hwerr_folio_pgoff(folio) + folio_page_idx(folio, page);

	switch (mapping & PAGE_MAPPING_FLAGS) {
	case PAGE_MAPPING_ANON:
		if (!folio_mapped(folio))
			return anon_unmapped(o, folio, page);
		ret = walk_anon(&w, folio, mapping);
		break;
	case PAGE_MAPPING_KSM:
		if (!folio_mapped(folio))
			return anon_unmapped(o, folio, page);
		ret = hwerr_ksm_page(o, folio, p, &w.present);
		if (ret == -EINVAL) {
			o->flags |= HWERR_F_OWNERS_UNKNOWN;
			return 0;
		}
		break;
	case 0:
		ret = walk_file(&w, folio, (void *)mapping);
		break;
	default:
		return 0;	/* a driver's movable page */
	}
	if (ret)
		return ret;

	/* In the swap cache for somebody who has swapped it out, perhaps. */
	if (mapping & PAGE_MAPPING_ANON && folio_test_swapcache(folio))
		o->flags |= HWERR_F_OWNERS_UNKNOWN;

	/* Mappings that came or went meanwhile are not missed. */
	expected = min(expected, hwerr_page_mapcount(folio, page));
	if (w.present < expected && !(o->flags & HWERR_F_OWNERS_TRUNCATED))
		return -EBUSY;
	return 0;
}

u64 hwerr_huge_size(unsigned long pfn)
{
	struct page *page = pfn_to_online_page(pfn);
	u64 size = PAGE_SIZE;
	struct folio *folio;

	if (!page)
		return size;
	folio = page_folio(page);
	if (!folio_try_get(folio))
		return size;
	if (page_folio(page) == folio && folio_test_hugetlb(folio))
		size = folio_size(folio);
	folio_put(folio);
	return size;
}

int hwerr_rmap_page(struct hwerr_owners *o, const struct hwerr_piece *p)
{
	struct page *page = pfn_to_online_page(p->pfn);
	struct folio *folio;
	int ret = -EBUSY;

	o->attempt++;
	/*
	 * Mapped without a way back, perhaps: a device's memory, what is kept from the kernel
	 * for guests, DAX; and the page of zeros, which everybody has.
	 */
	if (!page || is_zero_pfn(p->pfn)) {
		o->flags |= HWERR_F_OWNERS_UNKNOWN;
		return 0;
	}
	folio = page_folio(page);
	if (!folio_try_get(folio))
		return PageBuddy(page) ? 0 : -EAGAIN;
	/*
	 * It may have been split, or freed and used otherwise, before we had it; and what
	 * reaches beyond the page was a hugetlb page when the piece was made.
	 */
	if (page_folio(page) == folio &&
	    (p->off + p->len <= PAGE_SIZE || folio_test_hugetlb(folio)))
		ret = rmap_folio(o, folio, page, p);
	folio_put(folio);
	return ret;
}
