# SPDX-License-Identifier: MIT
"""What the daemon makes of records, of monitors, and of what an earlier run has left."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hwerr_notify import Event, Flags, GuestFlags, Kind, Memory, Severity, Source, build
from hwerr_notify import Guest as Hit
from hwerr_notify.aio import Watch
from hwerr_notify.device import Guard as Armed
from hwerr_notify.event import Stop
from hwerr_notify.guard import daemon as daemons
from hwerr_notify.guard.control import Control
from hwerr_notify.guard.cursor import Cursor
from hwerr_notify.guard.daemon import Guard, _directories
from hwerr_notify.guard.errors import GuardError
from hwerr_notify.guard.inotify import DirectoryWatch
from hwerr_notify.guard.policy import Hook, Policy, VmPolicy
from hwerr_notify.guard.process import Process
from hwerr_notify.guard.steps import in_event_path
from hwerr_notify.guard.store import Incident, Step
from hwerr_notify.guard.vm import Machine, Vm
from hwerr_notify.jsonform import boot_id

LIMIT = 60.0
S = Severity
ME = Process.open(os.getpid())
PAGE = 0x5000


class Kernel:
    """The guard in the kernel, and what it was told."""

    def __init__(self, *armed: Armed) -> None:
        self.armed = list(armed)
        self.disarmed: list[int] = []
        self.stops = 0

    def missing(self) -> str | None:
        return None

    def arm(self, process: Process, severity: Severity) -> str | None:
        return None

    def disarm(self, process: Process) -> None:
        self.disarmed.append(process.pid)

    def kept(self) -> list[Armed]:
        return self.armed

    def stop(self, process: Process) -> Stop | str:
        self.stops += 1
        return Stop(process.pid, 1, process.start_ns, 7)

    def stopped_ns(self, process: Process) -> int | None:
        return 7 if self.stops else None


class Qemu:
    """A monitor that says what it is told to say, and nothing else makes sense."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.closed = asyncio.Event()
        self.pid = os.getpid()

    async def execute(self, command: str, arguments: Any = None, *, limit: float = 5.0) -> Any:
        return self.answers.get(command.replace("-", "_"), [])

    async def aclose(self) -> None:
        self.closed.set()


def guard_in(home: Path, kernel: Kernel | None = None, **policy: Any) -> Guard:
    wanted = {"vms": (VmPolicy(qmp="/q"),), "dump": False, **policy}
    guard = Guard(Policy(Path("/none"), state_dir=home / "s", run_dir=home / "r", **wanted), "/nowhere")
    guard.kernel = guard.steps.kernel = kernel or Kernel()  # type: ignore[assignment]
    guard.store.prepare()
    guard.policy.run_dir.mkdir()
    return guard


def vm_of(guard: Guard, **policy: Any) -> Vm:
    vm = Vm("web1", None, Process.open(os.getpid()), VmPolicy(qmp="/q", **policy), "/q", Qemu())
    guard.vms[vm.key] = vm
    return vm


def record(
    severity: Severity = S.RECOVERABLE, seq: int = 1, gpa: int = PAGE, *, stopped: bool = False,
    out: bool = True, flags: int = 0, hit: bool = True, **more: Any,
) -> Event:  # fmt: skip
    """`out`: all vCPUs that were told to stop were seen out of the guest."""
    marks = GuestFlags.KVM | (GuestFlags.STOPPED if stopped and out else GuestFlags(0))
    guest = Hit(ME.pid, marks, start_ns=ME.start_ns, gpa=gpa, hva=0x7F0000000000 + gpa, len=4096)
    infos: list[Any] = [Memory(0x1000, 4096)]
    infos += [guest] if hit else []
    infos += [Stop(ME.pid, 1, ME.start_ns, 99, running=not out)] if stopped else []
    return build(
        *infos, severity=severity, source=Source.MCE, seq=seq, time_mono_ns=50, flags=Flags(flags), **more
    )


def no_work(guard: Guard) -> list[Incident]:
    """Incidents begin, and their steps are left alone."""
    begun: list[Incident] = []
    guard._work = lambda vm, incident: begun.append(incident)  # type: ignore[method-assign]
    return begun


def held(guard: Guard, *events: Event) -> None:
    """What the kernel holds of it."""
    guard._records = lambda vm: list(events)  # type: ignore[method-assign]


async def settled(guard: Guard) -> None:
    while guard._tasks:
        await asyncio.wait(set(guard._tasks), timeout=LIMIT)


