# SPDX-License-Identifier: MIT
"""Who is hit while everything moves.

Families of processes (tests/races/churn.c) fork, exec, exit, split, move, page out,
collapse, unmap and share their memory, KSM merges and compaction migrates it, forks fail,
guests come and go, their memory is paged out, merged and split, a CPU comes and goes,
sources are unplugged and readers open and close; meanwhile errors are injected on the
pages. What the processes logged of themselves is the judge (verdict.py):

- nobody is named who cannot have had the page at that time;
- whoever had it all the time is named, or the record says that somebody is missing;
- a guest is named by the guest-physical address where the page is.

A splat ends the whole run (tests/vm/run).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import random
import struct
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from testbed import inject, pagemap
from testbed.errors import TestbedError
from testbed.guest import Guest, GuestConfig
from testbed.kernel import DEBUGFS, load_sim, modprobe, put, zram_swap
from testbed.records import MCI_ADDRV, MCI_EN, MCI_MISCV, MCI_VAL
from verdict import KINDS, LOW, MIB, Claim, Hit, Name, judge

import hwerr_notify
from hwerr_notify import Event, Flags, Severity, Source

pytestmark = pytest.mark.long

TOP = Path(__file__).resolve().parents[2]
SOURCES = Path("/sys/module/hwerr/parameters/sources")
CPU1 = Path("/sys/devices/system/cpu/cpu1/online")
UNSURE = Flags.OWNERS_UNKNOWN | Flags.OWNERS_TRUNCATED
PAGE = 4096
# So many errors there are, however slow the machine is.
LEAST = 100
# Less than the families would like to have, so that many a fork fails when the child
# has its memory already.
PROCESSES = 22


# -- the log -------------------------------------------------------------------


class Log:
    """The claims of a running churn."""

    _HEAD, _CLAIM, _MAX = 64, struct.Struct("=IIQQQQQQQ"), 1 << 20

    def __init__(self, path: Path) -> None:
        with path.open("w+b") as file:
            file.truncate(self._HEAD + self._MAX * self._CLAIM.size)
            self._map = mmap.mmap(file.fileno(), 0)

    @property
    def used(self) -> int:
        """Claims made so far."""
        used: int = struct.unpack_from("=I", self._map)[0]
        assert used < self._MAX, "the log is full: fewer injections, or a bigger one"
        return used

    @property
    def forks_failed(self) -> int:
        return int(struct.unpack_from("=Q", self._map, 8)[0])

    def __getitem__(self, i: int) -> Claim:
        found = self._CLAIM.unpack_from(self._map, self._HEAD + i * self._CLAIM.size)
        return replace(Claim(*found), merges=KINDS[found[1] - 1] == "ksm")

    def keepers(self, start: int, end: int) -> list[int]:
        """Those of these claims that are a keeper's: of its last word only, which is looked at often."""
        last = self._HEAD + self._CLAIM.size - 8
        return [i for i in range(start, end) if any(self._map[(at := last + i * self._CLAIM.size) : at + 8])]

    def all(self) -> dict[int, Claim]:
        return {i: self[i] for i in range(self.used)}


@contextmanager
def churn(kinds: tuple[str, ...]) -> Iterator[Log]:
    """The families, in a cgroup that is short of processes."""
    out = TOP / "build" / "races"
    subprocess.run(["make", "-s", "-C", TOP / "tests" / "races", f"OUT={out}"], check=True)
    path = Path("/dev/shm/churn")
    log = Log(path)
    root = Path("/sys/fs/cgroup")
    put(root / "cgroup.subtree_control", "+pids")
    group = root / "churn"
    group.mkdir(exist_ok=True)
    put(group / "pids.max", str(PROCESSES))
    with subprocess.Popen(
        # Nice, or the kernel's workers wait for their turn after two dozen processes.
        ["sh", "-c", 'echo 0 >"$0" && exec nice "$@"', group / "cgroup.procs", out / "churn", path, *kinds],
        stdin=subprocess.PIPE,
    ) as process:
        try:
            yield log
            assert process.poll() is None, "churn ended"
        finally:
            put(group / "cgroup.kill", "1")
            process.wait()
            path.unlink()


