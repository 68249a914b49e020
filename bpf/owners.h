/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Who is hit, found by a BPF program: page -> (address space, address) -> process,
 * guest-physical address. The walk of kmod/owners_rmap.c, at the same moment and for the
 * same price, which is that of the page's mappings.
 *
 * A BPF program can take none of the locks that walk takes, so it takes none: every word is
 * read with bpf_probe_read_kernel(), which a stale pointer cannot hurt, and nothing is
 * believed that the page tables do not say. Whatever the trees looked like meanwhile, an
 * owner that is named mapped this page at this address when it was looked at; and if
 * fewer were found than the page's mapcount says there are, the walk is done again, and
 * then the record says so (HWERR_F_OWNERS_UNKNOWN).
 *
 * KVM registers an MMU notifier in each address space it runs a VM in: struct kvm is
 * around it, and recognised by pointing to its own parts.
 */
#ifndef HWERR_BPF_OWNERS_H
#define HWERR_BPF_OWNERS_H

#include "hwerr_bpf.h"
#include "uapi.h"
#include "hardware.h"

#define PAGE_SHIFT	12
#define PAGE_SIZE	4096UL

/*
 * Pages of a range that are looked at, hugetlb pages as one; mappings told apart; steps over
 * nodes of trees, for all of it: some ten milliseconds at most, also where interrupts are off;
 * walks over one page.
 */
#define PAGES_MAX	64
#define OWNERS_MAX	24
#define STEPS_MAX	32768
#define TRIES_MAX	4
#define NOTIFIERS_MAX	16

#define PTE_PRESENT	0x001UL
#define PTE_HUGE	0x080UL
#define PTE_PROTNONE	0x100UL
#define TASK_NEW	0x800
#define TASK_DEAD	0x080
#define HUGETLBFS_MAGIC	0x958458f6
#define PINNED		1024	/* GUP_PIN_COUNTING_BIAS */
#define MAPPING_FLAGS	3UL
#define MAPPING_ANON	1UL

extern int LINUX_KERNEL_VERSION __kconfig;
extern const void vmemmap_base __ksym;
extern const void page_offset_base __ksym;
extern const void pgdir_shift __ksym;
extern const void boot_cpu_data __ksym;

/* As kernels have them that are not the one compiled against. */
struct page___6_1 {
	unsigned char compound_dtor;
	unsigned char compound_order;
	atomic_t compound_mapcount;
} __attribute__((preserve_access_index));

struct page___6 {
	unsigned long flags;
	unsigned long compound_head;
} __attribute__((preserve_access_index));

struct page___7 {
	struct {
		unsigned long f;
	} flags;
	unsigned long compound_info;
} __attribute__((preserve_access_index));

struct folio___6_2 {
	atomic_t _entire_mapcount;
} __attribute__((preserve_access_index));

enum compound_dtor_id___6_1 { HUGETLB_PAGE_DTOR___6_1 = 2 };
enum pagetype___6_12 { PGTY_hugetlb___6_12 = 0xf4 };
enum pageflags___6_1 { PG_double_map___6_1 = 9 };
enum pageflags___any { PG_locked___any, PG_hwpoison___any, PG_swapcache___any };

struct cpuinfo_x86___hw {
	__u8 x86_phys_bits;
	__u32 x86_capability[24];
} __attribute__((preserve_access_index));

struct kvm_memslots___hw {
	struct rb_root_cached hva_tree;
	int node_idx;
} __attribute__((preserve_access_index));

struct kvm_memory_slot___hw {
	struct interval_tree_node hva_node[2];
	__u64 base_gfn;
	unsigned long npages;
	unsigned long userspace_addr;
	short id;
	__u16 as_id;
} __attribute__((preserve_access_index));

struct kvm___hw {
	struct mm_struct *mm;
	struct kvm_memslots___hw __memslots[4];
	struct kvm_memslots___hw *memslots[2];
	struct mmu_notifier mmu_notifier;
} __attribute__((preserve_access_index));

