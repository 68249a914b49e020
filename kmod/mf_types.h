/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * enum mf_action_page_type, which is no ABI, in words. A list, to be included where
 * HWERR_MF_TYPE(name, words) is defined as what is to become of an entry. Numbers differ
 * between kernels: whoever includes it asks the kernel at hand for them, and defines
 * HWERR_MF_TYPES_6_11 if that may have the last ones.
 */
HWERR_MF_TYPE(MF_MSG_KERNEL, "reserved kernel page")
HWERR_MF_TYPE(MF_MSG_KERNEL_HIGH_ORDER, "high-order kernel page")
HWERR_MF_TYPE(MF_MSG_HUGE, "huge page")
HWERR_MF_TYPE(MF_MSG_FREE_HUGE, "free huge page")
HWERR_MF_TYPE(MF_MSG_UNMAP_FAILED, "page that could not be unmapped")
HWERR_MF_TYPE(MF_MSG_DIRTY_SWAPCACHE, "dirty page in the swap cache")
HWERR_MF_TYPE(MF_MSG_CLEAN_SWAPCACHE, "clean page in the swap cache")
HWERR_MF_TYPE(MF_MSG_DIRTY_MLOCKED_LRU, "dirty locked page")
HWERR_MF_TYPE(MF_MSG_CLEAN_MLOCKED_LRU, "clean locked page")
HWERR_MF_TYPE(MF_MSG_DIRTY_UNEVICTABLE_LRU, "dirty unevictable page")
HWERR_MF_TYPE(MF_MSG_CLEAN_UNEVICTABLE_LRU, "clean unevictable page")
HWERR_MF_TYPE(MF_MSG_DIRTY_LRU, "dirty page")
HWERR_MF_TYPE(MF_MSG_CLEAN_LRU, "clean page")
HWERR_MF_TYPE(MF_MSG_TRUNCATED_LRU, "truncated page")
HWERR_MF_TYPE(MF_MSG_BUDDY, "free page")
HWERR_MF_TYPE(MF_MSG_DAX, "DAX page")
HWERR_MF_TYPE(MF_MSG_UNSPLIT_THP, "transparent huge page that could not be split")
#ifdef HWERR_MF_TYPES_6_11
/* 6.11, b8b9488d50b7 ("mm/memory-failure: improve memory failure action_result") */
HWERR_MF_TYPE(MF_MSG_GET_HWPOISON, "page that could not be held")
HWERR_MF_TYPE(MF_MSG_ALREADY_POISONED, "page that was poisoned already")
#endif
