# SPDX-License-Identifier: MIT
"""/dev/hwerr as a Python file: open, read, filter, seek, count, publish."""

from __future__ import annotations

import builtins
import errno
import fcntl
import math
import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any, Literal, Self

from ._uapi import ffi, lib
from .enums import Severity, Source
from .event import RECORD_MAX, Event, Guest, Stop, Task, encode, parse
from .layout import Layout
from .names import Names

__all__ = ["DEFAULT_PATH", "Device", "DeviceInfo", "Filter", "Guard", "Since", "Stats", "open"]

DEFAULT_PATH = "/dev/hwerr"

# Where to begin: with what comes, the oldest record held, the oldest of this boot, a number.
Since = Literal["now", "oldest", "boot"] | int

_READ_SIZE = 16 * RECORD_MAX

_IOC_INFO = Layout("hwerr_ioc_info")
_IOC_STATS = Layout("hwerr_ioc_stats")
_IOC_FILTER = Layout("hwerr_ioc_filter")
_IOC_SEEK = Layout("hwerr_ioc_seek")
_IOC_GUARD = Layout("hwerr_ioc_guard")
_IOC_STOP = Layout("hwerr_ioc_stop")
_IOC_GUARDS = Layout("hwerr_ioc_guards")
_GUARD_ENTRY = Layout("hwerr_guard_entry")

# Every reader of one process asks about the same VMs.
_names = Names()


@dataclass(frozen=True, slots=True)
class Filter:
    """What a reader wants to see; an empty set and None mean "all".

    `severities` and `sources` are sets, `pid` a process that a record must hit.
    """

    severities: frozenset[Severity] = frozenset()
    sources: frozenset[Source] = frozenset()
    pid: int | None = None

    def admits(self, event: Event) -> bool:
        """Whether it is one of those."""
        owners: tuple[Guest | Task, ...] = (*event.guests, *event.tasks)
        return (
            (not self.severities or event.severity in self.severities)
            and (not self.sources or event.source in self.sources)
            and (self.pid is None or self.pid in {o.pid for o in owners})
        )


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What the file is. `scope` is "all", or "self" for a reader that sees its own events only.

    `oldest_seq` and `next_seq` are 0 where there is none or the scope withholds them.
    """

    abi_version: int
    record_max: int
    sources: frozenset[Source]
    oldest_seq: int
    next_seq: int
    ring_bytes: tuple[int, int]
    scope: Literal["all", "self"]

    def to_json(self) -> dict[str, Any]:
        """For json.dumps(); see docs/json.md."""
        out: dict[str, Any] = {name: getattr(self, name) for name in type(self).__slots__}
        out["sources"] = sorted(s.label for s in self.sources)
        out["ring_bytes"] = list(self.ring_bytes)
        return out


@dataclass(frozen=True, slots=True)
class Stats:
    """Totals since the module was loaded, and (`reader_`) of this reader. See the UAPI header."""

    records: int
    errors: int
    linked: int
    coalesced: int
    evicted: int
    dropped: int
    owners_unknown: int
    by_severity: dict[Severity, int]
    by_source: dict[Source, int]
    readers: int
    reader_read: int
    reader_lost: int
    reader_pending: int

    def to_json(self) -> dict[str, Any]:
        """For json.dumps(); see docs/json.md."""
        out: dict[str, Any] = {name: getattr(self, name) for name in type(self).__slots__}
        out["by_severity"] = {k.label: n for k, n in self.by_severity.items()}
        out["by_source"] = {k.label: n for k, n in self.by_source.items()}
        return out


@dataclass(frozen=True, slots=True)
class Guard:
    """A process whose KVM guests are stopped by an error of that severity or a worse one.

    `start_ns` (CLOCK_BOOTTIME) and `pid` together are the process's identity. `keep`: it
    outlives the file it was armed through. `stops` counts, `stopped_ns` (CLOCK_MONOTONIC) is
    the last, 0 if there was none.
    """

    pid: int
    start_ns: int
    severity: Severity
    keep: bool
    stops: int
    stopped_ns: int


def _mask(members: Iterable[int]) -> int:
    mask = 0
    for member in members:
        mask |= 1 << member
    return mask


def _bits(mask: int) -> list[int]:
    return [n for n in range(mask.bit_length()) if mask >> n & 1]


def _pid_of(pidfd: int) -> int:
    with builtins.open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("Pid:")), 0)


def at_least(severity: Severity) -> frozenset[Severity]:
    """That severity and every worse one; empty, which means all, for the least."""
    if severity <= min(Severity):
        return frozenset()
    return frozenset(s for s in Severity if s >= severity)


def filter_severities(
    severity: Severity | None, severities: Iterable[Severity], pid: int | None
) -> frozenset[Severity]:
    """What `set_filter`'s arguments ask for; TypeError and ValueError if they make no sense."""
    exact = frozenset(severities)
    if severity is not None and exact:
        raise TypeError("give severity, the least, or severities, but not both")
    if pid is not None and not 0 < pid < 1 << 31:
        raise ValueError(f"{pid} is no process number")
    return at_least(severity) if severity is not None else exact


