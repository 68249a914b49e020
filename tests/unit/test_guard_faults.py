# SPDX-License-Identifier: MIT
"""What hwerr-guard makes of faults around it and in itself: nothing that it does ends in silence."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hwerr_notify.cli import guard as cli
from hwerr_notify.event import Stop
from hwerr_notify.guard import check as checks
from hwerr_notify.guard import daemon as daemons
from hwerr_notify.guard import net
from hwerr_notify.guard.control import Control
from hwerr_notify.guard.daemon import Guard, summary
from hwerr_notify.guard.errors import CannotBeginError, GuardError, MonitorError
from hwerr_notify.guard.inotify import DirectoryWatch
from hwerr_notify.guard.policy import Hook, Policy, VmPolicy
from hwerr_notify.guard.process import Process
from hwerr_notify.guard.seal import Freezer
from hwerr_notify.guard.steps import lost_monitor
from hwerr_notify.guard.store import Incident, Step, Store
from hwerr_notify.guard.tell import marker
from hwerr_notify.guard.vm import Machine, Vm
from hwerr_notify.jsonform import boot_id

LIMIT = 60.0
DONE = Step("done", 1, 2)
RELEASED = Step("done", 1, 2, "", {"detached": True})


class Kernel:
    """The guard in the kernel; `can`: whether it stops what it is told to."""

    def __init__(self, can: bool = True) -> None:
        self.can = can

    def missing(self) -> str | None:
        return None

    def kept(self) -> list[Any]:
        return []

    def arm(self, *_: object) -> str | None:
        return None

    def disarm(self, process: Process) -> None:
        pass

    def stop(self, process: Process) -> Stop | str:
        return Stop(process.pid, 1, process.start_ns, 7) if self.can else "No such device or address"

    def stopped_ns(self, process: Process) -> int | None:
        return 7


class Qemu:
    """A monitor of a guest that is stopped and has nothing."""

    def __init__(self, **answers: Any) -> None:
        lists = ("query_block", "query_named_block_nodes", "query_block_jobs", "query_block_exports")
        nothing: dict[str, Any] = {name: [] for name in lists}
        self.answers = {"query_status": {"status": "paused"}, **nothing, **answers}
        self.closed = asyncio.Event()
        self.pid = os.getpid()
        self.said: list[str] = []

    async def execute(self, command: str, arguments: Any = None, *, limit: float = 5.0) -> Any:
        self.said.append(command)
        if command == "human-monitor-command":
            return ""
        return self.answers.get(command.replace("-", "_"), {})

    async def aclose(self) -> None:
        self.closed.set()


@pytest.fixture
def qemu() -> Iterator[int]:
    """A process that stands for a QEMU."""
    with subprocess.Popen(["/bin/sleep", "1000"]) as process:
        yield process.pid
        process.kill()


class Bed:
    """A Guard with a VM and its incident."""

    def __init__(self, home: Path, pid: int, state: Any = "freezing", **policy: Any) -> None:
        wanted = Policy(Path("/none"), state_dir=home / "s", run_dir=home / "r", dump=False, **policy)
        self.home = home
        self.guard = guard = Guard(wanted, "/nowhere")
        guard.store.prepare()
        guard.kernel = guard.steps.kernel = Kernel()  # type: ignore[assignment]
        self.vm = vm = Vm("web1", None, Process.open(pid), VmPolicy(), "/q", incident="i1")
        vm.process.threads = lambda tids=None: []  # type: ignore[method-assign]
        guard._adopt(vm)
        self.put(
            Incident("i1", boot_id() or "", "web1", None, pid, vm.process.start_ticks, "/q",
                     {"message": "m", "layer": "hardware"}, 1, 1, state=state, machine=Machine().to_json())
        )  # fmt: skip

    def put(self, incident: Incident) -> Incident:
        self.guard.incidents["i1"] = incident
        self.guard.store.save(incident)
        return incident

    @property
    def incident(self) -> Incident:
        return self.guard.incidents["i1"]

    def saved(self) -> Incident:
        return self.guard.store.load("i1")

    async def until(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT):
            while not what():
                await asyncio.sleep(0.01)

    async def work(self) -> None:
        self.guard._work(self.vm, self.incident)
        assert self.vm.work
        await asyncio.wait_for(asyncio.shield(self.vm.work), LIMIT)

    async def end(self) -> None:
        await self.guard._end()


def well(bed: Bed) -> None:
    """All steps are done."""
    bed.put(replace(bed.incident, steps=dict.fromkeys(("stop", "record", "release", "seal"), RELEASED)))
    bed.guard.sealer.holds = lambda process, sealed: True  # type: ignore[method-assign]


# -- what nobody has thought of ------------------------------------------------


def breaks(*_: Any, **__: Any) -> Any:
    raise RuntimeError("nobody has thought of this")


@pytest.mark.parametrize("step", ["stop", "record", "release", "seal", "verify", "save", "daemon"])
def test_a_bug_fails_the_incident_and_is_told(
    tmp_path: Path, qemu: int, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        bed = Bed(tmp_path, qemu)
        bed.vm.monitor = Qemu()
        if step == "daemon":
            bed.guard.steps.freeze = breaks  # type: ignore[method-assign]
        elif step in ("verify", "save"):
            well(bed)
            bed.put(replace(bed.incident, state="freezing"))
            if step == "verify":
                bed.guard.sealer.holds = breaks  # type: ignore[method-assign]
            else:
                bed.guard.store.save = breaks  # type: ignore[method-assign]
        else:
            if step == "release":
                bed.put(bed.incident.with_step("record", DONE))
            setattr(bed.guard.steps, f"_{step}", breaks)
        control = Control(bed.guard, tmp_path / "control")
        await control.start()
        reader, writer = await asyncio.open_unix_connection(control.path)
        events = bed.guard.subscribe()
        await bed.work()
        assert bed.incident.state == "failed"
        failed = [s.detail for s in bed.incident.steps.values() if s.state == "failed"]
        assert any("a bug: RuntimeError: nobody has thought" in f for f in (*failed, *bed.incident.notes))
        if step in ("stop", "record", "release"):
            # It is known which, and sealed all the same if it can be.
            assert bed.saved().steps[step].state == "failed"
            assert "seal" in bed.saved().steps
        told = [events.get_nowait() for _ in range(events.qsize())]
        assert [t["event"] for t in told if t][-1] == "INCIDENT_FAILED"
        assert marker(tmp_path / "r", "failed", "web1").exists()
        assert any(r.exc_info for r in caplog.records), "the traceback is in the log"
        # Who asks for it once more is answered.
        bed.guard.steps.freeze = breaks  # type: ignore[method-assign]
        writer.write(b'{"verb": "freeze", "name": "web1"}\n')
        lines = (await asyncio.wait_for(reader.read(), LIMIT)).splitlines()
        assert json.loads(lines[-1])["end"]["status"] == 7
        writer.close()
        await control.close()
        await bed.end()

    asyncio.run(main())


def test_without_pyroute2_it_is_said(
    tmp_path: Path, qemu: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pyroute2", None)
    monkeypatch.setattr(net, "find_spec", lambda name: None)

    async def main() -> None:
        bed = Bed(tmp_path, qemu)
        bed.vm.monitor = Qemu()
        bed.vm.machine = Machine(taps=("tap0",))
        record = Step("done", 1, 2, "", {"machine": bed.vm.machine.to_json()})
        bed.put(bed.incident.with_step("record", record))
        await bed.work()
        assert bed.incident.state == "failed"
        assert "install the Python package pyroute2" in bed.incident.steps["release"].detail
        assert "pyroute2" in bed.guard.status()["network"]
        assert any("pyroute2" in line for line in cli._status_lines(bed.guard.status()))
        bed.guard.store.close()
        bed.guard.policy.run_dir.mkdir(exist_ok=True)
        bed.guard._prepare()
        assert any("pyroute2" in r.getMessage() and r.levelno == logging.ERROR for r in caplog.records)
        await bed.end()

    asyncio.run(main())


def test_what_is_told_others_is_told_whoever_fails(tmp_path: Path, qemu: int) -> None:
    said = tmp_path / "said"
    program = tmp_path / "hook"
    program.write_text(f"#!/bin/sh\necho >{said}\n", "utf-8")
    program.chmod(0o755)

    class Front:
        frozen = breaks

        async def close(self) -> None:
            pass

    async def main() -> None:
        bed = Bed(tmp_path, qemu, "frozen", hooks=(Hook((str(program),), frozenset({"frozen"}), 5.0),))
        well(bed)
        bed.guard.fronts[bed.vm.key] = Front()  # type: ignore[assignment]
        hooks = bed.guard.teller._hook

        async def broken(hook: Hook, data: bytes) -> None:
            await hooks(hook, data)
            breaks()

        bed.guard.teller._hook = broken  # type: ignore[method-assign]
        await bed.work()
        assert said.exists()
        step = bed.saved().steps["tell"]
        assert step.state == "failed"
        assert step.detail.count("a bug: RuntimeError") == 2
        assert bed.saved().state == "frozen"
        await bed.end()

    asyncio.run(main())


# -- what does not answer ------------------------------------------------------


@pytest.mark.parametrize("state", ["freezing", "frozen"])
def test_the_last_look_ends_in_time(tmp_path: Path, qemu: int, state: str) -> None:
    """An image is on a server that is dead."""
    go = threading.Event()

    async def main() -> None:
        bed = Bed(tmp_path, qemu, state)
        well(bed)
        bed.vm.monitor = Qemu()
        bed.guard.policy.limits["seal"] = 0.2
        bed.guard.steps._released = lambda *_: go.wait(LIMIT)  # type: ignore[method-assign,assignment]
        try:
            await asyncio.wait_for(bed.work(), LIMIT / 2)
        finally:
            go.set()
        assert bed.incident.state == "failed"
        assert "within 0.2 s" in bed.incident.steps["seal"].detail
        await bed.end()

    asyncio.run(main())


def test_a_daemon_that_hangs_does_not_hang_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r").mkdir()
    store = Store(tmp_path / "s")
    store.prepare()
    store.save(Incident("i1", "b", "web1", None, 1, 1, "/q", {"message": "m"}, 1, 1, "frozen"))
    store.save(Incident("i2", "b", "web1", None, 1, 1, "/q", {"message": "m"}, 1, 1, "cleared"))
    policy = tmp_path / "policy"
    policy.write_text(f'run_dir = "{tmp_path}/r"\nstate_dir = "{tmp_path}/s"\n[[vm]]\nqmp = "/q"\n', "utf-8")
    monkeypatch.setattr(cli, "_STATUS_WITHIN", 0.1)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "r/control"))
        silent.listen()
        assert cli.main(["--policy", str(policy), "status"]) == cli.EXIT_NO_ANSWER
        found = capsys.readouterr()
        assert "does not answer" in found.err
        assert found.out.startswith("i1  FROZEN")
        assert "i2" not in found.out
        assert cli.main(["--policy", str(policy), "status", "--all"]) == cli.EXIT_NO_ANSWER
        assert "i2" in capsys.readouterr().out
    store.close()


# -- clearing --------------------------------------------------------------------


def test_a_process_that_does_not_end_is_not_cleared(
    tmp_path: Path, qemu: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of it waits in the kernel. What was begun is known to the next daemon, too."""
    monkeypatch.setattr(daemons, "_ENDS_WITHIN", 0.1)

    async def first() -> None:
        bed = Bed(tmp_path, qemu, "frozen")
        well(bed)
        bed.vm.process.kill = lambda: None  # type: ignore[method-assign]
        for _ in range(2):
            with pytest.raises(GuardError, match=f"killed; process {qemu} does not end"):
                await bed.guard.clear("i1")
            assert bed.saved().state == "clearing"
            assert bed.guard._vm_status(bed.vm)["state"] == "clearing"
        await bed.end()

    async def second() -> None:
        guard = Guard(Policy(Path("/none"), state_dir=tmp_path / "s", run_dir=tmp_path / "r"), "/nowhere")
        guard.store.prepare()
        guard._load_incidents()
        (vm,) = guard.vms.values()
        guard._take_up(guard.incidents["i1"])
        await asyncio.wait_for(vm.gone.wait(), LIMIT)
        assert guard.store.load("i1").state == "cleared"
        await guard._end()

    asyncio.run(first())
    asyncio.run(second())


