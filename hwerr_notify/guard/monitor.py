# SPDX-License-Identifier: MIT
"""QEMU's monitor, over its own socket or through libvirt.

What comes back is data of a process that was just hit by an error: it is checked
where it is used, and each call ends in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError
from qemu.qmp.protocol import Runstate, StateError

from .errors import MonitorError, NobodyListensError, Refused, raise_all

__all__ = [
    "EventHandler",
    "Monitor",
    "QmpMonitor",
    "Question",
    "answer",
    "by_hmp",
    "hmp",
    "run_state",
    "sent",
    "together",
    "whatever_fails",
]

EventHandler = Callable[[dict[str, Any]], None]

# A command that only looks, and its arguments.
Question = tuple[str, dict[str, Any] | None]

# For one command of which nobody said more.
DEFAULT_LIMIT = 5.0

# query-block and `info qtree` of a large VM are some hundred KiB.
_MAX_LINE = 64 << 20

# From a task for each command, over the client's queue, to the socket.
_TURNS = 5

logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class Monitor(Protocol):
    """What the steps need of it."""

    @property
    def pid(self) -> int:
        """The process behind it."""

    @property
    def closed(self) -> asyncio.Event:
        """Set when it has ended."""

    async def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, limit: float = DEFAULT_LIMIT
    ) -> Any:
        """What the command returns. MonitorError, Refused. `limit` in seconds."""

    async def aclose(self) -> None:
        """Ends the session; QEMU goes on."""


def answer(reply: Any, kind: type, what: str) -> Any:
    """The reply, if it is of that kind. MonitorError: a monitor may answer anything."""
    if not isinstance(reply, kind):
        raise MonitorError(f"QEMU's answer to {what} makes no sense: {str(reply)[:80]}")
    return reply


def by_hmp(line: str) -> Question:
    """The human monitor's command as one of QMP's."""
    return "human-monitor-command", {"command-line": line}


async def hmp(monitor: Monitor, line: str, *, limit: float = DEFAULT_LIMIT) -> str:
    """What the human monitor prints for `line`."""
    reply = await monitor.execute(*by_hmp(line), limit=limit)
    return str(answer(reply, str, line)).replace("\r\n", "\n")


async def run_state(monitor: Monitor) -> str:
    """QEMU's own word. MonitorError."""
    reply = answer(await monitor.execute("query-status"), dict, "query-status")
    return str(answer(reply.get("status"), str, "query-status"))


async def together(*jobs: Coroutine[Any, Any, Any]) -> list[Any]:
    """What they return. Commands go out one behind the other, in this order, so that one round trip is
    paid for all; QEMU does them in that order, too. The first failure is raised and ends the others."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def whatever_fails(*jobs: Awaitable[Any]) -> list[Any]:
    """As `together`, but each is done to its end, whatever becomes of the others. All that failed is told."""
    done = await asyncio.gather(*jobs, return_exceptions=True)
    raise_all([result for result in done if isinstance(result, BaseException)])
    return done


async def sent() -> None:
    """Returns when what monitors were told in this turn of the event loop is on its way."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)


class _Client(QMPClient):
    """Without the hooks' own work, which writes each message anew, indented, for a log that nobody reads.

    And what is to be sent goes out in one piece, so that QEMU is woken once for commands that were given
    together.
    """

    def __init__(self, name: str, readbuflen: int) -> None:
        super().__init__(name, readbuflen)
        self._unsent: list[bytes] = []

    def _do_send(self, msg: Message) -> None:
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._send_all)
        self._unsent.append(bytes(msg))

    def _send_all(self) -> None:
        data, self._unsent = b"".join(self._unsent), []
        # None: it was closed meanwhile.
        if self._writer is not None:
            self._writer.write(data)

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg


class QmpMonitor:
    """A session on a QMP socket. QEMU serves one client a socket: this one is the guard's."""

    def __init__(self, client: QMPClient, pid: int, on_event: EventHandler) -> None:
        """Use `connect()`."""
        self._client = client
        self._pid = pid
        self._on_event = on_event
        self.closed = asyncio.Event()
        self._tasks = [asyncio.create_task(self._pump()), asyncio.create_task(self._watch())]

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def greeting(self) -> dict[str, Any]:
        """What QEMU says of itself."""
        found = self._client.greeting
        return found._asdict() if found else {}

    @classmethod
    async def connect(cls, path: Path, on_event: EventHandler, *, limit: float = DEFAULT_LIMIT) -> QmpMonitor:
        """MonitorError if nothing answers as QMP within `limit` seconds."""
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        try:
            async with asyncio.timeout(limit):
                await asyncio.get_running_loop().sock_connect(sock, os.fspath(path))
                # struct ucred: who called listen().
                pid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
                client = _Client(f"pid-{pid}", _MAX_LINE)
                await client.connect(sock)
        except TimeoutError:
            sock.close()
            raise MonitorError(
                f"{path}: no QMP greeting within {limit:g} s: another client may have it"
            ) from None
        except ConnectionRefusedError:
            sock.close()
            raise NobodyListensError(f"{path}: nobody listens there") from None
        except OSError as error:
            sock.close()
            raise MonitorError(f"{path}: {error.strerror or error}") from None
        except (ConnectError, QMPError) as error:
            sock.close()
            raise MonitorError(f"{path}: {error}") from None
        return cls(client, pid, on_event)

    async def _pump(self) -> None:
        async for event in self._client.events:
            self._on_event(dict(event))

    async def _watch(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        await self._disconnect()
        self.closed.set()

    async def _disconnect(self) -> None:
        # Why the other side went away does not matter: it did.
        with contextlib.suppress(Exception):
            await self._client.disconnect()

    async def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, limit: float = DEFAULT_LIMIT
    ) -> Any:
        """See `Monitor`."""
        # The client copies it, adds a number and only then needs it as bytes.
        message = Message(
            {"execute": command, "arguments": arguments} if arguments else {"execute": command}, eager=False
        )
        try:
            async with asyncio.timeout(limit):
                return await self._client.execute_msg(message)
        except ExecuteError as error:
            raise Refused(error.error_class, str(error)) from None
        except TimeoutError:
            raise MonitorError(f"QEMU did not answer {command} within {limit:g} s") from None
        except (ExecInterruptedError, StateError, QMPError, OSError) as error:
            self.closed.set()
            # QEMU serves one client: who talks nonsense must be free to be asked anew.
            self._tasks.append(asyncio.create_task(self._disconnect()))
            raise MonitorError(f"QEMU's monitor went away during {command} ({error})") from None

    async def aclose(self) -> None:
        """See `Monitor`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(1.0):
                await self._disconnect()
        except TimeoutError:
            pass
        self.closed.set()
