// SPDX-License-Identifier: MIT
/*
 * What a program has to do to find a page frame's owner without hwerr: read the
 * process's pagemap until it is there. Prints ns.
 *
 *	scan PID PFN		PFN as /proc/PID/pagemap has it, any base
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define PFN_BITS	((1ull << 55) - 1)
#define PRESENT		(1ull << 63)
#define CHUNK		65536

static uint64_t entries[CHUNK];

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* Whether one of the pages in [at, end) has that frame. */
static int scan(int fd, uint64_t at, uint64_t end, uint64_t pfn)
{
	while (at < end) {
		size_t want = end - at < CHUNK ? end - at : CHUNK, i;
		ssize_t got = pread(fd, entries, want * 8, at * 8);

		if (got <= 0)
			return 0;
		for (i = 0; i < (size_t)got / 8; i++)
			if (entries[i] & PRESENT && (entries[i] & PFN_BITS) == pfn)
				return 1;
		at += got / 8;
	}
	return 0;
}

int main(int argc, char **argv)
{
	char path[64], line[512];
	uint64_t start, first, end, pfn;
	FILE *maps;
	int fd;

	if (argc != 3)
		return fprintf(stderr, "usage: scan PID PFN\n"), 2;
	pfn = strtoull(argv[2], NULL, 0);
	start = now();
	snprintf(path, sizeof(path), "/proc/%s/maps", argv[1]);
	maps = fopen(path, "r");
	snprintf(path, sizeof(path), "/proc/%s/pagemap", argv[1]);
	fd = open(path, O_RDONLY);
	if (!maps || fd < 0)
		return perror(path), 1;
	while (fgets(line, sizeof(line), maps)) {
		if (sscanf(line, "%lx-%lx", &first, &end) != 2 || first >> 63)
			continue;
		if (scan(fd, first / 4096, end / 4096, pfn)) {
			printf("%llu\n", (unsigned long long)(now() - start));
			return 0;
		}
	}
	fprintf(stderr, "scan: process %s does not map frame %s\n", argv[1], argv[2]);
	return 1;
}
