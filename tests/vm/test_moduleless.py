# SPDX-License-Identifier: MIT
"""Without the module: the same events of the same errors, but for what docs/moduleless.md says.

Most tests have both at once: what the module told of an error is what the programs must tell.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
from hit import UNSURE, hit_random_pages, start
from holder import HUGE, PAGE, PRIVATE, SHARED, Holder, hugetlb, merged
from probed import Service, remove_module
from test_sources import (
    ADDRV,
    AMD,
    AMD_DRAM,
    CMCI,
    EN,
    INTEL,
    LMCES,
    MCIP,
    MISCV,
    PHYSICAL_LINE,
    PHYSICAL_PAGE,
    RIPV,
    SER,
    SRAO,
    UC,
    VAL,
    rows,
)
from test_sources import CASES as FILES
from testbed import inject, vfio
from testbed.errors import TestbedError
from testbed.guest import Guest, GuestConfig
from testbed.kernel import load_sim, put
from testbed.records import AerRecord, MceRecord, parse_mce_inject, parse_mcelog
from testbed.victim import Victim
from testbed.wait import wait_event

import hwerr_notify
from hwerr_notify import Event, Flags, Severity, Source, probe
from hwerr_notify.bpf import start_of
from hwerr_notify.moduleless import HOOKS, Moduleless
from hwerr_notify.names import Names

LIMIT = 60.0
# Each reader's own, and how long it took.
OWN = {"seq", "id", "lost", "time", "time_mono_ns", "resolve_ns"}


def form(event: Event) -> dict[str, Any]:
    """What must be the same; docs/moduleless.md has the rest."""
    out = {k: v for k, v in event.to_json().items() if k not in OWN}
    out["guests"] = [{k: v for k, v in g.items() if k != "vm_id"} for g in out["guests"]]
    return out


# What one read(2) gave beyond the event that was waited for.
_unread: WeakKeyDictionary[hwerr_notify.Device, deque[Event]] = WeakKeyDictionary()


def wait(device: hwerr_notify.Device, wanted: Callable[[Event], bool]) -> Event:
    return wait_event(device, wanted, LIMIT, _unread.setdefault(device, deque()))


class Both:
    """The module's reader and one without it."""

    def __init__(self) -> None:
        self.names = Names()
        self.without = Moduleless(names=self.names)
        self.module = hwerr_notify.open()
        assert not isinstance(self.module, Moduleless)

    def learn(self) -> None:
        """The names of the guests there are: of one that its error kills, nothing is left to ask."""
        self.names.learn()
        hwerr_notify.open().close()

    def one(self, wanted: Callable[[Event], bool]) -> tuple[Event, Event]:
        """The event of each, which tell the same."""
        before = time.monotonic_ns() - int(LIMIT * 10**9)
        a, b = wait(self.module, wanted), wait(self.without, wanted)
        assert form(a) == form(b)
        for event in (a, b):
            assert before < event.time_mono_ns < time.monotonic_ns()
        return a, b

    def close(self) -> None:
        self.module.close()
        self.without.close()


# Open as long as this file's tests run, but for those without the module.
_open: list[Both] = []


@pytest.fixture(scope="module")
def opened() -> Iterator[Both]:
    load_sim()
    _open.append(Both())
    yield _open[0]
    _open.pop().close()


@pytest.fixture
def both(opened: Both) -> Both:
    _unread.clear()
    for device in (opened.module, opened.without):
        device.drain()
    return opened


_tsc = [int(time.monotonic() * 1000) << 16]


def mce(both: Both, **fields: int) -> tuple[Event, Event]:
    _tsc[0] += 1
    tsc = _tsc[0]
    put(inject.SIM / "mce", " ".join(f"{k}={v}" for k, v in {**fields, "tsc": tsc}.items()))
    return both.one(lambda e: e.mce is not None and e.mce.tsc == tsc)


# -- the same of the same -----------------------------------------------------


def test_all_hooks_are_there(both: Both) -> None:
    assert both.without.hooks == [hook.name for hook in HOOKS]
    assert not both.without.missing
    assert both.without.info().sources == both.module.info().sources


