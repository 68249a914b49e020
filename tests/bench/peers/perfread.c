// SPDX-License-Identifier: MIT
/*
 * The least that a program can do to be told of tracepoints by perf_event_open(2): a ring
 * for each CPU, of perf record's default size, a wake-up for each event, and a line for it:
 *
 *	perfread GROUP/EVENT...
 *
 * prints SECONDS.NANOSECONDS [CPU] EVENT: and the record in hexadecimal,
 * and "LOST n" for what the kernel counted as lost.
 */
#define _GNU_SOURCE
#include <linux/perf_event.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGES 128
#define MAX_CPUS 64
#define MAX_EVENTS 16

static struct perf_event_mmap_page *ring[MAX_CPUS];
static struct { unsigned int id; const char *name; } known[MAX_EVENTS];
static size_t page, data_size;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static unsigned int tracepoint(const char *name)
{
	char path[256];
	unsigned int id;
	FILE *f;

	snprintf(path, sizeof(path), "/sys/kernel/tracing/events/%s/id", name);
	f = fopen(path, "r");
	if (!f || fscanf(f, "%u", &id) != 1)
		die(path);
	fclose(f);
	return id;
}

static int open_event(unsigned int id, int cpu)
{
	struct perf_event_attr attr = {
		.type = PERF_TYPE_TRACEPOINT, .size = sizeof(attr), .config = id,
		.sample_period = 1, .sample_type = PERF_SAMPLE_TIME | PERF_SAMPLE_RAW,
		.wakeup_events = 1, .use_clockid = 1, .clockid = CLOCK_MONOTONIC,
	};
	int fd = syscall(SYS_perf_event_open, &attr, -1, cpu, -1, PERF_FLAG_FD_CLOEXEC);

	if (fd < 0)
		die("perf_event_open");
	return fd;
}

/* A record may go over the end of the ring: copy it out. */
static void take(int cpu, uint64_t at, void *to, size_t n)
{
	const char *base = (const char *)ring[cpu] + page;
	size_t first = data_size - at % data_size;

	if (first > n)
		first = n;
	memcpy(to, base + at % data_size, first);
	memcpy((char *)to + first, base, n - first);
}

static void sample(int cpu, const char *body)
{
	uint64_t time;
	uint32_t size, i;
	uint16_t id;

	memcpy(&time, body, 8);
	memcpy(&size, body + 8, 4);
	memcpy(&id, body + 12, 2);
	for (i = 0; known[i].name && known[i].id != id; i++)
		;
	printf("%llu.%09llu [%d] %s: ", (unsigned long long)(time / 1000000000),
	       (unsigned long long)(time % 1000000000), cpu, known[i].name ?: "?");
	for (i = 0; i < size; i++)
		printf("%02x", (unsigned char)body[12 + i]);
	printf("\n");
}

static void drain(int cpu)
{
	uint64_t head = __atomic_load_n(&ring[cpu]->data_head, __ATOMIC_ACQUIRE);
	uint64_t tail = ring[cpu]->data_tail;
	static char buf[65536];

	while (tail != head) {
		struct perf_event_header h;
		uint64_t lost;

		take(cpu, tail, &h, sizeof(h));
		take(cpu, tail + sizeof(h), buf, h.size - sizeof(h));
		if (h.type == PERF_RECORD_SAMPLE) {
			sample(cpu, buf);
		} else if (h.type == PERF_RECORD_LOST) {
			memcpy(&lost, buf + 8, 8);
			printf("LOST %llu\n", (unsigned long long)lost);
		}
		tail += h.size;
		__atomic_store_n(&ring[cpu]->data_tail, tail, __ATOMIC_RELEASE);
	}
	fflush(stdout);
}

int main(int argc, char **argv)
{
	int cpus = sysconf(_SC_NPROCESSORS_ONLN), cpu, i;
	struct pollfd p[MAX_CPUS];

	if (argc < 2 || argc > MAX_EVENTS || cpus > MAX_CPUS) {
		fprintf(stderr, "usage: perfread GROUP/EVENT...\n");
		return 2;
	}
	page = sysconf(_SC_PAGESIZE);
	data_size = PAGES * page;
	for (i = 1; i < argc; i++) {
		known[i - 1].id = tracepoint(argv[i]);
		known[i - 1].name = strrchr(argv[i], '/') + 1;
	}
	for (cpu = 0; cpu < cpus; cpu++) {
		int first = open_event(known[0].id, cpu);

		ring[cpu] = mmap(NULL, page + data_size, PROT_READ | PROT_WRITE, MAP_SHARED,
				 first, 0);
		if (ring[cpu] == MAP_FAILED)
			die("mmap");
		for (i = 1; i < argc - 1; i++)
			if (ioctl(open_event(known[i].id, cpu), PERF_EVENT_IOC_SET_OUTPUT, first))
				die("PERF_EVENT_IOC_SET_OUTPUT");
		p[cpu] = (struct pollfd){ .fd = first, .events = POLLIN };
	}
	fprintf(stderr, "ready\n");
	while (poll(p, cpus, -1) > 0)
		for (cpu = 0; cpu < cpus; cpu++)
			if (p[cpu].revents & POLLIN)
				drain(cpu);
	die("poll");
	return 1;
}
