// SPDX-License-Identifier: GPL-2.0-only
/*
 * Who is hit: from a physical range to processes and guests.
 *
 *	range -> pages -> (mm, address) -> process -> guest-physical address
 *
 * The cost is that of the page's mappings, not of anybody's memory: nothing
 * here looks through address spaces for the page.
 *
 * Machine checks are reported before memory_failure() unmaps the page, and on
 * its way; so this runs where it must not sleep, and where the context that was
 * interrupted may hold any lock. Every lock is therefore tried, a bounded
 * number of times, with pauses if the context allows them. What could then not
 * be found out is said in the record (HWERR_F_OWNERS_UNKNOWN); an empty list
 * without that flag means that nobody has the page.
 *
 * Several mappings of one page, or of adjacent pages, in one process are one
 * stretch if they are adjacent there too. Guests come first in the record, and
 * address spaces in which KVM may run displace others from a full list, so that
 * what is cut off are the many readers of some library before a guest.
 */
#include <linux/delay.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/preempt.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/clock.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#include "compat.h"
#include "guard.h"
#include "hwerr.h"
#include "owners.h"

/* Pages of a range that are looked at, from its start. */
#define PAGES_MAX	64
/* Pauses of one lookup: together some 30 ms at most if it may sleep, else some us. */
#define WAITS_MAX	12
#define WAIT_US		50
#define WAIT_US_MAX	2000
#define WAIT_SPINS	200
/* Walks over one page that looks free, or has more mappings than were found. */
#define FREE_TRIES	3
#define BUSY_TRIES	8
/* Threads searched for the users of an address space that has no owner. */
#define THREADS_MAX	16384

bool hwerr_owners_wait(struct hwerr_owners *o)
{
	unsigned int nr = WAITS_MAX - o->waits;

	if (!o->waits)
		return false;
	o->waits--;
	if (o->may_sleep) {
		unsigned int us = min(WAIT_US << min(nr, 8U), WAIT_US_MAX);

		usleep_range(us, 2 * us);
	} else {
		for (nr = 0; nr < WAIT_SPINS; nr++)
			cpu_relax();
	}
	return true;
}

static bool is_qemu_name(const char *name)
{
	return !strncmp(name, "qemu-system", strlen("qemu-system")) ||
	       !strncmp(name, "qemu-kvm", strlen("qemu-kvm"));
}

/*
 * Is QEMU the program of @mm? The file is looked at under RCU only, where it may
 * be replaced: a wrong name is possible then, a fault is not.
 */
static bool runs_qemu(struct mm_struct *mm)
{
	char name[16] = "";
	struct dentry *dentry;
	const char *at;
	struct file *exe;

	rcu_read_lock();
	exe = rcu_dereference(mm->exe_file);
	if (exe &&
	    !copy_from_kernel_nofault(&dentry, &exe->f_path.dentry, sizeof(dentry)) &&
	    !copy_from_kernel_nofault(&at, &dentry->d_name.name, sizeof(at)) &&
	    copy_from_kernel_nofault(name, at, sizeof(name) - 1))
		name[0] = '\0';
	rcu_read_unlock();
	return is_qemu_name(name);
}

/* A stretch of an address space that has others in the full list, or NULL. */
static struct hwerr_owner *spare(struct hwerr_owners *o)
{
	struct hwerr_owner *at, *other;

	for (at = o->at; at < o->at + o->nr; at++)
		for (other = o->at; other < at; other++)
			if (other->mm == at->mm)
				return at;
	return NULL;
}

static unsigned long piece_next(const struct hwerr_piece *p)
{
	return p->pfn + DIV_ROUND_UP(p->off + p->len, PAGE_SIZE);
}

bool hwerr_owners_add(struct hwerr_owners *o, struct mm_struct *mm,
		      unsigned long va, const struct hwerr_piece *p)
{
	struct hwerr_owner *at, *out = NULL;
	bool known = false;
	/* Once there, they stay as long as the address space does. */
	bool vm = data_race(mm_has_notifiers(mm)) || runs_qemu(mm);
	bool found;

	va += p->off;
	for (at = o->at; at < o->at + o->nr; at++) {
		if (at->mm != mm) {
			if (!at->vm)
				out = at;
			continue;
		}
		known = true;
		if (va >= at->va && va < at->va + at->len) {
			found = at->attempt != o->attempt;
			at->attempt = o->attempt;
			return found;
		}
		/* KSM: one page may be mapped at adjacent addresses. */
		if (va == at->va + at->len && p->pfn == at->next) {
			at->len += p->len;
			at->next = piece_next(p);
			at->attempt = o->attempt;
			return true;
		}
	}
	if (o->nr < ARRAY_SIZE(o->at)) {
		at = &o->at[o->nr++];
	} else {
		o->flags |= HWERR_F_OWNERS_TRUNCATED;
		/* No guest is hidden by many readers, nor by one that has the page many times. */
		if (vm && !known && !out)
			out = spare(o);
		if (!vm || known || !out)
			return true;
		at = out;
		mmdrop(at->mm);
	}
	mmgrab(mm);
	*at = (struct hwerr_owner){
		.mm = mm, .va = va, .len = p->len, .next = piece_next(p), .vm = vm,
		.attempt = o->attempt,
	};
	return true;
}

