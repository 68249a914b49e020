# SPDX-License-Identifier: MIT
"""What a freeze knows before it is asked for, and what it asks for in one go."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from hwerr_notify.event import Stop
from hwerr_notify.guard import disks, net
from hwerr_notify.guard.errors import Fault, MonitorError, Refused
from hwerr_notify.guard.kernel import KernelGuard
from hwerr_notify.guard.layout import Range, ranges
from hwerr_notify.guard.monitor import QmpMonitor, sent, together
from hwerr_notify.guard.policy import Policy, VmPolicy
from hwerr_notify.guard.process import Look, Process
from hwerr_notify.guard.seal import Sealer
from hwerr_notify.guard.steps import Asked, Steps
from hwerr_notify.guard.store import Incident, Step, Store
from hwerr_notify.guard.vm import Machine, Vm, _look_at_host, look

TREE = """\
FlatView #0
 AS "memory", root: system
 Root memory region: system
  0000000000000000-000000000000ffff (prio 0, ram): ram KVM
  00000000fffc0000-00000000ffffffff (prio 0, rom): bios KVM
"""
KNOWN = (Range(0, 0x10000, 0x7000_0000), Range(0xFFFC0000, 0x40000, 0x8000_0000))


class Qemu:
    """A human monitor with answers by line, and a list of what it was asked."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.closed = asyncio.Event()
        self.pid = os.getpid()

    async def execute(self, command: str, arguments: Any = None, *, limit: float = 5.0) -> Any:
        line = arguments["command-line"] if command == "human-monitor-command" else command
        self.asked.append(line)
        if command == "netdev_del":
            self.asked[-1] += f" {arguments['id']}"
            return {}
        answer = self.answers.get(line.split()[0].replace("-", "_") if " " not in line else line, "")
        answer = answer.pop(0) if isinstance(answer, list) else answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def aclose(self) -> None:
        self.closed.set()


# -- where memory is -------------------------------------------------------------


def test_memory_that_stayed_is_not_asked_for_again() -> None:
    qemu = Qemu(**{"info mtree -f": TREE})
    assert asyncio.run(ranges(qemu, KNOWN, placed=True)) == KNOWN
    assert qemu.asked == ["info mtree -f"]


@pytest.mark.parametrize("what", ["another layout", "something was taken"])
def test_memory_that_may_have_moved_is_asked_for(what: str) -> None:
    known = KNOWN[:1] if what == "another layout" else KNOWN
    where = {f"gpa2hva {r.gpa:#x}": f"Host virtual address is 0x{r.hva + 0x1000:x}" for r in KNOWN}
    qemu = Qemu(**{"info mtree -f": TREE}, **where)
    found = asyncio.run(ranges(qemu, known, placed=what == "another layout"))
    assert found == tuple(Range(r.gpa, r.length, r.hva + 0x1000) for r in KNOWN)


def test_what_events_say_of_a_guest() -> None:
    vm = Vm("web1", None, Process.open(os.getpid()), VmPolicy(), "/q", placed=True)
    said = {
        "STOP": (True, True, 0),
        "RESET": (True, True, 0),
        "RESUME": (False, True, 1),
        "DEVICE_DELETED": (False, False, 1),
    }
    for name, expected in said.items():
        vm.heard({"event": name})
        assert (vm.halted.is_set(), vm.placed, vm.resumes) == expected
    vm.halted.set()
    vm.placed = True
    vm.missed()
    assert (vm.halted.is_set(), vm.placed, vm.resumes) == (False, False, 2)
    vm.process.close()


@pytest.mark.parametrize("taken", [False, True])
def test_what_is_taken_during_the_look_counts(taken: bool) -> None:
    async def main() -> None:
        answers: dict[str, Any] = {"query_cpus_fast": [[]], "query_named_block_nodes": [[]]}
        answers |= {f"gpa2hva {r.gpa:#x}": f"Host virtual address is 0x{r.hva:x}" for r in KNOWN}
        qemu = Qemu(**{**answers, "qom_list": [[], []], "info mtree -f": TREE})
        vm = Vm("web1", None, Process.open(os.getpid()), VmPolicy(), "/q", qemu)
        look = asyncio.create_task(vm.look_anew())
        while not qemu.asked:
            await asyncio.sleep(0)
        if taken:
            vm.heard({"event": "DEVICE_DELETED"})
        await look
        assert vm.machine.ranges == KNOWN
        assert vm.placed is not taken
        vm.process.close()

    asyncio.run(main())


