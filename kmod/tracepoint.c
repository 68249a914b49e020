// SPDX-License-Identifier: GPL-2.0-only
/*
 * Tracepoints by name. Most of those with hardware errors are not exported to
 * modules; all of them are built into the kernel, so they do not come and go.
 */
#include <linux/string.h>
#include <linux/tracepoint.h>

#include "hwerr.h"

static void match(struct tracepoint *tp, void *priv)
{
	struct hwerr_tp *t = priv;

	if (!strcmp(tp->name, t->name))
		t->tp = tp;
}

int hwerr_tp_attach(struct hwerr_tp *t)
{
	int err;

	t->tp = NULL;
	for_each_kernel_tracepoint(match, t);
	if (!t->tp)
		return -ENOENT;
	err = tracepoint_probe_register(t->tp, t->probe, NULL);
	if (err)
		t->tp = NULL;
	return err;
}

void hwerr_tp_detach(struct hwerr_tp *t)
{
	if (!t->tp)
		return;
	tracepoint_probe_unregister(t->tp, t->probe, NULL);
	/* A probe that runs now ends before its code goes. */
	tracepoint_synchronize_unregister();
	t->tp = NULL;
}
