// SPDX-License-Identifier: GPL-2.0-only
/*
 * Who holds a PCI device that was handed to user space.
 *
 * VFIO knows that a device is open, not by whom; so the open files of all
 * processes are looked at, a process at a time. That happens only for an error
 * of a device bound to a VFIO driver.
 *
 * The file is recognised by its operations being those of the vfio module, and
 * by what it leads to: through struct vfio_device, whose first member is the
 * struct device, it must arrive at this very device. Before 6.6 (b1a3b5c61d27)
 * private_data is the struct vfio_device, since then a struct vfio_device_file,
 * which begins with a pointer to it. Both are tried: pointers are read with
 * copy_from_kernel_nofault(), and arriving at the device is the proof.
 *
 * Where VFIO is part of the kernel its operations have no module to tell them by:
 * then who holds the device is not known, and that is said.
 */
#include <linux/fs.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/pid.h>
#include <linux/pid_namespace.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/task.h>
#include <linux/uaccess.h>

#include "hwerr.h"
#include "owners.h"

/* Processes looked at: without a chance to be preempted, and with. */
#define PROCESSES_ATOMIC	1024
#define PROCESSES_MAX		1000000

static bool leads_to(const void *from, const struct device *dev, int hops)
{
	const void *p = from;

	while (hops--)
		if (!p || copy_from_kernel_nofault(&p, p, sizeof(p)))
			return false;
	return p == dev;
}

static bool file_is_device(struct file *file, void *arg)
{
	const struct pci_dev *pdev = arg;
	const struct module *owner = file->f_op->owner;

	if (!owner || strcmp(owner->name, "vfio"))
		return false;
	return leads_to(file->private_data, &pdev->dev, 1) ||
	       leads_to(file->private_data, &pdev->dev, 2);
}

/*
 * The driver's name goes with its module, which is freed an RCU grace period
 * after the driver let go of its devices (free_module()).
 */
static bool driver_is_vfio(const struct pci_dev *pdev)
{
	const struct device_driver *drv;
	bool is;

	rcu_read_lock();
	drv = READ_ONCE(pdev->dev.driver);
	is = drv && strstr(drv->name, "vfio");
	rcu_read_unlock();
	return is;
}

/* The process with the lowest number from *@nr on; a reference. */
static struct task_struct *next_process(int *nr)
{
	struct task_struct *task = NULL;
	struct pid *pid;

	rcu_read_lock();
	while (!task) {
		pid = find_ge_pid(*nr, &init_pid_ns);
		if (!pid)
			break;
		*nr = pid_nr(pid) + 1;
		task = pid_task(pid, PIDTYPE_TGID);
		if (task)
			get_task_struct(task);
	}
	rcu_read_unlock();
	return task;
}

void hwerr_vfio_holders(struct hwerr_owners *o, struct pci_dev *pdev,
			void (*found)(struct hwerr_owners *o,
				      struct task_struct *task))
{
	unsigned int left = o->may_sleep ? PROCESSES_MAX : PROCESSES_ATOMIC;
	struct task_struct *task;
	int nr = 1;

	if (!driver_is_vfio(pdev))
		return;
	if (IS_BUILTIN(CONFIG_VFIO)) {
		o->flags |= HWERR_F_OWNERS_UNKNOWN;
		return;
	}
	while ((task = next_process(&nr))) {
		int ret = 0;

		if (!left--) {
			o->flags |= HWERR_F_OWNERS_UNKNOWN;
			put_task_struct(task);
			return;
		}
		if (!(data_race(task->flags) & PF_KTHREAD))	/* never changes */
			ret = hwerr_files_each(o, task, file_is_device, pdev);
		if (ret > 0)
			found(o, task);
		else if (ret < 0)
			o->flags |= HWERR_F_OWNERS_UNKNOWN;
		put_task_struct(task);
		if (o->may_sleep)
			cond_resched();
	}
}