/* What is mapped as one at @addr, no further than @end: a page, or all of a hugetlb page. */
static struct hwerr_piece piece_at(u64 addr, u64 end)
{
	struct hwerr_piece p = { .pfn = PHYS_PFN(addr), .off = offset_in_page(addr) };
	u64 room = PAGE_SIZE - p.off;

	if (end - addr > room) {
		room = hwerr_huge_size(p.pfn);
		room -= addr & (room - 1);
	}
	p.len = min(end - addr, room);
	return p;
}

static void find_mappings(struct hwerr_owners *o, u64 addr, u64 len)
{
	u64 end = addr + len < addr ? U64_MAX : addr + len;
	unsigned int pages;

	for (pages = 0; addr < end; pages++) {
		struct hwerr_piece p;
		unsigned int try = 0;
		int ret;

		if (pages == PAGES_MAX) {
			o->flags |= HWERR_F_OWNERS_TRUNCATED;
			return;
		}
		for (;;) {
			/* Each time anew: a hugetlb page may be dissolved meanwhile. */
			p = piece_at(addr, end);
			ret = hwerr_rmap_page(o, &p);
			if (!ret || ++try == (ret == -EAGAIN ? FREE_TRIES : BUSY_TRIES) ||
			    !hwerr_owners_wait(o))
				break;
		}
		if (ret == -EBUSY)
			o->flags |= HWERR_F_OWNERS_UNKNOWN;
		addr += p.len;
		if (o->may_sleep)
			cond_resched();
	}
}

/*
 * A task that uses @mm; a reference. NULL: none does, or, with
 * HWERR_F_OWNERS_UNKNOWN, none was found.
 */
static struct task_struct *mm_task(struct hwerr_owners *o, struct mm_struct *mm)
{
	struct task_struct *task = NULL, *p, *t;
	unsigned int left = THREADS_MAX;

again:
	rcu_read_lock();
	task = hwerr_mm_owner(mm);
	/*
	 * fork() puts a child's address space into the reverse map before the
	 * child may not fail any more; if it fails, copy_process() frees it after a
	 * grace period whoever holds a reference, and its signal_struct at once. A
	 * child is TASK_NEW from before it has an mm until it runs, TASK_DEAD
	 * from when fork() failed; only then is it what references keep.
	 */
	if (task && READ_ONCE(task->__state) & (TASK_NEW | TASK_DEAD)) {
		rcu_read_unlock();
		if (hwerr_owners_wait(o))
			goto again;
		o->flags |= HWERR_F_OWNERS_UNKNOWN;
		return NULL;
	}
	if (task)
		goto found;
	/*
	 * Its owner left, and no heir was found (mm_update_next_owner()): the
	 * last reference goes soon, or some process shares it still.
	 */
	if (!atomic_read(&mm->mm_users))
		goto out;
	for_each_process(p) {
		if (data_race(p->flags) & PF_KTHREAD)	/* never changes */
			continue;
		for_each_thread(p, t) {
			if (!left--)
				goto unknown;
			if (READ_ONCE(t->mm) != mm)
				continue;
			task = t;
			goto found;
		}
	}
unknown:
	if (atomic_read(&mm->mm_users))
		o->flags |= HWERR_F_OWNERS_UNKNOWN;
	goto out;
found:
	get_task_struct(task);
out:
	rcu_read_unlock();
	return task;
}

/**
 * struct identity - what a record says of a process
 * @tgid: number in the initial namespace
 * @start_ns: CLOCK_BOOTTIME
 * @comm: of the process, not of the thread
 */
struct identity {
	s32 tgid;
	u64 start_ns;
	char comm[TASK_COMM_LEN];
};