class Device:
    """An open /dev/hwerr: one cursor, one filter, one loss counter.

    A context manager; iterating over it waits for the next event. Not for several
    threads at once: open it once in each. Errors of the system come as OSError.
    """

    def __init__(
        self, fd: int, *, nonblock: bool = False, names: Names | None = None, this_boot_only: bool = False
    ) -> None:
        """Takes over `fd`, which must be open with O_NONBLOCK. Use `open()`."""
        self._fd = fd
        self._nonblock = nonblock
        self._names = names
        self._skip_earlier = this_boot_only
        self._carried = 0
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._ready: deque[Event] = deque()

    def __repr__(self) -> str:
        return f"<Device {'closed' if self._fd < 0 else f'fd {self._fd}'}>"

    def fileno(self) -> int:
        """For select, poll, epoll. Readable means that `drain()` has something. ValueError if closed."""
        if self._fd < 0:
            raise ValueError("the device is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        """Closes it; a second time does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    # -- reading ---------------------------------------------------------------

    def _wait(self, timeout: float | None) -> bool:
        self.fileno()
        # Rounded up: a wait that ends too early would be repeated without pause.
        ms = None if timeout is None else max(0, math.ceil(timeout * 1000))
        return bool(self._poll.poll(ms))

    def read_nonblocking(self) -> list[Event]:
        """As many events as one read(2) gives, oldest first; [] if there is none.

        Iteration may have taken some of them from the kernel already: they come first.
        """
        if self._ready:
            events = list(self._ready)
            self._ready.clear()
            return events
        while True:
            try:
                data = os.read(self.fileno(), _READ_SIZE)
            except BlockingIOError:
                return []
            events = parse(data)
            if self._skip_earlier or self._carried:
                events = self._kept(events, lambda e: not (self._skip_earlier and e.earlier_boot))
            if self._names:
                events = [e.named(self._names) for e in events]
            if events:
                return events

    def _kept(self, events: Iterable[Event], wanted: Callable[[Event], bool]) -> list[Event]:
        """Those wanted; what was lost before one that is not is told with the next that is."""
        kept = []
        for event in events:
            if not wanted(event):
                self._carried += event.lost
                continue
            if self._carried:
                event = event.with_lost(event.lost + self._carried)
                self._carried = 0
            kept.append(event)
        return kept

    def drain(self) -> list[Event]:
        """Everything there is now, without waiting; not what a storm adds meanwhile."""
        # A reader of its own errors only is not told numbers; nobody has a storm of those.
        end = self.info().next_seq
        events: list[Event] = []
        while more := self.read_nonblocking():
            events += more
            if end and more[-1].seq + 1 >= end:
                break
        return events

    def read(self, timeout: float | None = None) -> list[Event]:
        """Waits until there is something, at most `timeout` seconds; [] if nothing came.

        None waits for ever, unless the device was opened with `nonblock`. PermissionError if another
        process opened it, for its own errors, which has ended, or may more than it might then.
        """
        if timeout is None and self._nonblock:
            timeout = 0
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if events := self.read_nonblocking():
                return events
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return []
            self._wait(left)

    def __iter__(self) -> Iterator[Event]:
        """Events, one by one, for ever; with `nonblock` to the end of what is there."""
        while events := self.read():
            self._ready.extend(events)
            del events
            while self._ready:
                yield self._ready.popleft()

    # -- control ---------------------------------------------------------------

    def _ioctl(self, request: int, layout: Layout, fields: dict[str, Any] | None = None) -> dict[str, Any]:
        buffer = bytearray(layout.pack(fields or {}))
        fcntl.ioctl(self.fileno(), request, buffer)
        return layout.unpack(bytes(buffer))

    def info(self) -> DeviceInfo:
        """What the file is and holds."""
        f = self._ioctl(lib.HWERR_IOC_INFO, _IOC_INFO)
        return DeviceInfo(
            abi_version=f["abi_version"],
            record_max=f["record_max"],
            sources=frozenset(map(Source, _bits(f["sources"]))),
            oldest_seq=f["oldest_seq"],
            next_seq=f["next_seq"],
            ring_bytes=f["ring_bytes"],
            scope="self" if f["scope"] == lib.HWERR_SCOPE_SELF else "all",
        )

    def stats(self) -> Stats:
        """Totals, and this reader's."""
        f = self._ioctl(lib.HWERR_IOC_STATS, _IOC_STATS)
        # Slots beyond what either side names are shown only if something is in them.
        severities = {Severity(n): v for n, v in enumerate(f["by_severity"]) if v or Severity(n).known}
        sources = {Source(n): v for n, v in enumerate(f["by_source"]) if v or Source(n).known}
        return Stats(**f | {"by_severity": severities, "by_source": sources})

    def get_filter(self) -> Filter:
        """The filter in force."""
        f = self._ioctl(lib.HWERR_IOC_GET_FILTER, _IOC_FILTER)
        return Filter(
            frozenset(map(Severity, _bits(f["severities"]))),
            frozenset(map(Source, _bits(f["sources"]))),
            f["tgid"] or None,
        )

    def set_filter(
        self,
        *,
        severity: Severity | None = None,
        severities: Iterable[Severity] = (),
        sources: Iterable[Source] = (),
        pid: int | None = None,
    ) -> None:
        """Replaces the filter, for all records not yet read, and for events that iteration has not given yet.

        `severity` is the least wanted, `severities` the exact ones; not both (TypeError).
        PermissionError for a `pid` that is not one's own, if that is all one may see.
        """
        wanted = filter_severities(severity, severities, pid)
        fields = {"severities": _mask(wanted), "sources": _mask(sources), "tgid": pid or 0}
        self._ioctl(lib.HWERR_IOC_SET_FILTER, _IOC_FILTER, fields)
        self._sift()

    def _sift(self) -> None:
        """Leaves what the filter wants of what iteration has taken already; no loss untold."""
        # What is carried already was lost behind these.
        later, self._carried = self._carried, 0
        self._ready = deque(self._kept(self._ready, self.get_filter().admits))
        self._carried += later

    def seek(self, since: Since) -> None:
        """Moves the cursor. ValueError for a number beyond the next record's, or below 1."""
        match since:
            case "now":
                fields = {"whence": lib.HWERR_SEEK_NOW}
            case "oldest" | "boot":
                fields = {"whence": lib.HWERR_SEEK_OLDEST}
            case int():
                fields = {"whence": lib.HWERR_SEEK_SEQ, "seq": since}
            case _:
                raise ValueError(f"since is one of now, oldest, boot, or a number, not {since!r}")
        if isinstance(since, int) and not 0 < since < 1 << 64:
            raise ValueError(f"{since} is no sequence number: they begin at 1")
        try:
            self._ioctl(lib.HWERR_IOC_SEEK, _IOC_SEEK, fields)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            following = self.info().next_seq or "unknown"
            raise ValueError(f"no record {since} yet: the next is {following}") from None
        self._skip_earlier = since == "boot"
        self._carried = 0
        self._ready.clear()

    def guard(self, pidfd: int, severity: Severity, *, keep: bool = False) -> None:
        """Arms a process: an error that hits it and is as severe stops its KVM guests.

        They are stopped before the event can be read, and for a machine check before
        memory_failure(). `severity` is deferred or worse. Without `keep` the guard ends when
        this device is closed; it always ends with the process. Arming again replaces it.
        PermissionError without CAP_SYS_ADMIN, unless the process is one's own;
        ProcessLookupError if it has ended.
        """
        fields = {
            "pidfd": pidfd,
            "severity": int(severity),
            "flags": lib.HWERR_GUARD_KEEP if keep else 0,
        }
        self._ioctl(lib.HWERR_IOC_GUARD, _IOC_GUARD, fields)

    def unguard(self, pidfd: int) -> None:
        """Disarms a process. FileNotFoundError if it was not armed; else as `guard`."""
        fields = {"pidfd": pidfd, "flags": lib.HWERR_GUARD_REMOVE}
        self._ioctl(lib.HWERR_IOC_GUARD, _IOC_GUARD, fields)

    def stop(self, pidfd: int) -> Stop:
        """Stops the KVM guests of a process now: each vCPU's KVM_RUN returns EIO, once.

        OSError with ENXIO if it has none; else as `guard`.
        """
        f = self._ioctl(lib.HWERR_IOC_STOP, _IOC_STOP, {"pidfd": pidfd})
        return Stop(pid=_pid_of(pidfd), vcpus=f["vcpus"], running=f["running"], mono_ns=f["stopped_ns"])

    def guards(self) -> list[Guard]:
        """The guards there are; without CAP_SYS_ADMIN one's own."""
        room = 64
        while True:
            entries = ffi.new("struct hwerr_guard_entry[]", room)
            fields = {"entries": int(ffi.cast("uintptr_t", entries)), "count": room}
            count = self._ioctl(lib.HWERR_IOC_GUARDS, _IOC_GUARDS, fields)["count"]
            if count <= room:
                break
            room = 2 * count
        raw = bytes(ffi.buffer(entries))
        found = []
        for n in range(count):
            f = _GUARD_ENTRY.unpack(raw, n * _GUARD_ENTRY.size)
            found.append(
                Guard(
                    pid=f["tgid"],
                    start_ns=f["start_ns"],
                    severity=Severity(f["severity"]),
                    keep=bool(f["flags"] & lib.HWERR_GUARD_KEEP),
                    stops=f["stops"],
                    stopped_ns=f["stopped_ns"],
                )
            )
        return found

    def publish(self, *events: Event | bytes) -> None:
        """Writes records, all or none, marked as from software; see `build()`.

        PermissionError unless opened with `publish` by somebody with CAP_SYS_ADMIN,
        ValueError if the kernel finds one of them wrong or there are too many.
        """
        data = encode(events)
        try:
            os.write(self.fileno(), data)
        except OSError as error:
            if error.errno == errno.EBADF:
                raise PermissionError(errno.EPERM, "the device was not opened with publish=True") from None
            if error.errno == errno.EINVAL:
                raise ValueError(
                    f"the kernel refused {len(events)} records of {len(data)} bytes: "
                    "a field or an info is not as the header says, or they are too many for one write"
                ) from None
            raise


_ABSENT = (errno.ENOENT, errno.ENODEV, errno.ENXIO)


@lru_cache(maxsize=1)
def _say_without_module(missing: str) -> None:
    """Once. Goes to stderr where the program has not set up logging."""
    import logging  # only here: a command has to start at once

    text = f"{DEFAULT_PATH} is not there: hardware errors are taken from tracepoints by BPF"
    logging.getLogger("hwerr_notify").warning("%s%s", text, missing)


def _without_module(absent: OSError, nonblock: bool, names: Names | None) -> Device:
    # Imported where it runs: most hosts have the module.
    from .moduleless import Moduleless

    try:
        device = Moduleless(nonblock=nonblock, names=names)
    except OSError as error:
        reason = f"{os.strerror(absent.errno or 0)}; and it does not go without the module: {error.strerror}"
        raise FileNotFoundError(absent.errno, reason, absent.filename) from None
    missing = "".join(f"; {name}: {reason}" for name, reason in device.missing.items())
    _say_without_module(missing)
    return device


def open(
    path: str | os.PathLike[str] = DEFAULT_PATH,
    *,
    severity: Severity | None = None,
    severities: Iterable[Severity] = (),
    sources: Iterable[Source] = (),
    pid: int | None = None,
    since: Since = "now",
    nonblock: bool = False,
    publish: bool = False,
    names: bool = True,
    module: bool = False,
) -> Device:
    """Opens the device and returns a `Device`, filtered and positioned.

    Where /dev/hwerr is not there, and the caller may load BPF programs, the errors are taken
    from the kernel's tracepoints instead (`moduleless.Moduleless`), and that is said on stderr, once.

    Args:
        severity: the least wanted; or `severities`, exactly those wanted.
        sources: those wanted, all if none is given.
        pid: only events that hit this process.
        since: "now", "oldest" held, "boot" (oldest of this boot), or a sequence number.
        nonblock: read() without a timeout and iteration do not wait.
        publish: open for write() too.
        names: look up the names and UUIDs of VMs in /proc and libvirt's files; of those that
            run now at once, so that one that an error kills has its name all the same.
        module: only by the module, as what publishes, guards or stops needs it.

    OSError: FileNotFoundError if the module is not loaded and it does not go without,
    PermissionError if the file may not be opened. ValueError and TypeError for arguments that
    make no sense.
    """
    flags = (os.O_RDWR if publish else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC
    device: Device
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if module or publish or os.fspath(path) != DEFAULT_PATH or error.errno not in _ABSENT:
            raise
        device = _without_module(error, nonblock, _names if names else None)
    else:
        device = Device(fd, nonblock=nonblock, names=_names if names else None)
    if names:
        _names.learn()
    try:
        device.set_filter(severity=severity, severities=severities, sources=sources, pid=pid)
        if since != "now":
            device.seek(since)
    except BaseException:
        device.close()
        raise
    return device
