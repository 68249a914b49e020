# SPDX-License-Identifier: MIT
"""Records of /dev/hwerr as immutable values. Pure: bytes in, values out.

The framing of a whole buffer is checked in one call of compiled code, so an
`Event` that exists is well formed. The head is unpacked at once, infos when they
are first looked at.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

from ._uapi import lib
from .enums import Component, Flags, GuestFlags, InfoType, Kind, MfResult, Severity, Source, TaskFlags
from .layout import Layout

__all__ = [
    "Block",
    "Cper",
    "Edac",
    "Event",
    "Guest",
    "Info",
    "Mce",
    "Memory",
    "Pci",
    "RecordError",
    "Stop",
    "Task",
    "Text",
    "Unknown",
    "Vcpu",
    "build",
    "parse",
]

RECORD_MAX: int = lib.HWERR_RECORD_MAX
NO_GPA: int = lib.HWERR_NO_GPA

# SDM 3B, 16.3.2.2, table of IA32_MCi_STATUS; MCG_STATUS 16.3.1.2.
_MISCV, _ADDRV = 1 << 59, 1 << 58
_EIPV = 1 << 1

_NO_FLAGS, _NO_GUEST_FLAGS, _NO_TASK_FLAGS = Flags(0), GuestFlags(0), TaskFlags(0)


class RecordError(ValueError):
    """Bytes that are no record. `offset` says where in the buffer."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(f"{reason} at byte {offset}")
        self.reason = reason
        self.offset = offset

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.offset)


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _chars(text: str, size: int) -> bytes:
    """UTF-8 that ends with a NUL within `size`, cut between characters."""
    return text.encode("utf-8", "backslashreplace")[: size - 1].decode("utf-8", "ignore").encode()


@dataclass(frozen=True, slots=True)
class Mce:
    """Registers of a machine check bank as they were."""

    status: int
    addr: int = 0
    misc: int = 0
    mcgstatus: int = 0
    mcgcap: int = 0
    synd: int = 0
    ipid: int = 0
    ppin: int = 0
    tsc: int = 0
    ip: int = 0
    cpuid: int = 0
    microcode: int = 0
    socket: int = 0
    apicid: int = 0
    bank: int = 0
    vendor: int = 0
    cs: int = 0

    @property
    def addr_valid(self) -> bool:
        """Whether `addr` was set by this error; it need not be a physical address."""
        return bool(self.status & _ADDRV)

    @property
    def misc_valid(self) -> bool:
        return bool(self.status & _MISCV)

    @property
    def ip_valid(self) -> bool:
        return bool(self.mcgstatus & _EIPV)


@dataclass(frozen=True, slots=True)
class Pci:
    """The PCI function that reported. `status` is the AER status register."""

    domain: int
    bus: int
    devfn: int
    status: int = 0
    flags: int = 0
    tlp: tuple[int, int, int, int] = (0, 0, 0, 0)
    vendor: int = 0xFFFF
    device: int = 0xFFFF

    @property
    def address(self) -> str:
        """As lspci -D prints it: "0000:01:00.0"."""
        return f"{self.domain:04x}:{self.bus:02x}:{self.devfn >> 3:02x}.{self.devfn & 7}"

    @property
    def tlp_valid(self) -> bool:
        return bool(self.flags & lib.HWERR_PCI_TLP)


@dataclass(frozen=True, slots=True)
class Edac:
    """Where the memory controller saw it. A layer is -1 if not known; `grain` is in bytes."""

    mc: int
    top: int = -1
    mid: int = -1
    low: int = -1
    syndrome: int = 0
    grain: int = 0
    label: str = ""

    @property
    def layers(self) -> tuple[int, int, int]:
        return self.top, self.mid, self.low


@dataclass(frozen=True, slots=True)
class Memory:
    """The host-physical range hit, bytes. `resolve_ns` is what finding the owners took."""

    phys_addr: int
    phys_len: int
    resolve_ns: int = 0
    mf_type: int = -1
    mf_result: int = -1

    @property
    def result(self) -> MfResult | None:
        """What memory_failure() came to, None if the record is not of it."""
        return None if self.mf_result < 0 else MfResult(self.mf_result)


