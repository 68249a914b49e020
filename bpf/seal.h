/* SPDX-License-Identifier: GPL-2.0-only */
/* What the seal and its loader share. */
#ifndef HWERR_BPF_SEAL_H
#define HWERR_BPF_SEAL_H

#define HWERR_SEALS_MAX 4096

/**
 * struct hwerr_seal - one sealed process, value of the map "hwerr_seals"
 * @start_ns: when it started (CLOCK_BOOTTIME), its identity together with the
 *	key; compared in units of 10 ms, which is what /proc/PID/stat gives
 * @refusals: calls of KVM_RUN that were refused
 *
 * The key is the process number in the initial PID namespace, 32 bits.
 */
struct hwerr_seal {
	unsigned long long start_ns;
	unsigned long long refusals;
};

#endif
