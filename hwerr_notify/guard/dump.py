# SPDX-License-Identifier: MIT
"""A guest's memory as an ELF core, made from outside QEMU.

QEMU need not answer, nor run: its memory is read through /proc/PID/mem. Pages known to
be poisoned are never touched, because a read could raise the same machine check in the
host's kernel; others that turn out to be unreadable are skipped. All of them are listed in the core, as
a note "HWERR" of type 1 that holds JSON, and read as zeros.

The form is that of QEMU's dump-guest-memory (target/i386/arch_dump.c): a PT_LOAD for each range of
guest-physical memory, and for each vCPU an NT_PRSTATUS and a note "QEMU" with control
registers. p_vaddr is the guest-physical address, so that gdb can show memory by it.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from .errors import Fault
from .layout import Range, Registers
from .store import create, fsync_directory

__all__ = ["Dumped", "write_core"]

PAGE = 4096
_CHUNK = 1 << 20
_SPARSE = 64 << 10
_ZEROS = bytes(_SPARSE)

# elf.h
_ET_CORE, _EM_X86_64, _PT_LOAD, _PT_NOTE, _NT_PRSTATUS = 4, 62, 1, 4, 1
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")

# Order of struct user_regs_struct of x86-64.
_USER_REGS = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"
)  # fmt: skip
_QEMU_REGS = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15", "rip", "rfl",
)  # fmt: skip

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Dumped:
    """`skipped`: guest-physical (address, length) of what is not in it. Bytes."""

    path: Path
    size: int
    stored: int
    skipped: tuple[tuple[int, int], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "size": self.size,
            "stored": self.stored,
            "skipped": [[hex(gpa), length] for gpa, length in self.skipped],
        }


def _note(name: bytes, kind: int, data: bytes) -> bytes:
    name += b"\0"
    return (
        struct.pack("<III", len(name), len(data), kind)
        + name.ljust(-(-len(name) // 4) * 4, b"\0")
        + data.ljust(-(-len(data) // 4) * 4, b"\0")
    )


def _prstatus(cpu: Registers) -> bytes:
    """x86_64_elf_prstatus; its pid is the vCPU's number plus one."""
    segments = {name: cpu.segments.get(name, (0, 0, 0, 0)) for name in ("cs", "ss", "ds", "es", "fs", "gs")}
    values = [cpu.plain.get(name, 0) for name in _USER_REGS]
    values += [
        0xFFFFFFFFFFFFFFFF,
        cpu.rip,
        segments["cs"][0],
        cpu.plain.get("rfl", 0),
        cpu.plain.get("rsp", 0),
    ]
    values += [segments["ss"][0], segments["fs"][1], segments["gs"][1]]
    values += [segments[name][0] for name in ("ds", "es", "fs", "gs")]
    return bytes(32) + struct.pack("<I", cpu.cpu + 1) + bytes(76) + struct.pack("<27Q", *values) + bytes(8)


def _qemu_state(cpu: Registers) -> bytes:
    """struct QEMUCPUState, version 1; kernel_gs_base is not shown by QEMU and 0 here."""
    body = struct.pack("<18Q", *(cpu.plain.get(name, 0) for name in _QEMU_REGS))
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr", "gdt", "idt"):
        selector, base, limit, flags = cpu.segments.get(name, (0, 0, 0, 0))
        body += struct.pack("<IIIIQ", selector, limit, flags, 0, base)
    body += struct.pack("<5Q", *(cpu.plain.get(f"cr{n}", 0) for n in range(5)))
    body += struct.pack("<Q", 0)
    return struct.pack("<II", 1, 8 + len(body)) + body


def _pages(ranges: Sequence[Range], poison: Iterable[tuple[int, int, int]]) -> set[int]:
    """Addresses, in QEMU, of pages not to be touched; `poison` as in `Incident`."""
    found: set[int] = set()
    for gpa, hva, length in poison:
        starts = [hva] if hva >= 0 else [
            r.hva + gpa - r.gpa for r in ranges if gpa >= 0 and r.gpa <= gpa < r.gpa + r.length
        ]  # fmt: skip
        for start in starts:
            first, last = start // PAGE, (start + max(length, 1) - 1) // PAGE
            found.update(page * PAGE for page in range(first, last + 1))
    return found


