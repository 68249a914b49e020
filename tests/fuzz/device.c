// SPDX-License-Identifier: MIT
/*
 * Everything a program may do to /dev/hwerr, at random, from many threads and
 * processes at once.
 *
 *	device SECONDS [SEED]
 *
 * Calls are half random, half made from the grammar of uapi/hwerr.h with a
 * mistake or two. The kernel's own checks (KASAN, lockdep, ...) judge most of it.
 * This program judges what it reads - whole records, infos that add up - and at
 * the end the books: what a reader that slept through it all was given and what it
 * was told it lost are what was recorded meanwhile. Status 0, or 1 and a line.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../../kmod/uapi/hwerr.h"

#define DEVICE		"/dev/hwerr"
#define THREADS		6
#define FILES		24
#define PAGE		4096
#define RECORD_MAX	4096
#define ROOM		(16 * RECORD_MAX)

enum op {
	OPEN, CLOSE, DUP, READ, READV, WRITE, WRITE_GRAMMAR, IOCTL, IOCTL_GRAMMAR, POLL,
	EPOLL, SEEK, MMAP, FCNTL, FORK, SPLICE, PREAD, OPS
};

static const char * const op_name[OPS] = {
	"open", "close", "dup", "read", "readv", "write", "write-grammar", "ioctl",
	"ioctl-grammar", "poll", "epoll", "lseek", "mmap", "fcntl", "fork", "splice", "pread",
};

#define COMMANDS	8

static const struct {
	const char *name;
	unsigned long cmd;
} command[COMMANDS] = {
	{ "info", HWERR_IOC_INFO }, { "stats", HWERR_IOC_STATS },
	{ "get-filter", HWERR_IOC_GET_FILTER }, { "set-filter", HWERR_IOC_SET_FILTER },
	{ "seek", HWERR_IOC_SEEK }, { "guard", HWERR_IOC_GUARD }, { "stop", HWERR_IOC_STOP },
	{ "guards", HWERR_IOC_GUARDS },
};

struct count {
	_Atomic uint64_t done, good;
};

/* Shared between all processes. */
static struct shared {
	struct count op[OPS], command[COMMANDS];
	_Atomic int failed;
} *shared;

static _Atomic int file[FILES];
/* Processes that may be guarded: this one, and a child, which may have gone. */
static int own_pidfd;
static _Atomic int child_pidfd = -1;
static _Atomic int stop;
static char *odd;			/* a page without rights behind one that has */

static void fail(const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	fprintf(stderr, "device: ");
	vfprintf(stderr, fmt, args);
	fputc('\n', stderr);
	va_end(args);
	shared->failed = 1;
}

struct rng {
	uint64_t s;
};

static uint64_t rnd64(struct rng *r)
{
	r->s ^= r->s << 13;
	r->s ^= r->s >> 7;
	r->s ^= r->s << 17;
	return r->s;
}

static uint32_t rnd(struct rng *r, uint32_t n)
{
	return (rnd64(r) >> 32) % n;
}

static uint64_t odd_number(struct rng *r)
{
	static const uint64_t some[] = {
		0, 1, 2, 7, 8, 23, 24, 56, 71, 72, 73, 4095, 4096, 4097, 65535, 65536, 65537,
		INT32_MAX, 1ULL << 31, UINT32_MAX, 1ULL << 32, INT64_MAX, 1ULL << 63,
		UINT64_MAX,
	};

	return rnd(r, 3) ? some[rnd(r, sizeof(some) / sizeof(*some))] : rnd64(r);
}

/* Where the kernel shall copy to or from: sometimes a place where it cannot. */
static void *place(struct rng *r, void *fine, size_t need)
{
	switch (rnd(r, 12)) {
	case 0:
		return NULL;
	case 1:
		return odd + PAGE;
	case 2:
		return odd + PAGE - (need ? rnd(r, need < PAGE ? need : PAGE) : 0);
	case 3:
		return (void *)0xffff888000000000UL;
	case 4:
		return (char *)fine + rnd(r, 16);
	default:
		return fine;
	}
}

