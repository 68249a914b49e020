# SPDX-License-Identifier: MIT
"""Every source, from the injection to the event that is read from /dev/hwerr."""

from __future__ import annotations

import csv
import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from testbed import inject
from testbed.errors import TestbedError
from testbed.guest import Guest, GuestConfig
from testbed.kernel import DEBUGFS, load_sim, put
from testbed.records import (
    MCI_UC,
    AerRecord,
    MceRecord,
    parse_aer_inject,
    parse_mce_inject,
    parse_mcelog,
)
from testbed.victim import Victim

import hwerr_notify
from hwerr_notify import Component, Event, Flags, Kind, Severity, Source

CASES = Path(__file__).resolve().parents[1] / "cases"
SOURCES = Path("/sys/module/hwerr/parameters/sources")
PAGE = 4096
SECONDS = 30.0

VAL, UC, EN, MISCV, ADDRV, PCC, S, AR = (1 << n for n in (63, 61, 60, 59, 58, 57, 56, 55))
DEFERRED, POISON = 1 << 44, 1 << 43
PHYSICAL_PAGE, PHYSICAL_LINE = 2 << 6 | 12, 2 << 6 | 6
RIPV, EIPV, MCIP, LMCES = 1, 2, 4, 8
SER, CMCI = 1 << 24, 1 << 10
INTEL, AMD = 0, 2
SRAO = VAL | UC | EN | MISCV | ADDRV | S | 0xC0
# DRAM as an AMD CPU before Zen reports it, which is what the VM has: bank 4, extended code 8.
AMD_DRAM, AMD_DRAM_BANK = 8 << 16 | 0x0813, 4

_serial = itertools.count(int(time.monotonic() * 1000) << 16)


class Watch:
    """A reader that begins before the injection."""

    def __init__(self) -> None:
        self.device = hwerr_notify.open()
        self._seen: list[Event] = []

    def one(self, wanted: Callable[[Event], bool]) -> Event:
        """The first event like this that was not returned yet. AssertionError if none comes."""
        deadline = time.monotonic() + SECONDS
        while True:
            for n, event in enumerate(self._seen):
                if wanted(event):
                    del self._seen[n]
                    return event
            left = deadline - time.monotonic()
            assert left > 0, f"no such event within {SECONDS:g} s; there were {self._seen}"
            self._seen += self.device.read(left)

    def rest(self) -> list[Event]:
        """What was read or is there now, and was not returned."""
        self._seen += self.device.drain()
        return self._seen

    def totals(self) -> tuple[int, int, int]:
        """(errors, linked, dropped)"""
        stats = self.device.stats()
        return stats.errors, stats.linked, stats.dropped


@pytest.fixture
def watch() -> Iterator[Watch]:
    load_sim()
    watch = Watch()
    yield watch
    watch.device.close()


def said(text: str) -> Callable[[Event], bool]:
    return lambda e: e.text == text


def mce_sim(watch: Watch, **fields: int) -> Event:
    """Injects a machine check and returns its event, told apart by the time stamp counter."""
    tsc = next(_serial)
    put(inject.SIM / "mce", " ".join(f"{k}={v}" for k, v in {**fields, "tsc": tsc}.items()))
    return watch.one(lambda e: e.mce is not None and e.mce.tsc == tsc)


def hits(event: Event, victim: Victim, offset: int = 0, length: int = PAGE) -> bool:
    """These bytes of the victim's page, nobody else, and no doubt; with the range told as the same."""
    assert event.memory is not None
    assert (event.memory.phys_addr, event.memory.phys_len) == (victim.memory.pfn * PAGE + offset, length)
    assert not event.guests
    assert not event.flags & (Flags.OWNERS_UNKNOWN | Flags.OWNERS_TRUNCATED)
    return [(t.pid, t.va, t.len) for t in event.tasks] == [
        (victim.memory.pid, victim.memory.va + offset, length)
    ]


