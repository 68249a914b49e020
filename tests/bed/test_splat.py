# SPDX-License-Identifier: MIT
"""What is a kernel splat, and what a handled hardware error prints."""

import pytest
from testbed import splat

SPLATS = [
    "WARNING: CPU: 1 PID: 291 at kmod/ring.c:88 hwerr_ring_put+0x1d/0x30 [hwerr]",
    "WARNING: kmod/ring.c:88 at hwerr_ring_put+0x1d/0x30 [hwerr], CPU#1: cat/291",
    "WARNING: possible circular locking dependency detected",
    "WARNING: suspicious RCU usage",
    "BUG: unable to handle page fault for address: ffffc90000123000",
    "BUG: kernel NULL pointer dereference, address: 0000000000000008",
    "BUG: KASAN: use-after-free in hwerr_open+0x12/0x40 [hwerr]",
    "BUG: sleeping function called from invalid context at mm/slab.h:411",
    "BUG: scheduling while atomic: cat/291/0x00000002",
    "BUG: Bad page state in process cat  pfn:10a2b3",
    "BUG kmalloc-64 (Tainted: G           OE     ): Redzone overwritten",
    "watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [cat:291]",
    "kernel BUG at mm/slub.c:305!",
    "Oops: 0002 [#1] PREEMPT SMP NOPTI",
    "general protection fault, probably for non-canonical address 0xdead000000000100: 0000 [#1]",
    "UBSAN: array-index-out-of-bounds in kmod/ring.c:41:7",
    "INFO: task khugepaged:31 blocked for more than 120 seconds.",
    "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
    "rcu: INFO: rcu_preempt self-detected stall on CPU",
    "INFO: trying to register non-static key.",
    "kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
    "refcount_t: underflow; use-after-free.",
    "list_del corruption, ffff8880 is LIST_POISON1 (dead000000000100)",
    "Kernel panic - not syncing: Fatal machine check",
    "------------[ cut here ]------------",
]
NO_SPLATS = [
    "mce: [Hardware Error]: Machine check events logged",
    "mce: [Hardware Error]: CPU 0: Machine Check Exception: 100f Bank 1: bd80000000000134",
    "mce: [Hardware Error]: Machine check: Uncorrected error without MCA Recovery",
    "[Hardware Error]: WARNING: a line of the decoder that begins so",
    "Memory failure: 0x1047fb: recovery action for dirty LRU page: Recovered",
    "Memory failure: 0x40000: recovery action for free buddy page: Recovered",
    "MCE: Killing qemu-system-x86:251 due to hardware memory corruption fault at 7f9e70e00000",
    "mce: Uncorrected hardware memory error in user-access at 40000000",
    "pcieport 0000:00:04.0: AER: Uncorrected (Fatal) error message received from 0000:01:00.0",
    "virtio-pci 0000:01:00.0: AER: can't recover (no error_detected callback)",
    "EDAC MC1: 1 UE simulated error on DIMM_D1 (channel:1 slot:0 page:0x1234 offset:0x0 grain:64)",
    "Disabling lock debugging due to kernel taint",
    "hwerr_sim: loading out-of-tree module taints kernel.",
    "hwerr_sim: module verification failed: signature and/or required key missing - tainting kernel",
    "perf: interrupt took too long (2510 > 2500), lowering kernel.perf_event_max_sample_rate to 79500",
    "workqueue: mce_gen_pool_process hogged CPU for >10000us 4 times, consider switching to WQ_UNBOUND",
    "INFO: NMI handler (perf_event_nmi_handler) took too long to run: 1.2 msecs",
    "DEBUG: this is fine",
]


@pytest.mark.parametrize("text", SPLATS)
@pytest.mark.parametrize("stamp", ["", "[   12.345678] ", "[    1.000000][  T291] "])
def test_a_splat_is_found(text: str, stamp: str) -> None:
    assert splat.is_splat(stamp + text)


@pytest.mark.parametrize("text", NO_SPLATS)
@pytest.mark.parametrize("stamp", ["", "[   12.345678] "])
def test_a_handled_error_is_none(text: str, stamp: str) -> None:
    assert not splat.is_splat(stamp + text)


WARN = """\
[    5.0] before
[    6.0] ------------[ cut here ]------------
[    6.0] WARNING: CPU: 1 PID: 2 at x.c:1 f+0x1/0x2
[    6.0] Call Trace:
[    6.0]  g+0x1/0x2
[    6.0] ---[ end trace 0000000000000000 ]---
[    7.0] after
""".splitlines()


def test_a_report_is_one_splat_with_its_lines() -> None:
    (found,) = splat.find_splats(WARN)
    assert "cut here" in found
    assert "Call Trace" in found
    assert "after" not in found
    assert "before" not in found


def test_two_reports_are_two() -> None:
    assert len(splat.find_splats(WARN + WARN)) == 2


def test_an_allowed_splat_is_left_out_and_no_other() -> None:
    other = [line.replace("x.c", "y.c") for line in WARN]
    (found,) = splat.find_splats(WARN + other, allow=[r"at x\.c:1"])
    assert "y.c" in found


def test_taint_of_a_module_or_a_machine_check_is_no_splat() -> None:
    out_of_tree, unsigned, machine_check = 1 << 12, 1 << 13, 1 << 4
    assert splat.taint_names(out_of_tree | unsigned | machine_check) == []
    assert splat.taint_names(out_of_tree | 1 << 9) == ["warning"]
    assert splat.taint_names(1 << 7) == ["oops or BUG"]
