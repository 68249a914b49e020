// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test-only sources of hardware errors.
 *
 * Debian's kernels have no EDAC injector (CONFIG_EDAC_DEBUG is off), mce-inject
 * cannot set MCG_STATUS or the CPU a record speaks of, and an emulated machine
 * has no firmware that reports through GHES. This module stands where the
 * hardware's driver stands and calls what it calls: edac_mc_handle_error(),
 * mce_log(), the RAS tracepoints. Everything behind these is the kernel's own.
 *
 * One line written to a file below /sys/kernel/debug/hwerr_sim is one error:
 *
 *   edac          mc=0 type=ce page=0x10 offset=0x40 grain=64 syndrome=0 top=0
 *                 mid=1 low=-1 count=1 repeat=1 msg=text up to the end of the line
 *                 type: ce ue deferred fatal info
 *   mce           status=.. addr=.. misc=.. mcgstatus=.. bank=.. cpu=.. socket=..
 *                 cpuid=.. vendor=.. ip=.. cs=.. synd=.. ipid=.. mcgcap=.. apicid=..
 *                 tsc=.. time=.. microcode=.. ppin=.. inject=..
 *   extlog        sev=.. seq=.. type=.. addr=.. mask=.. node=.. card=.. module=..
 *                 fru=GUID text=text up to the end of the line
 *   non_standard  sev=.. section=GUID fru=GUID data=hex text=text up to the end
 *   bench         n=.. ce=0 ue=0 step=1: raises mc_event that often, each another error,
 *                 or with step=0 the same, without an address; ce=1: corrected, but for
 *                 every ue-th. Then bench_ns holds what it took
 *                 addr=..: on that page; irqs_off=1: as an interrupt handler would;
 *                 cpu=..: in an interrupt of that CPU
 *   vendor        0: the kernel takes the CPU for an Intel one when it grades a machine
 *                 check, 2: for the AMD one that it is. An emulated CPU has nested KVM or
 *                 survives a real #MC, not both; so a guest under KVM can be hit by one
 *   splat         any line: WARN(), so that the test bed can test itself
 *
 * Two memory controllers of two channels with two slots each; their DIMMs are
 * DIMM_A1 DIMM_A2 DIMM_B1 DIMM_B2 and DIMM_C1 DIMM_C2 DIMM_D1 DIMM_D2.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cper.h>
#include <linux/debugfs.h>
#include <linux/edac.h>
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/platform_device.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <linux/timekeeping.h>
#include <linux/uuid.h>
#include <ras/ras_event.h>

#include "compat.h"

#define SIM_MCS		2
#define SIM_CHANNELS	2
#define SIM_SLOTS	2
#define SIM_GRAIN	64
#define SIM_LINE	512
#define SIM_DATA	128

static struct platform_device *sim_pdev[SIM_MCS];
static struct mem_ctl_info *sim_mci[SIM_MCS];	/* written at load and unload only */
static struct dentry *sim_dir;

/* One "key=value" of a line. @out is where the value goes, of the type @kind says. */
struct sim_key {
	const char *name;
	enum { SIM_U64, SIM_S32, SIM_WORD, SIM_REST } kind;
	void *out;
};

/*
 * Split @line in place. An unknown key or a value that is no number is -EINVAL: a
 * test with a typing error must not inject something else than it says.
 */
static int sim_parse(char *line, const struct sim_key *keys)
{
	line = strim(line);
	while (*line) {
		char *value = strchr(line, '='), *end;
		const struct sim_key *k;

		if (!value)
			goto bad;
		*value++ = '\0';
		for (k = keys; k->name; k++)
			if (!strcmp(k->name, line))
				break;
		if (!k->name)
			goto bad;
		if (k->kind == SIM_REST) {
			*(const char **)k->out = value;
			return 0;
		}
		end = strpbrk(value, " \t");
		if (end)
			*end++ = '\0';
		if (k->kind == SIM_WORD)
			*(const char **)k->out = value;
		else if (k->kind == SIM_U64 ? kstrtou64(value, 0, k->out) :
					      kstrtos32(value, 0, k->out))
			goto bad;
		line = end ? skip_spaces(end) : "";
	}
	return 0;
bad:
	pr_err("cannot read \"%s\"\n", line);
	return -EINVAL;
}

/* edac */

static int sim_edac_type(const char *name, enum hw_event_mc_err_type *type)
{
	static const char * const names[] = {
		[HW_EVENT_ERR_CORRECTED] = "ce",
		[HW_EVENT_ERR_UNCORRECTED] = "ue",
		[HW_EVENT_ERR_DEFERRED] = "deferred",
		[HW_EVENT_ERR_FATAL] = "fatal",
		[HW_EVENT_ERR_INFO] = "info",
	};
	int i = match_string(names, ARRAY_SIZE(names), name);

	*type = i;
	return i < 0 ? -EINVAL : 0;
}

