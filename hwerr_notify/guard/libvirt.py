# SPDX-License-Identifier: MIT
"""VMs that libvirt runs: found, watched and talked to through it.

The monitor stays libvirt's: commands go through virDomainQemuMonitorCommand(), which
blocks, so each runs in a thread and is waited for only so long. A QEMU that hangs does not
let its call come back, and two calls at the same time on one connection can crash the client before
10.3 (CVE-2024-4418): so each domain has a connection of its own, and that a thread. libvirt is told
nothing that it does not see by itself: QEMU's STOP makes it give the leases of its lock manager
(sanlock, virtlockd) back, which are others' and not looked at here.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..names import qemu_identity
from .errors import MonitorError, Refused
from .monitor import DEFAULT_LIMIT, answer
from .threads import Threads

if TYPE_CHECKING:
    from .daemon import Guard
    from .policy import VmPolicy

__all__ = ["Libvirt", "LibvirtMonitor"]

log = logging.getLogger("hwerr-guard")

# What QEMU's monitor says that libvirt passes on to who asks for it.
_EVENTS = ("STOP", "RESUME", "GUEST_PANICKED", "BLOCK_IO_ERROR", "RESET", "SHUTDOWN", "DEVICE_DELETED")
# A connection that is lost, or cannot be had, is tried again after so many seconds, first and at most.
_RETRY_FIRST, _RETRY_MOST = 0.5, 10.0
# libvirtd is asked for a sign of life after so many seconds without one, so many times.
_KEEP_ALIVE = 5, 3


def _connect(libvirt: Any, uri: str, on_close: Callable[[], object]) -> Any:
    """A connection that notices when libvirtd has gone or hangs. Blocks."""
    connection = libvirt.open(uri)
    connection.setKeepAlive(*_KEEP_ALIVE)
    connection.registerCloseCallback(lambda *_: on_close(), None)
    return connection


class LibvirtMonitor:
    """QEMU's monitor behind a domain, over a connection of its own."""

    def __init__(self, uuid: str) -> None:
        """Use `open()`."""
        self._uuid = uuid
        self._pid = 0
        self._thread = Threads(1, "libvirt-call")
        # Used in that thread only, and let go of there: their ends are calls, too.
        self._connection: Any = None
        self._domain: Any = None
        self._ending = False
        self.closed = asyncio.Event()

    @classmethod
    async def open(cls, uri: str, uuid: str) -> Self | None:
        """None if that domain does not run. MonitorError."""
        import libvirt  # type: ignore[import-not-found, unused-ignore]

        loop = asyncio.get_running_loop()
        if not await asyncio.to_thread(_processes_of, uuid):
            return None
        monitor = cls(uuid)
        try:
            runs = await loop.run_in_executor(monitor._thread, monitor._begin, libvirt, uri, uuid, loop)
        except BaseException as error:
            await monitor.aclose()
            if isinstance(error, libvirt.libvirtError):
                raise MonitorError(f"libvirt: {error}") from None
            raise
        if runs:
            return monitor
        await monitor.aclose()
        return None

    def _begin(self, libvirt: Any, uri: str, uuid: str, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether the domain runs. Blocks."""
        self._connection = _connect(libvirt, uri, lambda: loop.call_soon_threadsafe(self.closed.set))
        try:
            self._domain = self._connection.lookupByUUIDString(uuid)
            return bool(self._domain.isActive())
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return False
            raise

    @property
    def pid(self) -> int:
        """0 until `find_process()` has found it."""
        return self._pid

    async def find_process(self) -> int:
        """The domain's: the one that has its vCPUs' threads, which nobody else can have. Anybody may have its
        UUID on his command line. ProcessLookupError if it has ended; MonitorError."""
        pids = await asyncio.to_thread(_processes_of, self._uuid)
        if not pids:
            raise ProcessLookupError(errno.ESRCH, "no process has the domain's UUID")
        cpus = answer(await self.execute("query-cpus-fast"), list, "query-cpus-fast")
        try:
            tids = {str(int(cpu["thread-id"])) for cpu in cpus}
        except (KeyError, TypeError, ValueError) as error:
            raise MonitorError(f"QEMU's answers make no sense ({error!r})") from None
        for pid in pids:
            with suppress(FileNotFoundError, ProcessLookupError):
                if tids and tids <= set(os.listdir(f"/proc/{pid}/task")):
                    self._pid = pid
                    return pid
        raise MonitorError(f"no process that has the UUID {self._uuid} has the threads of its vCPUs")

    async def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, limit: float = DEFAULT_LIMIT
    ) -> Any:
        """See `Monitor`."""
        import libvirt

        if self.closed.is_set():
            raise MonitorError("the connection to libvirt is closed")
        message = json.dumps({"execute": command, **({"arguments": arguments} if arguments else {})})
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limit):
                text = await loop.run_in_executor(self._thread, self._call, message)
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

    def _call(self, message: str) -> str:
        import libvirt_qemu  # type: ignore[import-not-found, unused-ignore]

        if self._domain is None:
            raise MonitorError("the connection to libvirt is closed")
        return str(libvirt_qemu.qemuMonitorCommand(self._domain, message, 0))

    async def aclose(self) -> None:
        """See `Monitor`. Waits for nobody: the good-bye to libvirtd is said behind a call that hangs."""
        self.closed.set()
        if not self._ending:
            self._ending = True
            self._thread.submit(self._end).add_done_callback(lambda _: self._thread.shutdown())

    def _end(self) -> None:
        connection, self._connection, self._domain = self._connection, None, None
        if connection is not None:
            with suppress(Exception):
                # It keeps what it would call, and that this.
                connection.unregisterCloseCallback()
            with suppress(Exception):
                connection.close()


def _processes_of(uuid: str) -> list[int]:
    """Those that have this UUID on their command lines as a QEMU has; libvirt has no call that tells."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            argv = os.fsdecode((entry / "cmdline").read_bytes()).split("\0")
        except OSError:
            continue
        if str(qemu_identity(argv)[1]) == uuid:
            found.append(int(entry.name))
    return found


class _Domain:
    """One that is looked after. `tried`: guarded, or known that it cannot be. `again`: told that it began."""

    def __init__(self) -> None:
        self.tried = asyncio.Event()
        self.again = False


class Libvirt:
    """A connection for what happens; guards the running domains that the policy names."""

    def __init__(self, uri: str, guard: Guard) -> None:
        self.uri = uri
        self.guard = guard
        # Set when its running domains are guarded, or it cannot be reached.
        self.tried = asyncio.Event()
        self._connection: Any = None
        self._domains: dict[str, _Domain] = {}
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Until cancelled. Without libvirtd it tries again now and then."""
        try:
            import libvirt
        except ImportError as error:
            self.guard.cannot_reach(self.uri, f"{error}: apt-get install python3-libvirt")
            self.tried.set()
            return
        await asyncio.to_thread(self._start_events, libvirt)
        wait = _RETRY_FIRST
        while True:
            lost = asyncio.Event()
            # A thread for each, so that a libvirtd that hangs takes none from those who look and save.
            thread = Threads(1, "libvirt-call")
            try:
                running = await self._loop.run_in_executor(thread, self._begin, libvirt, lost)
                self.guard.unreachable.pop(self.uri, None)
                wait = _RETRY_FIRST
                domains = [self._appeared(name, uuid) for name, uuid in running]
                self._nothing_was_heard()
                first = [d.tried.wait() for d in domains if d is not None]
                self.guard.spawn(self._all_tried(first))
                await lost.wait()
            except Exception as error:
                # One of libvirt's own is no bug: its text is what it is.
                said = str(error) if isinstance(error, libvirt.libvirtError) else error
                self.guard.cannot_reach(self.uri, said)
                self.tried.set()
            hurried = await self.guard.pause(wait)
            wait = _RETRY_FIRST if hurried else min(2 * wait, _RETRY_MOST)

    async def _all_tried(self, first: list[Any]) -> None:
        await asyncio.gather(*first)
        self.tried.set()

    def _start_events(self, libvirt: Any) -> None:
        import threading

        libvirt.registerErrorHandler(lambda *_: None, None)
        libvirt.virEventRegisterDefaultImpl()

        def loop() -> None:
            while True:
                libvirt.virEventRunDefaultImpl()

        threading.Thread(target=loop, daemon=True, name="libvirt").start()

    def _begin(self, libvirt: Any, lost: asyncio.Event) -> list[tuple[str, str]]:
        """Asks to be told; name and UUID of what runs already. Blocks."""
        import libvirt_qemu

        def call(job: Any, *args: Any) -> None:
            self._loop.call_soon_threadsafe(job, *args)

        def on_life(_connection: Any, domain: Any, event: int, _detail: int, _opaque: Any) -> None:
            if event == libvirt.VIR_DOMAIN_EVENT_STARTED:
                call(self._appeared, domain.name(), domain.UUIDString())

        def on_qemu(
            _connection: Any, domain: Any, name: str, seconds: int, micros: int, data: str, _opaque: Any
        ) -> None:
            call(self._event, domain.UUIDString(), name, data)

        # Never closed: that would say good-bye to libvirtd, and wait for the answer.
        self._connection = connection = _connect(libvirt, self.uri, lambda: call(lost.set))
        connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_life, None)
        for name in _EVENTS:
            libvirt_qemu.qemuMonitorEventRegister(connection, None, name, on_qemu, None)
        active = connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        return [(domain.name(), domain.UUIDString()) for domain in active]

    def _nothing_was_heard(self) -> None:
        """Since the connection before this one was lost."""
        for vm in self.guard.vms.values():
            if vm.where == self.uri:
                vm.missed()
                self.guard.spawn(self.guard.look_again(vm))

    def _event(self, uuid: str, name: str, data: str) -> None:
        vm = next((v for v in self.guard.vms.values() if v.uuid == uuid), None)
        if vm is not None:
            self.guard.monitor_event(vm, {"event": name, "data": json.loads(data) if data else {}})

    def _appeared(self, name: str, uuid: str) -> _Domain | None:
        """Looks after a domain from now on; None if the policy wants none of it."""
        policy = next((p for p in self.guard.policy.vms if p.libvirt == self.uri and p.matches(name)), None)
        if policy is None:
            return None
        if uuid not in self._domains:
            self._domains[uuid] = _Domain()
            self.guard.spawn(self._keep(self._domains[uuid], name, uuid, policy))
        self._domains[uuid].again = True
        return self._domains[uuid]

    async def _keep(self, domain: _Domain, name: str, uuid: str, policy: VmPolicy) -> None:
        """Keeps a monitor connected as long as the domain runs."""
        where = f"{self.uri} {name}"
        wait = _RETRY_FIRST
        try:
            while True:
                domain.again = False
                try:
                    monitor = await LibvirtMonitor.open(self.uri, uuid)
                except Exception as error:
                    self.guard.cannot_reach(where, error)
                    domain.tried.set()
                    hurried = await self.guard.pause(wait)
                    wait = _RETRY_FIRST if hurried else min(2 * wait, _RETRY_MOST)
                    continue
                wait = _RETRY_FIRST
                if monitor is not None:
                    try:
                        await self._add(monitor, domain, name, uuid, policy)
                    finally:
                        await monitor.aclose()
                elif not domain.again:
                    break
        finally:
            self.guard.unreachable.pop(where, None)
            self._domains.pop(uuid, None)
            domain.tried.set()

    async def _add(
        self, monitor: LibvirtMonitor, domain: _Domain, name: str, uuid: str, policy: VmPolicy
    ) -> None:
        """Guards it until its monitor is closed. A QEMU that hangs is asked again by the same one."""
        where = f"{self.uri} {name}"
        wait = _RETRY_FIRST
        while not monitor.closed.is_set():
            try:
                pid = await monitor.find_process()
                await self.guard.add(name, uuid, pid, policy, self.uri, monitor)
            except ProcessLookupError:
                return
            except Exception as error:
                self.guard.cannot_reach(where, error)
                domain.tried.set()
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await monitor.closed.wait()
                wait = min(2 * wait, _RETRY_MOST)
                continue
            self.guard.unreachable.pop(where, None)
            domain.tried.set()
            await monitor.closed.wait()
