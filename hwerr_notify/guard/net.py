# SPDX-License-Identifier: MIT
"""Taking a stopped QEMU off the network, and its passed-through devices off the memory.

Each may be done again; what is gone already is as it should be.
"""

from __future__ import annotations

import errno
import functools
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import netns
from .errors import Fault, Refused, each
from .monitor import Monitor, answer, by_hmp, hmp, together
from .process import SYSFS, Tap, passed_through

__all__ = [
    "QUESTION",
    "QUESTIONS",
    "backends",
    "dma_is_stopped",
    "get_ready",
    "missing",
    "release_backends",
    "release_taps",
    "stop_dma",
    "tap_states",
]

# PCI Local Bus 3.0, 6.2.2: Command register, Bus Master bit.
_PCI_COMMAND, _PCI_MASTER = 4, 1 << 2
# linux/if.h
_IFF_UP = 1
QUESTION = "info network"
QUESTIONS = (by_hmp(QUESTION),)
_BACKEND = re.compile(r"^(?: \\ )?(\S+): index=\d+,type=(?!nic\b)", re.M)


def missing() -> str | None:
    """Why taps cannot be taken down, None if they can."""
    if find_spec("pyroute2") is None:
        return "taps cannot be taken down: install the Python package pyroute2"
    return None


def get_ready() -> None:
    """Loads what `release_taps` needs. In good times, because it takes longer than all the rest."""
    with suppress(ImportError):
        import_module("pyroute2")


def backends(text: str) -> list[str]:
    """Names of host network backends in what `info network` prints: all that is no NIC."""
    return [m[1] for m in _BACKEND.finditer(text)]


async def release_backends(monitor: Monitor, asked: list[Any] | None = None) -> list[str]:
    """Removes every network backend; the names of those that were removed now. Fault, MonitorError.

    `asked`: the answer to `QUESTIONS`, since the guest was stopped.
    """
    text = answer(asked[0], str, QUESTION) if asked else await hmp(monitor, QUESTION)
    known: set[str] = set()
    removed: list[str] = []
    # Until there is none that it was not told of: somebody may have added one since it was asked.
    while names := [name for name in backends(text) if name not in known]:
        known.update(names)
        *gone, text = await together(
            *(_release_backend(monitor, name) for name in names), hmp(monitor, QUESTION)
        )
        removed += [name for name, now in zip(names, gone, strict=True) if now]
    return removed


async def _release_backend(monitor: Monitor, name: str) -> bool:
    try:
        await monitor.execute("netdev_del", {"id": name})
    except Refused as error:
        # Listed with its NIC until the NIC goes, and not found once it is closed.
        if error.kind == "DeviceNotFound" or "not found" in str(error):
            return False
        raise Fault(f"network backend {name}: {error}") from None
    return True


def _set_down(names: list[str]) -> tuple[dict[str, int], list[str]]:
    """In the namespace of the thread that calls: those that were still there, with their index, and what
    failed."""
    try:
        from pyroute2 import IPRoute, NetlinkError
    except ImportError as error:
        raise Fault(f"taps cannot be taken down: {error}: install the Python package pyroute2") from None

    changed: dict[str, int] = {}
    failed = []
    with IPRoute() as ip:
        for name in names:
            found = ip.link_lookup(ifname=name)
            if not found:
                continue
            try:
                # Down first, and by itself: what is on Open vSwitch has a master that is not to be taken
                # away, and a request of which one part is refused is not done at all.
                ip.link("set", index=found[0], state="down")
                ip.link("set", index=found[0], master=0)
            except NetlinkError as error:
                # Whatever has it that does not give it away: it is down, and carries nothing.
                if error.code != errno.EOPNOTSUPP:
                    # ENODEV: a tap that is not persistent went with its last user.
                    if error.code != errno.ENODEV:
                        failed.append(f"tap {name}: {os.strerror(error.code)}")
                    continue
            changed[name] = found[0]
    return changed, failed


