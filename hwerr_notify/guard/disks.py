# SPDX-License-Identifier: MIT
"""Taking a stopped QEMU's disks away from it, for good.

Each device gets an empty node (null-co) in place of its own, and then the real nodes
are deleted: files are closed, locks go with them. This is preferred to making nodes
inactive, because `cont` makes an inactive node active again, with its lock; here
there is nothing left that it could take. Nor does it read guest memory, as a migration
to nowhere does, which a poisoned page would kill. It was seen to work on QEMU 7.2 and 10.0.

Where a node cannot be detached, all are made inactive (`blockdev-set-active` from QEMU
10.0, or a migration to nowhere before, if no page is poisoned). Then the process must be frozen
too, and `Released.detached` is False. So it is where QEMU was given an image as an open file (`-add-fd`) and
does not close it.

Everything may be done again: what is detached already is left alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .errors import Fault, MonitorError, Refused
from .monitor import Monitor, Question, answer, hmp, run_state, together
from .outside import Given, take_given
from .process import Held, Look, Process

__all__ = ["QUESTIONS", "Released", "release", "still_held", "verify"]

PLACEHOLDER = "hwerr-gone-"


@dataclass(frozen=True, slots=True)
class Released:
    """`detached`: QEMU has no image any more. `how` is for people."""

    detached: bool
    how: str


# migration/migration.c of QEMU: what goes on, or waits to.
_RUNS = frozenset(
    {"setup", "active", "pre-switchover", "device", "wait-unplug", "postcopy-device", "postcopy-active",
     "postcopy-paused", "postcopy-recover", "postcopy-recover-setup", "colo", "cancelling"}
)  # fmt: skip
_Found = tuple[list[dict[str, Any]], list[dict[str, Any]]]


_BLOCKS: tuple[Question, ...] = (("query-block", None), ("query-named-block-nodes", {"flat": True}))
# What `release` has to know at first.
QUESTIONS: tuple[Question, ...] = (("query-migrate", None), *_BLOCKS)
# And if a node stays, because of them.
_USERS: tuple[Question, ...] = (("query-block-jobs", None), ("query-block-exports", None))

# How long they may take to end, seconds.
_END_WITHIN = 2.0


async def _look(monitor: Monitor, asked: list[Any] | None) -> _Found:
    """Block devices and nodes, after migrations, jobs and exports, which use nodes too, were ended.

    With `asked`, jobs and exports are left alone: of most guests there are none, and the node that one uses
    stays, so that it is found out.
    """
    if asked is not None:
        (migration, *found), jobs, exports = asked, [], []
    else:
        jobs, exports, migration, *found = await together(
            *(monitor.execute(*question) for question in (*_USERS, *QUESTIONS))
        )
    ends = [
        _may_refuse(monitor, "block-job-cancel", {"device": job["device"], "force": True})
        for job in answer(jobs, list, "query-block-jobs")
    ]
    ends += [
        _may_refuse(monitor, "block-export-del", {"id": export["id"], "mode": "hard"})
        for export in answer(exports, list, "query-block-exports")
    ]
    migrates = answer(migration, dict, "query-migrate").get("status") in _RUNS
    if migrates:
        ends.append(_may_refuse(monitor, "migrate_cancel", {}))
    if ends:
        # Its exports go with the server.
        ends.append(_may_refuse(monitor, "nbd-server-stop", {}))
        await together(*ends)
        await _ended(monitor)
        if migrates:
            await _stays(monitor)
        found = await together(*(monitor.execute(*question) for question in _BLOCKS))
    blocks, nodes = found
    return answer(blocks, list, "query-block"), answer(nodes, list, "query-named-block-nodes")


async def _ended(monitor: Monitor) -> None:
    """When jobs and exports that were told to end have: that takes them a moment. What goes on is in the way
    of what it uses, and that is told."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_END_WITHIN):
            while any(await together(*(monitor.execute(*question) for question in _USERS))):
                await asyncio.sleep(0.01)


async def _stays(monitor: Monitor) -> None:
    """When a migration that was told to end has: Fault if the guest has gone, or may yet."""
    status: Any = None
    with suppress(TimeoutError):
        async with asyncio.timeout(_END_WITHIN):
            while True:
                status = answer(await monitor.execute("query-migrate"), dict, "query-migrate").get("status")
                if status not in _RUNS:
                    break
                await asyncio.sleep(0.01)
    if status not in ("cancelled", "failed", "none", None):
        raise Fault(f"its guest migrates, and may run elsewhere ({status})")


