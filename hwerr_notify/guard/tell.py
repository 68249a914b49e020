# SPDX-License-Identifier: MIT
"""Telling: marker files for agents that must answer at once, Pacemaker, hooks.

Every program gets its time and no more. What fails is reported, and never changes
whether a guest is FROZEN; told again after a restart, at least once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .errors import Fault
from .policy import Hook, Policy
from .process import Process

__all__ = ["CLUSTER_TOOLS", "Teller", "marker", "run_program"]

log = logging.getLogger("hwerr-guard")

# Pacemaker's programs that tell it that a guest is FROZEN.
CLUSTER_TOOLS = ("cibadmin", "attrd_updater", "crm_node", "crm_resource")
# What each program of the cluster gets of the time for telling: four of them may follow one another,
# and end before it does.
_CLUSTER_SHARE = 0.22
# Pacemaker's include/crm/common/results.h: CRM_EX_NOSUCH.
_NO_SUCH = 105


class EndedWith(Fault):
    """A program that failed."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


async def run_program(argv: Sequence[str], stdin: bytes, limit: float) -> str:
    """Its output. Fault if it cannot be started, fails, or takes longer than `limit` seconds."""
    name = Path(argv[0]).name
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise Fault(f"{argv[0]}: {error.strerror}") from None
    try:
        async with asyncio.timeout(limit):
            output, _ = await process.communicate(stdin)
    except TimeoutError:
        raise Fault(f"{name} did not end within {limit:g} s") from None
    finally:
        if process.returncode is None:
            # With what it has started.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    said = output.decode("utf-8", "replace").strip()
    if process.returncode:
        last = said.splitlines()[-1] if said else "it says nothing"
        raise EndedWith(f"{name} ended with status {process.returncode}: {last}", process.returncode)
    return said


def marker(run_dir: Path, what: str, vm: str) -> Path:
    """The file that says that a VM is `what` ("frozen", "failed", "degraded"); its content is JSON."""
    return run_dir / what / quote(vm, safe="")


def _identity(facts: dict[str, Any]) -> tuple[int, int]:
    return int(facts["pid"]), int(facts["start_ticks"])


