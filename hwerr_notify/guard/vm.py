# SPDX-License-Identifier: MIT
"""A VM that is guarded: its process, its monitor, and what is known of it in good times."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

from ..message import printable
from . import disks, layout, net, outside
from .errors import MonitorError, Refused
from .monitor import Monitor, Question, answer, by_hmp, hmp, run_state, together
from .policy import VmPolicy
from .process import Process

__all__ = ["REGISTERS", "Machine", "Vm", "look", "questions"]


@dataclass(frozen=True, slots=True)
class Machine:
    """What the steps need and a monitor may not tell any more when they run."""

    kvm: bool = True
    tids: tuple[int, ...] = ()
    images: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()
    ranges: tuple[layout.Range, ...] = ()
    # As of outside.py.
    devices: tuple[str, ...] = ()
    remotes: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    given: tuple[outside.Given, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "kvm": self.kvm,
            "tids": list(self.tids),
            "images": list(self.images),
            "taps": list(self.taps),
            "ranges": layout.to_json(self.ranges),
            "devices": list(self.devices),
            "remotes": list(self.remotes),
            "peers": list(self.peers),
            "given": [[g.shown, g.kernel] for g in self.given],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Machine:
        return cls(
            bool(data["kvm"]),
            tuple(data["tids"]),
            tuple(data["images"]),
            tuple(data["taps"]),
            layout.from_json(data["ranges"]),
            # Not in what an earlier release has saved.
            tuple(data.get("devices", ())),
            tuple(data.get("remotes", ())),
            tuple(data.get("peers", ())),
            tuple(
                outside.Given((shown[0], shown[1]), (kernel[0], kernel[1]) if kernel else None)
                for shown, kernel in data.get("given", ())
            ),
        )


async def look(
    monitor: Monitor,
    process: Process,
    before: Machine | None = None,
    *,
    placed: bool = False,
    taps: list[str] | None = None,
    released: bool = False,
) -> Machine:
    """Asks QEMU and the kernel. What `before` knew of disks stays known. MonitorError.

    `placed`: nothing was taken from the guest since `before`, so that memory of which it knows is where it
    was. `taps`: of a look just now. `released`: some may have been taken from it by the guard since `before`;
    else the name of one that it has no more may be another VM's by now.
    """
    said_cpus, said_nodes, devices, ranges, (seen_taps, kvm) = await together(
        monitor.execute("query-cpus-fast"),
        monitor.execute("query-named-block-nodes", {"flat": True}),
        outside.devices(monitor),
        layout.ranges(monitor, before.ranges if before else (), placed=placed),
        _look_at_host(process, before, taps),
    )
    cpus = answer(said_cpus, list, "query-cpus-fast")
    nodes = answer(said_nodes, list, "query-named-block-nodes")
    try:
        tids = tuple(sorted(int(cpu["thread-id"]) for cpu in cpus))
        images = disks.image_paths(nodes)
        remotes = outside.remotes(nodes)
        foreign = outside.foreign(nodes)
    except (KeyError, TypeError, ValueError) as error:
        raise MonitorError(f"QEMU's answers make no sense ({error!r})") from None
    known = before or Machine()
    machine = Machine(
        kvm=kvm,
        tids=tids,
        images=tuple(sorted(images | set(known.images))),
        taps=tuple(sorted({*seen_taps, *(known.taps if released else ())})),
        ranges=ranges,
        # One that was unplugged counts until the guard looks anew: it would be QEMU's word alone.
        devices=tuple(sorted({*devices, *foreign, *known.devices})),
        remotes=tuple(sorted(remotes | set(known.remotes))),
        peers=known.peers,
        given=known.given,
    )
    # Another round trip, of those few that have such disks and were not known to.
    if machine.remotes and not known.remotes:
        machine = replace(machine, peers=tuple(sorted(await outside.peers(monitor))))
    if new := images - set(known.images):
        given = await outside.given(monitor, process, new)
        machine = replace(machine, given=tuple(given | set(known.given)))
    return machine


async def _look_at_host(
    process: Process, before: Machine | None, taps: list[str] | None
) -> tuple[list[str], bool]:
    """Its taps, and whether it runs under KVM, which does not change once it was seen to."""
    # Of one that was never looked at nothing is known, not even that.
    if taps is not None and before is not None and before.tids and before.kvm:
        return taps, True
    return await asyncio.to_thread(lambda: (process.taps(), process.has_kvm()))


_DESCRIPTION = {"network": net.QUESTION, "registers": "info registers -a"}

# To be asked last: vCPUs' threads run to tell them, and then look as if they were in the guest.
REGISTERS: Question = by_hmp(_DESCRIPTION["registers"])


def questions(placed: bool) -> list[Question]:
    """What `describe` and `look` ask but for registers, as far as known before; `placed` as of `look`."""
    lines = [*([layout.QUESTION] if placed else []), net.QUESTION]
    return [("query-cpus-fast", None), *outside.QUESTIONS, *map(by_hmp, lines)]


@dataclass(eq=False)
class Vm:
    """One QEMU process under a policy. Belongs to the event loop's thread."""

    name: str
    uuid: str | None
    process: Process
    policy: VmPolicy
    where: str  # the monitor's socket, or libvirt's URI
    monitor: Monitor | None = None
    machine: Machine = field(default_factory=Machine)
    armed: str | None = None  # None: the kernel stops it; else why it does not
    incident: str | None = None
    degraded: str | None = None
    # Set while QEMU has said that the guest does not run, by its status or by events after that.
    halted: asyncio.Event = field(default_factory=asyncio.Event)
    # How often it said, or may have said unheard, that it runs again.
    resumes: int = 0
    # What does not change as long as the process lives, as far as it is known.
    argv: list[str] | None = None
    version: Any = None
    # Nothing was taken from the guest since `machine` was looked at; and how often something was.
    placed: bool = False
    taken: int = 0
    # What is being done with it; one thing at a time.
    work: asyncio.Task[None] | None = None
    progress: tuple[int, int] | None = None
    # Set when a monitor was connected.
    reconnected: asyncio.Event = field(default_factory=asyncio.Event)
    # Set when its process has ended, and what that asks for is done.
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def key(self) -> tuple[int, int]:
        return self.process.pid, self.process.start_ticks

    @property
    def connected(self) -> bool:
        """Whether it has a monitor now."""
        return self.monitor is not None and not self.monitor.closed.is_set()

    def need_monitor(self) -> Monitor:
        """MonitorError if there is none."""
        if self.monitor is None or self.monitor.closed.is_set():
            raise MonitorError("QEMU's monitor is not connected")
        return self.monitor

    async def await_monitor(self) -> None:
        """Until there is one: what is away for a moment is connected again. The caller's time limits it."""
        while not self.connected:
            self.reconnected.clear()
            await self.reconnected.wait()

    async def status(self, monitor: Monitor | None = None) -> str:
        """QEMU's own run state. MonitorError."""
        return await run_state(monitor or self.need_monitor())

    def heard(self, event: dict[str, Any]) -> None:
        """An event of its monitor, each in its turn."""
        match event.get("event"):
            case "STOP":
                self.halted.set()
            case "RESUME":
                self.halted.clear()
                self.resumes += 1
            case "DEVICE_DELETED":
                self.placed = False
                self.taken += 1

    def missed(self) -> None:
        """Its monitor was away: what its events would have said is not known."""
        self.halted.clear()
        self.resumes += 1
        self.placed = False

    async def look_anew(self) -> None:
        """In good times. MonitorError."""
        taken = self.taken
        self.machine = await look(self.need_monitor(), self.process)
        self.placed = self.taken == taken

    async def ask_once(self) -> None:
        """What does not change, in good times. MonitorError."""
        if self.argv is None:
            self.argv = await asyncio.to_thread(self.process.cmdline)
        if self.version is None:
            self.version = await self.need_monitor().execute("query-version")


