# SPDX-License-Identifier: MIT
"""Records of firmware in QEMU's persistent store, and in the region of a boot error table.

The store is as hw/acpi/erst.c of QEMU lays it out: a header with the map of record
numbers, then slots of one size. Records are those of UEFI, appendix N.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from uuid import UUID

SLOT = 8192
STORE = 0x10000
MEMORY = UUID("a5bc1114-6f64-4ede-b863-3e83ed7c83b1")
FIRMWARE = UUID("00000000-0000-0000-0000-0000f1f1f1f1")
RECOVERABLE, FATAL, CORRECTED, INFO = range(4)
_VALID_TIMESTAMP = 2


@dataclass(frozen=True)
class Section:
    """One section; `offset` and `length` instead of the true ones, to lie."""

    kind: UUID
    severity: int
    data: bytes
    fru_text: bytes = b""
    offset: int | None = None
    length: int | None = None


def bcd(time: datetime) -> int:
    """UEFI N.2.1, "Timestamp": BCD, lowest byte first."""
    parts = (
        time.second,
        time.minute,
        time.hour,
        0x01,
        time.day,
        time.month,
        time.year % 100,
        time.year // 100,
    )
    return sum((n // 10 << 4 | n % 10 if i != 3 else n) << 8 * i for i, n in enumerate(parts))


def record(
    number: int,
    sections: Sequence[Section],
    *,
    time: datetime | None = None,
    signature: bytes = b"CPER",
    count: int | None = None,
    flags: int = 2,
) -> bytes:
    """A record (UEFI N.2.1); `count` instead of the true number of sections."""
    head, descriptor = 128, 72
    body, table = b"", b""
    at = head + descriptor * len(sections)
    for s in sections:
        table += struct.pack(
            "<IIHBBI16s16sI20s",
            at + len(body) if s.offset is None else s.offset,
            len(s.data) if s.length is None else s.length,
            0x0100, 2 if s.fru_text else 0, 0, 1, s.kind.bytes_le, bytes(16), s.severity, s.fru_text,
        )  # fmt: skip
        body += s.data
    return (
        struct.pack(
            "<4sHIHIIIQ16s16s16s16sQIQ12s",
            signature,
            0x0100,
            0xFFFFFFFF,
            len(sections) if count is None else count,
            max((s.severity for s in sections), default=INFO),
            _VALID_TIMESTAMP if time else 0,
            at + len(body),
            bcd(time) if time else 0,
            bytes(16),
            bytes(16),
            FIRMWARE.bytes_le,
            bytes(16),
            number,
            flags,
            0,
            bytes(12),
        )
        + table
        + body
    )


def memory(address: int, mask: int = ~0xFFF & (1 << 64) - 1, etype: int = 2) -> bytes:
    """A platform memory section (UEFI N.2.5) with address, mask and error type."""
    valid = 1 << 1 | 1 << 2 | 1 << 14
    return struct.pack("<QQQQ8H3QB7x", valid, 0, address, mask, *[0] * 8, 0, 0, 0, etype)


def write_store(path: Path, records: Sequence[bytes]) -> None:
    """Make `path` a store that holds these records."""
    numbers = [struct.unpack_from("<Q", r, 96)[0] for r in records]
    slots = [0, *numbers] + [0] * (STORE // SLOT - 1 - len(records))
    head = struct.pack("<QIIHHI", 0x524F545354535245, SLOT, SLOT, 0x0100, 0, len(records))
    data = (head + struct.pack(f"<{len(slots)}Q", *slots)).ljust(SLOT, b"\0")
    for r in records:
        data += r.ljust(SLOT, b"\0")
    path.write_bytes(data.ljust(STORE, b"\0"))


def generic_data(section: Section, time: datetime | None = None, length: int | None = None) -> bytes:
    """A section of a boot error region (ACPI 18.3.2.7.1); `length` instead of the true one."""
    valid = (2 if section.fru_text else 0) | (4 if time else 0)
    head = struct.pack(
        "<16sIHBBI16s20sQ",
        section.kind.bytes_le, section.severity, 0x0300, valid, 0,
        len(section.data) if length is None else length, bytes(16), section.fru_text,
        bcd(time) if time else 0,
    )  # fmt: skip
    return head + section.data


def status_block(sections: Sequence[bytes], severity: int, data_length: int | None = None) -> bytes:
    """A generic error status block, status "one uncorrectable"; `data_length` instead of the true one."""
    data = b"".join(sections)
    status = 1 | len(sections) << 4
    return (
        struct.pack("<IIIII", status, 0, 0, len(data) if data_length is None else data_length, severity)
        + data
    )


def bert_table(address: int, length: int) -> bytes:
    """What follows the header of a BERT."""
    return struct.pack("<IQ", length, address)
