# SPDX-License-Identifier: MIT
"""Stop, record, release, seal; then the guest is FROZEN. And keep.

Each step may be done any number of times, ends within its limit, and is saved, with what
it found, before the next begins to change anything. So a daemon that is killed at any point
goes on where it was. QEMU is told things twice: to stop, together with all questions; then
to let go of everything. What the host has to do is done while it answers. What a step has done
is judged by what the kernel shows, not by what QEMU answers: threads out of KVM_RUN, no image
open or locked, the seal in force.

FROZEN is said when all of that holds at once, after the seal, because until then
somebody else's `cont` could undo it. If a step fails the guest is not FROZEN, but it
is sealed all the same if it can be: what was stopped for an error should not run on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import disks, layout, net, outside
from .dump import Dumped, write_core
from .errors import Fault, GuardError, MonitorError, Refused, each
from .fault import fault_point
from .kernel import KernelGuard
from .monitor import DEFAULT_LIMIT, Monitor, Question, sent, together, whatever_fails
from .policy import Policy
from .process import Look, Process, Thread
from .seal import Inodes, Sealer, inodes
from .store import FREEZING, Incident, Step, Store, write_durably
from .vm import REGISTERS, Machine, Vm, describe, look, questions

__all__ = ["Asked", "Steps", "a_bug", "core_path", "in_event_path", "lost_monitor"]

log = logging.getLogger("hwerr-guard")

ReleaseHooks = Callable[[Vm, Incident], Any]


class Asked:
    """QEMU's monitor when it was told to stop, and asked all that will have to be known of it.

    It answers while the host is looked at. Every question only looks; the answers come by `execute()`.
    """

    def __init__(self, monitor: Monitor, resumes: int = 0) -> None:
        """`resumes`: how often the guest was let go on until now."""
        self.pid, self.closed, self.resumes = monitor.pid, monitor.closed, resumes
        self._monitor = monitor
        self._answers: dict[str, asyncio.Task[Any]] = {}
        # What the process was seen to have open since.
        self.taps: list[str] | None = None
        self.files: list[str] | None = None
        self.inodes: asyncio.Task[Inodes] | None = None

    def ask(self, *what: Question) -> None:
        """Returns at once. QEMU does what it is told in order, after what it was told before."""
        # Each is a task of its own, made here, so that they go out together and in this order.
        for question in what:
            self._answers[self._key(*question)] = asyncio.create_task(self._monitor.execute(*question))

    @staticmethod
    def _key(command: str, arguments: dict[str, Any] | None) -> str:
        return f"{command} {arguments or ''}"

    async def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, limit: float = DEFAULT_LIMIT
    ) -> Any:
        """See `Monitor`."""
        asked = self._answers.get(key := self._key(command, arguments))
        if asked is not None:
            try:
                return await asyncio.shield(asked)
            except Refused:
                raise
            except MonitorError:
                if self.closed.is_set():
                    raise
                # It had to wait for what was asked before it: once more, by itself.
                self._answers.pop(key, None)
        return await self._monitor.execute(command, arguments, limit=limit)

    def serves(self, monitor: Monitor | None) -> bool:
        """Whether it is that monitor that was asked."""
        return self._monitor is monitor and not self.closed.is_set()

    def answers(self, questions: Iterable[Question]) -> list[Any] | None:
        """Those to all of these, if they are there; else they are to be asked again. Waits for nothing."""
        tasks = [self._answers.get(self._key(*question)) for question in questions]
        found = [t.result() for t in tasks if t and t.done() and not t.cancelled() and not t.exception()]
        return found if len(found) == len(tasks) else None

    async def aclose(self) -> None:
        """What nobody waits for any more is forgotten; the monitor stays."""
        for task in (*self._answers.values(), *filter(None, [self.inodes])):
            task.cancel()
            # Read, so that nobody is told of a failure that nobody waits for.
            task.add_done_callback(lambda task: task.cancelled() or task.exception())


async def _forget(asking: asyncio.Task[Asked]) -> None:
    """It was in vain."""
    asking.cancel()
    await asyncio.wait([asking])
    if not asking.cancelled() and asking.exception() is None:
        await asking.result().aclose()


_STOP: tuple[Question, ...] = (("stop", None), ("query-status", None))

# How long QEMU may take to find out that the kernel has stopped its guest, seconds.
_NOTICES_WITHIN = 0.05

# Between two looks at what no event tells, seconds.
_LOOK_AGAIN = 0.001

# How long after its monitor a process that is killed may last, seconds.
_ENDS_WITHIN = 1.0

# A monitor that answers nonsense ends in one of these.
_NONSENSE = (KeyError, TypeError, ValueError, AttributeError, IndexError)


# Those that a monitor is needed for from their beginning. A stop is the kernel's first.
_TALKS = frozenset({"record", "release"})


def _well(job: asyncio.Future[Any]) -> bool:
    """Whether it is done, and has not failed."""
    return job.done() and not job.cancelled() and job.exception() is None


def a_bug(error: Exception) -> str:
    """What nobody has thought of, for people. The log has all of it."""
    return f"a bug: {type(error).__name__}: {error}"


def lost_monitor(incident: Incident) -> bool:
    """Whether it failed because QEMU's monitor was away."""
    failed = (step for step in incident.steps.values() if step.state == "failed")
    return incident.state == "failed" and any(step.facts.get("monitor") == "lost" for step in failed)