# What of a file's name is left for a VM's, when more is put around it.
_NAME_BYTES = 200


def safe_name(name: object) -> str | None:
    """A name as QEMU says it, fit for logs, terminals and files' names; None if it cannot be made so."""
    if not isinstance(name, str) or not name.strip(".") or name.startswith("."):
        return None
    name = printable(name)
    return name if len(quote(name, safe="")) <= _NAME_BYTES else None


async def identity(monitor: Monitor) -> tuple[str | None, str | None]:
    """Name and UUID as QEMU says. MonitorError."""
    name = uuid = None
    with suppress(Refused):
        name = answer(await monitor.execute("query-name"), dict, "query-name").get("name")
    with suppress(Refused):
        uuid = answer(await monitor.execute("query-uuid"), dict, "query-uuid").get("UUID")
    if uuid == "00000000-0000-0000-0000-000000000000":
        uuid = None
    return safe_name(name), (printable(str(uuid)) if uuid else None)


async def describe(monitor: Monitor) -> dict[str, Any]:
    """Registers and network as QEMU prints them, its block devices as QMP has them."""
    *said, blocks = await together(
        *(hmp(monitor, line) for line in _DESCRIPTION.values()), monitor.execute("query-block")
    )
    return {**dict(zip(_DESCRIPTION, said, strict=True)), "block": blocks}
