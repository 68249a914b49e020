// SPDX-License-Identifier: GPL-2.0-only
/*
 * Guards: which processes' VMs are stopped when an error hits them.
 *
 * A guard names a process by its struct pid, got from a pidfd: whoever gets the
 * number later is somebody else. It holds no more than that, so the process and
 * its VM end as they please; what is left of the guard goes when the table is
 * listed, or when its room is wanted.
 *
 * A process may guard itself without CAP_SYS_ADMIN. That can neither fill the table
 * for those who have it, nor undo what they have armed.
 *
 * The event path asks once for an owner, by number and start time, in the
 * contexts of owners.c; hence a raw lock and a bounded table.
 */
#include <linux/hashtable.h>
#include <linux/jiffies.h>
#include <linux/ktime.h>
#include <linux/pid.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "compat.h"
#include "guard.h"
#include "hwerr.h"
#include "owners.h"
#include "ring.h"

#define GUARDS_MAX	4096
/* Of them, those that processes without CAP_SYS_ADMIN have armed for themselves. */
#define GUARDS_OWN_MAX	(GUARDS_MAX / 2)

/**
 * struct hwerr_guard - one armed process
 * @node: in the table
 * @pid: whom; a reference
 * @tgid: its number in the initial namespace
 * @start_ns: its start
 * @severity: least one that stops it
 * @flags: HWERR_GUARD_KEEP
 * @own: armed by the process itself, without CAP_SYS_ADMIN
 * @stops: how often it was stopped
 * @stopped_ns: when last
 * @reader: file it ends with; it ends before that does
 */
struct hwerr_guard {
	struct hlist_node node;
	struct pid *pid;
	s32 tgid;
	u64 start_ns;
	u32 severity;
	u32 flags;
	bool own;
	u32 stops;
	u64 stopped_ns;
	struct hwerr_reader *reader;
};

static struct {
	raw_spinlock_t lock;		/* guards the rest, the guards, and @guards of readers */
	unsigned int nr;
	unsigned int nr_own;
	DECLARE_HASHTABLE(table, 8);
} guards = {
	.lock = __RAW_SPIN_LOCK_UNLOCKED(guards.lock),
};

/* Lock held. */
static struct hwerr_guard *guard_find(s32 tgid, u64 start_ns)
{
	struct hwerr_guard *g;

	hash_for_each_possible(guards.table, g, node, tgid)
		if (g->tgid == tgid && g->start_ns == start_ns)
			return g;
	return NULL;
}

/* Lock held. Has @g end with @r, or with no file. */
static void guard_bind(struct hwerr_guard *g, struct hwerr_reader *r)
{
	if (g->reader)
		g->reader->guards--;
	g->reader = r;
	if (r)
		r->guards++;
}

/* Lock held. hwerr_guard_wants() looks at the number without it. */
static void guard_unlink(struct hwerr_guard *g, struct hlist_head *to)
{
	hash_del(&g->node);
	hlist_add_head(&g->node, to);
	guard_bind(g, NULL);
	WRITE_ONCE(guards.nr, guards.nr - 1);
	guards.nr_own -= g->own;
}

static void guards_free(struct hlist_head *list)
{
	struct hwerr_guard *g;
	struct hlist_node *next;

	hlist_for_each_entry_safe(g, next, list, node) {
		put_pid(g->pid);
		kfree(g);
	}
}

/* Lock held. Moves those of ended processes to @to. */
static void guards_sweep(struct hlist_head *to)
{
	struct hwerr_guard *g;
	struct hlist_node *next;
	int i;

	rcu_read_lock();
	hash_for_each_safe(guards.table, i, next, g, node)
		if (!pid_task(g->pid, PIDTYPE_TGID))
			guard_unlink(g, to);
	rcu_read_unlock();
}

/*
 * Lock held. Whether there is room for one more; what ended processes left is looked for first.
 * Anybody may ask for it again and again: for them it is done ten times a second at most.
 */
static bool guards_room(bool own, struct hlist_head *gone)
{
	static unsigned long next;

	if (guards.nr < GUARDS_MAX && (!own || guards.nr_own < GUARDS_OWN_MAX))
		return true;
	if (own && next && time_before(jiffies, next))
		return false;
	next = (jiffies + HZ / 10) | 1;
	guards_sweep(gone);
	return guards.nr < GUARDS_MAX && (!own || guards.nr_own < GUARDS_OWN_MAX);
}

