# SPDX-License-Identifier: MIT
"""Guarded VMs are stopped by the errors that hit them, and by no others."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from holder import PAGE, Holder
from testbed import inject, vfio
from testbed.guest import Guest, GuestConfig
from testbed.qmp import QmpError
from testbed.records import MCI_ADDRV, MCI_EN, MCI_UC, MCI_VAL, AerRecord, MceRecord
from testbed.victim import Victim
from testbed.wait import until, wait_event

import hwerr_notify
from hwerr_notify import Device, Event, Flags, Severity, Source, Stop
from hwerr_notify._uapi import ffi, lib

pytestmark = pytest.mark.amd

SECONDS = 30.0
DRAM, BANK = 8 << 16 | 0x0813, 4


@pytest.fixture
def device() -> Iterator[Device]:
    with hwerr_notify.open() as device:
        yield device


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Guest.start(GuestConfig(name="guarded", smp=2, code="count")) as guest:
        yield guest


@pytest.fixture
def pidfd(guest: Guest) -> Iterator[int]:
    fd = os.pidfd_open(guest.pid)
    yield fd
    os.close(fd)


def hit(device: Device, phys: int, *, uncorrected: bool = True) -> Event:
    """A machine check on that page through the decode chain; its event."""
    status = MCI_VAL | MCI_EN | MCI_ADDRV | DRAM | (MCI_UC if uncorrected else 0)
    device.seek("now")
    inject.mce_sim(MceRecord(status=status, bank=BANK, addr=phys))
    return wait_event(device, lambda e: e.mce is not None and e.mce.addr == phys)


def poison(device: Device, phys: int) -> Event:
    """memory_failure() on that page; its event."""
    device.seek("now")
    inject.hwpoison(phys // PAGE)
    return wait_event(device, lambda e: e.source == Source.MEMORY_FAILURE)


def stop_of(event: Event, guest: Guest) -> Stop:
    """What it says of having stopped that guest; not yet that no vCPU ran when it was written.

    An emulated CPU may be taken away for longer than the kernel waits for it: `running` says so.
    """
    assert event.flags & Flags.STOPPED
    (stop,) = event.stops
    assert (stop.pid, stop.vcpus) == (guest.pid, guest.config.smp)
    assert event.guests
    for g in event.guests:
        assert g.pid == guest.pid
        assert g.stopped is (stop.running == 0)
    return stop


def kernel_page() -> int:
    """Physical address of the kernel's own code."""
    for line in Path("/proc/iomem").read_text("ascii").splitlines():
        if line.endswith("Kernel code"):
            return int(line.split("-")[0], 16) + 16 * PAGE
    raise AssertionError("no kernel code in /proc/iomem")


def until_internal_error(guest: Guest) -> None:
    """Waits for QEMU's own word that it will not go on."""
    until(lambda: guest.status() == "internal-error", SECONDS, guest.status)


def until_not_running(guest: Guest) -> None:
    until(lambda: guest.status() != "running", SECONDS)


def runs(guest: Guest) -> bool:
    """Whether it counts, within a time that is long for one that does."""
    before = guest.counter()
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if guest.counter() != before:
            return True
    return False


def stands_still(guest: Guest, clock: Guest) -> bool:
    """Whether it counts no more while another does."""
    before = guest.counter()
    assert runs(clock)
    return guest.counter() == before


def test_an_error_stops_the_vm_it_hits(device: Device, guest: Guest, pidfd: int) -> None:
    with Guest.start(GuestConfig(name="neighbour", code="count")) as other:
        device.guard(pidfd, Severity.RECOVERABLE)
        with os_pidfd(other.pid) as neighbour:
            device.guard(neighbour, Severity.FATAL)
        before = time.monotonic_ns()
        event = hit(device, guest.gpa2hpa(0x500000))
        stop = stop_of(event, guest)
        (hit_guest,) = event.guests
        assert stop.start_ns == hit_guest.start_ns
        assert before < stop.mono_ns <= time.monotonic_ns()
        until_internal_error(guest)
        assert stands_still(guest, other)
        assert other.status() == "running"
        assert {g.pid: g.stops for g in device.guards()} == {guest.pid: 1, other.pid: 0}
        assert guest.qmp is not None
        with pytest.raises(QmpError, match=r"[Rr]eset"):
            guest.qmp.execute("cont")
        assert stands_still(guest, other)


