# SPDX-License-Identifier: MIT
"""Raw tracepoint events, and which record of the device was made of which.

Pure: bytes and records in, values out. How the bytes are got is bccprobe's business.

A tracepoint's entry is read by the kernel's own description of it, events/.../format
in tracefs, so that every field is there under the kernel's name, whatever the kernel.
"""

from __future__ import annotations

import re
import struct
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .enums import Flags, Source
from .event import Event

__all__ = ["KNOWN", "Field", "Format", "Known", "Pairer", "RawEvent", "bars", "hist_key", "parse_format"]

# struct hwerr_trace_event of bpf/trace.bcc.c, less the entry.
_HEAD = struct.Struct("<QIIIIiI16s")

_FIELD = re.compile(
    r"^\s*field:(?P<decl>[^;]+);\s*offset:(?P<offset>\d+);\s*size:(?P<size>\d+);\s*signed:(?P<signed>[01]);"
)
_DECL = re.compile(r"^(?P<type>.+?)\s*\b(?P<name>\w+)(?P<array>\[[^\]]*\])?$")

# Shown in hexadecimal although they are no longer than an int.
_HEX = frozenset({"status", "cpuid", "microcode", "pfn", "insn", "tlp_header"})


@dataclass(frozen=True, slots=True)
class Field:
    """One field of an entry. `loc`: what is there is where the bytes are and how many (__data_loc)."""

    name: str
    type: str
    offset: int
    size: int
    signed: bool
    array: bool
    loc: bool

    def value(self, raw: bytes) -> int | str | list[int]:
        """A number; text; numbers of an array; other bytes in hexadecimal."""
        data = raw[self.offset : self.offset + self.size]
        text = self.type.split()[-1] == "char"
        if self.loc:
            loc = int.from_bytes(data[:4], "little")
            data = raw[loc & 0xFFFF :][: loc >> 16]
            return _text(data) if text else data.hex()
        if not self.array:
            if self.size not in (1, 2, 4, 8):
                return data.hex()
            return int.from_bytes(data, "little", signed=self.signed)
        # An array of char is a GUID as often as a name.
        if text:
            return _text(data) if _is_text(data) else data.hex()
        width = {"u16": 2, "u32": 4, "u64": 8, "int": 4, "long": 8}.get(self.type.split()[-1].strip("_"))
        if width is None or self.size % width:
            return data.hex()
        return [int.from_bytes(data[n : n + width], "little") for n in range(0, self.size, width)]

    @property
    def hexadecimal(self) -> bool:
        """Whether its numbers are read more easily so: addresses, registers."""
        return self.name in _HEX or (self.size == 8 and not self.array)


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "replace")


def _is_text(data: bytes) -> bool:
    head = data.split(b"\0", 1)[0]
    return all(0x20 <= b < 0x7F for b in head) and not data[len(head) :].strip(b"\0")


@dataclass(frozen=True, slots=True)
class Format:
    """Description of a tracepoint's entry."""

    name: str
    fields: tuple[Field, ...]

    def offset(self, name: str) -> int | None:
        """Of a field; None if there is none."""
        return next((f.offset for f in self.fields if f.name == name), None)

    def values(self, raw: bytes) -> dict[str, Any]:
        """All fields, those of every tracepoint (common_*) left out."""
        return {f.name: f.value(raw) for f in self.fields}


def parse_format(name: str, text: str) -> Format:
    """What events/.../format says. `name` as "mce:mce_record". ValueError if it says nothing."""
    fields = []
    for line in text.splitlines():
        found = _FIELD.match(line)
        if not found:
            continue
        decl = found["decl"]
        parts = _DECL.match(decl.removeprefix("__data_loc ").removeprefix("__rel_loc "))
        # "char[] msg" after __data_loc, "u32 tlp_header[4]" else.
        if not parts or parts["name"].startswith("common_"):
            continue
        kind = parts["type"]
        fields.append(
            Field(
                name=parts["name"],
                type=re.sub(r"\[[^\]]*\]", "", kind).replace("const ", "").strip(),
                offset=int(found["offset"]),
                size=int(found["size"]),
                signed=found["signed"] == "1",
                array=bool(parts["array"]) or kind.endswith("]"),
                loc=decl.startswith("__data_loc "),
            )
        )
    if not fields:
        raise ValueError(f"{name}: its format names no fields")
    return Format(name, tuple(fields))


# -- events ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Known:
    """A tracepoint whose meaning is known here. `fields`: what filters in the probe look at."""

    source: Source
    fields: tuple[str, ...] = ()
    name: str | None = None


_MCE_FIELDS = ("status", "addr", "misc", "mcgstatus", "mcgcap", "ipid", "cpuid", "bank", "cpuvendor", "cs")
_MEMFAIL = Known(Source.MEMORY_FAILURE, ("result",))