def _owner(path: Path) -> tuple[int, int] | None:
    """Whose marker it is: process number and start. None if there is none that says so."""
    try:
        return _identity(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lives(pid: int, start_ticks: int) -> bool:
    try:
        Process.open(pid, start_ticks).close()
    except ProcessLookupError:
        return False
    return True


class Teller:
    """Tells hooks and the cluster."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        # This node's name, once the cluster has said it.
        self._node: str | None = None

    def mark(self, what: str, vm: str, facts: dict[str, Any]) -> None:
        """Makes the marker, atomically. Fault, also if another living VM of that name has one."""
        path = marker(self.policy.run_dir, what, vm)
        owner = _owner(path)
        if owner is not None and owner != _identity(facts) and _lives(*owner):
            raise Fault(f"another VM is named {vm}, process {owner[0]}, and is {what}")
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(facts) + "\n", "utf-8")
            part.replace(path)
        except OSError as error:
            raise Fault(f"{path}: {error.strerror}") from None

    def reason(self, what: str, vm: str, facts: dict[str, Any]) -> str | None:
        """Why the marker says so of the process that `facts` name; None if there is no such marker."""
        path = marker(self.policy.run_dir, what, vm)
        if _owner(path) != _identity(facts):
            return None
        try:
            said = json.loads(path.read_bytes()).get("reason")
        except (OSError, ValueError, AttributeError):
            return None
        return said if isinstance(said, str) else "said by an earlier run"

    def unmark(self, what: str, vm: str, facts: dict[str, Any]) -> None:
        """Removes the marker, if it is of the process that `facts` name. Not an error if there is none."""
        path = marker(self.policy.run_dir, what, vm)
        if _owner(path) not in (None, _identity(facts)):
            return
        with suppress(OSError):
            path.unlink()

    async def hooks(self, occasion: str, facts: dict[str, Any]) -> list[str]:
        """Runs the hooks of the occasion at the same time; what failed."""
        data = json.dumps({"occasion": occasion, **facts}).encode()
        wanted = [hook for hook in self.policy.hooks if occasion in hook.on]
        return await self._all([self._hook(hook, data) for hook in wanted])

    @staticmethod
    async def _hook(hook: Hook, data: bytes) -> None:
        await run_program(hook.run, data, hook.limit)

    @staticmethod
    async def _all(jobs: list[Any]) -> list[str]:
        """What failed, in the order of the jobs."""
        results = await asyncio.gather(*jobs, return_exceptions=True)
        failed = []
        for result in results:
            if isinstance(result, Fault):
                failed.append(str(result))
            elif isinstance(result, Exception):
                # One that nobody has thought of does not end what is told others.
                log.error("telling", exc_info=result)
                failed.append(f"a bug: {type(result).__name__}: {result}")
            elif isinstance(result, BaseException):
                raise result
        return failed

    async def push(self, vm: str, incident: str, late: bool = False) -> list[str]:
        """That it is FROZEN, to the cluster, if the policy has one: what failed, in the programs' order.

        A transient attribute of this node; and, if no rule of the cluster goes by it, the failure of the
        resource here. Never both: a failure that comes when a rule has moved the guest is taken for an
        instance that runs here too, and both are stopped; one that comes before has it tried here once more.
        `late`: the cluster may have moved it; if so, no failure is told. To be done again until it has
        taken it.
        """
        if not self.policy.pacemaker_resource:
            return []
        resource, limit = self._cluster(vm)
        if missing := self._missing(*CLUSTER_TOOLS):
            return missing
        attribute = f"hwerr-{resource}"
        argv = ["attrd_updater", "--name", attribute, "--update", incident]
        rule = asyncio.ensure_future(self._has_rule(attribute, limit))
        failed = await self._all([rule, run_program(argv, b"", limit)])
        if rule.exception() is None and not rule.result():
            failed += await self._all([self._fail(resource, limit, late)])
        return failed

    async def push_failed(self, vm: str, late: bool = False) -> list[str]:
        """That it could not be frozen, as `push`: the failure alone, because it may start here again."""
        if not self.policy.pacemaker_resource:
            return []
        resource, limit = self._cluster(vm)
        if missing := self._missing("crm_node", "crm_resource"):
            return missing
        return await self._all([self._fail(resource, limit, late)])

    def _cluster(self, vm: str) -> tuple[str, float]:
        """The VM's resource, and how long a program of the cluster may take."""
        resource = self.policy.pacemaker_resource or ""
        return resource.replace("{name}", vm), _CLUSTER_SHARE * self.policy.limits["tell"]

    @staticmethod
    def _missing(*tools: str) -> list[str]:
        gone = (tool for tool in tools if shutil.which(tool) is None)
        return [f"{tool} is not installed, and the policy has [pacemaker]" for tool in gone]

    @staticmethod
    async def _has_rule(attribute: str, limit: float) -> bool:
        """Whether the cluster's configuration goes by the attribute. Fault."""
        expression = f"//constraints//expression[@attribute='{attribute}']"
        try:
            await run_program(["cibadmin", "--query", "--xpath", expression], b"", limit)
        except EndedWith as error:
            if error.status != _NO_SUCH:
                raise
            return False
        return True

    async def _fail(self, resource: str, limit: float, late: bool) -> None:
        """That it has failed on this node, if it is here. Fault."""
        if self._node is None:
            self._node = await run_program(["crm_node", "-n"], b"", limit)
        if late:
            argv = ["crm_resource", "--locate", "--resource", resource, "--quiet"]
            if self._node not in (await run_program(argv, b"", limit)).split():
                return
        argv = ["crm_resource", "--fail", "--resource", resource, "--node", self._node]
        await run_program(argv, b"", limit)

    async def cleared(self, vm: str) -> list[str]:
        """Takes the cluster's attribute back; what failed. To be done again, as `push`."""
        if not self.policy.pacemaker_resource or shutil.which("attrd_updater") is None:
            return []
        resource = self.policy.pacemaker_resource.replace("{name}", vm)
        argv = ["attrd_updater", "--name", f"hwerr-{resource}", "--delete"]
        return await self._all([run_program(argv, b"", self.policy.limits["tell"])])
