# SPDX-License-Identifier: MIT
"""A QEMU process as the kernel sees it: the independent witness of what its monitor says.

Everything here is read from /proc and is one look, not a promise about the next
moment. The process is held by a pidfd, so a reused number is never taken for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import select
import signal
import socket
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from . import netns
from .errors import GuardError

__all__ = ["SYSFS", "Connection", "Held", "Look", "Process", "Tap", "Thread", "passed_through", "served"]

_PROC = "/proc"
SYSFS = Path("/sys")
_AT_ONCE = 1 << 16
TICK_NS: int = 1_000_000_000 // os.sysconf("SC_CLK_TCK")

# linux/kvm.h: _IO(KVMIO, 0x80); x86-64's number of ioctl(2).
_KVM_RUN = 0xAE80
_SYS_IOCTL = 16

# linux/sched.h. KVM's and vhost's workers are threads of the process (since 6.4, f9010dbdce91), show
# the call that made them for ever, and run nothing of the guest's.
_PF_USER_WORKER = 0x4000

# net/unix/af_unix.c, unix_seq_show(): a socket that listens.
_SO_ACCEPTCON = 0x10000

# block/file-posix.c of QEMU: RAW_LOCK_PERM_BASE, a byte for each permission. The first is to
# read, which an inactive image keeps and which bars nobody. The lock of a pid file begins at 0.
_LOCK_OF_READING = 100
_LOCK = re.compile(r"^lock:\s*\d+: (?:OFDLCK|POSIX)\s+\S+\s+\S+\s+\S+\s+\S+\s+(\d+)\s+(\d+|EOF)\s*$", re.M)
_FLAGS = re.compile(r"^flags:\s*([0-7]+)", re.M)
_TAP = re.compile(r"^iff:[ \t]*(\S+)", re.M)
_MACVTAP = re.compile(r"/tap\d+$")

# drivers/vhost. A network's goes with its tap. A vsock's worker is stopped with the guest, and the seal
# refuses to begin it again.
_VHOST = re.compile(r"/dev/vhost-(?!net$|vsock$)\S+")

_SYS_PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)

# drivers/vfio: a file a group, or (iommufd, since 6.6, 8b6f173a4ce4) a file a device.
_VFIO_GROUP = re.compile(r"/dev/vfio/(?:noiommu-)?(\d+)")
_VFIO_DEVICE = re.compile(r"/dev/vfio/devices/(vfio\d+)")


@dataclass(frozen=True, slots=True)
class Thread:
    """One look at a thread. `in_guest`: it is inside KVM_RUN; `running`: on a CPU at that moment.

    `state` is that of proc(5), seen after the call. A thread that executes the guest's code has R, for KVM
    sets none other between its last look at requests and the guest's exit; S and D are a thread
    asleep in the kernel, T and t one that a signal or a tracer has stopped on its way out of a call,
    or before it has begun. It shows the call all the same.
    """

    tid: int
    in_guest: bool
    running: bool
    state: str = "R"


@dataclass(frozen=True, slots=True)
class Held:
    """An open file of the process. `locked`: with locks of QEMU's that bar others from the image."""

    fd: int
    path: str
    device: int
    inode: int
    block: bool
    writable: bool
    locked: bool


@dataclass(frozen=True, slots=True)
class Tap:
    """A tap interface. `namespace`: its network namespace, None if that is this process's."""

    name: str
    namespace: str | None = None

    def __str__(self) -> str:
        # No blank is in an interface's name.
        return f"{self.name} in {self.namespace}" if self.namespace else self.name

    @classmethod
    def parse(cls, text: str) -> Self:
        """What str() has made."""
        name, _, namespace = text.partition(" in ")
        return cls(name, namespace or None)


@dataclass(frozen=True, slots=True)
class Connection:
    """A connected socket. `peer`: a path if it is `local` (AF_UNIX), else HOST:PORT."""

    fd: int
    local: bool
    peer: str


@dataclass(frozen=True, slots=True)
class Look:
    """What a process has open that is of others, too.

    `files`: regular files and block devices, memory files left out. `taps`: the tap interfaces, macvtap's as
    well, as `Tap` writes them. `devices`: names of the character devices, VFIO's and vhost's among them.
    `connections`: sockets with which it has connected to somebody; only if they were asked for.
    """

    files: tuple[Held, ...]
    taps: tuple[str, ...]
    devices: tuple[str, ...]
    connections: tuple[Connection, ...] = ()


