// SPDX-License-Identifier: MIT
/*
 * libFuzzer: the parser of hwerr_notify and the classifier of the module, on any bytes.
 *
 *	clang -fsanitize=fuzzer,address,undefined parse.c
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "hwerr.h"
#include "classify.h"
#include "_scan.c"

#define MUST(x)	do { if (!(x)) abort(); } while (0)

static void check_class(struct hwerr_class c)
{
	MUST(c.severity < HWERR_SEV_COUNT);
	MUST(c.kind < HWERR_KIND_COUNT);
	MUST(c.component < HWERR_COMP_COUNT);
	MUST(!(c.flags & ~HWERR_F_ACTION_REQUIRED));
}

static void classify(const uint8_t *data, size_t size)
{
	struct hwerr_info_mce m = { 0 };
	uint32_t facts = 0;
	uint8_t guid[16] = { 0 };
	uint64_t len;

	memcpy(&m, data, size < sizeof(m) ? size : sizeof(m));
	if (size > sizeof(m))
		facts = data[sizeof(m)];
	memcpy(guid, data, size < sizeof(guid) ? size : sizeof(guid));
	check_class(hwerr_class_mce(&m, facts));
	hwerr_mce_addr_is_physical(&m, facts);
	hwerr_mce_is_memory(&m, facts);
	hwerr_mce_is_yellow(&m);
	hwerr_mce_status_ident(&m);
	hwerr_mce_count(&m);
	len = hwerr_mce_addr_len(&m);
	MUST(len && !(len & (len - 1)));
	check_class(hwerr_class_aer(m.cpuid));
	check_class(hwerr_class_edac(m.cpuid));
	check_class(hwerr_class_memfail((int32_t)m.cpuid, facts & 1));
	check_class(hwerr_class_cper(m.cpuid, hwerr_cper_component(guid)));
	check_class(hwerr_class_ghes(m.cpuid, hwerr_cper_component(guid)));
}

/* Goes over records that were found good as a reader does: never out of them. */
static void walk(const uint8_t *buf, size_t len)
{
	const uint8_t *p = buf;

	while (p < buf + len) {
		struct hwerr_record rec;
		const uint8_t *q, *end;

		MUST(buf + len - p >= (ptrdiff_t)sizeof(rec));
		memcpy(&rec, p, sizeof(rec));
		end = p + rec.len;
		MUST(end <= buf + len && rec.hdr_len >= sizeof(rec));
		for (q = p + rec.hdr_len; q < end;) {
			struct hwerr_info info;

			MUST(end - q >= (ptrdiff_t)sizeof(info));
			memcpy(&info, q, sizeof(info));
			MUST(info.len >= info_min(info.type) && info.len <= end - q);
			q += info.len;
		}
		MUST(q == end);
		p = end;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	int64_t bad = hwerr_scan(data, size);

	MUST(bad >= -1 && bad <= (int64_t)size);
	if (bad == -1)
		walk(data, size);
	classify(data, size);
	return 0;
}
