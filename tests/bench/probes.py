#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What the BPF probes cost a guest and a disk; in a VM of the test bed (--cpu amd).

    tests/vm/run --kernel 6.12 --cpu amd -- .venv/bin/python tests/bench/probes.py [PAIRS]

The kernel's own account (kernel.bpf_stats_enabled) says what share of a vCPU thread's time
is spent in the probe of the guest that leaves most often. Then come pairs of runs: each is
one with the probes attached and one without, in changing order. Of a run, operations per
second of CPU time of who does them are counted, so that what else the machine does falls
out of it; with over without is the ratio of a pair.

    exit-user     a guest that does nothing but leave for QEMU, the dearest case
    exit-kernel   one that does nothing but leave for KVM (cpuid)
    block         reads of 512 bytes, past the page cache

The last line on stdout is one JSON object: `kernel`, `share`, and under `ratios` those of each.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vm"))

from testbed.guest import Guest, GuestConfig
from testbed.kernel import modprobe, put

from hwerr_notify import probe

RUN_S = 2.0


def guest_rate(guest: Guest) -> float:
    """Rounds of the guest per second of its vCPU thread."""
    stat = guest.vcpus()[0] / "schedstat"

    def now() -> tuple[int, int]:
        return guest.counter(), int(stat.read_text().split()[0])

    rounds, spent = now()
    time.sleep(RUN_S)
    more, then = now()
    return ((more - rounds) % (1 << 32)) / (then - spent) * 1e9


def share(guest: Guest, name: str) -> float:
    """CPU time in a BPF program over that of the guest's vCPU thread."""
    stat = guest.vcpus()[0] / "schedstat"

    def now() -> tuple[int, int]:
        out = subprocess.run(["bpftool", "-j", "prog", "show", "name", name], capture_output=True, check=True)
        program = json.loads(out.stdout)
        return program.get("run_time_ns", 0), int(stat.read_text().split()[0])

    with paused(guest):
        put(Path("/proc/sys/kernel/bpf_stats_enabled"), "1")
        probes = probe.Probes()
    with probes:
        spent, total = now()
        time.sleep(RUN_S)
        more, then = now()
    with paused(guest):
        probe.unload()
        put(Path("/proc/sys/kernel/bpf_stats_enabled"), "0")
    return (more - spent) / (then - total)


def rate(operation: Callable[[], object]) -> float:
    """How often a second of this thread's time."""
    end, start, rounds = time.monotonic() + RUN_S, time.thread_time_ns(), 0
    while time.monotonic() < end:
        for _ in range(50):
            operation()
        rounds += 50
    return rounds / (time.thread_time_ns() - start) * 1e9


def disk_rate(disk: Path) -> float:
    """Reads per second of this thread."""
    buffer = memoryview(mmap.mmap(-1, 4096))[:512]
    fd = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    try:
        return rate(lambda: os.preadv(fd, [buffer], 0))
    finally:
        os.close(fd)


@contextlib.contextmanager
def paused(guest: Guest) -> Iterator[None]:
    """An emulated CPU may run a breakpoint that is gone already where the kernel patches what it executes."""
    assert guest.qmp is not None
    guest.qmp.execute("stop")
    yield
    guest.qmp.execute("cont")


def ratios(rate: Callable[[], float], pairs: int, guest: Guest | None = None) -> list[float]:
    """Rate with the probes over rate without, for each pair."""
    found = []
    rate()
    for n in range(pairs):
        rates = {}
        for attached in (n % 2 == 0, n % 2 != 0):
            with paused(guest) if guest else contextlib.nullcontext():
                probe.unload()
                if attached:
                    with probe.Probes() as probes:
                        missing = [s.name for s in probes.status() if not s.attached]
                    assert not missing, missing
            rates[attached] = rate()
        found.append(rates[True] / rates[False])
        print(f"  pair {n + 1}/{pairs}: {found[-1]:.4f}", file=sys.stderr, flush=True)
    probe.unload()
    return found


def main() -> int:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    found = {}
    shares: list[float] = []
    for code in ("exit-user", "exit-kernel"):
        with Guest.start(GuestConfig(name=code, mem=16 << 20, code=code)) as guest:
            if code == "exit-user":
                shares = [share(guest, "hwerr_kvm_run") for _ in range(5)]
            found[code] = ratios(lambda guest=guest: guest_rate(guest), pairs, guest)  # type: ignore[misc]
    modprobe("null_blk", "nr_devices=1", "queue_mode=2", "irqmode=0", "gb=1")
    found["block"] = ratios(lambda: disk_rate(Path("/dev/nullb0")), pairs)
    print(json.dumps({"kernel": platform.release(), "share": shares, "ratios": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