@pytest.mark.parametrize("name", ["mce-inject", "mcelog"])
def test_recorded_machine_checks(both: Both, name: str) -> None:
    done = 0
    for row in rows(name):
        if row["file"] == "xen":
            continue
        if name == "mcelog":
            (record,) = parse_mcelog((FILES / "mcelog/input" / row["file"]).read_text("utf-8"))
            more = {"mcgcap": record.mcgcap or SER | CMCI}
        else:
            record = parse_mce_inject((FILES / name / row["file"]).read_text("utf-8"))[int(row["rec"])]
            more = {"inject": 8} if record.status & UC else {}
        event, _ = mce(
            both, status=record.status, mcgstatus=record.mcgstatus, addr=record.addr, misc=record.misc,
            bank=record.bank, cpu=record.cpu or 0, cs=record.cs, vendor=INTEL, cpuid=record.cpuid or 0,
            **more,
        )  # fmt: skip
        assert event.severity.label == row["expected_class"].replace("srar", "recoverable")
        done += 1
    assert done > 5


@pytest.mark.amd
def test_machine_checks_of_amd(both: Both) -> None:
    with Victim() as victim:
        addr = victim.memory.pfn * PAGE
        base = {"status": VAL | EN | ADDRV | AMD_DRAM, "addr": addr, "vendor": AMD}
        for fields in (
            {**base, "bank": 4},
            {**base, "bank": 5},
            {**base, "bank": 4, "status": base["status"] & ~ADDRV},
            {**base, "bank": 5, "status": base["status"] | 1 << 43},
            {**base, "bank": 4, "status": base["status"] | 1 << 44},
            {
                "status": VAL | EN | ADDRV | MISCV | 0x9F,
                "addr": addr + 0x80,
                "misc": PHYSICAL_LINE,
                "bank": 255,
            },
        ):
            mce(both, **fields)


@pytest.mark.intel
@pytest.mark.exception
def test_real_machine_check(both: Both) -> None:
    """#MC, then memory_failure(): one error, told by two records, whoever tells it."""
    with Victim() as victim, Guest.start(GuestConfig(name="tcg", accel="tcg", backing="memfd")) as guest:
        both.learn()
        # Asked now: the guest dies of it.
        hva = guest.gpa2hva(0x600000)
        for addr in (victim.memory.pfn * PAGE, guest.gpa2hpa(0x600000)):
            record = MceRecord(
                status=SRAO, mcgstatus=RIPV | MCIP | LMCES, addr=addr, misc=PHYSICAL_PAGE, bank=9
            )
            inject.mce_real(record)
            first = both.one(lambda e: e.source == Source.MCE)
            second = both.one(lambda e: e.source == Source.MEMORY_FAILURE)
            for a, b in zip(first, second, strict=True):
                assert b.id == a.id == a.seq
                assert b.flags & Flags.LINKED
                assert not a.flags & UNSURE
        (hit,) = first[1].guests
        assert (hit.pid, hit.hva, hit.gpa) == (guest.pid, hva, None)


@pytest.mark.intel
def test_real_corrected_machine_check_by_polling(both: Both) -> None:
    with Victim() as victim:
        addr = victim.memory.pfn * PAGE + 0x40
        inject.mce_real(
            MceRecord(status=VAL | EN | MISCV | ADDRV | 0x9F, addr=addr, misc=PHYSICAL_LINE, bank=7)
        )
        inject.poll_banks()
        event, _ = both.one(lambda e: e.mce is not None and e.mce.addr == addr)
        assert event.tasks


def test_pci_express(both: Both) -> None:
    device = inject.pci_address("aer0")
    inject.aer_real("aer0", "POISON_TLP", header_log=(5, 6, 7, 8))
    # A bit that another test set may still be there: nothing clears it without a driver.
    event, _ = both.one(lambda e: e.pci is not None and bool(e.pci.status & 0x1000))
    assert event.pci is not None
    assert event.pci.address == device
    inject.aer(AerRecord(uncor_status=0x0001_C000, device=device, header_log=(1, 2, 3, 4)))
    both.one(lambda e: e.pci is not None and e.pci.status == 0x0001_C000)
    inject.aer(AerRecord(cor_status=0x40, device=device))
    both.one(lambda e: e.pci is not None and e.severity == Severity.CORRECTED)