# -- the network -----------------------------------------------------------------


def test_a_backend_that_comes_after_the_question_goes_too() -> None:
    first, second = "n0: index=0,type=user\n", "n1: index=0,type=user\n"
    qemu = Qemu(**{"info network": [first + second, first + second]})
    assert asyncio.run(net.release_backends(qemu, [first])) == ["n0", "n1"]
    assert qemu.asked == ["netdev_del n0", "info network", "netdev_del n1", "info network"]


# -- in one go -------------------------------------------------------------------


def ahead(qemu: Qemu) -> Asked:
    asked = Asked(qemu)
    asked.ask(("stop", None), ("query-status", None), ("query-block-exports", None), *disks.QUESTIONS)
    return asked


def test_what_was_asked_ahead_is_asked_once() -> None:
    async def main() -> None:
        qemu = Qemu(query_status={"status": "paused"}, query_block_exports=Refused("CommandNotFound", "no"))
        asked = ahead(qemu)
        assert await asked.execute("query-status") == {"status": "paused"}
        with pytest.raises(Refused):
            await asked.execute("query-block-exports")
        assert qemu.asked[:2] == ["stop", "query-status"]
        before = list(qemu.asked)
        await together(*(asked.execute(name) for name in ("stop", "query-block", "query-migrate")))
        assert qemu.asked == before
        assert asked.answers([("query-block", None), ("query-migrate", None)]) == ["", ""]
        assert asked.answers([("query-block", None), ("query-block-exports", None)]) is None
        assert asked.answers([("query-version", None)]) is None
        assert asked.serves(qemu)
        assert not asked.serves(Qemu())
        await asked.execute("query-version")
        assert qemu.asked == [*before, "query-version"]
        await asked.aclose()
        with pytest.raises((MonitorError, asyncio.CancelledError, Refused)):
            await asked.execute("query-block-exports")

    asyncio.run(main())


@pytest.mark.parametrize("meanwhile", ["nothing", "let go on", "another monitor", "the monitor went away"])
def test_what_was_asked_before_the_incident_is_asked_once(tmp_path: Path, meanwhile: str) -> None:
    """Unless it is not true any more."""

    async def main() -> None:
        qemu = a_guest()
        vm, steps = guest_of(tmp_path, qemu)
        vm.halted.set()
        asking = steps.ask_early(vm)
        assert asking
        await asyncio.wait([asking])
        match meanwhile:
            case "let go on":
                vm.heard({"event": "RESUME"})
            case "another monitor":
                vm.monitor = Answers(a_guest())
            case "the monitor went away":
                qemu.closed.set()
                vm.missed()
                vm.monitor = Answers(a_guest())
        incident = incident_of(vm)
        await steps.take_early(incident.id, asking)
        step = await steps._stop(vm, incident, 1)
        assert step.facts["status"] == "paused"
        last = vm.monitor.qemu if isinstance(vm.monitor, Answers) else qemu
        assert last.asked.count("stop") == (2 if meanwhile == "let go on" else 1)
        assert qemu.asked.count("stop") == last.asked.count("stop")
        vm.process.close()

    asyncio.run(main())


@pytest.mark.parametrize("by_kernel", [True, False])
def test_what_a_stopped_guest_does_not_change_is_asked_while_qemu_finds_out(
    tmp_path: Path, by_kernel: bool
) -> None:
    """And `stop` behind it, when QEMU has, so that its own state comes first. Registers last."""
    looks = ["query-migrate", "query-block", "query-named-block-nodes", "query-cpus-fast"]

    async def main() -> None:
        qemu = a_guest()
        vm, steps = guest_of(tmp_path, qemu)
        asking = asyncio.create_task(steps._ask(vm, by_kernel))
        while not qemu.asked:
            await asyncio.sleep(0)
        await sent()
        assert qemu.asked[:4] == (looks if by_kernel else ["stop", "query-status", *looks[:2]])
        assert ("stop" in qemu.asked) is not by_kernel
        vm.heard({"event": "STOP"})
        asked = await asking
        await sent()
        assert [qemu.asked.count(what) for what in ("stop", *looks, "info network")] == [1] * 6
        assert qemu.asked[-1] == "info registers -a"
        await asked.aclose()
        vm.process.close()

    asyncio.run(main())