def test_a_process_that_has_ended_meanwhile_is_cleared(tmp_path: Path, qemu: int) -> None:
    async def main() -> None:
        bed = Bed(tmp_path, qemu, "clearing")
        events = bed.guard.subscribe()
        os.kill(qemu, signal.SIGKILL)
        await asyncio.wait_for(bed.vm.gone.wait(), LIMIT)
        assert bed.saved().state == "cleared"
        # By a daemon that was not there then.
        bed.put(replace(bed.incident, state="clearing"))
        bed.guard._take_up(bed.incident)
        await bed.until(lambda: events.qsize() == 2)
        assert bed.saved().state == "cleared"
        told = [events.get_nowait() for _ in range(events.qsize())]
        assert [t["event"] for t in told if t] == ["INCIDENT_CLEARED"] * 2
        await bed.end()

    asyncio.run(main())


# -- monitors ----------------------------------------------------------------------


def test_a_monitor_that_is_away_is_waited_for(tmp_path: Path, qemu: int) -> None:
    """And QEMU is told to stop before anything is asked of it."""

    async def main() -> None:
        bed = Bed(tmp_path, qemu)
        bed.vm.policy = VmPolicy(qmp="/none")
        bed.guard.policy.limits["stop"] = 2.0
        recorded = asyncio.Event()

        async def record(vm: Vm, *_: Any) -> Step:
            assert "stop" in vm.need_monitor().said  # type: ignore[attr-defined]
            recorded.set()
            raise MonitorError("away again")

        bed.guard.steps._record = record  # type: ignore[method-assign,assignment]
        stopped = asyncio.Event()
        save = bed.guard.steps.save

        async def saved(incident: Incident, first: Any = None) -> Incident:
            stopped.set() if incident.done("stop") else None
            return await save(incident, first)

        bed.guard.steps.save = saved  # type: ignore[method-assign]
        work = asyncio.create_task(bed.work())
        await asyncio.wait_for(stopped.wait(), LIMIT)
        bed.vm.monitor = Qemu()
        bed.guard._once_more(bed.vm)
        await work
        assert recorded.is_set()
        assert bed.incident.steps["record"].detail == "away again"
        await bed.end()

    asyncio.run(main())


