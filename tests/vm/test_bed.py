# SPDX-License-Identifier: MIT
"""The test bed, inside the VM: guests are where they say, injections reach the kernel.

What the project makes of an injection is tested elsewhere; here the kernel's own
log, counters and tracepoints are the witness.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from testbed import inject, pagemap, vfio
from testbed.errors import TestbedError
from testbed.guest import BACKINGS, COUNTER_GPA, Guest, GuestConfig
from testbed.kernel import KernelLog, kernel_log, load_sim, put
from testbed.qmp import Monitor
from testbed.records import AerRecord, MceRecord
from testbed.victim import Victim

TRACEFS = Path("/sys/kernel/tracing")
SRAO = 0xBD000000000000C0
LMCE = 0xD  # RIPV, MCIP, LMCES


@pytest.fixture
def log() -> Iterator[KernelLog]:
    with kernel_log() as klog:
        yield klog


@contextmanager
def traced(event: str) -> Iterator[Path]:
    """The trace buffer while a tracepoint is on."""
    switch = TRACEFS / "events" / event / "enable"
    put(TRACEFS / "trace", "")
    put(switch, "1")
    try:
        yield TRACEFS / "trace"
    finally:
        put(switch, "0")


# -- guests ----------------------------------------------------------------


@pytest.mark.amd
@pytest.mark.parametrize("backing", BACKINGS)
def test_guest_memory_is_where_qemu_and_pagemap_say(backing: str) -> None:
    path = "/dev/shm/guest" if backing.startswith("file") else ""
    mem = 32 << 20
    with Guest.start(GuestConfig(name="t", mem=mem, backing=backing, path=path, code="count")) as guest:
        assert guest.status() == "running"
        rng = random.Random(backing)
        for _ in range(20):
            gpa = rng.choice([rng.randrange(0, 0xA0000), rng.randrange(1 << 20, mem)])
            assert pagemap.physical(guest.pid, guest.gpa2hva(gpa)) == guest.gpa2hpa(gpa)
        rollup = Path(f"/proc/{guest.pid}/smaps_rollup").read_text("ascii")
        huge = int(re.findall(r"AnonHugePages:\s+(\d+)", rollup)[0])
        assert (huge * 1024 >= mem) == (backing == "thp"), rollup
        before = guest.counter()
        assert any(guest.counter() != before for _ in range(1000)), "the guest does not run"
        pid = guest.pid
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.amd
def test_two_guests_with_one_file_share_its_pages() -> None:
    config: dict[str, Any] = {"mem": 16 << 20, "backing": "file", "path": "/dev/shm/both"}
    with Guest.start(GuestConfig(name="a", **config)) as a, Guest.start(GuestConfig(name="b", **config)) as b:
        assert a.pid != b.pid
        assert a.gpa2hpa(0x200000) == b.gpa2hpa(0x200000)


@pytest.mark.amd
def test_a_guest_that_cannot_be_says_why() -> None:
    with pytest.raises(TestbedError, match="bogus"):
        Guest.start(GuestConfig(name="t", extra=("-bogus",)))
    with Guest.start(GuestConfig(name="t")), pytest.raises(TestbedError, match="runs already"):
        Guest.start(GuestConfig(name="t"))
    with pytest.raises(TestbedError, match="there is no guest"):
        Guest.attach("t")


@pytest.mark.amd
def test_a_guest_without_kvm() -> None:
    with Guest.start(GuestConfig(name="t", accel="tcg", code="count")) as guest:
        assert pagemap.physical(guest.pid, guest.gpa2hva(COUNTER_GPA)) == guest.gpa2hpa(COUNTER_GPA)


@pytest.mark.amd
def test_a_guest_that_holds_a_device_stops_on_its_error(log: KernelLog) -> None:
    address = vfio.bind("aer0")
    try:
        with Guest.start(GuestConfig(name="t", extra=("-device", f"vfio-pci,host={address}"))) as guest:
            assert "anon_inode:[vfio-device]" in guest.files()
            assert guest.qmp is not None
            inject.aer_real("aer0", "POISON_TLP")
            guest.qmp.wait_event("STOP")
            assert guest.status() == "internal-error"
            log.wait("AER: device recovery successful")
    finally:
        vfio.unbind("aer0")


# -- injections ------------------------------------------------------------


def test_the_monitor_is_this_machines() -> None:
    with Monitor() as monitor:
        assert "hwerr-" in str(monitor.execute("query-name"))
        assert "CPU #0" in monitor.hmp("info cpus")


@pytest.mark.intel
@pytest.mark.exception
def test_real_machine_check_hits_the_page(log: KernelLog) -> None:
    with Victim() as victim:
        pfn = victim.memory.pfn
        inject.mce_real(MceRecord(status=SRAO, mcgstatus=LMCE, addr=pfn << 12, misc=0x8C, bank=9))
        log.wait(rf"Memory failure: {pfn:#x}: recovery action for .*: Recovered")


@pytest.mark.intel
@pytest.mark.exception
def test_real_machine_check_by_broadcast(log: KernelLog) -> None:
    with Victim() as victim:
        pfn = victim.memory.pfn
        inject.mce_real(MceRecord(status=SRAO, mcgstatus=5, addr=pfn << 12, misc=0x8C, bank=9))
        log.wait(rf"Memory failure: {pfn:#x}: recovery action for .*: Recovered")


@pytest.mark.amd
def test_real_corrected_error_is_polled(log: KernelLog) -> None:
    inject.poll_banks(1)
    inject.mce_real(MceRecord(status=0x9C00000000000080, addr=0x40001000, misc=0x8C, bank=7))
    log.wait(r"\[Hardware Error\]: CPU 0: Machine Check: 0 Bank 7: 9c00000000000080")
    log.wait(r"ADDR 40001000 MISC 8c")


def test_mce_inject(log: KernelLog) -> None:
    inject.mce(MceRecord(status=0x9400000000000000, addr=0xABCD, bank=1, cpu=1))
    log.wait(r"CPU 1: Machine Check: 0 Bank 1: 9400000000000000")
    with pytest.raises(TestbedError, match="cannot express mcgstatus"):
        inject.mce(MceRecord(status=0x9400000000000000, mcgstatus=4))


def test_mce_with_every_field(log: KernelLog) -> None:
    inject.mce_any(
        MceRecord(status=0xBD80000000000134, mcgstatus=0x100F, addr=0x1234, ip=0x5678, cpuid=0x806F0)
    )
    log.wait(r"Machine Check Exception: 100f Bank 0: bd80000000000134")
    log.wait(r"RIP .*5678")
    log.wait(r"PROCESSOR \d:806f0")


def test_real_nonfatal_aer(log: KernelLog) -> None:
    inject.aer_real("aer0", "COMP_ABORT", header_log=(1, 2, 3, 4))
    assert inject.pci_address("aer0") in log.wait(r"severity=Uncorrect(ed|able) \(Non-Fatal\)")


def test_real_correctable_aer_is_reported_or_refused(log: KernelLog) -> None:
    if inject.qemu_reports_correctable():
        inject.aer_real("aer0", "BAD_TLP")
        assert inject.pci_address("aer0") in log.wait(r"severity=Correct(ed|able)")
    else:
        with pytest.raises(TestbedError, match="use the aer_inject module"):
            inject.aer_real("aer0", "BAD_TLP")


def test_real_fatal_aer(log: KernelLog) -> None:
    device = inject.pci_rescan("aer1")
    inject.aer_real("aer1", "MALF_TLP")
    assert device in log.wait(r"severity=Uncorrect(ed|able) \(Fatal\)")
    log.wait(r"AER: device recovery (failed|successful)")


def test_aer_inject_several_bits(log: KernelLog) -> None:
    inject.aer(AerRecord(cor_status=0x180, uncor_status=0x8000, header_log=(1, 2, 3, 4), device="aer0"))
    log.wait(r"error status/mask=00000180/")
    log.wait(r"error status/mask=00008000/")
    log.wait(r"TLP Header: (0x)?00000001 (0x)?00000002 (0x)?00000003 (0x)?00000004")
    with pytest.raises(TestbedError, match="no PCI device 'aer9'"):
        inject.aer(AerRecord(cor_status=1, device="aer9"))


def test_edac_counts_at_the_dimm(log: KernelLog) -> None:
    mc, layers = inject.edac_layers("DIMM_D1")
    count = Path(f"/sys/devices/system/edac/mc/mc{mc}/ue_count")
    before = int(count.read_text("ascii"))
    inject.edac("ue", mc=mc, page=0x1234, offset=0x40, grain=4096, layers=layers, count=3, msg="a b = c")
    log.wait(r"EDAC MC1: 3 UE a b = c on DIMM_D1 \(channel:1 slot:0 page:0x1234 offset:0x40 grain:4096")
    assert int(count.read_text("ascii")) == before + 3
    with pytest.raises(TestbedError, match="DIMM_Z9"):
        inject.edac_layers("DIMM_Z9")


def test_firmware_records_reach_the_tracepoints() -> None:
    section = "11111111-2222-3333-4444-555566667777"
    with traced("ras/extlog_mem_event") as trace:
        inject.extlog("recoverable", addr=0x123000, mask=0xFFFFFFFFFFFFF000, text="two words")
        assert re.search(r"recoverable.*0000000000123000.*two words", trace.read_text("utf-8"))
    with traced("ras/non_standard_event") as trace:
        inject.non_standard("panic", section, b"\x01\xfe", text="fru")
        assert re.search(rf"severity: 3.*{section}.*fru.*01.fe", trace.read_text("utf-8"))


def test_hwpoison_and_madvise(log: KernelLog) -> None:
    with Victim() as victim:
        inject.hwpoison(victim.memory.pfn)
        log.wait(rf"Memory failure: {victim.memory.pfn:#x}: recovery action")
    with Victim() as victim:
        victim.poison()
        log.wait(rf"Memory failure: {victim.memory.pfn:#x}: recovery action")


def test_pagemap_says_what_is_missing() -> None:
    with Victim() as victim:
        assert pagemap.pfn_of(victim.memory.pid, victim.memory.va) == victim.memory.pfn
        with pytest.raises(TestbedError, match=r"not touched|nothing at"):
            pagemap.pfn_of(victim.memory.pid, 0x1000)
    with pytest.raises(TestbedError, match="cannot read"):
        pagemap.pfn_of(2**22, 0x1000)


def test_sim_refuses_what_it_does_not_know() -> None:
    load_sim()
    for name, line in (
        ("edac", "mc=9"),
        ("edac", "colour=red"),
        ("mce", "status=x"),
        ("non_standard", "data=1"),
    ):
        with pytest.raises(TestbedError, match="Invalid argument"):
            put(inject.SIM / name, line)