static void identify(struct task_struct *task, struct identity *id)
{
	const struct task_struct *leader;

	rcu_read_lock();
	/* A thread that was released keeps the pointer, but not the leader. */
	leader = pid_alive(task) ? READ_ONCE(task->group_leader) : task;
	id->tgid = leader->tgid;
	id->start_ns = leader->start_boottime;
	strscpy_pad(id->comm, leader->comm, sizeof(id->comm));
	rcu_read_unlock();
}

static struct hwerr_info_guest *add_guest(struct hwerr_owners *o,
					  const struct identity *id, u32 flags)
{
	struct hwerr_info_guest *g;

	g = hwerr_draft_info(o->d, HWERR_INFO_GUEST, sizeof(*g));
	if (!g) {
		o->flags |= HWERR_F_OWNERS_TRUNCATED;
		return NULL;
	}
	g->tgid = id->tgid;
	g->flags = flags;
	g->start_ns = id->start_ns;
	g->gpa = HWERR_NO_GPA;
	memcpy(g->comm, id->comm, sizeof(g->comm));
	return g;
}

static struct hwerr_info_task *add_task(struct hwerr_owners *o,
					const struct identity *id, u32 flags)
{
	struct hwerr_info_task *t;

	t = hwerr_draft_info(o->d, HWERR_INFO_TASK, sizeof(*t));
	if (!t) {
		o->flags |= HWERR_F_OWNERS_TRUNCATED;
		return NULL;
	}
	t->tgid = id->tgid;
	t->flags = flags;
	t->start_ns = id->start_ns;
	memcpy(t->comm, id->comm, sizeof(t->comm));
	return t;
}

/* What @s did to the VMs of @id; flags for its GUEST infos. */
static u32 add_stop(struct hwerr_owners *o, const struct identity *id,
		    struct hwerr_vm_search *s)
{
	struct hwerr_info_stop *i;
	unsigned int running;
	u64 now;

	if (!s->nr_stops)
		return 0;
	running = hwerr_kvm_stopped(s);
	now = ktime_get_ns();
	hwerr_guard_stopped(id->tgid, id->start_ns, now);
	i = hwerr_draft_info(o->d, HWERR_INFO_STOP, sizeof(*i));
	if (i) {
		i->tgid = id->tgid;
		i->start_ns = id->start_ns;
		i->vcpus = s->vcpus;
		i->running = running;
		i->mono_ns = now;
	}
	o->d->rec.flags |= HWERR_F_STOPPED;
	return running ? 0 : HWERR_GUEST_STOPPED;
}

/* A search of what belongs to @id; its VMs are stopped on the way if they are guarded. */
static void search_vms(struct hwerr_owners *o, struct task_struct *task,
		       const struct identity *id, struct hwerr_vm_search *s, bool stop)
{
	s->stop = stop && hwerr_guard_wants(id->tgid, id->start_ns, o->d->rec.severity);
	if (hwerr_kvm_search(o, task, s))
		o->flags |= HWERR_F_OWNERS_UNKNOWN;
}

static void add_kvm_guest(struct hwerr_owners *o, struct hwerr_owner *at,
			  const struct identity *id, struct hwerr_vm_search *s)
{
	u32 flags;
	struct hwerr_info_guest *g;
	unsigned int i;

	if (s->nr_stops) {
		at->stopped = true;
		at->stop_flags = add_stop(o, id, s);
	}
	flags = HWERR_GUEST_KVM | at->stop_flags;
	for (i = 0; i < s->nr; i++) {
		g = add_guest(o, id, flags);
		if (!g)
			return;
		g->vm_id = s->hit[i].vm_id;
		g->hva = s->hit[i].hva;
		g->gpa = s->hit[i].gpa;
		g->len = s->hit[i].len;
		g->slot = s->hit[i].slot;
	}
	if (s->nr)
		return;
	/* The emulator's own memory. */
	g = add_guest(o, id, flags);
	if (!g)
		return;
	g->vm_id = s->vm_id;
	g->hva = at->va;
	g->len = at->len;
}

/* Says what @at belongs to; guests with KVM go to the record at once. */
static void classify(struct hwerr_owners *o, struct hwerr_owner *at,
		     struct identity *id)
{
	struct hwerr_vm_search s = { .mm = at->mm, .va = at->va, .len = at->len };
	struct task_struct *task = mm_task(o, at->mm);
	const struct hwerr_owner *before;

