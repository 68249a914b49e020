# SPDX-License-Identifier: MIT
"""The steps with a real guest and a monitor that lies, hangs, or whose QEMU dies: never a false FROZEN."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from guarded import LIMIT, counter, few, guest_config
from testbed.errors import TestbedError
from testbed.guest import COUNTER_GPA, Guest
from testbed.wait import until

import hwerr_notify
from hwerr_notify.guard.errors import MonitorError
from hwerr_notify.guard.kernel import KernelGuard
from hwerr_notify.guard.monitor import QmpMonitor
from hwerr_notify.guard.policy import Policy, VmPolicy
from hwerr_notify.guard.process import Look, Process, Thread
from hwerr_notify.guard.seal import Sealer
from hwerr_notify.guard.steps import Steps
from hwerr_notify.guard.store import Incident, Store
from hwerr_notify.guard.vm import Vm, look
from hwerr_notify.jsonform import boot_id

pytestmark = pytest.mark.amd

LIMITS = {"stop": 10.0, "record": 10.0, "release": 10.0, "seal": 10.0, "tell": 1.0, "keep": 60.0}

Answer = Callable[[Any], Any]


class Liar:
    """QEMU's monitor, but for some commands; those in `lies` get an answer made from the true arguments."""

    def __init__(self, monitor: QmpMonitor) -> None:
        self.monitor = monitor
        self.lies: dict[str, Answer] = {}
        self.said: list[str] = []
        self.first: Incident | None = None

    @property
    def pid(self) -> int:
        return self.monitor.pid

    @property
    def closed(self) -> asyncio.Event:
        return self.monitor.closed

    async def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, limit: float = 5.0
    ) -> Any:
        self.said.append(command)
        if command in self.lies:
            answer = self.lies[command](arguments)
            if asyncio.iscoroutine(answer):
                try:
                    async with asyncio.timeout(limit):
                        return await answer
                except TimeoutError:
                    raise MonitorError(f"no answer to {command}") from None
            return answer
        return await self.monitor.execute(command, arguments, limit=limit)

    async def aclose(self) -> None:
        await self.monitor.aclose()


class Bench:
    """A guest with a disk, and what freezes it."""

    def __init__(self, home: Path, guest: Guest, disk: Path) -> None:
        self.home, self.guest, self.disk = home, guest, disk

    def freeze(
        self,
        prepare: Callable[[Liar, Vm], None],
        *,
        kernel: bool = True,
        lsm: bool = True,
        again: bool = False,
    ) -> tuple[Incident, Liar]:
        """`prepare` makes the lies, after all was well. `again`: once more, without them.

        `kernel`, `lsm`: whether there is a guard in the kernel, and a seal by BPF.
        """
        return asyncio.run(self._freeze(prepare, kernel, lsm, again))

    async def _freeze(
        self, prepare: Callable[[Liar, Vm], None], kernel: bool, lsm: bool, again: bool
    ) -> tuple[Incident, Liar]:
        policy = Policy(Path("/none"), state_dir=self.home / "state", limits=LIMITS)
        store = Store(policy.state_dir)
        store.prepare()
        try:
            return await self._with_store(policy, store, prepare, kernel, lsm, again)
        finally:
            store.close()

    async def _with_store(
        self,
        policy: Policy,
        store: Store,
        prepare: Callable[[Liar, Vm], None],
        kernel: bool,
        lsm: bool,
        again: bool,
    ) -> tuple[Incident, Liar]:
        vms: list[Vm] = []

        def on_event(event: dict[str, Any]) -> None:
            for vm in vms:
                vm.heard(event)

        monitor = Liar(await QmpMonitor.connect(self.home / "qmp/web1.qmp", on_event))
        process = Process.open(monitor.pid)
        vm = Vm("web1", None, process, VmPolicy(qmp="/x"), "x", monitor)
        vms.append(vm)
        vm.machine = await look(monitor, process)
        sealer = Sealer()
        if lsm:
            sealer.open()

        async def no_hooks(_vm: Vm, _incident: Incident) -> None:
            return

        with hwerr_notify.open(names=False) as device:
            steps = Steps(policy, store, KernelGuard(device if kernel else None), sealer, no_hooks)
            incident = Incident(
                store.new_id("web1", process.pid), boot_id() or "", "web1", None, process.pid,
                process.start_ticks, "x", {"message": "a test"}, 1, 1, machine=vm.machine.to_json(),
            )  # fmt: skip
            await steps.save(incident)
            prepare(monitor, vm)
            incident = await steps.freeze(vm, incident)
            if again:
                monitor.first = incident
                monitor.lies.clear()
                kept = {n: s for n, s in incident.steps.items() if s.state != "failed" and n != "seal"}
                incident = await steps.freeze(vm, replace(incident, state="freezing", steps=kept))
        assert store.load(incident.id) == incident
        await monitor.aclose()
        sealer.release(process)
        sealer.close()
        return incident, monitor