def rows(name: str) -> list[dict[str, str]]:
    with (CASES / name / "expected.tsv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def ids(row: dict[str, str]) -> str:
    return f"{row['file']}-{row['rec']}"


# -- machine checks ------------------------------------------------------------


def inject_case(watch: Watch, record: MceRecord, more: dict[str, int]) -> Event:
    """The whole record, as an Intel CPU's. mce-inject raises uncorrected ones by #MC."""
    fields: dict[str, int] = {
        "status": record.status,
        "mcgstatus": record.mcgstatus,
        "addr": record.addr,
        "misc": record.misc,
        "bank": record.bank,
        "cpu": record.cpu or 0,
        "cs": record.cs,
        "vendor": INTEL,
        "cpuid": record.cpuid or 0,
        **more,
    }
    event = mce_sim(watch, **fields)
    assert event.mce is not None
    for name in ("status", "mcgstatus", "addr", "misc", "bank", "cs"):
        assert getattr(event.mce, name) == fields[name], name
    assert event.source == Source.MCE
    assert event.cpu == fields["cpu"]
    assert not event.flags & (Flags.SOFTWARE | Flags.EARLIER)
    return event


@pytest.mark.parametrize("row", rows("mce-inject"), ids=ids)
def test_mce_inject_cases(watch: Watch, row: dict[str, str]) -> None:
    record = parse_mce_inject((CASES / "mce-inject" / row["file"]).read_text("utf-8"))[int(row["rec"])]
    event = inject_case(watch, record, {"inject": 8} if record.status & MCI_UC else {})
    expected = {
        "corrected": (Severity.CORRECTED, Kind.NONE, False),
        "fatal": (Severity.FATAL, Kind.NONE, False),
        "srar": (Severity.RECOVERABLE, Kind.SRAR, True),
    }
    got = (event.severity, event.kind, event.action_required)
    assert got == expected[row["expected_class"]]


@pytest.mark.parametrize("row", rows("mcelog"), ids=ids)
def test_mcelog_cases(watch: Watch, row: dict[str, str]) -> None:
    if row["file"] == "xen":  # a log line, see its row
        record = MceRecord(status=0xD400008000040150, addr=0x182C480179CF0, bank=2, cpu=1)
    else:
        (record,) = parse_mcelog((CASES / "mcelog/input" / row["file"]).read_text("utf-8"))
    event = inject_case(watch, record, {"mcgcap": record.mcgcap or SER | CMCI})
    assert event.severity.name.lower() == row["expected_class"]
    assert event.kind.name.lower() == row["expected_kind"]
    assert event.component.name.lower() == row["expected_component"]
    assert event.count == int(row["count"])
    # No record has an address that is physical by its MISC.
    assert event.memory is None


def test_a_bank_that_holds_nothing_is_told(watch: Watch) -> None:
    event = mce_sim(watch, status=UC | 0x134, vendor=INTEL)
    assert (event.severity, event.component) == (Severity.INFO, Component.UNKNOWN)


def test_every_register_arrives(watch: Watch) -> None:
    fields = {
        "status": VAL | EN | MISCV | ADDRV | 0x9F,
        "addr": 0xABCDEF,
        "misc": 0x1234500000000086,
        "mcgstatus": 0,
        "bank": 21,
        "cpu": 1,
        "socket": 3,
        "cpuid": 0x806F0,
        "vendor": INTEL,
        "ip": 0x5678,
        "cs": 0x33,
        "synd": 0x11,
        "ipid": 0x22,
        "mcgcap": SER | 10,
        "apicid": 7,
        "microcode": 0x2B000161,
        "ppin": 0xDEADBEEF,
    }
    event = mce_sim(watch, **fields)
    assert event.mce is not None
    assert {n: getattr(event.mce, n) for n in fields if n != "cpu"} == {
        n: v for n, v in fields.items() if n != "cpu"
    }
    assert event.cpu == 1
    assert event.time_mono_ns > 0


@pytest.mark.amd
def test_amd_addresses(watch: Watch) -> None:
    """What is physical on an AMD CPU without scalable MCA: old DRAM errors, and consumed poison."""
    with Victim() as victim:
        addr = victim.memory.pfn * PAGE
        base = {"status": VAL | EN | ADDRV | AMD_DRAM, "addr": addr, "vendor": AMD}
        event = mce_sim(watch, **base, bank=4)
        assert event.memory is not None
        assert (event.memory.phys_addr, event.memory.phys_len) == (addr, PAGE)
        assert (event.severity, event.component) == (Severity.CORRECTED, Component.MEMORY)
        assert [(t.pid, t.va, t.len) for t in event.tasks] == [(victim.memory.pid, victim.memory.va, PAGE)]
        for other in (
            {**base, "bank": 5},
            {**base, "bank": 4, "status": base["status"] & ~ADDRV},
            {**base, "bank": 4, "status": (base["status"] | POISON) ^ 1 << 16},
        ):
            assert mce_sim(watch, **other).memory is None, hex(other["status"])
        event = mce_sim(watch, **{**base, "bank": 5, "status": base["status"] | POISON})
        assert [t.pid for t in event.tasks] == [victim.memory.pid]
    # A DRAM error whose place is not known: whom it hits is not, either, and that is said.
    event = mce_sim(watch, status=VAL | EN | AMD_DRAM, bank=4, vendor=AMD)
    assert event.flags & Flags.OWNERS_UNKNOWN


@pytest.mark.amd
def test_amd_deferred_is_not_intels_count(watch: Watch) -> None:
    status = VAL | EN | 100 << 38 | 0x9F
    assert status & DEFERRED
    assert mce_sim(watch, status=status, vendor=AMD).severity == Severity.DEFERRED
    event = mce_sim(watch, status=status, vendor=INTEL, mcgcap=SER | CMCI)
    assert (event.severity, event.count) == (Severity.CORRECTED, 100)


@pytest.mark.amd
def test_a_firmware_memory_error_is_one_event_of_the_firmware(watch: Watch) -> None:
    """As apei_mce_report_mem_error() makes it: bank 255."""
    status = VAL | EN | ADDRV | MISCV | 0x9F
    for more, severity, raw in (
        (0, Severity.CORRECTED, 2),
        (UC, Severity.RECOVERABLE, 0),
        (UC | PCC, Severity.FATAL, 1),
    ):
        with Victim() as victim:
            addr = victim.memory.pfn * PAGE + 0x80
            event = mce_sim(watch, status=status | more, addr=addr, misc=PHYSICAL_LINE, bank=255)
            assert event.source == Source.CPER
            assert (event.severity, event.raw_severity) == (severity, raw)
            assert event.component == Component.MEMORY
            assert event.memory is not None
            assert (event.memory.phys_addr, event.memory.phys_len) == (addr, 64)
            assert [(t.pid, t.va) for t in event.tasks] == [(victim.memory.pid, victim.memory.va + 0x80)]
    assert not [e for e in watch.rest() if e.source == Source.MCE]


@pytest.mark.intel
@pytest.mark.exception
def test_real_machine_check(watch: Watch) -> None:
    """#MC: the machine check, then memory_failure() for the same page; one error, and one victim."""
    with Victim() as victim:
        addr = victim.memory.pfn * PAGE
        errors, linked, dropped = watch.totals()
        record = MceRecord(status=SRAO, mcgstatus=RIPV | MCIP | LMCES, addr=addr, misc=PHYSICAL_PAGE, bank=9)
        inject.mce_real(record)
        first = watch.one(lambda e: e.source == Source.MCE)
        assert (first.severity, first.kind) == (Severity.RECOVERABLE, Kind.SRAO)
        assert first.component == Component.MEMORY
        assert not first.action_required
        assert first.mce is not None
        assert (first.mce.status, first.mce.bank, first.mce.mcgstatus) == (SRAO, 9, record.mcgstatus)
        assert first.raw_severity > 0  # the kernel's own grade
        second = watch.one(lambda e: e.source == Source.MEMORY_FAILURE)
        for event in (first, second):
            assert event.memory is not None
            assert (event.memory.phys_addr, event.memory.phys_len) == (addr, PAGE)
            assert not event.flags & Flags.OWNERS_UNKNOWN
            assert [(t.pid, t.va, t.len) for t in event.tasks] == [
                (victim.memory.pid, victim.memory.va, PAGE)
            ]
        assert not first.flags & Flags.LINKED
        assert second.flags & Flags.LINKED
        assert second.id == first.id == first.seq
        assert second.memory is not None
        assert second.memory.mf_result == 3
        assert watch.totals() == (errors + 1, linked + 1, dropped)


@pytest.mark.intel
@pytest.mark.exception
def test_real_machine_check_in_an_emulated_guest(watch: Watch) -> None:
    """QEMU without KVM, which an emulated Intel CPU does not have: its PID and HVA, and no GPA."""
    # A reader that is opened after the start knows the name, even if QEMU is dead before the record is read.
    with Guest.start(GuestConfig(name="tcg", accel="tcg", backing="memfd")) as guest, hwerr_notify.open():
        gpa = 0x600000
        addr, hva = guest.gpa2hpa(gpa), guest.gpa2hva(gpa)
        record = MceRecord(status=SRAO, mcgstatus=RIPV | MCIP | LMCES, addr=addr, misc=PHYSICAL_PAGE, bank=9)
        inject.mce_real(record)
        event = watch.one(lambda e: e.source == Source.MCE)
        assert (event.severity, event.kind) == (Severity.RECOVERABLE, Kind.SRAO)
        assert not event.flags & (Flags.OWNERS_UNKNOWN | Flags.OWNERS_TRUNCATED)
        assert not event.tasks
        (hit,) = event.guests
        assert (hit.pid, hit.hva, hit.len, hit.gpa, hit.kvm) == (guest.pid, hva, PAGE, None, False)
        assert hit.name == "tcg"
        assert watch.one(lambda e: e.source == Source.MEMORY_FAILURE).id == event.seq


@contextmanager
def graded_as_intel() -> Iterator[None]:
    """The AMD CPU, which has nested KVM, panics of any #MC: meanwhile the kernel grades it as Intel's."""
    put(inject.SIM / "vendor", str(INTEL))
    try:
        yield
    finally:
        put(inject.SIM / "vendor", str(AMD))


@pytest.mark.amd
@pytest.mark.parametrize("backing", ["anon", "thp", "hugetlb", "memfd"])
@pytest.mark.exception
def test_real_machine_check_in_a_kvm_guest(watch: Watch, backing: str) -> None:
    """A real #MC, SRAO, taken by the VM's CPU from its own bank; memory_failure() runs after it."""
    with Guest.start(GuestConfig(name="mc", backing=backing)) as guest, hwerr_notify.open():
        # The #MC is CPU 0's, and must not find it inside the guest: the emulator would hand it to that.
        for task in Path(f"/proc/{guest.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {1})
        gpa = 0x600000
        addr, hva = guest.gpa2hpa(gpa), guest.gpa2hva(gpa)
        record = MceRecord(status=SRAO, mcgstatus=RIPV | MCIP | LMCES, addr=addr, misc=PHYSICAL_PAGE, bank=9)
        with graded_as_intel():
            inject.mce_real(record)
            event = watch.one(lambda e: e.source == Source.MCE)
            after = watch.one(lambda e: e.source == Source.MEMORY_FAILURE)
        assert event.mce is not None
        assert (event.mce.status, event.mce.bank, event.mce.mcgstatus) == (SRAO, 9, record.mcgstatus)
        assert (event.severity, event.kind) == (Severity.RECOVERABLE, Kind.SRAO)
        assert not event.flags & (Flags.OWNERS_UNKNOWN | Flags.OWNERS_TRUNCATED | Flags.SOFTWARE)
        assert not event.tasks
        (hit,) = event.guests
        assert (hit.pid, hit.name, hit.hva, hit.len, hit.gpa, hit.kvm) == (
            guest.pid, "mc", hva, PAGE, gpa, True
        )  # fmt: skip
        assert after.id == event.seq
        assert after.flags & Flags.LINKED
        assert [(g.pid, g.gpa) for g in after.guests] == [(guest.pid, gpa)]


@pytest.mark.intel
def test_real_corrected_machine_check_by_polling(watch: Watch) -> None:
    with Victim() as victim:
        addr = victim.memory.pfn * PAGE + 0x40
        status = VAL | EN | MISCV | ADDRV | 0x9F
        inject.mce_real(MceRecord(status=status, addr=addr, misc=PHYSICAL_LINE, bank=7))
        inject.poll_banks()
        event = watch.one(lambda e: e.mce is not None and e.mce.addr == addr)
        assert event.severity == Severity.CORRECTED
        assert event.memory is not None
        assert (event.memory.phys_addr, event.memory.phys_len) == (addr, 64)
        assert [(t.pid, t.va, t.len) for t in event.tasks] == [
            (victim.memory.pid, victim.memory.va + 0x40, 64)
        ]


@pytest.mark.intel
def test_intel_address_that_is_not_physical(watch: Watch) -> None:
    base = {"status": VAL | EN | MISCV | ADDRV | 0x9F, "addr": 0x1000_0000, "vendor": INTEL, "bank": 7}
    for misc in (1 << 6 | 12, 3 << 6 | 12, 7 << 6 | 12, 2 << 6 | 13):
        event = mce_sim(watch, **base, misc=misc)
        assert event.memory is None
        assert event.flags & Flags.OWNERS_UNKNOWN
    event = mce_sim(watch, **base, misc=PHYSICAL_PAGE)
    assert event.memory is not None
    assert not event.flags & Flags.OWNERS_UNKNOWN


# -- PCI Express ----------------------------------------------------------------


def aer_event(watch: Watch, device: str, severity: int, status: int) -> Event:
    return watch.one(
        lambda e: (
            e.pci is not None
            and e.pci.address == device
            and e.raw_severity == severity
            and e.pci.status == status
        )
    )


def check_pci(event: Event) -> None:
    assert event.source == Source.AER
    assert event.component == Component.PCIE
    assert event.pci is not None
    root = Path("/sys/bus/pci/devices", event.pci.address)
    assert event.pci.vendor == int((root / "vendor").read_text("ascii"), 16)
    assert event.pci.device == int((root / "device").read_text("ascii"), 16)


AER_CLASS = {
    "corrected": (2, Severity.CORRECTED, Kind.NONE),
    "nonfatal": (0, Severity.RECOVERABLE, Kind.NONFATAL),
    "fatal": (1, Severity.FATAL, Kind.NONE),
}


def test_real_aer(watch: Watch) -> None:
    """By the virtual device itself, through its root port's interrupt."""
    device = inject.pci_rescan("aer0")
    inject.aer_real("aer0", "POISON_TLP", header_log=(5, 6, 7, 8))
    event = aer_event(watch, device, 0, 0x1000)
    assert (event.severity, event.kind) == (Severity.RECOVERABLE, Kind.NONFATAL)
    check_pci(event)
    assert event.pci is not None
    # In the order of the wire, byte by byte (PCIe 7.8.4.8).
    assert (event.pci.tlp_valid, event.pci.tlp) == (True, tuple(w << 24 for w in (5, 6, 7, 8)))


def test_real_fatal_aer(watch: Watch) -> None:
    device = inject.pci_rescan("aer1")
    inject.aer_real("aer1", "MALF_TLP")
    event = aer_event(watch, device, 1, 0)
    assert (event.severity, event.kind) == (Severity.FATAL, Kind.NONE)
    check_pci(event)


@pytest.mark.parametrize("row", rows("aer-inject"), ids=ids)
def test_aer_inject_cases(watch: Watch, row: dict[str, str]) -> None:
    record = parse_aer_inject((CASES / "aer-inject" / row["file"]).read_text("utf-8"))[int(row["rec"])]
    names = row["expected_severity"].split(" + ")
    device = inject.pci_address("aer1" if "fatal" in names else "aer0")
    inject.aer(AerRecord(record.cor_status, record.uncor_status, record.header_log, device))
    for name, injected in zip(names, row["status"].split("+"), strict=True):
        number, severity, kind = AER_CLASS[name]
        # The kernel does not read a device's status after a fatal error: its link may be down.
        status = 0 if name == "fatal" else int(injected, 0)
        event = aer_event(watch, device, number, status)
        assert (event.severity, event.kind) == (severity, kind)
        check_pci(event)
        assert event.pci is not None
        # The header log belongs to uncorrectable errors, and is read with the status.
        assert event.pci.tlp_valid == (name == "nonfatal")
        if event.pci.tlp_valid:
            assert event.pci.tlp == record.header_log


def test_aer_several_bits_and_all_names(watch: Watch) -> None:
    device = inject.pci_address("aer0")
    inject.aer(AerRecord(uncor_status=0x0001_C000, device=device, header_log=(1, 2, 3, 4)))
    event = aer_event(watch, device, 0, 0x0001_C000)
    assert event.to_json()["pci"]["names"] == ["CmpltTO", "CmpltAbrt", "UnxCmplt"]
    assert event.severity == Severity.RECOVERABLE


# -- memory controllers -----------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "number", "severity"),
    [
        ("ce", 0, Severity.CORRECTED),
        ("ue", 1, Severity.RECOVERABLE),
        ("deferred", 2, Severity.DEFERRED),
        ("fatal", 3, Severity.FATAL),
        ("info", 4, Severity.INFO),
    ],
)
def test_edac(watch: Watch, kind: str, number: int, severity: Severity) -> None:
    mc, layers = inject.edac_layers("DIMM_C2")
    with Victim() as victim:
        msg = f"case {next(_serial)}"
        inject.edac(
            kind, mc=mc, layers=layers, page=victim.memory.pfn, offset=0x1C0, grain=64,
            syndrome=0xBEEF + number, count=3, msg=msg,
        )  # fmt: skip
        event = watch.one(lambda e: e.text == msg)
        assert (event.source, event.component) == (Source.EDAC, Component.MEMORY)
        assert (event.severity, event.raw_severity, event.count) == (severity, number, 3)
        assert event.edac is not None
        assert (event.edac.mc, event.edac.layers, event.edac.label) == (mc, (0, 1, -1), "DIMM_C2")
        assert (event.edac.grain, event.edac.syndrome) == (64, 0xBEEF + number)
        assert event.memory is not None
        addr = victim.memory.pfn * PAGE + 0x1C0
        assert (event.memory.phys_addr, event.memory.phys_len) == (addr, 64)
        assert [(t.pid, t.va, t.len) for t in event.tasks] == [
            (victim.memory.pid, victim.memory.va + 0x1C0, 64)
        ]


def test_edac_without_an_address(watch: Watch) -> None:
    """Page 0, offset 0 is how drivers say that they do not know."""
    msg = f"case {next(_serial)}"
    inject.edac("ue", layers=(1, -1, -1), syndrome=next(_serial) & 0xFFFF, msg=msg)
    event = watch.one(lambda e: e.text == msg)
    assert event.memory is None
    assert event.flags & Flags.OWNERS_UNKNOWN
    assert event.edac is not None
    assert event.edac.layers == (1, -1, -1)
    assert event.edac.label == "DIMM_B1 or DIMM_B2"


# -- one physical error, several sources --------------------------------------------


@pytest.mark.amd
def test_machine_check_and_edac_of_one_page_are_one_error(watch: Watch) -> None:
    with Victim() as victim:
        errors, linked, dropped = watch.totals()
        addr = victim.memory.pfn * PAGE
        first = mce_sim(watch, status=VAL | EN | ADDRV | AMD_DRAM, addr=addr, bank=4, vendor=AMD)
        msg = f"case {next(_serial)}"
        inject.edac("ce", page=victim.memory.pfn, msg=msg)
        second = watch.one(lambda e: e.text == msg)
        assert second.id == first.seq
        assert second.flags & Flags.LINKED
        assert watch.totals() == (errors + 1, linked + 1, dropped)


@pytest.mark.amd
def test_repetitions_told_by_two_sources_are_counted_once(watch: Watch) -> None:
    with Victim() as victim:
        addr = victim.memory.pfn * PAGE
        errors, linked, dropped = watch.totals()
        msg = f"case {next(_serial)}"
        tsc = next(_serial)
        mce = f"status={VAL | EN | ADDRV | AMD_DRAM} addr={addr} bank=4 vendor={AMD} tsc={tsc}"
        put(inject.SIM / "mce", mce)
        # The kernel reports it from a work item: not before the other source, unless that waits.
        first = watch.one(lambda e: e.mce is not None and e.mce.tsc == tsc)
        inject.edac("ce", page=victim.memory.pfn, msg=msg)
        for _ in range(4):
            put(inject.SIM / "mce", mce)
            inject.edac("ce", page=victim.memory.pfn, msg=msg)
        second = watch.one(lambda e: e.text == msg)
        assert not first.flags & Flags.LINKED
        count = {Source.MCE: first.count, Source.EDAC: second.count}
        assert second.flags & Flags.LINKED
        while sum(count.values()) < 10:
            more = watch.one(lambda e: bool(e.flags & Flags.COALESCED) and e.id == first.seq)
            assert bool(more.flags & Flags.LINKED) == (more.source == Source.EDAC)
            count[more.source] += more.count
        assert count == {Source.MCE: 5, Source.EDAC: 5}
        now = watch.totals()
        assert (now[0], now[2]) == (errors + 5, dropped)
        assert now[1] > linked


@pytest.mark.amd
def test_a_worse_error_in_the_same_memory_is_another(watch: Watch) -> None:
    with Victim() as victim:
        addr = victim.memory.pfn * PAGE
        fatal = watch.device.stats().by_severity[Severity.FATAL]
        mce_sim(watch, status=VAL | EN | ADDRV | AMD_DRAM, addr=addr, bank=4, vendor=AMD)
        msg = f"case {next(_serial)}"
        inject.edac("fatal", page=victim.memory.pfn, msg=msg)
        event = watch.one(lambda e: e.text == msg)
        assert not event.flags & Flags.LINKED
        assert event.id == event.seq
        assert watch.device.stats().by_severity[Severity.FATAL] == fatal + 1


def test_other_memory_of_the_same_page_is_another_error(watch: Watch) -> None:
    with Victim() as victim:
        events = []
        inject.extlog("recoverable", addr=victim.memory.pfn * PAGE, mask=0xFFFFFFFFFFFFFFC0, text="line 0")
        events.append(watch.one(lambda e: e.cper is not None and e.cper.fru_text == "line 0"))
        for offset, msg in ((0x800, f"case {next(_serial)}"), (0x20, f"case {next(_serial)}")):
            inject.edac("ue", page=victim.memory.pfn, offset=offset, grain=32, msg=msg)
            events.append(watch.one(said(msg)))
        assert [bool(e.flags & Flags.LINKED) for e in events] == [False, False, True]
        assert events[2].id == events[0].seq


# -- memory_failure() ---------------------------------------------------------------


def memory_failure(watch: Watch, pfn: int) -> Event:
    return watch.one(
        lambda e: (
            e.source == Source.MEMORY_FAILURE and e.memory is not None and e.memory.phys_addr == pfn * PAGE
        )
    )


def test_madvise(watch: Watch) -> None:
    """A task, not a guest, and found though its page is gone when the result is known."""
    with Victim() as victim:
        errors, linked, dropped = watch.totals()
        victim.poison()
        event = memory_failure(watch, victim.memory.pfn)
        assert (event.severity, event.component) == (Severity.RECOVERABLE, Component.MEMORY)
        assert (event.raw_severity, event.flags & Flags.OWNERS_UNKNOWN) == (3, 0)
        assert event.memory is not None
        assert (event.memory.phys_len, event.memory.mf_result) == (PAGE, 3)
        assert event.memory.resolve_ns > 0
        assert not event.guests
        assert [(t.pid, t.va, t.len) for t in event.tasks] == [(victim.memory.pid, victim.memory.va, PAGE)]
        assert event.text is not None
        assert "dirty" in event.text
        assert "(simulated)" in event.text
        assert watch.totals() == (errors + 1, linked, dropped)


def test_hwpoison_of_a_page_without_owner(watch: Watch) -> None:
    with Victim() as victim:
        pfn = victim.memory.pfn
    # The process is gone, its page is free or about to be: then the kernel can do nothing, and says so.
    with suppress(TestbedError):
        inject.hwpoison(pfn)
    event = memory_failure(watch, pfn)
    assert not event.tasks
    assert not event.guests


def test_calls_without_a_result_leave_nothing_behind(watch: Watch) -> None:
    """More of them than there are drafts; 6.1 tells no result for a page that is poisoned already."""
    with Victim() as victim:
        inject.hwpoison(victim.memory.pfn)
        memory_failure(watch, victim.memory.pfn)
        _, _, dropped = watch.totals()
        for _ in range(100):
            # Already poisoned: some kernels say so.
            with suppress(TestbedError):
                inject.hwpoison(victim.memory.pfn)
    test_madvise(watch)
    assert watch.totals()[2] == dropped


@contextmanager
def without_kprobes() -> Iterator[None]:
    put(DEBUGFS / "kprobes/enabled", "0")
    try:
        yield
    finally:
        put(DEBUGFS / "kprobes/enabled", "1")


def test_without_kprobes_the_result_alone_is_told(watch: Watch) -> None:
    with Victim() as victim:
        with without_kprobes():
            victim.poison()
        event = memory_failure(watch, victim.memory.pfn)
        assert event.flags & Flags.OWNERS_UNKNOWN
        assert not event.tasks
        assert event.memory is not None
        assert event.memory.mf_result == 3
    test_madvise(watch)


# -- firmware -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number", "severity"),
    [
        ("recoverable", 0, Severity.RECOVERABLE),
        ("fatal", 1, Severity.FATAL),
        ("corrected", 2, Severity.CORRECTED),
        ("informational", 3, Severity.INFO),
    ],
)
def test_extlog(watch: Watch, name: str, number: int, severity: Severity) -> None:
    with Victim() as victim:
        addr = victim.memory.pfn * PAGE + 0x7C0
        text = f"fru {next(_serial) % 10**9}"
        inject.extlog(name, addr=addr, mask=0xFFFFFFFFFFFFFFC0, text=text)
        event = watch.one(lambda e: e.cper is not None and e.cper.fru_text == text)
        assert (event.source, event.component) == (Source.CPER, Component.MEMORY)
        assert (event.severity, event.raw_severity) == (severity, number)
        assert event.memory is not None
        assert (event.memory.phys_addr, event.memory.phys_len) == (addr, 64)
        assert [(t.pid, t.va, t.len) for t in event.tasks] == [
            (victim.memory.pid, victim.memory.va + 0x7C0, 64)
        ]
        assert event.cper is not None
        assert event.cper.section == UUID("a5bc1114-6f64-4ede-b863-3e83ed7c83b1")
        assert event.cper.flags == 0


