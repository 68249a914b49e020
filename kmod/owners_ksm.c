// SPDX-License-Identifier: GPL-2.0-only
/*
 * Owners of a page that KSM merged.
 *
 * Such a page has no anon_vma. Its mapping is a node of KSM's stable tree, with
 * a list of every place that was merged into it; each leads to the anon_vma
 * of the area it was in, and through it to processes forked since. This is
 * rmap_walk_ksm() with its rule: the folio lock protects the node and its list.
 * An item holds a reference on its anon_vma while it is in the list, and that
 * one on its root.
 *
 * The structures are private to mm/ksm.c. Their heads are mirrored here, and
 * believed only where they prove themselves: the node must name the page, and
 * each item must point back to the node and say that it is in the stable
 * tree. They are read with copy_from_kernel_nofault(), so that on a kernel that
 * has them otherwise the owners are unknown, and nothing worse.
 */
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/rbtree.h>
#include <linux/rmap.h>
#include <linux/uaccess.h>

#include "compat.h"
#include "hwerr.h"
#include "owners.h"

/* struct ksm_stable_node, up to what is needed */
struct stable_node {
	union {
		struct rb_node node;
		struct {
			struct list_head *head;
			struct hlist_node hlist_dup;
			struct list_head list;
		};
	};
	struct hlist_head hlist;
	unsigned long kpfn;
};

/* struct ksm_rmap_item in the stable tree; 6.7 put two bytes into the padding */
struct rmap_item {
	void *rmap_list;
	struct anon_vma *anon_vma;
	struct mm_struct *mm;
	unsigned long address;
	unsigned int oldchecksum;
	unsigned int pad;
	struct stable_node *head;
	struct hlist_node hlist;
};

#define STABLE_FLAG	0x200

static int walk_item(struct hwerr_owners *o, const struct rmap_item *item,
		     const struct hwerr_piece *p, int *present)
{
	unsigned long va = item->address & PAGE_MASK;
	struct anon_vma *root, *top;
	struct rb_node *rb;

	if (copy_from_kernel_nofault(&root, &item->anon_vma->root, sizeof(root)) ||
	    copy_from_kernel_nofault(&top, &root->root, sizeof(top)) ||
	    top != root)
		return -EINVAL;
	if (!down_read_trylock(&root->rwsem))
		return -EBUSY;
	/* The pages of a merged area need not be where vm_pgoff says: all of it. */
	for (rb = rb_first_cached(&item->anon_vma->rb_root); rb; rb = rb_next(rb)) {
		struct vm_area_struct *vma =
			rb_entry(rb, struct anon_vma_chain, rb)->vma;
		enum hwerr_pt pt;

		if (!o->visits) {
			o->flags |= HWERR_F_OWNERS_TRUNCATED;
			break;
		}
		o->visits--;
		if (va < vma->vm_start || va >= vma->vm_end)
			continue;
		pt = hwerr_pt_lookup(vma, va, p->pfn);
		if (pt == HWERR_PT_OTHER)
			continue;
		/*
		 * The items of two related processes may both lead to one of
		 * them: it is counted once.
		 */
		if (hwerr_owners_add(o, vma->vm_mm, va, p) &&
		    pt == HWERR_PT_PRESENT)
			(*present)++;
	}
	up_read(&root->rwsem);
	return 0;
}

int hwerr_ksm_page(struct hwerr_owners *o, struct folio *folio,
		   const struct hwerr_piece *p, int *present)
{
	unsigned long mapping = (unsigned long)READ_ONCE(folio->mapping);
	struct stable_node *addr = (void *)(mapping & ~PAGE_MAPPING_FLAGS);
	struct hlist_node *link, **pprev;
	struct stable_node node;
	int ret = 0;

	if (!folio_trylock(folio))
		return -EBUSY;
	if ((unsigned long)READ_ONCE(folio->mapping) != mapping) {
		ret = -EBUSY;
		goto out;
	}
	if (copy_from_kernel_nofault(&node, addr, sizeof(node)) ||
	    node.kpfn != folio_pfn(folio)) {
		ret = -EINVAL;
		goto out;
	}
	pprev = &addr->hlist.first;
	for (link = node.hlist.first; link;) {
		struct rmap_item item;

		if (!o->visits) {
			o->flags |= HWERR_F_OWNERS_TRUNCATED;
			break;
		}
		o->visits--;
		if (copy_from_kernel_nofault(&item,
					     hlist_entry(link, struct rmap_item, hlist),
					     sizeof(item)) ||
		    item.head != addr || item.hlist.pprev != pprev ||
		    !(item.address & STABLE_FLAG)) {
			ret = -EINVAL;
			break;
		}
		ret = walk_item(o, &item, p, present);
		if (ret)
			break;
		pprev = &link->next;
		link = item.hlist.next;
	}
out:
	folio_unlock(folio);
	return ret;
}
