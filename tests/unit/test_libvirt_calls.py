# SPDX-License-Identifier: MIT
"""Which thread makes which call to libvirt, and who waits for whom."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from hwerr_notify.guard.errors import MonitorError
from hwerr_notify.guard.libvirt import Libvirt, LibvirtMonitor
from hwerr_notify.guard.policy import VmPolicy

libvirt = pytest.importorskip("libvirt")
libvirt_qemu = pytest.importorskip("libvirt_qemu")

URI = "qemu:///system"
LIMIT = 60.0


class Call:
    """Notes who calls; two at a time on one connection are what crashes."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._busy = threading.Lock()

    def __enter__(self) -> None:
        self.server.threads.add(threading.get_ident())
        assert self._busy.acquire(blocking=False), "two calls at the same time on one connection"

    def __exit__(self, *_: object) -> None:
        self._busy.release()


class Domain:
    def __init__(self, connection: Connection, name: str) -> None:
        self.connection, self._name = connection, name

    def name(self) -> str:
        return self._name

    def UUIDString(self) -> str:
        return f"uuid-{self._name}"

    def isActive(self) -> int:
        with self.connection.call:
            return self._name in self.connection.server.running

    def command(self, message: str) -> str:
        with self.connection.call:
            server = self.connection.server
            if self._name == server.hung:
                server.hangs.set()
                assert server.goes_on.wait(LIMIT)
            command = json.loads(message)["execute"]
            said: Any = {"of": self._name, "was": command}
            if command == "query-cpus-fast":
                said = [{"thread-id": tid} for tid in server.vcpus]
            return json.dumps({"return": said})


class Connection:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.call = Call(server)
        self.on_close: Callable[..., None] | None = None
        self.on_life: Callable[..., None] | None = None
        self.open = True

    def _do(self, *_: object) -> int:
        with self.call:
            return 0

    setKeepAlive = unregisterCloseCallback = _do

    def registerCloseCallback(self, callback: Callable[..., None], _opaque: object) -> None:
        with self.call:
            self.on_close = callback

    def domainEventRegisterAny(
        self, _domain: object, _what: int, callback: Callable[..., None], *_: object
    ) -> None:
        with self.call:
            self.on_life = callback

    def listAllDomains(self, _flags: int) -> list[Domain]:
        with self.call:
            return [Domain(self, name) for name in sorted(self.server.running)]

    def lookupByUUIDString(self, uuid: str) -> Domain:
        with self.call:
            return Domain(self, uuid.removeprefix("uuid-"))

    def close(self) -> int:
        with self.call:
            self.open = False
            return 0


class Server:
    """A libvirtd with domains."""

    def __init__(self, *running: str, hung: str | None = None) -> None:
        self.running, self.hung = set(running), hung
        self.threads: set[int] = set()
        self.connections: list[Connection] = []
        self.hangs, self.goes_on = threading.Event(), threading.Event()
        # Threads of the processes that its domains are.
        self.vcpus = [os.getpid()]

    def connect(self, uri: str) -> Connection:
        assert uri == URI
        connection = Connection(self)
        with connection.call:
            self.connections.append(connection)
        return connection


class Guard:
    """Adds as the daemon does: by asking the monitor."""

    def __init__(self) -> None:
        self.policy = SimpleNamespace(vms=[VmPolicy("web*", libvirt=URI)])
        self.unreachable: dict[str, str] = {}
        self.vms: dict[str, Any] = {}
        self.added: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self.tasks: list[asyncio.Task[Any]] = []

    def spawn(self, job: Any) -> asyncio.Task[Any]:
        self.tasks.append(asyncio.create_task(job))
        return self.tasks[-1]

    def cannot_reach(self, where: str, error: Exception | str) -> None:
        self.unreachable[where] = str(error)

    async def pause(self, seconds: float) -> bool:
        await asyncio.sleep(seconds)
        return False

    async def add(self, name: str, uuid: str, pid: int, policy: Any, where: str, monitor: Any) -> None:
        assert (await monitor.execute("query-name", limit=0.2))["of"] == name
        self.added.put_nowait((name, monitor))


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Runs a job with a server that libvirt's client talks to."""
    servers: list[Server] = []

    def run(server: Server, job: Callable[[Guard, Libvirt, Server], Any]) -> None:
        servers.append(server)
        monkeypatch.setattr(libvirt, "open", server.connect)
        monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommand", lambda domain, text, _: domain.command(text))
        monkeypatch.setattr(libvirt_qemu, "qemuMonitorEventRegister", lambda connection, *_: connection._do())
        monkeypatch.setattr(Libvirt, "_start_events", lambda *_: None)
        monkeypatch.setattr(
            "hwerr_notify.guard.libvirt._processes_of",
            lambda uuid: [os.getpid()] if uuid.removeprefix("uuid-") in server.running else [],
        )

        async def main() -> None:
            guard = Guard()
            driver = Libvirt(URI, guard)  # type: ignore[arg-type]
            guard.spawn(driver.run())
            async with asyncio.timeout(LIMIT):
                await job(guard, driver, server)
            for task in guard.tasks:
                task.cancel()
            await asyncio.gather(*guard.tasks, return_exceptions=True)
            assert threading.get_ident() not in server.threads, "a call was made in the event loop's thread"

        asyncio.run(main())

    yield run
    for server in servers:
        server.goes_on.set()


