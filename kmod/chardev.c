// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/hwerr: the protocol of uapi/hwerr.h over the rings.
 *
 * Everything here is process context. A file's reader is guarded by its mutex,
 * which is not held while waiting, so that poll(), ioctl() and a read() in
 * another thread of the same file go on. The cursor moves only when the record
 * is in user space: a fault in the middle of a read costs nothing.
 */
#include <linux/capability.h>
#include <linux/compat.h>
#include <linux/cred.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/wait.h>

#include "guard.h"
#include "hwerr.h"
#include "record.h"
#include "ring.h"

/* The most that one write() may bring. */
#define WRITE_MAX	(16 * HWERR_RECORD_MAX)

/* Sizes of the first version of each ioctl's structure. */
#define INFO_SIZE_V1	56
#define STATS_SIZE_V1	280
#define FILTER_SIZE_V1	24
#define SEEK_SIZE_V1	16
#define GUARD_SIZE_V1	16
#define STOP_SIZE_V1	24
#define GUARDS_SIZE_V1	16

static int hwerr_open(struct inode *inode, struct file *file)
{
	bool all = file_ns_capable(file, &init_user_ns, CAP_SYS_ADMIN);
	struct hwerr_reader *r;

	r = hwerr_reader_new(all ? HWERR_SCOPE_ALL : HWERR_SCOPE_SELF);
	if (!r)
		return -ENOMEM;
	file->private_data = r;
	return nonseekable_open(inode, file);
}

static int hwerr_release(struct inode *inode, struct file *file)
{
	hwerr_guard_release(file->private_data);
	hwerr_reader_free(file->private_data);
	return 0;
}

/* Whether a process of the rights @now may more than the one of the rights @then. */
static bool outgrew(const struct cred *now, const struct cred *then)
{
	return !uid_eq(now->euid, then->euid) || !uid_eq(now->uid, then->uid) ||
	       !uid_eq(now->suid, then->suid) || !gid_eq(now->egid, then->egid) ||
	       !gid_eq(now->gid, then->gid) || !gid_eq(now->sgid, then->sgid) ||
	       !cap_issubset(now->cap_permitted, then->cap_permitted);
}

/*
 * Has the process that a scoped file is about stay what it is until settled_end(@held), unless
 * it may more than the file's opener might: it has executed a set-uid program, say. Who else
 * has the file is not to learn where that has its memory, nor to stop it; nor when it has
 * ended, what it was. Of the process itself nothing is asked.
 *
 * 0, or -EPERM; without @wait, -EAGAIN if it is in the middle of an exec(); else -ERESTARTSYS.
 *
 * An exec() gets the new memory before it gets the new rights; exec_update_lock is held over
 * both. The leader is looked up under the lock: another thread's exec() replaces it.
 */
static int settled_begin(const struct file *file, bool wait, struct task_struct **held)
{
	const struct hwerr_reader *r = file->private_data;
	struct task_struct *task;
	int err = -EPERM;

	*held = NULL;
	if (r->scope == HWERR_SCOPE_ALL || task_tgid(current) == r->pid)
		return 0;
	task = get_pid_task(r->pid, PIDTYPE_TGID);
	if (!task)
		return -EPERM;
	/* The reference keeps its signal_struct, which an exec() leaves as it is. */
	if (wait ? down_read_interruptible(&task->signal->exec_update_lock) :
		   !down_read_trylock(&task->signal->exec_update_lock)) {
		put_task_struct(task);
		return wait ? -ERESTARTSYS : -EAGAIN;
	}
	*held = task;
	rcu_read_lock();
	task = pid_task(r->pid, PIDTYPE_TGID);
	if (task && !outgrew(__task_cred(task), file->f_cred))
		err = 0;
	rcu_read_unlock();
	return err;
}

static void settled_end(struct task_struct *held)
{
	if (!held)
		return;
	up_read(&held->signal->exec_update_lock);
	put_task_struct(held);
}

/* For what was found out before: it is about what the process was then. */
static int settled(const struct file *file, bool wait)
{
	struct task_struct *held;
	int err = settled_begin(file, wait, &held);

	settled_end(held);
	return err;
}

