# SPDX-License-Identifier: MIT
"""What a storm of errors may cost: no memory, no console, no real-time task its time, half a CPU."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import pytest
from testbed.kernel import DEBUGFS, kernel_log, load_sim, put
from testbed.victim import Victim

import hwerr_notify
from hwerr_notify import Severity

SOURCES = Path("/sys/module/hwerr/parameters/sources")
BENCH = DEBUGFS / "hwerr_sim/bench"
TICK = os.sysconf("SC_CLK_TCK")
ERRORS = 200_000
# What one record's worth of memory, leaked at each error, would be.
LEAST_LEAK_KIB = ERRORS * 72 // 1024


def meminfo(name: str) -> int:
    """A line of /proc/meminfo, KiB."""
    found = re.search(rf"^{name}:\s+(\d+)", Path("/proc/meminfo").read_text("ascii"), re.MULTILINE)
    assert found
    return int(found[1])


def fields(pid: int) -> list[str]:
    """/proc/PID/stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()


def workers() -> dict[int, float]:
    """CPU seconds that each kernel worker ever used."""
    used = {}
    for path in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if path.read_text("utf-8").startswith("kworker"):
                pid = int(path.parent.name)
                used[pid] = int(fields(pid)[12]) / TICK
    return used


def test_memory_is_fixed_and_the_console_silent() -> None:
    """Errors that nobody reads, of both severities, and a reader that is far behind."""
    load_sim()
    with hwerr_notify.open() as late, kernel_log() as log:
        put(BENCH, "n=2000 ce=1 ue=2")
        before = {name: meminfo(name) for name in ("Slab", "VmallocUsed", "Percpu")}
        put(BENCH, f"n={ERRORS} ce=1 ue=2")
        after = {name: meminfo(name) for name in before}
        stats = late.stats()
        said = list(log.lines(0.1))
    assert stats.errors >= ERRORS
    assert stats.evicted > ERRORS / 2, "the storm did not even fill the rings"
    for name, kib in before.items():
        assert after[name] - kib < LEAST_LEAK_KIB / 4, f"{name} grew from {kib} to {after[name]} KiB"
    assert not [line for line in said if "hwerr" in line]


@contextmanager
def storm(line: str) -> Iterator[None]:
    """Errors without a pause until the block ends."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            put(BENCH, line)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_the_work_item_leaves_half_a_cpu() -> None:
    """Errors from interrupts, faster than their owners can be looked up."""
    load_sim()
    with Victim() as victim, hwerr_notify.open() as device, kernel_log() as log:
        before, lost = workers(), device.stats().dropped
        begun = os.times().elapsed
        with storm(f"n=2000 addr={victim.memory.pfn * 4096:#x} irqs_off=1"):
            # Long enough for ticks to count.
            while os.times().elapsed - begun < 8:
                device.read(1)
            took = os.times().elapsed - begun
            after = workers()
        dropped = device.stats().dropped - lost
        said = list(log.lines(0.1))
    used = max(after[pid] - before.get(pid, 0.0) for pid in after)
    total = sum(after[pid] - before.get(pid, 0.0) for pid in after)
    print(f"{total:.2f} s of CPU in workers, {used:.2f} in one, in {took:.2f} s; {dropped} errors dropped")
    assert dropped, "the work item kept up: that was no storm"
    assert total > 0.02 * took, "the workers did nothing: the lookups were made elsewhere"
    assert total < 0.75 * took
    assert not [line for line in said if "hwerr" in line]


# A threaded interrupt handler's, that of AER for one.
HANDLER = os.sched_param(50)
PERIOD = 0.05
# What a burst of errors takes of it where they are only written to the trace buffer.
SHARE = 0.1
# Times that, with the module: RESERVE of a second is what real-time tasks may have at most.
DEARER = 4
RESERVE = 0.95


def as_a_handler(line: str, bursts: int) -> tuple[float, float]:
    """(CPU seconds, share of the time) of a real-time task that raises errors, one burst in each period."""
    took: list[tuple[float, float]] = []

    def run() -> None:
        os.sched_setscheduler(0, os.SCHED_FIFO, HANDLER)
        pace = threading.Event()
        begun, cpu = time.monotonic(), time.thread_time()
        for n in range(1, bursts + 1):
            put(BENCH, line)
            pace.wait(max(0.0, begun + n * PERIOD - time.monotonic()))
        used = time.thread_time() - cpu
        took.append((used, used / (time.monotonic() - begun)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return took[0]


@contextmanager
def into_the_trace_buffer() -> Iterator[None]:
    """The same errors, written there; the module does not see them, as if it were not loaded."""
    instance = Path("/sys/kernel/tracing/instances/bounds")
    instance.mkdir(exist_ok=True)
    put(SOURCES, "-edac")
    put(instance / "events/ras/mc_event/enable", "1")
    try:
        yield
    finally:
        put(instance / "events/ras/mc_event/enable", "0")
        put(SOURCES, "+edac")
        instance.rmdir()


@pytest.mark.parametrize("what", ["irqs_off=1", "irqs_off=1 ce=1"])
def test_what_the_one_who_raises_pays(what: str) -> None:
    """A handler of real-time priority, interrupts off: some times what the trace buffer costs it."""
    load_sim()
    turns, bursts = 5, 10
    with Victim() as victim, hwerr_notify.open() as device, kernel_log() as log:
        at = f"addr={victim.memory.pfn * 4096:#x} {what}"
        with into_the_trace_buffer():
            # The least: whatever else the machine does is not the errors'.
            least = min(as_a_handler(f"n=500 {at}", 1)[0] for _ in range(turns)) / 500
        n = max(10, round(SHARE * PERIOD / least))
        before = device.stats()
        theirs, ours = [], []
        for _ in range(turns):
            with into_the_trace_buffer():
                theirs.append(as_a_handler(f"n={n} {at}", bursts))
            ours.append(as_a_handler(f"n={n} {at}", bursts))
        after = device.stats()
        said = list(log.lines(0.1))
    ratios = [a / b for (a, _), (b, _) in zip(ours, theirs, strict=True)]
    shares = [[share for _, share in turn] for turn in (theirs, ours)]
    print(
        f"{n} errors in {PERIOD} s; CPU, of the trace buffer's: {', '.join(f'{r:.2f}' for r in ratios)}; "
        f"share of a CPU {median(shares[0]):.2f} and {median(shares[1]):.2f}"
    )
    raised = after.errors - before.errors + after.dropped - before.dropped
    assert turns * bursts * n <= raised
    assert median(shares[0]) < RESERVE / 2, "the errors alone are a storm: the yardstick is none"
    assert median(ratios) < DEARER
    assert median(shares[1]) < RESERVE
    assert not [line for line in said if "RT throttling" in line]


def test_uncorrected_errors_have_drafts_of_their_own() -> None:
    """A storm of corrected ones from interrupts costs none of them."""
    load_sim()
    with Victim() as victim, hwerr_notify.open(severities=[Severity.RECOVERABLE]) as device:
        addr = victim.memory.pfn * 4096
        before = device.stats()
        got = 0
        with storm(f"n=2000 ce=1 addr={addr:#x} irqs_off=1"):
            for _ in range(20):
                put(BENCH, f"n=1 addr={addr:#x} irqs_off=1")
                got += len(device.read(30))
        after = device.stats()
    corrected = after.by_severity[Severity.CORRECTED] - before.by_severity[Severity.CORRECTED]
    assert corrected > 2000
    assert after.dropped > before.dropped, "the work item kept up: that was no storm"
    assert (got, after.reader_lost) == (20, 0)