def test_a_monitor_that_stays_away_fails_the_step_in_time(tmp_path: Path, qemu: int) -> None:
    async def main() -> None:
        bed = Bed(tmp_path, qemu)
        bed.guard.policy.limits.update(stop=2.0, record=1.0)
        await bed.work()
        assert "within 1 s, in which QEMU's monitor was not connected" in bed.incident.steps["record"].detail
        assert lost_monitor(bed.incident)
        # It is there again: once more, and not again and again.
        bed.guard.policy.limits.update(record=5.0)
        tries: list[Incident] = []

        async def freeze(_vm: Vm, incident: Incident) -> Incident:
            tries.append(incident)
            return replace(incident, state="failed", steps=failed.steps)

        failed = bed.incident
        bed.guard.steps.freeze = freeze  # type: ignore[method-assign,assignment]
        for _ in range(3):
            await bed.guard.add("web1", None, qemu, bed.vm.policy, "/q", Qemu())
            assert bed.vm.work
            await bed.vm.work
        assert [(t.state, t.steps) for t in tries] == [("freezing", {})]
        await bed.end()

    asyncio.run(main())


def test_what_was_away_during_the_freeze_is_no_false_alarm(tmp_path: Path, qemu: int) -> None:
    async def main() -> None:
        bed = Bed(tmp_path, qemu)
        bed.vm.monitor = Qemu()
        events = bed.guard.subscribe()
        tries: list[str] = []

        async def freeze(vm: Vm, incident: Incident) -> Incident:
            tries.append(incident.state)
            if len(tries) == 1:
                vm.monitor = Qemu()
                step = Step("failed", 1, 2, "QEMU's monitor went away", {"monitor": "lost"})
                return replace(incident, state="failed", steps={"record": step})
            return replace(incident, state="frozen", steps={"seal": DONE})

        bed.guard.steps.freeze = freeze  # type: ignore[method-assign]
        await bed.work()
        assert tries == ["freezing", "freezing"]
        told = [events.get_nowait() for _ in range(events.qsize())]
        assert [t["event"] for t in told if t] == ["GUEST_FROZEN"]
        await bed.end()

    asyncio.run(main())


