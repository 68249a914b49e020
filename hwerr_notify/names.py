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

# What QEMU's processes are called, unless -name has process=.
_QEMU = b"qemu-system", b"qemu-kvm"

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
        # By process number and start in clock ticks, which is what /proc tells of it.
        self._known: OrderedDict[tuple[int, int], tuple[Identity, float]] = OrderedDict()
        self._lock = Lock()

    def __call__(self, guest: Guest) -> Identity:
        """Name and UUID of the guest, as far as they can be known."""
        key = guest.pid, guest.start_ns * _CLOCK_TICKS // 1_000_000_000
        now = monotonic()
        with self._lock:
            known, until = self._known.get(key, (NOBODY, 0.0))
            if now < until:
                self._known.move_to_end(key)
                return known
        name, uuid = self._look_up(*key)
        found = name or known[0], uuid or known[1]
        self._remember(key, found, now + RETRY_S)
        return found

    def learn(self) -> None:
        """Looks up every QEMU there is: one that an error kills is gone when its record is read."""
        try:
            pids = [int(entry.name) for entry in os.scandir(self._proc) if entry.name.isdigit()]
        except OSError:
            return
        for pid in pids:
            try:
                comm = (self._proc / str(pid) / "comm").read_bytes()
            except OSError:
                continue
            ticks = self._start(pid) if comm.startswith(_QEMU) else None
            if ticks is None:
                continue
            with self._lock:
                if (pid, ticks) in self._known:
                    continue
            self._remember((pid, ticks), self._look_up(pid, ticks), 0.0)

    def _remember(self, key: tuple[int, int], found: Identity, until: float) -> None:
        # A process may get its name later: libvirt writes its files after the start.
        with self._lock:
            self._known[key] = found, inf if all(found) else until
            while len(self._known) > self._limit:
                self._known.popitem(last=False)

    def _look_up(self, pid: int, ticks: int) -> Identity:
        try:
            data = (self._proc / str(pid) / "cmdline").read_bytes()
        except OSError:
            return NOBODY
        name, uuid = qemu_identity(os.fsdecode(data).split("\0"))
        if name is None or uuid is None:
            libvirt_name, libvirt_uuid = self._from_libvirt(pid)
            name, uuid = name or libvirt_name, uuid or libvirt_uuid
        # Asked last: what was read is of this process if it is still there.
        return (name, uuid) if self._start(pid) == ticks else NOBODY

    def _start(self, pid: int) -> int | None:
        """Start of the process of that number, in ticks of CLOCK_BOOTTIME; None if there is none."""
        try:
            stat = (self._proc / str(pid) / "stat").read_text("utf-8", "replace")
        except OSError:
            return None
        # proc(5), field 22; the name in field 2 may hold anything.
        fields = stat.rpartition(")")[2].split()
        return int(fields[19]) if len(fields) >= 20 and fields[19].isdigit() else None

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
