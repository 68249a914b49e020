# SPDX-License-Identifier: MIT
"""Runs in the VM: measures, prints one JSON object on its last line (see scripts/bench).

What is compared is measured in turns, in pairs that are close in time, and every
ratio is that of one pair: what else the machine does hits both of it, mostly.
"""

from __future__ import annotations

import json
import os
import random
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vm"))

from testbed import inject
from testbed.guest import Guest, GuestConfig
from testbed.kernel import DEBUGFS, load_sim, put
from testbed.pagemap import PAGE_SIZE
from testbed.records import MceRecord

import hwerr_notify

TRACE = Path("/sys/kernel/tracing")
MC_EVENT = TRACE / "events/ras/mc_event/enable"
SOURCES = Path("/sys/module/hwerr/parameters/sources")
SIM = DEBUGFS / "hwerr_sim"
STORM = 100_000
# One record in so many of a storm is uncorrected. All of them must fit their ring.
STORM_UE = 500


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def latency(binary: Path, pairs: int = 15) -> dict[str, Any]:
    """ns from write() to return of poll()+read(): [p50, p99] of each run, eventfd's and hwerr's."""
    runs = [json.loads(subprocess.check_output([binary, "500"])) for _ in range(pairs)]
    return {who: [run[who] for run in runs] for who in ("eventfd", "hwerr")}


def _raise(n: int, line: str = "") -> float:
    """ns that raising mc_event costs its caller, mean of `n`."""
    put(SIM / "bench", f"n={n} {line}")
    return int((SIM / "bench_ns").read_text("ascii")) / n


def publish(pairs: int = 12, batches: int = 25) -> dict[str, list[float]]:
    """ns an mc_event costs its caller: nobody listens, the trace ring does, hwerr does.

    Batches are far shorter than a tick of the scheduler: the median is one that nothing
    interrupted. Both rings are full, as they are in a storm.
    """
    kinds = {
        "nobody": ("-edac", "0", ""),
        "trace": ("-edac", "1", ""),
        "hwerr": ("+edac", "0", ""),
        "corrected": ("+edac", "0", "ce=1"),
        "repeated": ("+edac", "0", "ce=1 step=0"),
    }
    took: dict[str, list[float]] = {who: [] for who in kinds}
    for _ in range(pairs):
        for who, (source, trace, line) in kinds.items():
            put(SOURCES, source)
            put(MC_EVENT, trace)
            _raise(3000, line)
            took[who].append(statistics.median(_raise(200, line) for _ in range(batches)))
    put(MC_EVENT, "0")
    put(SOURCES, "+edac")
    return took


