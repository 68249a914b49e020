# SPDX-License-Identifier: MIT
"""VMs that libvirt runs: found, watched and talked to through it.

The monitor stays libvirt's: commands go through virDomainQemuMonitorCommand(), which
blocks, so each runs in a thread and is waited for only so long. libvirt is told nothing
that it does not see by itself: QEMU's STOP makes it let go of sanlock and virtlockd leases.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..names import qemu_identity
from .errors import GuardError, MonitorError, Refused
from .monitor import DEFAULT_LIMIT
from .threads import Threads

if TYPE_CHECKING:
    from .daemon import Guard

__all__ = ["Libvirt", "LibvirtMonitor"]

log = logging.getLogger("hwerr-guard")

# What QEMU's monitor says that libvirt passes on to who asks for it.
_EVENTS = ("STOP", "RESUME", "GUEST_PANICKED", "BLOCK_IO_ERROR", "RESET", "SHUTDOWN")
# A connection that is lost, or cannot be had, is tried again after so many seconds, first and at most.
_RETRY_FIRST, _RETRY_MOST = 0.5, 10.0



class LibvirtMonitor:
    """QEMU's monitor behind a domain."""

    def __init__(self, domain: Any, pid: int, thread: Threads) -> None:
        """`thread` is the one that may use the domain's connection."""
        self._domain = domain
        self._thread = thread
        self._pid = pid
        self.closed = asyncio.Event()

    @property
    def pid(self) -> int:
        return self._pid

    async def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, limit: float = DEFAULT_LIMIT
    ) -> Any:
        """See `Monitor`."""
        import libvirt  # type: ignore[import-not-found, unused-ignore]
        import libvirt_qemu  # type: ignore[import-not-found, unused-ignore]

        message = json.dumps({"execute": command, **({"arguments": arguments} if arguments else {})})
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limit):
                text = await loop.run_in_executor(
                    self._thread, libvirt_qemu.qemuMonitorCommand, self._domain, message, 0
                )
        except TimeoutError:
            raise MonitorError(f"libvirt did not answer {command} within {limit:g} s") from None
        except libvirt.libvirtError as error:
            raise MonitorError(f"libvirt: {error}") from None
        try:
            reply = json.loads(text)
        except ValueError:
            raise MonitorError(f"libvirt's answer to {command} is no JSON") from None
        if isinstance(reply, dict) and isinstance(reply.get("error"), dict):
            raise Refused(str(reply["error"].get("class")), str(reply["error"].get("desc")))
        if not isinstance(reply, dict) or "return" not in reply:
            raise MonitorError(f"libvirt's answer to {command} makes no sense: {text[:80]}")
        return reply["return"]

    async def aclose(self) -> None:
        """See `Monitor`."""
        self.closed.set()


def _process_of(uuid: str) -> int:
    """The QEMU that was started with this UUID; libvirt has no call that tells. MonitorError."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            argv = os.fsdecode((entry / "cmdline").read_bytes()).split("\0")
        except OSError:
            continue
        if str(qemu_identity(argv)[1]) == uuid:
            return int(entry.name)
    raise MonitorError(f"no process runs the domain of UUID {uuid}")


class Libvirt:
    """A connection; guards the running domains that the policy names."""

    def __init__(self, uri: str, guard: Guard) -> None:
        self.uri = uri
        self.guard = guard
        # Set when its running domains are guarded, or it cannot be reached.
        self.tried = asyncio.Event()
        self._connection: Any = None
        self._monitors: list[LibvirtMonitor] = []
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Until cancelled. Without libvirtd it tries again now and then."""
        try:
            import libvirt
        except ImportError:
            raise GuardError("a policy names libvirt: apt-get install python3-libvirt") from None
        await asyncio.to_thread(self._start_events, libvirt)
        wait = _RETRY_FIRST
        while True:
            lost = asyncio.Event()
            # One thread for each connection, so that a libvirtd that hangs takes none from those who look and
            # save. And no more: before 10.3 two calls at the same time can crash the client (CVE-2024-4418).
            self._thread = Threads(1, "libvirt-call")
            try:
                # Never closed: that would say good-bye to libvirtd, and wait for the answer.
                self._connection = await self._loop.run_in_executor(self._thread, libvirt.open, self.uri)
                self.guard.unreachable.pop(self.uri, None)
                wait = _RETRY_FIRST
                await self._serve(libvirt, lost)
            except libvirt.libvirtError as error:
                self.guard.unreachable[self.uri] = str(error)
            for monitor in self._monitors:
                monitor.closed.set()
            self._monitors.clear()
            self.tried.set()
            await asyncio.sleep(wait)
            wait = min(2 * wait, _RETRY_MOST)

    def _start_events(self, libvirt: Any) -> None:
        import threading

        libvirt.registerErrorHandler(lambda *_: None, None)
        libvirt.virEventRegisterDefaultImpl()

        def loop() -> None:
            while True:
                libvirt.virEventRunDefaultImpl()

        threading.Thread(target=loop, daemon=True, name="libvirt").start()

    async def _serve(self, libvirt: Any, lost: asyncio.Event) -> None:
        import libvirt_qemu

        connection = self._connection
        connection.setKeepAlive(5, 3)

        def call(job: Any, *args: Any) -> None:
            self._loop.call_soon_threadsafe(job, *args)

        def on_close(_connection: Any, _reason: int, _opaque: Any) -> None:
            call(lost.set)

        def on_life(_connection: Any, domain: Any, event: int, _detail: int, _opaque: Any) -> None:
            if event == libvirt.VIR_DOMAIN_EVENT_STARTED:
                call(self._appeared, domain)

        def on_qemu(
            _connection: Any, domain: Any, name: str, seconds: int, micros: int, data: str, _opaque: Any
        ) -> None:
            call(self._event, domain.UUIDString(), name, data)

        connection.registerCloseCallback(on_close, None)
        connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_life, None)
        for name in _EVENTS:
            libvirt_qemu.qemuMonitorEventRegister(connection, None, name, on_qemu, None)
        flags = libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE
        for domain in await self._loop.run_in_executor(self._thread, connection.listAllDomains, flags):
            await self._add(domain)
        self.tried.set()
        await lost.wait()

    def _appeared(self, domain: Any) -> None:
        self.guard.spawn(self._add(domain))

    def _event(self, uuid: str, name: str, data: str) -> None:
        vm = next((v for v in self.guard.vms.values() if v.uuid == uuid), None)
        if vm is not None:
            self.guard.monitor_event(vm, {"event": name, "data": json.loads(data) if data else {}})

    async def _add(self, domain: Any) -> None:
        name = domain.name()
        policy = next((p for p in self.guard.policy.vms if p.libvirt == self.uri and p.matches(name)), None)
        if policy is None:
            return
        try:
            pid = await asyncio.to_thread(_process_of, domain.UUIDString())
            monitor = LibvirtMonitor(domain, pid, self._thread)
            self._monitors.append(monitor)
            await self.guard.add(name, domain.UUIDString(), pid, policy, self.uri, monitor)
            self.guard.unreachable.pop(f"{self.uri} {name}", None)
        except (OSError, ValueError, MonitorError) as error:
            self.guard.unreachable[f"{self.uri} {name}"] = str(error)
