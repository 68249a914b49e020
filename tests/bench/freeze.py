# SPDX-License-Identifier: MIT
"""What a freeze takes, in round trips of QMP's `stop`, and what 200 guarded VMs cost; one JSON line.

scripts/bench --freeze calls it, in a VM: freeze.py [--runs N] [--stops N] [--idle VMS]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vm"))

from guarded import Daemon, counter, guest_config
from probes import rate
from testbed import inject, pagemap
from testbed.errors import TestbedError
from testbed.guest import COUNTER_GPA, Guest, GuestConfig
from testbed.qmp import Qmp
from testbed.records import MCI_ADDRV, MCI_EN, MCI_UC, MCI_VAL, MceRecord
from testbed.wait import until

import hwerr_notify
from hwerr_notify import Severity, bpf

# A `count` guest does two in each turn of its loop.
_INSTRUCTIONS = 2
_HIT_GPA = 0x200000


def say(text: str) -> None:
    sys.stderr.write(f"bench: {text}\n")
    sys.stderr.flush()


def home() -> Path:
    return Path(tempfile.mkdtemp(dir="/run"))


def stop_round_trips(guest: Guest, times: int = 20) -> list[float]:
    """Nanoseconds."""
    assert guest.qmp is not None
    found = []
    for _ in range(times):
        began = time.monotonic_ns()
        guest.qmp.execute("stop")
        found.append(float(time.monotonic_ns() - began))
        guest.qmp.execute("cont")
    return found


def freeze(number: int) -> dict[str, Any]:
    """One guest with a disk and a network, one error in its memory. Nanoseconds."""
    where = home()
    disk = where / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "16M"], check=True)
    extra = (
        "-blockdev", f"driver=qcow2,node-name=d0,file.driver=file,file.filename={disk}",
        "-device", "virtio-blk-pci,drive=d0", "-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0",
    )  # fmt: skip
    with (
        Guest.start(guest_config(f"g{number}", where, *extra)) as guest,
        Daemon(where, policy="[dump]\nauto = false") as daemon,
        daemon.follow() as events,
        hwerr_notify.open(pid=guest.pid) as device,
    ):
        trips = stop_round_trips(guest)
        pfn = pagemap.pfn_of(guest.pid, guest.gpa2hva(_HIT_GPA))
        inject.hwpoison(pfn)
        told = events.next("GUEST_FROZEN", "INCIDENT_FAILED")
        here = time.monotonic_ns()
        if told["event"] != "GUEST_FROZEN":
            raise SystemExit(daemon.said())
        event = device.read(30)[0]
        (incident,) = daemon.incidents()
        return {
            "stop": median(trips),
            "frozen": told["frozen_mono_ns"] - event.time_mono_ns,
            "told": here - event.time_mono_ns,
            "steps": {name: s["ended_ns"] - s["began_ns"] for name, s in incident["steps"].items()},
        }


def stops(times: int) -> dict[str, Any]:
    """One guest of two vCPUs, stopped by an error again and again. Nanoseconds, and instructions."""
    taken, passed = [], []
    status = MCI_VAL | MCI_EN | MCI_ADDRV | MCI_UC | 8 << 16 | 0x0813
    with (
        Guest.start(GuestConfig(name="stops", smp=2, code="count")) as guest,
        hwerr_notify.open(pid=guest.pid) as device,
    ):
        assert guest.qmp is not None
        hva, hpa = guest.gpa2hva(COUNTER_GPA), guest.gpa2hpa(_HIT_GPA)
        trips = stop_round_trips(guest)
        pidfd = os.pidfd_open(guest.pid)
        device.guard(pidfd, Severity.RECOVERABLE)
        os.close(pidfd)
        for _ in range(times):
            # How fast it runs now.
            first, began = counter(guest, hva), time.monotonic_ns()
            select.select([], [], [], 0.02)
            turns, over = counter(guest, hva) - first, time.monotonic_ns() - began
            inject.mce_sim(MceRecord(status=status, bank=4, addr=hpa))
            event = next(e for e in device.read(30) if e.stops)
            taken.append(event.stops[0].mono_ns - event.time_mono_ns)
            passed.append(taken[-1] * turns * _INSTRUCTIONS / over)
            while guest.qmp.execute("query-status")["status"] != "internal-error":
                guest.qmp.wait_event("STOP")
            guest.qmp.events.clear()
            guest.qmp.execute("system_reset")
            guest.qmp.execute("cont")
    return {"stop": median(trips), "taken": taken, "passed": passed}


def _counts(pid: int) -> dict[str, int]:
    """Times that its threads went to sleep, and KiB of memory: resident, and its share of it."""
    found = {"sleeps": 0}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text("ascii", "replace").splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                found["sleeps"] += int(line.split()[1])
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
        if line.startswith(("Rss:", "Pss:")):
            found[line[:3].lower()] = int(line.split()[1])
    return found


def _await_monitor(path: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            Qmp.connect(path).close()
            return
        except TestbedError:
            # Not made yet, or not listened on.
            if time.monotonic() > deadline:
                raise
        select.select([], [], [], 0.02)


def _await_quiet(pid: int, watchdog: float) -> None:
    """Until what it had to do at start is done: an interval of its watchdog with little but signs of life;
    a minute at most: one that never comes to rest is measured as it is."""
    deadline = time.monotonic() + 60
    sleeps = _counts(pid)["sleeps"]
    while time.monotonic() < deadline:
        select.select([], [], [], watchdog)
        before, sleeps = sleeps, _counts(pid)["sleeps"]
        if sleeps - before < 10:
            return


def idle(guests: int, seconds: float = 20.0, watchdog: float = 4.0) -> dict[str, Any]:
    """A daemon with as many guests, each a QEMU that never runs, armed and with its monitor connected."""
    where = home()
    (where / "qmp").mkdir()
    command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-S", "-m", "2M",
               "-machine", "pc,accel=kvm", "-cpu", "host"]  # fmt: skip
    with ExitStack() as stack:
        empty = Daemon(where)
        stack.enter_context(empty)
        assert empty.process is not None
        before = _counts(empty.process.pid)
        empty.stop()
        for n in range(0, guests, 4):
            paths = [where / "qmp" / f"vm{m}.qmp" for m in range(n, min(n + 4, guests))]
            for path in paths:
                argv = [*command, "-name", path.stem, "-qmp", f"unix:{path},server=on,wait=off"]
                process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
                stack.callback(process.wait)
                stack.callback(process.kill)
            for path in paths:
                _await_monitor(path)
            if n % 40 == 0:
                say(f"{n} of {guests} guests")
        daemon = stack.enter_context(Daemon(where).start(watchdog=watchdog))
        assert daemon.process is not None
        while [v["stopped_by"] for v in daemon.status()["vms"]].count("kernel") < guests:
            select.select([], [], [], 1.0)
        _await_quiet(daemon.process.pid, watchdog)
        first = _counts(daemon.process.pid)
        select.select([], [], [], seconds)
        last = _counts(daemon.process.pid)
    return {
        "guests": guests,
        "seconds": seconds,
        "watchdog": seconds / (watchdog / 2),
        "wakeups": last["sleeps"] - first["sleeps"],
        "rss": last["rss"],
        "pss": last["pss"],
        "rss_without": before["rss"],
    }


def _unseal() -> None:
    """The programs are taken out of what they hook a moment after their pins, by the kernel's own time."""
    for pin in bpf.PIN_DIR.glob("hwerr_seal*"):
        pin.unlink()
    argv = ["bpftool", "prog"]
    until(lambda: b"hwerr_seal" not in subprocess.run(argv, capture_output=True, check=True).stdout, 60)


