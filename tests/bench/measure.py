# SPDX-License-Identifier: MIT
"""Runs in the VM: measures, prints one JSON object (see scripts/bench)."""

from __future__ import annotations

import json
import os
import random
import select
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vm"))

import hwerr_notify
from testbed import inject
from testbed.guest import Guest, GuestConfig
from testbed.kernel import DEBUGFS, load_sim, put
from testbed.pagemap import PAGE_SIZE
from testbed.records import MceRecord

TRACE = Path("/sys/kernel/tracing")
SOURCES = Path("/sys/module/hwerr/parameters/sources")
SIM = DEBUGFS / "hwerr_sim"


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def quantiles(values: list[float]) -> tuple[float, float]:
    """(median, 99th percentile)."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]


def latency(binary: str) -> dict[str, object]:
    say("publish to reader, against eventfd")
    runs = [json.loads(subprocess.check_output([binary, "2000"])) for _ in range(3)]
    return {k: [statistics.median(r[k][i] for r in runs) for i in (0, 1)] for k in ("eventfd", "hwerr")}


def publish_cost(n: int = 20000, rounds: int = 7) -> dict[str, float]:
    """ns an mc_event costs its caller: nobody listens, the trace ring does, hwerr does."""
    say("publish, against the trace ring buffer")
    load_sim()
    enable = TRACE / "events/ras/mc_event/enable"
    took: dict[str, list[float]] = {"nobody": [], "trace": [], "hwerr": []}
    was = SOURCES.read_text("ascii").strip().split(",")
    for _ in range(rounds):
        for who, samples in took.items():
            put(SOURCES, "+edac" if who == "hwerr" else "-edac")
            put(enable, "1" if who == "trace" else "0")
            put(SIM / "bench", f"n={n}")
            samples.append(int((SIM / "bench_ns").read_text("ascii")) / n)
    put(enable, "0")
    put(SOURCES, "+edac" if "edac" in was else "-edac")
    return {who: statistics.median(samples) for who, samples in took.items()}


def scan_pagemap(pid: int, pfn: int) -> float:
    """Seconds to find the address of a page frame by reading the process's pagemap."""
    start = time.perf_counter()
    with open(f"/proc/{pid}/maps", encoding="ascii") as maps:
        ranges = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in maps]
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for first, end in ranges:
            if first >> 63:
                continue
            pagemap.seek(first // PAGE_SIZE * 8)
            left = (end - first) // PAGE_SIZE
            while left:
                raw = pagemap.read(min(left, 1 << 16) * 8)
                if not raw:
                    break
                # Compare in C: the bytes of a present entry with this frame number.
                words = memoryview(raw).cast("Q")
                for word in words:
                    if word & ((1 << 55) - 1) == pfn:
                        return time.perf_counter() - start
                left -= len(words)
    return time.perf_counter() - start


def owners(sizes: list[int], n: int = 40) -> list[dict[str, float]]:
    """Owner resolution for guests of each size, MiB."""
    rows = []
    for mib in sizes:
        say(f"owners, guest of {mib} MiB")
        config = GuestConfig(name=f"size{mib}", mem=mib << 20, backing="thp")
        with Guest.start(config) as guest, hwerr_notify.open(sources=[hwerr_notify.Source.MCE]) as device:
            start, length = max(guest.ram_gpas(), key=lambda r: r[1])
            took, scans = [], []
            for i in range(n):
                gpa = start + random.randrange(length // PAGE_SIZE) * PAGE_SIZE
                hpa = guest.gpa2hpa(gpa)
                inject.mce(MceRecord(status=0xBC00_0000_0008_0813, addr=hpa, misc=0x8C, bank=4))
                (event,) = device.read(timeout=30)
                assert [(g.pid, g.gpa) for g in event.guests] == [(guest.pid, gpa)]
                took.append(event.memory.resolve_ns)
                if i < 3:
                    scans.append(scan_pagemap(guest.pid, hpa // PAGE_SIZE))
            rows.append({"mib": mib, "resolve_ns": statistics.median(took), "scan_ns": max(scans) * 1e9})
    return rows


def storm(readers: int, n: int = 100_000) -> dict[str, float]:
    """n events, one in 100 uncorrected, with so many readers; CPU seconds by reader."""
    say(f"storm of {n} with {readers} readers")
    totals: list[tuple[int, int, float]] = []
    children = []
    for _ in range(readers):
        r, w = os.pipe()
        sr, sw = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(sw)
            with hwerr_notify.open(sources=[hwerr_notify.Source.USER]) as device:
                os.write(w, b"r")
                read = lost = 0
                stop = False
                while True:
                    for event in device.read(timeout=0):
                        read += 1
                        lost += event.lost
                    if stop:
                        break
                    stop = sr in select.select([sr, device.fileno()], [], [])[0] and not select.select([device.fileno()], [], [], 0)[0]
                lost += device.stats().reader_pending
                times = os.times()
                os.write(w, json.dumps([read, lost, times.user + times.system]).encode())
            os._exit(0)
        assert os.read(r, 1) == b"r"
        children.append((pid, r, sw))
    with hwerr_notify.open() as device:
        batch = []
        for i in range(n):
            batch.append(
                hwerr_notify.build(
                    severity=hwerr_notify.Severity.RECOVERABLE if i % 100 == 0 else hwerr_notify.Severity.CORRECTED,
                    source=hwerr_notify.Source.USER,
                    text=str(i),
                )
            )
            if len(batch) == 50:
                device.publish(b"".join(batch))
                batch.clear()
    for pid, r, sw in children:
        os.close(sw)
        read, lost, cpu = json.loads(os.read(r, 4096))
        os.waitpid(pid, 0)
        totals.append((read, lost, cpu))
    exact = all(read + lost == n for read, lost, _ in totals)
    return {"readers": readers, "exact": exact, "cpu_per_record_ns": statistics.median(c * 1e9 / max(r, 1) for r, _, c in totals)}


def parse() -> dict[str, float]:
    """Records a second: the package's parser, and struct.unpack of the head alone."""
    say("parsing in Python")
    out = subprocess.check_output([sys.executable, str(Path(__file__).parent / "parse.py"), "--json"])
    return dict(json.loads(out))


def idle(seconds: float = 5.0) -> dict[str, int]:
    """Timers and work items of the module while nothing happens."""
    say("idle")
    put(TRACE / "trace", "")
    events = ("timer/timer_start", "timer/hrtimer_start", "workqueue/workqueue_queue_work")
    for event in events:
        put(TRACE / "events" / event / "enable", "1")
    with hwerr_notify.open() as device:
        # The only wait in this file for time to pass: nothing is what is measured.
        before = device.stats().records
        select.select([device.fileno()], [], [], seconds)
        after = device.stats().records
    for event in events:
        put(TRACE / "events" / event / "enable", "0")
    lines = [x for x in (TRACE / "trace").read_text("utf-8").splitlines() if not x.startswith("#")]
    return {"seen": len(lines), "hwerr": sum("hwerr" in x for x in lines), "records": after - before}


def main() -> int:
    sizes = [int(x) for x in os.environ.get("HWERR_BENCH_MIB", "256 1024 4096").split()]
    result = {
        "kernel": os.uname().release,
        "latency": latency(sys.argv[1]),
        "publish": publish_cost(),
        "owners": owners(sizes),
        "storm": [storm(n) for n in (1, 4, 16)],
        "parse": parse(),
        "idle": idle(),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