@pytest.fixture(scope="module")
def home() -> Path:
    path = Path("/run/hwerr-test") / uuid.uuid4().hex[:8]
    path.mkdir(parents=True)
    return path


@pytest.fixture
def bench(home: Path) -> Iterator[Bench]:
    disk = home / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "16M"], check=True)
    extra = (
        "-blockdev", f"driver=qcow2,node-name=d0,file.driver=file,file.filename={disk}",
        "-device", "virtio-blk-pci,drive=d0,id=vd0", "-netdev", "user,id=n0",
        "-device", "virtio-net-pci,netdev=n0",
    )  # fmt: skip
    with Guest.start(guest_config("web1", home, *extra)) as guest:
        yield Bench(home, guest, disk)


def held(bench: Bench) -> bool:
    argv = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 4096", str(bench.disk)]
    return subprocess.run(argv, capture_output=True, check=False).returncode != 0


def failed(incident: Incident) -> dict[str, str]:
    return {name: step.detail for name, step in incident.steps.items() if step.state == "failed"}


def test_all_well(bench: Bench) -> None:
    incident, monitor = bench.freeze(lambda _monitor, _vm: None)
    assert (incident.state, failed(incident)) == ("frozen", {})
    assert not held(bench)
    # What the other tests lie about is really asked.
    for command in (
        "query-status", "stop", "query-block", "blockdev-del", "query-named-block-nodes", "qom-set",
        "netdev_del", "query-migrate", "human-monitor-command", "blockdev-add",
    ):  # fmt: skip
        assert command in monitor.said


def test_it_says_that_it_stopped(bench: Bench) -> None:
    def lie(monitor: Liar, _vm: Vm) -> None:
        monitor.lies |= {"stop": lambda _: {}, "query-status": lambda _: {"status": "paused"}}

    incident, _ = bench.freeze(lie, kernel=False)
    assert incident.state == "failed"
    assert "still in the guest" in failed(incident)["stop"]


def test_it_says_that_it_let_go_of_its_disks(bench: Bench) -> None:
    def lie(monitor: Liar, _vm: Vm) -> None:
        monitor.lies |= {"query-block": lambda _: [], "query-named-block-nodes": lambda _: []}

    incident, _ = bench.freeze(lie)
    assert incident.state == "failed"
    assert "holds" in failed(incident)["release"]
    assert incident.steps["seal"].state == "done"
    assert held(bench)


@pytest.mark.long
def test_it_does_not_detach_and_not_inactivate(bench: Bench) -> None:
    def lie(monitor: Liar, _vm: Vm) -> None:
        monitor.lies |= {
            "qom-set": lambda _: {}, "blockdev-del": lambda _: {}, "blockdev-set-active": lambda _: {},
        }  # fmt: skip

    incident, _ = bench.freeze(lie)
    assert incident.state == "failed"
    assert "locks" in failed(incident)["release"]


def refuse(_arguments: Any) -> Any:
    from hwerr_notify.guard.errors import Refused

    raise Refused("GenericError", "not today")


def test_what_cannot_be_detached_is_made_inactive_and_the_process_frozen(bench: Bench) -> None:
    def lie(monitor: Liar, _vm: Vm) -> None:
        monitor.lies["qom-set"] = refuse

    incident, _ = bench.freeze(lie)
    assert (incident.state, failed(incident)) == ("frozen", {})
    assert not incident.steps["release"].facts["detached"]
    assert incident.steps["seal"].facts == {"weaker": False, "process": True}
    assert not held(bench)
    guest = bench.guest
    hva = incident.machine["ranges"][0][2] + COUNTER_GPA
    before = counter(guest, hva)
    os.kill(guest.pid, signal.SIGCONT)
    assert counter(guest, hva) == before


NONSENSE: tuple[Any, ...] = (None, 3, [], {}, [3], {"status": 3}, [{"node-name": 3}], "x" * 1000)


ASKED = (
    "query-status", "query-block", "query-named-block-nodes", "query-cpus-fast", "human-monitor-command",
    "query-migrate",
)  # fmt: skip
# Only if a node stays.
USERS = ("query-block-jobs", "query-block-exports")


@pytest.mark.parametrize("command", few((*ASKED, *USERS), "query-block", "query-block-exports"))
def test_nonsense(bench: Bench, command: str) -> None:
    """Whatever it answers: FROZEN with the disk free, or not FROZEN."""
    answers = iter(NONSENSE * 20)

    def lie(monitor: Liar, _vm: Vm) -> None:
        monitor.lies[command] = lambda _: next(answers)
        if command in USERS:
            monitor.lies["blockdev-del"] = refuse

    incident, _ = bench.freeze(lie)
    assert incident.state == "failed"
    assert failed(incident)
    incident, _ = bench.freeze(lambda _monitor, _vm: None)
    assert incident.state == "frozen"
    assert not held(bench)


HANGS = {
    "query-status": "record", "query-version": "record", "query-block": "record", "blockdev-del": "release",
    "netdev_del": "release",
}  # fmt: skip


