# SPDX-License-Identifier: MIT
"""Processes that hold memory of every kind and do with it what they are told.

A `Holder` is a forked child that executes one call after the other: `h.mmap(...)`
runs `Calls.mmap` in the child and returns its result, or raises what it raised.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap as _mmap
import os
import pickle
import select
import signal
import socket
import struct
import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from testbed import pagemap
from testbed.kernel import put
from testbed.wait import until

PAGE = 4096
HUGE = 2 << 20
PRIVATE, SHARED, ANON = _mmap.MAP_PRIVATE, _mmap.MAP_SHARED, _mmap.MAP_ANONYMOUS
MAP_FIXED = 0x10
MAP_HUGETLB = 0x40000
MADV_MERGEABLE, MADV_UNMERGEABLE = 12, 13
MADV_HUGEPAGE, MADV_NOHUGEPAGE = 14, 15
MADV_PAGEOUT = 21
CLONE_FILES = 0x400

VFIO_SET_IOMMU, VFIO_GROUP_SET_CONTAINER, VFIO_GROUP_GET_DEVICE_FD = 0x3B66, 0x3B68, 0x3B6A
VFIO_TYPE1V2_IOMMU = 3
KVM_CREATE_VM = 0xAE01
KVM_SET_USER_MEMORY_REGION = 0x4020AE46

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_libc.mremap.restype = ctypes.c_void_p
_FAILED = ctypes.c_void_p(-1).value


def _check(result: int | None) -> int:
    if result in (-1, _FAILED):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result or 0


class Calls:
    """What a holder can do; addresses and lengths in bytes."""

    def __init__(self) -> None:
        self._keep: list[threading.Thread] = []

    def mmap(self, length: int, flags: int = _mmap.MAP_PRIVATE | _mmap.MAP_ANONYMOUS, *, path: str = "",
             offset: int = 0, at: int = 0, align: int = 0) -> int:  # fmt: skip
        """A mapping that nothing has touched yet; its address."""
        prot = _mmap.PROT_READ | _mmap.PROT_WRITE
        fd = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY) if path else -1
        if align:
            room = _check(_libc.mmap(None, length + align, 0, _mmap.MAP_PRIVATE | _mmap.MAP_ANONYMOUS, -1, 0))
            at = (room + align - 1) // align * align
        va = _check(_libc.mmap(at or None, length, prot, flags | (MAP_FIXED if at else 0), fd, offset))
        if path:
            os.close(fd)
        return va

    def munmap(self, va: int, length: int) -> None:
        _check(_libc.munmap(ctypes.c_void_p(va), ctypes.c_size_t(length)))

    def mremap(self, va: int, length: int) -> int:
        """Moves a mapping elsewhere; its new address."""
        goal = self.mmap(length)
        may_move, fixed = 1, 2
        return _check(
            _libc.mremap(ctypes.c_void_p(va), ctypes.c_size_t(length), ctypes.c_size_t(length),
                         may_move | fixed, ctypes.c_void_p(goal))
        )  # fmt: skip

    def write(self, va: int, length: int = PAGE, byte: int = 0x5A) -> None:
        ctypes.memset(va, byte, length)

    def read(self, va: int, length: int = PAGE) -> None:
        for at in range(va, va + length, PAGE):
            ctypes.string_at(at, 1)

    def madvise(self, va: int, length: int, advice: int) -> None:
        _check(_libc.madvise(ctypes.c_void_p(va), ctypes.c_size_t(length), advice))

    def mprotect(self, va: int, length: int, prot: int) -> None:
        _check(_libc.mprotect(ctypes.c_void_p(va), ctypes.c_size_t(length), prot))

    def memfd(self, length: int) -> str:
        """A memfd of that length; a path that other processes can open."""
        fd = os.memfd_create("holder")
        os.ftruncate(fd, length)
        return f"/proc/{os.getpid()}/fd/{fd}"

    def vm(self) -> int:
        """A KVM virtual machine without any CPU; its file."""
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        try:
            return fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
        finally:
            os.close(kvm)

    def vm_slot(self, vm: int, slot: int, gpa: int, length: int, va: int) -> None:
        """A memslot; `slot` is KVM address space << 16 | id."""
        fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, struct.pack("=IIQQQ", slot, 0, gpa, length, va))

    def vm_of_thread(self, slot: int, gpa: int, length: int, va: int) -> None:
        """A VM whose file only one thread has open, which is not the first."""
        done: list[BaseException | None] = []
        ready = threading.Event()

        def run() -> None:
            try:
                _check(_libc.unshare(CLONE_FILES))
                self.vm_slot(self.vm(), slot, gpa, length, va)
                done.append(None)
            except OSError as error:
                done.append(error)
            ready.set()
            signal.pause()

        self._keep.append(threading.Thread(target=run, daemon=True))
        self._keep[-1].start()
        ready.wait()
        if done[0]:
            raise done[0]

    def vfio(self, address: str) -> None:
        """Opens a PCI device that is bound to vfio-pci."""
        group = os.path.basename(os.readlink(f"/sys/bus/pci/devices/{address}/iommu_group"))
        container = os.open("/dev/vfio/vfio", os.O_RDWR)
        fd = os.open(f"/dev/vfio/{group}", os.O_RDWR)
        fcntl.ioctl(fd, VFIO_GROUP_SET_CONTAINER, struct.pack("=i", container))
        fcntl.ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1V2_IOMMU)
        fcntl.ioctl(fd, VFIO_GROUP_GET_DEVICE_FD, address.encode() + b"\0")

    def churn(self, va: int, length: int, seconds: float) -> None:
        """For that time, forks, splits and moves areas beside `va`, which stays as it is."""
        stop = threading.Timer(seconds, lambda: None)
        stop.start()
        other = self.mmap(4 * PAGE)
        while stop.is_alive():
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            self.write(other, 4 * PAGE)
            self.mprotect(other + PAGE, PAGE, _mmap.PROT_READ)
            self.mprotect(other + PAGE, PAGE, _mmap.PROT_READ | _mmap.PROT_WRITE)
            self.mprotect(va, length, _mmap.PROT_READ)
            self.mprotect(va, length, _mmap.PROT_READ | _mmap.PROT_WRITE)
            other = self.mremap(other, 4 * PAGE)
            os.waitpid(pid, 0)


def _serve(sock: socket.socket, calls: Calls) -> None:
    while data := sock.recv(1 << 16):
        name, args, kwargs = pickle.loads(data)
        reply: Any
        try:
            if name == "fork":
                _, fds, _, _ = socket.recv_fds(sock, 1, 1)
                pid = os.fork()
                if pid == 0:
                    sock.close()
                    _serve(socket.socket(fileno=fds[0]), calls)
                    os._exit(0)
                os.close(fds[0])
                reply = pid
            elif name == "lose_leader":
                server = threading.Thread(target=_serve, args=(sock, calls))
                server.start()
                sock.send(pickle.dumps(None))
                # The first thread ends, the process goes on in the other.
                sys_exit = 60
                _libc.syscall(sys_exit, 0)
            else:
                reply = getattr(calls, name)(*args, **kwargs)
        except OSError as error:
            reply = error
        sock.send(pickle.dumps(reply))


class Holder:
    """A context manager for the process; at its end the process is killed."""

    def __init__(self, pid: int | None = None, sock: socket.socket | None = None) -> None:
        if pid is None or sock is None:
            sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            pid = os.fork()
            if pid == 0:
                # Nothing of pytest is run any more, whatever happens.
                try:
                    os.setsid()
                    sock.close()
                    _serve(theirs, Calls())
                finally:
                    os._exit(0)
            theirs.close()
        self.pid = pid
        self._sock = sock

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self._sock.send(pickle.dumps((name, args, kwargs)))
        if name == "fork":
            return None
        return self._answer()

    def _answer(self) -> Any:
        data = self._sock.recv(1 << 16)
        if not data:
            raise RuntimeError(f"holder {self.pid} ended")
        reply = pickle.loads(data)
        if isinstance(reply, OSError):
            raise reply
        return reply

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Calls, name) and name != "lose_leader":
            raise AttributeError(name)
        return lambda *args, **kwargs: self._call(name, *args, **kwargs)

    def start(self, name: str, *args: Any) -> None:
        """Begins a call; `finish()` waits for its result."""
        self._sock.send(pickle.dumps((name, args, {})))

    def finish(self) -> Any:
        return self._answer()

    def fork(self) -> Holder:
        """A child of it, with a copy of everything."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._call("fork")
        socket.send_fds(self._sock, [b"f"], [theirs.fileno()])
        theirs.close()
        return Holder(self._answer(), ours)

    def pfn(self, va: int) -> int:
        """Frame of the page there."""
        return pagemap.pfn_of(self.pid, va)

    def phys(self, va: int) -> int:
        return pagemap.physical(self.pid, va)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [])
        except ProcessLookupError:
            pass
        finally:
            os.close(pidfd)
        self._sock.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def touched(holder: Holder, pages: int = 1, flags: int = PRIVATE | ANON) -> int:
    """Pages of the holder's, each a small one of its own."""
    va: int = holder.mmap(pages * PAGE, flags)
    holder.madvise(va, pages * PAGE, MADV_NOHUGEPAGE)
    holder.write(va, pages * PAGE)
    return va


def hugetlb(holder: Holder, pages: int, flags: int) -> int:
    """Hugetlb pages of the holder's, PRIVATE or SHARED."""
    put(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"), "16")
    va: int = holder.mmap(pages * HUGE, flags | ANON | MAP_HUGETLB)
    holder.write(va, pages * HUGE)
    return va


def merged(stack: ExitStack, pages: dict[Holder, int]) -> dict[Holder, int]:
    """So many pages of each, all merged by KSM; where they are."""
    ksm = Path("/sys/kernel/mm/ksm")
    stack.callback(put, ksm / "run", "2")
    put(ksm / "sleep_millisecs", "1")
    put(ksm / "pages_to_scan", "1000")
    at = {}
    for h, count in pages.items():
        at[h] = touched(h, count)
        h.write(at[h], count * PAGE, 0xC3)
        h.madvise(at[h], count * PAGE, MADV_MERGEABLE)
    put(ksm / "run", "1")
    frames = [(h, at[h] + n * PAGE) for h, count in pages.items() for n in range(count)]
    until(lambda: len({h.pfn(va) for h, va in frames}) == 1, 60)
    put(ksm / "run", "0")
    return at