def release_taps(taps: list[str], pid: int) -> dict[str, int]:
    """Off their bridge and down, each in its namespace; those that were still there, each with the index
    that no other interface of that namespace gets. Blocks. Fault.

    `pid`: the process that has them.
    """
    changed: dict[str, int] = {}
    failed = []
    for namespace, names in _by_namespace(taps).items():
        try:
            done, why = netns.inside(namespace, pid, functools.partial(_set_down, names))
        except Fault as error:
            done, why = {}, [f"tap {', '.join(names)}: {error}"]
        changed |= {str(Tap(name, namespace)): index for name, index in done.items()}
        failed += why
    if failed:
        raise Fault("; ".join(failed))
    return changed


def _by_namespace(taps: list[str]) -> dict[str | None, list[str]]:
    found: dict[str | None, list[str]] = {}
    for tap in map(Tap.parse, taps):
        found.setdefault(tap.namespace, []).append(tap.name)
    return found


def tap_states(taps: list[str], pid: int) -> dict[str, dict[str, int]]:
    """Whether each interface is up and on a bridge, and its index, of those that there are. Blocks. Fault."""
    found = {}
    for namespace, names in _by_namespace(taps).items():
        look = _state if namespace is None else _state_elsewhere
        for name, state in netns.inside(namespace, pid, functools.partial(_states, names, look)).items():
            found[str(Tap(name, namespace))] = state
    return found


def _states(names: list[str], look: Callable[[str], dict[str, int] | None]) -> dict[str, dict[str, int]]:
    states = {name: look(name) for name in names}
    return {name: state for name, state in states.items() if state is not None}


def _state(name: str) -> dict[str, int] | None:
    link = Path("/sys/class/net") / name
    try:
        flags = int((link / "flags").read_text("ascii"), 16)
        index = int((link / "ifindex").read_text("ascii"))
    except FileNotFoundError:
        return None
    # Open vSwitch has it as a master, too: what is on that and down carries nothing.
    return {"up": bool(flags & _IFF_UP), "bridged": (link / "brport").exists(), "index": index}


def _state_elsewhere(name: str) -> dict[str, int] | None:
    """Of the namespace of the thread that calls. What is mounted at /sys shows another's."""
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        for index in ip.link_lookup(ifname=name):
            for link in ip.get_links(index):
                kind = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_SLAVE_KIND")
                return {"up": bool(link["flags"] & _IFF_UP), "bridged": kind == "bridge", "index": index}
    return None


def stop_dma(files: Iterable[str], sysfs: Path = SYSFS) -> list[str]:
    """Bus mastering off in every passed-through device; their addresses. Fault.

    `files`: what the process was seen to have open since it was stopped.
    """
    devices = passed_through(files, sysfs)
    each(*(functools.partial(_stop_dma, address, sysfs) for address in devices))
    return devices


def _stop_dma(address: str, sysfs: Path) -> None:
    if _masters(address, sysfs, stop=True):
        raise Fault(f"device {address} keeps bus mastering on")


def dma_is_stopped(files: Iterable[str], sysfs: Path = SYSFS) -> None:
    """Fault if a passed-through device has bus mastering, whoever gave it back. `files` as of `stop_dma`."""
    for address in passed_through(files, sysfs):
        if _masters(address, sysfs):
            raise Fault(f"device {address} has bus mastering on again")


def _masters(address: str, sysfs: Path, *, stop: bool = False) -> bool:
    """Whether the device may begin transfers, after it was told not to if `stop`. Fault."""
    path = sysfs / "bus/pci/devices" / address / "config"
    try:
        fd = os.open(path, (os.O_RDWR if stop else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            if stop:
                command = int.from_bytes(os.pread(fd, 2, _PCI_COMMAND), "little")
                os.pwrite(fd, (command & ~_PCI_MASTER).to_bytes(2, "little"), _PCI_COMMAND)
            now = os.pread(fd, 2, _PCI_COMMAND)
        finally:
            os.close(fd)
    except OSError as error:
        raise Fault(f"{path}: {error.strerror}") from None
    if len(now) < 2:
        raise Fault(f"{path} does not show the Command register")
    return bool(int.from_bytes(now, "little") & _PCI_MASTER)