def test_extlog_without_an_address(watch: Watch) -> None:
    text = f"fru {next(_serial) % 10**9}"
    inject.extlog("recoverable", text=text)
    event = watch.one(lambda e: e.cper is not None and e.cper.fru_text == text)
    assert event.memory is None
    assert event.flags & Flags.OWNERS_UNKNOWN


def firmware_section(text: str, section: UUID) -> Callable[[Event], bool]:
    return lambda e: e.cper is not None and (e.cper.fru_text, e.cper.section) == (text, section)


@pytest.mark.parametrize(
    ("name", "number", "severity"),
    [
        ("none", 0, Severity.INFO),
        ("corrected", 1, Severity.CORRECTED),
        ("recoverable", 2, Severity.RECOVERABLE),
        ("panic", 3, Severity.FATAL),
    ],
)
def test_non_standard(watch: Watch, name: str, number: int, severity: Severity) -> None:
    text = f"fru {next(_serial) % 10**9}"
    data = bytes(range(100))
    for section, component in (
        ("11111111-2222-3333-4444-555566667777", Component.UNKNOWN),
        ("71761d37-32b2-45cd-a7d0-b0fedd93e8cf", Component.IO),
    ):
        inject.non_standard(name, section, data, fru="01020304-0506-0708-090a-0b0c0d0e0f10", text=text)
        event = watch.one(firmware_section(text, UUID(section)))
        assert (event.source, event.component) == (Source.CPER, component)
        assert (event.severity, event.raw_severity) == (severity, number)
        assert event.cper is not None
        assert event.cper.data == data
        assert event.cper.fru_id == UUID("01020304-0506-0708-090a-0b0c0d0e0f10")
        assert event.cper.flags == 1  # the number is GHES's