def sealing(pairs: int) -> dict[str, list[float]]:
    """What the seal of others costs who is not sealed: rates with its programs over rates without."""
    path = home() / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    data = bytes(512)
    operations: dict[str, Callable[[], object]] = {
        "write": lambda: os.pwrite(fd, data, 0),
        "open": lambda: os.close(os.open(path, os.O_RDONLY)),
    }
    found: dict[str, list[float]] = {name: [] for name in operations}
    for n in range(pairs):
        rates: dict[tuple[str, bool], float] = {}
        for sealed in (n % 2 == 0, n % 2 != 0):
            _unseal()
            if sealed:
                bpf.Seal.load().close()
            for name, operation in operations.items():
                rates[name, sealed] = rate(operation)
        for name, values in found.items():
            values.append(rates[name, True] / rates[name, False])
    _unseal()
    os.close(fd)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--stops", type=int, default=200)
    parser.add_argument("--idle", type=int, default=200)
    args = parser.parse_args()
    result: dict[str, Any] = {"kernel": platform.release(), "freezes": []}
    for n in range(args.runs):
        result["freezes"].append(found := freeze(n))
        say(f"freeze {n + 1} of {args.runs}: {found['frozen'] / found['stop']:.1f} round trips of stop")
    say(f"{args.stops} stops")
    result["stops"] = stops(args.stops)
    result["idle"] = idle(args.idle)
    say("what the seal costs others")
    result["sealing"] = sealing(10)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
