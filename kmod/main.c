// SPDX-License-Identifier: GPL-2.0-only
/*
 * hwerr - hardware errors, named by whom they hit, as events on /dev/hwerr
 *
 * The device is there before the first source and goes after the last. A source
 * that this kernel or machine does not have is named once at load; the others
 * work. Sources are attached and detached at any time:
 *
 *	echo -mce > /sys/module/hwerr/parameters/sources
 *	echo +mce > /sys/module/hwerr/parameters/sources
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/log2.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/workqueue.h>

#include "guard.h"
#include "hwerr.h"
#include "kfunc.h"
#include "ring.h"

static const struct hwerr_source_ops * const sources[] = {
	&hwerr_source_mce,
	&hwerr_source_aer,
	&hwerr_source_edac,
	&hwerr_source_memfail,
	&hwerr_source_cper,
};

static DEFINE_MUTEX(sources_lock);	/* guards attaching and @attached */
static bool attached[ARRAY_SIZE(sources)];
static bool unwanted[ARRAY_SIZE(sources)];	/* by a parameter of the load; then constant */
static bool ready;			/* between init and exit, under the lock */
static bool exiting;

static unsigned int ring_kib = 256;
module_param(ring_kib, uint, 0444);
MODULE_PARM_DESC(ring_kib, "Size of each of the two rings, KiB, a power of two from 16 to 4096");

bool hwerr_exiting(void)
{
	return READ_ONCE(exiting);
}

u64 hwerr_sources_attached(void)
{
	u64 bits = 0;
	int i;

	for (i = 0; i < ARRAY_SIZE(sources); i++)
		if (READ_ONCE(attached[i]))
			bits |= sources[i]->sources;
	return bits;
}

static int attach(int i)
{
	int err = attached[i] ? 0 : sources[i]->init();

	if (!err)
		WRITE_ONCE(attached[i], true);
	return err;
}

static void detach(int i)
{
	if (!attached[i])
		return;
	WRITE_ONCE(attached[i], false);
	sources[i]->exit();
}

static int sources_get(char *buf, const struct kernel_param *kp)
{
	int i, n = 0;

	for (i = 0; i < ARRAY_SIZE(sources); i++)
		if (READ_ONCE(attached[i]))
			n += scnprintf(buf + n, PAGE_SIZE - n, "%s%s", n ? "," : "",
				       sources[i]->name);
	return n + scnprintf(buf + n, PAGE_SIZE - n, "\n");
}

static int sources_set(const char *val, const struct kernel_param *kp)
{
	char name[32];
	int i, err = -ENOENT;

	if ((*val != '+' && *val != '-') || strscpy(name, val + 1, sizeof(name)) < 0)
		return -EINVAL;
	mutex_lock(&sources_lock);
	for (i = 0; i < ARRAY_SIZE(sources) && !hwerr_exiting(); i++) {
		if (strcmp(sources[i]->name, strim(name)))
			continue;
		err = 0;
		if (!ready)
			unwanted[i] = *val == '-';
		else if (*val == '+')
			err = attach(i);
		else
			detach(i);
	}
	mutex_unlock(&sources_lock);
	return err;
}

static const struct kernel_param_ops sources_ops = {
	.get = sources_get,
	.set = sources_set,
};
module_param_cb(sources, &sources_ops, NULL, 0644);
MODULE_PARM_DESC(sources, "Attached sources; +NAME or -NAME attaches or detaches one, also when loading");

/* What the kernel still holds from before: may take long, so not in init. */
static void earlier_fn(struct work_struct *work)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(sources); i++)
		if (sources[i]->earlier && READ_ONCE(attached[i]) && !hwerr_exiting())
			sources[i]->earlier();
}

static DECLARE_WORK(earlier_work, earlier_fn);

static int __init hwerr_init(void)
{
	int i, err;

	if (!is_power_of_2(ring_kib) || ring_kib < 16 || ring_kib > 4096) {
		pr_err("ring_kib=%u is not a power of two from 16 to 4096\n", ring_kib);
		return -EINVAL;
	}
	err = hwerr_ring_init(ring_kib * 1024);
	if (err)
		return err;
	err = hwerr_record_init();
	if (err)
		goto err_ring;
	err = hwerr_owners_init();
	if (err)
		goto err_record;
	err = hwerr_chardev_init();
	if (err)
		goto err_owners;

	mutex_lock(&sources_lock);
	for (i = 0; i < ARRAY_SIZE(sources); i++) {
		err = unwanted[i] ? 0 : attach(i);
		if (err)
			pr_info("no %s source here (%d)\n", sources[i]->name, err);
	}
	ready = true;
	mutex_unlock(&sources_lock);
	hwerr_kfunc_init();
	/* Before the load ends: what waits for it may clear these. */
	hwerr_lastboot_report();
	queue_work(system_unbound_wq, &earlier_work);
	return 0;

err_owners:
	hwerr_owners_exit();
err_record:
	hwerr_record_exit();
err_ring:
	hwerr_ring_exit();
	return err;
}

static void __exit hwerr_exit(void)
{
	int i;

	WRITE_ONCE(exiting, true);
	cancel_work_sync(&earlier_work);
	mutex_lock(&sources_lock);
	ready = false;
	for (i = ARRAY_SIZE(sources) - 1; i >= 0; i--)
		detach(i);
	mutex_unlock(&sources_lock);
	hwerr_kfunc_exit();
	hwerr_chardev_exit();
	hwerr_guard_exit();
	hwerr_record_exit();
	hwerr_owners_exit();
	hwerr_ring_exit();
}

module_init(hwerr_init);
module_exit(hwerr_exit);

MODULE_DESCRIPTION("Hardware errors as events, named by the VM they hit");
MODULE_AUTHOR("hwerr developers");
MODULE_LICENSE("GPL");
MODULE_VERSION("0.1.0");
