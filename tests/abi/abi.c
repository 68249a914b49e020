// SPDX-License-Identifier: MIT
/*
 * The promises of uapi/hwerr.h, one test each, straight at the system calls.
 *
 *	abi --list		names, one a line
 *	abi NAME		status 0 held, 1 broken (and where, on stderr)
 *
 * Built twice, for 64 and 32 bits. Runs as root on a machine where nobody else
 * publishes with source USER or BLOCK; other records are filtered out.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../kmod/uapi/hwerr.h"

#define DEV "/dev/hwerr"
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

#define CHECK(cond) do {							\
	if (!(cond)) {								\
		int e_ = errno;							\
		fprintf(stderr, "abi.c:%d: %s (errno %d %s)\n", __LINE__, #cond,	\
			e_, strerror(e_));					\
		exit(1);							\
	}									\
} while (0)

#define FAILS(call, err) do {							\
	long r_ = (call);							\
	if (r_ != -1 || errno != (err)) {					\
		int e_ = errno;							\
		fprintf(stderr, "abi.c:%d: %s gave %ld, errno %d %s, not %s\n",	\
			__LINE__, #call, r_, e_, strerror(e_), #err);		\
		exit(1);							\
	}									\
} while (0)

/* Not mapped, and not known to the compiler. */
static void *volatile bad = (void *)8;

struct msg {
	struct hwerr_record rec;
	unsigned char room[HWERR_RECORD_MAX];
} __attribute__((aligned(8)));

static void msg_init(struct msg *m, int sev, int src)
{
	memset(m, 0, sizeof(*m));
	m->rec.hdr_len = sizeof(m->rec);
	m->rec.len = m->rec.hdr_len;
	m->rec.version = HWERR_ABI_VERSION;
	m->rec.severity = sev;
	m->rec.source = src;
	m->rec.cpu = -1;
	/* No test repeats, and so coalesces with, another's corrected errors. */
	m->rec.raw_severity = getpid();
}

static void *msg_info(struct msg *m, int type, unsigned int len)
{
	struct hwerr_info *i = (void *)((char *)&m->rec + m->rec.len);

	len = (len + 7) & ~7u;
	i->len = len;
	i->type = type;
	m->rec.len += len;
	return i;
}

/* A text makes each record another error, so that none is coalesced. */
static void msg_text(struct msg *m, const char *text)
{
	struct hwerr_info_text *t = msg_info(m, HWERR_INFO_TEXT, sizeof(*t) + strlen(text) + 1);

	strcpy(t->text, text);
}

static void msg_number(struct msg *m, unsigned int n)
{
	char text[16];

	snprintf(text, sizeof(text), "%u", n);
	msg_text(m, text);
}

static unsigned int text_number(const struct hwerr_record *r)
{
	const struct hwerr_info_text *t = (const void *)((const char *)r + r->hdr_len);

	CHECK(t->head.type == HWERR_INFO_TEXT);
	return strtoul(t->text, NULL, 10);
}

static void filter_full(int fd, uint64_t sevs, uint64_t srcs, int tgid)
{
	struct hwerr_ioc_filter f = { .severities = sevs, .sources = srcs, .tgid = tgid };

	CHECK(!ioctl(fd, HWERR_IOC_SET_FILTER, &f));
}

#define OURS ((1ull << HWERR_SRC_USER) | (1ull << HWERR_SRC_BLOCK))

static int dev_open(int flags)
{
	int fd = open(DEV, O_RDWR | O_CLOEXEC | flags);

	CHECK(fd >= 0);
	filter_full(fd, 0, OURS, 0);
	return fd;
}

static void put(int fd, struct msg *m)
{
	CHECK(write(fd, &m->rec, m->rec.len) == (ssize_t)m->rec.len);
}

static void put_number(int fd, int sev, unsigned int n)
{
	struct msg m;

	msg_init(&m, sev, HWERR_SRC_USER);
	msg_number(&m, n);
	put(fd, &m);
}

static struct hwerr_record *get(int fd)
{
	static _Thread_local union {
		struct hwerr_record rec;
		char buf[HWERR_RECORD_MAX];
	} u;
	size_t size = sizeof(struct hwerr_record);
	ssize_t n;

	/* The least buffer that holds a record holds no second one. */
	while ((n = read(fd, u.buf, size)) < 0 && errno == EINVAL && size < sizeof(u.buf))
		size += 8;
	if (n < 0)
		return NULL;
	CHECK(n == (ssize_t)u.rec.len);
	return &u.rec;
}

struct tally {
	uint64_t read, lost, errors, uncorrected, last_seq;
};

static void drain(int fd, struct tally *t)
{
	char buf[4 * HWERR_RECORD_MAX] __attribute__((aligned(8)));
	ssize_t n, at;

	while ((n = read(fd, buf, sizeof(buf))) > 0) {
		for (at = 0; at < n; ) {
			struct hwerr_record *r = (void *)(buf + at);

			CHECK(r->len >= sizeof(*r) && at + (ssize_t)r->len <= n);
			CHECK(r->seq > t->last_seq);
			t->last_seq = r->seq;
			t->read++;
			t->errors += r->count;
			t->uncorrected += r->severity > HWERR_SEV_CORRECTED;
			t->lost += r->lost;
			at += r->len;
		}
	}
	CHECK(n == -1 && errno == EAGAIN);
}

static struct hwerr_ioc_stats stats(int fd)
{
	struct hwerr_ioc_stats s;

	CHECK(!ioctl(fd, HWERR_IOC_STATS, &s));
	return s;
}

static struct hwerr_ioc_info info(int fd)
{
	struct hwerr_ioc_info i;

	CHECK(!ioctl(fd, HWERR_IOC_INFO, &i));
	return i;
}

static void seek_to(int fd, int whence, uint64_t seq)
{
	struct hwerr_ioc_seek s = { .whence = whence, .seq = seq };

	CHECK(!ioctl(fd, HWERR_IOC_SEEK, &s));
}

static int readable(int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };

	CHECK(poll(&p, 1, 0) >= 0);
	return !!(p.revents & POLLIN);
}

/* --- reading --------------------------------------------------------------- */

static void t_nonblock(void)
{
	char buf[HWERR_RECORD_MAX];
	int fd = dev_open(O_NONBLOCK);

	FAILS(read(fd, buf, sizeof(buf)), EAGAIN);
}

static void t_short_buffer(void)
{
	char buf[HWERR_RECORD_MAX];
	int fd = dev_open(O_NONBLOCK);
	struct hwerr_record *r;

	put_number(fd, HWERR_SEV_FATAL, 7);
	FAILS(read(fd, buf, 0), EINVAL);
	FAILS(read(fd, buf, sizeof(struct hwerr_record) - 1), EINVAL);
	FAILS(read(fd, buf, sizeof(struct hwerr_record)), EINVAL);
	r = get(fd);
	CHECK(r && text_number(r) == 7 && r->lost == 0);
}

