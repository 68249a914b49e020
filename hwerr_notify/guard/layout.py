# SPDX-License-Identifier: MIT
"""Where a guest's memory is, and its registers, from what QEMU's human monitor prints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .errors import MonitorError
from .monitor import Monitor, hmp

__all__ = ["Range", "Registers", "parse_registers", "ranges"]

# memory.c of QEMU, mtree_print_flatview(): ram and rom are what it dumps itself.
_RANGE = re.compile(
    r"^\s*([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (ram|rom)\): (.*?)(?: @([0-9a-f]+))?(?: KVM)?$", re.M
)


@dataclass(frozen=True, slots=True)
class Range:
    """Guest-physical bytes and where QEMU has them."""

    gpa: int
    length: int
    hva: int


async def ranges(monitor: Monitor) -> tuple[Range, ...]:
    """The guest's RAM and ROM, by guest-physical address. MonitorError."""
    text = await hmp(monitor, "info mtree -f")
    views = text.split("FlatView #")
    view = next((v for v in views if re.search(r'^ AS "memory"', v, re.M)), None)
    if view is None:
        raise MonitorError("QEMU shows no memory of the guest")
    # Pieces of one region are at the same distance from its beginning: ask once.
    bases: dict[str, int] = {}
    found = []
    for match in _RANGE.finditer(view):
        gpa, end, name, offset = int(match[1], 16), int(match[2], 16), match[4], int(match[5] or "0", 16)
        if name not in bases:
            said = await hmp(monitor, f"gpa2hva {gpa:#x}")
            at = re.search(r"is (?:at )?0x([0-9a-f]+)\s*$", said)
            if at is None:
                continue
            bases[name] = int(at[1], 16) - offset
        found.append(Range(gpa, end - gpa + 1, bases[name] + offset))
    if not found:
        raise MonitorError("QEMU shows no memory of the guest")
    return tuple(sorted(found, key=lambda r: r.gpa))


@dataclass(frozen=True, slots=True)
class Registers:
    """Of one vCPU: `plain` by QEMU's names in lower case, 64-bit names also for a CPU in 32-bit mode;
    `segments` as (selector, base, limit, flags)."""

    cpu: int
    plain: dict[str, int]
    segments: dict[str, tuple[int, int, int, int]]

    @property
    def rip(self) -> int:
        return self.plain.get("rip", 0)


_WIDE = {
    "eax": "rax", "ebx": "rbx", "ecx": "rcx", "edx": "rdx", "esi": "rsi", "edi": "rdi", "ebp": "rbp",
    "esp": "rsp", "eip": "rip", "efl": "rfl",
}  # fmt: skip


def parse_registers(text: str) -> list[Registers]:
    """From `info registers -a` of an x86 guest (target/i386/cpu-dump.c); [] for anything else."""
    found = []
    for part in re.split(r"^CPU#", text, flags=re.M)[1:]:
        number = re.match(r"\d+", part)
        if not number:
            continue
        segments: dict[str, tuple[int, int, int, int]] = {}
        for m in re.finditer(
            r"^(ES|CS|SS|DS|FS|GS|LDT|TR)\s*=([0-9a-f]{4}) ([0-9a-f]+) ([0-9a-f]+) ([0-9a-f]+)", part, re.M
        ):
            segments[m[1].lower()] = (int(m[2], 16), int(m[3], 16), int(m[4], 16), int(m[5], 16))
        for m in re.finditer(r"^(GDT|IDT)=\s+([0-9a-f]+) ([0-9a-f]+)", part, re.M):
            segments[m[1].lower()] = (0, int(m[2], 16), int(m[3], 16), 0)
        plain: dict[str, int] = {}
        for m in re.finditer(r"\b(R[A-Z]{2}|R\d+|E[A-Z]{2}|CR\d|EFER)\s*=([0-9a-f]+)", part):
            name = m[1].lower()
            plain.setdefault(_WIDE.get(name, name), int(m[2], 16))
        found.append(Registers(int(number[0]), plain, segments))
    return found


def to_json(found: tuple[Range, ...]) -> list[list[int]]:
    return [[r.gpa, r.length, r.hva] for r in found]


def from_json(data: Any) -> tuple[Range, ...]:
    return tuple(Range(gpa, length, hva) for gpa, length, hva in data)