def test_an_incident_hurries_the_search_for_its_monitor(tmp_path: Path, qemu: int) -> None:
    async def main() -> None:
        bed = Bed(tmp_path, qemu)
        path = tmp_path / "web1.qmp"
        path.touch()
        bed.vm.policy, bed.vm.where = VmPolicy(qmp=str(path)), str(path)
        tried: asyncio.Queue[None] = asyncio.Queue()

        async def connect(_path: str) -> Vm | None:
            tried.put_nowait(None)
            raise MonitorError("away")

        bed.guard._connect = connect  # type: ignore[method-assign,assignment]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(daemons, "_RETRY_FIRST", 1000.0)
            for _ in range(2):
                # The first begins it anew, because nobody looked for it any more.
                bed.guard._look_for_monitor(bed.vm)
                await asyncio.wait_for(tried.get(), LIMIT)
        await bed.end()

    asyncio.run(main())


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), RuntimeError("no thread")])
def test_a_socket_that_cannot_be_served_is_tried_again(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        path = tmp_path / "web1.qmp"
        path.touch()
        policy = Policy(Path("/none"), (VmPolicy(qmp=str(path)),), tmp_path / "s", tmp_path / "r")
        guard = Guard(policy, "/nowhere")
        tries: asyncio.Queue[None] = asyncio.Queue()

        async def connect(_path: str) -> Vm | None:
            tries.put_nowait(None)
            raise error

        guard._connect = connect  # type: ignore[method-assign,assignment]
        guard._watch = watch = DirectoryWatch(guard._scan)
        guard._scan()
        for _ in range(3):
            await asyncio.wait_for(tries.get(), LIMIT)
        said = "Too many open files" if isinstance(error, OSError) else "a bug: RuntimeError: no thread"
        assert guard.status()["unreachable"] == {str(path): said}
        assert sum(said in r.getMessage() for r in caplog.records) == 1
        watch.close()
        await guard._end()

    asyncio.run(main())


def test_without_libvirts_package_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hwerr_notify.guard.libvirt import Libvirt

    monkeypatch.setitem(sys.modules, "libvirt", None)

    async def main() -> None:
        uri = "qemu:///system"
        policy = Policy(Path("/none"), (VmPolicy(libvirt=uri),), tmp_path / "s", tmp_path / "r")
        guard = Guard(policy, "/nowhere")
        driver = Libvirt(uri, guard)
        await asyncio.wait_for(driver.run(), LIMIT)
        assert driver.tried.is_set()
        (line,) = (text for text in cli._status_lines(guard.status()) if text.startswith(uri))
        assert "not guarded" in line
        assert "python3-libvirt" in line
        await guard._end()

    asyncio.run(main())


# -- the daemon's own beginning ------------------------------------------------


async def ready(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Task[None], list[str]]:
    said: list[str] = []
    told = asyncio.Event()

    def note(text: str) -> None:
        said.append(text)
        told.set()

    monkeypatch.setattr(daemons, "notify", note)
    task = asyncio.create_task(guard.run())
    waits = asyncio.create_task(told.wait())
    await asyncio.wait([task, waits], timeout=LIMIT, return_when=asyncio.FIRST_COMPLETED)
    assert not task.done(), task.exception()
    return task, said


@pytest.fixture
def loop_as_it_was() -> Iterator[None]:
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)
    import gc

    gc.unfreeze()


