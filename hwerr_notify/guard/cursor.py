# SPDX-License-Identifier: MIT
"""Up to which record the daemon has done what is to be done, for the one that comes after it.

A file in the run directory, which goes with the boot, as the numbers do. They also begin anew
with the module, whose device is then another. Written now and then, not with each record of a storm:
what was handled and not noted is handled again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from ..device import Device, Since
from ..jsonform import boot_id

__all__ = ["Cursor"]

log = logging.getLogger("hwerr-guard")

# The least time from one writing to the next, seconds.
_PAUSE = 0.2


class Cursor:
    """Belongs to the event loop's thread."""

    def __init__(self, path: Path, device: str) -> None:
        self.path = path
        self._device = device
        self._changed = asyncio.Event()

    def _whose(self) -> dict[str, object]:
        return {"boot_id": boot_id(), "device": os.stat(self._device).st_ino}

    def since(self, device: Device) -> Since:
        """Where to read on. OSError if the device will not tell where it is."""
        try:
            found = json.loads(self.path.read_bytes())
            seq = int(found.pop("seq"))
            if found == self._whose():
                return seq + 1
            if found["boot_id"] == boot_id():
                return "boot"
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s: %s: errors of before this start are not looked at", self.path, error)
        # From here on: what comes while nobody has noted anything is not missed either.
        if not (following := device.info().next_seq):
            return "now"
        self.write(following - 1)
        return following

    def write(self, seq: int) -> None:
        """Notes that all up to that record is done. A directory that refuses is logged."""
        part = self.path.with_name(f".{self.path.name}.part")
        try:
            part.write_text(json.dumps({**self._whose(), "seq": seq}) + "\n", "ascii")
            part.replace(self.path)
        except OSError as error:
            log.warning("%s: %s", self.path, error.strerror)

    def moved(self) -> None:
        """There is something to note."""
        self._changed.set()

    async def keep(self, done: Callable[[], int]) -> None:
        """Notes what `done` says, until it is cancelled."""
        last = None
        while True:
            await self._changed.wait()
            self._changed.clear()
            if (seq := done()) != last:
                await asyncio.to_thread(self.write, seq)
                last = seq
            await asyncio.sleep(_PAUSE)
