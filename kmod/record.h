/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _HWERR_RECORD_H
#define _HWERR_RECORD_H

struct hwerr_record;

/* Publishes a checked record of a program, from user space or BPF; any context but NMI. */
void hwerr_publish_user(struct hwerr_record *rec);

#endif /* _HWERR_RECORD_H */
