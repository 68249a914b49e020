# SPDX-License-Identifier: MIT
"""What the tests of the BPF probes share."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from testbed.guest import Guest, GuestConfig
from testbed.kernel import modprobe
from testbed.wait import until

import hwerr_notify as h
from hwerr_notify import probe
from hwerr_notify.bpf import start_of

LIMIT = 120.0
MEM = 16 << 20
S = h.Source
# QEMU neither resets nor quits after a guest's shutdown.
STAY = ("-action", "reboot=shutdown,shutdown=pause")


class Service:
    """hwerr-probe run, ready. `prefix` is what starts it."""

    def __init__(self, *prefix: str) -> None:
        path = f"/run/hwerr/notify-{os.getpid()}"
        Path(path).unlink(missing_ok=True)
        self.said = b""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(path)
            sock.settimeout(LIMIT)
            self.process = subprocess.Popen(
                [*prefix, "hwerr-probe", "run"],
                env=os.environ | {"NOTIFY_SOCKET": path},
                stderr=subprocess.PIPE,
                text=True,
            )
            try:
                self.said = sock.recv(4096)
            except TimeoutError:
                self.process.kill()
                raise AssertionError(self.process.communicate()[1]) from None
        assert b"READY=1" in self.said

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, said


def remove_module() -> None:
    """Programs let go of it a moment after they are unloaded."""
    until(lambda: subprocess.run(["rmmod", "hwerr"], capture_output=True, check=False).returncode == 0, LIMIT)


def swap_module(ko: Path | str) -> None:
    """Has this build of the module loaded instead."""
    remove_module()
    subprocess.run(["insmod", ko], check=True)


@contextlib.contextmanager
def without_btf() -> Iterator[None]:
    """The module as it is built where the kernel's types are not at hand."""
    ko = os.environ["HWERR_KO"]
    plain = Path("/run/hwerr/plain.ko")
    subprocess.run(["objcopy", "--remove-section", ".BTF", ko, plain], check=True)
    swap_module(plain)
    try:
        yield
    finally:
        probe.unload()
        swap_module(ko)


def fails(code: str, **more: object) -> Guest:
    return Guest.start(GuestConfig(name="bad", mem=MEM, code=code, extra=STAY, **more))  # type: ignore[arg-type]


def check_guest(event: h.Event, guest: Guest) -> None:
    (hit,) = event.guests
    assert (hit.pid, hit.kvm, hit.name, hit.gpa) == (guest.pid, True, "bad", None)
    assert hit.start_ns // 10_000_000 == start_of(guest.pid) // 10_000_000
    assert event.software
    assert event.component == h.Component.GUEST
    assert event.action_required
    form = event.to_json()
    assert form["origin"] == "software"
    assert form["guests"][0]["hva"] is None


BAD_SECTOR = 0x1234  # scsi_debug's medium_error_start


@contextlib.contextmanager
def bad_disk() -> Iterator[Path]:
    """A disk that cannot read BAD_SECTOR."""
    modprobe("sd_mod")
    modprobe("scsi_debug", "dev_size_mb=8", "opts=2", "delay=0", "no_uld=0")
    host = next(p for p in Path("/sys/bus/pseudo/drivers/scsi_debug").glob("adapter*/host*/target*/*:*"))
    until(lambda: any(host.glob("block/*")), LIMIT)
    path = Path("/dev", next(host.glob("block/*")).name)
    try:
        yield path
    finally:
        subprocess.run(["rmmod", "scsi_debug"], check=False)


def bad_read(disk: Path, times: int = 1, sector: int = BAD_SECTOR) -> None:
    """Reads the bad sector, past the page cache."""
    fd = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, 4096)
    try:
        for _ in range(times):
            with contextlib.suppress(OSError):
                os.preadv(fd, [memoryview(buffer)[:512]], sector * 512)
                raise AssertionError("the sector can be read")
    finally:
        os.close(fd)
