/* SPDX-License-Identifier: GPL-2.0-only */
/* What the seal and its loader share. */
#ifndef HWERR_BPF_SEAL_H
#define HWERR_BPF_SEAL_H

#define HWERR_SEALS_MAX 4096
#define HWERR_KEPT_OUT_MAX 65536

/* Inodes of no file (device 0): where refusals of what has none are counted. */
#define HWERR_KEPT_OUT_DEVICES 0
#define HWERR_KEPT_OUT_SOCKETS 1

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

/**
 * struct hwerr_kept_out - a file that a sealed process neither opens nor writes
 *	to nor locks any more, key of the map "hwerr_kept_out"
 * @tgid: as above
 * @dev: device of its file system as the kernel numbers it, major << 20 | minor;
 *	the third field of /proc/PID/mountinfo, which stat(2) does not always give
 * @ino: its inode
 *
 * The value, 64 bits, is how often it was refused. With @dev 0 it is
 * an entry of the process itself, of which there is one for each HWERR_KEPT_OUT_*.
 */
struct hwerr_kept_out {
	unsigned int tgid;
	unsigned int dev;
	unsigned long long ino;
};

#endif
