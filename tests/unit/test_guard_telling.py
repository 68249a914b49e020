# SPDX-License-Identifier: MIT
"""What hwerr-guard tells of an incident, and goes on telling: markers, the cluster."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hwerr_notify.guard import daemon
from hwerr_notify.guard.daemon import Guard
from hwerr_notify.guard.policy import Hook, Policy, VmPolicy
from hwerr_notify.guard.process import Process
from hwerr_notify.guard.store import Incident, Step
from hwerr_notify.guard.tell import marker
from hwerr_notify.guard.vm import Vm
from hwerr_notify.jsonform import boot_id

DONE = Step("done", 1, 2)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for Pacemaker's programs: each says what it was told, and fails while `refuse` is there.

    attrd_updater waits where it is told to: until somebody has written to `gate`.
    """
    for name in ("cibadmin", "crm_node", "attrd_updater", "crm_resource"):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(
            f"#!/bin/sh\ncd {tmp_path}\n[ ! -e refuse ] || exit 1\n"
            "case $0-$* in *update*-*--update*) [ ! -e gate ] || { echo >waits; read -r _ <gate; } ;; esac\n"
            f'echo {name} "$@" >>said\necho node1\n',
            "utf-8",
        )
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(daemon, "_CLUSTER_RETRY_FIRST", 0.01)
    return tmp_path


@pytest.fixture
def qemu() -> Iterator[int]:
    """A process that stands for a QEMU."""
    with subprocess.Popen(["/bin/sleep", "1000"]) as process:
        yield process.pid
        process.kill()


def guard_of(home: Path) -> Guard:
    policy = Policy(Path("/none"), state_dir=home / "s", run_dir=home / "r", dump=False)
    return Guard(replace(policy, pacemaker_resource="vm-{name}"), "/nowhere")


