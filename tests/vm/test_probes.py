# SPDX-License-Identifier: MIT
"""The BPF probes: real guests that fail, real signals, real block errors, each as the right event."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from probed import (
    BAD_SECTOR,
    LIMIT,
    MEM,
    STAY,
    Service,
    bad_disk,
    bad_read,
    check_guest,
    fails,
    without_btf,
)
from testbed import inject, pagemap
from testbed.errors import TestbedError
from testbed.guest import MMX, NOWHERE, Guest, GuestConfig
from testbed.kernel import put
from testbed.wait import wait_event, wait_events

import hwerr_notify as h
from hwerr_notify import probe

S = h.Source
CGROUP = Path("/sys/fs/cgroup")


@pytest.fixture(scope="module", params=["kfunc", "write"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    """The service, and the way that probes go which can go both."""
    probe.unload()
    with contextlib.ExitStack() as stack:
        if request.param == "write":
            stack.enter_context(without_btf())
        running = Service()
        assert {s.path for s in probe.status() if s.name in DIRECT} == {request.param}
        yield running
        status, said = running.stop()
        assert (status, said) == (0, "")
        assert probe.unload()


DIRECT = {"kvm", "panic", "death"}
# For what goes one way only.
one_way = pytest.mark.parametrize("service", ["kfunc"], indirect=True)


@pytest.fixture
def device() -> Iterator[h.Device]:
    with h.open(names=True) as opened:
        yield opened


# -- KVM -------------------------------------------------------------------


@pytest.mark.amd
def test_emulation_failure(service: Service, device: h.Device) -> None:
    with fails("emulate") as guest:
        event = wait_event(device, lambda e: e.source == S.KVM)
        check_guest(event, guest)
        assert event.vcpu is not None
        assert (event.vcpu.vcpu, event.vcpu.exit_reason, event.vcpu.suberror) == (0, 17, 1)
        assert event.vcpu.rip == NOWHERE
        assert f"EIP={NOWHERE:08x}" in guest.hmp("info registers")
        assert "emulation failure" in event.message
        assert f"VM bad (pid {guest.pid})" in event.message
        assert guest.status() == "internal-error"
        assert event.to_json()["vcpu"]["rip"] == hex(NOWHERE)


@pytest.mark.amd
def test_what_could_not_be_emulated(service: Service, device: h.Device) -> None:
    with fails("mmx") as guest:
        event = wait_event(device, lambda e: e.source == S.KVM)
        check_guest(event, guest)
        assert event.vcpu is not None
        assert event.vcpu.insn.startswith(MMX)
        assert f"emulation failure, instruction {event.vcpu.insn.hex(' ')}" in event.message


@pytest.mark.amd
def test_triple_fault(service: Service, device: h.Device) -> None:
    with fails("triple") as guest:
        event = wait_event(device, lambda e: e.source == S.KVM)
        check_guest(event, guest)
        assert event.vcpu is not None
        assert (event.vcpu.vcpu, event.vcpu.exit_reason, event.raw_severity) == (0, 8, 8)
        assert "triple fault" in event.message


@pytest.mark.amd
@pytest.mark.parametrize(("code", "byte"), [("panic", 1), ("crash", 2)])
def test_guest_panic(service: Service, device: h.Device, code: str, byte: int) -> None:
    with fails(code) as guest:
        event = wait_event(device, lambda e: e.source == S.PANIC)
        check_guest(event, guest)
        assert event.vcpu is not None
        assert event.vcpu.detail == byte
        assert ("crash kernel" in event.message) == (code == "crash")


KVM_CREATE_VM, KVM_CREATE_VCPU, KVM_RUN = 0xAE01, 0xAE41, 0xAE80
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_GET_SUPPORTED_CPUID, KVM_SET_CPUID2 = 0xC008AE05, 0x4008AE90
KVM_GET_SREGS, KVM_SET_SREGS = 0x8138AE83, 0x4138AE84
SEGMENT = struct.Struct("<QIHBBBBBBBBBB")


@pytest.mark.amd
def test_failed_entry(service: Service, device: h.Device) -> None:
    """Long mode with a code segment that is 64-bit and 32-bit at once: no CPU enters that (APM 2, 15.5.1)."""
    with contextlib.ExitStack() as stack:

        def owned(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        kvm = owned(os.open("/dev/kvm", os.O_RDWR))
        vm = owned(fcntl.ioctl(kvm, KVM_CREATE_VM, 0))
        owned(fcntl.ioctl(vm, KVM_CREATE_VCPU, 0))
        vcpu = owned(fcntl.ioctl(vm, KVM_CREATE_VCPU, 3))
        # Without memory 6.1 has no page tables to give.
        memory = mmap.mmap(-1, MEM)
        hva = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, 0, MEM, hva))
        cpuid = bytearray(8 + 256 * 40)
        struct.pack_into("<I", cpuid, 0, 256)
        fcntl.ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid)
        fcntl.ioctl(vcpu, KVM_SET_CPUID2, cpuid)
        sregs = bytearray(312)
        fcntl.ioctl(vcpu, KVM_GET_SREGS, sregs)
        SEGMENT.pack_into(sregs, 0, 0, 0xFFFFFFFF, 8, 11, 1, 0, 1, 1, 1, 1, 0, 0, 0)
        at = 8 * SEGMENT.size + 2 * 16
        cr0, cr2, _, cr4, cr8, _, apic = struct.unpack_from("<7Q", sregs, at)
        struct.pack_into(
            "<7Q", sregs, at, cr0 | 1 << 31 | 1, cr2, 0, cr4 | 1 << 5, cr8, 1 << 8 | 1 << 10, apic
        )
        fcntl.ioctl(vcpu, KVM_SET_SREGS, bytes(sregs))
        fcntl.ioctl(vcpu, 0x4004AE99, struct.pack("<I", 0))  # KVM_SET_MP_STATE: runnable
        fcntl.ioctl(vcpu, KVM_RUN)
        run = mmap.mmap(vcpu, mmap.PAGESIZE)
        assert struct.unpack_from("<I", run, 8) == (9,)
        run.close()
        event = wait_event(device, lambda e: e.source == S.KVM)
    assert event.vcpu is not None
    assert (event.vcpu.vcpu, event.vcpu.exit_reason) == (3, 9)
    assert event.guests[0].pid == os.getpid()
    assert "could not enter" in event.message


@pytest.mark.amd
def test_what_a_healthy_guest_does_is_no_event(service: Service, device: h.Device) -> None:
    before = {s.name: s.emitted + s.dropped for s in probe.status()}
    with Guest.start(GuestConfig(name="good", mem=MEM, code="count")) as guest:
        assert guest.qmp is not None
        guest.qmp.execute("stop")
        guest.qmp.execute("cont")
        guest.qmp.execute("system_reset")
        guest.counter()
        guest.shutdown()
    assert {s.name: s.emitted + s.dropped for s in probe.status()} == before
    assert device.drain() == []


# -- the end of a VM's process -----------------------------------------------


@pytest.mark.amd
def test_killed_by_somebody(service: Service, device: h.Device) -> None:
    guest = Guest.start(GuestConfig(name="bad", mem=MEM))
    guest.kill()
    event = wait_event(device, lambda e: e.source == S.KVM)
    assert (event.guests[0].pid, event.severity) == (guest.pid, h.Severity.INFO)
    assert event.raw_severity == 0x10000 + signal.SIGKILL
    comm = Path("/proc/self/comm").read_text().strip()
    assert f"killed by SIGKILL from {comm} (pid {os.getpid()})" in event.message


@pytest.mark.amd
def test_crashed(service: Service, device: h.Device) -> None:
    guest = Guest.start(GuestConfig(name="bad", mem=MEM))
    os.kill(guest.pid, signal.SIGSEGV)
    event = wait_event(device, lambda e: e.source == S.KVM)
    assert (event.guests[0].pid, event.severity) == (guest.pid, h.Severity.RECOVERABLE)
    assert event.action_required
    assert "killed by SIGSEGV" in event.message
    guest.kill()


@pytest.mark.amd
def test_killed_for_want_of_memory(service: Service, device: h.Device) -> None:
    put(CGROUP / "cgroup.subtree_control", "+memory")
    group = CGROUP / "short"
    group.mkdir()
    with Guest.start(GuestConfig(name="bad", mem=MEM)) as guest:
        assert guest.qmp is not None
        put(group / "cgroup.procs", str(guest.pid))
        put(group / "memory.max", str(8 << 20))
        more = {"qom-type": "memory-backend-ram", "id": "more", "size": 64 << 20, "prealloc": True}
        with pytest.raises((OSError, TestbedError)):
            guest.qmp.execute("object-add", **more)
        event = wait_event(device, lambda e: e.source == S.KVM)
        assert event.guests[0].pid == guest.pid
        assert event.action_required
        assert "because memory was short" in event.message
    group.rmdir()


# -- SIGBUS ------------------------------------------------------------------


PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207
WALL = 0x40000000  # wait(2), __WALL


@contextlib.contextmanager
def main_thread_held(pid: int) -> Iterator[None]:
    """Only that thread of it stands still (ptrace(2))."""

    def ptrace(request: int) -> None:
        if libc.ptrace(request, pid, None, None):
            raise OSError(ctypes.get_errno(), f"ptrace request {request:#x} of {pid}")

    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    ptrace(PTRACE_SEIZE)
    ptrace(PTRACE_INTERRUPT)
    assert os.WIFSTOPPED(os.waitpid(pid, WALL)[1])
    yield
    ptrace(PTRACE_DETACH)


@one_way
@pytest.mark.amd
def test_guest_uses_a_poisoned_page(service: Service, device: h.Device) -> None:
    with Guest.start(GuestConfig(name="bad", mem=MEM, code="count", extra=STAY)) as guest:
        hva = guest.gpa2hva(0)
        (vcpu,) = guest.vcpus()
        page = guest.gpa2hpa(0) >> 12
        # QEMU's main thread is warned (AO), and would end a guest without MCE before it meets the page.
        with main_thread_held(guest.pid):
            inject.hwpoison(page)
            # The vCPU may meet it before the kernel is done with taking it out of use.
            cause, event = wait_events(
                device,
                lambda e: not e.software and any(g.pid == guest.pid for g in e.guests),
                lambda e: e.source == S.SIGBUS and e.kind == h.Kind.SRAR,
            )
        (hit,) = event.guests
        assert (hit.pid, hit.kvm, hit.hva, hit.gpa, hit.len) == (guest.pid, True, hva, 0, 4096)
        assert event.action_required
        assert event.id == cause.id
        assert h.Flags.LINKED in event.flags
        assert f"to thread {vcpu.name}" in event.message
        assert event.raw_severity == 4


@one_way
def test_warned_process(service: Service, device: h.Device) -> None:
    """hwpoison from outside, to a process that asked for early warning: SIGBUS AO."""
    code = """
        import ctypes, mmap, os, signal, sys
        signal.signal(signal.SIGBUS, lambda *_: os._exit(7))
        assert ctypes.CDLL(None).prctl(33, 1, 1, 0, 0) == 0  # PR_MCE_KILL, early
        m = mmap.mmap(-1, 4096)
        m[0] = 1
        print(ctypes.addressof(ctypes.c_char.from_buffer(m)), flush=True)
        signal.pause()
    """
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        va = int(child.stdout.readline())
        inject.hwpoison(pagemap.pfn_of(child.pid, va))
        event = wait_event(device, lambda e: e.source == S.SIGBUS)
        assert child.wait(LIMIT) == 7
    (task,) = event.tasks
    assert (task.pid, task.va, task.len) == (child.pid, va, 4096)
    assert (event.kind, event.action_required, event.raw_severity) == (h.Kind.SRAO, False, 5)
    cause = wait_for_id(event.id)
    assert cause.source == S.MEMORY_FAILURE
    assert cause.tasks[0].va == va


def wait_for_id(seq: int) -> h.Event:
    with h.open(since=seq) as device:
        return next(iter(device))


# -- block -------------------------------------------------------------------


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    with bad_disk() as path:
        yield path


def with_disk(disk: Path, name: str = "bad") -> Guest:
    drive = f"file={disk},if=none,id=d,format=raw,cache=none,read-only=on,file.locking=off"
    return Guest.start(GuestConfig(name=name, mem=MEM, extra=("-drive", drive)))


@one_way
def test_block_error_of_nobody(service: Service, device: h.Device, disk: Path) -> None:
    bad_read(disk)
    event = wait_event(device, lambda e: e.source == S.BLOCK)
    assert event.block is not None
    assert (event.block.disk, event.block.sector) == (disk.name, BAD_SECTOR)
    assert (event.block.bytes, event.block.op) == (512, 0)
    device_number = disk.stat().st_rdev
    assert (event.block.major, event.block.minor) == (os.major(device_number), os.minor(device_number))
    assert (event.guests, event.component) == ((), h.Component.STORAGE)
    assert h.Flags.OWNERS_UNKNOWN not in event.flags
    assert "critical medium" in event.message


@one_way
@pytest.mark.amd
def test_block_error_names_the_vm(service: Service, device: h.Device, disk: Path) -> None:
    put(CGROUP / "cgroup.subtree_control", "+io")
    group = CGROUP / "vm"
    group.mkdir()
    with Guest.start(GuestConfig(name="good", mem=MEM)), with_disk(disk) as guest:
        guest.hmp(f'qemu-io d "read {BAD_SECTOR * 512} 512"')
        # In no cgroup of its own, but alone with the disk.
        event = wait_event(device, lambda e: e.source == S.BLOCK)
        assert [g.pid for g in event.guests] == [guest.pid]
        with with_disk(disk, "other") as other:
            guest.hmp(f'qemu-io d "read {BAD_SECTOR * 512} 512"')
            event = wait_event(device, lambda e: e.source == S.BLOCK)
            assert event.guests == ()
            assert h.Flags.OWNERS_UNKNOWN in event.flags
            put(group / "cgroup.procs", str(other.pid))
            other.hmp(f'qemu-io d "read {BAD_SECTOR * 512} 512"')
            event = wait_event(device, lambda e: e.source == S.BLOCK)
            assert [(g.pid, g.name) for g in event.guests] == [(other.pid, "other")]
    group.rmdir()


# -- the service -------------------------------------------------------------


def totals() -> dict[str, tuple[int, int]]:
    return {s.name: (s.emitted, s.dropped) for s in probe.status()}


def test_status(service: Service) -> None:
    done = subprocess.run(["hwerr-probe", "status", "--json"], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert {name: (p["emitted"], p["dropped"]) for name, p in told.items()} == totals()
    stats = subprocess.run(["hwerr-watch", "--stats", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(stats.stdout)["probes"] == told
    assert {name for name, p in told.items() if p["path"] == "kfunc"} in (DIRECT, set())
    text = subprocess.run(["hwerr-watch", "--stats"], capture_output=True, text=True, check=True).stdout
    rows = {name: line for line in text.splitlines() for name in told if line.startswith(f"  {name} ")}
    for name, p in told.items():
        way = (
            "by the module's function for BPF" if p["path"] == "kfunc" else "through hwerr-probe and write()"
        )
        assert f"{p['emitted']} passed on {way}, {p['dropped']} lost" in rows[name]


@one_way
def test_only_one_runs(service: Service) -> None:
    done = subprocess.run(["hwerr-probe", "run"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "hwerr-probe: another one runs: stop it first\n")