def _theirs(nodes: Any) -> list[dict[str, Any]]:
    """Nodes that stand for something outside QEMU, or may."""
    every = answer(nodes, list, "query-named-block-nodes")
    return [n for n in every if not str(n["node-name"]).startswith(PLACEHOLDER)]


async def _may_refuse(monitor: Monitor, command: str, arguments: dict[str, Any]) -> str | None:
    try:
        await monitor.execute(command, arguments)
    except Refused as error:
        return str(error)
    return None


def _qom_path(qdev: str) -> str:
    return qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"


def _detaching(
    monitor: Monitor, block: dict[str, Any], n: int, taken: set[str]
) -> tuple[list[Coroutine[Any, Any, Any]], str | None]:
    """Commands that put an empty node in the place of the device's, and that node's name if there is one.

    The last returns why it could not be, or None.
    """
    if name := block.get("device"):
        # Made with -drive: the backend lets its node go at once, in use or not.
        return [_drive_del(monitor, name)], None
    if not block.get("qdev"):
        return [_without_device()], None
    while (empty := f"{PLACEHOLDER}{n}") in taken:
        n += 1
    taken.add(empty)
    add = {"driver": "null-co", "node-name": empty, "read-zeroes": True, "size": 0}
    return [
        monitor.execute("blockdev-add", add),
        _may_refuse(monitor, "qom-set", _property(block["qdev"], empty)),
    ], empty


def _property(qdev: str, node: str) -> dict[str, Any]:
    return {"path": _qom_path(qdev), "property": "drive", "value": node}


async def _without_device() -> str:
    return "a node without a device"


async def _drive_del(monitor: Monitor, name: str) -> str | None:
    return (await hmp(monitor, f"drive_del {name}")).strip() or None


async def _in_its_thread(monitor: Monitor, qdev: str, empty: str) -> str | None:
    """The device's node lives in an I/O thread: the empty one has to, too. Why it cannot, or None."""
    why: str | None = "its I/O thread is not found"
    for thread in answer(await monitor.execute("query-iothreads"), list, "query-iothreads"):
        if await _may_refuse(
            monitor, "x-blockdev-set-iothread", {"node-name": empty, "iothread": thread["id"]}
        ):
            continue
        why = await _may_refuse(monitor, "qom-set", _property(qdev, empty))
        if why is None:
            break
    return why


async def _detach(monitor: Monitor, asked: list[Any] | None = None) -> list[str]:
    """Detaches and deletes; what is in the way, for people.

    All of it is told QEMU at once, which does it in that order: the guest waits for nobody's answers.
    """
    blocks, nodes = await _look(monitor, asked)
    left = _theirs(nodes)
    taken = {str(node["node-name"]) for node in nodes}
    # A server that has nothing to serve listens all the same.
    commands: list[Coroutine[Any, Any, Any]] = [_may_refuse(monitor, "nbd-server-stop", {})]
    last: dict[int, int] = {}  # of a block's commands
    empty: dict[int, str | None] = {}
    try:
        for n, block in enumerate(blocks):
            node = block.get("inserted", {}).get("node-name")
            if node is not None and not str(node).startswith(PLACEHOLDER):
                more, empty[n] = _detaching(monitor, block, n, taken)
                commands += more
                last[n] = len(commands) - 1
    except Exception:
        # An answer that makes no sense.
        for command in commands:
            command.close()
        raise
    said, left = await _delete(monitor, left, commands)
    whys = {n: said[at] for n, at in last.items()}
    for n, why in whys.items():
        if why and "ontext" in why and (node := empty[n]):
            whys[n] = await _in_its_thread(monitor, str(blocks[n]["qdev"]), node)
    reasons = [
        f"{blocks[n].get('device') or blocks[n].get('qdev') or n}: {why}" for n, why in whys.items() if why
    ]
    while left:
        before = len(left)
        said, left = await _delete(monitor, left, [])
        if len(left) >= before:
            return reasons + ([why for why in said if why] or [f"{node['node-name']} stays" for node in left])
    return reasons


