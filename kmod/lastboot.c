// SPDX-License-Identifier: GPL-2.0-only
/*
 * Errors of an earlier boot, as far as the platform kept them.
 *
 * A fatal machine check panics before any notifier runs. But mce_panic() first
 * writes the banks to the platform's persistent store, ACPI ERST; and firmware
 * writes records of its own there.
 *
 * Records are not cleared here: they are not ours, and pstore shows them as files
 * (mce-erst-*). So one that nobody clears is told at each load, with its number
 * in the text. systemd-pstore clears them early at boot; to be ahead of it they
 * are read within the load, and it is ordered after systemd-modules-load.
 *
 * What firmware noticed and could tell nobody, because the machine was reset, is
 * in the boot error region, ACPI BERT. The kernel prints it at boot.
 *
 * All of it is foreign: every length in it is checked.
 */
#include <linux/acpi.h>
#include <linux/bcd.h>
#include <linux/cper.h>
#include <linux/io.h>
#include <linux/kernel.h>
#include <linux/mm.h>
#include <linux/sizes.h>
#include <linux/string.h>
#include <linux/time64.h>
#include <linux/uuid.h>
#include <acpi/apei.h>
#include <acpi/ghes.h>

#include "hwerr.h"

#define ERST_RECORD_MAX	SZ_256K
#define REGION_MAX	SZ_1M

/* arch/x86/kernel/cpu/mce/apei.c: a struct mce */
static const guid_t section_mce =
	GUID_INIT(0xfe08ffbe, 0x95e4, 0x4be7, 0xbc, 0x73, 0x40, 0x96, 0x04, 0x4a, 0x38, 0xfc);

/* drivers/acpi/apei/erst.c: kernel log, kernel log compressed; no errors of hardware */
static const guid_t section_dmesg =
	GUID_INIT(0xc197e04e, 0xd545, 0x4a70, 0x9c, 0x17, 0xa5, 0x54, 0x94, 0x19, 0xeb, 0x12);
static const guid_t section_dmesg_z =
	GUID_INIT(0x4f118707, 0x04dd, 0x4055, 0xb5, 0xdd, 0x95, 0x6d, 0x34, 0xdd, 0xfa, 0xc6);

void hwerr_lastboot_mark(struct hwerr_draft *d, const struct hwerr_lastboot *from, time64_t time)
{
	d->rec.flags |= HWERR_F_EARLIER | HWERR_F_OTHER_BOOT;
	d->rec.time_mono_ns = 0;
	d->rec.time_real_ns = time > 0 ? time * NSEC_PER_SEC : 0;
	/* Who was hit then is not who is there now. */
	if (d->phys_len)
		d->rec.flags |= HWERR_F_OWNERS_UNKNOWN;
	d->phys_len = 0;
	d->no_link = true;
	if (from->id)
		hwerr_draft_text(d, "kept in %s as %#llx%s", from->store, from->id,
				 from->simulated ? " (simulated)" : "");
	else
		hwerr_draft_text(d, "kept in %s", from->store);
}

/* UEFI N.2.1, "Timestamp": BCD from the lowest byte on; 0 if it is none. */
static time64_t cper_time(u64 stamp)
{
	unsigned int second = bcd2bin(stamp & 0xff);
	unsigned int minute = bcd2bin(stamp >> 8 & 0xff);
	unsigned int hour = bcd2bin(stamp >> 16 & 0xff);
	unsigned int day = bcd2bin(stamp >> 32 & 0xff);
	unsigned int month = bcd2bin(stamp >> 40 & 0xff);
	unsigned int year = bcd2bin(stamp >> 48 & 0xff) + bcd2bin(stamp >> 56 & 0xff) * 100;

	if (second > 60 || minute > 59 || hour > 23 || !day || day > 31 || !month || month > 12 ||
	    year < 1970 || year > 2261)
		return 0;
	return mktime64(year, month, day, hour, minute, second);
}

static void report_section(const struct cper_record_header *rec, u32 len,
			   const struct cper_section_descriptor *sec,
			   const struct hwerr_lastboot *from)
{
	guid_t type = sec->section_type;
	guid_t fru = sec->fru_id;
	const void *data;

	if (sec->section_offset > len || sec->section_length > len - sec->section_offset)
		return;
	data = (const void *)rec + sec->section_offset;
	if (guid_equal(&type, &section_dmesg) || guid_equal(&type, &section_dmesg_z))
		return;
	if (guid_equal(&type, &section_mce))
		hwerr_mce_lastboot(from, data, sec->section_length);
	else
		hwerr_cper_lastboot(from, &type,
				    sec->validation_bits & CPER_SEC_VALID_FRU_ID ? &fru : NULL,
				    sec->validation_bits & CPER_SEC_VALID_FRU_TEXT ?
				    (const char *)sec->fru_text : NULL,
				    data, sec->section_length, sec->section_severity);
}

