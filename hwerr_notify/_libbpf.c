// SPDX-License-Identifier: MIT
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/timerfd.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>
#include <linux/magic.h>
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <linux/types.h>
#include "seal.h"
#include "probe.h"
#include "hardware.h"

/* What libbpf says goes into the exception, not to somebody's terminal. */
static char said[1 << 16];

static int keep(enum libbpf_print_level level, const char *format, va_list args)
{
	size_t used = strlen(said);

	if (level != LIBBPF_WARN || used + 1 >= sizeof(said))
		return 0;
	return vsnprintf(said + used, sizeof(said) - used, format, args);
}

static void hwerr_libbpf_quiet(void)
{
	libbpf_set_print(keep);
}

/* What it said since the last call; valid until libbpf is called again. */
static const char *hwerr_libbpf_said(void)
{
	static char copy[sizeof(said)];

	memcpy(copy, said, sizeof(copy));
	said[0] = 0;
	return copy;
}

static bool hwerr_is_bpf_fs(const char *path)
{
	struct statfs fs;

	return statfs(path, &fs) == 0 && fs.f_type == BPF_FS_MAGIC;
}

/* Type, key size, value size, entries. */
static int hwerr_map_shape(int fd, uint32_t *shape)
{
	struct bpf_map_info info = {};
	uint32_t len = sizeof(info);
	int err = bpf_obj_get_info_by_fd(fd, &info, &len);

	shape[0] = info.type;
	shape[1] = info.key_size;
	shape[2] = info.value_size;
	shape[3] = info.max_entries;
	return err;
}

static int hwerr_ring_sample(void *ctx, void *data, size_t size);

static struct ring_buffer *hwerr_ring_new(int map_fd, void *ctx)
{
	return ring_buffer__new(map_fd, hwerr_ring_sample, ctx, NULL);
}

/* Calls of a program that were left out because it ran on that CPU already. */
static int64_t hwerr_program_misses(int fd)
{
	struct bpf_prog_info info = {};
	uint32_t len = sizeof(info);

	if (bpf_obj_get_info_by_fd(fd, &info, &len))
		return -1;
	return info.recursion_misses;
}

/* The program that a pinned link runs, as a file descriptor; -1 and errno. */
static int hwerr_link_program(const char *path)
{
	struct bpf_link_info info = {};
	uint32_t len = sizeof(info);
	int link = bpf_obj_get(path);
	int program = -1, err;

	if (link < 0)
		return -1;
	if (!bpf_obj_get_info_by_fd(link, &info, &len))
		program = bpf_prog_get_fd_by_id(info.prog_id);
	err = errno;
	close(link);
	errno = err;
	return program;
}

/* A timer of CLOCK_MONOTONIC; readable from the time it was set to. */
static int hwerr_timer_new(void)
{
	return timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
}

/* 0 disarms it. */
static int hwerr_timer_set(int fd, uint64_t ns)
{
	struct itimerspec when = {
		.it_value = { .tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000 },
	};

	return timerfd_settime(fd, TFD_TIMER_ABSTIME, &when, NULL);
}