# -- errors --------------------------------------------------------------------


def frame(pid: int, va: int) -> int | None:
    try:
        return pagemap.pfn_of(pid, va)
    except TestbedError:
        return None


class Injector:
    """Corrected errors on pages: machine checks, and EDAC's, whose tracepoint must not sleep."""

    _serials = itertools.count(1)
    # There is one of what injects, and of each of its registers.
    _inject = threading.Lock()

    def __init__(self, sources: Sources | None = None) -> None:
        self.device = hwerr_notify.open(sources=[Source.MCE, Source.EDAC])
        self._sources = sources
        self.unheard = 0
        root = DEBUGFS / "mce-inject"
        put(root / "flags", "sw\n")
        put(root / "cpu", "0")
        self._files = {n: os.open(root / n, os.O_WRONLY) for n in ("status", "addr", "misc", "bank")}

    def _mce(self, addr: int, misc: int) -> None:
        """As inject.mce(), of a DRAM error of an AMD northbridge, with files that stay open."""
        status = MCI_VAL | MCI_EN | MCI_MISCV | MCI_ADDRV | 8 << 16
        for name, value in (("status", status), ("addr", addr), ("misc", misc), ("bank", 4)):
            os.write(self._files[name], f"{value:#x}\n".encode())

    def _generation(self, source: Source) -> int:
        return self._sources.generation[source.name.lower()] if self._sources else 0

    def hit(self, pfn: int, source: Source) -> tuple[int, Event, int] | None:
        """(time before, event, time after); None if its source was unplugged meanwhile."""
        serial = next(self._serials)
        with self._inject:
            generation = self._generation(source)
            start = time.monotonic_ns()
            if source == Source.MCE:
                self._mce(pfn * PAGE, serial << 32 | 2 << 6 | 12)
            else:
                inject.edac("ce", page=pfn, grain=PAGE, syndrome=serial)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for event in self.device.read(0.05):
                if serial in (
                    event.mce.misc >> 32 if event.mce else None,
                    event.edac.syndrome if event.edac else None,
                ):
                    assert event.memory is not None, f"no address: {event!r}"
                    assert event.memory.phys_addr == pfn * PAGE
                    return start, event, time.monotonic_ns()
            if generation & 1 or generation != self._generation(source):
                self.unheard += 1
                return None
        raise AssertionError(f"no event of error {serial} on frame {pfn:#x} ({source.name}) within 60 s")