@dataclass(frozen=True, slots=True)
class Guest:
    """A process that runs a VM, and where in it the error is.

    `hva` and `gpa` are byte addresses, `len` bytes. `gpa` is None for a process
    that runs no KVM guest mapping this address. `start_ns` (CLOCK_BOOTTIME) and
    `pid` together are the process's identity. `name` and `uuid` are None unless
    somebody looked them up, as `Device` does.
    """

    pid: int
    flags: GuestFlags = _NO_GUEST_FLAGS
    start_ns: int = 0
    vm_id: int = 0
    hva: int = 0
    gpa: int | None = None
    len: int = 0
    slot: int = 0
    comm: str = ""
    name: str | None = None
    uuid: UUID | None = None

    @property
    def kvm(self) -> bool:
        """Runs under KVM, not under emulation."""
        return GuestFlags.KVM in self.flags

    @property
    def by_device(self) -> bool:
        """Hit through the device of the record's `Pci`, which was passed through to it."""
        return GuestFlags.DEVICE in self.flags

    @property
    def stopped(self) -> bool:
        """Its vCPUs were stopped before the record could be read."""
        return GuestFlags.STOPPED in self.flags

    @property
    def as_a_whole(self) -> bool:
        """No address of it is named: the error is not one of its memory."""
        return not self.len and not self.hva


@dataclass(frozen=True, slots=True)
class Task:
    """Another process that maps the range at `va`, `len` bytes."""

    pid: int
    flags: TaskFlags = _NO_TASK_FLAGS
    start_ns: int = 0
    va: int = 0
    len: int = 0
    comm: str = ""

    @property
    def by_device(self) -> bool:
        """Holds the device of the record's `Pci`."""
        return TaskFlags.DEVICE in self.flags


@dataclass(frozen=True, slots=True)
class Stop:
    """The KVM guests of process `pid` were stopped, because it was guarded, or on command.

    `vcpus` were told to; all but `running` of them were out of the guest at `mono_ns`
    (CLOCK_MONOTONIC). See `Device.guard`.
    """

    pid: int
    vcpus: int
    start_ns: int = 0
    mono_ns: int = 0
    running: int = 0


@dataclass(frozen=True, slots=True)
class Text:
    """One line for a person, as the source wrote it."""

    text: str


@dataclass(frozen=True, slots=True)
class Cper:
    """A firmware record's section (UEFI, appendix N). `data` is cut at what fits a record."""

    section: UUID
    fru_id: UUID | None = None
    fru_text: str = ""
    flags: int = 0
    etype: int = 0
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Vcpu:
    """How KVM_RUN ended, of the VM in `Event.guests`; numbers are those of linux/kvm.h.

    `rip` is None where it is not known. `error` is a negative errno, or 0. `insn` is the
    instruction that could not be emulated, as far as the kernel has it.
    """

    vcpu: int
    exit_reason: int
    suberror: int = 0
    error: int = 0
    rip: int | None = None
    detail: int = 0
    insn: bytes = b""


@dataclass(frozen=True, slots=True)
class Block:
    """The request of a block device that failed. `sector` of 512 bytes; `op`, `status` as in the kernel."""

    major: int
    minor: int
    sector: int
    bytes: int
    op: int = 0
    status: int = 0
    disk: str = ""


@dataclass(frozen=True, slots=True)
class Unknown:
    """An info that this package does not know; `data` is what follows its head."""

    type: int
    data: bytes


Info = Mce | Pci | Edac | Memory | Guest | Task | Text | Cper | Stop | Vcpu | Block | Unknown

# -- infos and bytes -------------------------------------------------------

_INFO = Layout("hwerr_info")
_MCE = Layout("hwerr_info_mce")
_PCI = Layout("hwerr_info_pci")
_EDAC = Layout("hwerr_info_edac")
_MEMORY = Layout("hwerr_info_memory")
_GUEST = Layout("hwerr_info_guest")
_TASK = Layout("hwerr_info_task")
_CPER = Layout("hwerr_info_cper")
_STOP = Layout("hwerr_info_stop")
_VCPU = Layout("hwerr_info_vcpu")
_BLOCK = Layout("hwerr_info_block")


