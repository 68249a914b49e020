// SPDX-License-Identifier: MIT
/*
 * From an injection to what a consumer makes visible of it.
 *
 *	visible FD [DIRECTORY]
 *
 * reads from standard input one injection a line, with tabs in between,
 *
 *	MARK MILLISECONDS PATH HEX
 *
 * writes the bytes HEX to PATH, in a thread of its own, because the kernel may log
 * in the meantime, and answers on standard output with a line of JSON:
 *
 *	{"line": ns or null, "row": ns or null}
 *
 * The line "flush" has it print what FD said since, and answer with an empty object.
 *
 * `line` is from just before that write until a line with MARK in it came out of FD, a
 * pipe or a socket; `row` until a transaction of an SQLite database in DIRECTORY was
 * committed, which is when its journal is deleted. The answer comes when there is a line,
 * or after so many milliseconds. What came out of FD goes to standard error, between
 * the injections.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <time.h>
#include <unistd.h>

static struct {
	char path[PATH_MAX], data[4096];
	size_t len;
	int go, done;		/* eventfds */
	uint64_t start;
	int error;
} shot;

static char said[1 << 20];	/* by FD, since the last injection */
static size_t have;

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void die(const char *what)
{
	fprintf(stderr, "visible: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void wait_for(int event)
{
	uint64_t n;

	if (read(event, &n, sizeof(n)) != sizeof(n))
		die("eventfd");
}

static void post(int event)
{
	uint64_t n = 1;

	if (write(event, &n, sizeof(n)) != sizeof(n))
		die("eventfd");
}

static void *injector(void *arg)
{
	for (;;) {
		int fd;

		wait_for(shot.go);
		shot.error = 0;
		fd = open(shot.path, O_WRONLY | O_CLOEXEC);
		shot.start = now();
		if (fd < 0 || write(fd, shot.data, shot.len) != (ssize_t)shot.len)
			shot.error = errno;
		if (fd >= 0)
			close(fd);
		post(shot.done);
	}
	return arg;
}

/* Whether what @fd says now completes a line with @mark. End of file ends the program. */
static bool hear(int fd, const char *mark)
{
	ssize_t n = read(fd, said + have, sizeof(said) - 1 - have);
	char *end;
	bool found;

	if (n <= 0) {
		if (n < 0 && errno == EAGAIN)
			return false;
		fprintf(stderr, "visible: the consumer is gone\n");
		exit(1);
	}
	have += n;
	said[have] = '\0';
	end = memrchr(said, '\n', have);
	if (!end)
		return false;
	*end = '\0';
	found = strstr(said, mark);
	*end = '\n';
	return found;
}

/* Whether an SQLite journal was deleted. */
static bool committed(int watch)
{
	union {
		struct inotify_event event;
		char bytes[4096];
	} buf;
	ssize_t n, at;
	bool yes = false;

	while ((n = read(watch, &buf, sizeof(buf))) > 0)
		for (at = 0; at < n;) {
			const struct inotify_event *event = (const void *)&buf.bytes[at];

			yes |= event->len && strstr(event->name, "-journal");
			at += sizeof(*event) + event->len;
		}
	return yes;
}

static void forget(int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };

	/* What came late belongs to nobody. */
	while (poll(&p, 1, 0) > 0 && have < sizeof(said) - 4096)
		hear(fd, "\n\n");
	if (write(STDERR_FILENO, said, have) < 0)
		die("standard error");
	have = 0;
}

static void print(const char *name, uint64_t at, const char *end)
{
	if (at)
		printf("\"%s\": %llu%s", name, (unsigned long long)(at - shot.start), end);
	else
		printf("\"%s\": null%s", name, end);
}

static void inject(int fd, int watch, const char *mark, int timeout)
{
	uint64_t deadline = now() + timeout * 1000000ull, line = 0, row = 0;
	bool fired = false;

	forget(fd);
	if (watch >= 0)
		committed(watch);
	post(shot.go);
	while (!line || !fired) {
		struct pollfd p[] = {
			{ .fd = fd, .events = POLLIN },
			{ .fd = shot.done, .events = POLLIN },
			{ .fd = watch, .events = POLLIN },
		};
		uint64_t t = now();
		int left;

		if (t >= deadline && fired)
			break;
		/* An injection is always waited for. */
		left = -1;
		if (t < deadline)
			left = (deadline - t) / 1000000 + 1;
		if (poll(p, 3, left) < 0)
			die("poll");
		t = now();
		if (p[2].revents && committed(watch) && !row)
			row = t;
		if (p[0].revents && have < sizeof(said) - 1 && hear(fd, mark) && !line)
			line = t;
		if (p[1].revents) {
			wait_for(shot.done);
			fired = true;
			if (shot.error) {
				errno = shot.error;
				die(shot.path);
			}
		}
	}
	printf("{");
	print("line", line, ", ");
	print("row", row, "}\n");
	fflush(stdout);
}

static size_t from_hex(const char *hex, char *out)
{
	size_t n = 0;
	unsigned int byte;

	for (; sscanf(hex, "%2x", &byte) == 1; hex += 2)
		out[n++] = byte;
	return n;
}

int main(int argc, char **argv)
{
	char line[16384], mark[256], hex[8192];
	int fd = argc >= 2 ? atoi(argv[1]) : -1, watch = -1, timeout;
	const char *format = "%255[^\t]\t%d\t%4095[^\t]\t%8191s";
	pthread_t t;

	if (fd < 3 || argc > 3) {
		fprintf(stderr, "usage: visible FD [DIRECTORY]\n");
		return 2;
	}
	if (argc == 3) {
		watch = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
		if (watch < 0 || inotify_add_watch(watch, argv[2], IN_DELETE) < 0)
			die(argv[2]);
	}
	shot.go = eventfd(0, EFD_CLOEXEC);
	shot.done = eventfd(0, EFD_CLOEXEC);
	if (shot.go < 0 || shot.done < 0 || pthread_create(&t, NULL, injector, NULL))
		die("thread");
	while (fgets(line, sizeof(line), stdin)) {
		if (!strcmp(line, "flush\n")) {
			forget(fd);
			printf("{}\n");
			fflush(stdout);
			continue;
		}
		if (sscanf(line, format, mark, &timeout, shot.path, hex) != 4) {
			fprintf(stderr, "visible: cannot read: %s", line);
			return 2;
		}
		shot.len = from_hex(hex, shot.data);
		inject(fd, watch, mark, timeout);
	}
	forget(fd);
	return 0;
}
