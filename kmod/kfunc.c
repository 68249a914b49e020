// SPDX-License-Identifier: GPL-2.0-only
/*
 * bpf_hwerr_publish(): a BPF program publishes a record, without a process in between.
 *
 * A tracing program can be attached to almost any function: to one that an NMI
 * calls, that holds the lock of a run queue, or that is our own and holds a
 * ring's. So nothing is locked, woken or allocated in the caller's context: the
 * record is copied into one of a fixed number of slots, checked there, where
 * nobody changes it any more, and left to an interrupt that this CPU sends
 * itself. What the interrupt then does is what write() does, and a program that is
 * attached to that may not publish: it would for ever. When all slots are taken
 * the caller is told, and counts the loss: it knows of which kind it is.
 *
 * The verifier vouches for the memory that is passed, and a loaded program that
 * calls this holds a reference to the module: no call is under way, and none can
 * come, when it is unloaded.
 *
 * A module without BTF, or a kernel that does not take it, offers no such
 * function and is otherwise the same: programs go by a ring buffer and write().
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/atomic.h>
#include <linux/bpf.h>
#include <linux/btf.h>
#include <linux/btf_ids.h>
#include <linux/irq_work.h>
#include <linux/llist.h>
#include <linux/module.h>
#include <linux/overflow.h>
#include <linux/percpu.h>
#include <linux/sched.h>
#include <linux/timekeeping.h>
#include <linux/vmalloc.h>

#include "compat.h"
#include "hwerr.h"
#include "kfunc.h"
#include "record.h"

#define SLOTS	32

/**
 * struct slot - a record on its way
 * @node: in the queue
 * @rec: the record; infos follow in @buf
 * @buf: room of the record
 *
 * It belongs to who took its bit, until it is queued; then to the interrupt.
 */
struct slot {
	struct llist_node node;
	union {
		struct hwerr_record rec;
		u8 buf[HWERR_RECORD_MAX];
	} __aligned(8);
};

static struct slot *slots;		/* constant while the function is offered */
static atomic_t taken = ATOMIC_INIT(0);	/* a bit for each of @slots */
static LLIST_HEAD(queue);
static DEFINE_PER_CPU(struct task_struct *, publisher);	/* in publish_fn() here */

static struct slot *slot_get(void)
{
	u32 bits = atomic_read(&taken);
	int i;

	do {
		if (!~bits)
			return NULL;
		i = ffz(bits);
	} while (!atomic_try_cmpxchg(&taken, (int *)&bits, bits | BIT(i)));
	return &slots[i];
}

static void slot_put(struct slot *s)
{
	/* Pairs with the exchange in slot_get(): whoever gets it has it alone. */
	smp_mb__before_atomic();
	atomic_andnot(BIT(s - slots), &taken);
}

/* At most SLOTS records, in the order they came; more of them raise it again. */
static void publish_fn(struct irq_work *work)
{
	struct llist_node *all = llist_reverse_order(llist_del_all(&queue));
	struct slot *s, *next;

	this_cpu_write(publisher, current);
	llist_for_each_entry_safe(s, next, all, node) {
		hwerr_publish_user(&s->rec);
		slot_put(s);
	}
	this_cpu_write(publisher, NULL);
}

static struct irq_work publish_work = IRQ_WORK_INIT(publish_fn);

/**
 * bpf_hwerr_publish() - publishes one record, as write() does
 * @record: the record, whole, with its infos
 * @record__sz: its bytes, the same as its @len
 *
 * Any context, NMI included; takes no lock, does not sleep or allocate. The
 * record is in its ring as soon as this CPU takes interrupts; if
 * @time_mono_ns is 0 its times are those of the call.
 *
 * Return: 0; -EINVAL if write() would not take it, or it is not exactly one
 * record; -ENOBUFS if too many are on their way; -EBUSY for a program that runs
 * because of what was published this way. Then nothing is published.
 */
__bpf_kfunc int bpf_hwerr_publish(const void *record, u32 record__sz)
{
	struct slot *s;
	int err;

	if (record__sz < sizeof(s->rec) || record__sz > sizeof(s->buf))
		return -EINVAL;
	if (this_cpu_read(publisher) == current)
		return -EBUSY;
	s = slot_get();
	if (!s)
		return -ENOBUFS;
	memcpy(s->buf, record, record__sz);
	err = s->rec.len == record__sz ? hwerr_record_check(s->buf, record__sz) : -EINVAL;
	if (err) {
		slot_put(s);
		return err;
	}
	if (!s->rec.time_mono_ns) {
		s->rec.time_mono_ns = ktime_get_mono_fast_ns();
		s->rec.time_real_ns = ktime_get_real_fast_ns();
	}
	llist_add(&s->node, &queue);
	irq_work_queue(&publish_work);
	return 0;
}

BTF_KFUNCS_START(hwerr_kfuncs)
BTF_ID_FLAGS(func, bpf_hwerr_publish)
BTF_KFUNCS_END(hwerr_kfuncs)

static const struct btf_kfunc_id_set hwerr_kfunc_set = {
	.owner = THIS_MODULE,
	.set = &hwerr_kfuncs,
};

void hwerr_kfunc_init(void)
{
	int err;

	/* Built without: nothing to say. */
	if (!THIS_MODULE->btf_data_size)
		return;
	slots = vzalloc(array_size(SLOTS, sizeof(*slots)));
	err = slots ? register_btf_kfunc_id_set(BPF_PROG_TYPE_TRACING, &hwerr_kfunc_set) : -ENOMEM;
	if (!err)
		return;
	vfree(slots);
	slots = NULL;
	pr_info("no function for BPF programs here (%d)\n", err);
}

/* No program that could call is left. */
void hwerr_kfunc_exit(void)
{
	irq_work_sync(&publish_work);
	vfree(slots);
	slots = NULL;
}
