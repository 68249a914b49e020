# SPDX-License-Identifier: MIT
"""What else a QEMU reaches the outside by than image files and taps: other programs, sockets, open files.

Devices whose other half is another program or the kernel (vhost-user, vhost-scsi, vDPA) have no node that
could be taken from them, and a guest that has one is not called FROZEN. Disks that are reached over the
network are detached as others are; that it is so is seen by their connections. What QEMU was given as an
open file (`-add-fd`) has no name of its own, and is known by what it is.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .. import bpf
from .errors import Fault, MonitorError, Refused
from .monitor import Monitor, Question, answer, together
from .process import Connection, Process, served

__all__ = ["QUESTIONS", "Given", "connected", "devices", "given", "nothing_else", "peers", "remotes"]

# hw/virtio, hw/scsi, hw/display, hw/remote, hw/vfio-user of QEMU: whose other half is not in it. A network's
# is a backend's, and goes with it; a vsock's worker is stopped with the guest, and the seal does not let it
# begin again. And memory that is a file others may have too: what the guest wrote is in its mapping, and goes
# there when the kernel likes.
_DEVICE = re.compile(
    r"child<(vhost-user-[a-z0-9]+|vhost-scsi|vhost-vdpa-device|vfio-user-pci|x-pci-proxy-dev|"
    r"nvdimm|virtio-pmem)"
)

# block/: protocols that are spoken over a connection, and libblkio's drivers, which are no files.
_REMOTE = frozenset(
    {"nbd", "rbd", "iscsi", "nfs", "gluster", "gluster+tcp", "gluster+unix", "gluster+rdma", "ssh", "http",
     "https", "ftp", "ftps", "sheepdog", "vxhs"}
)  # fmt: skip
_FOREIGN = frozenset(
    {"virtio-blk-vhost-user", "virtio-blk-vhost-vdpa", "virtio-blk-vfio-pci", "nvme-io_uring"}
)

FDSET = "/dev/fdset/"
# How long a look at a given file may take, seconds: one on a dead NFS server does not come back.
_LOOKS_WITHIN = 2.0


@dataclass(frozen=True, slots=True)
class Given:
    """A file that QEMU was given open: (device, inode) as stat(2) shows it, and as the kernel numbers it.

    Which may not be known, as when it is on a mount that nobody shows.
    """

    shown: tuple[int, int]
    kernel: tuple[int, int] | None


# What `devices` asks.
QUESTIONS: tuple[Question, ...] = (
    ("qom-list", {"path": "/machine/peripheral"}),
    ("qom-list", {"path": "/machine/peripheral-anon"}),
)


async def devices(monitor: Monitor) -> list[str]:
    """Those that are not released, with their names. MonitorError."""
    said = await together(*(monitor.execute(*question) for question in QUESTIONS))
    found = []
    for child in [child for children in said for child in answer(children, list, "qom-list")]:
        name, kind = (answer(child, dict, "qom-list").get(key) for key in ("name", "type"))
        if match := _DEVICE.match(str(kind)):
            found.append(f"{match[1]} {name}")
    return found


def foreign(nodes: list[dict[str, Any]]) -> list[str]:
    """Nodes that are not released, as `devices`."""
    return [f"{n['drv']} {n['node-name']}" for n in nodes if n.get("drv") in _FOREIGN]


def remotes(nodes: list[dict[str, Any]]) -> frozenset[str]:
    """What is reached over a connection, as QEMU names it."""
    return frozenset(f"{n['drv']} {n['file']}" for n in nodes if n.get("drv") in _REMOTE)


async def peers(monitor: Monitor) -> frozenset[str]:
    """HOST:PORT to which character devices are connected. MonitorError."""
    said = answer(await monitor.execute("query-chardev"), list, "query-chardev")
    names = [str(answer(chardev, dict, "query-chardev").get("filename")) for chardev in said]
    found = [name.rpartition(" <-> ") for name in names]
    return frozenset(peer for _, arrow, peer in found if arrow)


async def given(monitor: Monitor, process: Process, images: Iterable[str]) -> frozenset[Given]:
    """Files of those images that are sets of open files. MonitorError."""
    wanted = _sets(images)
    if not wanted:
        return frozenset()
    sets = answer(await monitor.execute("query-fdsets"), list, "query-fdsets")
    try:
        numbers = [int(fd["fd"]) for s in sets if int(s["fdset-id"]) in wanted for fd in s["fds"]]
    except (KeyError, TypeError, ValueError) as error:
        raise MonitorError(f"QEMU's answers make no sense ({error!r})") from None
    try:
        async with asyncio.timeout(_LOOKS_WITHIN):
            return await asyncio.to_thread(_given, process, numbers)
    except TimeoutError:
        raise MonitorError("a file that QEMU was given does not answer") from None


def _given(process: Process, numbers: list[int]) -> frozenset[Given]:
    # QEMU's own, and those that it locks: it may have been told to forget the set since.
    numbers = [*numbers, *(held.fd for held in process.look().files if held.locked)]
    found = set()
    for number in numbers:
        with suppress(FileNotFoundError, ProcessLookupError):
            status = os.stat(f"/proc/{process.pid}/fd/{number}")
            kernel = None
            with suppress(OSError):
                kernel = bpf.inode_of_open(process.pid, number)
            found.add(Given((status.st_dev, status.st_ino), kernel))
    return frozenset(found)


async def take_given(monitor: Monitor, images: Iterable[str]) -> None:
    """Has QEMU close its own files of these sets, once no node uses them. MonitorError."""
    await together(*(_take(monitor, number) for number in sorted(_sets(images))))


def _sets(images: Iterable[str]) -> set[int]:
    numbers = (image.removeprefix(FDSET) for image in images if image.startswith(FDSET))
    return {int(number) for number in numbers if number.isdecimal()}


async def _take(monitor: Monitor, number: int) -> None:
    # Gone already, or will not go: what is open is looked at in the kernel.
    with suppress(Refused):
        await monitor.execute("remove-fd", {"fdset-id": number})


def connected(connections: Iterable[Connection], to: frozenset[str], others: frozenset[str]) -> list[str]:
    """Peers to which it is still connected and that may be those of remote disks.

    Where there is none, nobody's connection matters. Over which a network disk goes is not always to be known
    by its name: all count but those of character devices (`others`), and over AF_UNIX those that are named. A
    socket is shown under the path at which its server has bound it, which may be another to the same.
    """
    if not to:
        return []

    def of_disk(peer: Connection) -> bool:
        if not peer.local:
            return peer.peer not in others
        last = os.path.basename(peer.peer.lstrip("\0"))
        return any(last in name for name in to)

    return [c.peer.replace("\0", "@") for c in connections if of_disk(c)]


def nothing_else(files: Iterable[str], known: Iterable[str]) -> None:
    """Fault if there is what is not released: as far as QEMU has said, or by what the process has open."""
    if found := [*known, *served(files)]:
        raise Fault("; ".join(f"{what}: not released by this version" for what in found))
