// SPDX-License-Identifier: MIT
/*
 * Readers in a storm: each is a process that polls and reads until the storm is over
 * and all is read, and accounts for every record.
 *
 *	storm READERS FILE LINE		writes LINE to FILE, which is the storm; prints
 *					[[read, lost, uncorrected, CPU ns], ...]
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../../kmod/uapi/hwerr.h"

struct tally { uint64_t read, lost, uncorrected, cpu; };

static void die(const char *what)
{
	perror(what);
	exit(1);
}

/* @over is at its end when the storm is over. */
static struct tally reader(int ready, int over)
{
	struct hwerr_ioc_filter filter = { .sources = 1ull << HWERR_SRC_EDAC };
	static char buf[16 * HWERR_RECORD_MAX];
	struct hwerr_ioc_stats stats;
	struct tally t = { 0 };
	struct pollfd p[2] = { { .events = POLLIN }, { .fd = over, .events = POLLIN } };
	struct timespec cpu;
	int fd = open("/dev/hwerr", O_RDONLY | O_NONBLOCK);
	ssize_t n, at;

	if (fd < 0 || ioctl(fd, HWERR_IOC_SET_FILTER, &filter))
		die("/dev/hwerr");
	p[0].fd = fd;
	if (write(ready, "r", 1) != 1)
		die("pipe");
	for (;;) {
		if (poll(p, 2, -1) < 0)
			die("poll");
		n = read(fd, buf, sizeof(buf));
		if (n < 0 && !(p[0].revents & POLLIN)) {
			/* Nothing to read, after what ended the wait: the end. */
			break;
		}
		for (at = 0; at < n; ) {
			const struct hwerr_record *rec = (void *)(buf + at);

			t.read++;
			t.lost += rec->lost;
			t.uncorrected += rec->severity > HWERR_SEV_CORRECTED;
			at += rec->len;
		}
	}
	if (ioctl(fd, HWERR_IOC_STATS, &stats))
		die("stats");
	t.lost += stats.reader_pending;
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu);
	t.cpu = cpu.tv_sec * 1000000000ull + cpu.tv_nsec;
	return t;
}

int main(int argc, char **argv)
{
	int readers = argc == 4 ? atoi(argv[1]) : 0;
	int ready[2], over[2], result[2], file, i;
	struct tally t;
	char c;

	if (readers < 1)
		return fprintf(stderr, "usage: storm READERS FILE LINE\n"), 2;
	file = open(argv[2], O_WRONLY);
	if (file < 0)
		die(argv[2]);
	if (pipe(ready) || pipe(over) || pipe(result))
		die("pipe");
	for (i = 0; i < readers; i++) {
		pid_t pid = fork();

		if (pid < 0)
			die("fork");
		if (!pid) {
			close(over[1]);
			t = reader(ready[1], over[0]);
			return write(result[1], &t, sizeof(t)) != sizeof(t);
		}
	}
	for (i = 0; i < readers; i++)
		if (read(ready[0], &c, 1) != 1)
			die("reader");
	if (write(file, argv[3], strlen(argv[3])) < 0)
		die(argv[2]);
	close(over[1]);
	for (i = 0; i < readers; i++) {
		int status;

		if (wait(&status) < 0 || status)
			return fprintf(stderr, "storm: a reader failed\n"), 1;
		if (read(result[0], &t, sizeof(t)) != sizeof(t))
			die("result");
		printf("%s[%llu, %llu, %llu, %llu]", i ? ", " : "[", (unsigned long long)t.read,
		       (unsigned long long)t.lost, (unsigned long long)t.uncorrected,
		       (unsigned long long)t.cpu);
	}
	printf("]\n");
	return 0;
}