	at->kind = HWERR_OWNER_GONE;
	if (!task)
		return;
	identify(task, id);
	at->kind = is_qemu_name(id->comm) || runs_qemu(at->mm) ?
		   HWERR_OWNER_QEMU : HWERR_OWNER_TASK;
	/* KVM registers a notifier before it maps anything. */
	if (at->vm) {
		/* Once for an error, whose range may be mapped in many places. */
		for (before = o->at; before < at && !at->stopped; before++) {
			if (before->mm != at->mm || !before->stopped)
				continue;
			at->stopped = true;
			at->stop_flags = before->stop_flags;
		}
		search_vms(o, task, id, &s, !at->stopped);
		if (s.more)
			o->flags |= HWERR_F_OWNERS_TRUNCATED;
		if (s.vm_id) {
			at->kind = HWERR_OWNER_KVM;
			add_kvm_guest(o, at, id, &s);
		}
	}
	put_task_struct(task);
}

static void emit(struct hwerr_owners *o)
{
	struct identity id[HWERR_OWNERS_MAX];
	struct hwerr_info_guest *g;
	struct hwerr_info_task *t;
	unsigned int i;

	for (i = 0; i < o->nr; i++)
		classify(o, &o->at[i], &id[i]);
	for (i = 0; i < o->nr; i++) {
		if (o->at[i].kind != HWERR_OWNER_QEMU)
			continue;
		g = add_guest(o, &id[i], 0);
		if (!g)
			break;
		g->hva = o->at[i].va;
		g->len = o->at[i].len;
	}
	for (i = 0; i < o->nr; i++) {
		if (o->at[i].kind != HWERR_OWNER_TASK)
			continue;
		t = add_task(o, &id[i], 0);
		if (!t)
			break;
		t->va = o->at[i].va;
		t->len = o->at[i].len;
	}
}

/* An address space of @task's process; only compared, never followed. */
static struct mm_struct *process_mm(struct task_struct *task)
{
	struct mm_struct *mm = NULL;
	struct task_struct *t;

	/* The first thread may have ended before the others. */
	rcu_read_lock();
	for_each_thread(task, t) {
		mm = READ_ONCE(t->mm);
		if (mm)
			break;
	}
	rcu_read_unlock();
	return mm;
}

static void add_holder(struct hwerr_owners *o, struct task_struct *task)
{
	struct hwerr_vm_search s = { .mm = process_mm(task) };
	struct hwerr_info_guest *g;
	struct identity id;
	bool qemu = false;

	identify(task, &id);
	if (s.mm) {
		search_vms(o, task, &id, &s, true);
		qemu = is_qemu_name(id.comm);
	}
	if (s.vm_id) {
		u32 flags = HWERR_GUEST_DEVICE | HWERR_GUEST_KVM | add_stop(o, &id, &s);

		g = add_guest(o, &id, flags);
		if (g)
			g->vm_id = s.vm_id;
	} else if (qemu) {
		add_guest(o, &id, HWERR_GUEST_DEVICE);
	} else {
		add_task(o, &id, HWERR_TASK_DEVICE);
	}
}

int hwerr_owners_stop(struct task_struct *task, struct hwerr_info_stop *stop)
{
	struct hwerr_vm_search s = { .mm = process_mm(task), .stop = true };
	struct hwerr_owners o;
	int err;

	memset(&o, 0, sizeof(o));
	o.may_sleep = true;
	memset(stop, 0, sizeof(*stop));
	if (!s.mm)
		return -ESRCH;
	err = hwerr_kvm_search(&o, task, &s);
	if (!s.nr_stops)
		return err ?: -ENXIO;
	stop->vcpus = s.vcpus;
	stop->running = hwerr_kvm_stopped(&s);
	stop->mono_ns = ktime_get_ns();
	return err;
}

void hwerr_owners_resolve(struct hwerr_draft *d, bool may_sleep)
{
	struct hwerr_owners o;
	struct hwerr_info_memory *m;
	u64 start = local_clock();
	unsigned int i;

	memset(&o, 0, sizeof(o));
	o.d = d;
	o.may_sleep = may_sleep;
	o.waits = WAITS_MAX;
	o.visits = HWERR_OWNERS_VISITS;

	if (d->pdev)
		hwerr_vfio_holders(&o, d->pdev, add_holder);
	if (d->phys_len) {
		find_mappings(&o, d->phys_addr, d->phys_len);
		emit(&o);
		for (i = 0; i < o.nr; i++)
			mmdrop(o.at[i].mm);
	}
	d->rec.flags |= o.flags;

	m = hwerr_record_find(&d->rec, HWERR_INFO_MEMORY);
	if (m)
		m->resolve_ns = min_t(u64, local_clock() - start, U32_MAX);
}

int hwerr_owners_init(void)
{
	hwerr_kvm_init();
	return 0;
}

void hwerr_owners_exit(void)
{
}
