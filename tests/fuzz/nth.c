// SPDX-License-Identifier: MIT
/*
 * Every call that allocates or copies, with its first, second, ... allocation or copy
 * failing, until there is none left to fail (/proc/PID/fail-nth; needs the debug kernel).
 *
 *	nth device		open, filter, write, read, poll, statistics, guard, stop
 *	nth module FILE N...	loads and unloads FILE with allocation N failing
 *	nth module-count FILE	says how many there are, roughly
 *
 * A call that fails says ENOMEM or EFAULT and has changed nothing; after each failure
 * the same call must do. Status 0, or 1 and a line.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../../kmod/uapi/hwerr.h"

#define MOST	20000

static int nth_fd, dev = -1, own_pidfd;
static char buf[65536] __attribute__((aligned(8)));

static void die(const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	fprintf(stderr, "nth: ");
	vfprintf(stderr, fmt, args);
	fputc('\n', stderr);
	exit(1);
}

static void arm(int n)
{
	char text[16];
	int len = snprintf(text, sizeof(text), "%d", n);

	/* It copies itself, and that may be what is to fail. */
	if (pwrite(nth_fd, text, len, 0) != len && pwrite(nth_fd, text, len, 0) != len)
		die("fail-nth: %s", strerror(errno));
}

/* Ends the failing; whether the call came as far as the allocation that was to fail. */
static int disarm(void)
{
	char text[16] = "";

	int left = pread(nth_fd, text, sizeof(text) - 1, 0) <= 0 ? 1 : atoi(text);

	arm(0);
	return !left;
}

static void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);

	if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text))
		die("%s: %s", path, strerror(errno));
	close(fd);
}

static void make_failing_possible(void)
{
	write_file("/sys/kernel/debug/failslab/ignore-gfp-wait", "N");
	write_file("/sys/kernel/debug/fail_page_alloc/ignore-gfp-wait", "N");
	write_file("/sys/kernel/debug/fail_page_alloc/ignore-gfp-highmem", "N");
	write_file("/sys/kernel/debug/fail_page_alloc/min-order", "0");
	/* Each failure with a stack would be all that the console says. */
	write_file("/sys/kernel/debug/failslab/verbose", "0");
	write_file("/sys/kernel/debug/fail_page_alloc/verbose", "0");
	write_file("/sys/kernel/debug/fail_usercopy/verbose", "0");
	nth_fd = open("/proc/thread-self/fail-nth", O_RDWR);
	if (nth_fd < 0)
		die("/proc/thread-self/fail-nth: %s", strerror(errno));
}

static long do_open(void)
{
	int fd = open("/dev/hwerr", O_RDWR | O_NONBLOCK);

	if (fd >= 0)
		close(fd);
	return fd;
}

static long do_filter(void)
{
	struct hwerr_ioc_filter f = { .tgid = getpid() };

	return ioctl(dev, HWERR_IOC_SET_FILTER, &f);
}

static long do_write(void)
{
	struct hwerr_record rec = {
		.len = sizeof(rec), .hdr_len = sizeof(rec), .version = HWERR_ABI_VERSION,
		.severity = HWERR_SEV_RECOVERABLE,
	};
	int i;

	for (i = 0; i < 100; i++)
		memcpy(buf + i * sizeof(rec), &rec, sizeof(rec));
	return write(dev, buf, 100 * sizeof(rec));
}

/* A read that fails leaves the records where they are. */
static long do_read(void)
{
	return read(dev, buf, sizeof(buf));
}

static long do_stats(void)
{
	struct hwerr_ioc_stats s;

	return ioctl(dev, HWERR_IOC_STATS, &s);
}

static long do_seek(void)
{
	struct hwerr_ioc_seek s = { .whence = HWERR_SEEK_OLDEST };

	return ioctl(dev, HWERR_IOC_SEEK, &s);
}

static long do_poll(void)
{
	struct pollfd p = { .fd = dev, .events = POLLIN };

	return poll(&p, 1, 0);
}

static long do_guard(void)
{
	struct hwerr_ioc_guard g = { .pidfd = own_pidfd, .severity = HWERR_SEV_FATAL };

	return ioctl(dev, HWERR_IOC_GUARD, &g);
}

/* That of a child is there. */
static long do_guards(void)
{
	static struct hwerr_guard_entry entry[16];
	struct hwerr_ioc_guards list = { .entries = (uintptr_t)entry, .count = 16 };

	return ioctl(dev, HWERR_IOC_GUARDS, &list);
}

static unsigned int count_guards(void)
{
	struct hwerr_ioc_guards list = { 0 };

	if (ioctl(dev, HWERR_IOC_GUARDS, &list))
		die("list of guards: %s", strerror(errno));
	return list.count;
}