/* Reader's lock held. Fills @buf with whole records; bytes, or -errno: -EAGAIN of settled(). */
static ssize_t read_records(struct file *file, char __user *buf, size_t count)
{
	struct hwerr_reader *r = file->private_data;
	struct hwerr_record *rec = (void *)r->bounce;
	struct hwerr_peek p;
	size_t done = 0;
	int err;

	while (hwerr_reader_peek(r, &p, true)) {
		/* After the copy: what is told to others was made before any exec(). */
		err = settled(file, false);
		if (err)
			return done ?: err;
		if (rec->len > count - done)
			return done ?: -EINVAL;
		if (copy_to_user(buf + done, rec, rec->len))
			return done ?: -EFAULT;
		done += rec->len;
		hwerr_reader_take(r, &p);
		if (fatal_signal_pending(current))
			break;
		cond_resched();
	}
	return done;
}

/* Waits for a record later than @seen, or for an ioctl() of this file; 0 or -ERESTARTSYS. */
static int wait_for_more(struct hwerr_reader *r, u64 seen, u32 turns)
{
	wait_queue_head_t *records = hwerr_reader_waitq(r);
	DEFINE_WAIT(record);
	DEFINE_WAIT(turn);
	int err = 0;

	for (;;) {
		/* On both queues before the look: no wake-up in between is missed. */
		prepare_to_wait(records, &record, TASK_INTERRUPTIBLE);
		prepare_to_wait(&r->waitq, &turn, TASK_INTERRUPTIBLE);
		if (hwerr_ring_version() != seen || READ_ONCE(r->turns) != turns)
			break;
		if (signal_pending(current)) {
			err = -ERESTARTSYS;
			break;
		}
		schedule();
	}
	finish_wait(records, &record);
	finish_wait(&r->waitq, &turn);
	return err;
}

static ssize_t hwerr_read(struct file *file, char __user *buf, size_t count, loff_t *ppos)
{
	struct hwerr_reader *r = file->private_data;
	bool wait;
	ssize_t n;
	u64 seen;
	u32 turns;
	int err;

	if (count < sizeof(struct hwerr_record))
		return -EINVAL;
	for (;;) {
		wait = !(READ_ONCE(file->f_flags) & O_NONBLOCK);
		/* Before the look, so that what comes after it ends the wait. */
		seen = hwerr_ring_version();
		turns = READ_ONCE(r->turns);
		err = settled(file, wait);
		if (err)
			return err;
		if (mutex_lock_interruptible(&r->lock))
			return -ERESTARTSYS;
		n = read_records(file, buf, count);
		mutex_unlock(&r->lock);
		/* Whose exec() began meanwhile is waited for above. */
		if (n == -EAGAIN && wait)
			continue;
		if (n)
			return n;
		if (!wait)
			return -EAGAIN;
		err = wait_for_more(r, seen, turns);
		if (err)
			return err;
	}
}

static __poll_t hwerr_poll(struct file *file, poll_table *wait)
{
	struct hwerr_reader *r = file->private_data;
	struct hwerr_peek p;
	__poll_t mask;

	poll_wait(file, hwerr_reader_waitq(r), wait);
	poll_wait(file, &r->waitq, wait);
	mutex_lock(&r->lock);
	mask = hwerr_reader_peek(r, &p, false) ? EPOLLIN | EPOLLRDNORM : 0;
	mutex_unlock(&r->lock);
	if (r->scope == HWERR_SCOPE_ALL)
		mask |= EPOLLOUT | EPOLLWRNORM;
	return mask;
}

static bool has_nul(const char *s, size_t len)
{
	return memchr(s, 0, len);
}

static bool zeroed(const void *p, size_t len)
{
	return !memchr_inv(p, 0, len);
}