@pytest.mark.usefixtures("loop_as_it_was")
@pytest.mark.parametrize("what", ["no directory", "no package"])
def test_metrics_that_cannot_be_do_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    path = tmp_path / ("none/m" if what == "no directory" else "m")
    if what == "no package":
        monkeypatch.setitem(sys.modules, "prometheus_client", None)

    async def main() -> None:
        policy = Policy(
            Path("/none"), (VmPolicy(qmp="/none/q"),), tmp_path / "s", tmp_path / "r",
            metrics_socket=path, metrics_file=tmp_path / "none/file",
        )  # fmt: skip
        guard = Guard(policy, "/nowhere")
        task, said = await ready(guard, monkeypatch)
        assert any("READY=1" in s for s in said)
        async with asyncio.timeout(LIMIT):
            while not any("metrics" in r.getMessage() for r in caplog.records):
                await asyncio.sleep(0.01)
        guard._stop.set()
        await asyncio.wait_for(task, LIMIT)

    asyncio.run(main())


def test_metrics_may_be_read_by_who_collects_them(tmp_path: Path, qemu: int) -> None:
    mask = os.umask(0o077)
    try:

        async def main() -> None:
            bed = Bed(tmp_path, qemu, metrics_file=tmp_path / "m.prom", metrics_socket=tmp_path / "m")
            await bed.guard.metrics.start()
            await bed.until((tmp_path / "m.prom").exists)
            assert stat.S_IMODE((tmp_path / "m.prom").stat().st_mode) == 0o644
            assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o666
            await bed.guard.metrics.close()
            await bed.end()

        asyncio.run(main())
    finally:
        os.umask(mask)