class Process:
    """A process held by pidfd. `start_ticks` with `pid` is its identity (proc(5), field 22)."""

    def __init__(self, pid: int, pidfd: int, start_ticks: int) -> None:
        """Takes over `pidfd`. Use `open()`."""
        self.pid = pid
        self.pidfd = pidfd
        self.start_ticks = start_ticks

    @classmethod
    def open(cls, pid: int, start_ticks: int | None = None) -> Self:
        """Raises ProcessLookupError if there is none of that number and start."""
        pidfd = os.pidfd_open(pid)
        try:
            found = read_start(pid)
            # Read after the pidfd was opened: if that process still lives, it is its start.
            if found is None or _ended(pidfd) or (start_ticks is not None and found != start_ticks):
                raise ProcessLookupError(errno.ESRCH, f"process {pid} is not the one meant")
        except BaseException:
            os.close(pidfd)
            raise
        return cls(pid, pidfd, found)

    @property
    def start_ns(self) -> int:
        """When it started (CLOCK_BOOTTIME), to the tick."""
        return self.start_ticks * TICK_NS

    def is_of(self, pid: int, start_ns: int) -> bool:
        """Whether a record's process number and start are this process's."""
        return pid == self.pid and start_ns // TICK_NS == self.start_ticks

    def alive(self) -> bool:
        """A zombie is not."""
        return self.pidfd >= 0 and not _ended(self.pidfd)

    def ends(self, limit: float) -> bool:
        """Blocks until it has ended, at most `limit` seconds; whether it has."""
        return self.pidfd < 0 or _ended(self.pidfd, limit)

    def close(self) -> None:
        """Lets it go; the process itself is not touched."""
        if self.pidfd >= 0:
            fd, self.pidfd = self.pidfd, -1
            os.close(fd)

    def kill(self) -> None:
        """Ends it at once; not an error if it has ended."""
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return

    # -- one look ----------------------------------------------------------------

    def _path(self, *parts: object) -> str:
        return "/".join((_PROC, str(self.pid), *map(str, parts)))

    def cmdline(self) -> list[str]:
        """Its arguments; [] if it has ended."""
        try:
            return os.fsdecode(_read(self._path("cmdline"))).split("\0")[:-1]
        except OSError:
            return []

    def comm(self) -> str:
        try:
            return _read(self._path("comm")).decode("utf-8", "replace").strip()
        except OSError:
            return "?"

    def threads(self, tids: Iterable[int] | None = None) -> list[Thread]:
        """Those of `tids`, or all, that still exist. PermissionError without the right to trace it."""
        if tids is None:
            try:
                tids = sorted(map(int, os.listdir(self._path("task"))))
            except FileNotFoundError:
                return []
        found = []
        for tid in tids:
            try:
                words = _read(self._path("task", tid, "syscall")).decode("ascii").split()
                fields = _read(self._path("task", tid, "stat")).decode("ascii", "replace").rpartition(")")[2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields.split()[6]) & _PF_USER_WORKER:
                continue
            in_guest = (
                len(words) > 2 and words[0] == str(_SYS_IOCTL) and int(words[2], 16) & 0xFFFFFFFF == _KVM_RUN
            )
            found.append(Thread(tid, in_guest, words[:1] == ["running"], fields.split()[0]))
        return found

    def _links(self) -> list[tuple[str, str]]:
        """(number, target) of all that it has open."""
        found = []
        try:
            names = os.listdir(self._path("fd"))
        except FileNotFoundError:
            return []
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found.append((name, os.readlink(self._path("fd", name))))
        return found

    def _open_files(self) -> list[tuple[str, str]]:
        """(number, target) of what it has open, but for what has no name: sockets, pipes, KVM's own."""
        return [(name, target) for name, target in self._links() if target.startswith("/")]

    def look(self, *, connections: bool = False) -> Look:
        """All of it at once, for a guest waits."""
        files, taps, others = [], set(), []
        links = self._links()
        for name, path in links:
            if not path.startswith("/"):
                continue
            try:
                status = os.stat(self._path("fd", name))
                kind = stat.S_IFMT(status.st_mode)
                block = kind == stat.S_IFBLK
                if not block and kind not in (stat.S_IFREG, stat.S_IFCHR):
                    continue
                info = _read(self._path("fdinfo", name)).decode("ascii", "replace")
                if kind == stat.S_IFCHR:
                    others.append(path)
                    taps.update(self._taps_of(name, path, info))
                    continue
            except FileNotFoundError:
                continue
            flags = _FLAGS.search(info)
            mode = int(flags[1], 8) & os.O_ACCMODE if flags else os.O_RDONLY
            locked = any(
                int(start) >= _LOCK_OF_READING and (end == "EOF" or int(end) > _LOCK_OF_READING)
                for start, end in _LOCK.findall(info)
            )
            device, inode = (status.st_rdev, 0) if block else (status.st_dev, status.st_ino)
            files.append(Held(int(name), path, device, inode, block, mode != os.O_RDONLY, locked))
        sockets = [name for name, path in links if path.startswith("socket:[")] if connections else []
        return Look(tuple(files), tuple(sorted(taps)), tuple(others), tuple(self._connections(sockets)))

    def stat(self, path: str) -> os.stat_result:
        """Of what it finds under that path. OSError."""
        return os.stat(self._path("root" if path.startswith("/") else "cwd", path.lstrip("/")))

    def names(self) -> list[str]:
        """Names of the files that it has open."""
        return [target for _, target in self._open_files()]

    def taps(self) -> list[str]:
        """Its taps, as of `look()`."""
        return self.peek()[0]

    def peek(self) -> tuple[list[str], list[str]]:
        """`taps()` and `names()`. Looks at no image: such a look may not come back."""
        found = set()
        files = self._open_files()
        for name, target in files:
            with contextlib.suppress(FileNotFoundError):
                info = _read(self._path("fdinfo", name)).decode("ascii", "replace")
                found.update(self._taps_of(name, target, info))
        return sorted(found), [target for _, target in files]

    def _taps_of(self, name: str, target: str, info: str) -> list[str]:
        """Of an open file, if it is a tap's. FileNotFoundError if it is closed meanwhile."""
        # drivers/net/tun.c, tun_chr_show_fdinfo().
        if match := _TAP.search(info):
            with self._same(int(name)) as fd:
                return [str(Tap(match[1], _elsewhere(netns.of_tap(fd))))]
        return self._macvtap(name, target) if _MACVTAP.search(target) else []

    def _macvtap(self, name: str, target: str) -> list[str]:
        """The interface behind /dev/tapN, of which N is the number; each has a device number of its own."""
        status = os.stat(self._path("fd", name))
        if not stat.S_ISCHR(status.st_mode):
            return []
        device = status.st_rdev
        # Only what is in this process's namespace is shown there.
        node = SYSFS / "dev/char" / f"{os.major(device)}:{os.minor(device)}"
        if node.exists():
            # .../virtual/net/NAME/macvtap/tapN
            _, net, below = str(node.resolve()).rpartition("/net/")
            if net:
                return [below.split("/")[0]]
        # It is not found by that name, and so not taken for gone.
        return [str(Tap(target, "another"))]

    @contextlib.contextmanager
    def _same(self, fd: int) -> Iterator[int]:
        """A descriptor of this process for what it has open there. FileNotFoundError if it has closed it."""
        own = _libc.syscall(_SYS_PIDFD_GETFD, self.pidfd, fd, 0)
        if own < 0:
            code = ctypes.get_errno()
            if code in (errno.EBADF, errno.ESRCH):
                code = errno.ENOENT
            raise OSError(code, f"looking into process {self.pid}: {os.strerror(code)}")
        try:
            yield own
        finally:
            os.close(own)

    def _connections(self, names: list[str]) -> list[Connection]:
        """Of these sockets those with which it has connected to somebody; not those that it has accepted."""
        ends, listens = {}, set()
        for name in names:
            with contextlib.suppress(FileNotFoundError), self._same(int(name)) as fd, \
                    socket.socket(fileno=os.dup(fd)) as sock:  # fmt: skip
                try:
                    mine = _address(sock.family, sock.getsockname())
                    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        listens.add(mine)
                    else:
                        ends[int(name)] = (sock.family, mine, _address(sock.family, sock.getpeername()))
                except OSError:
                    # Not connected, or of a kind that never is.
                    continue
        ports = {address.rpartition(":")[2] for address in listens}
        return [
            Connection(fd, family == socket.AF_UNIX, peer)
            for fd, (family, mine, peer) in ends.items()
            # Accepted: under the address, or the port, at which it listens.
            if not (mine if family == socket.AF_UNIX else mine.rpartition(":")[2] in ports)
        ]

    def listens_on(self, path: str | os.PathLike[str]) -> bool:
        """Whether it has a socket of that name on which it listens.

        The kernel says of a socket who called listen(), by a number: he may have given the socket
        away and ended, and somebody else have his number. The name is as it was bound, which may
        have been in another directory or mount namespace; so its last part has to do.
        """
        name = os.path.basename(path)
        try:
            table = _read(self._path("net", "unix")).decode("utf-8", "replace")
            fds = os.listdir(self._path("fd"))
        except (FileNotFoundError, ProcessLookupError):
            return False
        links = set()
        for fd in fds:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                links.add(os.readlink(self._path("fd", fd)))
        for line in table.splitlines()[1:]:
            # Num RefCount Protocol Flags Type St Inode Path
            fields = line.split(None, 7)
            if len(fields) == 8 and int(fields[3], 16) & _SO_ACCEPTCON \
                    and os.path.basename(fields[7]) == name and f"socket:[{fields[6]}]" in links:  # fmt: skip
                return True
        return False

    def has_kvm(self) -> bool:
        """Whether it runs a KVM guest."""
        try:
            return any(
                os.readlink(self._path("fd", name)) == "anon_inode:kvm-vm"
                for name in os.listdir(self._path("fd"))
            )
        except FileNotFoundError:
            return False