static void t_bad_pointer(void)
{
	int fd = dev_open(O_NONBLOCK);
	struct hwerr_record *r;
	char *page = mmap(NULL, 8192, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned int len;
	struct msg m;

	CHECK(page != MAP_FAILED && !munmap(page + 4096, 4096));
	msg_init(&m, HWERR_SEV_FATAL, HWERR_SRC_USER);
	msg_number(&m, 1);
	len = m.rec.len;
	put_number(fd, HWERR_SEV_FATAL, 1);
	put_number(fd, HWERR_SEV_FATAL, 2);
	FAILS(read(fd, bad, HWERR_RECORD_MAX), EFAULT);
	FAILS(read(fd, page + 4096 - 8, HWERR_RECORD_MAX), EFAULT);
	/* The first fits before the hole, the second does not: it waits. */
	CHECK(read(fd, page + 4096 - len - 8, HWERR_RECORD_MAX) == (ssize_t)len);
	CHECK(text_number((void *)(page + 4096 - len - 8)) == 1);
	r = get(fd);
	CHECK(r && text_number(r) == 2 && r->lost == 0);
}

static void t_whole_records(void)
{
	char buf[HWERR_RECORD_MAX] __attribute__((aligned(8)));
	int fd = dev_open(O_NONBLOCK);
	struct hwerr_record *r = (void *)buf;
	unsigned int len, i;
	struct msg m;

	msg_init(&m, HWERR_SEV_FATAL, HWERR_SRC_USER);
	msg_number(&m, 1);
	len = m.rec.len;
	for (i = 0; i < 5; i++)
		put_number(fd, HWERR_SEV_FATAL, i);
	CHECK(read(fd, buf, 3 * len + len / 2) == (ssize_t)(3 * len));
	for (i = 0; i < 3; i++, r = (void *)((char *)r + r->len))
		CHECK(text_number(r) == i);
	CHECK(read(fd, buf, sizeof(buf)) == (ssize_t)(2 * len));
	FAILS(read(fd, buf, sizeof(buf)), EAGAIN);
}

static void *put_one(void *fd)
{
	put_number((intptr_t)fd, HWERR_SEV_FATAL, 99);
	return NULL;
}

static void t_blocking_read(void)
{
	int fd = dev_open(0), w = dev_open(0);
	struct hwerr_record *r;
	pthread_t t;

	CHECK(!pthread_create(&t, NULL, put_one, (void *)(intptr_t)w));
	alarm(30);
	r = get(fd);
	CHECK(r && text_number(r) == 99);
	pthread_join(t, NULL);
}

static int sleeping_tid;

static void *read_one(void *fd)
{
	__atomic_store_n(&sleeping_tid, syscall(SYS_gettid), __ATOMIC_RELEASE);
	CHECK(text_number(get((intptr_t)fd)) == 98);
	return NULL;
}

static void await_sleep(void)
{
	char path[64], line[512];
	FILE *f;
	int tid;

	do {
		tid = __atomic_load_n(&sleeping_tid, __ATOMIC_ACQUIRE);
		snprintf(path, sizeof(path), "/proc/self/task/%d/stat", tid);
		f = tid ? fopen(path, "r") : NULL;
		line[0] = '\0';
		if (f) {
			CHECK(fgets(line, sizeof(line), f));
			fclose(f);
		}
	} while (!strstr(line, ") S "));
}

static void t_seek_ends_wait(void)
{
	int fd = dev_open(0), w = dev_open(0);
	struct hwerr_ioc_seek s = { .whence = HWERR_SEEK_SEQ };
	pthread_t t;

	s.seq = info(w).next_seq;
	put_number(w, HWERR_SEV_FATAL, 98);
	CHECK(text_number(get(fd)) == 98);
	CHECK(!pthread_create(&t, NULL, read_one, (void *)(intptr_t)fd));
	alarm(30);
	await_sleep();
	CHECK(!ioctl(fd, HWERR_IOC_SEEK, &s));
	pthread_join(t, NULL);
}

static void t_filter_ends_wait(void)
{
	int fd = dev_open(0), w = dev_open(0);
	pthread_t t;

	filter_full(fd, 1 << HWERR_SEV_INFO, 0, 0);
	put_number(w, HWERR_SEV_FATAL, 98);
	CHECK(!pthread_create(&t, NULL, read_one, (void *)(intptr_t)fd));
	alarm(30);
	await_sleep();
	/* It has seen the record and stepped over it, but not read it. */
	filter_full(fd, 0, 0, 0);
	pthread_join(t, NULL);
}

/* Neither poll() nor read() uses up what the filter keeps back. */
static void t_filter_gives_back(void)
{
	int fd = dev_open(O_NONBLOCK), i;
	struct hwerr_record *r;

	filter_full(fd, 1 << HWERR_SEV_FATAL, 0, 0);
	for (i = 0; i < 3; i++)
		put_number(fd, HWERR_SEV_RECOVERABLE, i);
	CHECK(!readable(fd));
	put_number(fd, HWERR_SEV_FATAL, 3);
	put_number(fd, HWERR_SEV_RECOVERABLE, 4);
	CHECK(text_number(get(fd)) == 3);
	CHECK(!readable(fd));
	filter_full(fd, 0, 0, 0);
	r = get(fd);
	CHECK(r && text_number(r) == 4 && !r->lost);
	CHECK(!readable(fd) && !stats(fd).reader_lost);
}

/* Waits until a process sleeps. */
static void await_state(pid_t pid)
{
	char path[64], line[512];
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	do {
		f = fopen(path, "r");
		CHECK(f && fgets(line, sizeof(line), f));
		fclose(f);
	} while (!strstr(line, ") S "));
}

static void t_signal_ends_wait(void)
{
	int fd = dev_open(0), status;
	pid_t pid = fork();

	if (!pid) {
		char buf[HWERR_RECORD_MAX];

		read(fd, buf, sizeof(buf));
		_exit(0);
	}
	alarm(30);
	await_state(pid);
	/* SIGKILL is only seen by a wait that can be interrupted. */
	CHECK(!kill(pid, SIGKILL));
	alarm(30);
	CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status));
}

static void t_not_seekable(void)
{
	char buf[HWERR_RECORD_MAX];
	int fd = dev_open(O_NONBLOCK);

	FAILS(lseek(fd, 0, SEEK_SET), ESPIPE);
	FAILS(pread(fd, buf, sizeof(buf), 0), ESPIPE);
}

/* --- poll ------------------------------------------------------------------ */

static void t_poll(void)
{
	int fd = dev_open(O_NONBLOCK);

	CHECK(!readable(fd));
	put_number(fd, HWERR_SEV_FATAL, 1);
	CHECK(readable(fd) && readable(fd));
	CHECK(text_number(get(fd)) == 1);
	CHECK(!readable(fd));
}

static void t_poll_filter(void)
{
	int fd = dev_open(O_NONBLOCK), w = dev_open(0);

	filter_full(fd, 1 << HWERR_SEV_FATAL, OURS, 0);
	put_number(w, HWERR_SEV_CORRECTED, 1);
	put_number(w, HWERR_SEV_RECOVERABLE, 2);
	CHECK(!readable(fd));
	put_number(w, HWERR_SEV_FATAL, 3);
	CHECK(readable(fd));
	CHECK(text_number(get(fd)) == 3);
	CHECK(!readable(fd));
}

static void t_epoll_edge(void)
{
	int fd = dev_open(O_NONBLOCK), w = dev_open(0), ep = epoll_create1(0), i;
	struct epoll_event e = { .events = EPOLLIN | EPOLLET };
	struct tally t = { 0 };

	filter_full(fd, 1 << HWERR_SEV_FATAL, OURS, 0);
	CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e));
	CHECK(epoll_wait(ep, &e, 1, 0) == 0);
	for (i = 0; i < 3; i++) {
		put_number(w, HWERR_SEV_FATAL, i);	/* an edge, unread or not */
		CHECK(epoll_wait(ep, &e, 1, 0) == 1 && e.events & EPOLLIN);
		CHECK(epoll_wait(ep, &e, 1, 0) == 0);
	}
	drain(fd, &t);
	CHECK(t.read == 3);
	CHECK(epoll_wait(ep, &e, 1, 0) == 0);
	put_number(w, HWERR_SEV_RECOVERABLE, 4);	/* filtered: no edge */
	CHECK(epoll_wait(ep, &e, 1, 0) == 0);
	put_number(w, HWERR_SEV_FATAL, 5);
	CHECK(epoll_wait(ep, &e, 1, 0) == 1);
}

/* --- readers --------------------------------------------------------------- */

static void t_two_readers(void)
{
	int a = dev_open(O_NONBLOCK), b = dev_open(O_NONBLOCK), late;

	put_number(a, HWERR_SEV_FATAL, 1);
	late = dev_open(O_NONBLOCK);
	put_number(a, HWERR_SEV_FATAL, 2);
	CHECK(text_number(get(late)) == 2);
	CHECK(!get(late) && errno == EAGAIN);
	filter_full(a, 0, OURS, 0);
	CHECK(readable(a) && readable(b));
	/* What one reads, the other still has; a filter is one reader's own. */
	filter_full(b, 1 << HWERR_SEV_INFO, OURS, 0);
	CHECK(readable(a) && !readable(b));
}

static void t_dup_fork(void)
{
	int fd = dev_open(O_NONBLOCK), other = dup(fd), status;
	unsigned int i;
	pid_t pid;

	for (i = 1; i <= 3; i++) {
		put_number(fd, i == 2 ? HWERR_SEV_RECOVERABLE : HWERR_SEV_FATAL, i);
		if (i == 1)
			CHECK(text_number(get(other)) == 1 && !readable(fd));
		if (i == 2) {
			pid = fork();
			if (!pid)
				_exit(text_number(get(fd)) == 2 ? 0 : 1);
			CHECK(waitpid(pid, &status, 0) == pid && status == 0);
			CHECK(!readable(other));
		}
	}
	CHECK(text_number(get(fd)) == 3);
}

