# SPDX-License-Identifier: MIT
"""The BPF probes: failures of KVM, SIGBUS, block errors, killed VMs, as events of /dev/hwerr.

The probes (bpf/*.bpf.c) write to one ring buffer. They and it are pinned, so they go on
while no loader runs; whoever runs next finds what came meanwhile. Each may be missing
without the others.

Where the module offers a function for it, those that can name by themselves whom it hits
publish by a call of it instead, and need no loader once they are loaded. SIGBUS and block
errors are named, and linked to their cause, by what only a process can look up: they go
through the ring buffer always.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import shutil
import signal
import stat
import struct
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import device as hwerr
from .bpf import (
    OBJECTS,
    PIN_DIR,
    BpfError,
    BpfObject,
    Map,
    Program,
    Ring,
    _library,
    locked,
    module_offers,
    start_of,
    unavailable,
    unreadable,
)
from .enums import Component, Flags, GuestFlags, Kind, Severity, Source
from .event import Block, Event, Guest, Task, Vcpu, build
from .layout import Layout

__all__ = ["DIRECT", "PROBES", "Composer", "ProbeStatus", "Probes", "Publisher", "only_one", "status"]

_EVENTS, _COUNTS, _TOLD = "hwerr_events", "hwerr_counts", "hwerr_told"
_MAPS = (_EVENTS, _COUNTS, _TOLD)
_PUBLISH = "bpf_hwerr_publish"  # kmod/kfunc.c


@dataclass(frozen=True, slots=True)
class ProbeType:
    """What one kind of probe needs: object and programs, and the kernel module they look into.

    `direct`: it can publish by itself. `own`: programs that see events of this kind, if not all.
    """

    name: str
    source: Source
    object: str
    programs: tuple[str, ...]
    module: str | None = None
    direct: bool = False
    own: tuple[str, ...] = ()


# By enum hwerr_probe_type of bpf/probe.h.
PROBES = (
    ProbeType("kvm", Source.KVM, "kvm", ("hwerr_kvm_run", "hwerr_kvm_pio"), "kvm", True, ("hwerr_kvm_run",)),
    ProbeType(
        "panic", Source.PANIC, "kvm", ("hwerr_kvm_run", "hwerr_kvm_pio"), "kvm", True, ("hwerr_kvm_pio",)
    ),
    ProbeType("death", Source.KVM, "process", ("hwerr_signal_kill", "hwerr_vm_release"), "kvm", True),
    ProbeType("sigbus", Source.SIGBUS, "sigbus", ("hwerr_signal_bus",)),
    ProbeType("block", Source.BLOCK, "block", ("hwerr_block_error",)),
)
_OBJECTS = {p.object: p for p in PROBES}
DIRECT = frozenset(p.source for p in PROBES if p.direct)


@dataclass(frozen=True, slots=True)
class ProbeStatus:
    """One probe: attached, or why not; events it passed on and those that were lost on the way.

    `path`: how they come to the device, by the module's function for BPF programs ("kfunc") or
    through hwerr-probe and write() ("write").
    """

    name: str
    attached: bool
    emitted: int
    dropped: int
    reason: str | None = None
    path: str = "write"

    @property
    def way(self) -> str:
        """`path` in words."""
        if self.path == "kfunc":
            return "by the module's function for BPF"
        return "through hwerr-probe and write()"

    def to_json(self) -> dict[str, Any]:
        """For json.dumps(); see docs/json.md."""
        return {"attached": self.attached, "emitted": self.emitted, "dropped": self.dropped,
                "reason": self.reason, "path": self.path}  # fmt: skip


def _digest() -> str:
    """Of the compiled programs: those of another build are another set of pins."""
    digest = hashlib.sha256()
    for name in _OBJECTS:
        path = OBJECTS / f"{name}.bpf.o"
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()[:12]


def _unloaded(probe: ProbeType) -> str | None:
    """Why there is nothing to attach it to; None if there is."""
    if probe.module and not Path("/sys/module", probe.module).exists():
        return f"the kernel module {probe.module} is not loaded"
    return None


def _missed(home: Path, kind: int) -> int:
    """Runs of its programs that the kernel left out, because they ran on that CPU already."""
    missed = 0
    for name in PROBES[kind].own or PROBES[kind].programs:
        with contextlib.suppress(FileNotFoundError), Program.of_link(home / name) as program:
            missed += program.misses()
    return missed


def _counts(home: Path, counts: Map, told: Map, kind: int) -> tuple[int, int]:
    """Events passed on, and lost: for want of room, or left out (`_missed()`)."""
    ffi, _ = _library()
    fields = Layout("hwerr_probe_count", ffi).unpack(counts[kind.to_bytes(4, "little")])
    missed = _told(told, kind)["missed"] + _missed(home, kind)
    return fields["emitted"], fields["dropped"] + missed


def _told(told: Map, kind: int) -> dict[str, int]:
    """Members of struct hwerr_probe_told."""
    ffi, _ = _library()
    return Layout("hwerr_probe_told", ffi).unpack(told[kind.to_bytes(4, "little")])


def _path(told: Map, kind: int) -> str:
    """The `ProbeStatus.path`."""
    return "kfunc" if _told(told, kind)["direct"] else "write"


def status(pin_dir: Path = PIN_DIR) -> list[ProbeStatus]:
    """The probes as they are in the kernel, whoever loaded them; [] if nobody did, or one may not see it."""
    try:
        homes = sorted(pin_dir.glob("probe-*"))
        if not homes:
            return []
        found = []
        with Map.pinned(homes[0] / _COUNTS) as counts, Map.pinned(homes[0] / _TOLD) as told:
            for kind, probe in enumerate(PROBES):
                attached = all((homes[0] / name).exists() for name in probe.programs)
                emitted, dropped = _counts(homes[0], counts, told, kind)
                reason = None if attached else _unloaded(probe) or "hwerr-probe says why when it starts"
                found.append(ProbeStatus(probe.name, attached, emitted, dropped, reason, _path(told, kind)))
        return found
    except (OSError, struct.error):  # struct.error: they are of another version
        return []


def _unread(home: Path) -> Counter[int]:
    """Detaches the probes of another build; how many events nobody read of them, by type.

    What they say may not be as this build has it: they count as lost.
    """
    found: Counter[int] = Counter()
    for probe in PROBES:
        for program in probe.programs:
            (home / program).unlink(missing_ok=True)
    ffi, _ = _library()
    layout = Layout("hwerr_probe_head", ffi)

    def count(sample: bytes) -> None:
        if len(sample) >= layout.size and (kind := layout.unpack(sample)["type"]) < len(PROBES):
            found[kind] += 1

    with contextlib.suppress(OSError), Map.pinned(home / _EVENTS) as events:
        ring = Ring(events, count)
        try:
            ring.consume()
        finally:
            ring.close()
    return found


class Probes:
    """The probes loaded and pinned. A context manager; closing it leaves them in the kernel."""

    def __init__(self, pin_dir: Path = PIN_DIR) -> None:
        """Takes up what is pinned, and attaches what is missing.

        BpfError if nothing can be done at all, BlockingIOError if another has them: of this build
        or of one before.
        """
        if reason := unavailable(pin_dir) or unreadable():
            raise BpfError(errno.EOPNOTSUPP, reason)
        self.home = pin_dir / f"probe-{_digest()}"
        self.reasons: dict[str, str] = {}
        self._maps: dict[str, Map] = {}
        with contextlib.ExitStack() as undo:
            # Before anything is touched: two that attach at once would tell each event twice.
            undo.enter_context(only_one(pin_dir, self.home))
            undo.callback(self._close_maps)
            unread: Counter[int] = Counter()
            for old in pin_dir.glob("probe-*"):
                if old != self.home:
                    unread += _unread(old)
                    shutil.rmtree(old, ignore_errors=True)
            self._attach_all()
            if not self._maps:
                shutil.rmtree(self.home, ignore_errors=True)
                raise BpfError(errno.EOPNOTSUPP, "; ".join(sorted(set(self.reasons.values()))))
            for kind, more in unread.items():
                fields = _told(self._maps[_TOLD], kind)
                self._set_told(kind, {**fields, "missed": fields["missed"] + more})
            self._undo = undo.pop_all()

    def __enter__(self) -> Probes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._undo.close()

    def _close_maps(self) -> None:
        for opened in self._maps.values():
            opened.close()
        self._maps.clear()

    def map(self, name: str) -> Map:
        return self._maps[name]

    def _attach_all(self) -> None:
        offered = module_offers("hwerr", _PUBLISH)
        for name, probe in _OBJECTS.items():
            if all((self.home / program).exists() for program in probe.programs):
                self._take_maps()
                # Loaded when the module was one that did not offer it: loaded anew.
                if not (offered and probe.direct and self._path(name) == "write"):
                    self.reasons.pop(name, None)
                    continue
            if reason := _unloaded(probe):
                self.reasons[name] = reason
                continue
            try:
                if not (offered and probe.direct and self._attach_direct(name, probe)):
                    self._attach(name, probe, direct=False)
                self.reasons.pop(name, None)
            except OSError as error:
                self.reasons[name] = error.strerror or str(error)

    def _attach_direct(self, name: str, probe: ProbeType) -> bool:
        """Whether the kernel takes it with the call."""
        try:
            self._attach(name, probe, direct=True)
        except OSError:
            return False
        return True

    def _take_maps(self) -> None:
        for name in _MAPS:
            if name not in self._maps and (self.home / name).exists():
                self._maps[name] = Map.pinned(self.home / name)

    def _path(self, name: str) -> str:
        kind = next(kind for kind, probe in enumerate(PROBES) if probe.object == name)
        return _path(self._maps[_TOLD], kind)

    def _attach(self, name: str, probe: ProbeType, direct: bool) -> None:
        with BpfObject(name) as programs:
            for known, opened in self._maps.items():
                programs.reuse(known, opened)
            if direct:
                programs.constant("direct", 1)
            programs.load()
            for wanted in _MAPS:
                if wanted not in self._maps:
                    programs.pin_map(wanted, self.home / wanted)
            self._take_maps()
            # What they left out ends with them.
            for kind, other in enumerate(PROBES):
                if other.object == name:
                    fields = _told(self._maps[_TOLD], kind)
                    missed = fields["missed"] + _missed(self.home, kind)
                    self._set_told(kind, {**fields, "missed": missed, "direct": int(direct)})
            # First, so that no two of them tell an event.
            for program in probe.programs:
                (self.home / program).unlink(missing_ok=True)
            for program in probe.programs:
                programs.attach(program)
            for program in probe.programs:
                programs.pin_link(program, self.home / program)

    def retry(self) -> bool:
        """Tries again what was missing; whether something was gained."""
        before = len(self.reasons)
        self._attach_all()
        return len(self.reasons) < before

    def status(self) -> list[ProbeStatus]:
        """Each probe, and why it is not there if it is not."""
        found = []
        for kind, probe in enumerate(PROBES):
            emitted, dropped = self._counts(kind)
            reason = self.reasons.get(probe.object)
            path = _path(self._maps[_TOLD], kind)
            found.append(ProbeStatus(probe.name, reason is None, emitted, dropped, reason, path))
        return found

    def losses(self) -> dict[int, int]:
        """Events lost since `told()` was last called, by type; also those of before this process."""
        lost = {}
        for kind in range(len(PROBES)):
            more = self._counts(kind)[1] - _told(self._maps[_TOLD], kind)["told"]
            if more > 0:
                lost[kind] = more
        return lost

    def told(self, kind: int, more: int) -> None:
        """That so many losses of a type have been made known."""
        fields = _told(self._maps[_TOLD], kind)
        self._set_told(kind, {**fields, "told": fields["told"] + more})

    def _counts(self, kind: int) -> tuple[int, int]:
        return _counts(self.home, self._maps[_COUNTS], self._maps[_TOLD], kind)

    def _set_told(self, kind: int, fields: dict[str, int]) -> None:
        ffi, _ = _library()
        value = Layout("hwerr_probe_told", ffi).pack(fields)
        self._maps[_TOLD].set(kind.to_bytes(4, "little"), bytes(value))


@contextlib.contextmanager
def only_one(pin_dir: Path = PIN_DIR, *homes: Path) -> Iterator[None]:
    """Has the probes that are pinned, and `homes`, for itself. BlockingIOError if another has them."""
    with contextlib.ExitStack() as stack:
        for home in sorted({*pin_dir.glob("probe-*"), *homes}):
            stack.enter_context(locked(home, wait=False))
        yield


def unload(pin_dir: Path = PIN_DIR) -> bool:
    """Detaches all probes and forgets what they hold; whether there were any."""
    homes = list(pin_dir.glob("probe-*"))
    for home in homes:
        shutil.rmtree(home)
    return bool(homes)


# -- from a sample to an event ---------------------------------------------

# linux/kvm.h
_EXIT = {0: "unknown exit", 8: "shutdown", 9: "failed entry", 17: "internal error"}
_EXIT_FAIL_ENTRY, _EXIT_SHUTDOWN, _EXIT_INTERNAL_ERROR, _EXIT_SYSTEM_EVENT = 9, 8, 17, 24
_SUBERROR = {
    1: "emulation failure",
    2: "an exception while another was delivered",
    3: "an event could not be delivered",
    4: "an exit it does not know",
}
_PANICKED, _CRASHLOADED = 1, 2
_BUS_MCEERR_AR = 4
# linux/signal.h: what TRACE_SIGNAL_* results other than 0 mean (trace/events/signal.h).
_SIGNAL_RESULT = {
    1: "which it ignores",
    2: "which was pending already",
    3: "for want of memory not delivered",
    4: "for want of memory without its address",
}
# linux/blk_types.h; the words are those of blk_errors[] in block/blk-core.c. What is beyond has
# other numbers in 6.12 than in 6.1: it is told by its number.
_OP = {0: "read", 1: "write", 2: "flush", 3: "discard", 5: "secure erase", 9: "write zeroes"}
_STATUS = {
    1: "operation not supported", 2: "timeout", 3: "critical space allocation", 4: "recoverable transport",
    5: "critical target", 6: "reservation conflict", 7: "critical medium", 8: "protection",
    9: "kernel resource", 10: "I/O", 11: "dm internal retry", 12: "nonblocking retry",
    13: "device resource",
}  # fmt: skip
# Signals that somebody sends on purpose.
_DELIBERATE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
_DEATH_RAW = 0x10000


def _signal_name(number: int) -> str:
    """As bpf/process.bpf.c: the real-time ones have none."""
    return signal.Signals(number).name if 0 < number < 32 else f"signal {number}"


def _comm(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def runs_kvm(pid: int) -> bool:
    """Whether the process has a KVM VM open."""
    return any(link == "anon_inode:kvm-vm" for link in _open_files(pid))


def _open_files(pid: int) -> Iterator[str]:
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                try:
                    yield os.readlink(entry.path)
                except OSError:
                    continue
    except OSError:
        return


def vms() -> list[int]:
    """Processes that have a KVM VM open."""
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and runs_kvm(int(p.name))]


@lru_cache(maxsize=1)
def _layouts() -> dict[int, Layout]:
    ffi, lib = _library()
    names = {
        lib.HWERR_PROBE_KVM: "hwerr_probe_kvm",
        lib.HWERR_PROBE_PANIC: "hwerr_probe_kvm",
        lib.HWERR_PROBE_DEATH: "hwerr_probe_death",
        lib.HWERR_PROBE_SIGBUS: "hwerr_probe_sigbus",
        lib.HWERR_PROBE_BLOCK: "hwerr_probe_block",
    }
    return {kind: Layout(name, ffi) for kind, name in names.items()}


class Causes:
    """The hardware errors of late, to find the one behind a SIGBUS."""

    def __init__(self, device: hwerr.Device, limit: int = 1024, wait: float = 0.25) -> None:
        """`wait`, seconds: how long a cause may come after its effect."""
        self._device = device
        self._events: deque[Event] = deque(maxlen=limit)
        self._none: OrderedDict[tuple[int, int, int], None] = OrderedDict()
        self._wait = wait

    def _take(self, events: list[Event]) -> None:
        self._events.extend(e for e in events if e.memory and not e.software)

    def find(self, pid: int, start_ns: int, address: int, time_ns: int) -> tuple[Event, Guest | Task] | None:
        """The newest error that hit this address of the process, and how it is named there.

        The process is the one that started then: errors are held for days, numbers used again.
        memory_failure() sends the signal, at `time_ns`, first and reports after: it is waited for, once
        a page, and no longer for many than for one.
        """
        self._take(self._device.drain())
        if found := self._search(pid, start_ns, address):
            return found
        page = pid, start_ns, address & ~0xFFF
        if page in self._none:
            return None
        deadline = time_ns / 1e9 + self._wait
        while (left := deadline - time.monotonic()) > 0:
            self._take(self._device.read(left))
            if found := self._search(pid, start_ns, address):
                return found
        self._none[page] = None
        while len(self._none) > 4096:
            self._none.popitem(last=False)
        return None

    def _search(self, pid: int, start_ns: int, address: int) -> tuple[Event, Guest | Task] | None:
        who = pid, start_ns
        for event in reversed(self._events):
            for guest in event.guests:
                if (guest.pid, guest.start_ns) == who and guest.hva <= address < guest.hva + guest.len:
                    return event, guest
            for task in event.tasks:
                if (task.pid, task.start_ns) == who and task.va <= address < task.va + task.len:
                    return event, task
        return None


class Composer:
    """Makes events of samples."""

    def __init__(self, causes: Causes | None = None) -> None:
        self._causes = causes

    def __call__(self, sample: bytes) -> Event | None:
        """The event that a sample tells of; None for a type that this version does not know."""
        ffi, _ = _library()
        head = Layout("hwerr_probe_head", ffi).unpack(sample)
        kind = head["type"]
        layout = _layouts().get(kind)
        if layout is None or len(sample) < layout.size:
            return None
        fields = layout.unpack(sample)
        fields = {name.removeprefix("head."): value for name, value in fields.items()}
        match PROBES[kind].name:
            case "kvm":
                event = self._kvm(fields)
            case "panic":
                event = self._panic(fields)
            case "death":
                event = self._death(fields)
            case "sigbus":
                event = self._sigbus(fields)
            case _:
                event = self._block(fields)
        return event

    @staticmethod
    def _common(f: dict[str, Any]) -> dict[str, Any]:
        # The wall clock of then, not of the time it is read.
        real = time.time_ns() - time.monotonic_ns() + f["time_ns"]
        return {"cpu": f["cpu"], "time_mono_ns": f["time_ns"], "time_real_ns": real}

    @staticmethod
    def _guest(f: dict[str, Any]) -> Guest:
        return Guest(f["tgid"], GuestFlags.KVM, f["start_ns"], comm=_comm(f["comm"]))

    def _vcpu(self, f: dict[str, Any]) -> Vcpu:
        _, lib = _library()
        return Vcpu(
            vcpu=f["vcpu"],
            exit_reason=f["exit_reason"],
            suberror=f["suberror"],
            error=f["error"],
            rip=f["rip"] if f["flags"] & lib.HWERR_PROBE_RIP else None,
            detail=f["detail"],
            insn=f["insn"][: f["insn_len"]],
        )

    def _kvm(self, f: dict[str, Any]) -> Event:
        vcpu = self._vcpu(f)
        at = "" if vcpu.rip is None else f" at {vcpu.rip:#x}"
        if vcpu.error:
            text = f"KVM_RUN failed{at}: {os.strerror(-vcpu.error)}"
        elif vcpu.exit_reason == _EXIT_INTERNAL_ERROR:
            text = f"KVM internal error{at}: {_SUBERROR.get(vcpu.suberror, f'suberror {vcpu.suberror}')}"
            if vcpu.insn:
                text += f", instruction {vcpu.insn.hex(' ')}"
        elif vcpu.exit_reason == _EXIT_SHUTDOWN:
            text = f"the guest shut down by a triple fault{at}"
        elif vcpu.exit_reason == _EXIT_FAIL_ENTRY:
            text = f"KVM could not enter the guest{at}, hardware reason {vcpu.detail:#x}"
        else:
            text = f"KVM left the guest{at} for an unknown reason {vcpu.detail:#x}"
        return build(
            self._guest(f), vcpu,
            severity=Severity.RECOVERABLE, source=Source.KVM, component=Component.GUEST,
            flags=Flags.ACTION_REQUIRED, raw_severity=vcpu.exit_reason, text=text, **self._common(f),
        )  # fmt: skip

    def _panic(self, f: dict[str, Any]) -> Event:
        vcpu = self._vcpu(f)
        told = "by a system event" if vcpu.exit_reason == _EXIT_SYSTEM_EVENT else "through pvpanic"
        text = f"the guest panicked, as it says {told}"
        if vcpu.exit_reason != _EXIT_SYSTEM_EVENT and not vcpu.detail & _PANICKED:
            text = f"the guest panicked and runs its crash kernel, as it says {told}"
        return build(
            self._guest(f), vcpu,
            severity=Severity.RECOVERABLE, source=Source.PANIC, component=Component.GUEST,
            flags=Flags.ACTION_REQUIRED, raw_severity=vcpu.detail & 0xFFFFFFFF, text=text, **self._common(f),
        )  # fmt: skip

    def _death(self, f: dict[str, Any]) -> Event:
        text = f"the VM's process was killed by {_signal_name(f['signal'])}"
        deliberate = f["signal"] in _DELIBERATE and not f["oom"]
        if f["oom"]:
            text += ", because memory was short"
        elif f["sender"] > 0:
            text += f" from {_comm(f['sender_comm'])} (pid {f['sender']})"
        elif f["sender"] == 0:
            text += " from the kernel"
            deliberate = False
        if f["core"]:
            text += ", and left a core"
        return build(
            self._guest(f),
            severity=Severity.INFO if deliberate else Severity.RECOVERABLE,
            source=Source.KVM, component=Component.GUEST,
            flags=Flags(0) if deliberate else Flags.ACTION_REQUIRED,
            raw_severity=_DEATH_RAW | f["signal"], text=text, **self._common(f),
        )  # fmt: skip

    def _sigbus(self, f: dict[str, Any]) -> Event:
        required = f["code"] == _BUS_MCEERR_AR
        length = 1 << f["lsb"] if 0 < f["lsb"] < 64 else 1
        start = f["addr"] & ~(length - 1)
        cause = self._causes.find(f["tgid"], f["start_ns"], f["addr"], f["time_ns"]) if self._causes else None
        flags = Flags.ACTION_REQUIRED if required else Flags(0)
        link = 0
        owner: Guest | Task
        if cause is not None:
            event, owner = cause
            flags |= Flags.LINKED
            link = event.id
            if isinstance(owner, Guest):
                # A huge page may begin before the guest's memory does.
                at = None if owner.gpa is None else owner.gpa + start - owner.hva
                gpa = at if at is not None and at >= 0 else None
                known = GuestFlags.KVM & owner.flags
                owner = replace(owner, hva=start, gpa=gpa, len=length, flags=known, name=None, uuid=None)
            else:
                owner = replace(owner, va=start, len=length)
        elif runs_kvm(f["tgid"]):
            owner = replace(self._guest(f), hva=start, len=length)
        else:
            owner = Task(f["tgid"], start_ns=f["start_ns"], va=start, len=length, comm=_comm(f["comm"]))
        text = f"SIGBUS, {'because the poisoned page was used' if required else 'as a warning of poison'}"
        if f["tid"] != f["tgid"]:
            text += f", to thread {f['tid']}"
        if f["result"]:
            text += f", {_SIGNAL_RESULT.get(f['result'], 'result ' + str(f['result']))}"
        return build(
            owner,
            severity=Severity.RECOVERABLE, source=Source.SIGBUS, component=Component.MEMORY,
            kind=Kind.SRAR if required else Kind.SRAO, flags=flags, id=link,
            raw_severity=f["code"] & 0xFFFFFFFF, text=text, **self._common(f),
        )  # fmt: skip

    def _block(self, f: dict[str, Any]) -> Event:
        block = Block(f["major"], f["minor"], f["sector"], f["bytes"], f["op"], f["status"], _comm(f["disk"]))
        op = _OP.get(block.op, f"operation {block.op}")
        what = _STATUS.get(block.status, f"status {block.status}")
        owners, sure = block_owners(block, f["cgroup"])
        return build(
            block, *owners,
            severity=Severity.RECOVERABLE, source=Source.BLOCK, component=Component.STORAGE,
            flags=Flags(0) if sure else Flags.OWNERS_UNKNOWN, raw_severity=block.status,
            text=f"{op} of {block.bytes} bytes at sector {block.sector} failed with a {what} error",
            **self._common(f),
        )  # fmt: skip


def block_owners(block: Block, cgroup: int) -> tuple[list[Guest], bool]:
    """The VM whose request it was, and whether that is certain (as it also is that it was nobody's).

    A cgroup with one VM names it, one without says that it was somebody else's. In one with several
    it is that of them who has the device open, or what is stacked on it, if that is one only; so it
    is of all where the io controller is off and requests are charged to the root.
    """
    candidates = vms()
    if not candidates:
        return [], True
    if _is_own(cgroup):
        candidates = [pid for pid in candidates if _cgroup_of(pid, cgroup)]
        if len(candidates) < 2:
            return [_guest_of(pid) for pid in candidates], True
    devices = _stack(block) | {os.makedev(block.major, block.minor)}
    holders = [pid for pid in candidates if _holds(pid, devices)]
    if len(holders) == 1:
        return [_guest_of(holders[0])], True
    return [], not (holders or _is_own(cgroup))


@lru_cache(maxsize=1)
def _cgroup_root() -> Path | None:
    """Where the hierarchy is that requests are charged in; None if that is one of version 1."""
    for line in Path("/proc/self/mounts").read_text("utf-8", "replace").splitlines():
        fields = line.split()
        if fields[2] == "cgroup2":
            root = Path(fields[1])
            try:
                controllers = (root / "cgroup.controllers").read_text("ascii").split()
            except OSError:
                return None
            return root if "io" in controllers else None
    return None


def _is_own(cgroup: int) -> bool:
    """Whether it is one of somebody: the root is everybody's, and so nobody's."""
    root = _cgroup_root()
    return root is not None and cgroup not in (0, root.stat().st_ino)


def _cgroup_of(pid: int, inode: int) -> bool:
    """Whether the process is in that cgroup or below it."""
    root = _cgroup_root()
    if root is None:
        return False
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text("utf-8", "replace").splitlines()
        here = next(line[3:] for line in lines if line.startswith("0::"))
        directory = root / here.lstrip("/")
        while directory != root:
            if directory.stat().st_ino == inode:
                return True
            directory = directory.parent
    except (OSError, StopIteration):
        pass
    return False


def _stack(block: Block, root: Path = Path("/sys/dev/block")) -> set[int]:
    """Numbers of a disk, its partitions, and what is stacked on them (LVM, md, dm-crypt, multipath)."""
    found: set[int] = set()
    waiting = [root / f"{block.major}:{block.minor}"]
    while waiting:
        where = waiting.pop()
        try:
            major, minor = (where / "dev").read_text("ascii").split(":")
            number = os.makedev(int(major), int(minor))
        except (OSError, ValueError):
            continue
        if number not in found:
            found.add(number)
            waiting += [path.parent for path in where.glob("*/partition")]
            waiting += where.glob("holders/*")
    return found


def _holds(pid: int, devices: set[int]) -> bool:
    """Whether the process has one of them open, or a file on it."""
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                try:
                    found = entry.stat()
                except OSError:
                    continue
                # Character devices have the same numbers.
                if (stat.S_ISBLK(found.st_mode) and found.st_rdev in devices) or found.st_dev in devices:
                    return True
    except OSError:
        pass
    return False


def _guest_of(pid: int) -> Guest:
    try:
        comm = Path(f"/proc/{pid}/comm").read_text("utf-8", "replace").rstrip("\n")
        return Guest(pid, GuestFlags.KVM, start_of(pid), comm=comm)
    except OSError:
        return Guest(pid, GuestFlags.KVM)


# -- from the ring buffer to the device ------------------------------------

# What is lost is told once a second at most, also while it goes on.
_LOSS_S = 1.0


class Publisher:
    """Takes samples from the probes and publishes them on the device, each once."""

    def __init__(self, probes: Probes, device: hwerr.Device, reader: hwerr.Device) -> None:
        """`device` was opened to publish, `reader` at the oldest record held. BpfError if another runs."""
        self._probes = probes
        self._device = device
        self._compose = Composer(Causes(reader))
        # Killed between publishing and letting go of a sample, a publisher before this one left
        # it in the ring buffer: it is the one whose record is there. They are told by time and CPU.
        done = reader.drain()
        self._published = {(e.source, e.time_mono_ns, e.cpu) for e in done if e.software}
        self._compose._causes._take(done)  # type: ignore[union-attr]
        self.ring = Ring(probes.map(_EVENTS), self._sample)

    def close(self) -> None:
        self.ring.close()

    def _sample(self, sample: bytes) -> None:
        event = self._compose(sample)
        if event is None or (event.source, event.time_mono_ns, event.cpu) in self._published:
            return
        self._device.publish(event)

    def run_once(self) -> int:
        """Publishes what there is; returns how much that was."""
        done = self.ring.consume()
        if done and self._published:
            self._published = set()
        return done

    def tell_losses(self) -> None:
        """Publishes how many events were lost, by type, if any were."""
        for kind, more in self._probes.losses().items():
            probe = PROBES[kind]
            # First, so that one killed in between does not tell it twice: `status()` has it anyway.
            self._probes.told(kind, more)
            self._device.publish(
                build(
                    severity=Severity.INFO,
                    source=probe.source,
                    raw_severity=min(more, 0xFFFFFFFF),
                    text=f"{more} events of the {probe.name} probe were lost",
                )
            )


def serve(
    publisher: Publisher,
    probes: Probes,
    direct: hwerr.Device,
    stop_fd: int,
    changed: Callable[[], None] = lambda: None,
) -> None:
    """Publishes until `stop_fd` is readable. Wakes up for events and when a module is loaded only.

    `direct` reads what the probes publish by themselves (`DIRECT`): of what comes too fast the first
    is among it, and the rest is to be told.
    """
    import select
    import socket

    # linux/netlink.h: the kernel's own announcements, of modules among others.
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    uevents = socket.socket(socket.AF_NETLINK, kind, 15)
    with uevents:
        uevents.bind((0, 1))
        if probes.retry():
            changed()
        poll = select.poll()
        for fd in (publisher.ring.fileno(), direct.fileno(), uevents.fileno(), stop_fd):
            poll.register(fd, select.POLLIN)
        # Losses are looked for as long as something came in this period or the one before:
        # of a second that had too many, the last are lost when nothing comes any more.
        looked = time.monotonic()
        before = came = True
        while True:
            if publisher.run_once():
                came = True
            left = looked + _LOSS_S - time.monotonic()
            if (came or before) and left <= 0:
                publisher.tell_losses()
                looked, left = time.monotonic(), _LOSS_S
                before, came = came, False
            idle = not (came or before)
            ready = {fd for fd, _ in poll.poll(None if idle else math.ceil(left * 1000))}
            if idle:
                looked = time.monotonic()
            if direct.fileno() in ready:
                direct.drain()
                came = True
            if uevents.fileno() in ready:
                try:
                    message = uevents.recv(1 << 16)
                except OSError:
                    message = b"add@/module/"  # too many at once: something may have been among them
                if b"add@/module/" in message and probes.reasons and probes.retry():
                    changed()
            if stop_fd in ready:
                publisher.run_once()
                publisher.tell_losses()
                return