def test_what_was_asked_for_no_incident_is_not_used_by_another(tmp_path: Path) -> None:
    async def main() -> None:
        qemu = a_guest()
        vm, steps = guest_of(tmp_path, qemu)
        vm.halted.set()
        for known in (None, "i"):
            asking = steps.ask_early(vm)
            assert asking
            await steps.take_early(known, asking)
            assert bool(steps._early) == (known is not None)
        # One that has asked already, or will.
        asking = steps.ask_early(vm)
        assert asking
        await steps.take_early("i", asking)
        assert asking.done()
        incident = incident_of(vm)
        await steps._stop(vm, incident, 1)
        asking = steps.ask_early(vm)
        assert asking
        await steps.take_early(incident.id, asking)
        assert not steps._early
        # And a monitor that is away is asked nothing.
        qemu.closed.set()
        assert steps.ask_early(vm) is None
        vm.process.close()

    asyncio.run(main())


def detached(steps: Steps) -> None:
    """What is released and sealed is so at once."""

    async def done(_vm: Vm, _incident: Incident, _began: int) -> Step:
        return Step("done", 1, 2, "", {"detached": True})

    steps._release = steps._seal = done  # type: ignore[assignment,method-assign]
    steps.sealer.why_weaker = None
    steps.sealer.holds = lambda process, sealed: True  # type: ignore[method-assign]


@pytest.mark.parametrize("ends", ["release", "seal"])
def test_a_guest_that_ends_is_gone_on_disk_too(tmp_path: Path, ends: str) -> None:
    async def main() -> None:
        vm, steps = guest_of(tmp_path, a_guest(), kvm=True)
        detached(steps)
        step = getattr(steps, f"_{ends}")

        async def end(*what: Any) -> Step:
            vm.process.alive = lambda: False  # type: ignore[method-assign]
            return cast(Step, await step(*what))

        setattr(steps, f"_{ends}", end)
        done = await steps.freeze(vm, incident_of(vm))
        assert done.state == "gone"
        # No save of what was before comes after it.
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert steps.store.load("i").state == "gone"
        vm.process.close()

    asyncio.run(main())


@pytest.mark.parametrize("stays", [True, False])
def test_a_release_is_saved_before_its_monitor_goes(tmp_path: Path, stays: bool) -> None:
    async def main() -> None:
        vm, steps = guest_of(tmp_path, a_guest(), kvm=True)
        detached(steps)
        if not stays:
            steps.sealer.why_weaker = "no BPF LSM"
        save, seal = steps.store.save, steps._seal
        order: list[str] = []
        sealing = threading.Event()

        def saved(incident: Incident, *more: Any) -> None:
            if incident.steps and list(incident.steps)[-1] == "release":
                # As long as the other could begin meanwhile.
                sealing.wait(60 if stays else 0.3)
            save(incident, *more)
            order.append("saved " + list(incident.steps)[-1] if incident.steps else "saved")

        async def sealed(*what: Any) -> Step:
            order.append("seal")
            sealing.set()
            return await seal(*what)

        steps.store.save = saved  # type: ignore[assignment,method-assign]
        steps._seal = sealed  # type: ignore[assignment,method-assign]
        steps._released = lambda *_: None  # type: ignore[method-assign]
        done = await steps.freeze(vm, incident_of(vm))
        assert done.state == steps.store.load("i").state == "frozen"
        assert (order.index("seal") < order.index("saved release")) == stays
        assert order[-1] == "saved seal"
        vm.process.close()

    asyncio.run(main())