/* Last use of the file: nobody arms anything with it meanwhile. */
void hwerr_guard_release(struct hwerr_reader *r)
{
	struct hwerr_guard *g;
	struct hlist_node *next;
	HLIST_HEAD(gone);
	int i;

	raw_spin_lock_irq(&guards.lock);
	if (r->guards)
		hash_for_each_safe(guards.table, i, next, g, node)
			if (g->reader == r)
				guard_unlink(g, &gone);
	raw_spin_unlock_irq(&guards.lock);
	guards_free(&gone);
}

void hwerr_guard_exit(void)
{
	struct hwerr_guard *g;
	struct hlist_node *next;
	HLIST_HEAD(gone);
	int i;

	hash_for_each_safe(guards.table, i, next, g, node)
		guard_unlink(g, &gone);
	guards_free(&gone);
}

bool hwerr_guard_wants(s32 tgid, u64 start_ns, u8 severity)
{
	struct hwerr_guard *g;
	unsigned long flags;
	bool wants;

	if (!READ_ONCE(guards.nr))
		return false;
	raw_spin_lock_irqsave(&guards.lock, flags);
	g = guard_find(tgid, start_ns);
	wants = g && severity >= g->severity;
	raw_spin_unlock_irqrestore(&guards.lock, flags);
	return wants;
}

void hwerr_guard_stopped(s32 tgid, u64 start_ns, u64 mono_ns)
{
	struct hwerr_guard *g;
	unsigned long flags;

	raw_spin_lock_irqsave(&guards.lock, flags);
	g = guard_find(tgid, start_ns);
	if (g) {
		g->stops++;
		g->stopped_ns = mono_ns;
	}
	raw_spin_unlock_irqrestore(&guards.lock, flags);
}

/*
 * The process that @fd names, and whether @r may stop it: 0 and a reference to
 * its leader in *@task.
 */
static int guard_target(const struct hwerr_reader *r, int fd, struct task_struct **task)
{
	struct pid *pid = hwerr_pidfd_pid(fd);
	int err = 0;

	if (IS_ERR(pid))
		return PTR_ERR(pid);
	*task = get_pid_task(pid, PIDTYPE_TGID);
	put_pid(pid);
	if (!*task)
		return -ESRCH;
	/* The opener's right, as for everything else of this file. */
	if (r->scope != HWERR_SCOPE_ALL &&
	    ((*task)->tgid != r->tgid || (*task)->start_boottime != r->start_ns))
		err = -EPERM;
	else if (data_race((*task)->flags) & PF_KTHREAD)	/* never changes */
		err = -EINVAL;
	if (err)
		put_task_struct(*task);
	return err;
}

/*
 * Lock held. Whether @r may change @g, which is there: what was armed with
 * CAP_SYS_ADMIN is not the process's to weaken.
 */
static bool guard_yields(const struct hwerr_guard *g, const struct hwerr_reader *r)
{
	return g->own || r->scope == HWERR_SCOPE_ALL;
}

static int guard_arm(struct hwerr_reader *r, struct task_struct *task,
		     const struct hwerr_ioc_guard *arg, struct hlist_head *gone)
{
	bool own = r->scope != HWERR_SCOPE_ALL;
	struct hwerr_guard *fresh, *g;
	int err = 0;

	fresh = kzalloc(sizeof(*fresh), GFP_KERNEL_ACCOUNT);
	if (!fresh)
		return -ENOMEM;
	fresh->pid = get_task_pid(task, PIDTYPE_TGID);
	fresh->tgid = task->tgid;
	fresh->start_ns = task->start_boottime;

	raw_spin_lock_irq(&guards.lock);
	g = guard_find(fresh->tgid, fresh->start_ns);
	if (!g && guards_room(own, gone)) {
		g = fresh;
		fresh = NULL;
		hash_add(guards.table, &g->node, g->tgid);
		WRITE_ONCE(guards.nr, guards.nr + 1);
		g->own = own;
		guards.nr_own += own;
	}
	if (g && !guard_yields(g, r)) {
		err = -EPERM;
	} else if (g) {
		guards.nr_own -= g->own && !own;
		g->own = own;
		g->severity = arg->severity;
		g->flags = arg->flags;
		guard_bind(g, arg->flags & HWERR_GUARD_KEEP ? NULL : r);
	} else {
		err = -ENOSPC;
	}
	raw_spin_unlock_irq(&guards.lock);
	if (fresh) {
		put_pid(fresh->pid);
		kfree(fresh);
	}
	return err;
}

