/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * enum mf_action_page_type, which is no ABI, in words. Numbers differ between kernels, so
 * whoever includes this asks the kernel at hand for them: X(name, words) for each.
 */
#ifndef _HWERR_MF_TYPES_H
#define _HWERR_MF_TYPES_H

#define HWERR_MF_TYPES(X)						\
	X(MF_MSG_KERNEL, "reserved kernel page")			\
	X(MF_MSG_KERNEL_HIGH_ORDER, "high-order kernel page")		\
	X(MF_MSG_HUGE, "huge page")					\
	X(MF_MSG_FREE_HUGE, "free huge page")				\
	X(MF_MSG_UNMAP_FAILED, "page that could not be unmapped")	\
	X(MF_MSG_DIRTY_SWAPCACHE, "dirty page in the swap cache")	\
	X(MF_MSG_CLEAN_SWAPCACHE, "clean page in the swap cache")	\
	X(MF_MSG_DIRTY_MLOCKED_LRU, "dirty locked page")		\
	X(MF_MSG_CLEAN_MLOCKED_LRU, "clean locked page")		\
	X(MF_MSG_DIRTY_UNEVICTABLE_LRU, "dirty unevictable page")	\
	X(MF_MSG_CLEAN_UNEVICTABLE_LRU, "clean unevictable page")	\
	X(MF_MSG_DIRTY_LRU, "dirty page")				\
	X(MF_MSG_CLEAN_LRU, "clean page")				\
	X(MF_MSG_TRUNCATED_LRU, "truncated page")			\
	X(MF_MSG_BUDDY, "free page")					\
	X(MF_MSG_DAX, "DAX page")					\
	X(MF_MSG_UNSPLIT_THP, "transparent huge page that could not be split")

/* 6.11, b8b9488d50b7 ("mm/memory-failure: improve memory failure action_result") */
#define HWERR_MF_TYPES_6_11(X)						\
	X(MF_MSG_GET_HWPOISON, "page that could not be held")		\
	X(MF_MSG_ALREADY_POISONED, "page that was poisoned already")

#define HWERR_MF_TYPE_OTHER	"page of a type not known here"
#define HWERR_MF_SIMULATED	" (simulated)"

#endif /* _HWERR_MF_TYPES_H */