# -- monitors ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "begins"),
    [(["ok", "nospace"], False), (["failed", "nospace"], True), ([None], False), ([3, {}], False)],
)
def test_out_of_space_is_no_fault_of_hardware(tmp_path: Path, states: list[Any], begins: bool) -> None:
    async def main() -> None:
        guard = guard_in(tmp_path)
        begun = no_work(guard)
        devices = [s if isinstance(s, int) else {"device": "d", "io-status": s} for s in states]
        qemu = Qemu(query_status={"status": "io-error"}, query_block=devices)
        vm = vm_of(guard, freeze_on=frozenset({"block"}))
        vm.monitor = None

        async def look(*_: Any) -> Machine:
            return Machine()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hwerr_notify.guard.vm.look", look)
            await guard.add("web1", None, os.getpid(), vm.policy, "/q", qemu)
        assert [i.cause["layer"] for i in begun] == ["block"] * begins

    asyncio.run(main())


def test_every_directory_of_a_pattern_is_watched(tmp_path: Path) -> None:
    async def main() -> None:
        guard = guard_in(tmp_path, vms=(VmPolicy(qmp=f"{tmp_path}/vm/*/run[0-9]/qmp"),))
        served: asyncio.Queue[str] = asyncio.Queue()

        async def serve(path: str) -> None:
            served.put_nowait(path)
            await asyncio.Event().wait()

        guard._serve_socket = serve  # type: ignore[method-assign]
        scanned = asyncio.Event()

        def scan() -> None:
            guard._scan()
            scanned.set()

        guard._watch = watch = DirectoryWatch(scan)
        (tmp_path / "vm/one").mkdir(parents=True)
        guard._scan()
        for part in ("one/run1", "two", "two/run7"):
            (tmp_path / "vm" / part).mkdir()
            await asyncio.wait_for(scanned.wait(), LIMIT)
            scanned.clear()
        for part in ("two/run7", "one/run1"):
            path = tmp_path / "vm" / part / "qmp"
            path.touch()
            assert await asyncio.wait_for(served.get(), LIMIT) == str(path)
        watch.close()
        await guard._end()

    asyncio.run(main())


def test_directories_of_a_pattern(tmp_path: Path) -> None:
    assert _directories("/run/vm/*.qmp") == [Path("/run/vm")]
    (tmp_path / "[x").mkdir()
    assert _directories(f"{tmp_path}/*/y/qmp") == [tmp_path, tmp_path / "[x/y"]


# -- records -----------------------------------------------------------------


class Storm:
    """A device that always has records."""

    closed = False

    def __init__(self, fault: bool = False) -> None:
        self.seq = 0
        self.fault = fault

    def read_nonblocking(self) -> list[Event]:
        if self.fault:
            raise OSError(5, "Input/output error")
        self.seq += 1
        return [record(S.DEFERRED, self.seq)]

    def drain(self) -> list[Event]:
        return []

    def close(self) -> None:
        self.closed = True


def test_a_storm_leaves_others_their_turn(tmp_path: Path) -> None:
    async def watch() -> None:
        storm = Storm()

        async def read() -> None:
            async for _ in Watch(storm):  # type: ignore[arg-type]
                assert storm.seq < 100_000

        task = asyncio.create_task(read())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not task.done()
        task.cancel()

    asyncio.run(watch())


def test_causes_without_end_are_one_incident(tmp_path: Path) -> None:
    """Of which the first is kept, and the last that came."""

    async def main() -> None:
        guard = guard_in(tmp_path)
        begun, vm = no_work(guard), vm_of(guard, freeze_severity=S.DEFERRED)
        for seq in range(1, 1001):
            guard.begin(vm, {"layer": "panic", "seq": seq, "message": "m"})
        (incident,) = guard.incidents.values()
        assert len(begun) == 1
        assert incident.cause["seq"] == 1
        assert [e["seq"] for e in incident.events] == list(range(1001 - 64, 1001))

    asyncio.run(main())


def saying(home: Path) -> tuple[Path, Hook]:
    """A hook for errors, and the file to which it adds a line of what it is told."""
    said, program = home / "said", home / "hook"
    program.write_text(f"#!/bin/sh\ncat >>{said}\necho >>{said}\n", "utf-8")
    program.chmod(0o755)
    return said, Hook((str(program),), frozenset({"error"}), LIMIT)


