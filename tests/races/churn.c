// SPDX-License-Identifier: MIT
/*
 * Families of processes that do to their memory whatever moves it, and a log of
 * who had what when, for tests/vm/test_races.py.
 *
 *	churn LOG KIND...		until stdin ends
 *
 * Each KIND (anon thp shared private huge ksm) is a family: a keeper that maps a
 * region and keeps it, and its descendants, who inherit the region, write to it, split,
 * move, page out, collapse and unmap it, fork, execute another program, and exit.
 *
 * LOG is a file of claims. A claim says of one process and one range of
 * addresses: from may_begin to may_end it can have been mapped, and from
 * must_begin to must_end it was, with the frames that the keeper has. Times are
 * CLOCK_MONOTONIC, taken on the far side of what they tell of, so that
 * outside [may_begin, may_end] nothing of the range can have belonged to the
 * process. 0 is not yet.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_COLD
#define MADV_COLD	20
#define MADV_PAGEOUT	21
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE	25
#endif

#define PAGE		4096UL
#define HUGE		(2UL << 20)
#define CLAIMS		1048576U
#define CHILDREN	3
#define OWN		16

struct claim {
	_Atomic uint32_t pid;
	uint32_t family;
	uint64_t va;
	uint64_t len;
	_Atomic uint64_t may_begin, must_begin, must_end, may_end;
	uint64_t keeper;
};

struct log {
	_Atomic uint32_t used;
	uint32_t pad;
	_Atomic uint64_t fork_failed;
	uint64_t rest[6];
	struct claim claim[CLAIMS];
};

/* What a child leaves its parent to close; in shared memory. */
struct life {
	_Atomic uint32_t n;
	uint32_t own[OWN];
};

static struct log *log_;
static struct life *lives;
static uint32_t family;
static char *region;
static size_t len;
static int is_huge;
static unsigned int seed;
static const char *self, *log_path;

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

static unsigned int rnd(unsigned int n)
{
	return rand_r(&seed) % n;
}

static void die(const char *what)
{
	fprintf(stderr, "churn: %s: %s\n", what, strerror(errno));
	kill(0, SIGTERM);
	exit(1);
}

static void open_log(const char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);

	if (fd < 0)
		die(path);
	log_ = mmap(NULL, sizeof(*log_), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (log_ == MAP_FAILED)
		die("mmap of the log");
	close(fd);
}

static struct claim *claim_new(void *va, uint32_t pid, struct life *life)
{
	uint32_t i = atomic_fetch_add(&log_->used, 1);
	struct claim *c;

	if (i >= CLAIMS) {
		/* The test sees it in the count. */
		pause();
	}
	c = &log_->claim[i];
	c->family = family;
	c->va = (uint64_t)va;
	c->len = len;
	c->pid = pid;
	if (life && life->n < OWN) {
		life->own[life->n] = i;
		atomic_fetch_add(&life->n, 1);
	}
	c->may_begin = now();
	return c;
}

static void ends(_Atomic uint64_t *when)
{
	if (!*when)
		*when = now();
}

static void nap(void)
{
	struct timespec t = { 0, rnd(2000) * 1000 };

	nanosleep(&t, NULL);
}

/* The region at another address; its claim. */
static struct claim *move(struct claim *c, struct life *life)
{
	void *to = mmap(NULL, len + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
			-1, 0);
	int whole = c->must_begin && !c->must_end;
	struct claim *n;
	char *goal;

	if (to == MAP_FAILED)
		return c;
	goal = (char *)(((uintptr_t)to + HUGE - 1) & ~(HUGE - 1));
	n = claim_new(goal, getpid(), life);
	ends(&c->must_end);
	if (mremap(region, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, goal) == MAP_FAILED) {
		/* Split areas cannot be moved at once: whatever happened, be vague. */
		n->may_end = now();
		return c;
	}
	c->may_end = now();
	region = goal;
	if (whole)
		n->must_begin = now();
	return n;
}

static void reap(pid_t pid, struct life *life)
{
	uint32_t i;

	if (waitpid(pid, NULL, 0) < 0)
		die("waitpid");
	for (i = 0; i < life->n && i < OWN; i++) {
		ends(&log_->claim[life->own[i]].must_end);
		ends(&log_->claim[life->own[i]].may_end);
	}
}

/* A child that has the address space until it executes another program. */
static void __attribute__((noinline)) borrow(void)
{
	pid_t pid = vfork();

	if (!pid) {
		execl(self, self, "--executed", log_path, "-1", NULL);
		_exit(1);
	}
	if (pid > 0)
		waitpid(pid, NULL, 0);
}

static void live(struct claim *c, struct life *life, int depth);

static pid_t spawn(struct life *life, int depth)
{
	struct claim *c;
	pid_t pid;

	life->n = 0;
	c = claim_new(region, 0, life);
	pid = fork();
	if (pid < 0) {
		c->may_end = now();
		atomic_fetch_add(&log_->fork_failed, 1);
		return -1;
	}
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		c->pid = getpid();
		seed ^= getpid() * 2654435761U;
		live(c, life, depth);
		_exit(0);
	}
	c->pid = pid;
	return pid;
}

