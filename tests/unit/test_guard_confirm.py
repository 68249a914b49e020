# SPDX-License-Identifier: MIT
"""What hwerr-guard makes sure of when it finds a FROZEN guest of an earlier run."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hwerr_notify.guard.errors import Fault
from hwerr_notify.guard.kernel import KernelGuard
from hwerr_notify.guard.policy import Policy, VmPolicy
from hwerr_notify.guard.process import Process
from hwerr_notify.guard.seal import Sealed, Sealer
from hwerr_notify.guard.steps import Steps
from hwerr_notify.guard.store import Incident, Step, Store
from hwerr_notify.guard.vm import Vm
from hwerr_notify.jsonform import boot_id

DONE = Step("done", 1, 2)


@pytest.fixture
def qemu() -> Iterator[int]:
    """A process that stands for a QEMU."""
    with subprocess.Popen(["/bin/sleep", "1000"]) as process:
        yield process.pid
        process.kill()


class Seals(Sealer):
    """A seal that is lost, and that can be made again, or not."""

    def __init__(self, why_not: str | None) -> None:
        super().__init__()
        self.why_not = why_not
        self.held = False
        self.made = 0

    def holds(self, process: Process, sealed: dict[str, Any]) -> bool:
        return self.held

    async def seal(self, process: Process, *, kvm: bool, whole: bool, limit: float, **_: Any) -> Sealed:
        if self.why_not:
            raise Fault(self.why_not)
        self.held = True
        self.made += 1
        return Sealed(True, True, "process frozen by cgroup")


@pytest.mark.parametrize("why_not", [None, "it cannot be made"])
def test_a_seal_that_was_lost_is_made_again(tmp_path: Path, qemu: int, why_not: str | None) -> None:
    store = Store(tmp_path)
    store.prepare()
    sealer = Seals(why_not)
    process = Process.open(qemu)
    vm = Vm("web1", None, process, VmPolicy(), "/q", incident="i1")

    async def no_hooks(_vm: Vm, _incident: Incident) -> None:
        return

    steps = Steps(Policy(Path("/none"), state_dir=tmp_path), store, KernelGuard(None), sealer, no_hooks)
    incident = Incident(
        "i1", boot_id() or "", "web1", None, qemu, process.start_ticks, "/q", {}, 1, 1, state="frozen",
        steps=dict.fromkeys(("stop", "record", "release", "seal"), DONE),
    )  # fmt: skip
    found = asyncio.run(steps.confirm(vm, incident))
    assert found == store.load("i1")
    if why_not:
        assert (found.state, found.steps["seal"].state) == ("failed", "failed")
        assert why_not in found.steps["seal"].detail
    else:
        assert (found.state, found.steps["seal"].state) == ("frozen", "weaker")
        assert found.steps["seal"].facts == {"weaker": True, "process": True}
        assert "made again" in found.steps["seal"].detail
        # One that holds is left alone.
        assert asyncio.run(steps.confirm(vm, found)) == found
    assert sealer.made == (0 if why_not else 1)
    process.close()
    store.close()
