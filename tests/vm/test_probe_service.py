# SPDX-License-Identifier: MIT
"""hwerr-probe as a service: killed in a storm, without KVM, without permission."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from probed import (
    BAD_SECTOR,
    LIMIT,
    Service,
    bad_disk,
    bad_read,
    check_guest,
    fails,
    swap_module,
    without_btf,
)
from testbed.kernel import modprobe, put
from testbed.wait import until, wait_event

import hwerr_notify as h
from hwerr_notify import probe
from hwerr_notify.bpf import PIN_DIR, Program

S = h.Source
CONFIGFS = Path("/sys/kernel/config")


@pytest.fixture(autouse=True)
def _no_probe() -> Iterator[None]:
    probe.unload()
    yield
    probe.unload()


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    with bad_disk() as path:
        yield path


def test_storm_and_a_service_that_is_killed(disk: Path) -> None:
    """Nothing twice, nothing lost untold, whenever the service is killed."""
    rounds, burst = 4, 700
    records: list[h.Event] = []
    lost = 0

    def take(events: list[h.Event]) -> int:
        nonlocal lost
        mine = [e for e in events if e.source == S.BLOCK]
        records.extend(e for e in mine if e.block)
        lost += sum(e.raw_severity for e in mine if not e.block)
        return len(mine)

    with h.open() as device:
        service = Service()
        for _ in range(rounds):
            storm = threading.Thread(target=bad_read, args=(disk, burst))
            storm.start()
            # Killed as soon as it has published something of this storm.
            deadline = time.monotonic() + LIMIT
            while not take(device.read(1.0)):
                assert time.monotonic() < deadline
            service.stop(signal.SIGKILL)
            storm.join()
            service = Service()
        (block,) = (s for s in probe.status() if s.name == "block")
        assert block.emitted + block.dropped == rounds * burst
        assert block.dropped > 0
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline and (len(records) < block.emitted or lost < block.dropped):
            take(device.read(1.0))
        assert device.stats().reader_lost == 0
        assert service.stop()[0] == 0
        take(device.drain())
    assert len(records) == block.emitted
    assert len({(e.time_mono_ns, e.cpu) for e in records}) == block.emitted
    assert lost == block.dropped


@contextlib.contextmanager
def _timed_disk() -> Iterator[Path]:
    """A disk that cannot read its first sectors, and says so in a timer interrupt of the CPU that asked."""
    modprobe("null_blk", "nr_devices=0")
    home = CONFIGFS / "nullb/timed"
    if not home.parent.exists():
        subprocess.run(["mount", "-t", "configfs", "none", CONFIGFS], check=True)
    home.mkdir()
    try:
        # NULL_IRQ_TIMER
        for name, value in (("size", "16"), ("irqmode", "2"), ("completion_nsec", "5000"),
                            ("badblocks", "+0-63"), ("power", "1")):  # fmt: skip
            put(home / name, value)
        # Since 6.0 it has the directory's name (49c3b9266a71).
        index = (home / "index").read_text("ascii").strip()
        path = Path("/dev", home.name if Path("/sys/block", home.name).exists() else f"nullb{index}")
        until(path.exists, LIMIT)
        yield path
    finally:
        home.rmdir()
        subprocess.run(["rmmod", "null_blk"], check=False)


@pytest.mark.anywhere
def test_requests_that_fail_within_others_are_counted(disk: Path) -> None:
    """In an interrupt of a CPU that is in the probe: the kernel leaves that run out."""
    failed = [0, 0]
    over = threading.Event()

    def read(n: int, path: Path, sector: int) -> None:
        os.sched_setaffinity(0, {0})
        while not over.is_set():
            bad_read(path, 20, sector)
            failed[n] += 20

    def missed() -> int:
        (home,) = PIN_DIR.glob("probe-*")
        with Program.of_link(home / "hwerr_block_error") as program:
            return program.misses()

    events: list[h.Event] = []

    def missed_yet() -> int:
        # There is room in the ring for some seconds' worth.
        events.extend(device.drain())
        return missed()

    with h.open() as device, _timed_disk() as timed:
        service = Service()
        threads = [
            threading.Thread(target=read, args=(0, disk, BAD_SECTOR)),
            threading.Thread(target=read, args=(1, timed, 8)),
        ]
        for thread in threads:
            thread.start()
        try:
            until(missed_yet, LIMIT)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        (block,) = (s for s in probe.status() if s.name == "block")
        assert block.emitted + block.dropped == sum(failed)
        assert missed() <= block.dropped
        assert service.stop()[0] == 0
        events = [e for e in (*events, *device.drain()) if e.source == S.BLOCK]
        assert not sum(e.lost for e in events)
        assert sum(1 for e in events if e.block) == block.emitted
        assert sum(e.raw_severity for e in events if not e.block) == block.dropped


@pytest.mark.anywhere
def test_probes_of_another_build_are_replaced(disk: Path) -> None:
    """What nobody read of theirs is told as lost."""
    Service().stop(signal.SIGKILL)
    (home,) = PIN_DIR.glob("probe-*")
    bad_read(disk, 3)
    home.rename(PIN_DIR / "probe-000000000000")
    with h.open() as device:
        service = Service()
        assert list(PIN_DIR.glob("probe-*")) == [home]
        (block,) = (s for s in probe.status() if s.name == "block")
        assert (block.attached, block.emitted, block.dropped) == (True, 0, 3)
        bad_read(disk)
        assert service.stop()[0] == 0
        lost, told = sorted((e for e in device.drain() if e.source == S.BLOCK), key=lambda e: bool(e.block))
        assert (lost.raw_severity, lost.severity) == (3, h.Severity.INFO)
        assert told.block is not None


def _of(device: h.Device, pid: int) -> list[h.Event]:
    return [e for e in device.drain() if e.source == S.KVM and any(g.pid == pid for g in e.guests)]


@pytest.mark.amd
def test_kvm_and_a_death_without_a_loader() -> None:
    """They are published by a call of the module: at once, and once."""
    service = Service()
    service.stop(signal.SIGKILL)
    with h.open() as device, h.open(names=True) as reader:
        for code, reason in (("emulate", 17), ("triple", 8)):
            with fails(code) as guest:
                event = wait_event(reader, lambda e: e.source == S.KVM)
                check_guest(event, guest)
                assert event.vcpu is not None
                assert event.vcpu.exit_reason == reason
                guest.kill()
                wait_event(reader, lambda e: e.source == S.KVM and e.raw_severity == 0x10000 + signal.SIGKILL)
            assert len(_of(device, guest.pid)) == 2
        # Who loads next finds nothing that was not told.
        assert Service().stop()[0] == 0
        assert _of(device, guest.pid) == []
    assert {s.name: s.path for s in probe.status()} == {
        "kvm": "kfunc", "panic": "kfunc", "death": "kfunc", "sigbus": "write", "block": "write",
    }  # fmt: skip
    assert {s.name: s.emitted for s in probe.status()} == {
        "kvm": 2, "panic": 0, "death": 2, "sigbus": 0, "block": 0,
    }  # fmt: skip


@pytest.mark.amd
def test_a_module_without_btf() -> None:
    """The other way: told when a loader runs again, once. With a module that has it, loaded anew."""
    with without_btf():
        assert not Path("/sys/kernel/btf/hwerr").exists()
        service = Service()
        assert {s.path for s in probe.status()} == {"write"}
        service.stop(signal.SIGKILL)
        with h.open() as device:
            with fails("triple") as guest:
                # QEMU says so after KVM_RUN has ended.
                until(lambda: guest.status() != "running", LIMIT)
                assert _of(device, guest.pid) == []
                service = Service()
                check_guest(wait_event(device, lambda e: e.source == S.KVM), guest)
            assert service.stop()[0] == 0
        # The pins hold nothing of this module.
        swap_module(os.environ["HWERR_KO"])
        assert {s.path for s in probe.status()} == {"write"}
        with h.open() as device:
            service = Service()
            assert {s.name for s in probe.status() if s.path == "kfunc"} == {"kvm", "panic", "death"}
            with fails("triple") as guest:
                wait_event(device, lambda e: e.source == S.KVM)
                assert service.stop()[0] == 0
                assert _of(device, guest.pid) == []


@pytest.mark.amd
def test_the_probes_hold_the_module() -> None:
    """As long as they are loaded, whether a loader runs or not."""
    assert Service().stop()[0] == 0
    done = subprocess.run(["rmmod", "hwerr"], capture_output=True, text=True, check=False)
    assert "in use" in done.stderr
    subprocess.run(["hwerr-probe", "unload"], check=True)
    swap_module(os.environ["HWERR_KO"])


# What keeps a VM as long as this machine runs.
HOLDER = str(Path(__file__).parent / "guest/hold-kvm")


def _uses(module: str) -> int:
    return int(Path(f"/sys/module/{module}/refcnt").read_text("ascii"))


@pytest.mark.amd
@pytest.mark.long
def test_a_missing_module_takes_down_its_probes_only() -> None:
    probe.unload()
    subprocess.run(["pkill", "-f", HOLDER], check=True)
    until(lambda: not _uses("kvm_amd"), LIMIT)
    for module in ("kvm_amd", "kvm"):
        subprocess.run(["rmmod", module], check=True)
    try:
        service = Service()
        assert service.said.splitlines()[1] == b"STATUS=attached: sigbus, block"
        with h.open() as device:
            modprobe("kvm_amd")
            until(lambda: all(s.attached for s in probe.status()), LIMIT)
            with fails("triple") as guest:
                check_guest(wait_event(device, lambda e: e.source == S.KVM), guest)
        status, said = service.stop()
        assert status == 0
        assert "without the kvm probe: the kernel module kvm is not loaded" in said
    finally:
        probe.unload()
        modprobe("kvm_amd")
        subprocess.Popen([HOLDER], stdin=subprocess.DEVNULL, start_new_session=True)


@pytest.mark.anywhere
def test_what_stands_in_the_way_is_said() -> None:
    unprivileged = (
        "import os, sys; os.setuid(65534); sys.argv = {}; "
        "from hwerr_notify.cli import hwerr_probe; sys.exit(hwerr_probe())"
    )
    for verb, status in (("status", 5), ("run", 5), ("unload", 5)):
        code = unprivileged.format(["hwerr-probe", verb])
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
    done = subprocess.run(
        ["hwerr-probe", "run", "--device", "/dev/none"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert not list(PIN_DIR.glob("probe-*"))