def test_errors_are_told_one_at_a_time(tmp_path: Path) -> None:
    """Those that come while a hook runs are told together."""
    said, hook = saying(tmp_path)

    async def main() -> None:
        guard = guard_in(tmp_path, hooks=(hook,))
        vm_of(guard)
        for seq in range(1, 101):
            guard._handle(record(S.RECOVERABLE if seq == 50 else S.DEFERRED, seq, kind=Kind.NONE))
            if seq == 1:
                guard.vms[next(iter(guard.vms))].policy = VmPolicy(qmp="/q", freeze_severity=None)
                await asyncio.sleep(0)
        await settled(guard)

    asyncio.run(main())
    told = [json.loads(line) for line in said.read_text("utf-8").splitlines()]
    assert [(t["vm"], t["error"]["seq"], t["others"]) for t in told] == [("web1", 1, 0), ("web1", 50, 98)]


def test_whose_error_it_is_may_be_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said, hook = saying(tmp_path)

    async def main() -> None:
        guard = guard_in(tmp_path, hooks=(hook,))
        events = guard.subscribe()
        guard._handle(record(S.DEFERRED, 1, hit=False, flags=Flags.OWNERS_UNKNOWN))
        guard._handle(record(S.RECOVERABLE, 2, hit=False))
        guard._handle(record(S.RECOVERABLE, 3, hit=False, flags=Flags.OWNERS_UNKNOWN))
        await settled(guard)
        guard._handle(record(S.FATAL, 4, hit=False, flags=Flags.OWNERS_TRUNCATED))
        await settled(guard)
        found = [events.get_nowait() for _ in range(events.qsize())]
        assert [(e["event"], e["vm"], e["error"]["seq"]) for e in found if e] == [
            ("HARDWARE_ERROR", None, 3), ("HARDWARE_ERROR", None, 4),
        ]  # fmt: skip

    asyncio.run(main())
    told = [json.loads(line) for line in said.read_text("utf-8").splitlines()]
    assert [(t["occasion"], t["vm"], t["error"]["seq"]) for t in told] == [
        ("error", None, 3),
        ("error", None, 4),
    ]
    assert sum("owners are known" in r.getMessage() for r in caplog.records) == 2


@contextmanager
def unprepared(guard: Guard, events: Any) -> Iterator[None]:
    def prepare() -> None:
        guard._events = events

    guard._prepare = prepare  # type: ignore[method-assign]
    yield


def test_a_daemon_that_is_deaf_ends(tmp_path: Path) -> None:
    async def main() -> None:
        guard = guard_in(tmp_path)
        with unprepared(guard, Storm(fault=True)):
            await asyncio.wait_for(guard.run(), LIMIT)

    with pytest.raises(GuardError, match="no more errors can be read"):
        asyncio.run(main())


# -- what stopped it ---------------------------------------------------------


def test_who_stopped_it_is_said_by_the_record() -> None:
    assert in_event_path(record(stopped=True).to_json(), ME) == 99
    assert in_event_path(record().to_json(), ME) is None
    assert in_event_path({"layer": "command", "stopped": True}, ME) is None


@pytest.mark.parametrize("stopped", [True, False])
def test_what_was_stopped_while_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool) -> None:
    """An old record of the VM is not the cause of what a command has stopped."""

    async def main() -> None:
        guard = guard_in(tmp_path)
        begun = no_work(guard)
        vm = vm_of(guard)
        held(guard, record(S.DEFERRED, 3, 0x9000), record(seq=4, stopped=stopped))
        guard.kernel.stop(vm.process)
        monkeypatch.setattr(daemons, "_RECORD_WITHIN", 0.01)
        guard._stopped_while_away(vm)
        # A record of what has just stopped it may still come.
        assert bool(begun) == stopped
        while not begun:
            await asyncio.sleep(0.01)
        (incident,) = begun
        assert (incident.cause.get("seq"), incident.cause["layer"]) == (
            (4, "hardware") if stopped else (None, "unknown")
        )
        # Poison of all of them.
        assert sorted(p[0] for p in incident.poison) == [PAGE, 0x9000]

    asyncio.run(main())


@pytest.mark.parametrize("what", ["record", "command", "not armed", "not stopped", "not out"])
def test_when_a_stop_needs_no_save_first(tmp_path: Path, what: str) -> None:
    async def main() -> None:
        guard = guard_in(tmp_path)
        vm = vm_of(guard)
        vm.armed = "no" if what == "not armed" else None
        cause = {"layer": "command", "message": "m", "stopped": True}
        if what != "command":
            error = record(stopped=what != "not stopped", out=what != "not out")
            cause = {**error.to_json(), "layer": "hardware", "stopped": True}
        saved: list[bool] = []
        save = guard.steps.save

        async def noted(incident: Incident, first: Any = None) -> Incident:
            saved.append("stop" in incident.steps)
            return await save(incident, first)

        guard.steps.save = noted  # type: ignore[method-assign]
        vm.process.threads = lambda tids=None: []  # type: ignore[method-assign]
        incident = Incident(
            "20260102T030405.006-web1", "b", "web1", None, ME.pid, ME.start_ticks, "/q", cause, 1, 2
        )
        guard.policy.limits.update(stop=5.0, record=5.0, release=0.1, seal=0.1)
        done = await guard.steps.freeze(vm, incident)
        assert saved[0] is (what == "record")
        assert done.steps["stop"].detail == (
            "by the kernel, on command" if what in ("command", "not stopped") else
            "by the kernel, asked in the event path" if what == "not out" else
            "by the kernel, in the event path"
        )  # fmt: skip

    asyncio.run(main())