/* Some versions of pahole describe an array of arrays as one. */
struct kvm___arrays {
	struct kvm_memslots___hw __memslots[2][2];
} __attribute__((preserve_access_index));

/* Programs that may interrupt one another have each its own. */
enum hwerr_place {
	PLACE_MCE,
	PLACE_MEMFAIL,
	PLACE_MEMFAIL_EVENT,
	PLACE_AER,
	PLACE_EDAC,
	PLACE_EXTLOG,
	PLACE_FIRMWARE,
	PLACE_COUNT,
};

enum tree { TREE_ANON, TREE_FILE, TREE_SLOTS };
enum turn { TURN_DOWN, TURN_HERE, TURN_UP };

/**
 * struct room - what a program works in
 * @hw: the sample
 * @who: which follow it
 * @data: likewise, of a firmware section
 * @tree: enum tree of the walk under way
 * @turn: what to do at @node next
 * @node: rb_node, 0 at the end
 * @steps: done, of all walks
 * @lo: first wanted
 * @hi: last wanted
 * @pfn: page looked for
 * @pgoff: its place in the mapping, in pages
 * @off: first byte wanted of it
 * @len: bytes; of a hugetlb page, which is mapped as a whole, they may reach beyond the page
 * @head: its folio
 * @addr: rest of the range: start
 * @end: end
 * @present: page table entries found
 * @kvm: VM whose slots are walked
 * @slots: likewise
 * @owner: entry that it belongs to
 */
struct room {
	struct hwerr_hw hw;
	union {
		struct hwerr_hw_who who[HWERR_HW_WHOS];
		__u8 data[HWERR_HW_DATA];
	};
	__u32 tree;
	__u32 turn;
	__u64 node;
	__u64 steps;
	__u64 lo;
	__u64 hi;
	__u64 pfn;
	__u64 pgoff;
	__u64 off;
	__u64 len;
	__u64 head;
	__u64 addr;
	__u64 end;
	__u64 kvm;
	__u64 slots;
	__s32 present;
	__u32 owner;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, PLACE_COUNT);
	__type(key, __u32);
	__type(value, struct room);
} hwerr_rooms SEC(".maps");

struct place {
	__u32 at;
};

static __always_inline struct room *room_of(__u32 place)
{
	return bpf_map_lookup_elem(&hwerr_rooms, &place);
}

/* The verifier is to see the mask, whatever the compiler knows of @n. */
static __always_inline struct hwerr_hw_who *entry(struct room *r, __u64 n)
{
	barrier_var(n);
	n &= HWERR_HW_WHOS - 1;
	return &r->who[n];
}

static __always_inline __u64 word(__u64 addr)
{
	__u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)addr);
	return value;
}

static __always_inline __u32 half(__u64 addr)
{
	__u32 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)addr);
	return value;
}

#define FIELD(ptr, type, field)	((ptr) + bpf_core_field_offset(struct type, field))

static __always_inline __u64 phys_mask(void)
{
	__u8 bits = 0;

	__u64 at = FIELD((__u64)&boot_cpu_data, cpuinfo_x86___hw, x86_phys_bits);

	bpf_probe_read_kernel(&bits, 1, (void *)at);
	return (1ULL << (bits & 63)) - 1;
}

/* boot_cpu_has(); @bit as in asm/cpufeatures.h, where numbers do not change. */
static __always_inline bool cpu_has(unsigned int bit)
{
	__u64 words = FIELD((__u64)&boot_cpu_data, cpuinfo_x86___hw, x86_capability);

	return half(words + bit / 32 * 4) >> (bit % 32) & 1;
}

