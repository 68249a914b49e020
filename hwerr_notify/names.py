# SPDX-License-Identifier: MIT
"""Names and UUIDs of the VMs behind processes.

From QEMU's command line, or from the files that libvirt keeps of running domains.
A process is identified by its number and its start time, so a reused number is
never given another's name. Wrong or missing files mean "no name", never an error.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from math import inf
from pathlib import Path
from threading import Lock
from time import monotonic
from uuid import UUID

from .event import Guest

__all__ = ["Names", "qemu_identity"]

Identity = tuple[str | None, UUID | None]
NOBODY: Identity = (None, None)

# How long "no name" or "no UUID" is believed, seconds.
RETRY_S = 2.0

_CLOCK_TICKS: int = os.sysconf("SC_CLK_TCK")


def _option_value(text: str, implied: str) -> dict[str, str]:
    """QEMU's `key=value,...`: a first part without `=` is of the key `implied`, `,,` is a comma."""
    parts = text.replace(",,", "\0").split(",")
    values: dict[str, str] = {}
    for n, part in enumerate(parts):
        key, equals, value = part.partition("=")
        if not equals:
            if n:
                continue
            key, value = implied, part
        values[key] = value.replace("\0", ",")
    return values


def _uuid(text: str | None) -> UUID | None:
    try:
        return UUID(text) if text else None
    except ValueError:
        return None


def qemu_identity(argv: Sequence[str]) -> Identity:
    """Name and UUID that a QEMU command line gives; of an option given twice, the last."""
    name = uuid = None
    options = iter(argv[1:])
    for option in options:
        match option.removeprefix("-") if option.startswith("--") else option:
            case "-name":
                name = _option_value(next(options, ""), "guest").get("guest", name)
            case "-uuid":
                uuid = next(options, None)
    return name or None, _uuid(uuid)


class Names:
    """Looks VMs up and remembers `limit` of them. Safe to use from several threads."""

    def __init__(
        self, limit: int = 1024, proc: Path = Path("/proc"), libvirt: Path = Path("/run/libvirt")
    ) -> None:
        self._limit = limit
        self._proc = proc
        self._libvirt = libvirt
        self._known: OrderedDict[tuple[int, int], tuple[Identity, float]] = OrderedDict()
        self._lock = Lock()

    def __call__(self, guest: Guest) -> Identity:
        """Name and UUID of the guest, as far as they can be known."""
        key = guest.pid, guest.start_ns
        now = monotonic()
        with self._lock:
            known, until = self._known.get(key, (NOBODY, 0.0))
            if now < until:
                self._known.move_to_end(key)
                return known
        name, uuid = self._look_up(guest)
        found = name or known[0], uuid or known[1]
        # A process may get its name later: libvirt writes its files after the start.
        until = inf if all(found) else now + RETRY_S
        with self._lock:
            self._known[key] = found, until
            while len(self._known) > self._limit:
                self._known.popitem(last=False)
        return found

    def _look_up(self, guest: Guest) -> Identity:
        try:
            data = (self._proc / str(guest.pid) / "cmdline").read_bytes()
        except OSError:
            return NOBODY
        name, uuid = qemu_identity(os.fsdecode(data).split("\0"))
        if name is None or uuid is None:
            libvirt_name, libvirt_uuid = self._from_libvirt(guest.pid)
            name, uuid = name or libvirt_name, uuid or libvirt_uuid
        # Asked last: what was read is of this process if it is still there.
        return (name, uuid) if self._is(guest) else NOBODY

    def _is(self, guest: Guest) -> bool:
        """Whether the process of that number is the one that the record names."""
        try:
            stat = (self._proc / str(guest.pid) / "stat").read_text("utf-8", "replace")
        except OSError:
            return False
        # proc(5): field 22, in ticks of CLOCK_BOOTTIME; the name in field 2 may hold anything.
        fields = stat.rpartition(")")[2].split()
        if len(fields) < 20 or not fields[19].isdigit():
            return False
        return int(fields[19]) == guest.start_ns * _CLOCK_TICKS // 1_000_000_000

    def _from_libvirt(self, pid: int) -> Identity:
        from xml.etree import ElementTree

        for pidfile in self._pidfiles():
            try:
                if int(pidfile.read_text("ascii")) != pid:
                    continue
                root = ElementTree.parse(pidfile.with_suffix(".xml")).getroot()
            except (OSError, ValueError, ElementTree.ParseError):
                continue
            domain = root if root.tag == "domain" else root.find("domain")
            if domain is None:
                return pidfile.stem, None
            return domain.findtext("name") or pidfile.stem, _uuid(domain.findtext("uuid"))
        return NOBODY

    def _pidfiles(self) -> list[Path]:
        # One directory a driver: qemu, ch, lxc, ...
        try:
            return sorted(self._libvirt.glob("*/*.pid"))
        except OSError:
            return []
