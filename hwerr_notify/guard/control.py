# SPDX-License-Identifier: MIT
"""The control socket: one JSON object a line, both ways.

A request is {"verb": ..., ...}. Answers are any number of {"line": ...} and one
{"end": {"status": N, "error": text or null}}, where N is the exit status of the
command; after `events` there is no end until the client goes. Only root may connect: the socket is 0600.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import GuardError, NoSuchError
from .steps import a_bug

if TYPE_CHECKING:
    from .daemon import Guard

__all__ = ["EXIT_NOT_FROZEN", "EXIT_NO_SUCH", "Control"]

EXIT_NO_SUCH = 3
EXIT_NOT_FROZEN = 7

log = logging.getLogger("hwerr-guard")


class Control:
    """The server."""

    def __init__(self, guard: Guard, path: Path) -> None:
        self.guard = guard
        self.path = path
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """GuardError."""
        with suppress(FileNotFoundError):
            self.path.unlink()
        mask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._client, self.path)
        except OSError as error:
            raise GuardError(f"{self.path}: {error.strerror}") from None
        finally:
            os.umask(mask)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            for task in list(self._clients):
                task.cancel()
            await asyncio.gather(*self._clients, return_exceptions=True)
            with suppress(FileNotFoundError):
                self.path.unlink()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            request = json.loads(await reader.readline() or b"null")
            status, error = 0, None
            try:
                async for line in self._answer(request):
                    if isinstance(line, int):
                        status = line
                        continue
                    writer.write(json.dumps({"line": line}).encode() + b"\n")
                    await writer.drain()
            except NoSuchError as problem:
                status, error = EXIT_NO_SUCH, str(problem)
            except GuardError as problem:
                status, error = 1, str(problem)
            except Exception as problem:
                log.exception("control: %s", request)
                status, error = 1, a_bug(problem)
            writer.write(json.dumps({"end": {"status": status, "error": error}}).encode() + b"\n")
            await writer.drain()
        except (ConnectionError, ValueError, RecursionError):
            pass
        finally:
            self._clients.discard(task)
            writer.close()

    def _answer(self, request: Any) -> AsyncIterator[Any]:
        if not isinstance(request, dict):
            raise GuardError("a request is a JSON object")
        name = str(request.get("name", ""))
        match request.get("verb"):
            case "status":
                return self._status()
            case "freeze":
                return self._freeze(name)
            case "events":
                return self._events()
            case "dump":
                return self._dump(name)
            case "clear":
                return self._undegrade(name) if request.get("degraded") else self._clear(name)
        raise GuardError(f"there is no verb {request.get('verb')!r}")

    async def _status(self) -> AsyncIterator[Any]:
        yield self.guard.status()

    async def _freeze(self, name: str) -> AsyncIterator[Any]:
        vm = self.guard.find(name)
        known = self.guard.incidents.get(vm.incident or "")
        if known is not None and known.open and known.state == "failed":
            self.guard.retry(vm, known)
            incident_id = known.id
        else:
            incident_id = self.guard.begin(
                vm, {"layer": "command", "message": "frozen by command", "stopped": False}
            ).id
        queue = self.guard.subscribe()
        try:
            while self.guard.incidents[incident_id].state == "freezing" and vm.work and not vm.work.done():
                told = asyncio.ensure_future(queue.get())
                await asyncio.wait([told, vm.work], return_when=asyncio.FIRST_COMPLETED)
                if not told.cancel() and told.result() is None:
                    queue = self.guard.subscribe()
        finally:
            self.guard.subscribers.discard(queue)
        incident = self.guard.incidents[incident_id]
        yield incident.to_json()
        if incident.state != "frozen":
            yield EXIT_NOT_FROZEN

    async def _events(self) -> AsyncIterator[Any]:
        queue = self.guard.subscribe()
        try:
            # From here on nothing is missed: who asks for the state after this has all of it.
            yield {"event": "FOLLOWING", "time_ns": time.time_ns()}
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self.guard.subscribers.discard(queue)
        raise GuardError("too slow: events were lost; begin again")

    async def _dump(self, name: str) -> AsyncIterator[Any]:
        guard = self.guard
        vm = next((v for v in guard.vms.values() if v.incident == name), None) or guard.find(name)
        incident = guard.incidents.get(vm.incident or "")
        if incident is None or incident.state not in ("frozen", "failed"):
            raise GuardError(f"{name} is {guard.state(vm)}: only a frozen VM can be dumped")
        before = incident.steps.get("keep")
        while True:
            # What is being done for its incident may be a dump, or the cluster is being told.
            if vm.work is None or vm.work.done():
                if (step := guard.incidents[incident.id].steps.get("keep")) is not before:
                    break
                vm.work = guard.spawn(guard.dump(vm))
            done, _ = await asyncio.wait([vm.work], timeout=0.5)
            if not done and vm.progress:
                yield {"progress": list(vm.progress)}
        assert step is not None
        if step.state == "failed":
            raise GuardError(step.detail)
        yield guard.incidents[incident.id].dump

    async def _undegrade(self, name: str) -> AsyncIterator[Any]:
        vm = self.guard.find(name)
        self.guard.undegrade(vm)
        yield {"vm": vm.name}

    async def _clear(self, name: str) -> AsyncIterator[Any]:
        incident = await self.guard.clear(name)
        yield incident.to_json()