def owners(scan: Path, sizes: list[int], rounds: int = 60) -> list[dict[str, Any]]:
    """ns of owner resolution for guests of each size (MiB), by turns, all running at once.

    `scan_ns` is what finding the same page in the process's pagemap took, for some.
    """
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        guests = []
        for mib in sizes:
            say(f"  starting a guest of {mib} MiB")
            config = GuestConfig(name=f"size{mib}", mem=mib << 20, backing="thp")
            guest = stack.enter_context(Guest.start(config))
            guests.append((guest, max(guest.ram_gpas(), key=lambda r: r[1])))
            rows.append({"mib": mib, "resolve_ns": [], "scan_ns": []})
        device = stack.enter_context(hwerr_notify.open(sources=[hwerr_notify.Source.MCE]))
        for i in range(rounds):
            for (guest, (start, length)), row in zip(guests, rows, strict=True):
                gpa = start + random.randrange(length // PAGE_SIZE) * PAGE_SIZE
                hpa = guest.gpa2hpa(gpa)
                inject.mce(MceRecord(status=0xBC00_0000_0008_0813, addr=hpa, misc=0x8C, bank=4))
                (event,) = device.read(timeout=30)
                if [(g.pid, g.gpa) for g in event.guests] != [(guest.pid, gpa)] or event.memory is None:
                    raise SystemExit(f"bench: the owner of {hpa:#x} is {guest.pid} {gpa:#x}: {event}")
                row["resolve_ns"].append(event.memory.resolve_ns)
                if i % 4 == 0:
                    took = int(subprocess.check_output([scan, str(guest.pid), str(hpa // PAGE_SIZE)]))
                    row["scan_ns"].append([took, event.memory.resolve_ns])
    return rows


def storms(binary: Path, counts: tuple[int, ...] = (1, 4, 16), rounds: int = 5) -> list[dict[str, Any]]:
    """Storms of mc_event, as fast as the kernel raises them, with so many readers."""
    rows: list[dict[str, Any]] = [
        {"readers": n, "exact": True, "whole": True, "cpu_ns": [], "lost": []} for n in counts
    ]
    uncorrected = -(-STORM // STORM_UE)
    for _ in range(rounds):
        for row in rows:
            line = f"n={STORM} ce=1 ue={STORM_UE}"
            told = json.loads(subprocess.check_output([binary, str(row["readers"]), SIM / "bench", line]))
            for read, lost, worse, _cpu in told:
                row["exact"] &= read + lost == STORM
                row["whole"] &= worse == uncorrected
                if read + lost != STORM or worse != uncorrected:
                    say(f"  NOT exact: {read} read + {lost} lost, {worse} of {uncorrected} uncorrected")
            row["cpu_ns"].append(sum(t[3] for t in told) / sum(t[0] for t in told))
            row["lost"].append(sum(t[1] for t in told) / len(told) / STORM)
    return rows


def parse() -> dict[str, Any]:
    """Records a second: the package's parser, and struct.unpack of the head alone."""
    out = subprocess.check_output([sys.executable, str(Path(__file__).parent / "parse.py"), "--json"])
    return dict(json.loads(out))


def _switches(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text("ascii")
    return sum(int(x.split()[1]) for x in text.splitlines() if "ctxt_switches" in x)


def idle(seconds: float = 10.0) -> dict[str, int]:
    """Timers, work items and wake-ups of the module while nothing happens.

    First that they would be seen: a repeated corrected error has work to do a second later.
    """
    events = ("timer/timer_start", "timer/hrtimer_start", "workqueue/workqueue_queue_work")

    def traced() -> int:
        # The kernel names the module of a function that it prints.
        return (TRACE / "trace").read_text("utf-8").count("[hwerr]")

    blocked, ready = os.pipe()
    for event in events:
        put(TRACE / "events" / event / "enable", "1")
    put(TRACE / "trace", "")
    with hwerr_notify.open(sources=[hwerr_notify.Source.EDAC]) as device:
        for _ in range(3):
            _raise(1, "ce=1")
        while not (got := device.read(timeout=30)) or not any(e.count > 1 for e in got):
            if not got:
                raise SystemExit("bench: repeated errors were not told")
        control = traced()
        pid = os.fork()
        if pid == 0:
            os.write(ready, b"r")
            device.read()
            os._exit(0)
        os.read(blocked, 1)
        while Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] != "S":
            os.sched_yield()
        put(TRACE / "trace", "")
        before, records = _switches(pid), device.stats().records
        # Nothing ends this wait: that nothing happens is what is measured.
        select.select([], [], [], seconds)
        woken, records = _switches(pid) - before, device.stats().records - records
        seen = traced()
        _raise(1)
        pidfd = os.pidfd_open(pid)
        if not select.select([pidfd], [], [], 30)[0]:
            raise SystemExit("bench: the blocked reader does not wake up")
        os.waitpid(pid, 0)
    for event in events:
        put(TRACE / "events" / event / "enable", "0")
    if not control:
        raise SystemExit("bench: the trace shows no work item where there was one")
    return {"seconds": int(seconds), "control": control, "module": seen, "reader": woken, "records": records}


def main() -> int:
    built = Path(sys.argv[1])
    sizes = [int(x) for x in os.environ.get("HWERR_BENCH_MIB", "256 1024 4096").split()]
    steps: dict[str, tuple[str, Callable[[], Any]]] = {
        "latency": ("publish to reader, against eventfd", lambda: latency(built / "latency")),
        "publish": ("publish, against the trace ring buffer", publish),
        "parse": ("parsing in Python, against struct.unpack", parse),
        "idle": ("idle", idle),
        "storm": (f"storms of {STORM}", lambda: storms(built / "storm")),
        "owners": ("owners, against a scan of pagemap", lambda: owners(built / "scan", sizes)),
    }
    load_sim()
    result: dict[str, Any] = {"kernel": os.uname().release}
    only = os.environ.get("HWERR_BENCH_ONLY", " ".join(steps)).split()
    for i, (name, (title, step)) in enumerate(steps.items(), 1):
        if name not in only:
            continue
        say(f"{i}/{len(steps)} {title}")
        start = time.monotonic()
        result[name] = step()
        say(f"{i}/{len(steps)} done, {time.monotonic() - start:.0f} s")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
