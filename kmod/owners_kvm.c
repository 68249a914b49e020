// SPDX-License-Identifier: GPL-2.0-only
/*
 * From an address in a process to the guest-physical address.
 *
 * A VM is a file of the process. It is recognised by what anon_inode_getfile()
 * called it, a name that no program can give a file, and by the address space it
 * belongs to. The alternative, file_is_kvm(), would need a reference on a
 * module that may not be loaded, and kernels exist that keep it to themselves.
 *
 * While the file is open the VM has its memslots; the two sets alternate under
 * kvm->srcu, and the active one is never written but under slots_lock and
 * after synchronize_srcu(). An interval tree over the addresses gives the slots
 * in O(log n).
 *
 * To stop a VM, every vCPU gets the request KVM_REQ_VM_DEAD and its thread an
 * interrupt. KVM looks at requests after it has said that it enters the guest
 * (vcpu->mode) and with interrupts off, so a vCPU that is seen outside the guest
 * once after the request was made does not run another instruction of it before
 * KVM_RUN has returned EIO. One that halted stays asleep, until it would run.
 * kvm_make_all_cpus_request() would do the same; it is KVM's own in some
 * kernels, and a reference to its module would be needed.
 */
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/kvm_host.h>
#include <linux/magic.h>
#include <linux/random.h>
#include <linux/siphash.h>
#include <linux/srcu.h>
#include <linux/uaccess.h>

#include "compat.h"
#include "hwerr.h"
#include "owners.h"

/* How long vCPUs are waited for: an interrupt takes microseconds on hardware. */
#define STOP_WAIT_NS	(10 * NSEC_PER_MSEC)

static siphash_key_t vm_key;

static bool file_is_vm(struct file *file)
{
	const struct dentry *dentry = file->f_path.dentry;

	return dentry->d_sb->s_magic == ANON_INODE_FS_MAGIC &&
	       dentry->d_name.len == strlen("kvm-vm") &&
	       !memcmp(dentry->d_name.name, "kvm-vm", strlen("kvm-vm"));
}

static void add_slot(struct hwerr_vm_search *s, u64 vm_id,
		     const struct kvm_memory_slot *slot)
{
	unsigned long first = max(s->va, slot->userspace_addr);
	unsigned long end = min(s->va + s->len,
				slot->userspace_addr + (slot->npages << PAGE_SHIFT));
	u64 gpa = (slot->base_gfn << PAGE_SHIFT) + (first - slot->userspace_addr);
	struct hwerr_vm_hit *hit;
	unsigned int i;

	/* The same place seen through the other address space (SMM) is no news. */
	for (i = 0; i < s->nr; i++) {
		hit = &s->hit[i];
		if (hit->vm_id == vm_id && hit->gpa == gpa && hit->hva == first)
			return;
	}
	if (s->nr == ARRAY_SIZE(s->hit)) {
		s->more = true;
		return;
	}
	hit = &s->hit[s->nr++];
	hit->vm_id = vm_id;
	hit->hva = first;
	hit->gpa = gpa;
	hit->len = end - first;
	hit->slot = (u32)slot->as_id << 16 | (u16)slot->id;
}

/* The file is open, so the vCPUs are there: they go with the VM. */
static unsigned int stop_vcpus(struct kvm *kvm)
{
	struct kvm_vcpu *vcpu;
	unsigned long i;
	unsigned int nr = 0;

	rcu_read_lock();
	kvm_for_each_vcpu(i, vcpu, kvm) {
		struct task_struct *task;

		kvm_make_request(KVM_REQ_VM_DEAD, vcpu);
		/* The request before the look at who runs; pairs with the mode's barrier. */
		smp_mb__after_atomic();
		task = hwerr_vcpu_task(vcpu);
		if (task)
			kick_process(task);
		nr++;
	}
	rcu_read_unlock();
	return nr;
}

static void stop_vm(struct hwerr_vm_search *s, struct file *file)
{
	unsigned int told;
	unsigned int i;

	for (i = 0; i < s->nr_stops; i++)
		if (s->stops[i]->private_data == file->private_data)
			return;
	told = stop_vcpus(file->private_data);
	s->vcpus += told;
	if (s->nr_stops < ARRAY_SIZE(s->stops)) {
		s->stops[s->nr_stops++] = get_file(file);
	} else {
		s->unwaited += told;
		s->more = true;
	}
}

/* Whoever kicks a vCPU says so before the interrupt is there: it is inside until it is out. */
static bool in_guest(struct kvm_vcpu *vcpu)
{
	int mode = smp_load_acquire(&vcpu->mode);	/* pairs with the store after the exit */

	return mode == IN_GUEST_MODE || mode == EXITING_GUEST_MODE;
}

unsigned int hwerr_kvm_stopped(struct hwerr_vm_search *s)
{
	u64 until = ktime_get_mono_fast_ns() + STOP_WAIT_NS;
	struct kvm_vcpu *vcpu;
	unsigned int i, running = s->unwaited;
	unsigned long n;

	for (i = 0; i < s->nr_stops; i++) {
		struct kvm *kvm = s->stops[i]->private_data;

		kvm_for_each_vcpu(n, vcpu, kvm) {
			/* Nothing below is done before the guest was left. */
			while (in_guest(vcpu) && ktime_get_mono_fast_ns() < until)
				cpu_relax();
			running += in_guest(vcpu);
		}
		fput(s->stops[i]);
	}
	s->nr_stops = 0;
	return running;
}

static bool search_file(struct file *file, void *arg)
{
	struct hwerr_vm_search *s = arg;
	struct interval_tree_node *node;
	struct kvm_memslots *slots;
	struct mm_struct *mm;
	struct kvm *kvm;
	unsigned int i;
	u64 vm_id;
	int idx;

	if (!file_is_vm(file))
		return false;
	kvm = file->private_data;
	if (copy_from_kernel_nofault(&mm, &kvm->mm, sizeof(mm)) || mm != s->mm)
		return false;
	/* Never 0, which stands for none. */
	vm_id = siphash_1u64((unsigned long)kvm, &vm_key) | 1;
	if (!s->vm_id)
		s->vm_id = vm_id;
	if (s->stop)
		stop_vm(s, file);
	if (!s->len)
		return !s->stop;

	idx = srcu_read_lock(&kvm->srcu);
	for (i = 0; i < ARRAY_SIZE(kvm->memslots); i++) {
		slots = srcu_dereference(kvm->memslots[i], &kvm->srcu);
		if (!slots)
			continue;
		for (node = interval_tree_iter_first(&slots->hva_tree, s->va,
						     s->va + s->len - 1);
		     node && !s->more;
		     node = interval_tree_iter_next(node, s->va,
						    s->va + s->len - 1))
			add_slot(s, vm_id,
				 container_of(node, struct kvm_memory_slot,
					      hva_node[slots->node_idx]));
	}
	srcu_read_unlock(&kvm->srcu, idx);
	return s->more && !s->stop;
}

int hwerr_kvm_search(struct hwerr_owners *o, struct task_struct *task,
		     struct hwerr_vm_search *s)
{
	int ret = hwerr_files_each(o, task, search_file, s);

	return ret < 0 ? ret : 0;
}

void hwerr_kvm_init(void)
{
	get_random_bytes(&vm_key, sizeof(vm_key));
}