def test_a_command_is_on_disk_before_anything_is_done(tmp_path: Path) -> None:
    async def main() -> None:
        kernel = Kernel()
        guard = guard_in(tmp_path, kernel)
        vm = vm_of(guard)

        async def freeze(vm: Vm, incident: Incident) -> Incident:
            assert not kernel.stops
            assert guard.store.load(incident.id).cause["layer"] == "command"
            return replace(incident, state="failed", notes=("seen",))

        guard.steps.freeze = freeze  # type: ignore[method-assign]
        incident = guard.begin(vm, {"layer": "command", "message": "m", "stopped": False})
        await settled(guard)
        assert guard.incidents[incident.id].notes == ("seen",)

    asyncio.run(main())


# -- a restart ---------------------------------------------------------------


class Numbers:
    """A device whose next record has a number."""

    def __init__(self, following: int) -> None:
        self.next_seq = following

    def info(self) -> Any:
        return self


def test_a_cursor(tmp_path: Path) -> None:
    device = tmp_path / "hwerr"
    device.touch()
    path = tmp_path / "cursor"

    def since(following: int) -> Any:
        return Cursor(path, str(device)).since(Numbers(following))  # type: ignore[arg-type]

    assert since(5) == 5
    assert since(9) == 5, "nothing was handled meanwhile"
    Cursor(path, str(device)).write(7)
    assert since(20) == 8
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    form = json.loads(path.read_text("ascii"))
    path.write_text(json.dumps(form | {"device": 1}), "ascii")
    assert since(20) == "boot", "another module, whose numbers begin anew"
    path.write_text(json.dumps(form | {"boot_id": "other"}), "ascii")
    assert since(20) == 20
    for nonsense in ("", "[]", "{}", "7", '{"seq": null}'):
        path.write_text(nonsense, "ascii")
        assert since(30) == 30


def test_a_cursor_waits_for_the_incident(tmp_path: Path) -> None:
    """A record is done when its incident is on disk; then the next run does not look at it again."""

    async def main() -> None:
        guard = guard_in(tmp_path)
        begun = no_work(guard)
        vm_of(guard)
        guard._handle(record(S.DEFERRED, 3))
        assert guard._done() == 3
        guard._handle(record(seq=4))
        guard._handle(record(S.DEFERRED, 5))
        assert guard._done() == 3
        await guard.steps.save(begun[0])
        assert guard._done() == 5

    asyncio.run(main())


def test_a_record_that_is_read_again_adds_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        guard = guard_in(tmp_path)
        (begun, _) = no_work(guard), vm_of(guard)
        for seq in (4, 4, 5, 5):
            guard._handle(record(seq=seq))
        incident = guard.incidents[begun[0].id]
        assert (incident.cause["seq"], [e["seq"] for e in incident.events]) == (4, [5])
        assert len(incident.poison) == 1

    asyncio.run(main())


def test_poison_of_before_and_after(tmp_path: Path) -> None:
    async def main() -> None:
        guard = guard_in(tmp_path)
        begun = no_work(guard)
        vm = vm_of(guard)
        held(guard, record(S.DEFERRED, 1, 0x9000))
        incident = guard.begin(vm, {"layer": "command", "message": "m"})
        assert [p[0] for p in begun[0].poison] == [0x9000]
        guard._handle(record(S.DEFERRED, 2, 0x8000))
        await settled(guard)
        assert [p[0] for p in guard.store.load(incident.id).poison] == [0x9000, 0x8000]
        # What came while nobody was there.
        held(guard, record(S.DEFERRED, 3, 0x7000))
        guard._take_up(guard.incidents[incident.id])
        await settled(guard)
        assert [p[0] for p in guard.store.load(incident.id).poison] == [0x9000, 0x8000, 0x7000]
        assert len(begun[-1].poison) == 3

    asyncio.run(main())