/* Everything that came is whole records of this version. */
static void check(const char *buf, ssize_t n)
{
	const char *p = buf;

	while (p < buf + n) {
		const struct hwerr_record *rec = (const void *)p;
		const char *end = p + rec->len, *q;

		if (buf + n - p < (ssize_t)sizeof(*rec) || rec->len > buf + n - p ||
		    rec->len < sizeof(*rec) || rec->len % 8 || rec->hdr_len != sizeof(*rec) ||
		    rec->pad || rec->flags & ~HWERR_F_ALL || !rec->seq || !rec->id) {
			fail("a record of %u bytes, header %u, flags %#x in %zd read",
			     rec->len, rec->hdr_len, rec->flags, n);
			return;
		}
		for (q = p + rec->hdr_len; q < end;) {
			const struct hwerr_info *info = (const void *)q;

			if (end - q < (ssize_t)sizeof(*info) || info->len < sizeof(*info) ||
			    info->len % 8 || info->len > end - q) {
				fail("an info of %u bytes, type %u, with %td left", info->len,
				     info->type, end - q);
				return;
			}
			q += info->len;
		}
		p = end;
	}
}

static int some_tgid(struct rng *r)
{
	return rnd(r, 2) ? getpid() : 1 + (int)rnd(r, 300);
}

static size_t add_info(struct rng *r, char *at, size_t room)
{
	static const uint16_t size[HWERR_INFO_COUNT] = {
		0, sizeof(struct hwerr_info_mce), sizeof(struct hwerr_info_pci),
		sizeof(struct hwerr_info_edac), sizeof(struct hwerr_info_memory),
		sizeof(struct hwerr_info_guest), sizeof(struct hwerr_info_task),
		sizeof(struct hwerr_info_text) + 8, sizeof(struct hwerr_info_cper),
		sizeof(struct hwerr_info_stop), sizeof(struct hwerr_info_vcpu),
		sizeof(struct hwerr_info_block),
	};
	uint16_t type = 1 + rnd(r, HWERR_INFO_COUNT - 1);
	struct hwerr_info *info = (void *)at;
	size_t len = size[type], i;

	if (!len)
		fail("info %u is not known here", type);
	if (type == HWERR_INFO_TEXT || type == HWERR_INFO_CPER)
		len += 8 * rnd(r, 40);
	if (len > room)
		return 0;
	memset(at, 0, len);
	info->len = len;
	info->type = type;
	switch (type) {
	case HWERR_INFO_MEMORY:
		((struct hwerr_info_memory *)at)->phys_addr = rnd64(r) >> 16;
		((struct hwerr_info_memory *)at)->phys_len = 1 + rnd(r, 1 << 20);
		break;
	case HWERR_INFO_GUEST:
		((struct hwerr_info_guest *)at)->tgid = some_tgid(r);
		((struct hwerr_info_guest *)at)->gpa = rnd64(r);
		break;
	case HWERR_INFO_TASK:
		((struct hwerr_info_task *)at)->tgid = some_tgid(r);
		break;
	case HWERR_INFO_TEXT:
		for (i = sizeof(struct hwerr_info_text); i < len - 1; i++)
			at[i] = 'a' + rnd(r, 26);
		break;
	case HWERR_INFO_CPER:
		((struct hwerr_info_cper *)at)->data_len = len - sizeof(struct hwerr_info_cper);
		break;
	case HWERR_INFO_MCE:
		((struct hwerr_info_mce *)at)->status = rnd64(r);
		break;
	case HWERR_INFO_STOP:
		((struct hwerr_info_stop *)at)->tgid = some_tgid(r);
		break;
	case HWERR_INFO_VCPU:
		((struct hwerr_info_vcpu *)at)->vcpu = rnd(r, 4);
		((struct hwerr_info_vcpu *)at)->exit_reason = rnd(r, 40);
		((struct hwerr_info_vcpu *)at)->insn_len = rnd(r, 17);
		break;
	case HWERR_INFO_BLOCK:
		((struct hwerr_info_block *)at)->sector = rnd64(r);
		((struct hwerr_info_block *)at)->op = rnd(r, 16);
		memcpy(((struct hwerr_info_block *)at)->disk, "sda", 4);
	}
	return len;
}