/* Whether an info of a program is one the kernel could have made. */
static bool info_ok(const struct hwerr_info *info)
{
	static const u16 size[HWERR_INFO_COUNT] = {
		[HWERR_INFO_MCE] = sizeof(struct hwerr_info_mce),
		[HWERR_INFO_PCI] = sizeof(struct hwerr_info_pci),
		[HWERR_INFO_EDAC] = sizeof(struct hwerr_info_edac),
		[HWERR_INFO_MEMORY] = sizeof(struct hwerr_info_memory),
		[HWERR_INFO_GUEST] = sizeof(struct hwerr_info_guest),
		[HWERR_INFO_TASK] = sizeof(struct hwerr_info_task),
		[HWERR_INFO_VCPU] = sizeof(struct hwerr_info_vcpu),
		[HWERR_INFO_BLOCK] = sizeof(struct hwerr_info_block),
	};
	const void *p = info;

	if (info->flags || !info->type || info->type >= HWERR_INFO_COUNT)
		return false;
	if (size[info->type] && info->len != size[info->type])
		return false;

	switch (info->type) {
	case HWERR_INFO_MCE: {
		const struct hwerr_info_mce *m = p;

		return zeroed(m->pad, sizeof(m->pad));
	}
	case HWERR_INFO_PCI: {
		const struct hwerr_info_pci *d = p;

		return zeroed(d->pad, sizeof(d->pad)) && !d->pad2 &&
		       !(d->flags & ~HWERR_PCI_TLP);
	}
	case HWERR_INFO_EDAC: {
		const struct hwerr_info_edac *e = p;

		return has_nul(e->label, sizeof(e->label));
	}
	case HWERR_INFO_MEMORY: {
		const struct hwerr_info_memory *m = p;

		return !m->pad && m->phys_len &&
		       m->phys_addr + m->phys_len - 1 >= m->phys_addr;
	}
	case HWERR_INFO_GUEST: {
		const struct hwerr_info_guest *g = p;

		return g->tgid > 0 && !g->pad && has_nul(g->comm, sizeof(g->comm)) &&
		       !(g->flags & ~(HWERR_GUEST_KVM | HWERR_GUEST_DEVICE));
	}
	case HWERR_INFO_TASK: {
		const struct hwerr_info_task *t = p;

		return t->tgid > 0 && has_nul(t->comm, sizeof(t->comm)) &&
		       !(t->flags & ~HWERR_TASK_DEVICE);
	}
	case HWERR_INFO_TEXT: {
		const struct hwerr_info_text *t = p;

		return info->len > sizeof(*t) && !t->text[info->len - sizeof(*t) - 1];
	}
	case HWERR_INFO_CPER: {
		const struct hwerr_info_cper *c = p;

		return info->len >= sizeof(*c) && !c->pad &&
		       has_nul(c->fru_text, sizeof(c->fru_text)) &&
		       !(c->flags & ~HWERR_CPER_GHES_SEV) &&
		       c->data_len <= info->len - sizeof(*c) &&
		       ALIGN(c->data_len, 8) == info->len - sizeof(*c);
	}
	case HWERR_INFO_VCPU: {
		const struct hwerr_info_vcpu *v = p;

		return !(v->flags & ~HWERR_VCPU_RIP) && v->insn_len <= sizeof(v->insn) &&
		       v->error <= 0;
	}
	case HWERR_INFO_BLOCK: {
		const struct hwerr_info_block *b = p;

		return has_nul(b->disk, sizeof(b->disk));
	}
	}
	return false;
}

/* What a program may not claim: it is the kernel's to say. */
#define KERNEL_FLAGS	(HWERR_F_REDACTED | HWERR_F_STOPPED)

int hwerr_record_check(const void *buf, size_t len)
{
	const void *end = buf + len;
	const void *p;

	if (!len)
		return -EINVAL;
	while (buf < end) {
		const struct hwerr_record *rec = buf;
		const struct hwerr_info *info;

		if (end - buf < sizeof(*rec))
			return -EINVAL;
		if (rec->hdr_len != sizeof(*rec) || rec->version != HWERR_ABI_VERSION)
			return -EINVAL;
		if (rec->len < sizeof(*rec) || rec->len % 8 || rec->len > HWERR_RECORD_MAX ||
		    rec->len > end - buf)
			return -EINVAL;
		if (rec->severity >= HWERR_SEV_COUNT || rec->source >= HWERR_SRC_COUNT ||
		    rec->kind >= HWERR_KIND_COUNT || rec->component >= HWERR_COMP_COUNT)
			return -EINVAL;
		if (rec->flags & ~(HWERR_F_ALL & ~KERNEL_FLAGS) || rec->pad || rec->cpu < -1)
			return -EINVAL;
		for (p = buf + rec->hdr_len; p < buf + rec->len; p += info->len) {
			info = p;
			if (buf + rec->len - p < sizeof(*info) || info->len % 8 ||
			    info->len < sizeof(*info) || info->len > buf + rec->len - p ||
			    !info_ok(info))
				return -EINVAL;
		}
		buf += rec->len;
	}
	return 0;
}