static void t_history(void)
{
	int w = dev_open(O_NONBLOCK), fd;
	char record[HWERR_RECORD_MAX];
	struct tally t = { 0 };
	uint64_t first;

	first = info(w).next_seq;
	put_number(w, HWERR_SEV_FATAL, 1);
	put_number(w, HWERR_SEV_CORRECTED, 2);
	put_number(w, HWERR_SEV_FATAL, 3);
	fd = dev_open(O_NONBLOCK);
	CHECK(!readable(fd));
	seek_to(fd, HWERR_SEEK_SEQ, first);
	drain(fd, &t);
	CHECK(t.read == 3 && t.lost == 0 && t.last_seq == first + 2);
	seek_to(fd, HWERR_SEEK_OLDEST, 0);
	CHECK(readable(fd));
	seek_to(fd, HWERR_SEEK_SEQ, first + 1);
	CHECK(read(fd, record, sizeof(record)) > 0);
	seek_to(fd, HWERR_SEEK_NOW, 0);
	CHECK(!readable(fd));
	seek_to(fd, HWERR_SEEK_SEQ, info(fd).next_seq);
	CHECK(!readable(fd));
	put_number(w, HWERR_SEV_FATAL, 4);
	CHECK(text_number(get(fd)) == 4);
}

/* --- loss ------------------------------------------------------------------ */

static void t_overflow_exact(void)
{
	int fd = dev_open(O_NONBLOCK), w = dev_open(0);
	struct tally t = { 0 };
	unsigned int i, n = 20000;

	for (i = 0; i < n; i++)
		put_number(w, HWERR_SEV_CORRECTED, i);
	CHECK(stats(fd).reader_pending > 0);
	drain(fd, &t);
	CHECK(t.lost > 0 && t.read + t.lost == n);
	CHECK(stats(fd).reader_read == t.read && stats(fd).reader_lost == t.lost);
	CHECK(stats(fd).reader_pending == 0);
}

static void t_first_after_gap_tells(void)
{
	int fd = dev_open(O_NONBLOCK), w = dev_open(0);
	unsigned int i, n = 20000;
	struct hwerr_record *r;
	char buf[2 * sizeof(struct hwerr_record)] __attribute__((aligned(8)));

	for (i = 0; i < n; i++)
		put_number(w, HWERR_SEV_CORRECTED, i);
	CHECK(read(fd, buf, 88) == 88);	/* head and a text of up to seven digits */
	r = (void *)buf;
	CHECK(r->lost == text_number(r));	/* numbers begin at 0 */
	CHECK(read(fd, buf, 88) == 88 && r->lost == 0);
}

static void t_loss_by_filter(void)
{
	int all = dev_open(O_NONBLOCK), some = dev_open(O_NONBLOCK), w = dev_open(0);
	int mine = dev_open(O_NONBLOCK);
	unsigned int i, n = 30000, want = 0, hit = 0;
	struct tally a = { 0 }, s = { 0 }, m = { 0 };
	struct hwerr_ioc_stats st;

	filter_full(some, 1 << HWERR_SEV_CORRECTED, 1 << HWERR_SRC_BLOCK, 0);
	filter_full(mine, 0, OURS, 4242);
	for (i = 0; i < n; i++) {
		int sev = i % 5 ? HWERR_SEV_CORRECTED : HWERR_SEV_INFO;
		int src = i % 3 ? HWERR_SRC_BLOCK : HWERR_SRC_USER;
		struct msg msg;

		msg_init(&msg, sev, src);
		msg_number(&msg, i);
		if (i % 7 == 0) {
			struct hwerr_info_task *t = msg_info(&msg, HWERR_INFO_TASK, sizeof(*t));

			t->tgid = i % 2 ? 4242 : 4243;
			hit += t->tgid == 4242;
		}
		want += sev == HWERR_SEV_CORRECTED && src == HWERR_SRC_BLOCK;
		put(w, &msg);
	}
	/* From here on none is evicted, so what is pending may still be told. */
	drain(all, &a);
	drain(some, &s);
	drain(mine, &m);
	CHECK(a.lost && a.read + a.lost == n);
	CHECK(s.lost && s.read + s.lost == want);
	st = stats(mine);
	CHECK(m.lost && m.read && m.read + m.lost == hit && st.reader_lost == m.lost);
}

static void t_seek_counts_evicted(void)
{
	int fd = dev_open(O_NONBLOCK), w = dev_open(0);
	unsigned int i, n = 20000;
	struct tally t = { 0 };
	uint64_t first = info(w).next_seq, next;

	filter_full(fd, 0, 0, 0);
	for (i = 0; i < n; i++)
		put_number(w, HWERR_SEV_CORRECTED, i);
	next = info(w).next_seq;
	seek_to(fd, HWERR_SEEK_SEQ, first);
	drain(fd, &t);
	CHECK(t.lost > 0 && t.read + t.lost >= next - first);
	CHECK(t.last_seq - first + 1 == t.read + t.lost);
}

/* What is older than where the cursor was set is nobody's loss, also if it goes unseen. */
static void t_seek_then_evicted(void)
{
	int fd = dev_open(O_NONBLOCK), w = dev_open(0);
	struct tally t = { 0 };
	unsigned int i;

	for (i = 0; i < 100; i++)
		put_number(w, HWERR_SEV_CORRECTED, i);
	seek_to(fd, HWERR_SEEK_SEQ, info(fd).next_seq);
	for (i = 0; i < 20000; i++)
		put_number(w, HWERR_SEV_CORRECTED, 1000 + i);
	drain(fd, &t);
	CHECK(t.lost > 0 && t.read + t.lost == 20000);
}

static void t_seek_forgets_pending(void)
{
	int fd = dev_open(O_NONBLOCK), w = dev_open(0);
	unsigned int i;

	for (i = 0; i < 20000; i++)
		put_number(w, HWERR_SEV_CORRECTED, i);
	CHECK(stats(fd).reader_pending > 0);
	seek_to(fd, HWERR_SEEK_NOW, 0);
	CHECK(stats(fd).reader_pending == 0);
	put_number(w, HWERR_SEV_CORRECTED, i);
	CHECK(get(fd)->lost == 0);
}

/* From 32 bits it is the calls that differ, not the ring. */
#define STORM (sizeof(long) == 8 ? 100000 : 10000)
#define READERS 16

static int storm_done;

static void *storm_read(void *arg)
{
	int fd = (intptr_t)arg;
	struct tally *t = calloc(1, sizeof(*t));
	struct pollfd p = { .fd = fd, .events = POLLIN };

	while (!__atomic_load_n(&storm_done, __ATOMIC_ACQUIRE)) {
		CHECK(poll(&p, 1, 100) >= 0);
		drain(fd, t);
	}
	drain(fd, t);
	t->lost += stats(fd).reader_pending;
	return t;
}

static void t_storm_16_readers(void)
{
	pthread_t th[READERS];
	int fd[READERS], w = dev_open(0), i;
	struct msg m;

	for (i = 0; i < READERS; i++) {
		fd[i] = dev_open(O_NONBLOCK);
		CHECK(!pthread_create(&th[i], NULL, storm_read, (void *)(intptr_t)fd[i]));
	}
	for (i = 0; i < STORM; i++) {
		msg_init(&m, i % 100 ? HWERR_SEV_CORRECTED : HWERR_SEV_FATAL, HWERR_SRC_USER);
		msg_number(&m, i);
		put(w, &m);
	}
	__atomic_store_n(&storm_done, 1, __ATOMIC_RELEASE);
	for (i = 0; i < READERS; i++) {
		struct tally *t;

		CHECK(!pthread_join(th[i], (void **)&t));
		if (t->read + t->lost != STORM)
			fprintf(stderr, "reader %d: read %llu lost %llu\n", i,
				(unsigned long long)t->read, (unsigned long long)t->lost);
		CHECK(t->read + t->lost == STORM);
		CHECK(t->uncorrected == STORM / 100);
	}
}