/* Nobody here runs a guest: it gets as far as saying so. */
static long do_stop(void)
{
	struct hwerr_ioc_stop s = { .pidfd = own_pidfd };
	long ret = ioctl(dev, HWERR_IOC_STOP, &s);

	return ret < 0 && errno == ENXIO ? 0 : ret;
}

/* A process that waits to be killed, and is guarded. */
static void guard_a_child(void)
{
	struct hwerr_ioc_guard g = { .severity = HWERR_SEV_FATAL, .flags = HWERR_GUARD_KEEP };
	pid_t pid = fork();

	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		pause();
		_exit(0);
	}
	if (pid < 0)
		die("fork: %s", strerror(errno));
	g.pidfd = syscall(SYS_pidfd_open, pid, 0);
	if (ioctl(dev, HWERR_IOC_GUARD, &g))
		die("guard of a child: %s", strerror(errno));
	close(g.pidfd);
}

/* What the call before it left behind is taken back, and a record is there to be read. */
static void prepare(void)
{
	struct hwerr_ioc_guard g = { .pidfd = own_pidfd, .flags = HWERR_GUARD_REMOVE };
	struct hwerr_ioc_filter f = { 0 };

	if (ioctl(dev, HWERR_IOC_GUARD, &g) && errno != ENOENT)
		die("disarming: %s", strerror(errno));
	if (ioctl(dev, HWERR_IOC_SET_FILTER, &f) || do_write() < 0 || do_seek())
		die("between two calls: %s", strerror(errno));
}

static const struct {
	const char *name;
	long (*call)(void);
} op[] = {
	{ "open", do_open }, { "filter", do_filter }, { "write", do_write }, { "seek", do_seek },
	{ "read", do_read }, { "stats", do_stats }, { "poll", do_poll },
	{ "guard", do_guard }, { "guards", do_guards }, { "stop", do_stop },
};

static void device(void)
{
	unsigned int i;
	int n, failed;

	dev = open("/dev/hwerr", O_RDWR | O_NONBLOCK);
	if (dev < 0)
		die("/dev/hwerr: %s", strerror(errno));
	own_pidfd = syscall(SYS_pidfd_open, getpid(), 0);
	guard_a_child();
	for (i = 0; i < sizeof(op) / sizeof(*op); i++) {
		failed = 0;
		for (n = 1;; n++) {
			long ret;
			int err, hit;

			if (n == MOST)
				die("%s: no end", op[i].name);
			prepare();
			arm(n);
			ret = op[i].call();
			err = errno;
			hit = disarm();
			if (ret < 0 && err != ENOMEM && err != EFAULT)
				die("%s: allocation %d failed, and it says %s", op[i].name, n,
				    strerror(err));
			failed += ret < 0;
			if (ret < 0 && op[i].call == do_guard && count_guards() != 1)
				die("a guard that was refused is there");
			if (ret < 0 && op[i].call() < 0)
				die("%s: does not recover: %s", op[i].name, strerror(errno));
			if (!hit)
				break;
		}
		printf("%-8s %d failing places, %d told\n", op[i].name, n - 1, failed);
	}
}

static int load(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC), ret;

	if (fd < 0)
		die("%s: %s", path, strerror(errno));
	ret = syscall(SYS_finit_module, fd, "", 0);
	close(fd);
	return ret;
}

static void unload(void)
{
	if (syscall(SYS_delete_module, "hwerr", O_NONBLOCK))
		die("delete_module: %s", strerror(errno));
}

/* Loads with allocation @n failing; whether there was one. The module ends up unloaded. */
static int module(const char *path, int n)
{
	int ret, err, hit, fd;

	fd = open(path, O_RDONLY | O_CLOEXEC);
	arm(n);
	ret = syscall(SYS_finit_module, fd, "", 0);
	err = errno;
	hit = disarm();
	close(fd);
	if (ret && !hit)
		die("loading with nothing failing: %s", strerror(err));
	printf("%d: %s\n", n, ret ? strerror(err) : "loaded");
	if (!ret)
		unload();
	if (access("/dev/hwerr", F_OK) == 0)
		die("failure %d: /dev/hwerr stayed", n);
	return hit;
}

int main(int argc, char **argv)
{
	int i, n;

	setvbuf(stdout, NULL, _IOLBF, 0);
	make_failing_possible();
	if (argc == 2 && !strcmp(argv[1], "device")) {
		device();
	} else if (argc >= 4 && !strcmp(argv[1], "module")) {
		for (i = 3; i < argc; i++)
			module(argv[2], atoi(argv[i]));
		if (load(argv[2]))
			die("loading afterwards: %s", strerror(errno));
	} else if (argc == 3 && !strcmp(argv[1], "module-count")) {
		for (n = 64; n < MOST && module(argv[2], n); n *= 2)
			;
		printf("count %d\n", n);
	} else {
		return 64;
	}
	return 0;
}
