# SPDX-License-Identifier: MIT
"""Virtual to physical addresses (Documentation/admin-guide/mm/pagemap.rst)."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

from .errors import TestbedError

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
_PRESENT = 1 << 63
_SWAPPED = 1 << 62
_PFN = (1 << 55) - 1
_MOVING = 1.0


def _entry(pid: int, va: int) -> int:
    try:
        with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
            pagemap.seek(va // PAGE_SIZE * 8)
            data = pagemap.read(8)
    except OSError as error:
        raise TestbedError(f"cannot read the page table of process {pid}: {error.strerror}") from error
    if len(data) != 8:
        raise TestbedError(f"process {pid} has nothing at {va:#x}")
    (entry,) = struct.unpack("=Q", data)
    return int(entry)


def pfn_of(pid: int, va: int) -> int:
    """Page frame behind an address of a process. Raises TestbedError if none is there."""
    deadline = time.monotonic() + _MOVING
    # For a moment, a page that the kernel moves looks like one that is swapped out.
    while (entry := _entry(pid, va)) & _SWAPPED and time.monotonic() < deadline:
        time.sleep(0.001)
    if entry & _SWAPPED:
        raise TestbedError(f"the page at {va:#x} of process {pid} is swapped out or poisoned")
    if not entry & _PRESENT:
        raise TestbedError(f"process {pid} has no page at {va:#x}: not touched, or nothing is mapped")
    pfn = entry & _PFN
    if pfn == 0:
        raise TestbedError("the kernel hides page frames: this needs CAP_SYS_ADMIN")
    return pfn


def physical(pid: int, va: int) -> int:
    """Physical address behind an address of a process."""
    return pfn_of(pid, va) * PAGE_SIZE + va % PAGE_SIZE