def _fields(layout: Layout, raw: bytes, at: int) -> dict[str, Any]:
    return {
        name: value for name, value in layout.unpack(raw, at).items() if not name.startswith(("head.", "pad"))
    }


def _get_mce(raw: bytes, at: int, _len: int) -> Mce:
    return Mce(**_fields(_MCE, raw, at))


def _get_pci(raw: bytes, at: int, _len: int) -> Pci:
    return Pci(**_fields(_PCI, raw, at))


def _get_edac(raw: bytes, at: int, _len: int) -> Edac:
    f = _fields(_EDAC, raw, at)
    return Edac(**f | {"label": _text(f["label"])})


def _get_memory(raw: bytes, at: int, _len: int) -> Memory:
    return Memory(**_fields(_MEMORY, raw, at))


def _get_guest(raw: bytes, at: int, _len: int) -> Guest:
    f = _fields(_GUEST, raw, at)
    f["pid"] = f.pop("tgid")
    f["flags"] = GuestFlags(f["flags"])
    f["gpa"] = None if f["gpa"] == NO_GPA else f["gpa"]
    f["comm"] = _text(f["comm"])
    return Guest(**f)


def _get_task(raw: bytes, at: int, _len: int) -> Task:
    f = _fields(_TASK, raw, at)
    f["pid"] = f.pop("tgid")
    f["flags"] = TaskFlags(f["flags"])
    f["comm"] = _text(f["comm"])
    return Task(**f)


def _get_stop(raw: bytes, at: int, _len: int) -> Stop:
    f = _fields(_STOP, raw, at)
    f["pid"] = f.pop("tgid")
    return Stop(**f)


def _get_text(raw: bytes, at: int, length: int) -> Text:
    return Text(_text(raw[at + _INFO.size : at + length]))


def _get_cper(raw: bytes, at: int, _len: int) -> Cper:
    f = _fields(_CPER, raw, at)
    start = at + _CPER.size
    fru = f["fru_id"]
    return Cper(
        # A GUID in memory has its first three parts little-endian.
        section=UUID(bytes_le=f["section"]),
        fru_id=UUID(bytes_le=fru) if any(fru) else None,
        fru_text=_text(f["fru_text"]),
        flags=f["flags"],
        etype=f["etype"],
        data=raw[start : start + f["data_len"]],
    )


def _get_vcpu(raw: bytes, at: int, _len: int) -> Vcpu:
    f = _fields(_VCPU, raw, at)
    f["insn"] = f["insn"][: f.pop("insn_len")]
    f["rip"] = f["rip"] if f.pop("flags") & lib.HWERR_VCPU_RIP else None
    return Vcpu(**f)


def _get_block(raw: bytes, at: int, _len: int) -> Block:
    f = _fields(_BLOCK, raw, at)
    return Block(**f | {"disk": _text(f["disk"])})


_GET: dict[int, Callable[[bytes, int, int], Info]] = {
    InfoType.MCE: _get_mce,
    InfoType.PCI: _get_pci,
    InfoType.EDAC: _get_edac,
    InfoType.MEMORY: _get_memory,
    InfoType.GUEST: _get_guest,
    InfoType.TASK: _get_task,
    InfoType.TEXT: _get_text,
    InfoType.CPER: _get_cper,
    InfoType.STOP: _get_stop,
    InfoType.VCPU: _get_vcpu,
    InfoType.BLOCK: _get_block,
}


