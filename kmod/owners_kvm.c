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
 */
#include <linux/fs.h>
#include <linux/kvm_host.h>
#include <linux/magic.h>
#include <linux/random.h>
#include <linux/siphash.h>
#include <linux/srcu.h>
#include <linux/uaccess.h>

#include "hwerr.h"
#include "owners.h"

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
	if (!s->len)
		return true;

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
	return s->more;
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