static void t_corrected_never_evicts(void)
{
	int fd = dev_open(O_NONBLOCK), w = dev_open(0);
	unsigned int i, found = 0;
	struct hwerr_record *r;
	struct tally t = { 0 };

	for (i = 0; i < 100; i++)
		put_number(w, HWERR_SEV_RECOVERABLE, i);
	for (i = 0; i < 30000; i++)
		put_number(w, HWERR_SEV_CORRECTED, i);
	filter_full(fd, 1 << HWERR_SEV_RECOVERABLE, OURS, 0);
	CHECK(stats(fd).reader_lost > 0);	/* corrected ones, under the old filter */
	for (i = 0; i < 100; i++) {
		char buf[88] __attribute__((aligned(8)));

		CHECK(read(fd, buf, sizeof(buf)) == sizeof(buf));
		r = (void *)buf;
		CHECK(r->severity == HWERR_SEV_RECOVERABLE && text_number(r) == i);
		found++;
	}
	drain(fd, &t);
	CHECK(found == 100 && t.read == 0);
}

static void t_coalesced(void)
{
	int fd = dev_open(O_NONBLOCK), w = dev_open(0);
	struct pollfd p = { .fd = fd, .events = POLLIN };
	unsigned int i, n = 1000, sum = 0, records = 0, firsts = 0;
	struct hwerr_ioc_stats before = stats(w), after;
	uint64_t id = 0;
	struct msg m;

	for (i = 0; i < n; i++) {
		msg_init(&m, HWERR_SEV_CORRECTED, HWERR_SRC_USER);
		msg_text(&m, "the same");
		put(w, &m);
	}
	/* A pause of the machine longer than the window begins another run. */
	while (sum < n) {
		struct hwerr_record *r;

		CHECK(poll(&p, 1, 30000) == 1);
		r = get(fd);
		CHECK(r);
		if (r->flags & HWERR_F_COALESCED) {
			CHECK(firsts && r->id == id && r->seq != id);
		} else {
			CHECK(r->count == 1 && r->seq == r->id);
			id = r->id;
			firsts++;
		}
		sum += r->count;
		records++;
	}
	CHECK(sum == n && firsts && records < n / 10);
	after = stats(w);
	CHECK(after.errors - before.errors == n);
	CHECK(after.coalesced - before.coalesced == n - firsts);
	/* Uncorrected ones are each told, however alike. */
	for (i = 0; i < 3; i++) {
		msg_init(&m, HWERR_SEV_FATAL, HWERR_SRC_USER);
		msg_text(&m, "the same");
		put(w, &m);
		CHECK(get(fd)->count == 1);
	}
}

/* --- ioctls ---------------------------------------------------------------- */

#define SIZED(cmd, size) (((cmd) & ~IOCSIZE_MASK) | ((unsigned int)(size) << IOCSIZE_SHIFT))

static void t_ioctl_unknown(void)
{
	int fd = dev_open(0);
	char buf[256] = { 0 };

	FAILS(ioctl(fd, _IOR(HWERR_IOC_MAGIC, 100, struct hwerr_ioc_info), buf), ENOTTY);
	FAILS(ioctl(fd, _IOR('x', 0, struct hwerr_ioc_info), buf), ENOTTY);
	FAILS(ioctl(fd, _IOW(HWERR_IOC_MAGIC, 0, struct hwerr_ioc_info), buf), ENOTTY);
	FAILS(ioctl(fd, _IOWR(HWERR_IOC_MAGIC, 3, struct hwerr_ioc_filter), buf), ENOTTY);
	FAILS(ioctl(fd, TCGETS, buf), ENOTTY);
}

static void t_ioctl_sizes(void)
{
	static const struct { unsigned int cmd, size; bool in; } c[] = {
		{ HWERR_IOC_INFO, sizeof(struct hwerr_ioc_info), false },
		{ HWERR_IOC_STATS, sizeof(struct hwerr_ioc_stats), false },
		{ HWERR_IOC_GET_FILTER, sizeof(struct hwerr_ioc_filter), false },
		{ HWERR_IOC_SET_FILTER, sizeof(struct hwerr_ioc_filter), true },
		{ HWERR_IOC_SEEK, sizeof(struct hwerr_ioc_seek), true },
		{ HWERR_IOC_GUARDS, sizeof(struct hwerr_ioc_guards), true },
	};
	int fd = dev_open(0);
	unsigned int i, k;

	for (i = 0; i < ARRAY_SIZE(c); i++) {
		unsigned char buf[1024];

		memset(buf, 0, sizeof(buf));
		FAILS(ioctl(fd, SIZED(c[i].cmd, c[i].size - 8), buf), EINVAL);
		FAILS(ioctl(fd, SIZED(c[i].cmd, 0), buf), EINVAL);
		FAILS(ioctl(fd, c[i].cmd, bad), EFAULT);
		CHECK(!ioctl(fd, SIZED(c[i].cmd, c[i].size + 64), buf));
		if (c[i].in) {
			buf[c[i].size + 63] = 1;
			FAILS(ioctl(fd, SIZED(c[i].cmd, c[i].size + 64), buf), E2BIG);
		} else {
			memset(buf, 0xa5, sizeof(buf));
			CHECK(!ioctl(fd, SIZED(c[i].cmd, c[i].size + 64), buf));
			for (k = 0; k < 64; k++)
				CHECK(buf[c[i].size + k] == 0);
			CHECK(buf[c[i].size + 64] == 0xa5);
		}
	}
}

static void t_guard_sizes(void)
{
	struct { struct hwerr_ioc_guard g; char more[64]; } g = { 0 };
	struct { struct hwerr_ioc_stop s; char more[64]; } s = { 0 };
	int fd = dev_open(0), me = syscall(SYS_pidfd_open, getpid(), 0);

	CHECK(me >= 0);
	g.g.pidfd = me;
	s.s.pidfd = me;
	g.g.severity = HWERR_SEV_FATAL;
	FAILS(ioctl(fd, SIZED(HWERR_IOC_GUARD, sizeof(g.g) - 8), &g), EINVAL);
	FAILS(ioctl(fd, SIZED(HWERR_IOC_STOP, sizeof(s.s) - 8), &s), EINVAL);
	FAILS(ioctl(fd, HWERR_IOC_GUARD, bad), EFAULT);
	FAILS(ioctl(fd, HWERR_IOC_STOP, bad), EFAULT);
	CHECK(!ioctl(fd, SIZED(HWERR_IOC_GUARD, sizeof(g)), &g));
	FAILS(ioctl(fd, SIZED(HWERR_IOC_STOP, sizeof(s)), &s), ENXIO);
	g.more[63] = 1;
	s.more[63] = 1;
	FAILS(ioctl(fd, SIZED(HWERR_IOC_GUARD, sizeof(g)), &g), E2BIG);
	FAILS(ioctl(fd, SIZED(HWERR_IOC_STOP, sizeof(s)), &s), E2BIG);
}

/* The list is behind a pointer of 64 bits, for 32-bit callers too. */
static void t_guard_list(void)
{
	struct hwerr_guard_entry e[2] = { 0 };
	struct hwerr_ioc_guards l = { .entries = (uintptr_t)e, .count = 1 };
	int fd = dev_open(0), me = syscall(SYS_pidfd_open, getpid(), 0);
	struct hwerr_ioc_guard g = { .pidfd = me, .severity = HWERR_SEV_DEFERRED };

	CHECK(!ioctl(fd, HWERR_IOC_GUARDS, &l) && l.count == 0);
	CHECK(!ioctl(fd, HWERR_IOC_GUARD, &g));
	l.count = 0;
	CHECK(!ioctl(fd, HWERR_IOC_GUARDS, &l) && l.count == 1 && !e[0].tgid);
	CHECK(!ioctl(fd, HWERR_IOC_GUARDS, &l) && l.count == 1);
	CHECK(e[0].tgid == getpid() && e[0].severity == HWERR_SEV_DEFERRED && e[0].start_ns);
	CHECK(!e[0].flags && !e[0].stops && !e[0].stopped_ns && !e[1].tgid);
	l.entries = (uintptr_t)bad;
	FAILS(ioctl(fd, HWERR_IOC_GUARDS, &l), EFAULT);
}

