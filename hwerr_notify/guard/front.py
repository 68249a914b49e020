# SPDX-License-Identifier: MIT
"""A QMP front: QEMU's monitor for everybody else, through the guard.

Whatever clients send goes to QEMU and comes back, so that what uses QMP goes on as
before. It adds two events, HARDWARE_ERROR and GUEST_FROZEN, and tells the truth of a
frozen guest: its status is "frozen", and commands that could run it, reset it, take its disks back or end
it are refused. What only looks goes on; while memory of it is poisoned, what is known to leave that alone.

Not passed on: file descriptors (getfd, add-fd), which one connection would mix up.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ..event import Event
from .errors import GuardError, MonitorError, Refused
from .monitor import QmpMonitor
from .store import Incident
from .vm import Vm

if TYPE_CHECKING:
    from .daemon import Guard

__all__ = ["Front", "harmless"]

# A command of a client may take as long as QEMU likes, but not for ever.
_LIMIT = 3600.0
# Of a guest that is held QEMU may say nothing any more: frozen as a process, or hung.
_HELD_LIMIT = 5.0
_MAX_LINE = 16 << 20

_LOOKS = frozenset(
    {
        "qom-get", "qom-list", "qom-list-types", "qom-list-properties", "device-list-properties",
        "trace-event-get-state", "screendump", "qmp_capabilities", "x-query-virtio", "x-query-virtio-status",
    }
)  # fmt: skip
_HMP_LOOKS = re.compile(r"\s*(info|help|print|p|gpa2hva|gva2gpa)\b")
# Of a guest with poisoned memory: what is known not to read any of it inside QEMU. Others do, by the guest's
# page tables or its queues, or for a picture of its screen.
_HMP_NO_MEMORY = re.compile(r"\s*info\s+(registers|block|network|status|version|chardev|cpus)(?![^\s])")
# These read the guest's memory inside QEMU, which a poisoned page would kill.
_READS = frozenset({"dump-guest-memory", "memsave", "pmemsave"})
_HMP_READS = re.compile(r"\s*(x|xp|memsave|pmemsave|dump-guest-memory)\b")


def harmless(command: str, arguments: Any, poisoned: bool) -> bool:
    """Whether a frozen guest's QEMU may be told this: it changes nothing, and does not kill QEMU."""
    if command == "human-monitor-command":
        line = arguments.get("command-line") if isinstance(arguments, dict) else None
        if not isinstance(line, str):
            return False
        if poisoned:
            return bool(_HMP_NO_MEMORY.match(line))
        return bool(_HMP_LOOKS.match(line) or _HMP_READS.match(line))
    if poisoned:
        return command.startswith("query-")
    return command.startswith(("query-", "x-query-")) or command in _LOOKS or command in _READS


def _takes_long(command: str, arguments: Any) -> bool:
    """Whether QEMU reads the guest's memory for it, which takes as long as that is large."""
    if command == "human-monitor-command":
        line = arguments.get("command-line") if isinstance(arguments, dict) else None
        return isinstance(line, str) and bool(_HMP_READS.match(line))
    return command in _READS


