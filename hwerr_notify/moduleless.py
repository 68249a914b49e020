# SPDX-License-Identifier: MIT
"""Hardware errors without hwerr.ko: BPF programs on the tracepoints that its sources are made of.

A `Moduleless` is read like a `Device` and gives the same events; what is weaker is in
docs/moduleless.md. Its programs (bpf/hardware.bpf.c) classify an error and find its owners
when it is reported; what is done here is what the module does with a finished draft: it
counts repetitions, links the records of one error, and numbers them. All of that is this
reader's own: programs, numbers and totals begin with it and end with it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import select
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ._uapi import lib as uapi
from .bpf import BpfError, BpfObject, Map, Ring, _library, kernel_has_type, unreadable
from .bpf import unavailable as bpf_unavailable
from .device import Device, DeviceInfo, Filter, Since, Stats, _bits, _mask, filter_severities
from .enums import Component, Flags, GuestFlags, Kind, Severity, Source, TaskFlags
from .event import _GET, _INFO, RECORD_MAX, Event, Guest, Info, Memory, Pci, Task, _put, build
from .layout import Layout
from .names import Names

__all__ = ["HOOKS", "Moduleless", "unavailable"]

_RINGS = ("hwerr_minor", "hwerr_major")  # info and corrected, and the rest
_COALESCE_NS, _LINK_NS = 10**9, 10 * 10**9
_RECENT_ERRORS, _LINKED_MAX = 32, 64
# Samples taken from a ring buffer for one read.
_BATCH = 512


@dataclass(frozen=True, slots=True)
class Hook:
    """Where one source is looked into: its programs, those of them that only add to the others, and
    the functions that these need."""

    name: str
    source: Source
    programs: tuple[str, ...]
    extra: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()


HOOKS = (
    Hook("mce", Source.MCE, ("hwerr_mce",)),
    Hook("aer", Source.AER, ("hwerr_aer",)),
    Hook("edac", Source.EDAC, ("hwerr_edac",)),
    Hook("memory_failure", Source.MEMORY_FAILURE, ("hwerr_memfail",),
         ("hwerr_memfail_enter", "hwerr_memfail_exit"), ("memory_failure",)),
    Hook("extlog", Source.CPER, ("hwerr_extlog",)),
    Hook("firmware", Source.CPER, ("hwerr_firmware",)),
)  # fmt: skip


def unavailable() -> str | None:
    """None if hardware errors can be had without the module here as far as can be told, else why not."""
    return bpf_unavailable(None) or unreadable()


class _EnoughError(Exception):
    """A batch is full."""


class _Programs:
    """The programs, loaded and attached as far as this kernel has what they look into."""

    def __init__(self) -> None:
        """BpfError if none could be attached."""
        self.reasons: dict[str, str] = {}
        self._object = self._load()
        self.attached: list[Hook] = []
        try:
            for hook in HOOKS:
                self._attach(hook)
            if not self.attached:
                raise BpfError(errno.EOPNOTSUPP, "; ".join(sorted(set(self.reasons.values()))))
        except BaseException:
            self.close()
            raise

    def _wanted(self, hook: Hook) -> list[str]:
        extra = hook.extra
        if missing := [f for f in hook.functions if not kernel_has_type(f)]:
            self.reasons[hook.name] = f"the kernel has no {missing[0]}(): owners are not known"
            extra = ()
        return [*hook.programs, *extra]

    def _load(self) -> BpfObject:
        """All programs at once; if one is refused, those that are not."""
        wanted = [name for hook in HOOKS for name in self._wanted(hook)]
        try:
            return self._loaded(wanted)
        except BpfError as all_of_them:
            first = all_of_them
        good: list[str] = []
        for hook in HOOKS:
            try:
                self._loaded(self._wanted(hook)).close()
                good += self._wanted(hook)
            except BpfError as error:
                self.reasons[hook.name] = error.strerror or str(error)
        if not good:
            raise first
        return self._loaded(good)

    @staticmethod
    def _loaded(names: list[str]) -> BpfObject:
        programs = BpfObject("hardware")
        try:
            programs.only(*names)
            programs.load()
        except BaseException:
            programs.close()
            raise
        return programs

    def _attach(self, hook: Hook) -> None:
        loaded = self._object.loaded()
        if not set(hook.programs) <= loaded:
            return
        try:
            # First what sees the beginning of a call: its end is then not seen alone.
            for name in hook.extra:
                if name in loaded:
                    self._object.attach(name)
        except BpfError as error:
            self.reasons[hook.name] = f"{error.strerror}: owners are not known"
        try:
            for name in hook.programs:
                self._object.attach(name)
        except BpfError as error:
            self.reasons[hook.name] = error.strerror or str(error)
            return
        self.attached.append(hook)

    def map(self, name: str) -> Map:
        return Map(os.dup(self._object.map_fd(name)))

    def misses(self) -> dict[Source, int]:
        """Errors that came while the same program ran on that CPU, by source."""
        found: dict[Source, int] = {}
        for hook in self.attached:
            for name in hook.programs:
                found[hook.source] = found.get(hook.source, 0) + self._object.misses(name)
        return found

    def close(self) -> None:
        self._object.close()


# -- from a sample to an event ---------------------------------------------

_vm_key = secrets.token_bytes(16)


@lru_cache(maxsize=1)
def _layouts() -> tuple[Layout, Layout]:
    ffi, _ = _library()
    return Layout("hwerr_hw", ffi), Layout("hwerr_hw_who", ffi)


@lru_cache(maxsize=256)
def _vm_id(kvm: int) -> int:
    """Tells VMs apart, and nothing of where they are in the kernel. Never 0, which stands for none."""
    digest = hashlib.blake2b(kvm.to_bytes(8, "little"), key=_vm_key, digest_size=8).digest()
    return int.from_bytes(digest, "little") | 1


def _time(sample: bytes) -> int:
    head, _ = _layouts()
    time_ns: int = head.unpack(sample)["time_ns"]
    return time_ns


def _chars(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _is_qemu(name: str) -> bool:
    return name.startswith(("qemu-system", "qemu-kvm"))


def _owners(entries: list[dict[str, Any]]) -> list[Guest | Task]:
    """Guests under KVM first, then emulators without it, then the others."""
    kvm: list[Guest | Task] = []
    qemu: list[Guest | Task] = []
    tasks: list[Guest | Task] = []
    _, lib = _library()
    for n, e in enumerate(entries):
        if e["flags"] & (lib.HWERR_HW_SLOT | lib.HWERR_HW_GONE):
            continue
        pid, start, comm = e["tgid"], e["start_ns"], _chars(e["comm"])
        if e["flags"] & lib.HWERR_HW_KVM:
            slots = [s for s in entries if s["flags"] & lib.HWERR_HW_SLOT and s["owner"] == n]
            kvm += [
                Guest(
                    pid, GuestFlags.KVM, start, _vm_id(s["vm"]), s["va"], s["gpa"], s["len"], s["slot"], comm
                )
                for s in slots
            ]
            if not slots:  # the emulator's own memory
                kvm.append(
                    Guest(pid, GuestFlags.KVM, start, _vm_id(e["vm"]), e["va"], None, e["len"], 0, comm)
                )
        elif _is_qemu(comm) or _is_qemu(_chars(e["exe"])):
            qemu.append(Guest(pid, start_ns=start, hva=e["va"], len=e["len"], comm=comm))
        else:
            tasks.append(Task(pid, start_ns=start, va=e["va"], len=e["len"], comm=comm))
    return kvm + qemu + tasks


_BDF = re.compile(r"([0-9a-f]+):([0-9a-f]+):([0-9a-f]+)\.([0-9a-f]+)$", re.IGNORECASE)


def _pci_of(info: Pci, name: str) -> tuple[Pci, bool]:
    """The info with what the name of its device tells, and whether there is such a device."""
    match = _BDF.match(name)
    if not match:
        return info, False
    domain, bus, dev, fn = (int(part, 16) for part in match.groups())
    info = replace(info, domain=domain, bus=bus, devfn=dev << 3 | fn, vendor=0xFFFF, device=0xFFFF)
    root = Path("/sys/bus/pci/devices", info.address)
    try:
        vendor, device = (int((root / f).read_text("ascii"), 16) for f in ("vendor", "device"))
    except (OSError, ValueError):
        return info, False
    return replace(info, vendor=vendor, device=device), True


def _holders(address: str) -> list[Guest | Task]:
    """Who holds a PCI device that is bound to a VFIO driver."""
    from .bpf import start_of
    from .probe import runs_kvm

    root = Path("/sys/bus/pci/devices", address)
    try:
        if "vfio" not in os.path.basename(os.readlink(root / "driver")):
            return []
        wanted = {f"/dev/vfio/{os.path.basename(os.readlink(root / 'iommu_group'))}"}
        wanted |= {f"/dev/vfio/devices/{path.name}" for path in root.glob("vfio-dev/*")}
    except OSError:
        return []
    found: list[Guest | Task] = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if not any(os.readlink(f) in wanted for f in (process / "fd").iterdir()):
                continue
            pid = int(process.name)
            comm = (process / "comm").read_text("utf-8", "backslashreplace").rstrip("\n")
            start = start_of(pid)
            exe = os.path.basename(os.readlink(process / "exe"))
        except OSError:
            continue
        if runs_kvm(pid):
            found.append(Guest(pid, GuestFlags.KVM | GuestFlags.DEVICE, start, comm=comm))
        elif _is_qemu(comm) or _is_qemu(exe):
            found.append(Guest(pid, GuestFlags.DEVICE, start, comm=comm))
        else:
            found.append(Task(pid, TaskFlags.DEVICE, start, comm=comm))
    return found


def _compose(sample: bytes) -> tuple[Event, tuple[int, ...]]:
    """The event a sample tells of, without number and id, and what its repetitions have in common."""
    head, who = _layouts()
    f = head.unpack(sample)
    flags = Flags(f["flags"])
    infos: list[Info] = []
    text = _chars(f["text"])
    if f["body_len"]:
        raw = f["body"][: f["body_len"]]
        raw += sample[head.size : head.size + f["data_len"]]
        raw += bytes(-len(raw) % 8)
        _, kind, _ = _INFO.struct.unpack_from(raw)
        infos.append(_GET[kind](raw, 0, len(raw)))
    ident = f["ident"]
    owners: list[Guest | Task] = []
    match Source(f["source"]):
        case Source.AER:
            assert isinstance(infos[0], Pci)
            pci, known = _pci_of(infos[0], text)
            infos[0], text = pci, ""
            if known:
                owners = _holders(pci.address)
            else:
                flags |= Flags.OWNERS_UNKNOWN
            if f["severity"] <= Severity.CORRECTED:
                ident = (pci.domain, pci.bus << 8 | pci.devfn, pci.status, f["raw_severity"])
        case Source.EDAC:
            text = ": ".join(filter(None, (text, _chars(f["detail"]))))
        case Source.MEMORY_FAILURE:
            text += " (simulated)" if f["mf_flags"] else ""
    if f["phys_len"]:
        infos.append(Memory(f["phys_addr"], f["phys_len"], f["resolve_ns"], f["mf_type"], f["mf_result"]))
        owners += _owners([who.unpack(sample, head.size + n * who.size) for n in range(f["whos"])])
    room = RECORD_MAX - 512 - sum(len(_put(i)) for i in infos)
    for owner in owners:
        room -= len(_put(owner))
        if room < 0:
            flags |= Flags.OWNERS_TRUNCATED
            break
        infos.append(owner)
    event = build(
        *infos,
        severity=Severity(f["severity"]),
        source=Source(f["source"]),
        kind=Kind(f["kind"]),
        component=Component(f["component"]),
        flags=flags,
        cpu=f["cpu"],
        count=f["count"],
        raw_severity=f["raw_severity"],
        text=text or None,
        time_mono_ns=f["time_ns"],
        time_real_ns=time.time_ns() - time.monotonic_ns() + f["time_ns"],
    )
    return event, ident


# -- repetitions, and several records of one error: kmod/record.c ------------


@dataclass(slots=True)
class _Recent:
    """A corrected error that may repeat: its first record, and repetitions until the end of its window."""

    ident: tuple[int, ...]
    until: int
    id: int = 0
    pending: int = 0
    linked: bool = False
    last: Event | None = None


@dataclass(slots=True)
class _Linked:
    """Memory hit within the last seconds, and the worst that was said of it."""

    addr: int
    len: int
    id: int
    mono_ns: int
    sources: set[int]
    severity: Severity


class _Book:
    """Numbers, links, counts."""

    def __init__(self) -> None:
        self.next_seq = 1
        self.records = self.errors = self.linked = self.coalesced = self.owners_unknown = 0
        self.by_severity: dict[Severity, int] = dict.fromkeys(Severity, 0)
        self.by_source: dict[Source, int] = dict.fromkeys(Source, 0)
        self._recent: list[_Recent] = []
        self._links: deque[_Linked] = deque(maxlen=_LINKED_MAX)

    def count(self, severity: Severity, source: Source, n: int) -> None:
        self.errors += n
        self.by_severity[severity] += n
        self.by_source[source] += n

    def _repeats(self, event: Event, ident: tuple[int, ...], now: int) -> _Recent | bool | None:
        """True if it was counted with its first; else the entry that its repetitions will find, if any."""
        self._recent = [r for r in self._recent if r.pending or r.until > now]
        for r in self._recent:
            if r.ident == ident:
                r.pending += event.count
                r.last = event
                self.coalesced += event.count
                if not r.linked:
                    self.count(event.severity, event.source, event.count)
                return True
        if len(self._recent) >= _RECENT_ERRORS:
            idle = [r for r in self._recent if not r.pending]
            if not idle:
                return None
            self._recent.remove(min(idle, key=lambda r: r.until))
        entry = _Recent(ident, now + _COALESCE_NS)
        self._recent.append(entry)
        return entry

    def _link(self, event: Event, m: Memory, now: int) -> tuple[int, Severity]:
        """Number of the first record of the same error, 0 if this is it, and the severity counted for it."""
        corrected = event.severity <= Severity.CORRECTED
        for link in reversed(self._links):
            if (
                now - link.mono_ns > _LINK_NS
                or m.phys_addr + m.phys_len <= link.addr
                or link.addr + link.len <= m.phys_addr
                or corrected != (link.severity <= Severity.CORRECTED)
            ):
                continue
            if event.source in link.sources:
                break
            link.sources.add(event.source)
            counted = link.severity
            link.severity = max(counted, event.severity)
            return link.id, counted
        return 0, event.severity

    def _number(self, event: Event, id: int, flags: Flags, count: int | None = None) -> Event:
        seq, self.next_seq = self.next_seq, self.next_seq + 1
        self.records += 1
        if Flags.OWNERS_UNKNOWN in event.flags:
            self.owners_unknown += 1
        return event.numbered(seq, id or seq, event.flags | flags, event.count if count is None else count)

    def enter(self, event: Event, ident: tuple[int, ...]) -> Event | None:
        """The event with its number, or None if it is a repetition."""
        now = event.time_mono_ns
        entry: _Recent | None = None
        if event.severity <= Severity.CORRECTED and any(ident):
            found = self._repeats(event, (event.source, *ident), now)
            if found is True:
                return None
            entry = found or None
        id, counted = 0, event.severity
        if event.memory:
            id, counted = self._link(event, event.memory, now)
        done = self._number(event, id, Flags.LINKED if id else Flags(0))
        if id:
            self.linked += 1
            if counted < event.severity:
                self.by_severity[counted] -= 1
                self.by_severity[event.severity] += 1
        else:
            self.count(event.severity, event.source, event.count)
            if m := event.memory:
                self._links.append(
                    _Linked(m.phys_addr, m.phys_len, done.id, now, {event.source}, event.severity)
                )
        if entry:
            entry.id, entry.linked = done.id, bool(id)
        return done

    def due(self) -> int:
        """When the next window with repetitions ends, CLOCK_MONOTONIC; 0 if there is none."""
        return min((r.until for r in self._recent if r.pending), default=0)

    def over(self, now: int) -> list[Event]:
        """A record for each window that is over and had repetitions."""
        told = []
        for r in self._recent:
            if r.pending and r.until <= now and r.last is not None:
                flags = Flags.COALESCED | (Flags.LINKED if r.linked else Flags(0))
                told.append(self._number(r.last, r.id, flags, r.pending))
                if r.linked:
                    self.linked += 1
                r.pending, r.until = 0, now + _COALESCE_NS
        return told


# -- the reader --------------------------------------------------------------


def _needs_module(what: str) -> OSError:
    return OSError(errno.EOPNOTSUPP, f"{what} takes the module hwerr, which is not loaded")


class Moduleless(Device):
    """A reader of hardware errors that has programs of its own instead of /dev/hwerr.

    As a `Device`, but that what would need the module (publishing, guards, stopping) is an
    OSError with EOPNOTSUPP, and that it holds no history. `missing` says what is not seen, and why.
    """

    def __init__(self, *, nonblock: bool = False, names: Names | None = None) -> None:
        """Loads and attaches the programs; BpfError with the reason if it cannot be done."""
        if reason := unavailable():
            raise BpfError(errno.EOPNOTSUPP, reason)
        self._fd = -1  # for __del__, should it fail
        self._filter = Filter()
        self._book = _Book()
        self._samples: list[tuple[int, bytes]] = []
        self._room = 0
        self._read = self._lost = self._pending = 0
        self._passed: dict[tuple[int, int], int] = {}
        _, self._lib = _library()
        with contextlib.ExitStack() as undo:
            self._programs = _Programs()
            undo.callback(self._programs.close)
            self.missing: dict[str, str] = dict(self._programs.reasons)
            self._maps = []
            for name in (*_RINGS, "hwerr_dropped"):
                self._maps.append(self._programs.map(name))
                undo.callback(self._maps[-1].close)
            self._dropped = self._maps[-1]
            self._timer = self._lib.hwerr_timer_new()
            undo.callback(os.close, self._timer)
            self._epoll = select.epoll()
            undo.callback(self._epoll.close)
            self._epoll.register(self._timer, select.EPOLLIN)
            self._rings = []
            for buffer in self._maps[:-1]:
                self._rings.append(Ring(buffer, self._sample))
                undo.callback(self._rings[-1].close)
                self._epoll.register(self._rings[-1].fileno(), select.EPOLLIN)
            super().__init__(self._epoll.fileno(), nonblock=nonblock, names=names)
            self._undo = undo.pop_all()

    def close(self) -> None:
        if self._fd < 0:
            return
        self._fd = -1
        self._undo.close()

    @property
    def hooks(self) -> list[str]:
        """What is attached."""
        return [hook.name for hook in self._programs.attached]

    # -- reading ---------------------------------------------------------------

    def _sample(self, sample: bytes) -> None:
        self._samples.append((int.from_bytes(sample[:8], "little"), sample))
        self._room -= 1
        if self._room <= 0:
            raise _EnoughError

    def _take(self) -> tuple[list[Event], int]:
        """The events of what is in the ring buffers, up to a batch, and of windows that are over.

        And when the last of that was reported (CLOCK_MONOTONIC), 0 if nothing was there: of a batch may
        be left nothing, if all are repetitions.
        """
        self.fileno()
        for ring in self._rings:
            self._room = _BATCH
            with contextlib.suppress(_EnoughError):
                ring.consume()
        samples, self._samples = sorted(self._samples), []
        last = _time(samples[-1][1]) if samples else 0
        events = []
        for _, sample in samples:
            event = self._book.enter(*_compose(sample))
            if event is not None:
                events.append(event)
        events += self._book.over(time.monotonic_ns())
        self._lib.hwerr_timer_set(self._timer, self._book.due())
        return events, last

    def _wants_class(self, severity: int, source: int) -> bool:
        f = self._filter
        return (not f.severities or severity in f.severities) and (not f.sources or source in f.sources)

    def _settle(self) -> int:
        """Counts what there was no room for, of the classes wanted; returns all there ever was."""
        raw = self._dropped[bytes(4)]
        now = {divmod(n, 16): int.from_bytes(raw[8 * n : 8 * n + 8], "little") for n in range(len(raw) // 8)}
        # How bad those were is not known: as bad as must not be kept from anybody.
        for missed, n in self._programs.misses().items():
            key = int(Severity.FATAL), int(missed)
            now[key] = now.get(key, 0) + n
        for (severity, source), n in now.items():
            more = n - self._passed.get((severity, source), 0)
            if more:
                self._book.count(Severity(severity), Source(source), more)
                if self._wants_class(severity, source):
                    self._pending += more
                    self._lost += more
        self._passed = now
        return sum(now.values())

    def drain(self) -> list[Event]:
        """Everything there is now, without waiting; not what a storm adds meanwhile."""
        began = time.monotonic_ns()
        events: list[Event] = []
        while more := self.read_nonblocking():
            events += more
            # Numbers are given when they are taken; the time is when it happened.
            if more[-1].time_mono_ns > began:
                break
        return events

    def read_nonblocking(self) -> list[Event]:
        """As many events as there are, oldest first; [] if there is none."""
        if self._ready:
            events = list(self._ready)
            self._ready.clear()
            return events
        began = time.monotonic_ns()
        while True:
            taken, last = self._take()
            events = [e for e in taken if self._filter.admits(e)]
            # What is wanted may be behind a batch in which nothing is; a storm is not waited out.
            if events or not last or last > began:
                break
        if not events:
            return []
        self._settle()
        if self._pending:
            events[0] = events[0].with_lost(self._pending)
            self._pending = 0
        self._read += len(events)
        return [e.named(self._names) for e in events] if self._names else events

    # -- control ---------------------------------------------------------------

    def info(self) -> DeviceInfo:
        minor, major = (ring.max_entries for ring in self._maps[:-1])
        return DeviceInfo(
            abi_version=uapi.HWERR_ABI_VERSION,
            record_max=RECORD_MAX,
            sources=frozenset(hook.source for hook in self._programs.attached),
            oldest_seq=0,
            next_seq=self._book.next_seq,
            ring_bytes=(minor, major),
            scope="all",
        )

    def stats(self) -> Stats:
        dropped = self._settle()
        b = self._book
        return Stats(
            records=b.records, errors=b.errors, linked=b.linked, coalesced=b.coalesced, evicted=0,
            dropped=dropped, owners_unknown=b.owners_unknown, by_severity=dict(b.by_severity),
            by_source=dict(b.by_source), readers=1, reader_read=self._read, reader_lost=self._lost,
            reader_pending=self._pending,
        )  # fmt: skip

    def get_filter(self) -> Filter:
        return self._filter

    def set_filter(
        self,
        *,
        severity: Severity | None = None,
        severities: Iterable[Severity] = (),
        sources: Iterable[Source] = (),
        pid: int | None = None,
    ) -> None:
        sources = tuple(sources)
        wanted = filter_severities(severity, severities, pid)
        for members, known in ((wanted, Severity), (sources, Source)):
            if unknown := set(_bits(_mask(members))) - {int(m) for m in known}:
                raise OSError(errno.EINVAL, f"{min(unknown)} is none that is known")
        # What was lost until now, was lost under the old filter.
        self._settle()
        self._filter = Filter(wanted, frozenset(sources), pid)
        self._sift()
        self._pending += self._carried
        self._carried = 0

    def seek(self, since: Since) -> None:
        """Moves the cursor; what was read is not held, so a number before the next counts as lost."""
        match since:
            case "now":
                began = time.monotonic_ns()
                while 0 < self._take()[1] <= began:
                    pass
                self._settle()
            case "oldest" | "boot":
                pass
            case int():
                if not 0 < since < 1 << 64:
                    raise ValueError(f"{since} is no sequence number: they begin at 1")
                if since > self._book.next_seq:
                    raise ValueError(f"no record {since} yet: the next is {self._book.next_seq}")
                self._lost += self._book.next_seq - since - self._pending
                self._pending = self._book.next_seq - since
            case _:
                raise ValueError(f"since is one of now, oldest, boot, or a number, not {since!r}")
        if not isinstance(since, int):
            self._lost -= self._pending
            self._pending = 0
        self._ready.clear()

    def _ioctl(self, request: int, layout: Layout, fields: dict[str, Any] | None = None) -> dict[str, Any]:
        raise _needs_module("stopping a VM")

    def publish(self, *events: Event | bytes) -> None:
        raise _needs_module("publishing")