/* The page that @mm has at @va, or ~0. Anything that is not present is no page. */
static __always_inline __u64 page_at(__u64 mm, __u64 va)
{
	__u64 base = word((__u64)&page_offset_base);
	__u64 table = word(FIELD(mm, mm_struct, pgd));
	__u64 mask = phys_mask() & ~(PAGE_SIZE - 1);
	bool five = half((__u64)&pgdir_shift) == 48;
	__u64 entry, pfn, below;
	int shift;

#pragma unroll
	for (shift = 48; shift >= PAGE_SHIFT; shift -= 9) {
		if (shift == 48 && !five)
			continue;
		entry = word(table + ((va >> shift) & 511) * 8);
		if (shift == PAGE_SHIFT || (shift <= 30 && entry & PTE_HUGE)) {
			if (!(entry & PTE_PRESENT)) {
				if (!(entry & PTE_PROTNONE))
					return ~0ULL;
				/* The frame is inverted, against L1TF. */
				entry = ~entry;
			}
			below = (1ULL << (shift - PAGE_SHIFT)) - 1;
			pfn = (entry & mask) >> PAGE_SHIFT;
			return (pfn & ~below) | ((va >> PAGE_SHIFT) & below);
		}
		if (!(entry & PTE_PRESENT))
			return ~0ULL;
		table = base + (entry & mask);
	}
	return ~0ULL;
}

static __always_inline void add_owner(struct room *r, __u64 mm, __u64 va)
{
	/* The page behind the last that it reaches into. */
	__u64 next = r->pfn + ((r->off + r->len + PAGE_SIZE - 1) >> PAGE_SHIFT);
	struct hwerr_hw_who *w;
	__u32 n, i;

	va += r->off;
	n = r->hw.whos;
	for (i = 0; i < OWNERS_MAX; i++) {
		w = &r->who[i];
		if (i >= n)
			break;
		if (w->mm != mm)
			continue;
		if (va >= w->va && va < w->va + w->len)
			return;
		if (va == w->va + w->len && r->pfn == w->next) {
			w->len += r->len;
			w->next = next;
			return;
		}
	}
	if (n >= OWNERS_MAX) {
		r->hw.flags |= HWERR_F_OWNERS_TRUNCATED;
		return;
	}
	w = entry(r, n);
	__builtin_memset(w, 0, sizeof(*w));
	w->mm = mm;
	w->va = va;
	w->len = r->len;
	w->next = next;
	r->hw.whos = n + 1;
}

static __always_inline void add_slot(struct room *r, __u64 slot)
{
	__u64 start = word(FIELD(slot, kvm_memory_slot___hw, userspace_addr));
	__u64 bytes = word(FIELD(slot, kvm_memory_slot___hw, npages)) << PAGE_SHIFT;
	__u64 gpa = word(FIELD(slot, kvm_memory_slot___hw, base_gfn)) << PAGE_SHIFT;
	__u64 first = r->lo > start ? r->lo : start;
	__u64 end = r->hi + 1 < start + bytes ? r->hi + 1 : start + bytes;
	struct hwerr_hw_who *w;
	__u16 id = 0, as = 0;
	__u32 n = r->hw.whos;
	__u32 i;

	gpa += first - start;
	/* The same place seen through the other address space (SMM) is no news. */
	for (i = 0; i < HWERR_HW_WHOS; i++) {
		w = &r->who[i];
		if (i >= n)
			break;
		if (w->flags & HWERR_HW_SLOT && w->vm == r->kvm && w->gpa == gpa && w->va == first)
			return;
	}
	if (n >= HWERR_HW_WHOS) {
		r->hw.flags |= HWERR_F_OWNERS_TRUNCATED;
		return;
	}
	bpf_probe_read_kernel(&id, sizeof(id), (void *)FIELD(slot, kvm_memory_slot___hw, id));
	bpf_probe_read_kernel(&as, sizeof(as), (void *)FIELD(slot, kvm_memory_slot___hw, as_id));
	w = entry(r, n);
	__builtin_memset(w, 0, sizeof(*w));
	w->flags = HWERR_HW_SLOT;
	w->vm = r->kvm;
	w->va = first;
	w->len = end - first;
	w->gpa = gpa;
	w->slot = (__u32)as << 16 | id;
	w->owner = r->owner;
	r->hw.whos = n + 1;
}