def aim(log: Log, keepers: list[int], rng: random.Random) -> tuple[int, int, int] | None:
    """A page that somebody has now: (claim, address, frame)."""
    used = log.used
    recent = rng.randrange(max(0, used - 60), used)
    at = recent if rng.random() < 0.4 else rng.choice(keepers[-2 * len(KINDS) :])
    claim = log[at]
    if not claim.pid or claim.may_end:
        return None
    va = claim.va + rng.randrange(claim.len // PAGE) * PAGE
    pfn = frame(claim.pid, va)
    return (at, va, pfn) if pfn else None


def names(event: Event) -> Iterator[Name]:
    """All whom it names, and what is there by now."""
    for t in event.tasks:
        yield Name(t.pid, t.va, frame(t.pid, t.va))
    for g in event.guests:
        yield Name(g.pid, g.hva, frame(g.pid, g.hva), True, g.gpa)


class Shooting:
    """Errors from some threads: one would wait most of the time for the locks of whom it looks at."""

    _THREADS = 6

    def __init__(self, log: Log, herd: Herd, sources: Sources, check: Callable[[], None]) -> None:
        self._log = log
        self._herd = herd
        self._sources = sources
        self._check = check
        self._hits: list[Hit] = []

    def run(self, count: int, seconds: float) -> list[Hit]:
        """That many errors, or as many as there is time for."""
        began = time.monotonic()
        ending = threading.Event()

        def going() -> bool:
            more = time.monotonic() < began + seconds or len(self._hits) < LEAST
            return len(self._hits) < count and more and not ending.is_set()

        with ThreadPoolExecutor(self._THREADS) as pool:
            threads = [pool.submit(self._shoot, n, going) for n in range(self._THREADS)]
            said = 0
            try:
                while wait(threads, 1, FIRST_EXCEPTION).not_done:
                    self._check()
                    for thread in threads:
                        if thread.done():
                            thread.result()
                    if len(self._hits) >= said + 1000:
                        said = len(self._hits)
                        print(f"{said} errors after {time.monotonic() - began:.0f} s", flush=True)
            finally:
                ending.set()
        unheard = sum(thread.result() for thread in threads)
        print(f"{len(self._hits)} errors judged, {unheard} while their source was unplugged")
        assert unheard <= len(self._hits) / 2
        return self._hits

    def _shoot(self, thread: int, going: Callable[[], bool]) -> int:
        """Until that is over; how many errors were not heard."""
        log, herd = self._log, self._herd
        rng = random.Random(thread)
        keepers: dict[int, None] = {}
        seen = 0
        injector = Injector(self._sources)
        with injector.device:
            while going():
                used = log.used
                keepers.update(dict.fromkeys(log.keepers(seen, used)))
                # A claim may become a keeper's a moment after it is made.
                seen = max(seen, used - 100)
                if not keepers:
                    continue
                if herd.up() and rng.random() < 0.4:
                    target = herd.aim(rng, thread, self._THREADS)
                else:
                    target = aim(log, list(keepers), rng)
                if target is None:
                    continue
                at, va, pfn = target
                source = Source.EDAC if rng.random() < 0.3 else Source.MCE
                got = injector.hit(pfn, source)
                if got is None:
                    continue
                start, event, end = got
                after = frame(herd.pid(at) if at < 0 else log[at].pid, va)
                unsure = bool(event.flags & UNSURE)
                hit = Hit(start, end, at, va, pfn, after, source, tuple(names(event)), unsure)
                self._hits.append(hit)
        return injector.unheard


# -- what moves things ---------------------------------------------------------


class Agitators:
    """Threads that do something over and over until the block ends; what they raise is raised here."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.rounds: dict[str, int] = defaultdict(int)
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def start(self, name: str, do: Callable[[], None], pause: float) -> None:
        def run() -> None:
            try:
                while not self.stop.wait(pause):
                    do()
                    self.rounds[name] += 1
            except BaseException as error:
                self._errors.append(error)

        self._threads.append(threading.Thread(target=run, name=name))
        self._threads[-1].start()

    def check(self) -> None:
        if self._errors:
            raise self._errors[0]

    def __enter__(self) -> Agitators:
        return self

    def end(self) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join()

    def __exit__(self, *_: object) -> None:
        self.end()


class Sources:
    """Unplugs a source and plugs it in again. Its generation is odd while it is unplugged."""

    def __init__(self, names: tuple[str, ...] = ("mce", "edac", "memory_failure", "aer", "cper")) -> None:
        present = SOURCES.read_text("ascii").strip().split(",")
        self._names = [n for n in names if n in present]
        assert "mce" in self._names
        self.generation = dict.fromkeys(names, 0)
        self._rng = random.Random(6)

    def toggle(self) -> None:
        name = self._rng.choice(self._names)
        self.generation[name] += 1
        put(SOURCES, f"-{name}")
        put(SOURCES, f"+{name}")
        self.generation[name] += 1


def read_a_little() -> None:
    """Open, with a filter and without; wait a moment; close."""
    with hwerr_notify.open(severities=[Severity.CORRECTED]) as one, hwerr_notify.open() as two:
        one.read(0.01)
        two.stats()
        two.seek("oldest")
        two.read_nonblocking()


GUEST_MEM = 8 * MIB
# One of each, so that two with a backing of the same name never run at once.
BACKINGS = (("anon", "memfd-private"), ("thp", "memfd"))
_PROCESS_MADVISE, _MADV_PAGEOUT = 440, 21


@dataclass
class Stay:
    """A guest, from before it was made to when it was gone; its claims are -2n-1 and -2n-2."""

    n: int
    backing: str
    begin: int
    pid: int = 0
    base: int = 0
    up: int = 0
    down: int = 0
    gone: int = 0

    def claims(self) -> dict[int, Claim]:
        """Of its memory, and of all of its process, whose ROMs KSM merges too."""
        # QEMU offers all of a guest's memory to KSM, which takes what is not shared.
        merges = self.backing != "memfd"
        ram = Claim(
            self.pid, 1000 + 2 * self.n, self.base, GUEST_MEM, self.begin, self.up, self.down, self.gone,
            merges=merges, ram=True,
        )  # fmt: skip
        whole = Claim(self.pid, 1001 + 2 * self.n, 0, 1 << 47, self.begin, 0, 0, self.gone, merges=True)
        return {-2 * self.n - 1: ram, -2 * self.n - 2: whole}


class Herd:
    """Guests that come and go, some at a time."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._lock = threading.Lock()
        self._stays: list[Stay] = []
        self.one_is_up = threading.Event()
        self._libc = ctypes.CDLL(None, use_errno=True)

    def one(self, backings: tuple[str, ...], rng: random.Random) -> None:
        """A guest, and a while for it."""
        backing = rng.choice(backings)
        with self._lock:
            stay = Stay(len(self._stays), backing, time.monotonic_ns())
            self._stays.append(stay)
        with Guest.start(GuestConfig(name=f"race{stay.n}", mem=GUEST_MEM, backing=backing)) as guest:
            stay.pid = guest.pid
            stay.base = guest.gpa2hva(0x10000) - 0x10000
            self._fill(stay)
            stay.up = time.monotonic_ns()
            self.one_is_up.set()
            self._stop.wait(rng.uniform(1, 8))
            stay.down = time.monotonic_ns()
        stay.gone = time.monotonic_ns()

    @staticmethod
    def _fill(stay: Stay) -> None:
        """No two pages are alike, but for a MiB that each guest has too."""
        pages = []
        for at in range(MIB, GUEST_MEM, PAGE):
            whose = 0 if at < 2 * MIB else stay.n + 1
            pages.append(struct.pack("=QQ", at, whose).ljust(PAGE, b"\1"))
        with Path(f"/proc/{stay.pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(stay.base + MIB)
            memory.write(b"".join(pages))

    def up(self) -> list[Stay]:
        with self._lock:
            return [s for s in self._stays if s.up and not s.down]

    def pid(self, claim: int) -> int:
        return self._stays[(-1 - claim) // 2].pid

    def claims(self) -> dict[int, Claim]:
        """When no more come and go."""
        return {k: c for s in self._stays if s.pid for k, c in s.claims().items()}

    def aim(self, rng: random.Random, share: int, shares: int) -> tuple[int, int, int] | None:
        """A page, in that share of pages, of a guest that is up: (claim, address, frame)."""
        up = self.up()
        if not up:
            return None
        stay = rng.choice(up)
        gpa = rng.randrange(share * PAGE, GUEST_MEM, shares * PAGE)
        if LOW <= gpa < MIB:
            return None
        va = stay.base + gpa
        # Only here is what was paged out brought back, by who has this share: not between the error
        # and the look at it. A page that is written is no longer merged.
        with contextlib.suppress(OSError), Path(f"/proc/{stay.pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(va + PAGE - 1)
            byte = memory.read(1)
            if rng.random() < 0.2 and gpa >= MIB:
                memory.seek(va + PAGE - 1)
                memory.write(byte)
        pfn = frame(stay.pid, va)
        return (-2 * stay.n - 1, va, pfn) if pfn else None

    def page_out(self, rng: random.Random) -> None:
        """Some of each guest's memory goes to swap."""
        for stay in self.up():
            try:
                pidfd = os.pidfd_open(stay.pid)
            except ProcessLookupError:
                continue
            try:
                at = stay.base + rng.randrange(MIB, GUEST_MEM - MIB, PAGE)
                vec = struct.pack("=QQ", at, MIB // 2)
                if self._libc.syscall(_PROCESS_MADVISE, pidfd, vec, 1, _MADV_PAGEOUT, 0) < 0:
                    error = ctypes.get_errno()
                    # It has ended.
                    if error != 3:
                        raise OSError(error, os.strerror(error), "process_madvise")
            finally:
                os.close(pidfd)

    def split(self) -> None:
        """What a guest has of transparent huge pages is split."""
        for stay in self.up():
            split(stay.pid, stay.base, GUEST_MEM)


def split(pid: int, va: int, length: int) -> None:
    """Splits transparent huge pages of a process, which may have gone."""
    with contextlib.suppress(TestbedError):
        put(DEBUGFS / "split_huge_pages", f"{pid},{va:#x},{va + length:#x}")


def split_huge_pages(log: Log) -> None:
    """Splits what the last processes have of transparent huge pages."""
    for i in range(max(0, log.used - 10), log.used):
        claim = log[i]
        if claim.pid and not claim.may_end and claim.len > 8 * PAGE:
            split(claim.pid, claim.va, claim.len)


@contextmanager
def ksm() -> Iterator[None]:
    """KSM at work."""
    root = Path("/sys/kernel/mm/ksm")
    put(root / "sleep_millisecs", "20")
    put(root / "pages_to_scan", "1000")
    put(root / "run", "1")
    try:
        yield
    finally:
        put(root / "run", "2")


@contextmanager
def offline_cpu_restored() -> Iterator[None]:
    try:
        yield
    finally:
        put(CPU1, "1")


def races(count: int, seconds: float, least: int) -> None:
    """`least`: so many it must be, whatever the time."""
    load_sim()
    modprobe("mce-inject")
    put(Path("/proc/sys/vm/nr_hugepages"), "24")
    sources = Sources()
    # QEMU is read from the disk now, and not when everything else runs too.
    with Guest.start(GuestConfig(name="first", mem=GUEST_MEM)):
        pass
    with ExitStack() as stack:
        stack.enter_context(zram_swap())
        stack.enter_context(ksm())
        stack.enter_context(offline_cpu_restored())
        log = stack.enter_context(churn(KINDS))
        agitators = stack.enter_context(Agitators())
        herd = Herd(agitators.stop)
        paging = random.Random(8)
        online = [True]

        def hotplug() -> None:
            online[0] = not online[0]
            put(CPU1, str(int(online[0])))

        agitators.start("cpu", hotplug, 1.0)
        agitators.start("sources", sources.toggle, 0.2)
        agitators.start("readers", read_a_little, 0.05)
        agitators.start("compaction", lambda: put(Path("/proc/sys/vm/compact_memory"), "1"), 1.0)
        agitators.start("split", lambda: split_huge_pages(log), 0.2)
        for n, backings in enumerate(BACKINGS):
            agitators.start("guests", partial(herd.one, backings, random.Random(n)), 0.1)
        agitators.start("guests paged out", lambda: herd.page_out(paging), 0.5)
        agitators.start("guests split", herd.split, 1.0)
        while not herd.one_is_up.wait(1):
            agitators.check()
        hits = Shooting(log, herd, sources, agitators.check).run(count, seconds)
        agitators.check()
        # The guests have gone when the threads have ended.
        agitators.end()
        agitators.check()
        claims = log.all() | herd.claims()
        forks_failed = log.forks_failed
        # Before ksm() ends, which sets it to zero.
        merged = int(Path("/sys/kernel/mm/ksm/full_scans").read_text("ascii"))
    verdict = judge(hits, claims)
    print(
        f"{len(claims)} claims, {forks_failed} forks failed, KSM went round {merged} times, "
        f"{dict(agitators.rounds)}; {verdict.names} names, {verdict.held} pages held all the time, of which "
        f"{verdict.held_unsure} with somebody unknown; {verdict.guests} pages of guests, "
        f"{verdict.placed} guest-physical places; {len(verdict.unproven)} names unproven"
    )
    unproven = len(verdict.unproven)
    for text in verdict.unproven[:10]:
        print(f"unproven: {text[:1000]}")
    assert not verdict.wrong, f"{len(verdict.wrong)} wrongly named, first: {verdict.wrong[0]}"
    assert not verdict.silent, f"{len(verdict.silent)} owners missed in silence, first: {verdict.silent[0]}"
    # The test did what it is for.
    assert len(hits) >= least, (
        f"{len(hits)} of {least} errors in {seconds:.0f} s: set HWERR_RACES_SECONDS to more"
    )
    assert forks_failed
    assert verdict.held >= len(hits) / 10
    # A child whose fork() has not ended is unknown: on a slow machine that is often so.
    assert verdict.held_unsure <= verdict.held / 2
    assert verdict.guests >= len(hits) / 50
    assert verdict.placed >= verdict.guests
    assert unproven <= 1 + verdict.names / 200
    moved = ("cpu", "sources", "readers", "compaction", "split", "guests", "guests paged out", "guests split")
    assert all(agitators.rounds[name] for name in moved), agitators.rounds


@pytest.mark.amd
@pytest.mark.timeout(10000)
def test_owners_while_everything_moves() -> None:
    asked = int(os.environ.get("HWERR_RACES", "0"))
    # Who asks for a number wants all of them.
    races(asked or 1000, float(os.environ.get("HWERR_RACES_SECONDS", "40")), asked or LEAST)


# -- guests --------------------------------------------------------------------


def emulators() -> list[int]:
    """Processes that are QEMU at this moment, in whatever state."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if path.read_text("utf-8").startswith("qemu-system"):
                found.append(int(path.parent.name))
    return found


def own_page(pid: int, rng: random.Random) -> tuple[int, int] | None:
    """(address, frame) of a page that only this process can have."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text("utf-8").splitlines()
    except OSError:
        return None
    areas = []
    for line in lines:
        words = line.split()
        if words[1].startswith("rw") and (words[4] == "0" or "/memfd:" in line):
            start, end = (int(w, 16) for w in words[0].split("-"))
            areas.append((start, end))
    for _ in range(10):
        if not areas:
            return None
        start, end = rng.choice(areas)
        va = rng.randrange(start, end, PAGE)
        if pfn := frame(pid, va):
            return va, pfn
    return None


def guests_come_and_go(rounds: int) -> None:
    load_sim()
    modprobe("mce-inject")
    bases: dict[int, int] = {}
    rng = random.Random(7)
    numbers = iter(range(rounds))

    with Agitators() as agitators, ExitStack() as stack:
        injector = Injector()
        stack.enter_context(injector.device)
        done = threading.Event()

        def one() -> None:
            number = next(numbers, None)
            if number is None:
                done.set()
                return
            backing = ("anon", "memfd", "thp", "memfd-private")[number % 4]
            with Guest.start(GuestConfig(name=f"race{number}", mem=16 << 20, backing=backing)) as guest:
                bases[guest.pid] = guest.gpa2hva(0x10000) - 0x10000
                # Some hits on it while it runs.
                agitators.stop.wait(1.0)

        agitators.start("guests", one, 0.01)
        judged = named = placed = 0
        while not done.is_set():
            agitators.check()
            pids = emulators()
            page = own_page(pid := rng.choice(pids), rng) if pids else None
            if page is None:
                # Between two guests there is none: nothing to wait for but the next.
                done.wait(0.01)
                continue
            va, pfn = page
            got = injector.hit(pfn, rng.choice((Source.MCE, Source.EDAC)))
            assert got is not None
            event = got[1]
            if frame(pid, va) != pfn:
                continue
            judged += 1
            owners = {(t.pid, t.va) for t in event.tasks} | {(g.pid, g.hva) for g in event.guests}
            assert owners <= {(pid, va)}, f"{owners} named for {pid} at {va:#x}: {event}"
            assert owners or event.flags & UNSURE, f"{pid} at {va:#x} is missed in silence: {event}"
            named += bool(owners)
            for g in event.guests:
                # The first 640 KiB of a PC are the beginning of its memory.
                if g.gpa is not None and g.gpa < 0xA0000 and g.pid in bases:
                    assert g.hva == bases[g.pid] + g.gpa
                    placed += 1
        agitators.check()
    print(f"{rounds} guests, {judged} errors judged, {named} named, {placed} guest-physical places compared")
    assert len(bases) == rounds
    assert judged >= 5 * rounds
    assert named >= judged / 2


@pytest.mark.amd
def test_guests_that_come_and_go() -> None:
    guests_come_and_go(2)


@pytest.mark.amd
def test_many_guests_that_come_and_go() -> None:
    guests_come_and_go(40)