static int sim_edac(char *line)
{
	u64 mc = 0, page = 0, offset = 0, grain = SIM_GRAIN, syndrome = 0, count = 1, repeat = 1;
	int top = -1, mid = -1, low = -1;
	const char *type_name = "ce", *msg = "simulated error";
	const struct sim_key keys[] = {
		{ "mc", SIM_U64, &mc }, { "type", SIM_WORD, &type_name },
		{ "page", SIM_U64, &page }, { "offset", SIM_U64, &offset },
		{ "grain", SIM_U64, &grain }, { "syndrome", SIM_U64, &syndrome },
		{ "top", SIM_S32, &top }, { "mid", SIM_S32, &mid }, { "low", SIM_S32, &low },
		{ "count", SIM_U64, &count }, { "repeat", SIM_U64, &repeat },
		{ "msg", SIM_REST, &msg }, {}
	};
	enum hw_event_mc_err_type type;
	struct mem_ctl_info *mci;
	struct dimm_info *dimm;
	int err = sim_parse(line, keys);

	if (err)
		return err;
	if (mc >= SIM_MCS || count > U16_MAX || !count || grain > U32_MAX)
		return -EINVAL;
	err = sim_edac_type(type_name, &type);
	if (err)
		return err;
	mci = sim_mci[mc];
	mci_for_each_dimm(mci, dimm)
		dimm->grain = grain;
	while (repeat--) {
		edac_mc_handle_error(type, mci, count, page, offset, syndrome, top, mid, low,
				     msg, "");
		cond_resched();
		if (fatal_signal_pending(current))
			return -EINTR;
	}
	return 0;
}

/* mce */

static int sim_mce(char *line)
{
	u64 bank = 0, cpu = 0, socket = 0, vendor = boot_cpu_data.x86_vendor, cs = 0;
	u64 cpuid = cpuid_eax(1), apicid = 0, microcode = boot_cpu_data.microcode;
	struct mce m = { .time = ktime_get_real_seconds(), .tsc = rdtsc_ordered() };
	u64 status = 0, misc = 0, addr = 0, mcgstatus = 0, ip = 0, synd = 0, ipid = 0;
	u64 mcgcap = 0, ppin = 0, tsc = m.tsc, time = m.time, inject = 0;
	const struct sim_key keys[] = {
		{ "status", SIM_U64, &status }, { "addr", SIM_U64, &addr },
		{ "misc", SIM_U64, &misc }, { "mcgstatus", SIM_U64, &mcgstatus },
		{ "bank", SIM_U64, &bank }, { "cpu", SIM_U64, &cpu },
		{ "socket", SIM_U64, &socket }, { "cpuid", SIM_U64, &cpuid },
		{ "vendor", SIM_U64, &vendor }, { "ip", SIM_U64, &ip }, { "cs", SIM_U64, &cs },
		{ "synd", SIM_U64, &synd }, { "ipid", SIM_U64, &ipid },
		{ "mcgcap", SIM_U64, &mcgcap }, { "apicid", SIM_U64, &apicid },
		{ "tsc", SIM_U64, &tsc }, { "time", SIM_U64, &time },
		{ "microcode", SIM_U64, &microcode }, { "ppin", SIM_U64, &ppin },
		{ "inject", SIM_U64, &inject }, {}
	};
	int err = sim_parse(line, keys);

	if (err)
		return err;
	if (bank > U8_MAX || cpu >= nr_cpu_ids || vendor > U8_MAX || cs > U8_MAX ||
	    inject > U8_MAX)
		return -EINVAL;
	m.status = status;
	m.misc = misc;
	m.addr = addr;
	m.mcgstatus = mcgstatus;
	m.ip = ip;
	m.cs = cs;
	m.tsc = tsc;
	m.time = time;
	m.cpuvendor = vendor;
	m.cpuid = cpuid;
	m.bank = bank;
	m.cpu = cpu;
	m.extcpu = cpu;
	m.socketid = socket;
	m.apicid = apicid;
	m.mcgcap = mcgcap;
	m.synd = synd;
	m.ipid = ipid;
	m.ppin = ppin;
	m.microcode = microcode;
	m.inject_flags = inject;
	m.finished = 1;
	hwerr_sim_mce_log(&m);
	return 0;
}

/* CPER */