static void live(struct claim *c, struct life *life, int depth)
{
	int ops = 1 + rnd(5);
	size_t page = is_huge ? HUGE : PAGE;
	char at[32];
	pid_t pid;

	c->must_begin = now();
	while (ops--) {
		char *p = region + rnd(len / page) * page;

		switch (rnd(14)) {
		case 0:
			ends(&c->must_end);
			*(volatile char *)p = rnd(256);
			break;
		case 1:
			mprotect(p, page, PROT_READ);
			nap();
			mprotect(p, page, PROT_READ | PROT_WRITE);
			break;
		case 2:
			c = move(c, life);
			break;
		case 3:
			ends(&c->must_end);
			munmap(region, len);
			c->may_end = now();
			nap();
			return;
		case 4:
			ends(&c->must_end);
			madvise(p, page, MADV_DONTNEED);
			break;
		case 5:
			ends(&c->must_end);
			madvise(region, len, MADV_PAGEOUT);
			(void)*(volatile char *)p;
			break;
		case 6:
			ends(&c->must_end);
			madvise(region, len, MADV_COLLAPSE);
			break;
		case 7:
			ends(&c->must_end);
			snprintf(at, sizeof(at), "%td", c - log_->claim);
			execl(self, self, "--executed", log_path, at, NULL);
			die("exec");
			break;
		case 8:
			borrow();
			break;
		case 9:
			/* Two of a child's own; what they need to be closed is at lives[1...]. */
			if (depth < 2) {
				struct life *l = life + 1;

				pid = spawn(l, depth + 1);
				if (pid > 0)
					reap(pid, l);
			}
			break;
		case 10:
			madvise(region, len, MADV_COLD);
			break;
		default:
			(void)*(volatile char *)p;
			nap();
		}
	}
	ends(&c->must_end);
}

static void *map_region(const char *kind)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS, fd = -1;
	char *room, *va;

	len = 8 * PAGE;
	if (!strcmp(kind, "thp") || !strcmp(kind, "huge"))
		len = HUGE;
	is_huge = !strcmp(kind, "huge");
	if (!strcmp(kind, "shared") || !strcmp(kind, "private")) {
		fd = memfd_create("churn", 0);
		if (fd < 0 || ftruncate(fd, len))
			die("memfd");
		flags = *kind == 's' ? MAP_SHARED : MAP_PRIVATE;
	}
	room = mmap(NULL, len + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	va = (char *)(((uintptr_t)room + HUGE - 1) & ~(HUGE - 1));
	if (is_huge)
		flags |= MAP_HUGETLB;
	va = mmap(va, len, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0);
	if (va == MAP_FAILED)
		die(kind);
	if (!strcmp(kind, "thp"))
		madvise(va, len, MADV_HUGEPAGE);
	else if (!is_huge)
		madvise(va, len, MADV_NOHUGEPAGE);
	if (!strcmp(kind, "private")) {
		/* Page cache for now: nothing is written. */
		char buf[PAGE];
		size_t i;

		memset(buf, 0x77, sizeof(buf));
		for (i = 0; i < len; i += PAGE)
			if (pwrite(fd, buf, PAGE, i) != (ssize_t)PAGE)
				die("pwrite");
		for (i = 0; i < len; i += PAGE)
			(void)*(volatile char *)(va + i);
	} else {
		/* What is to be merged must be alike, and the rest must not be. */
		memset(va, strcmp(kind, "ksm") ? (int)(family * 16 + 1) : 0xEE, len);
		for (size_t i = 0; i < len && strcmp(kind, "ksm"); i += PAGE)
			*(uint64_t *)(va + i) = family << 20 | i;
	}
	if (!strcmp(kind, "ksm") && madvise(va, len, MADV_MERGEABLE))
		die("MADV_MERGEABLE");
	return va;
}

static void keep(const char *kind)
{
	struct life *mine;
	struct claim *c;
	pid_t child[CHILDREN] = { 0 };
	unsigned int n, i;

	seed = getpid();
	/* A child's descendants use what follows its own. */
	mine = mmap(NULL, 4 * CHILDREN * sizeof(*lives), PROT_READ | PROT_WRITE,
		    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (mine == MAP_FAILED)
		die("mmap");
	lives = mine;
	region = map_region(kind);
	c = claim_new(region, getpid(), NULL);
	c->keeper = 1;
	c->must_begin = now();
	for (n = 0;; n++) {
		i = n % CHILDREN;
		if (child[i] > 0)
			reap(child[i], &lives[4 * i]);
		child[i] = spawn(&lives[4 * i], 0);
		if (child[i] < 0)
			nap();
		if (n % 64 == 63 && rnd(2)) {
			c = move(c, NULL);
			c->keeper = 1;
		}
		if (n % 64 == 31) {
			/* It has the pages again after each of these. */
			madvise(region, len, rnd(2) ? MADV_PAGEOUT : MADV_COLLAPSE);
			for (size_t at = 0; at < len; at += PAGE)
				(void)*(volatile char *)(region + at);
		}
	}
}

int main(int argc, char **argv)
{
	char c;
	int i;

	self = "/proc/self/exe";
	if (argc < 3)
		return 64;
	if (!strcmp(argv[1], "--executed")) {
		long at = atol(argv[3]);

		if (at >= 0) {
			open_log(argv[2]);
			ends(&log_->claim[at].may_end);
		}
		seed = getpid();
		nap();
		return 0;
	}
	setpgid(0, 0);
	log_path = argv[1];
	open_log(log_path);
	for (i = 2; i < argc; i++) {
		family = i - 1;
		switch (fork()) {
		case -1:
			die("fork");
			break;
		case 0:
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			close(0);
			keep(argv[i]);
		}
	}
	while (read(0, &c, 1) > 0)
		;
	kill(0, SIGKILL);
	return 0;
}