def test_one_that_hangs_holds_up_no_other(play: Callable[..., None]) -> None:
    async def job(guard: Guard, driver: Libvirt, server: Server) -> None:
        name, monitor = await guard.added.get()
        assert name == "web2"
        await driver.tried.wait()
        assert await asyncio.to_thread(server.hangs.wait, LIMIT)
        for _ in range(3):
            assert await monitor.execute("query-status") == {"of": "web2", "was": "query-status"}
        assert "did not answer" in guard.unreachable[f"{URI} web1"]
        assert guard.added.empty()
        # When it answers again it is guarded, too: by the connection that it had.
        connections = len(server.connections)
        server.goes_on.set()
        assert (await guard.added.get())[0] == "web1"
        assert len(server.connections) == connections
        assert guard.unreachable == {}

    play(Server("web1", "web2", "db1", hung="web1"), job)


def test_a_connection_is_kept_for_a_domain_and_goes_with_it(play: Callable[..., None]) -> None:
    async def job(guard: Guard, driver: Libvirt, server: Server) -> None:
        _, monitor = await guard.added.get()
        main, own = server.connections
        assert main.on_life
        for n in range(3):
            await monitor.execute("query-status")
            assert server.connections == [main, own], n
        # It ends: the daemon lets the monitor go.
        server.running.clear()
        await monitor.aclose()
        with pytest.raises(MonitorError, match="closed"):
            await monitor.execute("query-status")
        while driver._domains or own.open:
            await asyncio.sleep(0)
        assert main.open
        # It begins anew.
        server.running.add("web1")
        await asyncio.to_thread(
            main.on_life, main, Domain(main, "web1"), libvirt.VIR_DOMAIN_EVENT_STARTED, 0, None
        )
        name, monitor = await guard.added.get()
        assert name == "web1"
        assert (await monitor.execute("query-status"))["of"] == "web1"

    play(Server("web1"), job)


def test_a_connection_that_is_lost_is_made_anew(
    play: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def job(guard: Guard, driver: Libvirt, server: Server) -> None:
        _, monitor = await guard.added.get()
        own = server.connections[1]
        assert own.on_close
        await asyncio.to_thread(own.on_close, own, 0, None)
        await monitor.closed.wait()
        _, again = await guard.added.get()
        assert again is not monitor
        assert (await again.execute("query-status"))["of"] == "web1"
        while own.open:
            await asyncio.sleep(0)

    play(Server("web1"), job)


UUID = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"


def of_that_uuid(code: str) -> subprocess.Popen[str]:
    """A process of anybody's that says that it is the domain's; it has said a line when this returns."""
    child = subprocess.Popen([sys.executable, "-c", code, "-uuid", UUID], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    return child


def test_whose_process_a_domain_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of whoever has its UUID on his command line: its vCPUs are threads of it."""
    threads = (
        "import threading, time; "
        "threads = [threading.Thread(target=time.sleep, args=(1000,)) for _ in range(2)]; "
        "[t.start() for t in threads]; print(*(t.native_id for t in threads), flush=True)"
    )
    others = [of_that_uuid("import time; print(flush=True); time.sleep(1000)") for _ in range(2)]
    qemu = subprocess.Popen([sys.executable, "-c", threads, "-uuid", UUID], stdout=subprocess.PIPE, text=True)
    assert qemu.stdout is not None
    tids = [int(tid) for tid in qemu.stdout.readline().split()]
    others.append(of_that_uuid("import time; print(flush=True); time.sleep(1000)"))

    async def main() -> None:
        says: list[Any] = []
        monitor = LibvirtMonitor(UUID)

        async def execute(command: str, *_: Any, **__: Any) -> Any:
            assert command == "query-cpus-fast"
            return says.pop()

        monkeypatch.setattr(monitor, "execute", execute)
        says.append([{"thread-id": tid} for tid in tids])
        assert await monitor.find_process() == monitor.pid == qemu.pid
        for wrong in ([], [{"thread-id": tids[0]}, {"thread-id": others[0].pid}]):
            says.append(wrong)
            with pytest.raises(MonitorError, match="has the threads of its vCPUs"):
                await monitor.find_process()
        for nonsense in (None, [3], [{"thread-id": "x"}]):
            says.append(nonsense)
            with pytest.raises(MonitorError, match=r"makes? no sense"):
                await monitor.find_process()
        for child in (*others, qemu):
            child.kill()
            child.wait()
        with pytest.raises(ProcessLookupError):
            await monitor.find_process()
        await monitor.aclose()

    try:
        asyncio.run(main())
    finally:
        for child in (*others, qemu):
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()


def test_one_that_is_not_found_is_said(play: Callable[..., None]) -> None:
    async def job(guard: Guard, driver: Libvirt, server: Server) -> None:
        await driver.tried.wait()
        assert "has the threads of its vCPUs" in guard.unreachable[f"{URI} web1"]
        assert guard.added.empty()
        server.vcpus = [os.getpid()]
        assert (await guard.added.get())[0] == "web1"

    server = Server("web1")
    server.vcpus = [1]
    play(server, job)