static int sim_extlog(char *line)
{
	u64 sev = CPER_SEV_CORRECTED, seq = 0, type = ~0ULL, addr = ~0ULL, mask = 0;
	u64 node = ~0ULL, card = ~0ULL, module = ~0ULL;
	const char *fru = "00000000-0000-0000-0000-000000000000", *text = "";
	const struct sim_key keys[] = {
		{ "sev", SIM_U64, &sev }, { "seq", SIM_U64, &seq }, { "type", SIM_U64, &type },
		{ "addr", SIM_U64, &addr }, { "mask", SIM_U64, &mask },
		{ "node", SIM_U64, &node }, { "card", SIM_U64, &card },
		{ "module", SIM_U64, &module }, { "fru", SIM_WORD, &fru },
		{ "text", SIM_REST, &text }, {}
	};
	struct cper_sec_mem_err mem = {};
	guid_t fru_id;
	int err = sim_parse(line, keys);

	if (err)
		return err;
	if (guid_parse(fru, &fru_id))
		return -EINVAL;
	if (type != ~0ULL) {
		mem.validation_bits |= CPER_MEM_VALID_ERROR_TYPE;
		mem.error_type = type;
	}
	if (addr != ~0ULL) {
		mem.validation_bits |= CPER_MEM_VALID_PA;
		mem.physical_addr = addr;
	}
	if (mask) {
		mem.validation_bits |= CPER_MEM_VALID_PA_MASK;
		mem.physical_addr_mask = mask;
	}
	if (node != ~0ULL) {
		mem.validation_bits |= CPER_MEM_VALID_NODE;
		mem.node = node;
	}
	if (card != ~0ULL) {
		mem.validation_bits |= CPER_MEM_VALID_CARD;
		mem.card = card;
	}
	if (module != ~0ULL) {
		mem.validation_bits |= CPER_MEM_VALID_MODULE;
		mem.module = module;
	}
	trace_extlog_mem_event(&mem, seq, &fru_id, text, sev);
	return 0;
}

static int sim_non_standard(char *line)
{
	const char *section = "00000000-0000-0000-0000-000000000000", *fru = section;
	const char *data = "", *text = "";
	u64 sev = 0;
	const struct sim_key keys[] = {
		{ "sev", SIM_U64, &sev }, { "section", SIM_WORD, &section },
		{ "fru", SIM_WORD, &fru }, { "data", SIM_WORD, &data },
		{ "text", SIM_REST, &text }, {}
	};
	guid_t section_id, fru_id;
	u8 bytes[SIM_DATA];
	size_t len;
	int err = sim_parse(line, keys);

	if (err)
		return err;
	len = strlen(data);
	if (len % 2 || len / 2 > sizeof(bytes) || hex2bin(bytes, data, len / 2) ||
	    guid_parse(section, &section_id) || guid_parse(fru, &fru_id))
		return -EINVAL;
	trace_non_standard_event(&section_id, &fru_id, text, sev, bytes, len / 2);
	return 0;
}

/* vendor */

static u8 sim_own_vendor;

static int sim_vendor(char *line)
{
	u8 vendor;
	int err = kstrtou8(strim(line), 0, &vendor);

	if (err)
		return err;
	if (vendor != X86_VENDOR_INTEL && vendor != X86_VENDOR_AMD)
		return -EINVAL;
	WRITE_ONCE(boot_cpu_data.x86_vendor, vendor);
	return 0;
}

static int sim_splat(char *line)
{
	WARN(1, "%s\n", strim(line));
	return 0;
}

/* What those who listen to the tracepoint cost the one who raises it. */
static u64 sim_bench_ns;

struct sim_raise {
	u64 addr, syndrome;
	bool corrected;
};

static void sim_raise(void *info)
{
	const struct sim_raise *r = info;

	trace_mc_event(r->corrected ? HW_EVENT_ERR_CORRECTED : HW_EVENT_ERR_UNCORRECTED,
		       "bench", "DIMM_A1", 1, 0, 0, 0, -1, r->addr, 6, r->syndrome, "");
}

static int sim_bench(char *line)
{
	u64 n = 0, ce = 0, ue = 0, step = 1, addr = 0, irqs_off = 0, cpu = U64_MAX, i, start;
	const struct sim_key keys[] = {
		{ "n", SIM_U64, &n }, { "ce", SIM_U64, &ce }, { "ue", SIM_U64, &ue },
		{ "step", SIM_U64, &step }, { "addr", SIM_U64, &addr },
		{ "irqs_off", SIM_U64, &irqs_off }, { "cpu", SIM_U64, &cpu }, {}
	};
	int err = sim_parse(line, keys);

	if (err)
		return err;
	start = ktime_get_ns();
	for (i = 0; i < n; i++) {
		struct sim_raise r = {
			.addr = addr, .syndrome = i * step,
			.corrected = ce && !(ue && i % ue == 0),
		};
		unsigned long flags;

		if (cpu != U64_MAX) {
			err = smp_call_function_single(cpu, sim_raise, &r, 1);
			if (err)
				return err;
		} else if (irqs_off) {
			local_irq_save(flags);
			sim_raise(&r);
			local_irq_restore(flags);
		} else {
			sim_raise(&r);
		}
		if (i % 64 == 63)
			cond_resched();
	}
	sim_bench_ns = ktime_get_ns() - start;
	return 0;
}