def test_no_vcpu_runs_when_the_record_is_read(device: Device) -> None:
    """Not each time: see stop_of()."""
    for _ in range(5):
        with (
            Guest.start(GuestConfig(name="guarded", smp=2, code="count")) as guest,
            os_pidfd(guest.pid) as fd,
        ):
            device.guard(fd, Severity.RECOVERABLE)
            if stop_of(hit(device, guest.gpa2hpa(0x500000)), guest).running == 0:
                return
    pytest.fail("of five guests, a vCPU of each was still in the guest")


def test_memory_failure_stops_it(device: Device, guest: Guest, pidfd: int) -> None:
    """And what QEMU makes of the signal that follows, here a reset of a guest without MCE, runs nothing."""
    with Guest.start(GuestConfig(name="clock", code="count")) as clock:
        device.guard(pidfd, Severity.DEFERRED)
        stop_of(poison(device, guest.gpa2hpa(0x400000)), guest)
        assert stands_still(guest, clock)
        until_not_running(guest)
        assert stands_still(guest, clock)


@pytest.mark.parametrize("what", ["corrected", "below", "neighbour", "nobody", "disarmed", "other process"])
def test_what_does_not_stop(device: Device, guest: Guest, pidfd: int, what: str) -> None:
    with ExitStack() as stack:
        page = guest.gpa2hpa(0x500000)
        device.guard(pidfd, Severity.FATAL if what == "below" else Severity.RECOVERABLE)
        match what:
            case "neighbour":
                other = stack.enter_context(Guest.start(GuestConfig(name="neighbour", code="count")))
                page = other.gpa2hpa(0x500000)
            case "nobody":
                page = kernel_page()
            case "other process":
                page = stack.enter_context(Victim()).memory.pfn * PAGE
            case "disarmed":
                device.unguard(pidfd)
        if what in ("corrected", "nobody"):
            event = hit(device, page, uncorrected=what == "nobody")
        else:
            event = poison(device, page)
        assert not event.flags & Flags.STOPPED
        assert not event.stops
        assert not any(g.stopped for g in event.guests)
        assert runs(guest)
        assert guest.status() == "running"


def test_an_error_of_its_device_stops_it(device: Device) -> None:
    address = vfio.bind("aer0")
    try:
        config = GuestConfig(name="passed", extra=("-device", f"vfio-pci,host={address}"))
        with Guest.start(config) as guest, os_pidfd(guest.pid) as pidfd:
            device.guard(pidfd, Severity.RECOVERABLE)
            inject.aer(AerRecord(uncor_status=0x8000, device=address, header_log=(1, 2, 3, 4)))
            event = wait_event(device, lambda e: e.source == Source.AER)
            stop_of(event, guest)
            (hit_guest,) = event.guests
            assert hit_guest.by_device
    finally:
        vfio.unbind("aer0")


def test_on_command(device: Device, guest: Guest, pidfd: int) -> None:
    stop = device.stop(pidfd)
    assert (stop.pid, stop.vcpus) == (guest.pid, 2)
    # An emulated CPU may be taken away for longer than the kernel waits for it; not for ever.
    until(lambda: device.stop(pidfd).running == 0, SECONDS)
    until_internal_error(guest)
    with Guest.start(GuestConfig(name="clock", code="count")) as clock:
        assert stands_still(guest, clock)


def test_ends_with_the_file_unless_kept(guest: Guest, pidfd: int, device: Device) -> None:
    with hwerr_notify.open() as armer:
        armer.guard(pidfd, Severity.FATAL)
        assert [(g.pid, g.severity, g.keep) for g in device.guards()] == [(guest.pid, Severity.FATAL, False)]
    assert not device.guards()
    with hwerr_notify.open() as armer:
        armer.guard(pidfd, Severity.DEFERRED, keep=True)
    assert [(g.pid, g.severity, g.keep) for g in device.guards()] == [(guest.pid, Severity.DEFERRED, True)]
    guest.kill()
    assert not device.guards()


def test_hundreds_are_listed(device: Device) -> None:
    with ExitStack() as stack:
        pids = set()
        for _ in range(100):
            child = subprocess.Popen(["sleep", "1000"])
            stack.callback(child.wait)
            stack.callback(child.kill)
            with os_pidfd(child.pid) as fd:
                device.guard(fd, Severity.FATAL, keep=True)
            pids.add(child.pid)
        assert {g.pid for g in device.guards()} == pids
    assert not device.guards()


