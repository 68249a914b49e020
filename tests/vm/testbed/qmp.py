# SPDX-License-Identifier: MIT
"""A small synchronous QMP client, for a UNIX socket and for the VM's own monitor.

Inside a test VM the QMP monitor of the QEMU that runs it is the other end of
the virtio port org.hwerr.monitor.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import select
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .errors import TestbedError

MONITOR_PORT = Path("/dev/virtio-ports/org.hwerr.monitor")
_LOCK = Path("/run/lock/org.hwerr.monitor")
_serial = itertools.count(1)


class QmpError(TestbedError):
    """QMP refused a command; `.kind` is its error class."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Qmp:
    """A QMP session. Not safe for use by several threads at once.

    Events that arrive are kept in `.events`, oldest first.
    """

    def __init__(self, fd: int, timeout: float = 30.0) -> None:
        self._fd = fd
        self._buffer = b""
        self.timeout = timeout
        self.events: list[dict[str, Any]] = []
        try:
            self.execute("qmp_capabilities")
        except QmpError as error:
            # A session that another process of this VM began goes on.
            if error.kind != "CommandNotFound":
                raise

    @classmethod
    def connect(cls, path: Path, timeout: float = 30.0) -> Qmp:
        """Connect to a QMP socket. Raises TestbedError if nothing listens there."""
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(str(path))
            except OSError as error:
                raise TestbedError(f"no QMP at {path}: {error.strerror}") from error
            return cls(sock.detach(), timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def execute(self, command: str, /, **arguments: Any) -> Any:
        """Run a QMP command, return what it returns. Raises QmpError if it is refused."""
        # Replies to an earlier process on the same port have other ids.
        ident = f"{os.getpid()}-{next(_serial)}"
        request: dict[str, Any] = {"execute": command, "id": ident}
        if arguments:
            request["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        self._write(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + self.timeout
        while True:
            reply = self._message(deadline, command)
            if reply.get("id") == ident:
                if "error" in reply:
                    raise QmpError(reply["error"]["class"], reply["error"]["desc"])
                return reply["return"]

    def hmp(self, line: str) -> str:
        """Run a human monitor command, return what it prints."""
        answer = self.execute("human-monitor-command", **{"command-line": line})
        return str(answer).replace("\r\n", "\n")

    def wait_event(self, name: str, timeout: float | None = None) -> dict[str, Any]:
        """The next event of that name, already arrived or yet to come."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while True:
            for n, event in enumerate(self.events):
                if event["event"] == name:
                    return self.events.pop(n)
            self._message(deadline, f"event {name}")

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]

    def _message(self, deadline: float, what: str) -> dict[str, Any]:
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                try:
                    message = json.loads(line)
                except ValueError:
                    continue  # the rest of a line whose beginning another process read
                if isinstance(message, dict):
                    if "event" in message:
                        self.events.append(message)
                    return message
                continue
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._fd], [], [], left)[0]:
                raise TestbedError(f"QMP: no answer to {what} within {self.timeout:g} s")
            data = os.read(self._fd, 1 << 16)
            if not data:
                raise TestbedError(f"QMP: the connection ended while waiting for {what}")
            self._buffer += data


class Monitor(Qmp):
    """The monitor of the VM this process runs in. One process at a time has it; others wait."""

    def __init__(self, timeout: float = 30.0) -> None:
        if not MONITOR_PORT.exists():
            raise TestbedError(f"{MONITOR_PORT} does not exist: this needs a VM started by tests/vm/run")
        _LOCK.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _LOCK.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        super().__init__(os.open(MONITOR_PORT, os.O_RDWR | os.O_CLOEXEC), timeout)

    def close(self) -> None:
        """Let the next one have it."""
        super().close()
        self._lock.close()