static void t_ioctl_values(void)
{
	struct hwerr_ioc_filter f, old = { 0 }, now = { 0 };
	struct hwerr_ioc_seek s;
	int fd = dev_open(0);

	CHECK(!ioctl(fd, HWERR_IOC_GET_FILTER, &old));
#define BAD_FILTER(...) do {							\
	f = (struct hwerr_ioc_filter){ __VA_ARGS__ };				\
	FAILS(ioctl(fd, HWERR_IOC_SET_FILTER, &f), EINVAL);			\
} while (0)
	BAD_FILTER(.flags = 1);
	BAD_FILTER(.severities = 1ull << HWERR_SEV_COUNT);
	BAD_FILTER(.severities = ~0ull);
	BAD_FILTER(.sources = 1ull << HWERR_SRC_COUNT);
	BAD_FILTER(.sources = 1ull << 63);
	BAD_FILTER(.tgid = -1);
	CHECK(!ioctl(fd, HWERR_IOC_GET_FILTER, &now) && !memcmp(&old, &now, sizeof(now)));
#define BAD_SEEK(...) do {							\
	s = (struct hwerr_ioc_seek){ __VA_ARGS__ };				\
	FAILS(ioctl(fd, HWERR_IOC_SEEK, &s), EINVAL);				\
} while (0)
	BAD_SEEK(.whence = HWERR_SEEK_SEQ + 1);
	BAD_SEEK(.whence = HWERR_SEEK_NOW, .flags = 1);
	BAD_SEEK(.whence = HWERR_SEEK_NOW, .seq = 1);
	BAD_SEEK(.whence = HWERR_SEEK_OLDEST, .seq = 1);
	BAD_SEEK(.whence = HWERR_SEEK_SEQ, .seq = 0);
	BAD_SEEK(.whence = HWERR_SEEK_SEQ, .seq = info(fd).next_seq + 1000);
	BAD_SEEK(.whence = HWERR_SEEK_SEQ, .seq = ~0ull);
}

static void t_info_stats(void)
{
	int fd = dev_open(O_NONBLOCK);
	struct hwerr_ioc_stats a = stats(fd), b;
	struct hwerr_ioc_info i = info(fd);

	CHECK(i.abi_version == HWERR_ABI_VERSION && i.record_max == HWERR_RECORD_MAX);
	CHECK(i.scope == HWERR_SCOPE_ALL && i.pad == 0 && i.sources);
	CHECK(i.ring_bytes[0] >= 16384 && i.ring_bytes[1] >= 16384);
	put_number(fd, HWERR_SEV_FATAL, 1);
	CHECK(get(fd)->seq == i.next_seq);
	b = stats(fd);
	CHECK(b.records == a.records + 1 && b.errors == a.errors + 1);
	CHECK(b.by_severity[HWERR_SEV_FATAL] == a.by_severity[HWERR_SEV_FATAL] + 1);
	CHECK(b.by_source[HWERR_SRC_USER] == a.by_source[HWERR_SRC_USER] + 1);
	CHECK(b.reader_read == a.reader_read + 1 && b.readers >= 1);
}

/* --- publishing ------------------------------------------------------------ */

static void t_write_marks(void)
{
	int fd = dev_open(O_NONBLOCK);
	struct hwerr_record *r;
	struct msg m;

	msg_init(&m, HWERR_SEV_FATAL, HWERR_SRC_MCE);	/* claims to be hardware */
	filter_full(fd, 0, 1 << HWERR_SRC_MCE, 0);
	m.rec.seq = 12345;
	m.rec.lost = 77;
	put(fd, &m);
	r = get(fd);
	CHECK(r && r->flags & HWERR_F_SOFTWARE && r->lost == 0 && r->seq != 12345);
	CHECK(r->id == r->seq && r->count == 1 && r->time_mono_ns && r->time_real_ns);
	m.rec.time_mono_ns = 5;
	m.rec.time_real_ns = 6;
	m.rec.count = 9;
	m.rec.id = 3;
	put(fd, &m);
	r = get(fd);
	CHECK(r->time_mono_ns == 5 && r->time_real_ns == 6 && r->count == 9 && r->id == 3);
}

static void t_write_many(void)
{
	char buf[8192] __attribute__((aligned(8)));
	int fd = dev_open(O_NONBLOCK);
	struct tally t = { 0 };
	size_t at = 0;
	struct msg m;
	int i;

	for (i = 0; i < 10; i++) {
		msg_init(&m, HWERR_SEV_FATAL, HWERR_SRC_USER);
		msg_number(&m, i);
		memcpy(buf + at, &m.rec, m.rec.len);
		at += m.rec.len;
	}
	CHECK(write(fd, buf, at) == (ssize_t)at);
	drain(fd, &t);
	CHECK(t.read == 10);
	/* One bad at the end: none is published. */
	((struct hwerr_record *)(buf + at - m.rec.len))->severity = 200;
	FAILS(write(fd, buf, at), EINVAL);
	CHECK(!readable(fd));
}

static void reject(int fd, struct msg *m, size_t len, int line)
{
	errno = 0;
	if (write(fd, &m->rec, len) != -1 || errno != EINVAL) {
		fprintf(stderr, "abi.c:%d: accepted, or errno %d\n", line, errno);
		exit(1);
	}
}

#define REJECT(change) do {							\
	struct msg m_;								\
	struct hwerr_info_text *t_;						\
	msg_init(&m_, HWERR_SEV_FATAL, HWERR_SRC_USER);				\
	t_ = msg_info(&m_, HWERR_INFO_TEXT, sizeof(*t_) + 8);			\
	strcpy(t_->text, "text");						\
	size_t n_ = m_.rec.len;							\
	{ struct hwerr_record *r = &m_.rec; struct hwerr_info *i = &t_->head;	\
	  (void)r; (void)i; change; }						\
	reject(fd, &m_, n_, __LINE__);						\
} while (0)

static void t_write_rejects(void)
{
	int fd = dev_open(O_NONBLOCK);
	uint64_t before = stats(fd).records;
	struct msg m;

	REJECT(n_ = 0);
	REJECT(n_ = 8);
	REJECT(n_ = sizeof(struct hwerr_record) - 1);
	REJECT(n_ -= 8);
	REJECT(n_ += 8);
	REJECT(r->len = 0);
	REJECT(r->len -= 4);
	REJECT(r->len += 8);
	REJECT(r->len = 0xfffffff8);
	REJECT(r->len = HWERR_RECORD_MAX + 8; n_ = r->len);
	REJECT(r->hdr_len = 64);
	REJECT(r->hdr_len = 80);
	REJECT(r->hdr_len = 0);
	REJECT(r->version = 0);
	REJECT(r->version = 2);
	REJECT(r->severity = HWERR_SEV_COUNT);
	REJECT(r->source = HWERR_SRC_COUNT);
	REJECT(r->kind = HWERR_KIND_COUNT);
	REJECT(r->component = HWERR_COMP_COUNT);
	REJECT(r->flags = 0x80000000);
	REJECT(r->flags = HWERR_F_REDACTED);
	REJECT(r->flags = HWERR_F_STOPPED);
	REJECT(r->pad = 1);
	REJECT(r->cpu = -2);
	REJECT(i->len = 0);
	REJECT(i->len = 4);
	REJECT(i->len = 12);
	REJECT(i->len += 8);
	REJECT(i->len = 0xfffffff8);
	REJECT(i->type = 0);
	REJECT(i->type = HWERR_INFO_COUNT);
	REJECT(i->flags = 1);
	REJECT(i->type = HWERR_INFO_MCE);	/* of another size */
	REJECT(memset(i + 1, 'x', 8));		/* text without NUL */
	REJECT(n_ = 17 * HWERR_RECORD_MAX);

#define REJECT_INFO(type, name, change) do {					\
	struct name *p;								\
	msg_init(&m, HWERR_SEV_FATAL, HWERR_SRC_USER);				\
	p = msg_info(&m, type, sizeof(*p));					\
	{ change; }								\
	reject(fd, &m, m.rec.len, __LINE__);					\
} while (0)
	REJECT_INFO(HWERR_INFO_MCE, hwerr_info_mce, p->pad[4] = 1);
	REJECT_INFO(HWERR_INFO_PCI, hwerr_info_pci, p->pad[1] = 1);
	REJECT_INFO(HWERR_INFO_PCI, hwerr_info_pci, p->pad2 = 1);
	REJECT_INFO(HWERR_INFO_PCI, hwerr_info_pci, p->flags = 2);
	REJECT_INFO(HWERR_INFO_EDAC, hwerr_info_edac, memset(p->label, 'x', sizeof(p->label)));
	REJECT_INFO(HWERR_INFO_MEMORY, hwerr_info_memory, p->phys_len = 0);
	REJECT_INFO(HWERR_INFO_MEMORY, hwerr_info_memory, p->phys_len = 8; p->phys_addr = -4ull);
	REJECT_INFO(HWERR_INFO_MEMORY, hwerr_info_memory, p->phys_len = 8; p->pad = 1);
	REJECT_INFO(HWERR_INFO_GUEST, hwerr_info_guest, p->tgid = 0);
	REJECT_INFO(HWERR_INFO_GUEST, hwerr_info_guest,
		    p->tgid = 1; p->flags = HWERR_GUEST_STOPPED);
	REJECT_INFO(HWERR_INFO_GUEST, hwerr_info_guest, p->tgid = 1; p->pad = 1);
	REJECT_INFO(HWERR_INFO_GUEST, hwerr_info_guest,
		    p->tgid = 1; memset(p->comm, 'x', sizeof(p->comm)));
	REJECT_INFO(HWERR_INFO_TASK, hwerr_info_task, p->tgid = -5);
	REJECT_INFO(HWERR_INFO_TASK, hwerr_info_task, p->tgid = 1; p->flags = 2);
	REJECT_INFO(HWERR_INFO_CPER, hwerr_info_cper, p->data_len = 8);
	REJECT_INFO(HWERR_INFO_CPER, hwerr_info_cper, p->data_len = 0xfffffff9);
	REJECT_INFO(HWERR_INFO_CPER, hwerr_info_cper,
		    memset(p->fru_text, 'x', sizeof(p->fru_text)));
	REJECT_INFO(HWERR_INFO_CPER, hwerr_info_cper, p->flags = 4);
	REJECT_INFO(HWERR_INFO_VCPU, hwerr_info_vcpu, p->flags = 2);
	REJECT_INFO(HWERR_INFO_VCPU, hwerr_info_vcpu, p->insn_len = 17);
	REJECT_INFO(HWERR_INFO_VCPU, hwerr_info_vcpu, p->error = 1);
	REJECT_INFO(HWERR_INFO_BLOCK, hwerr_info_block, memset(p->disk, 'x', sizeof(p->disk)));
	FAILS(write(fd, bad, sizeof(struct hwerr_record)), EFAULT);
	CHECK(!readable(fd) && stats(fd).records == before);
}