/* From the rb_node to what it is in, and how far its subtree reaches. */
static __always_inline __u64 node_of(struct room *r, __u64 rb)
{
	switch (r->tree) {
	case TREE_ANON:
		return rb - bpf_core_field_offset(struct anon_vma_chain, rb);
	case TREE_FILE:
		return rb - bpf_core_field_offset(struct vm_area_struct, shared.rb);
	}
	return rb - bpf_core_field_offset(struct interval_tree_node, rb);
}

static __always_inline __u64 reach(struct room *r, __u64 rb)
{
	__u64 at = node_of(r, rb);

	switch (r->tree) {
	case TREE_ANON:
		return word(FIELD(at, anon_vma_chain, rb_subtree_last));
	case TREE_FILE:
		return word(FIELD(at, vm_area_struct, shared.rb_subtree_last));
	}
	return word(FIELD(at, interval_tree_node, __subtree_last));
}

/* Global: verified once, however often it is called. */
__noinline int hwerr_visit_slot(__u32 place)
{
	struct room *r = room_of(place);
	__u64 at;

	if (!r)
		return 0;
	at = r->node - bpf_core_field_offset(struct interval_tree_node, rb) -
	     bpf_core_field_offset(struct kvm_memory_slot___hw, hva_node) -
	     (half(FIELD(r->slots, kvm_memslots___hw, node_idx)) & 1) *
	     bpf_core_type_size(struct interval_tree_node);
	add_slot(r, at);
	return 0;
}

__noinline int hwerr_visit_vma(__u32 place)
{
	struct room *r = room_of(place);
	__u64 vma, va, start, mm;

	if (!r)
		return 0;
	vma = node_of(r, r->node);
	if (r->tree == TREE_ANON)
		vma = word(FIELD(vma, anon_vma_chain, vma));
	start = word(FIELD(vma, vm_area_struct, vm_start));
	va = start + ((r->pgoff - word(FIELD(vma, vm_area_struct, vm_pgoff))) << PAGE_SHIFT);
	if (va < start || va >= word(FIELD(vma, vm_area_struct, vm_end)))
		return 0;
	mm = word(FIELD(vma, vm_area_struct, vm_mm));
	if (page_at(mm, va) != r->pfn)
		return 0;
	r->present++;
	add_owner(r, mm, va);
	return 0;
}

/* One step of the walk over those nodes of an interval tree that overlap lo..hi. */
static long tree_step(__u32 index, struct place *p)
{
	struct room *r = room_of(p->at);
	__u64 at, next, first, last;

	if (!r || !r->node)
		return 1;
	if (r->steps++ >= STEPS_MAX) {
		r->hw.flags |= HWERR_F_OWNERS_TRUNCATED;
		return 1;
	}
	switch (r->turn) {
	case TURN_DOWN:
		next = word(FIELD(r->node, rb_node, rb_left));
		if (next && reach(r, next) >= r->lo)
			r->node = next;
		else
			r->turn = TURN_HERE;
		return 0;
	case TURN_HERE:
		r->turn = TURN_UP;
		at = node_of(r, r->node);
		if (r->tree == TREE_SLOTS) {
			first = word(FIELD(at, interval_tree_node, start));
			last = word(FIELD(at, interval_tree_node, last));
		} else {
			if (r->tree == TREE_ANON)
				at = word(FIELD(at, anon_vma_chain, vma));
			first = word(FIELD(at, vm_area_struct, vm_pgoff));
			last = word(FIELD(at, vm_area_struct, vm_end)) -
			       word(FIELD(at, vm_area_struct, vm_start));
			last = first + (last >> PAGE_SHIFT) - 1;
		}
		if (first > r->hi)
			return 0;
		if (last >= r->lo) {
			if (r->tree == TREE_SLOTS)
				hwerr_visit_slot(p->at);
			else
				hwerr_visit_vma(p->at);
		}
		next = word(FIELD(r->node, rb_node, rb_right));
		if (next && reach(r, next) >= r->lo) {
			r->node = next;
			r->turn = TURN_DOWN;
		}
		return 0;
	}
	next = word(FIELD(r->node, rb_node, __rb_parent_color)) & ~3ULL;
	if (next && word(FIELD(next, rb_node, rb_left)) == r->node)
		r->turn = TURN_HERE;
	r->node = next;
	return 0;
}

