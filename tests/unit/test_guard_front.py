# SPDX-License-Identifier: MIT
"""The QMP front of a guest whose QEMU says nothing any more."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hwerr_notify.guard import front as front_module
from hwerr_notify.guard.daemon import Guard
from hwerr_notify.guard.errors import MonitorError
from hwerr_notify.guard.front import Front
from hwerr_notify.guard.inotify import DirectoryWatch
from hwerr_notify.guard.policy import Policy, VmPolicy
from hwerr_notify.guard.process import Process
from hwerr_notify.guard.store import Incident
from hwerr_notify.guard.vm import Machine, Vm
from hwerr_notify.jsonform import boot_id

# What a client waits for at most here; the front's own times are shorter.
LIMIT = 60.0


class Silent:
    """A monitor that never answers."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.pid = 0
        self.asked: list[tuple[str, float]] = []
        self.told = asyncio.Event()

    async def execute(self, command: str, arguments: Any = None, *, limit: float = 5.0) -> Any:
        self.asked.append((command, limit))
        self.told.set()
        try:
            async with asyncio.timeout(limit):
                await asyncio.Event().wait()
        except TimeoutError:
            raise MonitorError(f"QEMU did not answer {command} within {limit:g} s") from None

    async def aclose(self) -> None:
        self.closed.set()


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, path: Path) -> tuple[Client, dict[str, Any]]:
        client = cls(*await asyncio.open_unix_connection(path))
        greeting = await client.line()
        client.say("qmp_capabilities")
        assert await client.line() == {"return": {}}
        return client, greeting

    def say(self, command: str, arguments: Any = None) -> None:
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        self.writer.write(json.dumps(request).encode() + b"\n")

    async def line(self) -> dict[str, Any]:
        async with asyncio.timeout(LIMIT):
            return dict(json.loads(await self.reader.readline()))

    async def ask(self, command: str, arguments: Any = None) -> dict[str, Any]:
        self.say(command, arguments)
        return await self.line()


@pytest.fixture
def child() -> Iterator[Process]:
    """Stands for a QEMU."""
    with subprocess.Popen(["sleep", "1000"]) as program:
        process = Process.open(program.pid)
        yield process
        process.close()
        program.kill()


def incident(process: Process, state: str = "frozen", **more: Any) -> Incident:
    return Incident(
        "20260102T030405.006-web1", boot_id() or "", "web1", None, process.pid, process.start_ticks, "/q",
        {"message": "m"}, 1, 2, state, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def guard_of(home: Path) -> Guard:
    policy = Policy(
        Path("/none"),
        vms=(VmPolicy(qmp=str(home / "*.qmp"), front=True),),
        state_dir=home / "s",
        run_dir=home / "r",
        dump=False,
    )
    guard = Guard(policy, "/nowhere")
    guard.store.prepare()
    return guard


def with_front(home: Path, process: Process, job: Callable[[Front, Silent, Client], Awaitable[None]]) -> None:
    async def main() -> None:
        guard = guard_of(home)
        vm = Vm("web1", None, process, guard.policy.vms[0], "/q")
        vm.monitor = monitor = Silent()
        front = Front(vm, home / "front", guard)
        await front.start()
        client, _ = await Client.connect(front.path)
        await job(front, monitor, client)
        client.writer.close()
        await front.close()
        guard.store.close()

    asyncio.run(main())


def hold(front: Front, found: Incident) -> None:
    front.guard.incidents[found.id] = found
    front.vm.incident = found.id


def test_the_state_of_a_frozen_guest_is_known_without_asking(tmp_path: Path, child: Process) -> None:
    async def job(front: Front, monitor: Silent, client: Client) -> None:
        hold(front, incident(child))
        said = (await client.ask("query-status"))["return"]
        assert (said["status"], said["running"]) == ("frozen", False)
        assert said["x-hwerr-incident"] == incident(child).id
        assert monitor.asked == []

    with_front(tmp_path, child, job)


@pytest.mark.parametrize("state", ["freezing", "frozen", "failed"])
def test_nobody_waits_long_for_a_guest_that_is_held(
    tmp_path: Path, child: Process, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert front_module._HELD_LIMIT == 5.0
    monkeypatch.setattr(front_module, "_HELD_LIMIT", 0.05)

    async def job(front: Front, monitor: Silent, client: Client) -> None:
        hold(front, incident(child, state))
        assert "did not answer" in (await client.ask("query-cpus-fast"))["error"]["desc"]
        assert monitor.asked == [("query-cpus-fast", 0.05)]
        assert (await client.ask("query-status"))["return"]["running"] is False

    with_front(tmp_path, child, job)


def test_a_dump_of_a_frozen_guest_may_take_its_time(tmp_path: Path, child: Process) -> None:
    async def job(front: Front, monitor: Silent, client: Client) -> None:
        hold(front, incident(child))
        client.say("dump-guest-memory", {"paging": False, "protocol": "file:/x"})
        await monitor.told.wait()
        assert monitor.asked == [("dump-guest-memory", front_module._LIMIT)]

    with_front(tmp_path, child, job)


def test_who_asked_before_is_answered_too(
    tmp_path: Path, child: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that QEMU had not answered when it was frozen does not bar the next."""
    monkeypatch.setattr(front_module, "_HELD_LIMIT", 0.05)

    async def job(front: Front, monitor: Silent, client: Client) -> None:
        client.say("query-block")
        await monitor.told.wait()
        hold(front, incident(child))
        front.frozen(incident(child))
        client.say("query-status")
        assert (await client.line())["event"] == "GUEST_FROZEN"
        assert "did not answer query-block" in (await client.line())["error"]["desc"]
        assert (await client.line())["return"]["status"] == "frozen"

    with_front(tmp_path, child, job)


def test_after_a_restart_there_is_a_front(
    tmp_path: Path, child: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a guest frozen as a process, whose monitor nobody can connect to."""

    async def main() -> None:
        guard = guard_of(tmp_path)
        found = replace(incident(child, machine=Machine().to_json()), monitor=str(tmp_path / "web1.qmp"))
        guard.store.save(found)
        version = {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}
        (guard.store.path(found.id) / "record.json").write_text(json.dumps({"version": version}), "utf-8")
        monkeypatch.setattr(guard, "_take_up", lambda _incident: None)
        watch = DirectoryWatch(guard._scan)
        await guard._first_look(watch)
        client, greeting = await Client.connect(tmp_path / "r/front/web1.qmp")
        assert greeting == {"QMP": {"version": version, "capabilities": []}}
        assert (await client.ask("query-status"))["return"]["status"] == "frozen"
        assert "not connected" in (await client.ask("query-name"))["error"]["desc"]
        client.writer.close()
        watch.close()
        await guard._end()

    asyncio.run(main())