static void t_write_largest(void)
{
	char buf[HWERR_RECORD_MAX] __attribute__((aligned(8)));
	int fd = dev_open(O_NONBLOCK);
	struct hwerr_info_text *t;
	struct msg m;

	msg_init(&m, HWERR_SEV_FATAL, HWERR_SRC_USER);
	t = msg_info(&m, HWERR_INFO_TEXT, HWERR_RECORD_MAX - sizeof(m.rec));
	memset(t->text, 'y', HWERR_RECORD_MAX - sizeof(m.rec) - sizeof(*t) - 1);
	CHECK(m.rec.len == HWERR_RECORD_MAX);
	put(fd, &m);
	CHECK(read(fd, buf, sizeof(buf)) == HWERR_RECORD_MAX);
	CHECK(!memcmp(buf + sizeof(m.rec), m.room, HWERR_RECORD_MAX - sizeof(m.rec)));
}

/* --- scope ----------------------------------------------------------------- */

static void drop_root(void)
{
	CHECK(!setgroups(0, NULL) && !setresgid(65534, 65534, 65534));
	CHECK(!setresuid(65534, 65534, 65534));
}

static void in_child(void (*fn)(int), int fd)
{
	int status;
	pid_t pid = fork();

	if (!pid) {
		fn(fd);
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid && status == 0);
}

static void unprivileged(int w)
{
	struct hwerr_ioc_filter f = { .tgid = 1 };
	struct hwerr_ioc_stats s;
	struct msg m;
	int fd;

	drop_root();
	fd = open(DEV, O_RDWR | O_NONBLOCK);
	CHECK(fd >= 0);
	CHECK(info(fd).scope == HWERR_SCOPE_SELF);
	CHECK(info(fd).oldest_seq == 0 && info(fd).next_seq == 0);
	/* @w was opened by root: its rights went with the file. */
	put_number(w, HWERR_SEV_FATAL, 1);
	CHECK(!readable(fd));
	seek_to(fd, HWERR_SEEK_OLDEST, 0);
	CHECK(!readable(fd));
	filter_full(fd, 0, 0, 0);
	CHECK(!readable(fd));
	filter_full(fd, 0, 0, getpid());
	CHECK(!readable(fd));
	FAILS(ioctl(fd, HWERR_IOC_SET_FILTER, &f), EPERM);
	msg_init(&m, HWERR_SEV_FATAL, HWERR_SRC_USER);
	FAILS(write(fd, &m.rec, m.rec.len), EPERM);
	s = stats(fd);
	CHECK(s.records == 0 && s.errors == 0 && s.readers == 0 && s.reader_lost == 0);
}

/* The start of this process as the kernel has it; a process may guard itself, and list that. */
static uint64_t own_start(int fd)
{
	struct hwerr_guard_entry e = { 0 };
	struct hwerr_ioc_guard g = { .severity = HWERR_SEV_FATAL };
	struct hwerr_ioc_guards list = { .entries = (uintptr_t)&e, .count = 1 };

	g.pidfd = syscall(SYS_pidfd_open, getpid(), 0);
	CHECK(!ioctl(fd, HWERR_IOC_GUARD, &g));
	CHECK(!ioctl(fd, HWERR_IOC_GUARDS, &list) && list.count == 1 && e.tgid == getpid());
	close(g.pidfd);
	return e.start_ns;
}

static void redacted(int w)
{
	struct hwerr_info_memory *memory;
	struct hwerr_info_mce *mce;
	struct hwerr_info_guest *g;
	struct hwerr_info_task *t;
	struct hwerr_info_pci *p;
	struct hwerr_record *r;
	struct msg m;
	struct hwerr_info *i;
	uint64_t start;
	char *at;
	int fd, seen = 0;

	drop_root();
	fd = open(DEV, O_RDWR | O_NONBLOCK);
	CHECK(fd >= 0);
	start = own_start(fd);
	msg_init(&m, HWERR_SEV_FATAL, HWERR_SRC_USER);
	m.rec.cpu = 1;
	mce = msg_info(&m, HWERR_INFO_MCE, sizeof(*mce));
	mce->addr = 1 << 30;
	p = msg_info(&m, HWERR_INFO_PCI, sizeof(*p));
	p->bus = 3;
	p->flags = HWERR_PCI_TLP;
	p->tlp[2] = 0xfebc0000;
	msg_info(&m, HWERR_INFO_EDAC, sizeof(struct hwerr_info_edac));
	memory = msg_info(&m, HWERR_INFO_MEMORY, sizeof(*memory));
	memory->phys_len = 8;
	t = msg_info(&m, HWERR_INFO_TASK, sizeof(*t));
	t->tgid = getppid();
	t = msg_info(&m, HWERR_INFO_TASK, sizeof(*t));
	t->tgid = getpid();
	t->start_ns = start;
	g = msg_info(&m, HWERR_INFO_GUEST, sizeof(*g));
	g->tgid = getpid();	/* somebody of that number before */
	g->start_ns = start - 1;
	g = msg_info(&m, HWERR_INFO_GUEST, sizeof(*g));
	g->tgid = getpid();
	g->start_ns = start;
	msg_text(&m, "at 0x40000000");
	msg_info(&m, HWERR_INFO_CPER, sizeof(struct hwerr_info_cper));
	msg_info(&m, HWERR_INFO_VCPU, sizeof(struct hwerr_info_vcpu));
	msg_info(&m, HWERR_INFO_BLOCK, sizeof(struct hwerr_info_block));
	put(w, &m);

	r = get(fd);
	CHECK(r->flags & HWERR_F_REDACTED && r->cpu == -1 && r->severity == HWERR_SEV_FATAL);
	for (at = (char *)r + r->hdr_len; at < (char *)r + r->len; at += i->len) {
		i = (void *)at;

		CHECK(!(seen & 1 << i->type));
		seen |= 1 << i->type;
		p = (void *)i;
		t = (void *)i;
		g = (void *)i;
		if (i->type == HWERR_INFO_PCI)
			CHECK(p->bus == 3 && !p->flags &&
			      !(p->tlp[0] | p->tlp[1] | p->tlp[2] | p->tlp[3]));
		if (i->type == HWERR_INFO_TASK)
			CHECK(t->tgid == getpid() && t->start_ns == start);
		if (i->type == HWERR_INFO_GUEST)
			CHECK(g->tgid == getpid() && g->start_ns == start);
	}
	CHECK(seen == (1 << HWERR_INFO_PCI | 1 << HWERR_INFO_TASK | 1 << HWERR_INFO_GUEST |
		       1 << HWERR_INFO_VCPU));
	CHECK(!readable(fd));
}