@pytest.mark.parametrize("command", few(HANGS, "blockdev-del"))
def test_it_hangs(bench: Bench, command: str) -> None:
    """Bounded in time, told which step; and it goes on when the monitor does."""

    async def hang() -> None:
        await asyncio.Event().wait()

    def lie(monitor: Liar, _vm: Vm) -> None:
        monitor.lies[command] = lambda _: hang()

    incident, monitor = bench.freeze(lie, again=True)
    assert monitor.first
    assert monitor.first.state == "failed"
    assert set(failed(monitor.first)) == {HANGS[command]}
    assert (incident.state, failed(incident)) == ("frozen", {})
    assert not held(bench)


@pytest.mark.parametrize(
    "command",
    few(["query-status", "stop", "query-version", "query-block", "qom-set", "netdev_del"], "qom-set"),
)
def test_qemu_dies(bench: Bench, command: str) -> None:
    def lie(monitor: Liar, vm: Vm) -> None:
        async def die(arguments: Any) -> Any:
            vm.process.kill()
            return await monitor.monitor.execute(command, arguments)

        monitor.lies[command] = die

    incident, _ = bench.freeze(lie)
    assert incident.state == "gone"
    assert "its memory is lost" in incident.notes[-1]
    assert not held(bench)


@pytest.mark.long
def test_qemu_dies_once_it_is_sealed(bench: Bench) -> None:
    """While it is looked at for the last time: not FROZEN."""

    def lie(monitor: Liar, vm: Vm) -> None:
        look = vm.process.threads

        def threads() -> list[Thread]:
            if "blockdev-del" in monitor.said:
                vm.process.kill()
                assert vm.process.ends(LIMIT)
            return look()

        vm.process.threads = threads  # type: ignore[assignment, method-assign]

    incident, _ = bench.freeze(lie)
    assert (incident.state, incident.frozen_ns) == ("gone", 0)
    assert "QEMU ended during seal" in incident.notes[-1]


def test_somebody_takes_the_disk_back_before_the_seal(bench: Bench) -> None:
    """Between release and seal another client adds the image again: seen, and not called FROZEN."""

    def lie(monitor: Liar, vm: Vm) -> None:
        original = vm.process.look

        def look(**more: bool) -> Look:
            # The last thing the release looks at.
            seen = original(**more)
            node = {"driver": "file", "node-name": "again", "filename": str(bench.disk)}
            assert bench.guest.qmp is not None
            if "blockdev-del" in monitor.said and not any(
                n["node-name"] == "again" for n in bench.guest.qmp.execute("query-named-block-nodes")
            ):
                bench.guest.qmp.execute("blockdev-add", **node)
            return seen

        vm.process.look = look  # type: ignore[method-assign]

    incident, _ = bench.freeze(lie)
    assert incident.state == "failed"
    assert "taken back" in failed(incident)["seal"]


@pytest.mark.long
def test_somebody_lets_it_go_on_before_the_seal(bench: Bench) -> None:
    """A reset and `cont` after the stop: it runs again, without its disk, until the seal has stopped it."""

    def lie(monitor: Liar, _vm: Vm) -> None:
        async def let_go(arguments: Any) -> Any:
            done = await monitor.monitor.execute("blockdev-del", arguments)
            assert bench.guest.qmp is not None
            bench.guest.qmp.execute("system_reset")
            bench.guest.qmp.execute("cont")
            assert bench.guest.status() == "running"
            return done

        monitor.lies["blockdev-del"] = let_go

    incident, monitor = bench.freeze(lie)
    assert "blockdev-del" in monitor.said
    assert (incident.state, failed(incident)) == ("frozen", {})
    hva = incident.machine["ranges"][0][2] + COUNTER_GPA
    before = counter(bench.guest, hva)
    # QEMU finds out when it is told so by the vCPU's thread; a guest that runs counts meanwhile.
    until(lambda: bench.guest.status() == "internal-error", LIMIT)
    assert counter(bench.guest, hva) == before
    assert not held(bench)


@pytest.mark.long
def test_without_bpf(bench: Bench) -> None:
    """The process as a whole is frozen by its cgroup, and this is said to be weaker."""
    incident, _ = bench.freeze(lambda _monitor, _vm: None, lsm=False)
    assert (incident.state, failed(incident)) == ("frozen", {})
    assert incident.steps["seal"].state == "weaker"
    assert "KVM_RUN is not refused" in incident.steps["seal"].detail
    assert not held(bench)
    hva = incident.machine["ranges"][0][2] + COUNTER_GPA
    before = counter(bench.guest, hva)
    os.kill(bench.guest.pid, signal.SIGCONT)
    assert bench.guest.qmp is not None
    bench.guest.qmp.timeout = 2.0
    with pytest.raises(TestbedError, match="no answer to cont"):
        bench.guest.qmp.execute("cont")
    assert counter(bench.guest, hva) == before