def test_a_start_that_cannot_be_has_a_status_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of which the unit knows that it is not to be tried again in a tenth of a second."""
    other = Store(tmp_path / "s")
    other.prepare()
    policy = Policy(Path("/none"), (VmPolicy(qmp="/q"),), tmp_path / "s", tmp_path / "r")
    with pytest.raises(CannotBeginError, match="another hwerr-guard runs"):
        asyncio.run(Guard(policy, "/nowhere").run())
    text = f'run_dir = "{tmp_path}/r"\nstate_dir = "{tmp_path}/s"\n[[vm]]\nqmp = "/q"\n'
    (tmp_path / "policy").write_text(text, "utf-8")
    argv = ["--policy", str(tmp_path / "policy"), "run", "--device", "/nowhere"]
    assert cli.main(argv) == cli.EXIT_CANNOT_BEGIN
    assert "another hwerr-guard runs" in capsys.readouterr().err
    other.close()
    unit = Path(__file__).resolve().parents[2] / "packaging/systemd/hwerr-guard.service"
    (stop_post,) = re.findall(r"(?m)^ExecStopPost=-/bin/sh -c '(.*)'$", unit.read_text("utf-8"))
    for status, waits in ((cli.EXIT_CANNOT_BEGIN, True), (1, False), (0, False)):
        script = stop_post.replace("sleep", "echo")
        done = subprocess.run(
            ["/bin/sh", "-c", script], env={"EXIT_STATUS": str(status), "PATH": os.environ["PATH"]},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert bool(done.stdout) is waits


@pytest.mark.usefixtures("loop_as_it_was")
def test_a_deaf_daemon_says_so_and_hears_when_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "dev/hwerr"
    device.parent.mkdir()

    class Device:
        """Enough of /dev/hwerr, which has nothing to say."""

        closed = False

        def __init__(self) -> None:
            self.read, self._write = os.pipe()

        def fileno(self) -> int:
            return self.read

        def info(self) -> Any:
            return type("Info", (), {"scope": "all", "next_seq": 1})

        def guards(self) -> list[Any]:
            return []

        def read_nonblocking(self) -> list[Any]:
            return []

        def drain(self) -> list[Any]:
            return []

        def close(self) -> None:
            pass

    def open_device(path: str, **_: Any) -> Device:
        if not Path(path).exists():
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        return Device()

    monkeypatch.setattr("hwerr_notify.device.open", open_device)

    async def main() -> None:
        policy = Policy(Path("/none"), (VmPolicy(qmp="/none/q"),), tmp_path / "s", tmp_path / "r")
        guard = Guard(policy, str(device))
        task, said = await ready(guard, monkeypatch)
        assert f"STATUS=deaf: {device}: No such file or directory" in said[0]
        lines = list(cli._status_lines(guard.status()))
        assert f"no hardware errors are seen: {device}: No such file or directory" in lines
        metrics = guard.metrics.text().decode()
        assert "hwerr_guard_events 0.0" in metrics
        assert "hwerr_guard_kernel 0.0" in metrics
        (device.parent / "other").touch()
        device.touch()
        async with asyncio.timeout(LIMIT):
            while guard.why_deaf:
                await asyncio.sleep(0.01)
        assert guard._reading
        assert not guard._reading.done()
        assert guard.status()["events"] == guard.status()["kernel_guard"] == "ok"
        assert "STATUS=errors are read" in said[-1]
        assert "hwerr_guard_kernel 1.0" in guard.metrics.text().decode()
        guard._stop.set()
        await asyncio.wait_for(task, LIMIT)

    asyncio.run(main())


def test_what_is_weaker_and_what_was_lost_is_shown(tmp_path: Path, qemu: int) -> None:
    async def main() -> None:
        bed = Bed(tmp_path, qemu, "frozen")
        weaker = Step("weaker", 1, 2, "by cgroup", {"weaker": True})
        bed.put(bed.incident.with_step("seal", weaker))
        bed.guard.lost = 3
        text = "\n".join(cli._status_lines(bed.guard.status()))
        assert "the seal is the weaker one" in text
        assert "3 records of errors were lost" in text
        assert re.search(r"^web1 +FROZEN \(weaker\) pid", text, re.M)
        assert "i1  FROZEN (weaker): m" in text
        assert summary(bed.incident)["weaker"]
        await bed.end()

    asyncio.run(main())


# -- the weaker seal -----------------------------------------------------------


def test_a_freeze_whose_process_is_frozen_is_not_failed_by_the_stop(tmp_path: Path, qemu: int) -> None:
    """The daemon was killed between the freezer and its record: nothing in QEMU answers any more."""

    async def main() -> None:
        bed = Bed(tmp_path, qemu)
        bed.guard.kernel = bed.guard.steps.kernel = Kernel(can=False)  # type: ignore[assignment]
        bed.put(replace(bed.incident, steps=dict.fromkeys(("stop", "record", "release"), RELEASED)))
        freezer = bed.guard.sealer.freezer
        freezer.thaw = lambda process: pytest.fail("thawed")  # type: ignore[method-assign]
        freezer.frozen = lambda process: True  # type: ignore[method-assign]
        freezer.freeze = lambda process, limit: None  # type: ignore[method-assign]
        bed.guard.policy.limits["stop"] = 5.0
        incident = await bed.guard.steps.freeze(bed.vm, bed.incident)
        assert incident.state == "frozen", incident.steps
        await bed.end()

    asyncio.run(main())


def test_there_is_a_fault_point_after_the_freezer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import asyncio, os\nfrom hwerr_notify.guard.process import Process\n"
        "from hwerr_notify.guard.seal import Freezer, Sealer\n"
        "Freezer.freeze = lambda self, process, limit: print('frozen', flush=True)\n"
        "asyncio.run(Sealer().seal(Process.open(os.getpid()), kvm=False, whole=True, limit=1.0))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "HWERR_GUARD_FAULT": "after-freezer"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "frozen\n")
    assert Freezer().frozen(Process.open(os.getpid())) is False


# -- what stays ----------------------------------------------------------------


def closed(guard: Guard, number: int, home: Path, **more: Any) -> Incident:
    incident = Incident(
        f"2026010{number}T030405.006-x", "b", "x", None, 1, 1, "/q", {"message": "m"}, 1, 1, "cleared", **more
    )
    guard.store.save(incident)
    guard.incidents[incident.id] = incident
    if incident.dump:
        Path(incident.dump["path"]).touch()
    return incident


def test_of_closed_incidents_the_newest_stay_and_of_cores_fewer(tmp_path: Path, qemu: int) -> None:
    async def main() -> None:
        bed = Bed(tmp_path, qemu, "frozen", dump_retain=2, incidents_retain=4)
        made = [
            closed(bed.guard, n, tmp_path, dump={"path": str(tmp_path / f"{n}.core")}, untold=n == 2)
            for n in range(1, 8)
        ]
        await bed.guard._prune()
        assert [n for n in range(1, 8) if (tmp_path / f"{n}.core").exists()] == [6, 7]
        # One of which the cluster is still to be told stays, and the open one.
        stay = [made[1].id, *(i.id for i in made[3:])]
        assert sorted(bed.guard.incidents) == sorted([*stay, "i1"])
        assert sorted(p.name for p in bed.guard.store.incidents.iterdir()) == sorted([*stay, "i1"])
        await bed.end()

    asyncio.run(main())


@pytest.mark.parametrize("where", [None, "cores"])
def test_half_a_dump_does_not_stay(tmp_path: Path, qemu: int, where: str | None) -> None:
    """Of a QEMU that is gone. Of one that lives the next dump takes its place."""

    async def main() -> None:
        home = tmp_path / where if where else None
        bed = Bed(tmp_path, qemu, "frozen", dump_dir=home)
        gone = replace(bed.incident, id="i0", pid=2**22 + 1)
        bed.guard.store.save(gone)
        await bed.end()
        if home:
            home.mkdir()
        parts = {
            i: home / f".{i}.core.part" if home else bed.guard.store.path(i) / ".memory.core.part"
            for i in ("i0", "i1")
        }
        for part in parts.values():
            part.touch()
        theirs = (home or tmp_path) / ".other.core.part"
        theirs.touch()
        guard = Guard(bed.guard.policy, "/nowhere")
        guard.store.prepare()
        guard._take_up = lambda incident: None  # type: ignore[method-assign]
        watch = DirectoryWatch(lambda: None)
        await guard._first_look(watch)
        await asyncio.gather(*guard._tasks)
        assert not parts["i0"].exists()
        assert parts["i1"].exists()
        assert theirs.exists()
        watch.close()
        await guard._end()

    asyncio.run(main())


# -- degraded --------------------------------------------------------------------


def test_degraded_is_remembered_and_can_be_taken_back(tmp_path: Path, qemu: int) -> None:
    async def main() -> None:
        bed = Bed(tmp_path, qemu, "cleared")
        bed.vm.incident = None
        from hwerr_notify.guard.decide import Exceeded
        from hwerr_notify.guard.policy import Threshold

        full = Exceeded(Threshold(3, 10.0, "dimm"), 'DIMM A "1"', 3)
        bed.guard._degraded(bed.vm, full)
        reason = bed.vm.degraded
        assert reason
        path = marker(tmp_path / "r", "degraded", "web1")
        await bed.end()
        # The next daemon.
        guard = Guard(bed.guard.policy, "/nowhere")
        guard.store.prepare()
        vm = Vm("web1", None, Process.open(qemu), VmPolicy(), "/q")
        guard._adopt(vm)
        assert vm.degraded == reason
        assert any(f"degraded: {reason}" in line for line in cli._status_lines(guard.status()))
        control = Control(guard, tmp_path / "control")
        await control.start()
        answers = []
        for _ in range(2):
            reader, writer = await asyncio.open_unix_connection(control.path)
            writer.write(b'{"verb": "clear", "name": "web1", "degraded": true}\n')
            answers.append(json.loads((await reader.read()).splitlines()[-1])["end"])
            writer.close()
        assert answers[0] == {"status": 0, "error": None}
        assert answers[1] == {"status": 1, "error": "web1 is not degraded"}
        assert vm.degraded is None
        assert not path.exists()
        await control.close()
        await guard._end()

    asyncio.run(main())


def test_a_marker_of_another_process_says_nothing(tmp_path: Path, qemu: int) -> None:
    async def main() -> None:
        bed = Bed(tmp_path, qemu)
        bed.guard.teller.mark("degraded", "web1", {"pid": 1, "start_ticks": 1, "reason": "old"})
        vm = Vm("web1", None, Process.open(qemu), VmPolicy(), "/q")
        bed.guard._adopt(vm)
        assert vm.degraded is None
        await bed.end()

    asyncio.run(main())


# -- names ---------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["freeze", "dump", "clear", "inspect"])
def test_what_there_is_not_has_a_status_of_its_own(
    tmp_path: Path, qemu: int, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "policy"
    policy.write_text(f'run_dir = "{tmp_path}/r"\nstate_dir = "{tmp_path}/s"\n[[vm]]\nqmp = "/q"\n', "utf-8")

    async def main() -> None:
        bed = Bed(tmp_path, qemu)
        bed.guard.policy.run_dir.mkdir(exist_ok=True)
        control = Control(bed.guard, tmp_path / "r/control")
        await control.start()
        assert await asyncio.to_thread(cli.main, ["--policy", str(policy), verb, "nosuch"]) == 3
        await control.close()
        await bed.end()

    asyncio.run(main())
    assert "nosuch" in capsys.readouterr().err


def test_the_first_vm_whose_name_and_monitor_match() -> None:
    first = VmPolicy("web*", qmp="/run/a/*.qmp")
    second = VmPolicy("web*", qmp="/run/b/*.qmp", front=True)
    third = VmPolicy("*", libvirt="qemu:///system")
    policy = Policy(Path("/none"), (first, second, third))
    assert policy.vm("web1", "/run/b/web1.qmp") is second
    assert policy.vm("web1", "/run/a/web1.qmp") is first
    assert policy.vm("web1", "/run/a/x/web1.qmp") is None
    assert policy.vm("web1", "qemu:///system") is third
    assert policy.vm("db1", "/run/a/db1.qmp") is None
    assert policy.vm("web1") is first


def test_an_incident_is_taken_up_under_the_policy_of_its_monitor(tmp_path: Path, qemu: int) -> None:
    async def main() -> None:
        bed = Bed(tmp_path, qemu, "frozen")
        bed.put(replace(bed.incident, monitor="/run/b/web1.qmp"))
        await bed.end()
        vms = (VmPolicy("web*", qmp="/run/a/*.qmp"), VmPolicy("web*", qmp="/run/b/*.qmp", front=True))
        guard = Guard(replace(bed.guard.policy, vms=vms), "/nowhere")
        guard.store.prepare()
        guard._load_incidents()
        (vm,) = guard.vms.values()
        assert vm.policy is vms[1]
        await guard._end()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "state", "text"), [("none/x.prom", "weaker", "is not there"), ("x.prom", "ok", "ReadWritePaths")]
)
def test_check_says_whether_there_can_be_metrics(tmp_path: Path, path: str, state: str, text: str) -> None:
    policy = Policy(Path("/none"), run_dir=tmp_path / "r", metrics_file=tmp_path / path)
    (found,) = checks._metrics(policy)
    assert (found.name, found.state) == ("metrics", state)
    assert text in found.text
    # The daemon makes its own directory.
    (found,) = checks._metrics(replace(policy, metrics_file=tmp_path / "r/x.prom"))
    assert found.state == "ok"