def test_the_machine_is_that_of_the_record(tmp_path: Path) -> None:
    async def main() -> None:
        guard = guard_in(tmp_path)
        at_connect, at_record = Machine(images=("/a",)), Machine(images=("/a", "/b"), taps=("t0",))
        incident = Incident(
            guard.store.new_id("web1", ME.pid), boot_id() or "", "web1", None, ME.pid, ME.start_ticks, "/q",
            {"message": "m"}, 1, 2, machine=at_connect.to_json(),
        ).with_step("stop", Step("done", 1, 2))  # fmt: skip
        for step, expected in (
            (None, at_connect),
            (Step("failed", 1, 2), at_connect),
            (Step("done", 1, 2, "record.json", {"machine": at_record.to_json()}), at_record),
        ):
            guard.store.save(incident.with_step("record", step) if step else incident)
            guard.vms.clear()
            guard._load_incidents()
            (vm,) = guard.vms.values()
            assert vm.machine == expected
            asyncio.get_running_loop().remove_reader(vm.process.pidfd)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "stops", "adopted"), [("*", 0, True), ("other", 0, False), ("other", 1, True)]
)
def test_what_an_earlier_run_has_armed(tmp_path: Path, name: str, stops: int, adopted: bool) -> None:
    """Its monitor cannot be had: adopted, so that a stop is told; or let go."""

    async def main() -> None:
        kernel = Kernel(Armed(ME.pid, ME.start_ns, S.RECOVERABLE, True, stops, 7 * stops))
        guard = guard_in(tmp_path, kernel, vms=(VmPolicy(name=name, qmp="/q"),))
        events = guard.subscribe()
        await guard._adopt_guarded()
        assert [v.process.pid for v in guard.vms.values()] == [ME.pid] * adopted
        assert kernel.disarmed == [ME.pid] * (not adopted)
        if not adopted:
            return
        (vm,) = guard.vms.values()
        vm.process.threads = lambda tids=None: []  # type: ignore[method-assign]
        guard.policy.limits.update(stop=2.0, seal=0.1)
        guard._handle(record(stopped=True))
        told = await asyncio.wait_for(events.get(), LIMIT)
        while told and told["event"] != "INCIDENT_FAILED":
            told = await asyncio.wait_for(events.get(), LIMIT)
        assert told
        assert (told["step"], told["vm"]) == ("record", vm.name)
        await settled(guard)

    asyncio.run(main())


# -- what blocks -------------------------------------------------------------


async def _status(path: Path) -> Any:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b'{"verb": "status"}\n')
    line = await asyncio.wait_for(reader.readline(), 10)
    writer.close()
    return json.loads(line)["line"]


@pytest.mark.parametrize("where", ["cmdline", "core"])
def test_what_blocks_holds_up_nobody(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of QEMU's, or the disk of dumps, does not answer."""
    inside, go = threading.Event(), threading.Event()

    def block(*_: Any, **__: Any) -> Any:
        inside.set()
        # The loop is held up no longer than this if it is the loop's own thread.
        go.wait(20)
        raise OSError(5, "Input/output error")

    async def main() -> None:
        guard = guard_in(tmp_path, dump_dir=tmp_path / "cores")
        vm = vm_of(guard)
        begun = no_work(guard)
        incident = guard.begin(vm, {"layer": "command", "message": "m"})
        assert begun
        control = Control(guard, tmp_path / "control")
        await control.start()
        job: Callable[[], Any]
        if where == "cmdline":
            vm.process.cmdline = block  # type: ignore[method-assign]

            async def look(*_: Any, **__: Any) -> Machine:
                return Machine()

            async def describe(*_: Any) -> dict[str, str]:
                return {}

            monkeypatch.setattr("hwerr_notify.guard.steps.look", look)
            monkeypatch.setattr("hwerr_notify.guard.steps.describe", describe)
            vm.monitor = Qemu(query_status={"status": "paused"}, query_version={})
            job = lambda: guard.steps._record(vm, incident, 1)  # noqa: E731
        else:
            from hwerr_notify.guard.layout import Range

            vm.machine = Machine(ranges=(Range(0, 0x1000, 4096),))
            monkeypatch.setattr(Path, "read_bytes", block)
            monkeypatch.setattr(Path, "exists", block)
            job = lambda: guard.steps._dump(vm, incident)  # noqa: E731
        task = asyncio.create_task(job())
        await asyncio.to_thread(inside.wait, LIMIT)
        assert not go.is_set()
        assert (await _status(control.path))["daemon"] == os.getpid()
        assert not task.done()
        go.set()
        with pytest.raises(OSError, match="Input/output"):
            await task
        await control.close()

    asyncio.run(main())