def test_a_look_that_comes_back_late_makes_nothing_frozen(tmp_path: Path) -> None:
    """Nor if the disk took nothing when it was given up."""

    async def main() -> None:
        vm, steps = guest_of(tmp_path, a_guest(), kvm=True)
        detached(steps)
        steps.policy.limits["seal"] = 0.1
        hangs, back = threading.Event(), threading.Event()

        def released(*_: Any) -> None:
            hangs.wait(60)

        save = steps.store.save

        def full(incident: Incident, *more: Any) -> None:
            try:
                if incident.state == "failed":
                    raise OSError(errno.ENOSPC, "No space left on device", "x")
                save(incident, *more)
            finally:
                back.set()

        steps._released = released  # type: ignore[assignment,method-assign]
        steps.store.save = full  # type: ignore[assignment,method-assign]
        verify = steps._verify

        async def verified(vm: Vm, incident: Incident, then: Callable[[], None]) -> None:
            def after() -> None:
                try:
                    then()
                finally:
                    back.set()

            await verify(vm, incident, after)

        steps._verify = verified  # type: ignore[method-assign]
        done = await steps.freeze(vm, incident_of(vm))
        assert done.state == "failed"
        back.clear()
        hangs.set()
        assert await asyncio.to_thread(back.wait, 60)
        assert steps.store.load("i").state == "freezing"
        vm.process.close()

    asyncio.run(main())


def test_who_gives_up_what_it_asked_can_be_ended_meanwhile(tmp_path: Path) -> None:
    async def main() -> None:
        vm, steps = guest_of(tmp_path, a_guest())
        for turns in range(8):
            asking = steps.ask_early(vm)
            assert asking
            giving_up = asyncio.create_task(steps.take_early(None, asking))
            for _ in range(turns):
                await asyncio.sleep(0)
            if not giving_up.done():
                giving_up.cancel()
                await asyncio.wait([giving_up])
                assert giving_up.cancelled()
        assert turns
        vm.process.close()

    asyncio.run(main())


def test_what_came_too_late_is_asked_by_itself() -> None:
    async def main() -> None:
        qemu = Qemu(query_migrate=[MonitorError("no answer in time"), {"status": "completed"}])
        asked = ahead(qemu)
        assert await asked.execute("query-migrate") == {"status": "completed"}
        assert qemu.asked.count("query-migrate") == 2
        await asked.aclose()
        # But not of a monitor that is gone.
        qemu = Qemu(query_migrate=[MonitorError("it went away"), {}])
        asked = ahead(qemu)
        qemu.closed.set()
        with pytest.raises(MonitorError, match="went away"):
            await asked.execute("query-migrate")
        await asked.aclose()

    asyncio.run(main())


def a_guest(**more: Any) -> Qemu:
    """That is stopped, and has a disk and a tap."""
    node = {"node-name": "n0", "drv": "file", "file": "/nosuch/image"}
    block = {"device": "", "qdev": "/machine/peripheral/v0", "inserted": {"node-name": "n0"}}
    # Of nodes there are two answers: before, and when they are gone.
    answers: dict[str, Any] = {
        "query_status": {"status": "paused"}, "query_cpus_fast": ({"thread-id": 1},), "qom_list": (),
        "query_block": (block,), "query_block_jobs": (), "query_block_exports": (), "query_migrate": {},
        "query_named_block_nodes": [(node,), ()], "query_version": {}, "info mtree -f": TREE,
        "info network": "u0: index=0,type=user\n", **more,
    }  # fmt: skip
    return Qemu(**answers)


class Answers:
    """A monitor whose lists are lists."""

    def __init__(self, qemu: Qemu) -> None:
        self.qemu, self.closed, self.pid = qemu, qemu.closed, qemu.pid

    async def execute(self, command: str, arguments: Any = None, *, limit: float = 5.0) -> Any:
        answer = await self.qemu.execute(command, arguments, limit=limit)
        return list(answer) if isinstance(answer, tuple) else answer

    async def aclose(self) -> None:
        await self.qemu.aclose()


def steps_in(home: Path) -> Steps:
    async def no_hooks(_vm: Vm, _incident: Incident) -> None:
        return

    limits = dict.fromkeys(("stop", "record", "release", "seal", "tell", "keep"), 60.0)
    store = Store(home)
    store.prepare()
    return Steps(
        Policy(Path("/none"), state_dir=home, limits=limits), store, KernelGuard(None), Sealer(), no_hooks
    )