static __always_inline void walk(struct room *r, struct place *p, __u32 tree, __u64 root,
				 __u64 lo, __u64 hi)
{
	r->tree = tree;
	r->turn = TURN_DOWN;
	r->node = root;
	r->lo = lo;
	r->hi = hi;
	bpf_loop(STEPS_MAX + 1, tree_step, p, 0);
}

static __always_inline __u64 page_of(__u64 pfn)
{
	return word((__u64)&vmemmap_base) + pfn * bpf_core_type_size(struct page);
}

/*
 * Of a tail page it says which its head is, with bit 0 set: the head's address or, on newer
 * kernels ("mm: rework compound_head() for power-of-2 sizeof(struct page)", seen in 7.2) where
 * hugetlb's memory map may be optimized, what the tail's address is masked with.
 */
#define COMPOUND(at)								\
	(bpf_core_field_exists(struct page___7, compound_info) ?		\
	 FIELD(at, page___7, compound_info) : FIELD(at, page___6, compound_head))

/* The memory map lies below (Documentation/arch/x86/x86_64/mm.rst); masks are above. */
#define CPU_ENTRY_AREA	0xfffffe0000000000ull

static __always_inline __u64 head_of(__u64 page, __u64 compound)
{
	if (!(compound & 1))
		return page;
	return compound >= CPU_ENTRY_AREA ? page & compound : compound - 1;
}

/* A number, or what holds one ("mm: introduce memdesc_flags_t"). */
#define FLAGS(at)								\
	(bpf_core_field_exists(struct page___6, flags) ?			\
	 FIELD(at, page___6, flags) : FIELD(at, page___7, flags))

static __always_inline bool is_hugetlb(__u64 head)
{
	__u64 second = head + bpf_core_type_size(struct page);
	__u8 dtor = 0;

	if (bpf_core_enum_value_exists(enum pagetype___6_12, PGTY_hugetlb___6_12))
		return half(FIELD(head, page, page_type)) >> 24 ==
		       bpf_core_enum_value(enum pagetype___6_12, PGTY_hugetlb___6_12);
	if (bpf_core_field_exists(struct page___6_1, compound_dtor)) {
		bpf_probe_read_kernel(&dtor, 1, (void *)FIELD(second, page___6_1, compound_dtor));
		return word(COMPOUND(second)) & 1 &&
		       dtor == bpf_core_enum_value(enum compound_dtor_id___6_1,
						   HUGETLB_PAGE_DTOR___6_1);
	}
	return false;
}

/* Of the compound page @head, which has more than one page, as it was when looked at. */
static __always_inline __u32 order_of(__u64 head)
{
	__u64 second = head + bpf_core_type_size(struct page);
	__u32 order = 0;

	if (bpf_core_field_exists(struct page___6_1, compound_order))
		bpf_probe_read_kernel(&order, 1,
				      (void *)FIELD(second, page___6_1, compound_order));
	else	/* 6.6, ebc1baf5c9b4 ("mm: free up a word in the first tail page") */
		order = half(FLAGS(second)) & 0xff;
	return order & 31;
}

