# SPDX-License-Identifier: MIT
"""Errors on chosen memory, and the events they become."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from testbed import inject
from testbed.guest import Guest, GuestConfig
from testbed.records import MCI_ADDRV, MCI_EN, MCI_MISCV, MCI_VAL, MceRecord
from testbed.wait import wait_event

import hwerr_notify
from hwerr_notify import Event, Flags, Source

PAGE = 4096
UNSURE = Flags.OWNERS_UNKNOWN | Flags.OWNERS_TRUNCATED

# The northbridge's bank and extended error code 8 are DRAM on an AMD CPU before
# Zen, which is what the VM has.
_BANK, _DRAM = 4, 8 << 16
_PHYSICAL = 2 << 6


class Injector:
    """Injects, and reads the file that the events come from. Several threads may share it."""

    def __init__(self) -> None:
        self._device = hwerr_notify.open()
        self._lock = threading.Lock()
        # Errors that differ are not coalesced.
        self._serial = itertools.count(1)

    def hit(self, phys: int, length: int = PAGE) -> Event:
        """The event of a corrected machine check that hits these bytes.

        `length` is a power of two, and `phys` a multiple of it.
        """
        if length & (length - 1) or phys % length:
            raise ValueError(f"{length} bytes at {phys:#x} cannot be said in a bank's registers")
        with self._lock:
            misc = next(self._serial) << 32 | _PHYSICAL | length.bit_length() - 1
            status = MCI_VAL | MCI_EN | MCI_MISCV | MCI_ADDRV | _DRAM
            inject.mce(MceRecord(status=status, bank=_BANK, addr=phys, misc=misc))
            return self._await(
                phys, length, lambda e: e.source == Source.MCE and e.mce is not None and e.mce.misc == misc
            )

    def poison(self, pfn: int) -> Event:
        """The event of memory_failure() on that page, which its owners lose."""
        with self._lock:
            self._device.drain()
            inject.hwpoison(pfn)
            return self._await(pfn * PAGE, PAGE, lambda e: e.source == Source.MEMORY_FAILURE)

    def _await(self, phys: int, length: int, wanted: Callable[[Event], bool]) -> Event:
        event = wait_event(self._device, wanted)
        assert event.memory is not None, "the address was not taken for a physical one"
        assert (event.memory.phys_addr, event.memory.phys_len) == (phys, length)
        return event

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._device.close()


def start(stack: ExitStack, name: str, backing: str = "anon", **more: object) -> Guest:
    """A small guest, which ends with `stack`."""
    config = GuestConfig(name=name, backing=backing, **{"mem": 64 << 20, **more})  # type: ignore[arg-type]
    return stack.enter_context(Guest.start(config))


def random_gpa(guest: Guest) -> int:
    """Guest-physical address of some page of its RAM."""
    starts = guest.ram_gpas()
    at = random.randrange(sum(length for _, length in starts) // PAGE) * PAGE
    for gpa, length in starts:
        if at < length:
            return gpa + at
        at -= length
    raise AssertionError("unreachable")


def hit_random_pages(guest: Guest, hit: Callable[[int], Event], pages: int = 50) -> list[hwerr_notify.Guest]:
    """What the event of each error tells of the guest; that it hits the guest's page and nobody else."""
    told = []
    for _ in range(pages):
        gpa = random_gpa(guest)
        event = hit(guest.gpa2hpa(gpa))
        assert not event.flags & UNSURE
        assert not event.tasks
        (g,) = event.guests
        assert (g.pid, g.gpa, g.hva, g.len) == (guest.pid, gpa, guest.gpa2hva(gpa), PAGE)
        assert g.kvm
        told.append(g)
    assert len({g.vm_id for g in told}) == 1
    assert told[0].vm_id
    return told
