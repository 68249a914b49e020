// SPDX-License-Identifier: MIT
/*
 * From one thread's write to another's return from poll() and read(): eventfd and
 * /dev/hwerr by turns, so that the machine's mood hits both.
 *
 *	latency ROUNDS		prints {"eventfd": [p50, p99], "hwerr": [p50, p99]} in ns
 *
 * The reader is known to sleep in poll() before the writer begins: it says so
 * through a pipe, and the writer then waits for its state to be 'S'.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "../../kmod/uapi/hwerr.h"

enum { EVENTFD, HWERR };

static int fds[2], go[2], rounds;
static uint64_t *took[2];
static volatile uint64_t sent;
static pid_t reader_tid;
static int state_fd;

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

/* Each on a CPU of its own: else the one who waits for the other keeps it from running. */
static void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		die("needs CPUs 0 and 1");
}

static void *reader(void *arg)
{
	char buf[HWERR_RECORD_MAX];
	int i;

	(void)arg;
	pin(1);
	reader_tid = syscall(SYS_gettid);
	for (i = 0; i < 2 * rounds; i++) {
		int which = i & 1;
		struct pollfd p = { .fd = fds[which], .events = POLLIN };

		if (write(go[1], "g", 1) != 1 || poll(&p, 1, -1) != 1 ||
		    read(p.fd, buf, which == EVENTFD ? 8 : sizeof(buf)) <= 0)
			die("reader");
		took[which][i / 2] = now() - sent;
	}
	return NULL;
}

/* The reader's kernel state, from the field after its name. */
static char reader_state(void)
{
	char line[256] = { 0 }, *p;

	if (pread(state_fd, line, sizeof(line) - 1, 0) <= 0)
		die("reader's stat");
	p = strrchr(line, ')');
	return p ? p[2] : '?';
}

static int by_size(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

int main(int argc, char **argv)
{
	struct { struct hwerr_record rec; } m = { 0 };
	uint64_t one = 1;
	char path[64], c;
	pthread_t t;
	int i;

	rounds = argc > 1 ? atoi(argv[1]) : 2000;
	if (rounds < 10)
		return fprintf(stderr, "usage: latency ROUNDS (at least 10)\n"), 2;
	took[0] = calloc(rounds, 8);
	took[1] = calloc(rounds, 8);
	fds[EVENTFD] = eventfd(0, 0);
	fds[HWERR] = open("/dev/hwerr", O_RDWR);
	if (fds[HWERR] < 0 || pipe(go))
		die("/dev/hwerr");
	m.rec.hdr_len = sizeof(m.rec);
	m.rec.len = m.rec.hdr_len;
	m.rec.version = HWERR_ABI_VERSION;
	m.rec.severity = HWERR_SEV_FATAL;
	m.rec.source = HWERR_SRC_USER;
	pin(0);
	pthread_create(&t, NULL, reader, NULL);
	for (i = 0; i < 2 * rounds; i++) {
		if (read(go[0], &c, 1) != 1)
			die("pipe");
		if (!i) {
			snprintf(path, sizeof(path), "/proc/self/task/%d/stat", reader_tid);
			state_fd = open(path, O_RDONLY);
		}
		while (reader_state() != 'S')
			sched_yield();
		sent = now();
		if (i & 1 ? write(fds[HWERR], &m, sizeof(m)) != sizeof(m) :
			    write(fds[EVENTFD], &one, 8) != 8)
			die("write");
	}
	pthread_join(t, NULL);
	for (i = 0; i < 2; i++)
		qsort(took[i], rounds, 8, by_size);
	printf("{\"eventfd\": [%llu, %llu], \"hwerr\": [%llu, %llu]}\n",
	       (unsigned long long)took[0][rounds / 2],
	       (unsigned long long)took[0][rounds * 99 / 100],
	       (unsigned long long)took[1][rounds / 2],
	       (unsigned long long)took[1][rounds * 99 / 100]);
	return 0;
}