/* Whether the page is in use; if so its head, which is itself if it is not @large. */
static __always_inline bool in_use(__u64 page, __u64 *head, bool *large)
{
	__u64 second;

	if (bpf_probe_read_kernel(head, sizeof(*head), (void *)COMPOUND(page)))
		return false;	/* no memory of the kernel's */
	*head = head_of(page, *head);
	/* A head is known by the page behind it. */
	second = *head + bpf_core_type_size(struct page);
	*large = *head != page || head_of(second, word(COMPOUND(second))) == *head;
	return half(FIELD(*head, page, _refcount));
}

/* Bytes that are mapped as one around the page: its own, or those of its hugetlb page. */
static __always_inline __u64 piece_size(__u64 pfn)
{
	bool large;
	__u64 head;

	if (!in_use(page_of(pfn), &head, &large) || !large || !is_hugetlb(head))
		return PAGE_SIZE;
	return PAGE_SIZE << order_of(head);
}

/* Page table entries that map the page; as hwerr_page_mapcount() of kmod/compat.h. */
static __always_inline int mapcount(__u64 page, __u64 head, bool large, bool hugetlb)
{
	int own = (int)half(FIELD(page, page, _mapcount)) + 1;
	__u64 second = head + bpf_core_type_size(struct page);
	int entire = 0;

	if (!large)
		return own;
	if (bpf_core_field_exists(struct page___6_1, compound_mapcount)) {
		entire = (int)half(FIELD(second, page___6_1, compound_mapcount)) + 1;
		if (bpf_core_enum_value_exists(enum pageflags___6_1, PG_double_map___6_1) &&
		    word(FLAGS(second)) >>
		    bpf_core_enum_value(enum pageflags___6_1, PG_double_map___6_1) & 1)
			own--;
	} else if (bpf_core_field_exists(struct folio___6_2, _entire_mapcount)) {
		entire = (int)half(FIELD(head, folio___6_2, _entire_mapcount)) + 1;
	}
	return hugetlb ? entire : own + entire;
}