def guest_of(home: Path, qemu: Qemu, **more: Any) -> tuple[Vm, Steps]:
    """Of which this was known before."""
    process = Process.open(os.getpid())
    process.threads = lambda tids=None: []  # type: ignore[method-assign]
    known = Machine(tids=(1,), images=("/nosuch/image",), ranges=KNOWN, **more)
    vm = Vm("web1", None, process, VmPolicy(), "/q", Answers(qemu), known, placed=True)
    vm.argv, vm.version = ["qemu"], {}
    steps = steps_in(home)
    # Stops what is no guest.
    steps.kernel.stop = lambda process: Stop(process.pid, 1, process.start_ns, 7)  # type: ignore[method-assign]
    return vm, steps


def incident_of(vm: Vm) -> Incident:
    return Incident("i", "boot", "web1", None, vm.process.pid, vm.process.start_ticks, "/q", {}, 1, 1)


async def to_the_release(home: Path, qemu: Qemu, **more: Any) -> tuple[Vm, Steps, Incident]:
    """Stopped and recorded."""
    vm, steps = guest_of(home, qemu, **more)
    incident = incident_of(vm)
    incident = incident.with_step("stop", await steps._stop(vm, incident, 1))
    incident = incident.with_step("record", await steps._record(vm, incident, 1))
    return vm, steps, incident


def test_a_freeze_asks_for_nothing_twice(tmp_path: Path) -> None:
    """Nor does it look at the process more often than it has to."""

    async def main() -> None:
        qemu = a_guest()
        looks: list[str] = []
        peek, look = Process.peek, Process.look

        def peeked(self: Process) -> Any:
            looks.append("peek")
            return peek(self)

        def looked(self: Process, **more: bool) -> Look:
            looks.append("look")
            return look(self, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Process, "peek", peeked)
            patch.setattr(Process, "look", looked)
            vm, steps, incident = await to_the_release(tmp_path, qemu)
            stop = qemu.asked.index("stop")
            assert qemu.asked[stop : stop + 3] == ["stop", "query-status", "info registers -a"]
            assert qemu.asked.count("qom-list") == 2
            once = [line for line in qemu.asked if line != "qom-list"]
            assert len(once) == len(set(once))
            assert looks == ["peek"]
            asked = len(qemu.asked)
            step = await steps._release(vm, incident, 1)
            assert step.facts["detached"]
            assert sorted(qemu.asked[asked:]) == sorted(
                ["nbd-server-stop", "blockdev-add", "qom-set", "blockdev-del", "query-named-block-nodes",
                 "netdev_del u0", "info network"]
            )  # fmt: skip
            assert looks == ["peek", "look"]
        vm.process.close()

    asyncio.run(main())


def test_what_fails_on_the_host_spares_nothing_of_qemu_and_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        qemu = a_guest(
            qom_set=Refused("GenericError", "not today"),
            blockdev_del=Refused("GenericError", "in use"),
            query_named_block_nodes=({"node-name": "n0", "drv": "file", "file": "/nosuch/image"},),
        )
        vm, steps, incident = await to_the_release(tmp_path, qemu, devices=("vhost-scsi s0",))
        incident.steps["record"].facts["machine"]["taps"] = ["tap0 in net:[1]"]
        with pytest.raises(Fault) as failed:
            await steps._release(vm, incident, 1)
        assert "blockdev-set-active" in qemu.asked
        assert "netdev_del u0" in qemu.asked
        told = str(failed.value)
        assert "tap tap0: no process and no name has its network namespace" in told
        assert "vhost-scsi s0: not released by this version" in told
        vm.process.close()

    asyncio.run(main())


def test_of_a_guest_that_was_never_looked_at_nothing_is_taken_for_known() -> None:
    """Without KVM the seal is another one."""
    process = Process.open(os.getpid())
    assert asyncio.run(_look_at_host(process, Machine(), ["tap0"])) == ([], False)
    assert asyncio.run(_look_at_host(process, Machine(tids=(1,)), ["tap0"])) == (["tap0"], True)
    process.close()


def test_a_look_at_images_that_failed_keeps_nobody_from_the_seal() -> None:
    class Lsm:
        sealed: tuple[Any, ...] = ()

        def renewed(self) -> Any:
            return self

        def seal(self, *what: Any) -> None:
            self.sealed = what

    async def fails() -> Any:
        raise RuntimeError("nobody has thought of this")

    async def main() -> None:
        process = Process.open(os.getpid())
        sealer = Sealer()
        sealer._lsm = lsm = Lsm()  # type: ignore[assignment]
        looked = asyncio.create_task(fails())
        await asyncio.wait([looked])
        assert sealer._seal_by_lsm(process, looked) is False
        assert lsm.sealed == (process.pid, process.start_ns)
        process.close()

    asyncio.run(main())


