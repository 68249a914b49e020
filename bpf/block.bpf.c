// SPDX-License-Identifier: GPL-2.0-only
/*
 * Errors of the host's block devices.
 *
 * They are seen when the request ends, where the current process says nothing; the
 * cgroup that the request is charged to tells who asked for it.
 */
#include "emit.h"

#define REQ_OP_MASK	0xff

/* As far as CONFIG_BLK_CGROUP has them. */
struct blkcg___probe {
	struct cgroup_subsys_state css;
} __attribute__((preserve_access_index));

struct blkcg_gq___probe {
	struct blkcg___probe *blkcg;
} __attribute__((preserve_access_index));

struct bio___probe {
	struct blkcg_gq___probe *bi_blkg;
} __attribute__((preserve_access_index));

SEC("tp_btf/block_rq_error")
int BPF_PROG(hwerr_block_error, struct request *rq, blk_status_t status, unsigned int bytes)
{
	struct hwerr_probe_block *e = hwerr_reserve(HWERR_PROBE_BLOCK, sizeof(*e), NULL);
	struct gendisk *disk;
	struct bio___probe *bio;

	if (!e)
		return 0;
	e->sector = rq->__sector;
	e->bytes = bytes;
	e->op = rq->cmd_flags & REQ_OP_MASK;
	e->status = status;
	disk = rq->q->disk;
	if (disk) {
		e->major = disk->major;
		e->minor = disk->first_minor;
		bpf_probe_read_kernel_str(e->disk, sizeof(e->disk), disk->disk_name);
	}
	bio = (void *)rq->bio;
	if (bio && bpf_core_field_exists(bio->bi_blkg))
		e->cgroup = BPF_CORE_READ(bio, bi_blkg, blkcg, css.cgroup, kn, id);
	HWERR_EMIT(e);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