class _Client:
    """One client of the front."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.ready = False

    def send(self, message: dict[str, Any]) -> None:
        if self.writer.transport.get_write_buffer_size() > _MAX_LINE:
            # It does not read: cut off, as QEMU's memory is not ours to fill.
            self.writer.transport.abort()
            return
        self.writer.write(json.dumps(message).encode() + b"\r\n")


class Front:
    """The server for one VM."""

    def __init__(self, vm: Vm, directory: Path, guard: Guard) -> None:
        self.vm = vm
        self.path = directory / f"{quote(vm.name, safe='')}.qmp"
        self.guard = guard
        self._clients: dict[_Client, asyncio.Task[Any]] = {}
        self._server: asyncio.Server | None = None
        # What is waited for of QEMU.
        self._waits: set[asyncio.Timeout] = set()

    async def start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with suppress(FileNotFoundError):
            self.path.unlink()
        # From its first moment nobody's but root's.
        mask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, self.path, limit=_MAX_LINE)
        finally:
            os.umask(mask)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for client, task in list(self._clients.items()):
            client.writer.close()
            task.cancel()
        with suppress(FileNotFoundError):
            self.path.unlink()

    # -- events --------------------------------------------------------------------

    def pass_on(self, event: dict[str, Any]) -> None:
        """An event of QEMU's own, as it is."""
        for client in self._clients:
            if client.ready:
                client.send(event)

    def _event(self, name: str, data: dict[str, Any]) -> None:
        seconds, rest = divmod(time.time_ns(), 1_000_000_000)
        self.pass_on(
            {"event": name, "data": data, "timestamp": {"seconds": seconds, "microseconds": rest // 1000}}
        )

    def hardware_error(self, event: Event) -> None:
        """An error that hits this VM."""
        form = event.to_json()
        mine = [g for g in event.guests if self.vm.process.is_of(g.pid, g.start_ns)]
        self._event(
            "HARDWARE_ERROR",
            {
                "severity": form["severity"],
                "kind": form["kind"],
                "source": form["source"],
                "component": form["component"],
                "action-required": form["action_required"],
                "message": form["message"],
                "topology": {k: form[k] for k in ("cpu", "mce", "edac", "pci") if form.get(k) is not None},
                "ranges": [{"gpa": g.gpa, "length": g.len} for g in mine if g.gpa is not None],
                "seq": form["seq"],
            },
        )

    def frozen(self, incident: Incident) -> None:
        """Tells it; who has asked QEMU something before does not wait for long any more."""
        until = asyncio.get_running_loop().time() + _HELD_LIMIT
        for wait in self._waits:
            wait.reschedule(until)
        self._event("GUEST_FROZEN", {"incident": incident.id, "message": incident.cause.get("message")})

    # -- clients -------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = _Client(writer)
        task = asyncio.current_task()
        assert task is not None
        self._clients[client] = task
        jobs: set[asyncio.Task[None]] = set()
        try:
            client.send(await self._greeting())
            while line := await reader.readline():
                if not line.strip():
                    continue
                # In order, as QEMU does it; only an out-of-band command overtakes.
                await self._request(client, line, jobs)
                await writer.drain()
        except (ConnectionError, ValueError, asyncio.CancelledError):
            pass
        finally:
            for job in jobs:
                job.cancel()
            self._clients.pop(client, None)
            writer.close()

    async def _greeting(self) -> dict[str, Any]:
        """QEMU's own; of one that says nothing any more, what its incident's record says of it."""
        monitor = self.vm.monitor
        if isinstance(monitor, QmpMonitor) and monitor.greeting:
            return monitor.greeting
        version: Any = None
        with suppress(GuardError, OSError, ValueError, KeyError, TypeError):
            record = self.guard.store.path(self.vm.incident or "") / "record.json"
            version = json.loads(await asyncio.to_thread(record.read_bytes))["version"]
        version = version or {"qemu": {"micro": 0, "minor": 0, "major": 0}, "package": ""}
        return {"QMP": {"version": version, "capabilities": []}}

    async def _request(self, client: _Client, line: bytes, jobs: set[asyncio.Task[None]]) -> None:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise ValueError
        except (ValueError, RecursionError):
            client.send(_error(None, "GenericError", "JSON parse error, expecting an object"))
            return
        oob = "exec-oob" in request
        command = request.get("exec-oob" if oob else "execute")
        if not isinstance(command, str):
            client.send(_error(request, "GenericError", "QMP input lacks member 'execute'"))
            return
        if command == "qmp_capabilities":
            client.ready = True
            client.send(_reply(request, {}))
            return
        if not client.ready:
            text = f"Expecting capabilities negotiation with 'qmp_capabilities' before {command}"
            client.send(_error(request, "CommandNotFound", text))
            return
        job = self._execute(client, request, command, oob)
        if oob:
            task = asyncio.create_task(job)
            jobs.add(task)
            task.add_done_callback(jobs.discard)
        else:
            await job

    async def _execute(self, client: _Client, request: dict[str, Any], command: str, oob: bool) -> None:
        arguments = request.get("arguments")
        incident = self.guard.incidents.get(self.vm.incident or "")
        held = incident is not None and incident.open
        if command in ("getfd", "add-fd"):
            text = "file descriptors do not pass through hwerr-guard"
            client.send(_error(request, "GenericError", text))
            return
        if incident is not None and held and not harmless(command, arguments, bool(incident.poison)):
            text = (
                f"this guest is {incident.state} (hwerr incident {incident.id}): {command} is refused; "
                f"`hwerr-guard dump {incident.id}` keeps its memory, "
                f"`hwerr-guard clear {incident.id}` ends it"
            )
            client.send(_error(request, "GenericError", text))
            return
        if command == "query-status" and incident is not None and _is_frozen(incident):
            # Known, and asked whether QEMU answers or not.
            client.send(_reply(request, {"running": False, **_frozen(incident)}))
            return
        limit = _HELD_LIMIT if held and not _takes_long(command, arguments) else _LIMIT
        try:
            result = await self._ask(command, arguments, limit)
        except Refused as error:
            client.send(_error(request, error.kind, str(error)))
            return
        except MonitorError as error:
            # What is held has been stopped, or is being; that it cannot say so changes nothing.
            if command != "query-status" or not held:
                client.send(_error(request, "GenericError", str(error)))
                return
            result = {"running": False}
        if command == "query-status":
            # It may have been frozen meanwhile. And an answer that is nonsense does not matter then.
            now = self.guard.incidents.get(self.vm.incident or "")
            if now is not None and _is_frozen(now):
                known = result if isinstance(result, dict) else {}
                result = {**known, "running": False, **_frozen(now)}
        client.send(_reply(request, result))

    async def _ask(self, command: str, arguments: Any, limit: float) -> Any:
        """QEMU, within `limit`, or less if it is frozen meanwhile. MonitorError, Refused."""
        try:
            async with asyncio.timeout(limit) as wait:
                self._waits.add(wait)
                try:
                    return await self.vm.need_monitor().execute(command, arguments, limit=limit)
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            raise MonitorError(f"QEMU did not answer {command} in time: it is frozen") from None


def _is_frozen(incident: Incident) -> bool:
    """FROZEN, also while its process is being ended."""
    return incident.state == "frozen" or (incident.state == "clearing" and bool(incident.frozen_ns))


def _frozen(incident: Incident) -> dict[str, Any]:
    return {"status": "frozen", "x-hwerr-incident": incident.id}


def _reply(request: dict[str, Any], result: Any) -> dict[str, Any]:
    reply = {"return": result}
    return {**reply, "id": request["id"]} if "id" in request else reply


def _error(request: dict[str, Any] | None, kind: str, text: str) -> dict[str, Any]:
    reply = {"error": {"class": kind, "desc": text}}
    return {**reply, "id": request["id"]} if request and "id" in request else reply