def _put(info: Info) -> bytes:
    """The info's bytes, head and padding included."""
    f: dict[str, Any] = {name: getattr(info, name) for name in type(info).__slots__}
    tail = b""
    match info:
        case Mce():
            kind, layout = InfoType.MCE, _MCE
        case Pci():
            kind, layout = InfoType.PCI, _PCI
        case Edac():
            kind, layout = InfoType.EDAC, _EDAC
            f["label"] = _chars(info.label, lib.HWERR_LABEL_MAX)
        case Memory():
            kind, layout = InfoType.MEMORY, _MEMORY
        case Vcpu():
            kind, layout = InfoType.VCPU, _VCPU
            f["flags"] = 0 if info.rip is None else lib.HWERR_VCPU_RIP
            f["rip"] = info.rip or 0
            f["insn_len"] = len(info.insn)
        case Block():
            kind, layout = InfoType.BLOCK, _BLOCK
            f["disk"] = _chars(info.disk, 32)
        case Guest():
            kind, layout = InfoType.GUEST, _GUEST
            f |= {"tgid": info.pid, "comm": _chars(info.comm, 16)}
            f["gpa"] = NO_GPA if info.gpa is None else info.gpa
            for name in ("pid", "name", "uuid"):
                del f[name]
        case Task():
            kind, layout = InfoType.TASK, _TASK
            f |= {"tgid": info.pid, "comm": _chars(info.comm, 16)}
            del f["pid"]
        case Text():
            kind, layout, f = InfoType.TEXT, _INFO, {}
            tail = info.text.replace("\0", " ").encode("utf-8", "backslashreplace") + b"\0"
        case Cper():
            kind, layout = InfoType.CPER, _CPER
            f |= {
                "section": info.section.bytes_le,
                "fru_id": info.fru_id.bytes_le if info.fru_id else b"",
                "fru_text": _chars(info.fru_text, 24),
                "data_len": len(info.data),
            }
            tail = f.pop("data")
        case Stop():
            kind, layout = InfoType.STOP, _STOP
            f["tgid"] = f.pop("pid")
        case Unknown():
            kind, layout, f, tail = InfoType(info.type), _INFO, {}, info.data
    tail += bytes(-len(tail) % 8)
    head = "head." if layout is not _INFO else ""
    f |= {f"{head}len": layout.size + len(tail), f"{head}type": int(kind)}
    return layout.pack(f) + tail


# -- records ---------------------------------------------------------------

_HEAD = Layout("hwerr_record")
(_LEN, _HDR_LEN, _VERSION, _SEVERITY, _SOURCE, _KIND, _COMPONENT, _FLAGS, _LOST, _SEQ, _ID, _MONO, _REAL,
 _CPU, _COUNT, _RAW) = map(_HEAD.index, (
    "len", "hdr_len", "version", "severity", "source", "kind", "component", "flags", "lost", "seq", "id",
    "time_mono_ns", "time_real_ns", "cpu", "count", "raw_severity"))  # fmt: skip

_I = TypeVar("_I")