# -- attach, detach, load ---------------------------------------------------------------


def one_of_each(watch: Watch) -> dict[str, Callable[[], Any]]:
    def mce() -> None:
        mce_sim(watch, status=VAL | UC | EN | 0x9F, vendor=INTEL)

    def aer() -> None:
        device = inject.pci_address("aer0")
        inject.aer(AerRecord(uncor_status=0x8000, device=device, header_log=(1, 2, 3, 4)))
        aer_event(watch, device, 0, 0x8000)

    def edac() -> None:
        msg = f"case {next(_serial)}"
        inject.edac("ue", msg=msg)
        watch.one(lambda e: e.text == msg)

    def memfail() -> None:
        with Victim() as victim:
            victim.poison()
            memory_failure(watch, victim.memory.pfn)

    def cper() -> None:
        text = f"fru {next(_serial) % 10**9}"
        inject.extlog("recoverable", text=text)
        watch.one(lambda e: e.cper is not None and e.cper.fru_text == text)

    return {"mce": mce, "aer": aer, "edac": edac, "memory_failure": memfail, "cper": cper}


def test_each_source_goes_and_comes_alone(watch: Watch) -> None:
    sources = one_of_each(watch)
    assert SOURCES.read_text("ascii").strip().split(",") == list(sources)
    for name, source in sources.items():
        put(SOURCES, f"-{name}")
        try:
            assert name not in SOURCES.read_text("ascii").strip().split(",")
            assert Source[name.upper()] not in watch.device.info().sources
            for other, raises in sources.items():
                if other != name:
                    raises()
            before = watch.totals()[0]
            if name == "memory_failure":
                with Victim() as victim:
                    victim.poison()
            elif name == "edac":
                inject.edac("ue", msg="nobody listens")
            assert watch.totals()[0] == before
        finally:
            put(SOURCES, f"+{name}")
        source()
    assert set(watch.device.info().sources) >= {Source[n.upper()] for n in sources}