class _Copier:
    """Copies ranges of one process's memory into the core."""

    def __init__(self, memory: int, core: int, avoid: set[int], stop: Event, reserve: int) -> None:
        self.memory = memory
        self.core = core
        self.avoid = avoid
        self.stop = stop
        self.reserve = reserve
        self.stored = 0
        self.unread: list[tuple[int, int]] = []
        self._buffer = bytearray(_CHUNK)

    def copy(self, hva: int, length: int, to: int) -> None:
        """At most a chunk; what cannot be read goes to `unread`, by address in QEMU."""
        if self.stop.is_set():
            raise Fault("interrupted")
        pages = [p for p in range(hva & -PAGE, hva + length, PAGE) if p in self.avoid] if self.avoid else []
        if not pages:
            self._read(hva, length, to)
            return
        at = hva
        for page in pages:
            if page > at:
                self._read(at, page - at, to + at - hva)
            begin, at = max(page, hva), min(page + PAGE, hva + length)
            self.unread.append((begin, at - begin))
        if at < hva + length:
            self._read(at, hva + length - at, to + at - hva)

    def _read(self, hva: int, length: int, to: int) -> None:
        view = memoryview(self._buffer)[:length]
        done = 0
        try:
            while done < length:
                got = os.preadv(self.memory, [view[done:]], hva + done)
                if not got:
                    raise Fault("the process has ended")
                done += got
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EFAULT, errno.ENOMEM):
                raise
            if done:
                self._write(view[:done], to)
            rest = length - done
            if rest <= PAGE:
                self.unread.append((hva + done, rest))
                return
            # To a page's end, then on: what is not readable is a page.
            half = max(PAGE, rest // 2 & -PAGE) - (hva + done) % PAGE
            self._read(hva + done, half, to + done)
            self._read(hva + done + half, rest - half, to + done + half)
            return
        self._write(view, to)

    def _write(self, data: memoryview, to: int) -> None:
        for at in range(0, len(data), _SPARSE):
            piece = data[at : at + _SPARSE]
            if piece == _ZEROS[: len(piece)]:
                continue
            disk = os.fstatvfs(self.core)
            if disk.f_bavail * disk.f_frsize < self.reserve + len(piece):
                left = f"{self.reserve >> 20} MiB"
                raise Fault(f"less than {left} would be left on its disk for later incidents (dump.reserve)")
            written = 0
            while written < len(piece):
                written += os.pwrite(self.core, piece[written:], to + at + written)
            self.stored += len(piece)


def write_core(
    path: Path,
    pid: int,
    ranges: Sequence[Range],
    cpus: Sequence[Registers],
    poison: Iterable[tuple[int, int, int]],
    facts: dict[str, Any],
    progress: Progress = lambda done, total: None,
    stop: Event | None = None,
    reserve: int = 0,
) -> Dumped:
    """Blocks, for minutes with a large guest. OSError, Fault; then there is no file.

    `facts` go into the note "HWERR" with the list of what was skipped. `progress` gets
    bytes, from this thread. `reserve` bytes of the disk stay free. The caller holds the process, so that
    `pid` is its own.
    """
    if not ranges:
        raise Fault("it is not known where the guest's memory is")
    notes = b"".join(_note(b"CORE", _NT_PRSTATUS, _prstatus(c)) for c in cpus)
    notes += b"".join(_note(b"QEMU", 0, _qemu_state(c)) for c in cpus)
    # The list comes to be while memory is read: it has its place at the end, named by a header of its own.
    headers = _EHDR.size + (len(ranges) + 2) * _PHDR.size
    at = -(-(headers + len(notes)) // PAGE) * PAGE
    offsets = []
    for r in ranges:
        offsets.append(at)
        at += -(-r.length // PAGE) * PAGE
    total, done = sum(r.length for r in ranges), 0
    part = path.with_name(f".{path.name}.part")
    core = memory = -1
    try:
        core = create(part)
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        copier = _Copier(memory, core, _pages(ranges, poison), stop or Event(), reserve)
        skipped: list[tuple[int, int]] = []
        for r, offset in zip(ranges, offsets, strict=True):
            for begin in range(0, r.length, _CHUNK):
                length = min(_CHUNK, r.length - begin)
                copier.copy(r.hva + begin, length, offset + begin)
                done += length
                progress(done, total)
            skipped += [(r.gpa + hva - r.hva, length) for hva, length in copier.unread]
            copier.unread.clear()
        said = json.dumps({**facts, "skipped": [[hex(gpa), length] for gpa, length in skipped]}).encode()
        tail = _note(b"HWERR", 1, said)
        os.pwrite(core, tail, at)
        ident = b"\x7fELF" + bytes((2, 1, 1))
        head = _EHDR.pack(ident, _ET_CORE, _EM_X86_64, 1, 0, _EHDR.size, 0, 0, _EHDR.size, _PHDR.size,
                          len(ranges) + 2, 0, 0, 0)  # fmt: skip
        head += _PHDR.pack(_PT_NOTE, 0, headers, 0, 0, len(notes), len(notes), 0)
        head += _PHDR.pack(_PT_NOTE, 0, at, 0, 0, len(tail), len(tail), 0)
        for r, offset in zip(ranges, offsets, strict=True):
            head += _PHDR.pack(_PT_LOAD, 7, offset, r.gpa, r.gpa, r.length, r.length, 0)
        os.pwrite(core, head + notes, 0)
        os.fsync(core)
        part.replace(path)
        fsync_directory(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        for fd in (core, memory):
            if fd >= 0:
                os.close(fd)
    return Dumped(path, at + len(tail), copier.stored, tuple(skipped))