/* A record as the grammar has it, mostly; bytes. */
static size_t make_record(struct rng *r, char *at, size_t room)
{
	struct hwerr_record *rec = (void *)at;
	size_t len = sizeof(*rec), n;

	if (room < len)
		return 0;
	memset(at, 0, len);
	rec->hdr_len = sizeof(*rec);
	rec->version = HWERR_ABI_VERSION;
	rec->severity = rnd(r, HWERR_SEV_COUNT);
	rec->source = rnd(r, HWERR_SRC_COUNT);
	rec->kind = rnd(r, HWERR_KIND_COUNT);
	rec->component = rnd(r, HWERR_COMP_COUNT);
	rec->cpu = (int)rnd(r, 4) - 1;
	rec->id = rnd(r, 3) ? 0 : rnd(r, 1000);
	rec->raw_severity = rnd(r, 1 << 16);
	if (room > RECORD_MAX)
		room = RECORD_MAX;
	while (rnd(r, 3)) {
		n = add_info(r, at + len, room - len);
		if (!n)
			break;
		len += n;
	}
	rec->len = len;
	return len;
}

static void spoil(struct rng *r, char *at, size_t len)
{
	int n = 1 + rnd(r, 3);

	while (n--) {
		size_t i = rnd(r, len);

		switch (rnd(r, 3)) {
		case 0:
			at[i] ^= 1 << rnd(r, 8);
			break;
		case 1:
			at[i] = rnd(r, 256);
			break;
		default:
			*(uint32_t *)(at + (i & ~3UL) % (len - 3)) = odd_number(r);
		}
	}
}

/* Only processes of this program's own are guarded and stopped. */
static int some_pidfd(struct rng *r)
{
	switch (rnd(r, 8)) {
	case 0:
		return (int)odd_number(r);
	case 1:
		return file[rnd(r, FILES)];
	case 2:
	case 3:
	case 4:
		return child_pidfd;
	default:
		return own_pidfd;
	}
}

static void fill_arg(struct rng *r, unsigned int nr, char *buf)
{
	struct hwerr_ioc_filter *f = (void *)buf;
	struct hwerr_ioc_seek *s = (void *)buf;
	struct hwerr_ioc_guard *g = (void *)buf;
	struct hwerr_ioc_stop *stop_arg = (void *)buf;
	struct hwerr_ioc_guards *list = (void *)buf;

	switch (nr) {
	case _IOC_NR(HWERR_IOC_SET_FILTER):
		f->severities = rnd(r, 2) ? 0 : rnd(r, 1 << HWERR_SEV_COUNT);
		f->sources = rnd(r, 2) ? 0 : rnd(r, 1 << HWERR_SRC_COUNT);
		f->tgid = rnd(r, 3) ? 0 : rnd(r, 2) ? getpid() : (int)rnd(r, 300);
		break;
	case _IOC_NR(HWERR_IOC_SEEK):
		s->whence = rnd(r, 3);
		s->seq = s->whence == HWERR_SEEK_SEQ ? 1 + rnd(r, 100000) : 0;
		break;
	case _IOC_NR(HWERR_IOC_GUARD):
		g->pidfd = some_pidfd(r);
		if (rnd(r, 3)) {
			g->severity = rnd(r, HWERR_SEV_COUNT + 1);
			g->flags = rnd(r, 2) ? HWERR_GUARD_KEEP : 0;
		} else {
			g->flags = HWERR_GUARD_REMOVE;
		}
		break;
	case _IOC_NR(HWERR_IOC_STOP):
		stop_arg->pidfd = some_pidfd(r);
		break;
	case _IOC_NR(HWERR_IOC_GUARDS):
		list->count = rnd(r, 2) ? rnd(r, 64) : odd_number(r);
	}
}

/*
 * The kernel writes to where this argument points: to where that harms nobody here. Behind the
 * argument there is room for as many as there can be of ours.
 */
static void aim_guards(struct rng *r, char *buf)
{
	((struct hwerr_ioc_guards *)buf)->entries = (uintptr_t)place(r, buf + PAGE, PAGE);
}