class Bed:
    """A Guard with one VM and its incident, and the part of the kernel that tells of both left out."""

    def __init__(self, home: Path, pid: int, state: Any, **more: Any) -> None:
        self.home = home
        policy = Policy(
            Path("/none"),
            state_dir=home / "s",
            run_dir=home / "r",
            pacemaker_resource="vm-{name}",
            dump=False,
        )
        self.guard = Guard(policy, "/nowhere")
        self.guard.store.prepare()
        process = Process.open(pid)
        self.vm = Vm("web1", None, process, VmPolicy(), "/q", incident="i1")
        self.guard._adopt(self.vm)
        self.incident = Incident(
            "i1", boot_id() or "", "web1", None, pid, process.start_ticks, "/q", {}, 1, 1, state=state,
            **{"steps": {"seal": DONE}, **more},
        )  # fmt: skip
        self.guard.incidents["i1"] = self.incident
        self.guard.store.save(self.incident)

    def marked(self, what: str) -> bool:
        return marker(self.home / "r", what, "web1").exists()

    def said(self, program: str) -> list[str]:
        path = self.home / "said"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(program)]

    def saved(self) -> Incident:
        return self.guard.store.load("i1")

    async def until(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not what():
                await asyncio.sleep(0.01)

    async def end(self) -> None:
        await self.guard._end()


def fails(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    async def freeze(_vm: Vm, incident: Incident) -> Incident:
        return replace(incident, state="failed", steps={"record": Step("failed", 1, 2, "no room")})

    monkeypatch.setattr(bed.guard.steps, "freeze", freeze)


def test_a_failed_freeze_is_told(cluster: Path, qemu: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        bed = Bed(cluster, qemu, "freezing")
        fails(bed, monkeypatch)
        await bed.guard._through(bed.vm, bed.incident)
        assert bed.marked("failed")
        assert not bed.marked("frozen")
        assert bed.said("crm_resource") == ["crm_resource --fail --resource vm-web1 --node node1"]
        assert bed.said("attrd_updater") == [], "it may start here again"
        assert (bed.saved().state, bed.saved().untold) == ("failed", False)
        # Once more, with success: the marker changes.

        async def freeze(_vm: Vm, incident: Incident) -> Incident:
            return replace(incident, state="frozen", steps={"seal": DONE})

        monkeypatch.setattr(bed.guard.steps, "freeze", freeze)
        await bed.guard._through(bed.vm, bed.guard.incidents["i1"])
        assert bed.marked("frozen")
        assert not bed.marked("failed")
        await bed.end()

    asyncio.run(main())


def test_a_failed_freeze_is_told_until_it_is_taken(
    cluster: Path, qemu: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by the next daemon."""

    async def first() -> None:
        bed = Bed(cluster, qemu, "freezing")
        fails(bed, monkeypatch)
        await bed.guard._through(bed.vm, bed.incident)
        assert (bed.saved().state, bed.saved().untold) == ("failed", True)
        await bed.end()

    async def second() -> None:
        bed = Bed(cluster, qemu, "failed", untold=True)
        marker(cluster / "r", "failed", "web1").unlink()
        bed.guard._take_up(bed.incident)
        assert bed.marked("failed")
        await bed.until(lambda: not bed.saved().untold)
        assert bed.said("crm_resource") == [
            "crm_resource --locate --resource vm-web1 --quiet",
            "crm_resource --fail --resource vm-web1 --node node1",
        ]
        await bed.end()

    (cluster / "refuse").touch()
    asyncio.run(first())
    (cluster / "refuse").unlink()
    asyncio.run(second())


def test_markers_go_with_the_process(cluster: Path, qemu: int) -> None:
    async def main() -> None:
        bed = Bed(cluster, qemu, "failed")
        bed.guard._mark(bed.vm, "failed")
        os.kill(qemu, 9)
        await bed.until(lambda: bed.guard.incidents["i1"].state == "gone" and not bed.marked("failed"))
        await bed.end()

    asyncio.run(main())


def test_a_hook_that_hangs_is_not_told(cluster: Path, qemu: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the cluster takes it: what the hook did is not known, and stays so."""
    slow = cluster / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 1000\n", "utf-8")
    slow.chmod(0o755)

    async def main() -> None:
        bed = Bed(cluster, qemu, "frozen")
        policy = replace(bed.guard.policy, hooks=(Hook((str(slow),), frozenset({"frozen"}), 60.0),))
        bed.guard.teller.policy = policy
        # Each program of the cluster has a share of it.
        bed.guard.policy.limits["tell"] = 5.0
        (cluster / "refuse").touch()
        await bed.guard._told(bed.vm, bed.incident)
        (cluster / "refuse").unlink()
        step = bed.saved().steps["tell"]
        assert step.state == "failed"
        assert "hooks: not done within 5 s" in step.detail
        await bed.until(lambda: "attrd_updater" not in bed.saved().steps["tell"].detail)
        assert bed.said("attrd_updater")
        step = bed.saved().steps["tell"]
        assert (step.state, step.detail) == ("failed", "hooks: not done within 5 s")
        await bed.end()

    asyncio.run(main())


def test_cleared_while_the_cluster_is_told(cluster: Path, qemu: int) -> None:
    """What it was told last is what it ends with: no attribute."""
    os.mkfifo(cluster / "gate")

    async def main() -> None:
        bed = Bed(cluster, qemu, "frozen", steps={"seal": DONE, "tell": Step("failed", 1, 2)})
        bed.guard.spawn(bed.guard._push_again(bed.vm, "i1", Step("failed", 1, 2), []))
        await bed.until((cluster / "waits").exists)
        clearing = asyncio.create_task(bed.guard.clear("i1"))
        await bed.until(lambda: bed.saved().state == "cleared" and not bed.vm.process.alive())
        gate = await asyncio.to_thread((cluster / "gate").open, "w", encoding="ascii")
        gate.write("go\n")
        gate.close()
        await clearing
        assert bed.said("attrd_updater")[-1] == "attrd_updater --name hwerr-vm-web1 --delete"
        assert not bed.saved().untold
        assert bed.saved().state == "cleared"
        await bed.end()

    asyncio.run(main())


def test_an_attribute_that_could_not_be_taken_back(cluster: Path, qemu: int) -> None:
    """By the next daemon, unless the VM's next incident wants it."""

    async def first() -> None:
        bed = Bed(cluster, qemu, "frozen")
        await bed.guard.clear("i1")
        assert (bed.saved().state, bed.saved().untold) == ("cleared", True)
        await bed.end()

    async def second(state: Any) -> None:
        guard = guard_of(cluster)
        guard.store.prepare()
        guard._load_incidents()
        incident = guard.incidents["i1"]
        if state:
            guard.incidents["i2"] = replace(incident, id="i2", state=state)
        guard._take_up(incident)
        async with asyncio.timeout(60):
            while guard.store.load("i1").untold:
                await asyncio.sleep(0.01)
        await guard._end()

    (cluster / "refuse").touch()
    asyncio.run(first())
    (cluster / "refuse").unlink()
    left = (cluster / "s/incidents/i1/incident.json").read_bytes()
    asyncio.run(second("frozen"))
    assert not (cluster / "said").exists()
    (cluster / "s/incidents/i1/incident.json").write_bytes(left)
    asyncio.run(second(None))
    assert (cluster / "said").read_text("utf-8") == "attrd_updater --name hwerr-vm-web1 --delete\n"