static void t_scope_redacts(void)
{
	in_child(redacted, dev_open(0));
}

static void t_scope_unprivileged(void)
{
	in_child(unprivileged, dev_open(0));
}

static void write_to(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);

	CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
	close(fd);
}

/* All capabilities, but those of a user namespace of one's own. */
static void in_user_namespace(int w)
{
	struct hwerr_ioc_guard g = { .severity = HWERR_SEV_FATAL };
	struct msg m;
	int fd;

	g.pidfd = syscall(SYS_pidfd_open, getppid(), 0);
	drop_root();
	/* Another uid makes the process's files root's, until it may be traced. */
	CHECK(!prctl(PR_SET_DUMPABLE, 1) && !unshare(CLONE_NEWUSER));
	write_to("/proc/self/setgroups", "deny");
	write_to("/proc/self/uid_map", "0 65534 1");
	write_to("/proc/self/gid_map", "0 65534 1");
	CHECK(getuid() == 0);
	fd = open(DEV, O_RDWR | O_NONBLOCK);
	CHECK(fd >= 0 && info(fd).scope == HWERR_SCOPE_SELF);
	put_number(w, HWERR_SEV_FATAL, 1);
	CHECK(!readable(fd));
	msg_init(&m, HWERR_SEV_FATAL, HWERR_SRC_USER);
	FAILS(write(fd, &m.rec, m.rec.len), EPERM);
	FAILS(ioctl(fd, HWERR_IOC_GUARD, &g), EPERM);
}

static void t_scope_user_namespace(void)
{
	in_child(in_user_namespace, dev_open(0));
}

/* A child with the file of its parent, which has no rights: the view is the parent's. */
static void inherit(int w)
{
	struct hwerr_ioc_guard g = { .severity = HWERR_SEV_FATAL };
	struct hwerr_ioc_filter f = { 0 };
	int fd, status;
	pid_t pid;

	drop_root();
	fd = open(DEV, O_RDWR | O_NONBLOCK);
	CHECK(fd >= 0);
	pid = fork();
	if (!pid) {
		g.pidfd = syscall(SYS_pidfd_open, getpid(), 0);
		f.tgid = getpid();
		FAILS(ioctl(fd, HWERR_IOC_GUARD, &g), EPERM);
		FAILS(ioctl(fd, HWERR_IOC_STOP, &(struct hwerr_ioc_stop){ .pidfd = g.pidfd }),
		      EPERM);
		FAILS(ioctl(fd, HWERR_IOC_SET_FILTER, &f), EPERM);
		put_number(w, HWERR_SEV_FATAL, 1);
		CHECK(!readable(fd));
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid && status == 0);
}

static void t_scope_inherited(void)
{
	in_child(inherit, dev_open(0));
}

static void guard_self(int fd, __u32 severity, __u32 flags, int err)
{
	struct hwerr_ioc_guard g = { .severity = severity, .flags = flags };

	g.pidfd = syscall(SYS_pidfd_open, getpid(), 0);
	CHECK(g.pidfd >= 0);
	if (err)
		FAILS(ioctl(fd, HWERR_IOC_GUARD, &g), err);
	else
		CHECK(!ioctl(fd, HWERR_IOC_GUARD, &g));
	close(g.pidfd);
}

static void weaken(int root)
{
	int fd;

	guard_self(root, HWERR_SEV_RECOVERABLE, 0, 0);
	drop_root();
	fd = open(DEV, O_RDWR);
	CHECK(fd >= 0);
	guard_self(fd, HWERR_SEV_FATAL, 0, EPERM);
	guard_self(fd, 0, HWERR_GUARD_REMOVE, EPERM);
	/* The one who may takes it back; then it is one's own to do with as one likes. */
	guard_self(root, 0, HWERR_GUARD_REMOVE, 0);
	guard_self(fd, HWERR_SEV_FATAL, 0, 0);
	guard_self(fd, HWERR_SEV_RECOVERABLE, 0, 0);
	guard_self(root, HWERR_SEV_DEFERRED, 0, 0);
	guard_self(fd, 0, HWERR_GUARD_REMOVE, EPERM);
	guard_self(root, 0, HWERR_GUARD_REMOVE, 0);
	guard_self(fd, HWERR_SEV_FATAL, 0, 0);
	guard_self(fd, 0, HWERR_GUARD_REMOVE, 0);
	guard_self(fd, 0, HWERR_GUARD_REMOVE, ENOENT);
}

static void t_guard_not_weakened(void)
{
	in_child(weaken, dev_open(0));
}

#define GUARDS_OWN_MAX	2048

/* One child after the other guards itself, until it is refused; they wait for the pipe's end. */
static void crowd(int done)
{
	int up[2], hold[2], fd, n, err = 0;
	char c;

	drop_root();
	CHECK(!pipe(up) && !pipe(hold));
	for (n = 0; !err; n++) {
		pid_t pid = fork();

		CHECK(pid >= 0 && n <= GUARDS_OWN_MAX);
		if (!pid) {
			struct hwerr_ioc_guard g = { .severity = HWERR_SEV_FATAL };

			close(hold[1]);
			fd = open(DEV, O_RDWR);
			g.pidfd = syscall(SYS_pidfd_open, getpid(), 0);
			c = ioctl(fd, HWERR_IOC_GUARD, &g) ? errno : 0;
			CHECK(write(up[1], &c, 1) == 1);
			CHECK(read(hold[0], &c, 1) == 0);
			_exit(0);
		}
		CHECK(read(up[0], &c, 1) == 1);
		err = c;
	}
	CHECK(err == ENOSPC && n == GUARDS_OWN_MAX + 1);
	/* @done was opened by root, and has room all the same. */
	guard_self(done, HWERR_SEV_FATAL, 0, 0);
	close(hold[1]);
	while (wait(NULL) > 0)
		;
	fd = open(DEV, O_RDWR);
	CHECK(fd >= 0);
	guard_self(done, 0, HWERR_GUARD_REMOVE, 0);
	guard_self(fd, HWERR_SEV_FATAL, 0, 0);
}

static void t_guard_room(void)
{
	in_child(crowd, dev_open(0));
}

static long switches(pid_t pid)
{
	char path[64], line[256];
	long n = -1;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/status", pid);
	f = fopen(path, "r");
	CHECK(f);
	while (fgets(line, sizeof(line), f))
		if (sscanf(line, "voluntary_ctxt_switches: %ld", &n) == 1)
			break;
	fclose(f);
	CHECK(n >= 0);
	return n;
}

/* A process that moves its own cursor, without end, wakes nobody else. */
static void t_seek_wakes_nobody(void)
{
	struct hwerr_ioc_seek s = { .whence = HWERR_SEEK_NOW };
	int fd = dev_open(0), i, status;
	long before;
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (!pid) {
		struct pollfd p = { .fd = dev_open(O_NONBLOCK), .events = POLLIN };

		CHECK(poll(&p, 1, -1) == 1);
		_exit(0);
	}
	await_state(pid);
	before = switches(pid);
	for (i = 0; i < 1000; i++)
		CHECK(!ioctl(fd, HWERR_IOC_SEEK, &s));
	await_state(pid);
	CHECK(switches(pid) - before < 10);
	put_number(fd, HWERR_SEV_FATAL, 1);
	CHECK(waitpid(pid, &status, 0) == pid && status == 0);
}