static long do_ioctl(struct rng *r, int fd, int grammar, char *buf)
{
	unsigned int which = rnd(r, COMMANDS);
	unsigned long cmd = command[which].cmd;
	char *arg;
	long ret;

	if (!grammar) {
		cmd = rnd(r, 3) ? cmd ^ 1UL << rnd(r, 32) : odd_number(r);
		/* What is there from before is no pointer. */
		if (_IOC_NR(cmd) == _IOC_NR(HWERR_IOC_GUARDS))
			memset(buf, 0, 64);
		/* FIOCLEX and its like are the kernel's own, and fine. */
		return ioctl(fd, cmd, place(r, buf, _IOC_SIZE(cmd)));
	}
	memset(buf, 0, PAGE);
	if (!rnd(r, 4))
		cmd = _IOC(_IOC_DIR(cmd), HWERR_IOC_MAGIC, _IOC_NR(cmd), rnd(r, 600));
	fill_arg(r, _IOC_NR(cmd), buf);
	if (!rnd(r, 5))
		spoil(r, buf, 32);
	arg = rnd(r, 8) ? buf : place(r, buf, _IOC_SIZE(cmd));
	if (_IOC_NR(cmd) == _IOC_NR(HWERR_IOC_GUARDS)) {
		aim_guards(r, buf);
		/* Beside its beginning, other numbers were the pointer. */
		if (arg > buf && arg < buf + PAGE)
			arg = buf;
	}
	ret = ioctl(fd, cmd, arg);
	/* Nobody here runs a guest: to say so is what is good. */
	if (ret && _IOC_NR(cmd) == _IOC_NR(HWERR_IOC_STOP) && errno == ENXIO)
		ret = 0;
	atomic_fetch_add(&shared->command[which].done, 1);
	if (!ret)
		atomic_fetch_add(&shared->command[which].good, 1);
	return ret;
}

static void *work(void *arg);

/* A child with the same open files, and its own thread. */
static long do_fork(struct rng *r)
{
	pid_t pid;
	int status, old;

	pid = fork();
	if (!pid) {
		struct timespec t = { 0, rnd(r, 20) * 1000000 };
		struct rng own = { rnd64(r) | 1 };
		pthread_t thread;

		prctl(PR_SET_PDEATHSIG, SIGKILL);
		alarm(10);
		/* Half of them without the right to see everything. */
		if (rnd(r, 2) && syscall(SYS_setresuid, 1000, 1000, 1000))
			_exit(1);
		if (!pthread_create(&thread, NULL, work, &own))
			nanosleep(&t, NULL);
		_exit(0);
	}
	if (pid < 0)
		return -1;
	old = atomic_exchange(&child_pidfd, (int)syscall(SYS_pidfd_open, pid, 0));
	if (old >= 0)
		close(old);
	waitpid(pid, &status, 0);
	return 0;
}