def refused(device: Device, request: int, struct: str, **fields: Any) -> int:
    """errno of an ioctl."""
    arg = ffi.new(f"struct {struct} *", fields)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(int(ffi.cast("uintptr_t", arg)))
    if libc.ioctl(device.fileno(), ctypes.c_ulong(request), address) == 0:
        return 0
    return ctypes.get_errno()


def test_bad_arguments(device: Device) -> None:
    with os_pidfd(os.getpid()) as me:
        good = {"pidfd": me, "severity": 3}

        def guard(**fields: int) -> int:
            return refused(device, lib.HWERR_IOC_GUARD, "hwerr_ioc_guard", **{**good, **fields})

        for severity in (0, 1, 5, 1 << 31):
            assert guard(severity=severity) == errno.EINVAL
        assert guard(flags=4) == errno.EINVAL
        assert guard(pad=1) == errno.EINVAL
        assert guard(flags=lib.HWERR_GUARD_REMOVE) == errno.EINVAL
        assert guard(flags=lib.HWERR_GUARD_REMOVE | lib.HWERR_GUARD_KEEP, severity=0) == errno.EINVAL
        assert guard(flags=lib.HWERR_GUARD_REMOVE, severity=0) == errno.ENOENT
        assert guard(pidfd=-1) == errno.EBADF
        assert guard(pidfd=0) == errno.EBADF
        assert guard(pidfd=device.fileno()) == errno.EBADF
        assert guard() == 0
        assert guard(flags=lib.HWERR_GUARD_REMOVE, severity=0) == 0
        stop = {"pidfd": me}
        assert refused(device, lib.HWERR_IOC_STOP, "hwerr_ioc_stop", **stop) == errno.ENXIO
        assert refused(device, lib.HWERR_IOC_STOP, "hwerr_ioc_stop", **stop, flags=1) == errno.EINVAL
        guard()
        assert refused(device, lib.HWERR_IOC_GUARDS, "hwerr_ioc_guards", pad=1) == errno.EINVAL
        assert refused(device, lib.HWERR_IOC_GUARDS, "hwerr_ioc_guards", entries=8, count=1) == errno.EFAULT


def test_a_reused_number_is_not_hit(device: Device) -> None:
    """A pidfd of a process that has ended names nobody, whoever has its number now."""
    child = subprocess.Popen(["true"])
    fd = os.pidfd_open(child.pid)
    child.wait()
    with pytest.raises(ProcessLookupError):
        device.guard(fd, Severity.FATAL)
    with pytest.raises(ProcessLookupError):
        device.stop(fd)
    os.close(fd)


UNPRIVILEGED = """
import os, sys, hwerr_notify
from hwerr_notify import Severity
os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
with hwerr_notify.open() as device:
    me, other = os.pidfd_open(os.getpid()), os.pidfd_open(int(sys.argv[1]))
    device.guard(me, Severity.FATAL)
    assert [g.pid for g in device.guards()] == [os.getpid()]
    for refused in (lambda: device.guard(other, Severity.FATAL), lambda: device.stop(other)):
        try:
            refused()
        except PermissionError:
            continue
        sys.exit("not refused")
"""


def test_without_privilege_only_oneself(device: Device, guest: Guest, pidfd: int) -> None:
    device.guard(pidfd, Severity.FATAL)
    subprocess.run([sys.executable, "-c", UNPRIVILEGED, str(guest.pid)], check=True)
    assert [g.pid for g in device.guards()] == [guest.pid]
    assert runs(guest)


def test_a_vmm_with_two_vms(device: Device) -> None:
    """Both are told, whichever the page belongs to."""
    with Holder() as holder:
        va = holder.mmap(4 * PAGE)
        holder.write(va, 4 * PAGE)
        for _ in range(2):
            holder.vm_slot(holder.vm(), 0, 0, 4 * PAGE, va)
        with os_pidfd(holder.pid) as fd:
            device.guard(fd, Severity.RECOVERABLE)
            event = poison(device, holder.phys(va))
        (stop,) = event.stops
        assert (stop.pid, stop.vcpus) == (holder.pid, 0)
        assert len({g.vm_id for g in event.guests}) == 2


@contextmanager
def os_pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)