static void report_record(const struct cper_record_header *rec, u32 len, u64 id)
{
	const struct cper_section_descriptor *sec = (const void *)(rec + 1);
	struct hwerr_lastboot from = { .store = "ERST", .id = id };
	u32 i;

	if (len < sizeof(*rec) || memcmp(rec->signature, CPER_SIG_RECORD, CPER_SIG_SIZE) ||
	    rec->signature_end != CPER_SIG_END)
		return;
	if (rec->validation_bits & CPER_VALID_TIMESTAMP)
		from.time = cper_time(rec->timestamp);
	from.simulated = rec->flags & CPER_HW_ERROR_FLAGS_SIMULATED;
	for (i = 0; i < rec->section_count; i++) {
		if ((i + 1) * sizeof(*sec) > len - sizeof(*rec))
			break;
		report_section(rec, len, &sec[i], &from);
	}
}

/* At most as many as the kernel lists (ERST_RECORD_ID_CACHE_SIZE_MAX, 1024). */
static void report_erst(void)
{
	size_t size = SZ_16K;
	void *buf;
	ssize_t len;
	u64 id;
	int pos;

	/* No store here: -ENODEV. */
	if (erst_get_record_id_begin(&pos))
		return;
	buf = kvmalloc(size, GFP_KERNEL);
	while (buf && !erst_get_record_id_next(&pos, &id) && id != APEI_ERST_INVALID_RECORD_ID) {
		len = erst_read_record(id, buf, size, 0, NULL);
		if (len > (ssize_t)size && len <= ERST_RECORD_MAX) {
			kvfree(buf);
			size = len;
			buf = kvmalloc(size, GFP_KERNEL);
			if (!buf)
				break;
			len = erst_read_record(id, buf, size, 0, NULL);
		}
		if (len > 0 && len <= (ssize_t)size)
			report_record(buf, len, id);
		cond_resched();
	}
	erst_get_record_id_end();
	kvfree(buf);
}

/* Bytes that the block at @b takes, 0 if it is none, or not wholly within @left. */
static u32 block_len(const struct acpi_hest_generic_status *b, u32 left)
{
	u64 len = sizeof(*b) + (u64)b->data_length;
	const void *at = b + 1;
	u64 rest;

	if (!b->data_length || b->error_severity > CPER_SEV_INFORMATIONAL)
		return 0;
	if (b->raw_data_length) {
		if (b->raw_data_offset < len)
			return 0;
		len = (u64)b->raw_data_offset + b->raw_data_length;
	}
	if (len > left)
		return 0;
	for (rest = b->data_length; rest;) {
		const struct acpi_hest_generic_data *g = at;
		u64 size = sizeof(*g);

		if (rest >= size)
			size = acpi_hest_get_size((void *)g) + (u64)g->error_data_length;
		if (rest < size)
			return 0;
		at += size;
		rest -= size;
	}
	return len;
}

static void report_block(const struct acpi_hest_generic_status *b)
{
	const void *at = b + 1;

	while (at < (const void *)(b + 1) + b->data_length) {
		struct acpi_hest_generic_data *g = (void *)at;
		struct acpi_hest_generic_data_v300 *v3 = (void *)at;
		struct hwerr_lastboot from = { .store = "BERT" };
		guid_t type, fru;

		import_guid(&type, g->section_type);
		import_guid(&fru, g->fru_id);
		if (acpi_hest_get_version(g) >= 3 &&
		    (g->validation_bits & ACPI_HEST_GEN_VALID_TIMESTAMP))
			from.time = cper_time(v3->time_stamp);
		hwerr_cper_lastboot(&from, &type,
				    g->validation_bits & ACPI_HEST_GEN_VALID_FRU_ID ? &fru : NULL,
				    g->validation_bits & ACPI_HEST_GEN_VALID_FRU_STRING ?
				    (const char *)g->fru_text : NULL,
				    acpi_hest_get_payload(g), g->error_data_length,
				    g->error_severity);
		at += acpi_hest_get_size(g) + g->error_data_length;
	}
}

/*
 * The kernel has zeroed the status of each block that it printed, so that is not
 * looked at; the rest of the region is as firmware left it.
 */
static void report_bert(void)
{
	struct acpi_table_header *table;
	u32 len = 0, at = 0, n;
	u64 address = 0;
	void *region, *copy;

	if (ACPI_FAILURE(acpi_get_table(ACPI_SIG_BERT, 0, &table)))
		return;
	if (table->length >= sizeof(struct acpi_table_bert)) {
		address = ((struct acpi_table_bert *)table)->address;
		len = min_t(u32, ((struct acpi_table_bert *)table)->region_length, REGION_MAX);
	}
	acpi_put_table(table);
	if (!len)
		return;
	region = memremap(address, len, MEMREMAP_WB);
	if (!region)
		return;
	/* Firmware may write there: what is checked must be what is read. */
	copy = kvmalloc(len, GFP_KERNEL);
	if (copy)
		memcpy(copy, region, len);
	memunmap(region);
	while (copy && len - at >= sizeof(struct acpi_hest_generic_status)) {
		n = block_len(copy + at, len - at);
		if (!n)
			break;
		report_block(copy + at);
		at += n;
	}
	kvfree(copy);
}

void hwerr_lastboot_report(void)
{
	report_erst();
	report_bert();
}
