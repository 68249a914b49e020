// SPDX-License-Identifier: GPL-2.0-only
/*
 * The open files of a process, without waiting and without a reference.
 *
 * iterate_fd() under task_lock() is how net/core/netclassid_cgroup.c does it:
 * task_lock() keeps the table, files->file_lock the files in it. Both are
 * spinlocks of process context. A context that could have been preempted holds
 * neither, and may take them. Any other may have interrupted their holder on
 * this CPU: there a lock is tried, a bounded number of times, and taken only
 * after it was seen free, which the interrupted context cannot change.
 */
#include <linux/fdtable.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/clock.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>

#include "hwerr.h"
#include "owners.h"

/* Files seen in one hold of the locks, as UPDATE_CLASSID_BATCH. */
#define FILES_BATCH	1000
/* Files of a process that are looked at. */
#define FILES_MAX	(128 * FILES_BATCH)
/*
 * Time for those of all processes, in one lookup that could not be preempted: many tables may have
 * many places, and places without a file take time as well.
 */
#define FILES_NS	(50 * NSEC_PER_MSEC)
#define LOCK_TRIES	1000

struct files_walk {
	bool (*fn)(struct file *file, void *arg);
	void *arg;
	unsigned int batch;
	bool found;
};

static int files_one(const void *arg, struct file *file, unsigned int fd)
{
	struct files_walk *w = (struct files_walk *)arg;

	if (w->fn(file, w->arg)) {
		w->found = true;
		return fd + 1;
	}
	return --w->batch ? 0 : fd + 1;
}

/* Looks at the next batch of files from @fd on; where to go on, 0 at the end. */
static int files_batch(struct hwerr_owners *o, struct task_struct *task, int fd,
		       struct files_walk *w)
{
	struct files_struct *files;
	int i;

	w->batch = FILES_BATCH;
	if (o->may_sleep) {
		task_lock(task);
		fd = iterate_fd(task->files, fd, files_one, w);
		task_unlock(task);
		return fd;
	}
	for (i = 0; i < LOCK_TRIES; i++) {
		if (!spin_trylock(&task->alloc_lock)) {
			cpu_relax();
			continue;
		}
		files = task->files;
		if (files) {
			if (!spin_trylock(&files->file_lock)) {
				spin_unlock(&task->alloc_lock);
				cpu_relax();
				continue;
			}
			spin_unlock(&files->file_lock);
		}
		fd = iterate_fd(files, fd, files_one, w);
		spin_unlock(&task->alloc_lock);
		return fd;
	}
	return -EBUSY;
}

static int files_of(struct hwerr_owners *o, struct task_struct *task,
		    struct files_walk *w)
{
	unsigned int seen;
	int fd = 0;

	for (seen = 0; seen < FILES_MAX; seen += FILES_BATCH) {
		u64 start = local_clock();

		if (!o->may_sleep && o->files_ns > FILES_NS)
			return -EBUSY;
		fd = files_batch(o, task, fd, w);
		o->files_ns += local_clock() - start;
		if (w->found)
			return 1;
		if (fd <= 0)
			return fd;
	}
	return -EBUSY;
}

int hwerr_files_each(struct hwerr_owners *o, struct task_struct *task,
		     bool (*fn)(struct file *file, void *arg), void *arg)
{
	struct task_struct *other[HWERR_OWNERS_THREADS];
	struct files_walk w = { .fn = fn, .arg = arg };
	struct files_struct *seen = READ_ONCE(task->files);
	struct task_struct *t;
	unsigned int i, nr = 0;
	bool more = false;
	int ret;

	ret = files_of(o, task, &w);
	if (ret > 0)
		return ret;

	/* Threads share the table unless one called unshare(CLONE_FILES). */
	rcu_read_lock();
	for_each_thread(task, t) {
		struct files_struct *files = READ_ONCE(t->files);

		if (!files || files == seen)
			continue;
		if (nr == ARRAY_SIZE(other)) {
			more = true;
			break;
		}
		other[nr++] = t;
		get_task_struct(t);
	}
	rcu_read_unlock();

	for (i = 0; i < nr; i++) {
		int r = w.found ? 0 : files_of(o, other[i], &w);

		if (r < 0)
			ret = r;
		put_task_struct(other[i]);
	}
	if (w.found)
		return 1;
	return more ? -EBUSY : ret;
}