#define PAGE_FLAG(at, name)							\
	(word(FLAGS(at)) >>					\
	 bpf_core_enum_value(enum pageflags___any, name##___any) & 1)

/*
 * A page that no page table maps: is there an owner to which nothing leads? Of poisoned
 * pages, those in motion, swapped or pinned there is. As anon_unmapped() of kmod/owners_rmap.c.
 */
static __always_inline bool unmapped_owner(__u64 page, __u64 head, __u64 mapping)
{
	if (!mapping)
		return false;
	if (PAGE_FLAG(page, PG_hwpoison) || PAGE_FLAG(head, PG_hwpoison))
		return true;
	return mapping & MAPPING_ANON &&
	       (PAGE_FLAG(head, PG_locked) || PAGE_FLAG(head, PG_swapcache) ||
		half(FIELD(head, page, _refcount)) >= PINNED);
}

/* Looks once for who maps r->pfn: 0 done, 1 some are missing. */
__noinline int hwerr_find_page(__u32 place)
{
	struct place p = { .at = place };
	struct room *r = room_of(place);
	__u64 page, head, mapping, root, index, host;
	int expected, after;
	bool large, hugetlb;

	if (!r)
		return 0;
	page = page_of(r->pfn);
	if (!in_use(page, &head, &large))
		return 0;
	hugetlb = large && is_hugetlb(head);
	if (!hugetlb && r->off + r->len > PAGE_SIZE)
		return 1;	/* it was one when its size was looked at */
	if (bpf_core_enum_value_exists(enum pagetype___6_12, PGTY_hugetlb___6_12) && !hugetlb &&
	    half(FIELD(head, page, page_type)) >> 24 >= 0xf0 &&
	    half(FIELD(head, page, page_type)) != 0xffffffff)
		return 0;	/* slab, page tables, ... */
	expected = mapcount(page, head, large, hugetlb);
	mapping = word(FIELD(head, page, mapping));
	if (expected <= 0) {
		if (unmapped_owner(page, head, mapping))
			r->hw.flags |= HWERR_F_OWNERS_UNKNOWN;
		return 0;
	}
	index = word(FIELD(head, folio, index));
	/* 6.7, a08c7193e4f1 ("mm/filemap: remove hugetlb special casing in filemap.c") */
	if (hugetlb && LINUX_KERNEL_VERSION < (6 << 16 | 7 << 8))
		index <<= order_of(head);
	r->pgoff = index + (page - head) / bpf_core_type_size(struct page);
	r->present = 0;
	switch (mapping & MAPPING_FLAGS) {
	case MAPPING_ANON:
		root = word(FIELD(mapping - MAPPING_ANON, anon_vma, rb_root.rb_root.rb_node));
		walk(r, &p, TREE_ANON, root, r->pgoff, r->pgoff);
		break;
	case 0:
		/* Only an inode's own mapping can be mapped by a process. */
		host = mapping ? word(FIELD(mapping, address_space, host)) : 0;
		if (!host || FIELD(host, inode, i_data) != mapping) {
			r->hw.flags |= HWERR_F_OWNERS_UNKNOWN;	/* inserted by a driver */
			return 0;
		}
		root = word(FIELD(mapping, address_space, i_mmap.rb_root.rb_node));
		walk(r, &p, TREE_FILE, root, r->pgoff, r->pgoff);
		break;
	default:
		/* Merged by KSM: its users are in a tree that is not followed here. */
		r->hw.flags |= HWERR_F_OWNERS_UNKNOWN;
		return 0;
	}
	after = mapcount(page, head, large, hugetlb);
	if (after < expected)
		expected = after;
	return r->present < expected && !(r->hw.flags & HWERR_F_OWNERS_TRUNCATED);
}

static long page_step(__u32 index, struct place *p)
{
	struct room *r = room_of(p->at);
	int i, missing = 0;
	__u64 size;

	if (!r || r->addr >= r->end)
		return 1;
	if (index == PAGES_MAX) {
		r->hw.flags |= HWERR_F_OWNERS_TRUNCATED;
		return 1;
	}
	r->pfn = r->addr >> PAGE_SHIFT;
	r->off = r->addr & (PAGE_SIZE - 1);
	r->len = PAGE_SIZE - r->off;
	if (r->len < r->end - r->addr) {
		size = piece_size(r->pfn);
		r->len = size - (r->addr & (size - 1));
	}
	if (r->len > r->end - r->addr)
		r->len = r->end - r->addr;
	for (i = 0; i < TRIES_MAX; i++) {
		missing = hwerr_find_page(p->at);
		if (!missing)
			break;
	}
	if (missing)
		r->hw.flags |= HWERR_F_OWNERS_UNKNOWN;
	r->addr += r->len;
	return 0;
}

/* The VM whose notifier this is, or 0. */
static __always_inline __u64 kvm_of(__u64 notifier, __u64 mm)
{
	__u64 kvm, parts, slots;

	if (!bpf_core_field_exists(struct kvm___hw, mmu_notifier))
		return 0;
	kvm = notifier - bpf_core_field_offset(struct kvm___hw, mmu_notifier);
	if (bpf_core_field_exists(struct kvm___hw, __memslots))
		parts = FIELD(kvm, kvm___hw, __memslots);
	else
		parts = FIELD(kvm, kvm___arrays, __memslots);
	slots = word(FIELD(kvm, kvm___hw, memslots));
	if (word(FIELD(kvm, kvm___hw, mm)) != mm ||
	    (slots != parts && slots != parts + bpf_core_type_size(struct kvm_memslots___hw)))
		return 0;
	return kvm;
}

/* Looks in the VM r->kvm for the slots of entry r->owner. */
__noinline int hwerr_find_slots(__u32 place)
{
	struct place p = { .at = place };
	struct room *r = room_of(place);
	struct hwerr_hw_who *w;
	__u64 root;
	__u32 i;

	if (!r)
		return 0;
	w = entry(r, r->owner);
	for (i = 0; i < 2; i++) {
		r->slots = word(FIELD(r->kvm, kvm___hw, memslots) + 8 * i);
		if (!r->slots)
			continue;
		root = word(FIELD(r->slots, kvm_memslots___hw, hva_tree.rb_root.rb_node));
		walk(r, &p, TREE_SLOTS, root, w->va, w->va + w->len - 1);
	}
	return 0;
}

/* What the entry r->owner belongs to. */
__noinline int hwerr_identify(__u32 place)
{
	struct room *r = room_of(place);
	struct hwerr_hw_who *w;
	__u64 task, leader, mm, at, exe;
	int i;

	if (!r)
		return 0;
	w = entry(r, r->owner);
	mm = w->mm;
	task = word(FIELD(mm, mm_struct, owner));
	if (!task || half(FIELD(task, task_struct, __state)) & (TASK_NEW | TASK_DEAD)) {
		/* Its last user is gone, or it has none yet; else somebody shares it still. */
		if (half(FIELD(mm, mm_struct, mm_users)))
			r->hw.flags |= HWERR_F_OWNERS_UNKNOWN;
		w->flags = HWERR_HW_GONE;
		return 0;
	}
	leader = word(FIELD(task, task_struct, group_leader));
	w->tgid = half(FIELD(leader, task_struct, tgid));
	w->start_ns = word(FIELD(leader, task_struct, start_boottime));
	bpf_probe_read_kernel_str(w->comm, sizeof(w->comm),
				  (void *)FIELD(leader, task_struct, comm));
	exe = word(FIELD(mm, mm_struct, exe_file));
	exe = word(FIELD(exe, file, f_path.dentry));
	exe = word(FIELD(exe, dentry, d_name.name));
	bpf_probe_read_kernel_str(w->exe, sizeof(w->exe), (void *)exe);

	at = word(FIELD(mm, mm_struct, notifier_subscriptions));
	if (!at)
		return 0;
	at = word(FIELD(at, mmu_notifier_subscriptions, list.first));
	for (i = 0; i < NOTIFIERS_MAX; i++) {
		if (!at)
			return 0;
		r->kvm = kvm_of(at - bpf_core_field_offset(struct mmu_notifier, hlist), mm);
		if (r->kvm) {
			if (!w->vm)
				w->vm = r->kvm;
			w->flags |= HWERR_HW_KVM;
			hwerr_find_slots(place);
		}
		at = word(FIELD(at, hlist_node, next));
	}
	r->hw.flags |= HWERR_F_OWNERS_TRUNCATED;
	return 0;
}

static long owner_step(__u32 index, struct place *p)
{
	struct room *r = room_of(p->at);

	if (!r)
		return 1;
	r->owner = index;
	hwerr_identify(p->at);
	return 0;
}

/* Finds the owners of phys_addr..phys_len; the program's last but one act. */
__noinline int hwerr_resolve(__u32 place)
{
	__u64 start = bpf_ktime_get_ns();
	struct place p = { .at = place };
	struct room *r = room_of(place);
	__u64 took;

	if (!r || !r->hw.phys_len)
		return 0;
	r->addr = r->hw.phys_addr;
	r->end = r->addr + r->hw.phys_len;
	if (r->end < r->addr)
		r->end = ~0ULL;
	r->steps = 0;
	bpf_loop(PAGES_MAX + 1, page_step, &p, 0);
	/* Slots are few, and a guest is to be named even in a crowd. */
	r->steps = 0;
	bpf_loop(r->hw.whos & (HWERR_HW_WHOS - 1), owner_step, &p, 0);
	took = bpf_ktime_get_ns() - start;
	r->hw.resolve_ns = took > 0xffffffff ? 0xffffffff : took;
	return 0;
}

#endif