/* An error of others wakes no reader that may not see it, however often it waits. */
static void scoped_sleeper(int ready)
{
	struct pollfd p = { .events = POLLIN };
	struct epoll_event e = { .events = EPOLLIN };
	uint64_t start;
	int ep;

	drop_root();
	/* Another user's credentials undo it. */
	CHECK(!prctl(PR_SET_PDEATHSIG, SIGKILL));
	p.fd = open(DEV, O_RDWR | O_NONBLOCK);
	CHECK(p.fd >= 0);
	start = own_start(p.fd);
	ep = epoll_create1(0);
	CHECK(ep >= 0 && !epoll_ctl(ep, EPOLL_CTL_ADD, p.fd, &e));
	CHECK(write(ready, &start, sizeof(start)) == sizeof(start));
	CHECK(epoll_wait(ep, &e, 1, -1) == 1);
	CHECK(poll(&p, 1, -1) == 1);
	CHECK(get(p.fd)->severity == HWERR_SEV_FATAL);
	/* And in read(). */
	CHECK(!fcntl(p.fd, F_SETFL, 0));
	CHECK(write(ready, &start, sizeof(start)) == sizeof(start));
	CHECK(get(p.fd)->severity == HWERR_SEV_FATAL);
}

static void t_scope_not_woken(void)
{
	int w = dev_open(0), pipes[2], round, i, status;
	uint64_t start;
	long before;
	pid_t pid;

	CHECK(!pipe(pipes));
	pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		scoped_sleeper(pipes[1]);
		_exit(0);
	}
	for (round = 0; round < 2; round++) {
		struct hwerr_info_task *t;
		struct msg m;

		CHECK(read(pipes[0], &start, sizeof(start)) == sizeof(start));
		await_state(pid);
		before = switches(pid);
		for (i = 0; i < 1000; i++)
			put_number(w, HWERR_SEV_FATAL, i);
		await_state(pid);
		CHECK(switches(pid) - before < 10);
		msg_init(&m, HWERR_SEV_FATAL, HWERR_SRC_USER);
		t = msg_info(&m, HWERR_INFO_TASK, sizeof(*t));
		t->tgid = pid;
		t->start_ns = start;
		put(w, &m);
	}
	CHECK(waitpid(pid, &status, 0) == pid && status == 0);
}

static unsigned int stormed;

/* Every second one hits process 4242, and has the next number. */
static void *storm_write(void *arg)
{
	int fd = (intptr_t)arg;
	unsigned int i;

	for (i = 0; !__atomic_load_n(&storm_done, __ATOMIC_ACQUIRE); i++) {
		struct hwerr_info_task *t;
		struct msg m;

		msg_init(&m, HWERR_SEV_CORRECTED, i % 4 < 2 ? HWERR_SRC_USER : HWERR_SRC_BLOCK);
		msg_number(&m, i);
		t = msg_info(&m, HWERR_INFO_TASK, sizeof(*t));
		t->tgid = i % 2 ? 4242 : 4243;
		put(fd, &m);
		__atomic_store_n(&stormed, i / 2 + i % 2, __ATOMIC_RELEASE);
	}
	return NULL;
}

/* Blocks until the storm has gone on by @n of its numbers. */
static void let_storm(unsigned int n)
{
	unsigned int from = __atomic_load_n(&stormed, __ATOMIC_ACQUIRE);

	while (__atomic_load_n(&stormed, __ATOMIC_ACQUIRE) - from < n)
		sched_yield();
}

/*
 * A cursor or filter set while the ring turns over under it: the first record after it tells
 * exactly what was lost since, and a new filter that wants the same loses the same.
 */
static void t_set_under_storm(void)
{
	int fd = dev_open(0), w = dev_open(0), round;
	pthread_t th;

	CHECK(!pthread_create(&th, NULL, storm_write, (void *)(intptr_t)w));
	filter_full(fd, 0, OURS, 4242);
	for (round = 0; round < 12; round++) {
		unsigned int before = __atomic_load_n(&stormed, __ATOMIC_ACQUIRE), after, last;
		struct hwerr_record *r;

		seek_to(fd, HWERR_SEEK_NOW, 0);
		after = __atomic_load_n(&stormed, __ATOMIC_ACQUIRE);
		if (round % 3)
			let_storm(round % 3 * 1500);
		r = get(fd);
		/* A number may be put before it is told in @stormed. */
		CHECK(text_number(r) / 2 - r->lost >= before);
		CHECK(text_number(r) / 2 - r->lost <= after + 1);
		CHECK(round % 3 != 2 || r->lost);
		last = text_number(r) / 2;
		if (round % 2)
			let_storm(1500);
		filter_full(fd, round % 4 < 2 ? 1 << HWERR_SEV_CORRECTED : 0, OURS, 4242);
		if (round % 5 == 0)
			let_storm(1500);
		r = get(fd);
		CHECK(text_number(r) / 2 - last == 1 + r->lost);
	}
	__atomic_store_n(&storm_done, 1, __ATOMIC_RELEASE);
	CHECK(!pthread_join(th, NULL));
}

static void pass_fd(int sock, int fd)
{
	char c = 'x', ctl[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec io = { &c, 1 };
	struct msghdr h = { .msg_iov = &io, .msg_iovlen = 1, .msg_control = ctl,
			    .msg_controllen = sizeof(ctl) };
	struct cmsghdr *k = CMSG_FIRSTHDR(&h);

	k->cmsg_level = SOL_SOCKET;
	k->cmsg_type = SCM_RIGHTS;
	k->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(k), &fd, sizeof(int));
	CHECK(sendmsg(sock, &h, 0) == 1);
}

static void give_unprivileged(int sock)
{
	drop_root();
	pass_fd(sock, open(DEV, O_RDWR | O_NONBLOCK));
}

static void t_scope_stays_with_opener(void)
{
	char c, ctl[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec io = { &c, 1 };
	struct msghdr h = { .msg_iov = &io, .msg_iovlen = 1, .msg_control = ctl,
			    .msg_controllen = sizeof(ctl) };
	int sv[2], fd;
	struct msg m;

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, sv));
	in_child(give_unprivileged, sv[1]);
	CHECK(recvmsg(sv[0], &h, 0) == 1);
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&h)), sizeof(int));
	/* Root with a file that an unprivileged process opened. */
	CHECK(info(fd).scope == HWERR_SCOPE_SELF);
	msg_init(&m, HWERR_SEV_FATAL, HWERR_SRC_USER);
	FAILS(write(fd, &m.rec, m.rec.len), EPERM);
	put_number(dev_open(0), HWERR_SEV_FATAL, 1);
	CHECK(!readable(fd));
}

/* --- module ---------------------------------------------------------------- */

static void t_rmmod_refused(void)
{
	int fd = dev_open(O_NONBLOCK);

	FAILS(syscall(SYS_delete_module, "hwerr", O_NONBLOCK), EWOULDBLOCK);
	put_number(fd, HWERR_SEV_FATAL, 1);
	CHECK(text_number(get(fd)) == 1);
}

static const struct { const char *name; void (*fn)(void); } tests[] = {
#define T(name) { #name, t_##name }
	T(nonblock), T(short_buffer), T(bad_pointer), T(whole_records), T(blocking_read),
	T(seek_ends_wait), T(filter_ends_wait), T(filter_gives_back),
	T(signal_ends_wait), T(not_seekable), T(poll), T(poll_filter), T(epoll_edge),
	T(two_readers), T(dup_fork), T(history), T(overflow_exact),
	T(first_after_gap_tells), T(loss_by_filter), T(seek_counts_evicted),
	T(seek_then_evicted), T(seek_forgets_pending),
	T(storm_16_readers), T(corrected_never_evicts), T(coalesced),
	T(ioctl_unknown), T(ioctl_sizes), T(guard_sizes), T(guard_list), T(ioctl_values),
	T(info_stats),
	T(write_marks), T(write_many), T(write_rejects), T(write_largest),
	T(scope_unprivileged), T(scope_redacts), T(scope_user_namespace), T(scope_inherited),
	T(scope_stays_with_opener), T(guard_not_weakened), T(guard_room), T(seek_wakes_nobody),
	T(scope_not_woken), T(set_under_storm),
	T(rmmod_refused),
};

int main(int argc, char **argv)
{
	size_t i;

	if (argc == 2 && !strcmp(argv[1], "--list")) {
		for (i = 0; i < ARRAY_SIZE(tests); i++)
			puts(tests[i].name);
		return 0;
	}
	for (i = 0; argc == 2 && i < ARRAY_SIZE(tests); i++) {
		if (strcmp(argv[1], tests[i].name))
			continue;
		tests[i].fn();
		return 0;
	}
	fprintf(stderr, "usage: abi --list | NAME\n");
	return 2;
}