static long do_op(struct rng *r, enum op which, char *buf)
{
	int i = rnd(r, FILES), fd = file[i];
	size_t n, len;
	long ret = -1;

	switch (which) {
	case OPEN:
		fd = open(DEVICE, (rnd(r, 2) ? O_RDWR : rnd(r, 2) ? O_RDONLY : O_WRONLY) |
			  O_NONBLOCK | O_CLOEXEC);
		ret = fd;
		if (fd >= 0) {
			fd = atomic_exchange(&file[i], fd);
			if (fd >= 0)
				close(fd);
		}
		break;
	case CLOSE:
		/* Others may be using it this moment: that is the point. */
		fd = atomic_exchange(&file[i], -1);
		ret = fd >= 0 ? close(fd) : -1;
		break;
	case DUP:
		fd = dup(fd);
		ret = fd;
		if (fd >= 0) {
			fd = atomic_exchange(&file[rnd(r, FILES)], fd);
			if (fd >= 0)
				close(fd);
		}
		break;
	case READ:
		n = rnd(r, 2) ? rnd(r, ROOM) : odd_number(r) % (ROOM + 1);
		if (rnd(r, 4)) {
			ret = read(fd, buf, n);
			if (ret > 0)
				check(buf, ret);
		} else {
			ret = read(fd, place(r, buf, n), n);
		}
		break;
	case READV: {
		struct iovec v[3] = {
			{ buf, rnd(r, PAGE) }, { place(r, buf + PAGE, PAGE), rnd(r, PAGE) },
			{ buf + 2 * PAGE, rnd(r, PAGE) },
		};

		ret = readv(fd, v, 1 + rnd(r, 3));
		break;
	}
	case WRITE:
		n = odd_number(r) % (ROOM + 1);
		for (len = 0; len < n; len += 8)
			*(uint64_t *)(buf + len) = rnd64(r);
		ret = write(fd, place(r, buf, n), rnd(r, 2) ? n : rnd(r, 200));
		/* Chance makes no record: the right refusal is what is good. */
		if (ret < 0 && (errno == EINVAL || errno == EFAULT || errno == EPERM))
			ret = 0;
		break;
	case WRITE_GRAMMAR:
		for (len = 0; !len || (rnd(r, 3) && len < ROOM - RECORD_MAX); len += n)
			n = make_record(r, buf + len, ROOM - len);
		if (!rnd(r, 3))
			spoil(r, buf, len);
		ret = write(fd, rnd(r, 8) ? buf : place(r, buf, len), len);
		break;
	case IOCTL:
	case IOCTL_GRAMMAR:
		ret = do_ioctl(r, fd, which == IOCTL_GRAMMAR, buf);
		/* FIONBIO may have made it a file that is waited for. */
		if (which == IOCTL && fd >= 0)
			fcntl(fd, F_SETFL, O_NONBLOCK);
		break;
	case POLL: {
		struct pollfd p = { fd, rnd(r, 1 << 12), 0 };

		ret = poll(&p, 1, rnd(r, 3));
		break;
	}
	case EPOLL: {
		struct epoll_event e = { EPOLLIN | (rnd(r, 2) ? EPOLLET : 0), { 0 } };
		int ep = epoll_create1(EPOLL_CLOEXEC);

		ret = epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e);
		if (!ret)
			epoll_wait(ep, &e, 1, rnd(r, 3));
		close(ep);
		break;
	}
	case SEEK:
		ret = lseek(fd, odd_number(r), rnd(r, 6));
		/* It must not: what counts as good is the right refusal. */
		ret = ret < 0 && (errno == ESPIPE || errno == EINVAL) ? 0 : -1;
		break;
	case MMAP: {
		void *at = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);

		ret = at == MAP_FAILED && errno == ENODEV ? 0 : -1;
		if (at != MAP_FAILED)
			munmap(at, PAGE);
		break;
	}
	case FCNTL:
		ret = fcntl(fd, F_SETFL, O_NONBLOCK | (rnd(r, 2) ? O_ASYNC : 0) |
			    (rnd(r, 2) ? O_APPEND : 0));
		break;
	case FORK:
		ret = rnd(r, 50) ? 0 : do_fork(r);
		break;
	case SPLICE: {
		int p[2];

		if (pipe2(p, O_CLOEXEC | O_NONBLOCK))
			break;
		ret = splice(fd, NULL, p[1], NULL, rnd(r, ROOM), SPLICE_F_NONBLOCK);
		/* Not offered: the right refusal is what is good. */
		ret = ret < 0 && (errno == EINVAL || errno == EBADF) ? 0 : ret;
		close(p[0]);
		close(p[1]);
		break;
	}
	case PREAD:
		ret = pread(fd, buf, PAGE, odd_number(r));
		ret = ret < 0 && errno == ESPIPE ? 0 : -1;
		break;
	case OPS:
		break;
	}
	return ret;
}

static void *work(void *arg)
{
	struct rng *r = arg;
	char *buf = aligned_alloc(PAGE, ROOM + PAGE);

	while (!stop) {
		enum op which = rnd(r, OPS);

		atomic_fetch_add(&shared->op[which].done, 1);
		if (do_op(r, which, buf) >= 0)
			atomic_fetch_add(&shared->op[which].good, 1);
	}
	free(buf);
	return NULL;
}

static void stats(int fd, struct hwerr_ioc_stats *s)
{
	if (ioctl(fd, HWERR_IOC_STATS, s))
		fail("HWERR_IOC_STATS: %s", strerror(errno));
}

