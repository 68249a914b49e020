// SPDX-License-Identifier: MIT
/* Compiled into hwerr_notify._uapi by _build.py. */
#include <stdint.h>
#include <string.h>
#include "hwerr.h"

/* What an info must have at least: its first version. */
static size_t info_min(uint16_t type)
{
	switch (type) {
	case HWERR_INFO_MCE: return sizeof(struct hwerr_info_mce);
	case HWERR_INFO_PCI: return sizeof(struct hwerr_info_pci);
	case HWERR_INFO_EDAC: return sizeof(struct hwerr_info_edac);
	case HWERR_INFO_MEMORY: return sizeof(struct hwerr_info_memory);
	case HWERR_INFO_GUEST: return sizeof(struct hwerr_info_guest);
	case HWERR_INFO_TASK: return sizeof(struct hwerr_info_task);
	case HWERR_INFO_STOP: return sizeof(struct hwerr_info_stop);
	case HWERR_INFO_CPER: return sizeof(struct hwerr_info_cper);
	case HWERR_INFO_VCPU: return sizeof(struct hwerr_info_vcpu);
	case HWERR_INFO_BLOCK: return sizeof(struct hwerr_info_block);
	default: return sizeof(struct hwerr_info);
	}
}

/*
 * Checks the framing of whole records. Returns -1 if all is well, else the offset
 * of the record or info that is not. @buf need not be aligned.
 */
static int64_t hwerr_scan(const uint8_t *buf, size_t len)
{
	size_t at = 0;

	while (at < len) {
		struct hwerr_record rec;
		size_t end, i;

		if (len - at < sizeof(rec))
			return at;
		memcpy(&rec, buf + at, sizeof(rec));
		if (rec.len % 8 || rec.hdr_len % 8 || rec.hdr_len < sizeof(rec) ||
		    rec.hdr_len > rec.len || rec.len > len - at)
			return at;
		end = at + rec.len;
		for (i = at + rec.hdr_len; i < end; ) {
			struct hwerr_info info;

			memcpy(&info, buf + i, sizeof(info));
			if (info.len % 8 || info.len > end - i || info.len < info_min(info.type))
				return i;
			if (info.type == HWERR_INFO_CPER) {
				struct hwerr_info_cper cper;

				memcpy(&cper, buf + i, sizeof(cper));
				if (cper.data_len > info.len - sizeof(cper))
					return i;
			}
			i += info.len;
		}
		at = end;
	}
	return -1;
}
