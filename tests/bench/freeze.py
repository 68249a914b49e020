# SPDX-License-Identifier: MIT
"""From an error to FROZEN, in round trips of QMP's `stop`. Run it in a VM:

tests/vm/run --kernel 6.12 --cpu amd --sim -- .venv/bin/python tests/bench/freeze.py [N]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vm"))

from guarded import Daemon, guest_config
from testbed import inject, pagemap
from testbed.guest import Guest

import hwerr_notify


def stop_round_trip(guest: Guest) -> float:
    """Seconds, median of some."""
    assert guest.qmp is not None
    times = []
    for _ in range(10):
        began = time.monotonic()
        guest.qmp.execute("stop")
        times.append(time.monotonic() - began)
        guest.qmp.execute("cont")
    return statistics.median(times)


def once(number: int) -> dict[str, float]:
    """One guest, one error; seconds."""
    home = Path(tempfile.mkdtemp(dir="/run"))
    disk = home / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "16M"], check=True)
    extra = (
        "-blockdev", f"driver=qcow2,node-name=d0,file.driver=file,file.filename={disk}",
        "-device", "virtio-blk-pci,drive=d0", "-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0",
    )  # fmt: skip
    with (
        Guest.start(guest_config(f"g{number}", home, *extra)) as guest,
        Daemon(home, policy="[dump]\nauto = false") as daemon,
        daemon.follow() as events,
        hwerr_notify.open(pid=guest.pid) as device,
    ):
        trip = stop_round_trip(guest)
        inject.hwpoison(pagemap.pfn_of(guest.pid, guest.gpa2hva(0x200000)))
        told = events.next("GUEST_FROZEN", "INCIDENT_FAILED")
        if told["event"] != "GUEST_FROZEN":
            raise SystemExit(daemon.said())
        event = device.read(30)[0]
        (incident,) = daemon.incidents()
        steps = {n: (s["ended_ns"] - s["began_ns"]) / 1e9 for n, s in incident["steps"].items()}
        stopped = [s.mono_ns for s in event.stops]
        frozen = (told["frozen_mono_ns"] - event.time_mono_ns) / 1e9
        found = {"stop_round_trip": trip, "frozen": frozen, **steps}
        if stopped:
            found["event_to_stopped"] = (stopped[0] - event.time_mono_ns) / 1e9
        return found


def main() -> None:
    runs = [once(n) for n in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5)]
    for run in runs:
        print(json.dumps({k: round(v * 1000, 2) for k, v in run.items()}), "ms")
    ratios = [run["frozen"] / run["stop_round_trip"] for run in runs]
    print(f"error to FROZEN: median {statistics.median(ratios):.1f} round trips of stop")


if __name__ == "__main__":
    main()
