# SPDX-License-Identifier: MIT
"""Corrected machine checks on chosen memory, and the events they become."""

from __future__ import annotations

import itertools
import threading
import time
from types import TracebackType
from typing import Self

import hwerr_notify
from hwerr_notify import Event, Source
from testbed import inject
from testbed.records import MCI_ADDRV, MCI_EN, MCI_MISCV, MCI_VAL, MceRecord

# The northbridge's bank and extended error code 8 are DRAM on an AMD CPU before
# Zen, which is what the VM has.
_BANK, _DRAM = 4, 8 << 16
_PHYSICAL = 2 << 6
_SECONDS = 30.0


class Injector:
    """Injects, and reads the file that the events come from. Several threads may share it."""

    def __init__(self) -> None:
        self._device = hwerr_notify.open()
        self._lock = threading.Lock()
        # Errors that differ are not coalesced.
        self._serial = itertools.count(1)

    def hit(self, phys: int, length: int = 4096) -> Event:
        """The event of an error in these bytes; `length` is a power of two, and `phys` a multiple."""
        if length & (length - 1) or phys % length:
            raise ValueError(f"{length} bytes at {phys:#x} cannot be said in a bank's registers")
        with self._lock:
            misc = next(self._serial) << 32 | _PHYSICAL | length.bit_length() - 1
            status = MCI_VAL | MCI_EN | MCI_MISCV | MCI_ADDRV | _DRAM
            inject.mce(MceRecord(status=status, bank=_BANK, addr=phys, misc=misc))
            deadline = time.monotonic() + _SECONDS
            while time.monotonic() < deadline:
                for event in self._device.read(deadline - time.monotonic()):
                    if event.source == Source.MCE and event.mce and event.mce.misc == misc:
                        assert event.memory is not None, "the address was not taken for a physical one"
                        assert (event.memory.phys_addr, event.memory.phys_len) == (phys, length)
                        return event
            raise AssertionError(f"no event within {_SECONDS:g} s")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._device.close()