# By "group:event". `name` is the field that --device or --dimm compares.
KNOWN: Mapping[str, Known] = {
    "mce:mce_record": Known(Source.MCE, _MCE_FIELDS),
    "ras:aer_event": Known(Source.AER, ("severity", "dev_name"), "dev_name"),
    "ras:mc_event": Known(Source.EDAC, ("error_type", "label"), "label"),
    "ras:memory_failure_event": _MEMFAIL,
    # 6.19 on has it in a group of its own.
    "memory_failure:memory_failure_event": _MEMFAIL,
    "ras:extlog_mem_event": Known(Source.CPER, ("sev",)),
    "ras:non_standard_event": Known(Source.CPER, ("sev",)),
    "ras:arm_event": Known(Source.CPER, ()),
    "kvm:kvm_userspace_exit": Known(Source.KVM, ("reason", "errno")),
    "kvm:kvm_emulate_insn": Known(Source.KVM, ("failed",)),
}


@dataclass(frozen=True, slots=True)
class RawEvent:
    """One hit of a tracepoint.

    `time_ns` is CLOCK_MONOTONIC, `cpu` and the task those it ran on, which is not always
    where the error was. `stack` is the number of its stack in the probe's table, or -1.
    """

    time_ns: int
    format: Format
    cpu: int
    pid: int
    tid: int
    comm: str
    fields: dict[str, Any] = field(default_factory=dict)
    stack: int = -1

    @property
    def name(self) -> str:
        return self.format.name

    @classmethod
    def parse(cls, data: bytes, formats: Mapping[int, Format]) -> RawEvent:
        """From the probe's bytes; `formats` by the numbers that the probe was given. ValueError."""
        if len(data) <= _HEAD.size:
            raise ValueError(f"an event of {len(data)} bytes")
        time_ns, number, cpu, tgid, tid, stack, _, comm = _HEAD.unpack_from(data)
        if number not in formats:
            raise ValueError(f"an event of an unknown kind, {number}")
        layout = formats[number]
        return cls(time_ns, layout, cpu, tgid, tid, _text(comm), layout.values(data[_HEAD.size :]), stack)

    def to_json(self) -> dict[str, Any]:
        """64-bit fields and registers as hexadecimal strings, as in docs/json.md."""
        out: dict[str, Any] = {}
        for f in self.format.fields:
            value = self.fields[f.name]
            if f.hexadecimal and isinstance(value, int):
                value = hex(value & (1 << 8 * f.size) - 1)
            elif f.hexadecimal and isinstance(value, list):
                value = [hex(v) for v in value]
            out[f.name] = value
        return {
            "event": self.name,
            "mono_ns": self.time_ns,
            "cpu": self.cpu,
            "pid": self.pid,
            "tid": self.tid,
            "comm": self.comm,
            "fields": out,
        }


# -- which record was made of which event ------------------------------------

Key = tuple[Any, ...]


def _raw_keys(raw: RawEvent) -> tuple[Key | None, Key | None]:
    """What its record must have: (for one of its own, for one that stands for repetitions)."""
    f = raw.fields
    key: Key
    try:
        match raw.name.partition(":")[2]:
            case "mce_record":
                coarse = ("mce", f["cpu"], f["bank"], f["addr"])
                return ("mce", f["cpu"], f["bank"], f["addr"], f["status"], f["misc"]), coarse
            case "aer_event":
                key = ("aer", f["dev_name"], f["status"], f["severity"])
                return key, key
            case "mc_event":
                layers = (f["top_layer"], f["middle_layer"], f["lower_layer"])
                label = f["label"].encode()[:63].decode("utf-8", "replace")
                key = ("edac", f["error_type"], f["mc_index"], *layers, label, f["syndrome"] & (1 << 64) - 1)
                return key, key
            case "memory_failure_event":
                return ("memfail", f["pfn"], f["type"], f["result"]), None
            case "extlog_mem_event" | "non_standard_event" | "arm_event":
                return ("cper", f.get("sev"), f.get("fru_text", "")[:23]), None
            case "kvm_userspace_exit":
                return ("kvm-exit", raw.pid, f["reason"]), None
            case "kvm_emulate_insn":
                return ("kvm-insn", raw.pid, f["rip"]), None
    except KeyError:
        pass  # a kernel whose event has other fields: shown, and paired with nothing
    return None, None