@pytest.mark.parametrize("kind", ["ce", "ue", "deferred", "fatal", "info"])
def test_memory_controllers(both: Both, kind: str) -> None:
    mc, layers = inject.edac_layers("DIMM_C2")
    with Victim() as victim:
        inject.edac(
            kind, mc=mc, layers=layers, page=victim.memory.pfn, offset=0x1C0, grain=64, syndrome=0xBEEF,
            count=3, msg=f"told {kind}",
        )  # fmt: skip
        event, _ = both.one(lambda e: e.text == f"told {kind}")
        assert event.tasks
    inject.edac(kind, layers=(1, -1, -1), msg=f"nowhere {kind}")
    both.one(lambda e: e.text == f"nowhere {kind}")


def test_memory_failure(both: Both) -> None:
    with Victim() as victim:
        pfn = victim.memory.pfn
        victim.poison()
        event, _ = both.one(lambda e: e.memory is not None and e.memory.phys_addr == pfn * PAGE)
        assert [t.pid for t in event.tasks] == [victim.memory.pid]
    with Victim() as victim:
        pfn = victim.memory.pfn
    # Free by now; if about to be, the kernel can do nothing, and says so.
    with suppress(TestbedError):
        inject.hwpoison(pfn)
    wait(both.without, lambda e: e.memory is not None and e.memory.phys_addr == pfn * PAGE)


