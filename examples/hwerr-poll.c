// SPDX-License-Identifier: MIT
/*
 * Waits for hardware errors that hit this process, and prints them: what a VMM
 * would do in its main loop. Opened without CAP_SYS_ADMIN, /dev/hwerr gives
 * nothing but those; as root, add "-a" to see every error of the host.
 *
 *	cc -Wall -o hwerr-poll hwerr-poll.c -I../kmod/uapi
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "hwerr.h"

static const char *severity_name(unsigned int severity)
{
	static const char *const name[] = {
		[HWERR_SEV_INFO] = "info",
		[HWERR_SEV_CORRECTED] = "corrected",
		[HWERR_SEV_DEFERRED] = "deferred",
		[HWERR_SEV_RECOVERABLE] = "recoverable",
		[HWERR_SEV_FATAL] = "fatal",
	};

	/* A later kernel may know worse ones. */
	return severity < HWERR_SEV_COUNT ? name[severity] : "unknown";
}

static void print_info(const struct hwerr_info *info)
{
	const void *p = info;

	switch (info->type) {
	case HWERR_INFO_GUEST: {
		const struct hwerr_info_guest *guest = p;

		printf("  guest pid %d %s hva 0x%" PRIx64, guest->tgid, guest->comm,
		       (uint64_t)guest->hva);
		if (guest->gpa != HWERR_NO_GPA)
			printf(" gpa 0x%" PRIx64, (uint64_t)guest->gpa);
		printf(" len %" PRIu64 "\n", (uint64_t)guest->len);
		break;
	}
	case HWERR_INFO_TASK: {
		const struct hwerr_info_task *task = p;

		printf("  task pid %d %s va 0x%" PRIx64 " len %" PRIu64 "\n", task->tgid,
		       task->comm, (uint64_t)task->va, (uint64_t)task->len);
		break;
	}
	case HWERR_INFO_MEMORY: {
		const struct hwerr_info_memory *memory = p;

		printf("  memory 0x%" PRIx64 " len %" PRIu64 "\n",
		       (uint64_t)memory->phys_addr, (uint64_t)memory->phys_len);
		break;
	}
	/* Types that are not of interest, or not known yet, are stepped over. */
	}
}

static void print_record(const struct hwerr_record *rec)
{
	const char *p = (const char *)rec + rec->hdr_len;
	const char *end = (const char *)rec + rec->len;

	if (rec->lost)
		printf("%" PRIu64 " records lost\n", (uint64_t)rec->lost);
	printf("%" PRIu64 " %s source %u%s\n", (uint64_t)rec->seq, severity_name(rec->severity),
	       rec->source, rec->flags & HWERR_F_ACTION_REQUIRED ? " action required" : "");
	for (; p < end; p += ((const struct hwerr_info *)p)->len)
		print_info((const struct hwerr_info *)p);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	/* Records are multiples of eight bytes, so each is aligned if the first is. */
	static _Alignas(8) char buf[4 * HWERR_RECORD_MAX];
	struct hwerr_ioc_filter filter = { .tgid = getpid() };
	struct hwerr_ioc_info info;
	struct pollfd pfd = { .events = POLLIN };

	pfd.fd = open("/dev/hwerr", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (pfd.fd < 0) {
		perror("/dev/hwerr");
		return 1;
	}
	if (ioctl(pfd.fd, HWERR_IOC_INFO, &info)) {
		perror("HWERR_IOC_INFO");
		return 1;
	}
	/*
	 * Without CAP_SYS_ADMIN there is nothing but one's own. With it, one's number in the
	 * initial PID namespace is wanted, which a container does not know: so drop it first.
	 */
	if ((argc > 1 && !strcmp(argv[1], "-a")) || info.scope == HWERR_SCOPE_SELF)
		filter.tgid = 0;
	if (ioctl(pfd.fd, HWERR_IOC_SET_FILTER, &filter)) {
		perror("HWERR_IOC_SET_FILTER");
		return 1;
	}
	while (poll(&pfd, 1, -1) > 0 || errno == EINTR) {
		ssize_t n = read(pfd.fd, buf, sizeof(buf));

		if (n < 0) {
			if (errno != EAGAIN && errno != EINTR)
				break;
			continue;
		}
		for (const char *p = buf; p < buf + n; p += ((const struct hwerr_record *)p)->len)
			print_record((const struct hwerr_record *)p);
	}
	perror("/dev/hwerr");
	return 1;
}