static ssize_t hwerr_write(struct file *file, const char __user *buf, size_t count, loff_t *ppos)
{
	struct hwerr_reader *r = file->private_data;
	void *copy, *p;
	int err;

	/* The opener's right, as for the scope: a borrowed file gains nothing. */
	if (r->scope != HWERR_SCOPE_ALL)
		return -EPERM;
	if (count < sizeof(struct hwerr_record) || count > WRITE_MAX)
		return -EINVAL;
	copy = kvmalloc(count, GFP_KERNEL_ACCOUNT);
	if (!copy)
		return -ENOMEM;
	err = -EFAULT;
	if (copy_from_user(copy, buf, count))
		goto out;
	err = hwerr_record_check(copy, count);
	if (err)
		goto out;
	for (p = copy; p < copy + count; ) {
		struct hwerr_record *rec = p;

		p += rec->len;
		hwerr_publish_user(rec);
	}
out:
	kvfree(copy);
	return err ?: count;
}

static int get_arg(void *to, size_t size, size_t v1, unsigned int cmd, void __user *arg)
{
	if (_IOC_SIZE(cmd) < v1)
		return -EINVAL;
	return copy_struct_from_user(to, size, arg, _IOC_SIZE(cmd));
}

static int put_arg(const void *from, size_t size, size_t v1, unsigned int cmd, void __user *arg)
{
	size_t want = _IOC_SIZE(cmd);

	if (want < v1)
		return -EINVAL;
	if (copy_to_user(arg, from, min(size, want)))
		return -EFAULT;
	if (want > size && clear_user(arg + size, want - size))
		return -EFAULT;
	return 0;
}

static int filter_check(const struct hwerr_reader *r, const struct hwerr_ioc_filter *f)
{
	if (f->flags || f->severities >> HWERR_SEV_COUNT ||
	    f->sources >> HWERR_SRC_COUNT || f->tgid < 0)
		return -EINVAL;
	if (r->scope == HWERR_SCOPE_SELF && f->tgid && f->tgid != r->tgid)
		return -EPERM;
	return 0;
}

static int seek_check(const struct hwerr_reader *r, const struct hwerr_ioc_seek *s)
{
	if (s->flags || s->whence > HWERR_SEEK_SEQ)
		return -EINVAL;
	if (s->whence != HWERR_SEEK_SEQ)
		return s->seq ? -EINVAL : 0;
	/* Of others' errors nothing is told but how many numbers are between one's own. */
	if (r->scope == HWERR_SCOPE_SELF)
		return s->seq ? 0 : -EINVAL;
	return s->seq && s->seq <= hwerr_ring_version() ? 0 : -EINVAL;
}

/*
 * Reader's lock held. A waiting read() of the same file looks again, and so does poll(). Of
 * other files nobody is woken: anybody may do this, and as often as they like.
 */
static void turned(struct hwerr_reader *r)
{
	WRITE_ONCE(r->turns, r->turns + 1);
	wake_up_interruptible_poll(&r->waitq, EPOLLIN | EPOLLRDNORM);
}