def test_what_was_there_before_the_load() -> None:
    """Poisoned pages and what EDAC has counted; once, and not as errors that link to others."""
    load_sim()
    subprocess.run(["rmmod", "hwerr"], check=True)
    try:
        with Victim() as victim:
            victim.poison()
            mc, layers = inject.edac_layers("DIMM_D2")
            inject.edac("ce", mc=mc, layers=layers, count=5)
            inject.edac("ue", mc=mc, layers=layers, count=2)
            (dimm,) = (
                label.parent
                for label in Path(f"/sys/devices/system/edac/mc/mc{mc}").glob("dimm*/dimm_label")
                if label.read_text("ascii").strip() == "DIMM_D2"
            )
            counted = {k: int((dimm / f"dimm_{k}_count").read_text("ascii")) for k in ("ce", "ue")}
            assert counted["ce"] >= 5
            inject.edac("ue", mc=mc, layers=(-1, -1, -1))
            noinfo = int(Path(f"/sys/devices/system/edac/mc/mc{mc}/ue_noinfo_count").read_text("ascii"))
            assert noinfo >= 1
    finally:
        subprocess.run(["insmod", os.environ["HWERR_KO"]], check=True)
    with hwerr_notify.open(since="oldest") as device:
        deadline = time.monotonic() + SECONDS
        events: list[Event] = []

        def pages() -> list[Event]:
            return [e for e in events if e.source == Source.MEMORY_FAILURE and e.memory is not None]

        def covers(e: Event, pfn: int) -> bool:
            assert e.memory is not None
            return e.memory.phys_addr <= pfn * PAGE < e.memory.phys_addr + e.memory.phys_len

        while not any(covers(e, victim.memory.pfn) for e in pages()) and time.monotonic() < deadline:
            events += device.read(max(0.0, deadline - time.monotonic()))
        found = [e for e in pages() if covers(e, victim.memory.pfn)]
        assert len(found) == 1
        (page,) = found
        assert page.memory is not None
        assert page.count * PAGE == page.memory.phys_len
        assert page.severity == Severity.RECOVERABLE
        told = {e.severity: e for e in events if e.edac is not None and e.edac.label == "DIMM_D2"}
        assert {s: e.count for s, e in told.items()} == {
            Severity.CORRECTED: counted["ce"],
            Severity.RECOVERABLE: counted["ue"],
        }
        (nowhere,) = (
            e for e in events
            if e.edac is not None and e.flags & Flags.EARLIER and not e.edac.label and e.edac.mc == mc
            and e.severity == Severity.RECOVERABLE
        )  # fmt: skip
        assert nowhere.count == noinfo
        for e in [page, nowhere, *told.values()]:
            assert e.flags & Flags.EARLIER
            assert not e.flags & (Flags.LINKED | Flags.COALESCED)
            assert (e.time_mono_ns, e.time_real_ns, e.cpu) == (0, 0, None)
            assert not e.earlier_boot
