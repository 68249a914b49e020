# SPDX-License-Identifier: MIT
"""What the steps of a freeze do when a guest sleeps, a disk hangs, a kernel has stopped it or not."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hwerr_notify.event import Stop
from hwerr_notify.guard.errors import Fault
from hwerr_notify.guard.policy import Policy, VmPolicy
from hwerr_notify.guard.process import Process, Thread
from hwerr_notify.guard.seal import Sealer
from hwerr_notify.guard.steps import Steps
from hwerr_notify.guard.store import Incident, Store
from hwerr_notify.guard.vm import Machine, Vm

LIMIT = 60.0


class Kernel:
    """A guard in the kernel that stops what it is told to."""

    def stop(self, process: Process) -> Stop | str:
        return Stop(process.pid, 1, process.start_ns, 7)

    def stopped_ns(self, process: Process) -> int | None:
        return 7


class Qemu:
    """A monitor whose guest goes on until it is told to stop."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.status = "running"
        self.closed = asyncio.Event()
        self.pid = os.getpid()

    async def execute(self, command: str, arguments: Any = None, *, limit: float = 5.0) -> Any:
        self.said.append(command)
        if command == "stop":
            self.status = "paused"
        return {"query-status": {"status": self.status}}.get(command, {})

    async def aclose(self) -> None:
        self.closed.set()


async def _no_hooks(vm: Vm, incident: Incident) -> None:
    return


def steps_in(home: Path, **limits: float) -> Steps:
    policy = Policy(Path("/none"), state_dir=home)
    policy = Policy(Path("/none"), state_dir=home, limits=policy.limits | limits)
    store = Store(home)
    store.prepare()
    return Steps(policy, store, Kernel(), Sealer(), _no_hooks)  # type: ignore[arg-type]


def vm_here() -> Vm:
    vm = Vm("web1", None, Process.open(os.getpid()), VmPolicy(), "/q", Qemu())
    vm.machine = Machine(tids=(1,))
    return vm


def incident_of(vm: Vm, cause: dict[str, Any] | None = None) -> Incident:
    return Incident(
        "20260102T030405.006-web1", "boot", vm.name, None, vm.process.pid, vm.process.start_ticks, "/q",
        cause or {"layer": "hardware", "message": "m"}, 1, 2,
    )  # fmt: skip


def looks(vm: Vm, *threads: Thread) -> None:
    vm.process.threads = lambda tids=None: list(threads)  # type: ignore[method-assign]


# -- stop --------------------------------------------------------------------


def test_a_guest_that_sleeps_is_stopped_through_qemu(tmp_path: Path) -> None:
    """The kernel's request wakes no vCPU that has halted, so QEMU notices nothing."""

    async def main() -> None:
        vm = vm_here()
        looks(vm)
        step = await steps_in(tmp_path, stop=10.0)._stop(vm, incident_of(vm), 1)
        said = vm.monitor.said  # type: ignore[union-attr]
        assert said[(at := said.index("stop")) : at + 2] == ["stop", "query-status"]
        assert step.facts["status"] == "paused"
        assert "monitor" not in step.facts

    asyncio.run(main())


@pytest.mark.parametrize(
    ("state", "stopped", "sealed", "inside"),
    [
        ("R", True, True, True),
        ("R", False, False, True),
        ("S", False, False, True),
        ("S", False, True, True),
        ("T", False, False, True),
        ("S", True, False, False),
        ("D", True, False, False),
        ("T", True, False, False),
        ("t", False, True, False),
    ],
)
def test_who_is_in_the_guest(tmp_path: Path, state: str, stopped: bool, sealed: bool, inside: bool) -> None:
    """A thread that does not execute, and cannot without meeting what the kernel has for it, is not."""

    async def main() -> None:
        vm = vm_here()
        looks(vm, Thread(1, True, False, state))
        job = steps_in(tmp_path, stop=0.01)._out_of_guest(vm, stopped=stopped, sealed=sealed)
        if inside:
            with pytest.raises(Fault, match="still in the guest: 1"):
                await job
        else:
            await job

    asyncio.run(main())


def test_a_thread_on_a_cpu_may_be_in_the_guest(tmp_path: Path) -> None:
    async def main() -> None:
        vm = vm_here()
        looks(vm, Thread(1, False, True), Thread(2, False, True))
        with pytest.raises(Fault, match=r"still in the guest: 1$"):
            await steps_in(tmp_path, stop=0.01)._out_of_guest(vm, stopped=True, sealed=True)

    asyncio.run(main())


def test_a_stopped_process_is_seen_as_such() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = Process.open(child.pid)
        try:
            os.kill(child.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
            assert [t.state for t in process.threads()] == ["T"]
        finally:
            process.kill()
            process.close()