async def _delete(
    monitor: Monitor, nodes: list[dict[str, Any]], first: list[Coroutine[Any, Any, Any]]
) -> tuple[list[Any], list[dict[str, Any]]]:
    """Tells QEMU `first`, then to delete the nodes, from the top down: one may go when nothing stands on it.

    What all of them said, and the nodes that are left.
    """
    names = [str(node["node-name"]) for node in nodes if not str(node["node-name"]).startswith("#")]
    *said, left = await together(
        *first,
        *(_may_refuse(monitor, "blockdev-del", {"node-name": name}) for name in names),
        monitor.execute("query-named-block-nodes", {"flat": True}),
    )
    return said, _theirs(left)


async def _try_to_detach(monitor: Monitor, asked: list[Any] | None = None) -> list[str]:
    try:
        return await _detach(monitor, asked)
    except Refused as error:
        return [str(error)]


async def _inactivate(monitor: Monitor, poisoned: bool) -> str:
    try:
        await monitor.execute("blockdev-set-active", {"active": False})
        return "blockdev-set-active"
    except Refused as error:
        if error.kind != "CommandNotFound":
            raise Fault(f"blockdev-set-active: {error}") from None
    if poisoned:
        raise Fault("a migration to nowhere would read the poisoned page, and QEMU would die of it")
    # What migrated once does so again only after it has run.
    if await run_state(monitor) == "postmigrate":
        return "migrated to nowhere"
    await monitor.execute("migrate", {"uri": "exec:cat >/dev/null"})
    while True:
        reply = answer(await monitor.execute("query-migrate"), dict, "query-migrate")
        match reply.get("status"):
            case "completed":
                return "migrated to nowhere"
            case "failed" | "cancelled":
                raise Fault(f"migration to nowhere: {reply.get('error-desc', 'failed')}")
        # QEMU tells the end by an event only if a capability was set before: ask again.
        await asyncio.sleep(0.01)


def image_paths(nodes: list[dict[str, Any]]) -> frozenset[str]:
    """Host files that nodes stand for, as QEMU names them."""
    return frozenset(str(n["file"]) for n in nodes if n.get("drv") in ("file", "host_device", "host_cdrom"))


def still_held(
    process: Process, images: frozenset[str], given: Iterable[Given] = (), look: Look | None = None
) -> list[Held]:
    """Open files through which the process could still write an image, or bar another from it.

    A file is known by what it is, as it may be open under another name than QEMU was given. `look`: one just
    now.
    """
    known = {file.shown for file in given}
    for image in images:
        with suppress(OSError):
            status = process.stat(image)
            known.add((status.st_dev, status.st_ino))
    return [
        held
        for held in (look or process.look()).files
        if held.locked
        or (held.writable and (held.block or (held.device, held.inode) in known or held.path in images))
    ]


async def release(
    monitor: Monitor, images: frozenset[str], asked: list[Any] | None = None, *, poisoned: bool
) -> Released:
    """The guest must be stopped. Fault, MonitorError. It is QEMU's word alone: then `verify()`.

    `asked`: the answers to `QUESTIONS`, since the guest was stopped.
    """
    reasons = await _try_to_detach(monitor, asked)
    if reasons and asked is not None:
        # Somebody else may have changed something since.
        reasons = await _try_to_detach(monitor)
    if not reasons:
        await take_given(monitor, images)
        return Released(True, "detached")
    try:
        how = await _inactivate(monitor, poisoned)
    except (Refused, Fault) as error:
        raise Fault(f"not detached ({'; '.join(reasons)}), not inactive ({error})") from None
    except MonitorError as error:
        raise Fault(f"not detached ({'; '.join(reasons)}): {error}") from None
    return Released(False, f"{how}, because not detached: {'; '.join(reasons)}")


def verify(
    process: Process, images: frozenset[str], given: Iterable[Given], released: Released, look: Look
) -> Released:
    """What `release()` returned, as it is seen from outside QEMU. Blocks. Fault if it is not so."""
    if not released.detached:
        if locked := [h.path for h in look.files if h.locked]:
            raise Fault(f"QEMU says its disks are inactive, and locks {', '.join(locked)}")
        return released
    if held := still_held(process, images, given, look):
        names = ", ".join(h.path for h in held)
        kept = {file.shown for file in given}
        if any(h.locked or (h.device, h.inode) not in kept for h in held):
            raise Fault(f"QEMU says its disks are gone, and holds {names}")
        # QEMU 7.2 closes none of them while the guest does not run (monitor_fdset_cleanup()).
        return Released(False, f"detached, but QEMU keeps the open file that it was given: {names}")
    return released