def _record_keys(event: Event) -> list[Key]:
    """All under which an event may look for it. None for what no tracepoint was behind."""
    repeats = Flags.COALESCED in event.flags
    keys: list[Key] = []
    if event.source == Source.KVM and event.vcpu:
        pid = event.guests[0].pid if event.guests else 0
        keys = [("kvm-exit", pid, event.vcpu.exit_reason), ("kvm-insn", pid, event.vcpu.rip)]
    elif event.software or Flags.EARLIER in event.flags:
        return []
    elif event.source == Source.MEMORY_FAILURE and event.memory:
        page = event.memory
        keys = [("memfail", page.phys_addr >> 12, page.mf_type, page.mf_result)]
    elif event.source == Source.AER and event.pci:
        keys = [("aer", event.pci.address, event.pci.status, event.raw_severity)]
    elif event.source == Source.EDAC and event.edac:
        e = event.edac
        keys = [("edac", event.raw_severity, e.mc, e.top, e.mid, e.low, e.label, e.syndrome)]
    elif event.mce:
        m = event.mce
        coarse: Key = ("mce", event.cpu, m.bank, m.addr)
        keys = [coarse] if repeats else [(*coarse, m.status, m.misc)]
    elif event.cper:
        keys = [("cper", event.raw_severity, event.cper.fru_text)]
    return keys


@dataclass(slots=True)
class _Waiting:
    raw: RawEvent
    since_ns: int
    exact: Key | None
    coarse: Key | None


@dataclass(slots=True)
class _Record:
    event: Event
    since_ns: int
    keys: list[Key]
    left: int


class Pairer:
    """Puts raw events and records together, whichever is seen first.

    By what both say: CPU, bank, status and address of a machine check, device and status of a
    PCIe error and so on, and by time: both must be seen within `hold_ns` of each other. A record that
    stands for repetitions goes with as many events as it counts.
    """

    def __init__(self, hold_ns: int, most: int = 4096) -> None:
        self.hold_ns = hold_ns
        self._most = most
        self._raw: deque[_Waiting] = deque()
        self._records: deque[_Record] = deque()

    def raw(self, raw: RawEvent, now_ns: int) -> None:
        """An event was seen."""
        self._raw.append(_Waiting(raw, now_ns, *_raw_keys(raw)))

    def record(self, event: Event, now_ns: int) -> None:
        """A record was read."""
        keys = _record_keys(event)
        if keys:
            times = event.count if Flags.COALESCED in event.flags else 1
            self._records.append(_Record(event, now_ns, keys, times))
        while len(self._records) > self._most:
            self._records.popleft()

    def _match(self, waiting: _Waiting) -> Event | None:
        for record in self._records:
            repeats = Flags.COALESCED in record.event.flags
            key = waiting.coarse if repeats else waiting.exact
            if key is None or key not in record.keys:
                continue
            if repeats:
                record.left -= 1
                done = record.left <= 0
            else:
                record.keys.remove(key)
                done = not record.keys
            if done:
                self._records.remove(record)
            return record.event
        return None

    def due(self, now_ns: int) -> Iterator[tuple[RawEvent, Event | None]]:
        """What can be told now, in the order in which it was seen: with its record, or without one
        where none came in time."""
        while self._raw:
            first = self._raw[0]
            event = self._match(first)
            if event is None and len(self._raw) <= self._most and first.exact is not None \
                    and now_ns - first.since_ns < self.hold_ns:  # fmt: skip
                break
            self._raw.popleft()
            yield first.raw, event
        while self._records and now_ns - self._records[0].since_ns >= 2 * self.hold_ns:
            self._records.popleft()

    def wait_ns(self, now_ns: int) -> int | None:
        """After which time something is due though nothing comes; None: never."""
        return max(0, self._raw[0].since_ns + self.hold_ns - now_ns) if self._raw else None

    def flush(self) -> Iterator[tuple[RawEvent, Event | None]]:
        """All that is left, at the end."""
        yield from self.due(1 << 63)


# -- histograms --------------------------------------------------------------


def hist_key(by: str, raw: RawEvent, event: Event | None, real_ns: int) -> list[str]:
    """What it counts for; several where it hits several VMs. [] if this kind of event has no such thing."""
    f = raw.fields
    match by:
        case "bank":
            return [f"bank {f['bank']}"] if "bank" in f else []
        case "device":
            return [f["dev_name"]] if "dev_name" in f else []
        case "dimm":
            return [f["label"] or "(no label)"] if "label" in f else []
        case "minute":
            return [str(real_ns // 60_000_000_000 * 60)]
        case "vm":
            if KNOWN.get(raw.name, _MEMFAIL).source == Source.KVM:
                return [f"{raw.comm}({raw.pid})"]
            if event is None:
                return ["(no record)"]
            return sorted({f"{g.name or g.comm}({g.pid})" for g in event.guests}) or ["(no VM)"]
    raise ValueError(by)


def bars(counts: Counter[str], width: int = 40) -> Iterable[tuple[str, int, str]]:
    """Most first: what, how many, and a bar."""
    most = max(counts.values(), default=0)
    for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        yield name, n, "*" * max(1, round(width * n / most))