def _stops(cause: dict[str, Any], process: Process) -> list[dict[str, Any]]:
    """Stops of the process's guests that a record tells of. vCPUs that the kernel did not see out of the
    guest in the time that it waits stop when they leave it next."""
    return [s for s in cause.get("stops") or () if "seq" in cause and process.is_of(s["pid"], s["start_ns"])]


def in_event_path(cause: dict[str, Any], process: Process) -> int | None:
    """When (CLOCK_MONOTONIC, ns) the kernel stopped the process's guests before the cause's record could be
    read, as that record says; None if it did not."""
    mine = _stops(cause, process)
    flagged = any(g["stopped"] and process.is_of(g["pid"], g["start_ns"]) for g in cause.get("guests") or ())
    if not flagged or "seq" not in cause:
        return None
    return int(mine[0]["time_mono_ns"] if mine else cause["time_mono_ns"])


def core_path(policy: Policy, store: Store, incident_id: str) -> Path:
    """Where the dump of an incident is."""
    if policy.dump_dir is None:
        return store.path(incident_id) / "memory.core"
    return policy.dump_dir / f"{incident_id}.core"


class Steps:
    """Does the steps. Belongs to the event loop's thread; several VMs at once, one step of each."""

    def __init__(
        self, policy: Policy, store: Store, kernel: KernelGuard, sealer: Sealer, hooks: ReleaseHooks
    ) -> None:
        """`hooks` is awaited for the site's own part of the release; Fault fails it."""
        self.policy = policy
        self.store = store
        self.kernel = kernel
        self.sealer = sealer
        self.hooks = hooks
        # What was learnt of an incident while its steps are done; asked before each of them.
        self.latest: Callable[[Incident], Incident] = lambda incident: incident
        # Incidents that are on disk, of those that this run has begun or gone on with.
        self.saved: set[str] = set()
        self._asked: dict[str, Asked] = {}
        # What was asked before the incident was there.
        self._early: dict[str, asyncio.Task[Asked]] = {}
        # What is to be written before an incident is saved the next time.
        self._first: dict[str, Callable[[], None]] = {}
        # Of which something may have been released.
        self._releasing: set[str] = set()

    def ask_early(self, vm: Vm) -> asyncio.Task[Asked] | None:
        """Begins with a guest that the kernel has stopped before its incident is noted, which is to be given
        it by `take_early()`; None if its monitor is away."""
        return asyncio.create_task(self._ask(vm, by_kernel=True)) if vm.connected else None

    async def take_early(self, incident_id: str | None, asking: asyncio.Task[Asked]) -> None:
        """For the incident that begins now; for none, or for one that has asked, it was in vain."""
        if incident_id is None or incident_id in self._asked or incident_id in self._early:
            await _forget(asking)
        else:
            self._early[incident_id] = asking

    async def save(self, incident: Incident, first: Callable[[], None] | None = None) -> Incident:
        """Durable when it returns. Fault if the disk would not take it.

        `first` as of `Store.save()`.
        """
        turn = self.store.turn(incident.id)
        try:
            async with asyncio.timeout(self.policy.limits["record"]):
                await asyncio.to_thread(self.store.save, incident, turn, first)
        except OSError as error:
            raise self._not_saved(error) from None
        except Exception as error:
            log.exception("incident %s cannot be saved", incident.id)
            raise Fault(a_bug(error)) from None
        self.saved.add(incident.id)
        return incident

    def _not_saved(self, error: OSError) -> Fault:
        if isinstance(error, TimeoutError):
            return Fault(f"{self.store.root} did not take the record in time")
        return Fault(f"{error.filename or self.store.root}: {error.strerror}")

    async def freeze(self, vm: Vm, incident: Incident) -> Incident:
        """From where the incident is, to FROZEN, failed or gone. Never raises for what a step meets.

        That it has begun is saved while the guest is being stopped. If the kernel has stopped it in the event
        path, its record says so to a daemon that comes after this one, as the guard does, which outlives
        this one: then what is saved first is the stop, with what was recorded.

        A stop is not saved by itself, unless a monitor is waited for then: it is made sure of again in any
        case, and until the record is made nothing is done that cannot be repeated. The record is durable
        before anything is released. A release is saved before the seal, so that it need not be done again
        with a monitor that may be gone by then; while the seal is made if that leaves the monitor alone,
        because all disks are detached. The seal is judged by what is in force, and is saved with FROZEN.
        """
        try:
            return await self._freeze(vm, incident)
        finally:
            self._first.pop(incident.id, None)
            if asking := self._early.pop(incident.id, None):
                await _forget(asking)
            if asked := self._asked.pop(incident.id, None):
                await asked.aclose()

    async def _freeze(self, vm: Vm, incident: Incident) -> Incident:
        known = (
            not incident.steps and vm.armed is None and in_event_path(incident.cause, vm.process) is not None
        )
        begun = None if known else asyncio.ensure_future(self.save(incident))
        steps = {"stop": self._stop, "record": self._record, "release": self._release, "seal": self._seal}
        failed = False
        step = Step("failed", 0, 0)
        saving: asyncio.Task[tuple[Incident, bool]] | None = None
        for name in FREEZING:
            # A stop is made sure of whenever the work is taken up.
            if (incident.done(name) and name != "stop") or (failed and name != "seal"):
                continue
            began = time.time_ns()
            incident = self.latest(incident)
            fault_point(f"before-{name}")
            try:
                async with asyncio.timeout(self.policy.limits[name]):
                    if name in _TALKS:
                        await self._talk(vm, incident, step)
                    step = await steps[name](vm, incident, began)
            except Exception as error:
                step = self._failed_by(vm, name, began, error)
            if step.state == "failed" or not incident.done(name):
                incident = incident.with_step(name, step)
            failed = failed or step.state == "failed"
            if name == FREEZING[0]:
                # A disk that does not take it will not take the next, either, and that is told.
                if begun is not None:
                    with suppress(Fault):
                        await begun
                fault_point("begun")
            # Where QEMU could not be told, it is waited for, and there is time.
            if name == "release" and self._monitor_stays(vm, step):
                # While the seal is made: should it not come to be saved, it is done again.
                saving = asyncio.create_task(self._keep_going(vm, incident, name, failed))
                await asyncio.sleep(0)
            elif name in FREEZING[1:-1] or (name == FREEZING[0] and (failed or "monitor" in step.facts)):
                incident, failed = await self._keep_going(vm, incident, name, failed)
            elif name == FREEZING[0]:
                fault_point("after-stop")
            if await self._has_ended(vm, failed):
                if saving is not None:
                    await saving
                return await self._gone(incident)
        if saving is not None:
            saved, not_saved = await saving
            if not_saved:
                incident, failed = incident.with_step("record", saved.steps["record"]), True
        try:
            if failed:
                # Somebody may have let it go on before the seal, which a vCPU meets when it leaves the guest.
                self.kernel.stop(vm.process)
            else:
                incident = await self._frozen(vm, self.latest(incident))
                fault_point("after-seal")
                return incident
        except Exception as error:
            if not vm.process.alive():
                return await self._gone(incident)
            incident = self._unsealed(incident, error)
        return await self._save_anyway(replace(incident, state="failed", frozen_ns=0, frozen_mono_ns=0))

    def _monitor_stays(self, vm: Vm, release: Step) -> bool:
        """Whether the seal will leave QEMU's monitor alone."""
        detached = bool(release.facts.get("detached"))
        return detached and not vm.policy.freeze_process and self.sealer.why_weaker is None and vm.machine.kvm

    async def confirm(self, vm: Vm, incident: Incident) -> Incident:
        """After a restart: a FROZEN guest that is not so any more is not called so. Never raises.

        A seal that is gone (bpffs was unmounted, another release of the program) is made again first.
        """
        try:
            if not self.sealer.holds(vm.process, incident.steps["seal"].facts):
                incident = await self._seal_again(vm, incident)
            await self._verify_in_time(vm, incident)
        except Exception as error:
            if not vm.process.alive():
                return await self._gone(incident)
            return await self._save_anyway(replace(self._unsealed(incident, error), state="failed"))
        return incident

    @staticmethod
    def _unsealed(incident: Incident, error: Exception) -> Incident:
        """What was called sealed, and is not, or is not known to be."""
        why = str(error)
        if not isinstance(error, GuardError | OSError):
            log.error("incident %s: the last look failed", incident.id, exc_info=error)
            why = a_bug(error)
        seal = incident.steps.get("seal", Step("failed", 0, 0))
        return incident.with_step("seal", replace(seal, state="failed", detail=why))

    async def _seal_again(self, vm: Vm, incident: Incident) -> Incident:
        """Fault, OSError if it cannot be."""
        try:
            async with asyncio.timeout(self.policy.limits["seal"]):
                step = await self._seal(vm, incident, time.time_ns())
        except TimeoutError:
            raise Fault(
                f"the seal is not in force any more, nor within {self.policy.limits['seal']:g} s"
            ) from None
        step = replace(step, detail=f"{step.detail}; made again, because it was not in force any more")
        return await self._save_anyway(incident.with_step("seal", step))

    @staticmethod
    async def _has_ended(vm: Vm, failed: bool) -> bool:
        """Whether QEMU has. A process that is killed closes its monitor a moment before it has ended."""
        lost = failed and vm.monitor is not None and vm.monitor.closed.is_set()
        return await asyncio.to_thread(vm.process.ends, _ENDS_WITHIN) if lost else not vm.process.alive()

    @staticmethod
    def _failed(began: int, why: str) -> Step:
        return Step("failed", began, time.time_ns(), why)

    def _failed_by(self, vm: Vm, name: str, began: int, error: Exception) -> Step:
        """Of what nobody has thought of, too: the incident goes on as with any step that fails."""
        lost = isinstance(error, MonitorError) and not isinstance(error, Refused)
        if isinstance(error, TimeoutError):
            why = f"not done within {self.policy.limits[name]:g} s"
            if lost := not vm.connected:
                why += ", in which QEMU's monitor was not connected"
        elif isinstance(error, GuardError | OSError):
            why = str(error)
        elif isinstance(error, _NONSENSE):
            why = f"QEMU's answers make no sense ({error!r})"
            log.error("VM %s: %s: %s", vm.name, name, why, exc_info=error)
        else:
            why = a_bug(error)
            log.error("VM %s: %s: %s", vm.name, name, why, exc_info=error)
        step = self._failed(began, why)
        return replace(step, facts={"monitor": "lost"}) if lost else step

    async def _talk(self, vm: Vm, incident: Incident, before: Step) -> None:
        """Waits for a monitor that is away, and then for QEMU to stop what it could not be told to before."""
        if vm.connected and "monitor" not in before.facts:
            return
        await vm.await_monitor()
        await self._stop_qemu(vm, incident, by_kernel=True)

    async def _keep_going(self, vm: Vm, incident: Incident, name: str, failed: bool) -> tuple[Incident, bool]:
        """Saves a step; one that cannot be saved has failed."""
        try:
            await self.save(incident, self._first.pop(incident.id, None))
        except Fault as error:
            now = time.time_ns()
            return incident.with_step("record", self._failed(now, f"after {name}: {error}")), True
        fault_point(f"after-{name}")
        return incident, failed

    async def _save_anyway(self, incident: Incident) -> Incident:
        try:
            return await self.save(incident)
        except Fault as error:
            return replace(incident, notes=(*incident.notes, f"not on disk: {error}"))

    async def _gone(self, incident: Incident) -> Incident:
        note = f"QEMU ended during {list(incident.steps)[-1]}; its memory is lost"
        return await self._save_anyway(replace(incident, state="gone", notes=(*incident.notes, note)))

    # -- stop ----------------------------------------------------------------

    async def _stop(self, vm: Vm, incident: Incident, began: int) -> Step:
        facts: dict[str, Any] = {}
        if incident.done("release") and self.sealer.freezer.frozen(vm.process):
            # The weaker seal of an earlier run: nothing in it runs, and its monitor says nothing.
            self.kernel.stop(vm.process)
            return Step("done", began, time.time_ns(), "frozen already, with its process")
        if not incident.done("release") and self.sealer.freezer.has(vm.process):
            # An earlier try may have had no other seal, and what is to be released must answer. Its vCPUs
            # must not run: a `cont` may wait for it in a socket.
            self.kernel.stop(vm.process)
            self.sealer.freezer.thaw(vm.process)
        # Again, if it was stopped already: somebody may have let it go on since.
        stopped = self.kernel.stop(vm.process)
        by_kernel = not isinstance(stopped, str)
        if isinstance(stopped, str):
            facts["kernel"] = stopped
            how = "by QEMU"
        else:
            # The guard counts every stop, this one too; only the record says who was first.
            first = in_event_path(incident.cause, vm.process)
            how = "by the kernel, on command"
            if first is not None:
                how = "by the kernel, in the event path"
            elif _stops(incident.cause, vm.process):
                how = "by the kernel, asked in the event path"
            facts |= {"mono_ns": first or stopped.mono_ns, "vcpus": stopped.vcpus}
        fault_point("inside-stop")
        try:
            async with asyncio.timeout(0.6 * self.policy.limits["stop"]):
                facts["status"] = await self._stop_qemu(vm, incident, by_kernel)
        except (MonitorError, TimeoutError) as error:
            why = str(error) or "QEMU's monitor does not answer"
            if not by_kernel:
                raise MonitorError(why) from None
            facts["monitor"] = why
        await self._out_of_guest(vm, stopped=by_kernel, then=lambda: self._see(vm, incident))
        return Step("done", began, time.time_ns(), how, facts)

    async def _stop_qemu(self, vm: Vm, incident: Incident, by_kernel: bool) -> str:
        """QEMU's run state when it has stopped its devices, too. Fault, MonitorError.

        What is to be asked is asked with it, and answered while the host is looked at.
        """
        if before := self._asked.pop(incident.id, None):
            await before.aclose()
        asked = None
        if asking := self._early.pop(incident.id, None):
            with suppress(MonitorError):
                asked = await asking
        if asked is None or not asked.serves(vm.monitor) or asked.resumes != vm.resumes:
            # Nothing was asked, or somebody has let it go on since.
            if asked is not None:
                await asked.aclose()
            asked = await self._ask(vm, by_kernel)
        self._asked[incident.id] = asked
        await asked.execute("stop")
        status = await vm.status(asked)
        if status in ("running", "inmigrate"):
            raise Fault(f"QEMU was told to stop and says {status}")
        return status

    @staticmethod
    async def _ask(vm: Vm, by_kernel: bool) -> Asked:
        """Tells QEMU to stop, and asks. MonitorError."""
        await vm.await_monitor()
        asked = Asked(vm.need_monitor(), vm.resumes)
        looks = [*disks.QUESTIONS, *questions(vm.placed)]
        if by_kernel and not vm.halted.is_set():
            # QEMU finds out by itself, and remembers that the guest must not go on. But not while all
            # vCPUs sleep: the kernel's request wakes none, and is met by one that would run. Meanwhile it
            # tells what a guest that is stopped does not change.
            asked.ask(*looks)
            looks = []
            try:
                async with asyncio.timeout(_NOTICES_WITHIN):
                    await vm.halted.wait()
            except TimeoutError:
                pass
            except BaseException:
                await asked.aclose()
                raise
        asked.ask(*_STOP, *looks, REGISTERS)
        return asked

    def _asked_of(self, vm: Vm, incident: Incident) -> Asked | None:
        """What was asked of the monitor that it has now."""
        asked = self._asked.get(incident.id)
        return asked if asked and asked.serves(vm.monitor) else None

    def _see(self, vm: Vm, incident: Incident) -> None:
        """In a thread."""
        if asked := self._asked.get(incident.id):
            # What cannot be seen now is looked at again when it is needed, and that is told.
            with suppress(OSError):
                asked.taps, asked.files = vm.process.peek()

    async def _out_of_guest(
        self, vm: Vm, *, stopped: bool, sealed: bool = False, then: Callable[[], None] | None = None
    ) -> None:
        """Waits until no thread is inside the guest. Fault, just before the step's time is over.

        `stopped`: the kernel has told every vCPU to stop; `sealed`: no KVM_RUN is begun any more. `then` is
        called after that, in the thread that has looked.
        """
        deadline = time.monotonic() + 0.3 * self.policy.limits["stop"]

        def look() -> list[Thread]:
            inside = [t for t in vm.process.threads() if self._inside(vm, t, stopped, sealed)]
            if not inside and then is not None:
                then()
            return inside

        while inside := await asyncio.to_thread(look):
            if time.monotonic() > deadline:
                raise Fault(f"threads are still in the guest: {', '.join(str(t.tid) for t in inside)}")
            await asyncio.sleep(_LOOK_AGAIN)

    @staticmethod
    def _inside(vm: Vm, thread: Thread, stopped: bool, sealed: bool) -> bool:
        """Whether it may execute the guest's code, now or without meeting the kernel's stop or seal.

        One that sleeps within KVM_RUN (a vCPU that has halted) or was stopped by a signal is not in the
        guest. It goes back there only by way of KVM's look at requests, where the kernel's stop waits for
        it; SIGCONT lets QEMU begin KVM_RUN anew, which meets the same, and the seal. Where neither is in
        force it counts as inside.
        """
        if not thread.in_guest:
            return thread.running and thread.tid in vm.machine.tids
        if stopped and thread.state != "R":
            return False
        return not (sealed and thread.state in "Tt")

    # -- record --------------------------------------------------------------

    async def _record(self, vm: Vm, incident: Incident, began: int) -> Step:
        asked = self._asked_of(vm, incident)
        monitor = asked or vm.need_monitor()
        taps = asked.taps if asked else None
        released = incident.id in self._releasing
        vm.machine, said, status = await together(
            look(monitor, vm.process, vm.machine, placed=vm.placed, taps=taps, released=released),
            describe(monitor),
            vm.status(monitor),
        )
        if status == "postmigrate" and not released:
            raise Fault("its guest has migrated, and may run elsewhere")
        # Known, unless its monitor was not connected since the daemon began.
        await vm.ask_once()
        record = {
            "incident": incident.id,
            "cause": incident.cause,
            "events": incident.events,
            "vm": {"name": vm.name, "uuid": vm.uuid, "pid": vm.process.pid, "argv": vm.argv},
            "status": status,
            "version": vm.version,
            "machine": vm.machine.to_json(),
            **said,
        }
        path = self.store.path(incident.id) / "record.json"

        def write() -> None:
            data = json.dumps(record).encode() + b"\n"
            write_durably(path, data, lambda: fault_point("inside-record"))

        # By the thread that saves the step, and before it does.
        self._first[incident.id] = write
        return Step("done", began, time.time_ns(), path.name, {"machine": vm.machine.to_json()})

    # -- release -------------------------------------------------------------

    async def _release(self, vm: Vm, incident: Incident, began: int) -> Step:
        monitor = vm.need_monitor()
        # An earlier try may have closed what would tell now.
        known = incident.steps["record"].facts.get("machine")
        if known:
            vm.machine = Machine.from_json(known)
        asked = self._asked_of(vm, incident)
        of_network = asked.answers(net.QUESTIONS) if asked else None
        of_disks = asked.answers(disks.QUESTIONS) if asked else None
        images = frozenset(vm.machine.images)
        self._releasing.add(incident.id)
        poisoned = bool(incident.poison)
        jobs = (
            asyncio.create_task(disks.release(monitor, images, of_disks, poisoned=poisoned)),
            asyncio.create_task(net.release_backends(monitor, of_network)),
            asyncio.create_task(self._release_of_host(vm, asked)),
        )
        # What cannot be released spares nothing else.
        _, backends, (devices, taps), released = await whatever_fails(*jobs, self._see_released(vm, *jobs))
        fault_point("inside-release")
        await self.hooks(vm, incident)
        facts = {
            "detached": released.detached, "backends": backends, "taps": list(taps), "links": taps,
            "devices": devices,
        }  # fmt: skip
        parts = [f"disks {released.how}"]
        parts += (
            [f"network {', '.join(vm.machine.taps) or 'backends'} off"] if backends or vm.machine.taps else []
        )
        parts += [f"bus mastering of {', '.join(devices)} off"] if devices else []
        return Step("done", began, time.time_ns(), "; ".join(parts), facts)

    @staticmethod
    async def _release_of_host(vm: Vm, asked: Asked | None) -> tuple[list[str], dict[str, int]]:
        """Devices, and taps as of `net.release_taps()`; the host does it while QEMU does its part. Fault.

        And Fault if there are devices that are not released.
        """
        machine = vm.machine
        seen = asked.files if asked else None

        def release() -> tuple[list[str], dict[str, int]]:
            def files() -> list[str]:
                return vm.process.names() if seen is None else seen

            devices, taps, _ = each(
                lambda: net.stop_dma(files()),
                lambda: net.release_taps(list(machine.taps), vm.process.pid),
                lambda: outside.nothing_else(files(), machine.devices),
            )
            return devices, taps

        # What QEMU is told goes out first.
        await sent()
        done = await asyncio.to_thread(release)
        if asked:
            # The seal will want to know.
            job = asyncio.to_thread(inodes, vm.process.pid, machine.images, machine.given)
            asked.inodes = asyncio.create_task(job)
        return done

    async def _see_released(
        self,
        vm: Vm,
        of_disks: asyncio.Future[disks.Released],
        of_network: asyncio.Future[Any],
        of_host: asyncio.Future[Any],
    ) -> disks.Released | None:
        """After the others: what they say that was released is seen from outside QEMU. Fault if it was not.

        Of what has failed nothing is said here. How the disks are.
        """
        await asyncio.wait((of_disks, of_network, of_host))
        fault_point("amid-release")
        machine = vm.machine
        said: disks.Released | None = of_disks.result() if _well(of_disks) else None
        network = _well(of_network) and _well(of_host)
        if said is None and not network:
            return None

        def see() -> disks.Released | None:
            """In a thread: a look at a file on a dead NFS server does not come back."""
            gone = said is not None and said.detached
            seen = vm.process.look(connections=gone and bool(machine.remotes))

            def see_disks() -> disks.Released | None:
                if said is None:
                    return None
                found = disks.verify(vm.process, frozenset(machine.images), machine.given, said, seen)
                if found.detached:
                    self._disconnected(vm, seen, "QEMU says its disks are gone, and is connected to")
                return found

            found: disks.Released | None
            found, _ = each(see_disks, lambda: self._network_is_gone(vm, seen) if network else None)
            return found

        return await asyncio.to_thread(see)

    @staticmethod
    def _network_is_gone(vm: Vm, seen: Look, links: dict[str, int] | None = None) -> None:
        """Fault if not. Blocks. `links`: those that were its own; another of the same name is another's."""
        if still := seen.taps:
            raise Fault(f"QEMU says its network is gone, and holds {', '.join(still)}")
        for tap, state in net.tap_states(list(vm.machine.taps), vm.process.pid).items():
            if links is not None and links.get(tap) != state["index"]:
                continue
            if state["up"] or state["bridged"]:
                raise Fault(
                    f"{tap} is {'up' if state['up'] else 'on a bridge'} again: something else sets it"
                )

    @staticmethod
    def _disconnected(vm: Vm, seen: Look, what: str) -> None:
        """Fault if it is connected to what may be its disks."""
        machine = vm.machine
        to, others = frozenset(machine.remotes), frozenset(machine.peers)
        if still := outside.connected(seen.connections, to, others):
            raise Fault(f"{what} {', '.join(still)}")

    # -- seal ----------------------------------------------------------------

    async def _seal(self, vm: Vm, incident: Incident, began: int) -> Step:
        # A release that failed may be tried again: its monitor must be able to answer.
        detached = not incident.done("release") or bool(incident.steps["release"].facts.get("detached"))
        sealed = await self.sealer.seal(
            vm.process,
            kvm=vm.machine.kvm,
            whole=vm.policy.freeze_process or not detached,
            limit=self.policy.limits["seal"],
            images=vm.machine.images,
            given=vm.machine.given,
            looked=asked.inodes if (asked := self._asked.get(incident.id)) else None,
        )
        facts = {"weaker": sealed.weaker, "process": sealed.process}
        return Step("weaker" if sealed.weaker else "done", began, time.time_ns(), sealed.how, facts)

    async def _verify_in_time(
        self, vm: Vm, incident: Incident, then: Callable[[], None] = lambda: None
    ) -> None:
        """`_verify`, within the time that the seal has: an image on a server that is dead does not answer."""
        limit = self.policy.limits["seal"]
        try:
            async with asyncio.timeout(limit):
                await self._verify(vm, incident, then)
        except TimeoutError:
            raise Fault(f"what was released could not be looked at again within {limit:g} s") from None

    async def _frozen(self, vm: Vm, incident: Incident) -> Incident:
        """As FROZEN, and saved so by the thread that has seen that it is. Fault."""
        turn = self.store.turn(incident.id)
        looked: list[Incident] = []
        saved = given_up = False

        def save() -> None:
            nonlocal saved
            if given_up:
                # What the look hung on came back, when it was told already that it is not FROZEN.
                raise Fault("too late")
            now, mono = time.time_ns(), time.monotonic_ns()
            looked.append(replace(incident, state="frozen", frozen_ns=now, frozen_mono_ns=mono))
            self.store.save(looked[-1], turn)
            saved = True

        try:
            await self._verify_in_time(vm, incident, then=save)
        except OSError as error:
            if not looked:
                raise
            raise self._not_saved(error) from None
        except Fault:
            given_up = True
            if not looked or saved:
                raise
            raise self._not_saved(TimeoutError()) from None
        self.saved.add(incident.id)
        return looked[-1]

    async def _verify(self, vm: Vm, incident: Incident, then: Callable[[], None]) -> None:
        """What FROZEN says, looked at again, all of it after the seal. Fault if something does not hold.

        `then` is called by the thread that has looked, if all of it does.
        """
        if not self.sealer.holds(vm.process, incident.steps["seal"].facts):
            raise Fault("the seal is not in force any more")
        # Once more: the seal bars a vCPU that begins KVM_RUN, not one that is within it, asleep or because
        # somebody has let it go on before the seal.
        stopped = not isinstance(self.kernel.stop(vm.process), str)
        facts = incident.steps["release"].facts
        detached = bool(facts.get("detached"))
        # Not in what an earlier release has saved.
        links = facts.get("links")

        def look() -> None:
            self._released(vm, detached, links)
            # Last: of a process that has ended nothing is seen, and all looks well.
            if not vm.process.alive():
                raise Fault("QEMU has ended")
            then()

        await self._out_of_guest(vm, stopped=stopped, sealed=True, then=look)

    def _released(self, vm: Vm, detached: bool, links: dict[str, int] | None) -> None:
        machine = vm.machine
        seen = vm.process.look(connections=detached and bool(machine.remotes))
        held = disks.still_held(vm.process, frozenset(machine.images), machine.given, seen)
        if any(h.locked or detached for h in held):
            raise Fault(f"QEMU has taken back {', '.join(h.path for h in held)}")
        if detached:
            self._disconnected(vm, seen, "QEMU has taken back")
        outside.nothing_else(seen.devices, machine.devices)
        self._network_is_gone(vm, seen, links)
        net.dma_is_stopped(seen.devices)

    # -- keep ----------------------------------------------------------------

    async def keep(self, vm: Vm, incident: Incident) -> Incident:
        """Dumps the memory. The incident with the step; saved. Never raises for what goes wrong."""
        began = time.time_ns()
        fault_point("before-keep")
        try:
            dumped = await self._dump(vm, incident)
            kept = f"{dumped.path}: {dumped.stored >> 10} KiB"
            kept += f", {len(dumped.skipped)} ranges skipped" if dumped.skipped else ""
            step = Step("done", began, time.time_ns(), kept)
            incident = replace(incident, dump=dumped.to_json())
        except (GuardError, OSError) as error:
            step = self._failed(began, str(error) or repr(error))
        except Exception as error:
            log.exception("VM %s: dump", vm.name)
            step = self._failed(began, a_bug(error))
        finally:
            vm.progress = None
        return await self._save_anyway(incident.with_step("keep", step))

    async def _dump(self, vm: Vm, incident: Incident) -> Dumped:
        import threading

        if not vm.machine.ranges:
            raise Fault("it is not known where the guest's memory is")
        facts = {
            "incident": incident.id,
            "vm": vm.name,
            "uuid": vm.uuid,
            "cause": incident.cause.get("message"),
        }
        stop = threading.Event()

        def progress(done: int, total: int) -> None:
            vm.progress = done, total
            fault_point("inside-keep")

        def write() -> Dumped:
            path, cpus = self._before_core(incident)
            if stop.is_set():
                raise Fault("it came too late")
            return write_core(
                path, vm.process.pid, vm.machine.ranges, cpus, incident.poison, facts,
                progress, stop, self.policy.dump_reserve,
            )  # fmt: skip

        try:
            async with asyncio.timeout(self.policy.limits["keep"]):
                return await asyncio.to_thread(write)
        except TimeoutError:
            raise Fault(f"not done within {self.policy.limits['keep']:g} s") from None
        finally:
            stop.set()

    def _before_core(self, incident: Incident) -> tuple[Path, list[layout.Registers]]:
        """Where the core goes, and the registers that were recorded. Its disk may block."""
        own, core = self.store.path(incident.id), core_path(self.policy, self.store, incident.id)
        try:
            cpus = list(layout.parse_registers(json.loads((own / "record.json").read_bytes())["registers"]))
        except FileNotFoundError:
            cpus = []
        if core.parent != own:
            core.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return core, cpus