/* Reads on to the end; records, and what they say was lost. */
static void read_all(int fd, uint64_t *records, uint64_t *lost)
{
	static char buf[ROOM] __attribute__((aligned(8)));
	ssize_t n;

	while ((n = read(fd, buf, sizeof(buf))) > 0) {
		check(buf, n);
		for (char *p = buf; p < buf + n; p += ((struct hwerr_record *)p)->len) {
			++*records;
			*lost += ((struct hwerr_record *)p)->lost;
		}
	}
	if (n < 0 && errno != EAGAIN)
		fail("read: %s", strerror(errno));
}

static void show(const char *name, struct count *c)
{
	printf("%-14s %10llu, %llu good\n", name, (unsigned long long)c->done,
	       (unsigned long long)c->good);
	if (!c->good)
		fail("%s never worked: it was not tested", name);
}

static void nothing(int signal)
{
	(void)signal;
}

int main(int argc, char **argv)
{
	struct rng rng[THREADS], main_rng;
	pthread_t thread[THREADS];
	struct hwerr_ioc_stats before, after;
	uint64_t made = 0;
	struct sigaction interrupt = { .sa_handler = nothing };
	uint64_t records = 0, lost = 0;
	int sleeper, i;

	if (argc < 2)
		return 64;
	main_rng.s = (argc > 2 ? strtoull(argv[2], NULL, 0) : 1) * 0x9e3779b97f4a7c15ULL | 1;
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	odd = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	mprotect(odd + PAGE, PAGE, PROT_NONE);
	sigaction(SIGUSR1, &interrupt, NULL);
	signal(SIGIO, SIG_IGN);
	signal(SIGPIPE, SIG_IGN);
	for (i = 0; i < FILES; i++)
		file[i] = -1;
	/* High, so that no thread closes or reads it. */
	i = open(DEVICE, O_RDONLY | O_NONBLOCK);
	sleeper = fcntl(i, F_DUPFD_CLOEXEC, 1000);
	if (sleeper < 0) {
		fail("%s: %s", DEVICE, strerror(errno));
		return 1;
	}
	close(i);
	stats(sleeper, &before);
	own_pidfd = syscall(SYS_pidfd_open, getpid(), 0);
	if (own_pidfd < 0) {
		fail("pidfd_open: %s", strerror(errno));
		return 1;
	}

	for (i = 0; i < THREADS; i++) {
		rng[i].s = rnd64(&main_rng) | 1;
		if (pthread_create(&thread[i], NULL, work, &rng[i]))
			return 1;
	}
	sleep(atoi(argv[1]));
	stop = 1;
	/* FIONBIO may have let one wait for a record that nobody makes any more. */
	for (i = 0; i < THREADS; i++) {
		while (pthread_tryjoin_np(thread[i], NULL)) {
			pthread_kill(thread[i], SIGUSR1);
			poll(NULL, 0, 20);
		}
	}

	/* The record of coalesced errors comes up to a second later. */
	for (i = 0; i < 50; i++) {
		read_all(sleeper, &records, &lost);
		stats(sleeper, &after);
		made = after.records - before.records + after.dropped - before.dropped;
		if (records + lost == made)
			break;
		poll(NULL, 0, 100);
	}
	if (records + lost != made)
		fail("%llu records were made or dropped, a sleeper got %llu and lost %llu",
		     (unsigned long long)made, (unsigned long long)records,
		     (unsigned long long)lost);
	if (after.reader_read != records || after.reader_lost != lost)
		fail("the file says %llu read and %llu lost, the records %llu and %llu",
		     (unsigned long long)after.reader_read, (unsigned long long)after.reader_lost,
		     (unsigned long long)records, (unsigned long long)lost);
	for (i = 0; i < OPS; i++)
		show(op_name[i], &shared->op[i]);
	for (i = 0; i < COMMANDS; i++)
		show(command[i].name, &shared->command[i]);
	printf("%llu records made, %llu read, %llu lost\n",
	       (unsigned long long)(after.records - before.records), (unsigned long long)records,
	       (unsigned long long)lost);
	return shared->failed;
}