class Event:
    """One record; immutable. Two events are equal if their bytes are.

    Made by `parse()`, `build()` and `from_bytes()`. Not a dataclass, and without an
    __init__, because making one is most of what parsing costs.
    """

    __slots__ = ("_head", "_infos", "_raw")

    _raw: bytes
    _head: tuple[int, ...]
    _infos: tuple[Info, ...]

    @classmethod
    def from_bytes(cls, raw: bytes) -> Event:
        """The record in `raw`; RecordError if it is not exactly one."""
        events = parse(raw)
        if len(events) != 1:
            raise RecordError(f"{len(events)} records where one was expected", 0)
        return events[0]

    def __eq__(self, other: object) -> bool:
        return self._raw == other._raw if isinstance(other, Event) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._raw)

    def __reduce__(self) -> tuple[Any, ...]:
        return Event.from_bytes, (self._raw,)

    def __bytes__(self) -> bytes:
        return self._raw

    def __repr__(self) -> str:
        return f"<Event {self.seq} {self.source} {self.severity}: {self.message}>"

    @property
    def raw(self) -> bytes:
        """The record's bytes, as read(2) gave them."""
        return self._raw

    @property
    def version(self) -> int:
        """ABI version of the kernel that made it."""
        return self._head[_VERSION]

    @property
    def severity(self) -> Severity:
        return Severity(self._head[_SEVERITY])

    @property
    def source(self) -> Source:
        return Source(self._head[_SOURCE])

    @property
    def kind(self) -> Kind:
        return Kind(self._head[_KIND])

    @property
    def component(self) -> Component:
        return Component(self._head[_COMPONENT])

    @property
    def flags(self) -> Flags:
        return Flags(self._head[_FLAGS])

    @property
    def lost(self) -> int:
        """Records that the reader missed since the one before."""
        return self._head[_LOST]

    @property
    def seq(self) -> int:
        return self._head[_SEQ]

    @property
    def id(self) -> int:
        """`seq` of the first record of the same error."""
        return self._head[_ID]

    @property
    def time_mono_ns(self) -> int:
        """CLOCK_MONOTONIC, ns; 0 for a record of another boot."""
        return self._head[_MONO]

    @property
    def time_real_ns(self) -> int:
        """ns since the epoch, 0 if unknown."""
        return self._head[_REAL]

    @property
    def cpu(self) -> int | None:
        """CPU that reported, None if unknown or withheld."""
        cpu = self._head[_CPU]
        return None if cpu < 0 else cpu

    @property
    def count(self) -> int:
        """Errors that this record stands for."""
        return self._head[_COUNT]

    @property
    def raw_severity(self) -> int:
        """Severity in the source's own numbering."""
        return self._head[_RAW]

    @property
    def action_required(self) -> bool:
        """The context hit cannot go on."""
        return bool(self._head[_FLAGS] & lib.HWERR_F_ACTION_REQUIRED)

    @property
    def software(self) -> bool:
        """Published by a program, not by hardware."""
        return bool(self._head[_FLAGS] & lib.HWERR_F_SOFTWARE)

    @property
    def earlier_boot(self) -> bool:
        """From a boot before this one: the platform had kept it."""
        return bool(self._head[_FLAGS] & lib.HWERR_F_OTHER_BOOT)

    @property
    def infos(self) -> tuple[Info, ...]:
        """All infos in the record's order."""
        try:
            return self._infos
        except AttributeError:
            raw, at, found = self._raw, self._head[_HDR_LEN], []
            while at < self._head[_LEN]:
                length, kind, _ = _INFO.struct.unpack_from(raw, at)
                get = _GET.get(kind)
                found.append(
                    get(raw, at, length) if get else Unknown(kind, raw[at + _INFO.size : at + length])
                )
                at += length
            self._infos = tuple(found)
            return self._infos

    def _all(self, kind: type[_I]) -> tuple[_I, ...]:
        return tuple(i for i in self.infos if isinstance(i, kind))

    def _first(self, kind: type[_I]) -> _I | None:
        return next((i for i in self.infos if isinstance(i, kind)), None)

    @property
    def mce(self) -> Mce | None:
        return self._first(Mce)

    @property
    def pci(self) -> Pci | None:
        return self._first(Pci)

    @property
    def edac(self) -> Edac | None:
        return self._first(Edac)

    @property
    def memory(self) -> Memory | None:
        return self._first(Memory)

    @property
    def cper(self) -> Cper | None:
        return self._first(Cper)

    @property
    def vcpu(self) -> Vcpu | None:
        return self._first(Vcpu)

    @property
    def block(self) -> Block | None:
        return self._first(Block)

    @property
    def guests(self) -> tuple[Guest, ...]:
        """Processes hit that run a VM; one that maps the range twice is there twice."""
        return self._all(Guest)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Other processes hit."""
        return self._all(Task)

    @property
    def stops(self) -> tuple[Stop, ...]:
        """Processes whose guests were stopped before the record could be read."""
        return self._all(Stop)

    @property
    def text(self) -> str | None:
        """What the source itself says, if it says anything."""
        found = self._first(Text)
        return found.text if found else None

    @property
    def message(self) -> str:
        """One line that a person understands: what, where, whom it hits. No control characters."""
        from .message import message

        return message(self)

    def named(self, lookup: Callable[[Guest], tuple[str | None, UUID | None]]) -> Event:
        """The same event, its guests with the name and UUID that `lookup` gives."""
        if not any(isinstance(i, Guest) for i in self.infos):
            return self
        infos: list[Info] = []
        for info in self.infos:
            if isinstance(info, Guest):
                name, uuid = lookup(info)
                info = dataclasses.replace(info, name=name, uuid=uuid)
            infos.append(info)
        return _make(self._raw, self._head, tuple(infos))

    def with_lost(self, lost: int) -> Event:
        """The same event with another number of records lost before it."""
        head = list(self._head)
        head[_LOST] = lost
        raw = _HEAD.struct.pack(*head) + self._raw[_HEAD.size :]
        return _make(raw, tuple(head), self.infos)

    def numbered(self, seq: int, id: int, flags: Flags, count: int) -> Event:
        """The same event with these in its head."""
        head = list(self._head)
        head[_SEQ], head[_ID], head[_FLAGS], head[_COUNT] = seq, id, int(flags), count
        raw = _HEAD.struct.pack(*head) + self._raw[_HEAD.size :]
        return _make(raw, tuple(head), self.infos)

    def to_json(self) -> dict[str, Any]:
        """The public JSON form, as docs/json.md describes it; ready for json.dumps()."""
        from .jsonform import to_json

        return to_json(self)


def _make(raw: bytes, head: tuple[int, ...], infos: tuple[Info, ...]) -> Event:
    event = Event()
    event._raw = raw
    event._head = head
    event._infos = infos
    return event


def parse(data: bytes | bytearray | memoryview) -> list[Event]:
    """The records in `data`, as read(2) gives them.

    RecordError, with the offset, if any of it is not a well-formed record.
    """
    raw = bytes(data)
    size = len(raw)
    bad = lib.hwerr_scan(raw, size)
    if bad >= 0:
        raise _record_error(raw, bad)
    events: list[Event] = []
    append, unpack, new = events.append, _HEAD.struct.unpack_from, Event
    at = 0
    while at < size:
        head = unpack(raw, at)
        end = at + head[0]
        event = new()
        event._raw = raw[at:end]
        event._head = head
        append(event)
        at = end
    return events


def _record_error(raw: bytes, at: int) -> RecordError:
    """Says in words what hwerr_scan() found wrong at `at`."""
    left = len(raw) - at
    start = 0
    while start < at:
        # A record before `at` was good, or `at` is inside it.
        length = _HEAD.struct.unpack_from(raw, start)[_LEN]
        if start + length > at:
            return RecordError("info of a wrong length", at)
        start += length
    if left < _HEAD.size:
        return RecordError(f"{left} bytes are no record", at)
    return RecordError("record of a wrong length", at)


assert _LEN == 0, "parse() takes the first value for the record's length"


def build(
    *infos: Info,
    severity: Severity,
    source: Source = Source.USER,
    kind: Kind = Kind.NONE,
    component: Component = Component.UNKNOWN,
    flags: Flags = _NO_FLAGS,
    cpu: int | None = None,
    count: int = 0,
    raw_severity: int = 0,
    text: str | None = None,
    seq: int = 0,
    id: int = 0,
    lost: int = 0,
    time_mono_ns: int = 0,
    time_real_ns: int = 0,
) -> Event:
    """A record to publish, or to test with. What is left out the kernel fills in on write().

    `text` becomes a last `Text`, cut, with Flags.INFO_TRUNCATED, at what fits. ValueError if
    a number does not fit its field or the infos do not fit RECORD_MAX bytes.
    """
    try:
        tail = b"".join(map(_put, infos))
        if text is not None:
            room = max(8, RECORD_MAX - _HEAD.size - len(tail) - _INFO.size)
            cut = _chars(text.replace("\0", " "), room).decode()
            if cut != text.replace("\0", " "):
                flags |= Flags.INFO_TRUNCATED
            tail += _put(Text(cut))
        fields = {
            "len": _HEAD.size + len(tail),
            "hdr_len": _HEAD.size,
            "version": lib.HWERR_ABI_VERSION,
            "severity": int(severity),
            "source": int(source),
            "kind": int(kind),
            "component": int(component),
            "flags": int(flags),
            "lost": lost,
            "seq": seq,
            "id": id,
            "time_mono_ns": time_mono_ns,
            "time_real_ns": time_real_ns,
            "cpu": -1 if cpu is None else cpu,
            "count": count,
            "raw_severity": raw_severity,
        }
        raw = _HEAD.pack(fields) + tail
    except struct.error as error:
        raise ValueError(f"a field does not fit: {error}") from None
    if len(raw) > RECORD_MAX:
        raise ValueError(f"{len(raw)} bytes are more than a record may have ({RECORD_MAX}): give fewer infos")
    return Event.from_bytes(raw)


def encode(events: Iterable[Event | bytes]) -> bytes:
    """Records one after another, as write(2) takes them."""
    return b"".join(bytes(e) for e in events)