/* the files */

struct sim_file {
	const char *name;
	int (*inject)(char *line);
};

static const struct sim_file sim_files[] = {
	{ "edac", sim_edac },
	{ "mce", sim_mce },
	{ "extlog", sim_extlog },
	{ "non_standard", sim_non_standard },
	{ "bench", sim_bench },
	{ "vendor", sim_vendor },
	{ "splat", sim_splat },
};

static ssize_t sim_write(struct file *file, const char __user *buf, size_t len, loff_t *pos)
{
	const struct sim_file *sim = file_inode(file)->i_private;
	char *line;
	int err;

	if (len >= SIM_LINE)
		return -EINVAL;
	line = memdup_user_nul(buf, len);
	if (IS_ERR(line))
		return PTR_ERR(line);
	err = sim->inject(line);
	kfree(line);
	return err ?: len;
}

static const struct file_operations sim_fops = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.write = sim_write,
	.llseek = noop_llseek,
};

/* the memory controllers */

static void sim_mc_exit(void)
{
	int i;

	for (i = 0; i < SIM_MCS; i++) {
		if (sim_mci[i]) {
			edac_mc_del_mc(sim_mci[i]->pdev);
			edac_mc_free(sim_mci[i]);
		}
		platform_device_unregister(sim_pdev[i]);
	}
}

static struct mem_ctl_info *sim_mc_new(int index, struct device *dev)
{
	struct edac_mc_layer layers[] = {
		{ .type = EDAC_MC_LAYER_CHANNEL, .size = SIM_CHANNELS, .is_virt_csrow = true },
		{ .type = EDAC_MC_LAYER_SLOT, .size = SIM_SLOTS },
	};
	struct mem_ctl_info *mci = edac_mc_alloc(index, ARRAY_SIZE(layers), layers, 0);
	struct dimm_info *dimm;

	if (!mci)
		return NULL;
	mci->pdev = dev;
	mci->mtype_cap = MEM_FLAG_DDR4;
	mci->edac_ctl_cap = EDAC_FLAG_SECDED;
	mci->edac_cap = EDAC_FLAG_SECDED;
	mci->mod_name = KBUILD_MODNAME;
	mci->ctl_name = "simulated memory controller";
	mci->dev_name = dev_name(dev);
	mci_for_each_dimm(mci, dimm) {
		dimm->nr_pages = SZ_1G >> PAGE_SHIFT;
		dimm->grain = SIM_GRAIN;
		dimm->mtype = MEM_DDR4;
		dimm->dtype = DEV_X8;
		dimm->edac_mode = EDAC_SECDED;
		snprintf(dimm->label, sizeof(dimm->label), "DIMM_%c%u",
			 'A' + index * SIM_CHANNELS + dimm->location[0], dimm->location[1] + 1);
	}
	if (edac_mc_add_mc_with_groups(mci, NULL)) {
		edac_mc_free(mci);
		return NULL;
	}
	return mci;
}

static int __init sim_mc_init(void)
{
	int i;

	for (i = 0; i < SIM_MCS; i++) {
		struct platform_device *pdev;

		pdev = platform_device_register_simple(KBUILD_MODNAME, i, NULL, 0);
		if (IS_ERR(pdev)) {
			sim_mc_exit();
			return PTR_ERR(pdev);
		}
		sim_pdev[i] = pdev;
		sim_mci[i] = sim_mc_new(i, &pdev->dev);
		if (!sim_mci[i]) {
			sim_mc_exit();
			return -ENODEV;
		}
	}
	return 0;
}

static int __init hwerr_sim_init(void)
{
	int i, err = sim_mc_init();

	if (err)
		return err;
	sim_own_vendor = boot_cpu_data.x86_vendor;
	sim_dir = debugfs_create_dir(KBUILD_MODNAME, NULL);
	for (i = 0; i < ARRAY_SIZE(sim_files); i++)
		debugfs_create_file(sim_files[i].name, 0200, sim_dir, (void *)&sim_files[i],
				    &sim_fops);
	debugfs_create_u64("bench_ns", 0400, sim_dir, &sim_bench_ns);
	return 0;
}

static void __exit hwerr_sim_exit(void)
{
	debugfs_remove(sim_dir);
	WRITE_ONCE(boot_cpu_data.x86_vendor, sim_own_vendor);
	sim_mc_exit();
}

module_init(hwerr_sim_init);
module_exit(hwerr_sim_exit);

MODULE_DESCRIPTION("Test-only sources of hardware errors");
MODULE_AUTHOR("The hwerr authors");
MODULE_LICENSE("GPL");