@pytest.mark.parametrize("flags", [PRIVATE, SHARED], ids=["private", "shared"])
def test_a_hugetlb_page_is_hit_as_a_whole(both: Both, flags: int) -> None:
    with Holder() as holder:
        base = hugetlb(holder, 2, flags)
        phys = holder.phys(base + HUGE)
        # More than the pages that are looked at, were each one of 4 KiB.
        half = HUGE // 2
        inject.extlog("recoverable", addr=phys + half // 2, mask=(1 << 64) - half, text="half")
        event, _ = both.one(lambda e: e.cper is not None and e.cper.fru_text == "half")
        assert [(t.pid, t.va, t.len) for t in event.tasks] == [(holder.pid, base + HUGE, half)]
        assert not event.flags & UNSURE
        # What is poisoned is a page; what its owner loses is all.
        inject.hwpoison(phys // PAGE + 5)
        event, _ = both.one(lambda e: e.memory is not None and e.memory.phys_addr == phys + 5 * PAGE)
        assert [(t.pid, t.va, t.len) for t in event.tasks] == [(holder.pid, base + HUGE, HUGE)]


@pytest.mark.amd
def test_memory_failure_of_a_hugetlb_guest(both: Both) -> None:
    with ExitStack() as stack:
        guest = start(stack, "huge", "hugetlb")
        # The guest dies of it, between the two reads or before.
        both.learn()
        gpa = 0x1200000
        pid, hva = guest.pid, guest.gpa2hva(gpa)
        phys = guest.gpa2hpa(gpa + 0x5000)
        inject.hwpoison(phys // PAGE)
        event, _ = both.one(lambda e: e.memory is not None and e.memory.phys_addr == phys)
        assert [(g.pid, g.gpa, g.hva, g.len) for g in event.guests] == [(pid, gpa, hva, HUGE)]


def section_of(section: str, text: str) -> Callable[[Event], bool]:
    return lambda e: e.cper is not None and (str(e.cper.section), e.cper.fru_text) == (section, text)


def test_firmware(both: Both) -> None:
    with Victim() as victim:
        addr = victim.memory.pfn * PAGE + 0x7C0
        for name in ("recoverable", "fatal", "corrected", "informational"):
            inject.extlog(name, addr=addr, mask=0xFFFFFFFFFFFFFFC0, text=name)
            event, _ = both.one(lambda e, text=name: e.cper is not None and e.cper.fru_text == text)  # type: ignore[misc]
            assert event.tasks
    inject.extlog("recoverable", text="nowhere")
    both.one(lambda e: e.cper is not None and e.cper.fru_text == "nowhere")
    for n, name in enumerate(("none", "corrected", "recoverable", "panic")):
        for section, length in (
            ("11111111-2222-3333-4444-555566667777", 100 + n),
            ("71761d37-32b2-45cd-a7d0-b0fedd93e8cf", 128),
        ):
            data = bytes(b % 251 for b in range(length))
            fru = "01020304-0506-0708-090a-0b0c0d0e0f10"
            inject.non_standard(name, section, data, fru=fru, text=name)
            event, _ = both.one(section_of(section, name))
            assert event.cper is not None
            assert event.cper.data == data


# -- who is hit ---------------------------------------------------------------


def hit(both: Both, phys: int) -> tuple[Event, Event]:
    return mce(
        both, status=VAL | EN | ADDRV | MISCV | AMD_DRAM, addr=phys, misc=PHYSICAL_PAGE, bank=4, vendor=AMD
    )


@pytest.mark.amd
@pytest.mark.parametrize("backing", ["anon", "thp", "hugetlb", "memfd"])
def test_fifty_random_pages_of_a_guest(both: Both, backing: str) -> None:
    random.seed(backing)
    with ExitStack() as stack:
        guest = start(stack, "fifty", backing)
        for g in hit_random_pages(guest, lambda phys: hit(both, phys)[1]):
            assert g.name == "fifty"


@pytest.mark.amd
def test_a_page_of_two_guests_and_a_task(both: Both, tmp_path: Path) -> None:
    with ExitStack() as stack:
        path = f"/dev/shm/both-{os.getpid()}"
        stack.callback(Path(path).unlink, missing_ok=True)
        one = start(stack, "one", "file", path=path)
        two = start(stack, "two", "file", path=path)
        holder = stack.enter_context(Holder())
        va = holder.mmap(HUGE, 1, path=path, offset=0x400000)
        holder.read(va, PAGE)
        _, event = hit(both, one.gpa2hpa(0x400000))
        assert {(g.pid, g.gpa) for g in event.guests} == {(one.pid, 0x400000), (two.pid, 0x400000)}
        assert [(t.pid, t.va) for t in event.tasks] == [(holder.pid, va)]


@pytest.mark.amd
def test_memory_of_a_vm_that_no_guest_sees(both: Both) -> None:
    with Holder() as holder:
        vm = holder.vm()
        va = holder.mmap(4 * PAGE)
        holder.write(va, 4 * PAGE)
        holder.vm_slot(vm, 3, 0x10000, PAGE, va)
        holder.vm_slot(vm, 1 << 16 | 5, 0x20000, 2 * PAGE, va)
        places: list[set[int | None]] = [{0x10000, 0x20000}, {0x21000}, {None}]
        for n, gpas in enumerate(places):
            _, event = hit(both, holder.phys(va + n * PAGE))
            assert {g.gpa for g in event.guests} == gpas
            assert len(event.guests) == len(gpas)


def test_after_fork_and_exit(both: Both) -> None:
    with Holder() as holder:
        va = holder.mmap(PAGE)
        holder.write(va)
        with holder.fork() as child:
            _, event = hit(both, holder.phys(va))
            assert {t.pid for t in event.tasks} == {holder.pid, child.pid}
            child.write(va)
            _, event = hit(both, child.phys(va))
            assert {t.pid for t in event.tasks} == {child.pid}


# -- repetitions, several records of one error, loss ----------------------------


@pytest.mark.amd
def test_repetitions_and_links(both: Both) -> None:
    with Victim() as victim:
        addr = victim.memory.pfn * PAGE
        _tsc[0] += 1
        before = [d.stats() for d in (both.module, both.without)]
        text = f"status={VAL | EN | ADDRV | AMD_DRAM} addr={addr} bank=4 vendor={AMD} tsc={_tsc[0]}"
        put(inject.SIM / "mce", text)
        # The kernel reports it from a work item: not before the other source, unless that waits.
        firsts = both.one(lambda e: e.mce is not None and e.mce.tsc == _tsc[0])
        inject.edac("ce", page=victim.memory.pfn, msg="again")
        for _ in range(4):
            put(inject.SIM / "mce", text)
            inject.edac("ce", page=victim.memory.pfn, msg="again")
        for device, old, first in zip((both.module, both.without), before, firsts, strict=True):
            count = {Source.MCE: first.count, Source.EDAC: 0}
            ids = {first.id}
            linked = {Source.MCE: {bool(first.flags & Flags.LINKED)}, Source.EDAC: set[bool]()}
            while sum(count.values()) < 10:
                event = wait(device, lambda e: e.source in (Source.MCE, Source.EDAC))
                count[event.source] += event.count
                ids.add(event.id)
                linked[event.source].add(bool(event.flags & Flags.LINKED))
            assert count == {Source.MCE: 5, Source.EDAC: 5}
            assert len(ids) == 1
            assert linked == {Source.MCE: {False}, Source.EDAC: {True}}
            new = device.stats()
            assert new.errors - old.errors == 5
            assert new.dropped == old.dropped


def storm(n: int, corrected: bool = False, more: str = "") -> None:
    """Errors of a memory controller, each another, raised in the kernel as fast as it can."""
    put(inject.SIM / "bench", f"n={n} ce={int(corrected)}{more}")


def test_loss_is_exact() -> None:
    load_sim()
    with Moduleless() as device, Moduleless() as other:
        other.set_filter(sources=[Source.AER])
        n = device.info().ring_bytes[1] // 64
        storm(n)
        events = device.drain()
        # What was lost is told by the next event.
        storm(1)
        events += device.read(LIMIT)
        read, lost = len(events), sum(e.lost for e in events)
        assert read + lost == n + 1
        assert lost > 0
        stats = device.stats()
        assert (stats.reader_read, stats.reader_lost, stats.reader_pending) == (read, lost, 0)
        assert stats.dropped == lost
        assert stats.by_source[Source.EDAC] == n + 1
        # Nothing of it was for the other, whose buffers were as full.
        assert other.drain() == []
        inject.aer(AerRecord(uncor_status=0x8000, device=inject.pci_address("aer0"), header_log=(1, 2, 3, 4)))
        assert wait(other, lambda e: True).lost == 0


@contextmanager
def on_cpu(cpu: int) -> Iterator[None]:
    """Has this thread run there only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def test_weaker_errors_within_errors_are_lost_and_counted() -> None:
    """An error in an interrupt of a CPU that is in the same program: the kernel leaves that run out."""
    load_sim()
    n, raised = 300, 0
    events: list[Event] = []

    def interrupt() -> None:
        with on_cpu(1):
            storm(n, more=" cpu=0")

    with Moduleless() as device, Victim() as victim, on_cpu(0):
        deadline = time.monotonic() + LIMIT
        # There is room for all of a round.
        while not device.stats().dropped:
            assert time.monotonic() < deadline
            events += device.drain()
            other = threading.Thread(target=interrupt)
            other.start()
            while other.is_alive():
                storm(1, more=f" addr={victim.memory.pfn * PAGE}")
                raised += 1
            other.join()
            raised += n
        storm(1)
        events += device.drain()
        assert len(events) + sum(e.lost for e in events) == raised + 1
        assert sum(e.lost for e in events) == device.stats().dropped


def test_corrected_errors_do_not_push_uncorrected_ones_out() -> None:
    load_sim()
    with Moduleless() as device:
        storm(device.info().ring_bytes[0] // 64, corrected=True)
        storm(3)
        events = device.drain()
        assert sum(e.severity > Severity.CORRECTED for e in events) == 3
        assert sum(e.lost for e in events) > 0
        assert [e.seq for e in events] == list(range(1, len(events) + 1))


# -- the file -------------------------------------------------------------------


@contextmanager
def no_module() -> Iterator[None]:
    for both in _open:
        both.module.close()
    remove_module()
    try:
        yield
    finally:
        subprocess.run(["insmod", os.environ["HWERR_KO"]], check=True)
        for both in _open:
            both.module = hwerr_notify.open()


def without_module(code: str, *, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == status, done.stderr
    return done


UNPRIVILEGED = """
import os, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
import hwerr_notify
try:
    hwerr_notify.open()
except FileNotFoundError as error:
    sys.stderr.write(str(error))
    sys.exit(7)
"""
TWICE = """
import hwerr_notify
a, b = hwerr_notify.open(), hwerr_notify.open()
print(type(a).__name__, type(b).__name__)
fatal = hwerr_notify.Severity.FATAL
for refused in (lambda: a.stop(0), lambda: a.guard(0, fatal), lambda: a.publish(b""), a.guards):
    try:
        refused()
    except OSError as error:
        assert "module" in error.strerror, error
    else:
        raise AssertionError("not refused")
"""


def test_open_goes_without_and_says_so_once() -> None:
    load_sim()
    with no_module():
        done = without_module(TWICE)
        assert done.stdout.split() == ["Moduleless", "Moduleless"]
        assert done.stderr.count("\n") == 1
        assert "/dev/hwerr is not there" in done.stderr
        done = without_module(UNPRIVILEGED, status=7)
        assert "not permitted" in done.stderr
        with pytest.raises(FileNotFoundError):
            hwerr_notify.open(publish=True)
        with pytest.raises(FileNotFoundError):
            hwerr_notify.open(module=True)
        with hwerr_notify.open(severity=Severity.RECOVERABLE) as device:
            poll = select.poll()
            poll.register(device.fileno(), select.POLLIN)
            assert not poll.poll(0)
            storm(1)
            assert poll.poll(LIMIT * 1000)
            (event,) = device.drain()
            assert not poll.poll(0)
            assert event.seq == event.id == 1
            # There is no history: what was read is not held.
            device.seek("oldest")
            assert not device.drain()
            with pytest.raises(ValueError, match="the next is 2"):
                device.seek(3)
            device.seek(1)
            storm(1)
            assert wait(device, lambda e: True).lost == 1

    # The same file by asyncio.
    async def first() -> Event:
        async with hwerr_notify.Watch(Moduleless()) as watch:
            storm(1)
            return await asyncio.wait_for(anext(watch), LIMIT)

    assert asyncio.run(first()).source == Source.EDAC


def test_watch_goes_without() -> None:
    load_sim()
    with no_module():
        process = subprocess.Popen(
            ["hwerr-watch", "--json", "--count", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        # Said when it sees.
        assert "BPF" in process.stderr.readline()
        storm(1)
        out, err = process.communicate(timeout=LIMIT)
        assert (process.returncode, err) == (0, "")
        assert json.loads(out)["source"] == "edac"
        done = subprocess.run(
            ["hwerr-watch", "--stats", "--json"], capture_output=True, text=True, timeout=300, check=True
        )
        stats = json.loads(done.stdout)
        assert (stats["mode"], stats["missing"]) == ("bpf", {})
        assert set(stats["sources"]) == {"mce", "aer", "edac", "memory_failure", "cper"}
    done = subprocess.run(["hwerr-watch", "--stats", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["mode"] == "module"


# -- what is weaker, by the lines of docs/moduleless.md ---------------------------


def test_weaker_pages_merged_by_ksm(both: Both) -> None:
    with Holder() as one, Holder() as two, ExitStack() as stack:
        at = merged(stack, {one: 1, two: 1})
        _tsc[0] += 1
        text = f"status={VAL | EN | ADDRV | MISCV | AMD_DRAM} addr={one.phys(at[one])} bank=4"
        put(inject.SIM / "mce", f"{text} vendor={AMD} misc={PHYSICAL_PAGE} tsc={_tsc[0]}")
        event = wait(both.module, lambda e: e.mce is not None and e.mce.tsc == _tsc[0])
        assert {t.pid for t in event.tasks} >= {one.pid, two.pid}
        event = wait(both.without, lambda e: e.mce is not None and e.mce.tsc == _tsc[0])
        assert not event.tasks
        assert event.flags & Flags.OWNERS_UNKNOWN


def test_weaker_a_page_poisoned_already(both: Both) -> None:
    """Its owners have it no more; the module finds what is left in their page tables."""
    with Victim() as victim:
        pfn = victim.memory.pfn
        victim.poison()
        both.one(lambda e: e.memory is not None and e.memory.phys_addr == pfn * PAGE)
        _tsc[0] += 1
        text = f"status={VAL | EN | ADDRV | MISCV | AMD_DRAM} addr={pfn * PAGE} bank=4 vendor={AMD}"
        put(inject.SIM / "mce", f"{text} misc={PHYSICAL_PAGE} tsc={_tsc[0]}")
        event = wait(both.without, lambda e: e.mce is not None and e.mce.tsc == _tsc[0])
        assert not event.tasks
        assert event.flags & Flags.OWNERS_UNKNOWN


def test_weaker_a_bank_that_holds_nothing_hits_nobody(both: Both) -> None:
    """The kernel's own mce_is_memory_error() does not look at that bit."""
    _tsc[0] += 1
    put(inject.SIM / "mce", f"status={UC | 0x134} vendor={INTEL} tsc={_tsc[0]}")
    a, b = (
        wait(d, lambda e: e.mce is not None and e.mce.tsc == _tsc[0]) for d in (both.module, both.without)
    )
    assert a.severity == b.severity == Severity.INFO
    assert a.flags & ~b.flags == Flags.OWNERS_UNKNOWN


def test_a_device_passed_through_names_its_holder(both: Both) -> None:
    address = vfio.bind("aer0")
    try:
        with Holder() as holder:
            holder.vfio(address)
            inject.aer(AerRecord(uncor_status=0x8000, device=address, header_log=(9, 10, 11, 12)))

            def wanted(event: Event) -> bool:
                return event.pci is not None and event.pci.address == address

            for event in (wait(both.module, wanted), wait(both.without, wanted)):
                ((pid, by_device, start_ns),) = ((t.pid, t.by_device, t.start_ns) for t in event.tasks)
                assert (pid, by_device) == (holder.pid, True)
                # /proc has it in ticks.
                assert 0 <= start_ns - start_of(pid) < 10_000_000
                assert not event.flags & UNSURE
    finally:
        vfio.unbind("aer0")


def test_weaker_readable_for_what_the_filter_drops() -> None:
    """poll() may say more than there is; read() waits for what is wanted, and has lost nothing."""
    load_sim()
    with Moduleless() as device:
        device.set_filter(severity=Severity.RECOVERABLE)
        inject.edac("ce", msg="not wanted")
        poll = select.poll()
        poll.register(device, select.POLLIN)
        assert poll.poll(LIMIT * 1000)
        assert device.drain() == []
        assert not poll.poll(0)
        inject.edac("ue", msg="wanted")
        (event,) = device.read(LIMIT)
        assert (event.text, event.lost) == ("wanted", 0)


def test_weaker_nothing_from_before(both: Both) -> None:
    with Victim() as victim:
        victim.poison()
        both.one(lambda e: e.source == Source.MEMORY_FAILURE)
        with Moduleless() as device:
            device.seek("oldest")
            assert not device.drain()
            assert device.info().oldest_seq == 0


@pytest.mark.amd
def test_weaker_nothing_is_stopped() -> None:
    with (
        no_module(),
        Guest.start(GuestConfig(name="goes-on", code="count")) as guest,
        hwerr_notify.open() as device,
    ):
        inject.hwpoison(guest.gpa2hpa(0x600000) // PAGE)
        event = wait(device, lambda e: e.source == Source.MEMORY_FAILURE)
        assert [(g.pid, g.gpa, g.stopped) for g in event.guests] == [(guest.pid, 0x600000, False)]
        assert not event.stops


def test_module_and_probes_together_tell_nothing_twice() -> None:
    """One error on each path, with hwerr-probe running: a record from each source that saw it, linked."""
    load_sim()
    probe.unload()
    service = Service()
    try:
        with hwerr_notify.open() as device, Victim() as victim:
            _tsc[0] += 1
            put(inject.SIM / "mce", f"status={VAL | UC | EN | 0x9F} vendor={INTEL} tsc={_tsc[0]}")
            inject.edac("ue", msg="one of memory")
            inject.aer(
                AerRecord(uncor_status=0x8000, device=inject.pci_address("aer0"), header_log=(1, 2, 3, 4))
            )
            victim.poison()
            inject.extlog("recoverable", text="the last")
            events: list[Event] = []
            deadline = time.monotonic() + LIMIT
            while not any(e.source == Source.CPER for e in events):
                assert time.monotonic() < deadline
                events += device.read(1.0)
            # The service publishes what it saw before it ends.
            assert service.stop()[0] == 0
            events += device.drain()
        hardware = [e.source for e in events if not e.software]
        assert sorted(hardware) == [
            Source.MCE, Source.AER, Source.EDAC, Source.MEMORY_FAILURE, Source.CPER,
        ]  # fmt: skip
        (failure,) = (e for e in events if e.source == Source.MEMORY_FAILURE)
        # Some kernels send no signal for madvise().
        assert [(e.source, e.id) for e in events if e.software] in ([], [(Source.SIGBUS, failure.id)])
    finally:
        if service.process.poll() is None:
            service.stop()
        probe.unload()