def _elsewhere(namespace: str) -> str | None:
    return None if namespace == os.readlink(netns.OWN) else namespace


def _address(family: int, address: Any) -> str:
    if family == socket.AF_UNIX:
        # An abstract name is bytes, and begins with a zero.
        return os.fsdecode(address)
    host = f"[{address[0]}]" if family == socket.AF_INET6 else address[0]
    return f"{host}:{address[1]}"


def served(files: Iterable[str]) -> list[str]:
    """Devices among the open files that the kernel serves by way of vhost, but for a network's."""
    return sorted({path for path in files if _VHOST.fullmatch(path)})


def passed_through(files: Iterable[str], sysfs: Path = SYSFS) -> list[str]:
    """PCI addresses of the devices behind those of the open files that are VFIO's.

    A group is one process's, but has bridges in it as well. A part of a device (mdev) is not
    among them, nor a device that is given away in parts: its DMA is that of other guests, too.
    """
    found: set[str] = set()
    for path in files:
        if match := _VFIO_GROUP.fullmatch(path):
            group = sysfs / "kernel/iommu_groups" / match[1] / "devices"
            devices = list(group.iterdir()) if group.is_dir() else []
            found.update(d.name for d in devices if "vfio" in _link(d / "driver") and _is_whole(d))
        elif match := _VFIO_DEVICE.fullmatch(path):
            device = (sysfs / "class/vfio-dev" / match[1] / "device").resolve()
            if _is_whole(device):
                found.add(device.name)
    return sorted(found)


def _is_whole(device: Path) -> bool:
    return _link(device / "subsystem") == "pci" and not (device / "mdev_supported_types").exists()


def _link(path: Path) -> str:
    """The last part of what a link in sysfs names, "" if there is none."""
    return path.resolve().name if path.exists() else ""


def _read(path: str) -> bytes:
    """A file of /proc. A guest waits for dozens of them, and open() takes longer for one than the kernel."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = [os.read(fd, _AT_ONCE)]
        # A short read is not the end.
        while parts[-1]:
            parts.append(os.read(fd, _AT_ONCE))
    finally:
        os.close(fd)
    return b"".join(parts)


def read_start(pid: int) -> int | None:
    """Start of a process in ticks since boot, None if there is none."""
    try:
        data = _read(f"{_PROC}/{pid}/stat").decode("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = data.rpartition(")")[2].split()
    if len(fields) < 20:
        raise GuardError(f"/proc/{pid}/stat is not as proc(5) says")
    return int(fields[19])


def _ended(pidfd: int, limit: float = 0.0) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(limit * 1000))