def test_an_answer_that_makes_no_sense_spares_nothing_else(tmp_path: Path) -> None:
    async def main() -> None:
        qemu = a_guest()
        vm, steps, incident = await to_the_release(tmp_path, qemu)
        asked = steps._asked_of(vm, incident)
        assert asked
        asked.answers = lambda questions: [7] if questions is net.QUESTIONS else None  # type: ignore[method-assign]
        qemu.answers["query_named_block_nodes"] = ()
        with pytest.raises(MonitorError, match="info network makes no sense"):
            await steps._release(vm, incident, 1)
        assert "query-block" in qemu.asked[qemu.asked.index("nbd-server-stop") - 2 :]
        # Of a monitor that is another's by now nothing is taken.
        vm.monitor = a_guest()
        assert steps._asked_of(vm, incident) is None
        vm.process.close()

    asyncio.run(main())


def test_commands_given_together_go_out_in_one_piece(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp")

    def serve(listener: socket.socket, pieces: list[bytes]) -> None:
        with listener.accept()[0] as peer:
            peer.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
            peer.recv(4096)
            peer.sendall(b'{"return": {}, "id": "__qmp#00000"}\r\n')
            pieces.append(peer.recv(1 << 16))
            for line in pieces[0].replace(b"}{", b"}\n{").splitlines():
                request = json.loads(line)
                peer.sendall(json.dumps({"return": request["execute"], "id": request["id"]}).encode() + b"\n")
            peer.recv(1)

    async def main() -> None:
        pieces: list[bytes] = []
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            server = asyncio.create_task(asyncio.to_thread(serve, listener, pieces))
            monitor = await QmpMonitor.connect(Path(path), lambda event: None)
            names = ["stop", "query-status", "query-block"]
            assert await together(*(monitor.execute(name) for name in names)) == names
            await monitor.aclose()
            await server
        assert len(pieces) == 1

    asyncio.run(main())


# -- what may run, or be used, elsewhere -----------------------------------------


def test_a_tap_that_it_has_no_more_is_another_ones() -> None:
    """Unless the guard itself may have taken it."""
    process = Process.open(os.getpid())
    known = Machine(tids=(1,), taps=("tap1",), ranges=KNOWN)

    async def taps(released: bool) -> tuple[str, ...]:
        qemu: Any = Answers(a_guest())
        machine = await look(qemu, process, known, placed=True, taps=["tap0"], released=released)
        return machine.taps

    assert asyncio.run(taps(False)) == ("tap0",)
    assert asyncio.run(taps(True)) == ("tap0", "tap1")
    process.close()


def test_a_guest_that_has_migrated_is_not_frozen(tmp_path: Path) -> None:
    async def main() -> None:
        vm, steps = guest_of(tmp_path, a_guest(query_status={"status": "postmigrate"}), kvm=True)
        detached(steps)
        done = await steps.freeze(vm, incident_of(vm))
        assert done.state == "failed"
        assert "its guest has migrated" in done.steps["record"].detail
        vm.process.close()

    asyncio.run(main())


@pytest.mark.parametrize("ends", ["cancelled", "failed", "completed", "postcopy-paused"])
def test_a_migration_is_over_before_anything_is_released(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU ends it when it has time to, and perhaps it comes to its end."""
    monkeypatch.setattr(disks, "_END_WITHIN", 0.2)
    said = [{"status": "active"}, {"status": "cancelling"}, *[{"status": ends}] * 100]
    node = {"node-name": "n0", "drv": "file", "file": "/nosuch/image"}
    nodes = [(node,), (node,), (), ()]
    monitor: Any = Answers(a_guest(query_migrate=said, query_named_block_nodes=nodes))
    release = disks.release(monitor, frozenset(), poisoned=False)
    if ends in ("cancelled", "failed"):
        assert asyncio.run(release).detached
    else:
        with pytest.raises(Fault, match=f"may run elsewhere \\({ends}\\)"):
            asyncio.run(release)
    assert monitor.qemu.asked.count("migrate_cancel") == 1
