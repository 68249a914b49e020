// SPDX-License-Identifier: GPL-2.0-only
/*
 * PCIe AER, from the aer_event tracepoint.
 *
 * Raised by aer_print_error() in the root port's interrupt thread, by
 * cper_print_aer() from the work item that GHES queues, and by pci_dpc: process
 * context each time. Tracepoint probes run with preemption off.
 */
#include <linux/aer.h>
#include <linux/kernel.h>
#include <linux/pci.h>

#include "classify.h"
#include "hwerr.h"

/* @tlp: four words, whatever the kernel calls their struct. */
static void aer_probe(void *data, const char *name, const u32 status, const u8 severity,
		      const u8 tlp_valid, void *tlp)
{
	struct hwerr_class c = hwerr_class_aer(severity);
	unsigned int domain, bus, slot, fn;
	struct hwerr_info_pci *i;
	struct hwerr_draft *d;

	d = hwerr_draft_get(HWERR_SRC_AER, c.severity);
	if (!d)
		return;
	d->rec.kind = c.kind;
	d->rec.component = c.component;
	d->rec.raw_severity = severity;
	i = hwerr_draft_info(d, HWERR_INFO_PCI, sizeof(*i));
	i->status = status;
	i->vendor = 0xffff;
	if (tlp_valid && tlp) {
		i->flags = HWERR_PCI_TLP;
		memcpy(i->tlp, tlp, sizeof(i->tlp));
	}
	if (sscanf(name, "%x:%x:%x.%x", &domain, &bus, &slot, &fn) == 4) {
		i->domain = domain;
		i->bus = bus;
		i->devfn = PCI_DEVFN(slot, fn);
		d->pdev = pci_get_domain_bus_and_slot(domain, bus, i->devfn);
	} else {
		hwerr_draft_text(d, "%s", name);
	}
	if (d->pdev) {
		i->vendor = d->pdev->vendor;
		i->device = d->pdev->device;
	}
	d->ident = hwerr_ident(HWERR_SRC_AER, (u64)i->domain << 32 | i->bus << 8 | i->devfn,
			       status, (u64)i->tlp[0] << 32 | i->tlp[1],
			       (u64)i->tlp[2] << 32 | i->tlp[3]);
	hwerr_submit(d);
}

static struct hwerr_tp aer_tp = { .name = "aer_event", .probe = aer_probe };

static int aer_init(void)
{
	return hwerr_tp_attach(&aer_tp);
}

static void aer_exit(void)
{
	hwerr_tp_detach(&aer_tp);
}

const struct hwerr_source_ops hwerr_source_aer = {
	.name = "aer",
	.sources = BIT_ULL(HWERR_SRC_AER),
	.init = aer_init,
	.exit = aer_exit,
};
