# SPDX-License-Identifier: MIT
"""Where a guest's memory is, and its registers, from what QEMU's human monitor prints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .errors import MonitorError
from .monitor import Monitor, hmp, together

__all__ = ["QUESTION", "Range", "Registers", "parse_registers", "ranges"]

# memory.c of QEMU, mtree_print_flatview(): ram and rom are what it dumps itself.
_RANGE = re.compile(
    r"^\s*([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (ram|rom)\): (.*?)(?: @([0-9a-f]+))?(?: KVM)?$", re.M
)


QUESTION = "info mtree -f"


@dataclass(frozen=True, slots=True)
class Range:
    """Guest-physical bytes and where QEMU has them."""

    gpa: int
    length: int
    hva: int


# One for each guest, and a few more: when it is hit, it most often shows what it showed before.
@lru_cache(maxsize=256)
def _pieces(text: str) -> tuple[tuple[int, int, str, int], ...]:
    """(first, last, name, offset) of what the guest's CPUs see; empty if it is not shown."""
    views = text.split("FlatView #")
    view = next((v for v in views if re.search(r'^ AS "memory"', v, re.M)), "")
    return tuple((int(m[1], 16), int(m[2], 16), m[4], int(m[5] or "0", 16)) for m in _RANGE.finditer(view))


async def ranges(
    monitor: Monitor, before: tuple[Range, ...] = (), *, placed: bool = False
) -> tuple[Range, ...]:
    """The guest's RAM and ROM, by guest-physical address. MonitorError.

    `before` is what was found earlier: if the layout is the same, this is one round trip. `placed`: what is
    of the same layout is known to be where it was, too, and is not asked for again.
    """
    text, *said = await together(
        hmp(monitor, QUESTION),
        *(hmp(monitor, f"gpa2hva {r.gpa:#x}") for r in (() if placed else before)),
    )
    at = {} if placed else {r.gpa: answer for r, answer in zip(before, said, strict=True)}
    pieces = _pieces(text)
    if not pieces:
        raise MonitorError("QEMU shows no memory of the guest")
    if placed and {(gpa, end - gpa + 1) for gpa, end, *_ in pieces} == {(r.gpa, r.length) for r in before}:
        return before
    # Pieces of one region are at the same distance from its beginning: one tells of all.
    first = {name: (gpa, offset) for gpa, _, name, offset in reversed(pieces)}
    ask = [gpa for gpa, _ in first.values() if gpa not in at]
    at |= dict(zip(ask, await together(*(hmp(monitor, f"gpa2hva {gpa:#x}") for gpa in ask)), strict=True))
    bases: dict[str, int] = {}
    for name, (gpa, offset) in first.items():
        if found_at := re.search(r"is (?:at )?0x([0-9a-f]+)\s*$", at[gpa]):
            bases[name] = int(found_at[1], 16) - offset
    found = [
        Range(gpa, end - gpa + 1, bases[name] + offset) for gpa, end, name, offset in pieces if name in bases
    ]
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
