// SPDX-License-Identifier: GPL-2.0-only
/*
 * PCI Express errors, from the aer_event tracepoint.
 *
 * It is raised for native AER and DPC (threaded interrupt) and for firmware's
 * (aer_recover_work_func(), a work item), with the status less what is masked:
 * one event may have several bits, reserved ones included.
 */
#include <linux/kernel.h>
#include <linux/pci.h>

#include "classify.h"
#include "compat.h"
#include "hwerr.h"

/*
 * Task context, preemption off. @tlp: four words, in every kernel's type. What a later kernel
 * gives beyond is not looked at. See compat.h.
 */
static void aer_probe(void *data, const char *dev_name, const u32 status,
		      const u8 severity, const u8 tlp_valid, const u32 *tlp)
{
	struct hwerr_class class = hwerr_class_aer(severity);
	unsigned int domain, bus, dev, fn;
	struct hwerr_info_pci *i;
	struct hwerr_draft *d;

	d = hwerr_draft_get(HWERR_SRC_AER, class.severity);
	if (!d)
		return;
	d->rec.kind = class.kind;
	d->rec.component = class.component;
	d->rec.flags |= class.flags;
	d->rec.raw_severity = severity;
	i = hwerr_draft_info(d, HWERR_INFO_PCI, sizeof(*i));
	if (!i)
		goto submit;
	i->status = status;
	i->vendor = 0xffff;
	i->device = 0xffff;
	if (tlp_valid && tlp) {
		i->flags |= HWERR_PCI_TLP;
		memcpy(i->tlp, tlp, sizeof(i->tlp));
	}
	if (sscanf(dev_name, "%x:%x:%x.%x", &domain, &bus, &dev, &fn) == 4) {
		i->domain = domain;
		i->bus = bus;
		i->devfn = PCI_DEVFN(dev, fn);
		hwerr_draft_ident(d, domain, bus << 8 | i->devfn, status, severity);
		/* The reporter holds a reference: no put of this walk is the last. */
		d->pdev = pci_get_domain_bus_and_slot(domain, bus, i->devfn);
	}
	if (d->pdev) {
		i->vendor = d->pdev->vendor;
		i->device = d->pdev->device;
	} else {
		d->rec.flags |= HWERR_F_OWNERS_UNKNOWN;
	}
submit:
	hwerr_submit(d);
}

static struct hwerr_tp aer_tp = { .name = "aer_event", .probe = aer_probe };

static int aer_source_init(void)
{
	return hwerr_tp_attach(&aer_tp);
}

static void aer_source_exit(void)
{
	hwerr_tp_detach(&aer_tp);
}

const struct hwerr_source_ops hwerr_source_aer = {
	.name = "aer",
	.sources = BIT_ULL(HWERR_SRC_AER),
	.init = aer_source_init,
	.exit = aer_source_exit,
};
