# SPDX-License-Identifier: MIT
"""Reads ELF cores of guests: hwerr-guard's, and those that QEMU's dump-guest-memory writes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

_PT_LOAD, _PN_XNUM = 1, 0xFFFF

# elf.h. Of a program header: type, offset, p_paddr, p_filesz by their places.
_WIDE = struct.Struct("<16sHHIQQQIHHHHHH"), struct.Struct("<IIQQQQQQ"), (0, 2, 4, 5)
_NARROW = struct.Struct("<16sHHIIIIIHHHHHH"), struct.Struct("<8I"), (0, 1, 3, 4)
# sh_info of the first section header, which is e_phnum where that does not fit.
_SH_INFO = {2: 44, 1: 28}


def core_ranges(path: Path) -> dict[int, tuple[int, int]]:
    """PT_LOADs of a core: guest-physical address to (offset, length). AssertionError if there are none.

    Where the headers are is the core's to say: QEMU from 7.2 on has those of sections before those of
    programs, and a guest in 32-bit mode gets a core of that width if its memory ends below 4 GiB.
    """
    with path.open("rb") as core:
        ident = core.read(16)
        assert ident[:4] == b"\x7fELF", path
        head, entry, places = {2: _WIDE, 1: _NARROW}[ident[4]]
        fields = head.unpack(_at(core, 0, head.size))
        start, sections, size, count = fields[5], fields[6], fields[9], fields[10]
        assert size == entry.size, f"{path}: program headers of {size} bytes"
        if count == _PN_XNUM:
            (count,) = struct.unpack("<I", _at(core, sections + _SH_INFO[ident[4]], 4))
        found = {}
        for n in range(count):
            header = entry.unpack(_at(core, start + n * size, size))
            kind, offset, paddr, length = (header[place] for place in places)
            if kind == _PT_LOAD:
                assert paddr not in found, f"{path}: {paddr:#x} twice"
                found[paddr] = offset, length
    assert found, f"{path} holds no memory"
    return found


def core_bytes(path: Path, gpa: int, length: int) -> bytes:
    """Guest memory, from as many ranges as it is in. AssertionError if not all of it is there."""
    ranges = core_ranges(path)
    data = b""
    with path.open("rb") as core:
        while len(data) < length:
            at = gpa + len(data)
            start = max((r for r in ranges if r <= at), default=-1)
            assert start >= 0, f"{at:#x} is not in {path}"
            offset, size = ranges[start]
            assert at < start + size, f"{at:#x} is not in {path}"
            data += _at(core, offset + at - start, min(length - len(data), start + size - at))
    return data


def _at(core: BinaryIO, offset: int, length: int) -> bytes:
    core.seek(offset)
    data = core.read(length)
    assert len(data) == length, f"{core.name} ends before {offset + length:#x}"
    return data