static long hwerr_ioctl(struct file *file, unsigned int cmd, unsigned long val)
{
	struct hwerr_reader *r = file->private_data;
	void __user *arg = (void __user *)val;
	union {
		struct hwerr_ioc_info info;
		struct hwerr_ioc_stats stats;
		struct hwerr_ioc_filter filter;
		struct hwerr_ioc_seek seek;
		struct hwerr_ioc_guard guard;
		struct hwerr_ioc_stop stop;
		struct hwerr_ioc_guards guards;
	} u;
	struct task_struct *held;
	long err;

	/* The number without the size, which may differ between versions. */
	switch (cmd & ~IOCSIZE_MASK) {
	case HWERR_IOC_INFO & ~IOCSIZE_MASK:
		hwerr_reader_info(r, &u.info);
		return put_arg(&u.info, sizeof(u.info), INFO_SIZE_V1, cmd, arg);
	case HWERR_IOC_STATS & ~IOCSIZE_MASK:
		mutex_lock(&r->lock);
		hwerr_reader_stats(r, &u.stats);
		mutex_unlock(&r->lock);
		return put_arg(&u.stats, sizeof(u.stats), STATS_SIZE_V1, cmd, arg);
	case HWERR_IOC_GET_FILTER & ~IOCSIZE_MASK:
		mutex_lock(&r->lock);
		u.filter = r->filter;
		mutex_unlock(&r->lock);
		return put_arg(&u.filter, sizeof(u.filter), FILTER_SIZE_V1, cmd, arg);
	case HWERR_IOC_SET_FILTER & ~IOCSIZE_MASK:
		err = get_arg(&u.filter, sizeof(u.filter), FILTER_SIZE_V1, cmd, arg);
		if (!err)
			err = filter_check(r, &u.filter);
		if (err)
			return err;
		mutex_lock(&r->lock);
		err = hwerr_reader_filter(r, &u.filter);
		if (!err)
			turned(r);
		mutex_unlock(&r->lock);
		return err;
	case HWERR_IOC_SEEK & ~IOCSIZE_MASK:
		err = get_arg(&u.seek, sizeof(u.seek), SEEK_SIZE_V1, cmd, arg);
		if (!err)
			err = seek_check(r, &u.seek);
		if (err)
			return err;
		mutex_lock(&r->lock);
		hwerr_reader_start(r, u.seek.whence, u.seek.seq);
		turned(r);
		mutex_unlock(&r->lock);
		return 0;
	case HWERR_IOC_GUARD & ~IOCSIZE_MASK:
		err = get_arg(&u.guard, sizeof(u.guard), GUARD_SIZE_V1, cmd, arg);
		if (err)
			return err;
		err = settled_begin(file, true, &held);
		if (!err)
			err = hwerr_guard_set(r, &u.guard);
		settled_end(held);
		return err;
	case HWERR_IOC_STOP & ~IOCSIZE_MASK:
		err = get_arg(&u.stop, sizeof(u.stop), STOP_SIZE_V1, cmd, arg);
		if (err)
			return err;
		err = settled_begin(file, true, &held);
		if (!err)
			err = hwerr_guard_stop(r, &u.stop);
		settled_end(held);
		return err ?: put_arg(&u.stop, sizeof(u.stop), STOP_SIZE_V1, cmd, arg);
	case HWERR_IOC_GUARDS & ~IOCSIZE_MASK:
		err = get_arg(&u.guards, sizeof(u.guards), GUARDS_SIZE_V1, cmd, arg);
		if (!err)
			err = hwerr_guard_list(r, &u.guards);
		return err ?: put_arg(&u.guards, sizeof(u.guards), GUARDS_SIZE_V1, cmd, arg);
	}
	return -ENOTTY;
}

static const struct file_operations hwerr_fops = {
	.owner = THIS_MODULE,
	.open = hwerr_open,
	.release = hwerr_release,
	.read = hwerr_read,
	.write = hwerr_write,
	.poll = hwerr_poll,
	.unlocked_ioctl = hwerr_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

static struct miscdevice hwerr_misc = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "hwerr",
	.fops = &hwerr_fops,
	/* Open to all: what a reader may see is decided by its scope. */
	.mode = 0666,
};

int hwerr_chardev_init(void)
{
	BUILD_BUG_ON(sizeof(struct hwerr_ioc_info) < INFO_SIZE_V1);
	BUILD_BUG_ON(sizeof(struct hwerr_ioc_stats) < STATS_SIZE_V1);
	BUILD_BUG_ON(sizeof(struct hwerr_ioc_filter) < FILTER_SIZE_V1);
	BUILD_BUG_ON(sizeof(struct hwerr_ioc_seek) < SEEK_SIZE_V1);
	BUILD_BUG_ON(sizeof(struct hwerr_ioc_guard) < GUARD_SIZE_V1);
	BUILD_BUG_ON(sizeof(struct hwerr_ioc_stop) < STOP_SIZE_V1);
	BUILD_BUG_ON(sizeof(struct hwerr_ioc_guards) < GUARDS_SIZE_V1);
	return misc_register(&hwerr_misc);
}

void hwerr_chardev_exit(void)
{
	misc_deregister(&hwerr_misc);
}