static int guard_disarm(const struct hwerr_reader *r, struct task_struct *task,
			struct hlist_head *gone)
{
	struct hwerr_guard *g;
	int err = 0;

	raw_spin_lock_irq(&guards.lock);
	g = guard_find(task->tgid, task->start_boottime);
	if (!g)
		err = -ENOENT;
	else if (!guard_yields(g, r))
		err = -EPERM;
	else
		guard_unlink(g, gone);
	raw_spin_unlock_irq(&guards.lock);
	return err;
}

int hwerr_guard_set(struct hwerr_reader *r, const struct hwerr_ioc_guard *arg)
{
	bool remove = arg->flags & HWERR_GUARD_REMOVE;
	struct task_struct *task;
	HLIST_HEAD(gone);
	int err;

	if (arg->flags & ~(HWERR_GUARD_KEEP | HWERR_GUARD_REMOVE) || arg->pad)
		return -EINVAL;
	/* Corrected errors harm nobody: what to do about many is not for this place. */
	if (remove ? arg->severity || arg->flags & HWERR_GUARD_KEEP :
		     arg->severity <= HWERR_SEV_CORRECTED || arg->severity >= HWERR_SEV_COUNT)
		return -EINVAL;
	err = guard_target(r, arg->pidfd, &task);
	if (err)
		return err;
	err = remove ? guard_disarm(r, task, &gone) : guard_arm(r, task, arg, &gone);
	put_task_struct(task);
	guards_free(&gone);
	return err;
}

int hwerr_guard_stop(const struct hwerr_reader *r, struct hwerr_ioc_stop *arg)
{
	struct hwerr_info_stop stop;
	struct task_struct *task;
	int err;

	if (arg->flags)
		return -EINVAL;
	err = guard_target(r, arg->pidfd, &task);
	if (err)
		return err;
	err = hwerr_owners_stop(task, &stop);
	if (!err) {
		arg->stopped_ns = stop.mono_ns;
		arg->vcpus = stop.vcpus;
		arg->running = stop.running;
		hwerr_guard_stopped(task->tgid, task->start_boottime, stop.mono_ns);
	}
	put_task_struct(task);
	return err;
}

static void guard_show(const struct hwerr_guard *g, struct hwerr_guard_entry *e)
{
	*e = (struct hwerr_guard_entry){
		.tgid = g->tgid, .severity = g->severity, .start_ns = g->start_ns,
		.flags = g->flags, .stops = g->stops, .stopped_ns = g->stopped_ns,
	};
}

int hwerr_guard_list(const struct hwerr_reader *r, struct hwerr_ioc_guards *arg)
{
	bool all = r->scope == HWERR_SCOPE_ALL;
	u32 room = min_t(u32, arg->count, all ? GUARDS_MAX : 1);
	struct hwerr_guard_entry *list;
	struct hwerr_guard *g;
	HLIST_HEAD(gone);
	u32 nr = 0;
	int i, err = 0;

	if (arg->pad)
		return -EINVAL;
	list = kvcalloc(room, sizeof(*list), GFP_KERNEL_ACCOUNT);
	if (!list)
		return -ENOMEM;
	raw_spin_lock_irq(&guards.lock);
	if (all) {
		guards_sweep(&gone);
		hash_for_each(guards.table, i, g, node) {
			if (nr < room)
				guard_show(g, &list[nr]);
			nr++;
		}
	} else {
		/* Anybody may ask for his own, as often as he likes. */
		g = guard_find(r->tgid, r->start_ns);
		if (g) {
			if (room)
				guard_show(g, &list[0]);
			nr = 1;
		}
	}
	raw_spin_unlock_irq(&guards.lock);
	guards_free(&gone);
	if (copy_to_user(u64_to_user_ptr(arg->entries), list, min(nr, room) * sizeof(*list)))
		err = -EFAULT;
	arg->count = nr;
	kvfree(list);
	return err;
}
