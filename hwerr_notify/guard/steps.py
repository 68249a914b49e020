# SPDX-License-Identifier: MIT
"""Stop, record, release, seal; then the guest is FROZEN. And keep.

Each step may be done any number of times, ends within its limit, and is saved, with what
it found, before the next begins. So a daemon that is killed at any point goes on
where it was. What a step has done is judged by what the kernel shows, not by what
QEMU answers: threads out of KVM_RUN, no image open or locked, the seal in force.

FROZEN is said when all of that holds at once, after the seal, because until then
somebody else's `cont` could undo it. If a step fails the guest is not FROZEN, but it
is sealed all the same if it can be: what was stopped for an error should not run on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import disks, layout, net, outside
from .dump import Dumped, write_core
from .errors import Fault, GuardError, MonitorError, Refused
from .fault import fault_point
from .kernel import KernelGuard
from .monitor import Monitor, together, whatever_fails
from .policy import Policy
from .process import Process, Thread
from .seal import Sealer
from .store import FREEZING, Incident, Step, Store, write_durably
from .vm import Machine, Vm, describe, look

__all__ = ["Steps", "a_bug", "core_path", "in_event_path", "lost_monitor"]

log = logging.getLogger("hwerr-guard")

ReleaseHooks = Callable[[Vm, Incident], Any]

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


def a_bug(error: Exception) -> str:
    """What nobody has thought of, for people. The log has all of it."""
    return f"a bug: {type(error).__name__}: {error}"


def lost_monitor(incident: Incident) -> bool:
    """Whether it failed because QEMU's monitor was away."""
    failed = (step for step in incident.steps.values() if step.state == "failed")
    return incident.state == "failed" and any(step.facts.get("monitor") == "lost" for step in failed)


def in_event_path(cause: dict[str, Any], process: Process) -> int | None:
    """When (CLOCK_MONOTONIC, ns) the kernel stopped the process's guests before the cause's record could be
    read, as that record says; None if it did not."""
    mine = [s for s in cause.get("stops") or () if process.is_of(s["pid"], s["start_ns"])]
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

    async def save(self, incident: Incident) -> Incident:
        """Durable when it returns. Fault if the disk would not take it."""
        turn = self.store.turn(incident.id)
        try:
            async with asyncio.timeout(self.policy.limits["record"]):
                await asyncio.to_thread(self.store.save, incident, turn)
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise Fault(f"{self.store.root} did not take the record in time") from None
            raise Fault(f"{error.filename or self.store.root}: {error.strerror}") from None
        except Exception as error:
            log.exception("incident %s cannot be saved", incident.id)
            raise Fault(a_bug(error)) from None
        self.saved.add(incident.id)
        return incident

    async def freeze(self, vm: Vm, incident: Incident) -> Incident:
        """From where the incident is, to FROZEN, failed or gone. Never raises for what a step meets.

        That it has begun is saved while the guest is being stopped. If the kernel has stopped it in the event
        path, its record says so to a daemon that comes after this one, as the guard does, which outlives
        this one: then the stop is saved first.
        """
        known = (
            not incident.steps and vm.armed is None and in_event_path(incident.cause, vm.process) is not None
        )
        begun = None if known else asyncio.ensure_future(self.save(incident))
        steps = {"stop": self._stop, "record": self._record, "release": self._release, "seal": self._seal}
        failed = False
        step = Step("failed", 0, 0)
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
                        await self._talk(vm, step)
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
            if name != FREEZING[-1]:
                incident, failed = await self._keep_going(vm, incident, name, failed)
            if await self._has_ended(vm, failed):
                return await self._gone(incident)
        if not failed:
            try:
                await self._verify_in_time(vm, incident)
                now = time.time_ns()
                incident = replace(
                    self.latest(incident), state="frozen", frozen_ns=now, frozen_mono_ns=time.monotonic_ns()
                )
                await self.save(incident)
                fault_point("after-seal")
                return incident
            except Exception as error:
                if not vm.process.alive():
                    return await self._gone(incident)
                incident = self._unsealed(incident, error)
        return await self._save_anyway(replace(incident, state="failed", frozen_ns=0, frozen_mono_ns=0))

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

    async def _talk(self, vm: Vm, before: Step) -> None:
        """Waits for a monitor that is away, and then for QEMU to stop what it could not be told to before."""
        if vm.connected and "monitor" not in before.facts:
            return
        await vm.await_monitor()
        await self._stop_qemu(vm, by_kernel=True)

    async def _keep_going(self, vm: Vm, incident: Incident, name: str, failed: bool) -> tuple[Incident, bool]:
        """Saves a step; one that cannot be saved has failed."""
        try:
            await self.save(incident)
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
        if not incident.done("release"):
            # An earlier try may have had no other seal, and what is to be released must answer.
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
            how = "by the kernel, on command" if first is None else "by the kernel, in the event path"
            facts |= {"mono_ns": first or stopped.mono_ns, "vcpus": stopped.vcpus}
        fault_point("inside-stop")
        try:
            async with asyncio.timeout(0.6 * self.policy.limits["stop"]):
                facts["status"] = await self._stop_qemu(vm, by_kernel)
        except (MonitorError, TimeoutError) as error:
            why = str(error) or "QEMU's monitor does not answer"
            if not by_kernel:
                raise MonitorError(why) from None
            facts["monitor"] = why
        await self._out_of_guest(vm, stopped=by_kernel)
        return Step("done", began, time.time_ns(), how, facts)

    @staticmethod
    async def _stop_qemu(vm: Vm, by_kernel: bool) -> str:
        """QEMU's run state when it has stopped its devices, too. Fault, MonitorError."""
        await vm.await_monitor()
        monitor = vm.need_monitor()
        if by_kernel:
            # QEMU finds out by itself, and remembers that the guest must not go on. But not while all
            # vCPUs sleep: the kernel's request wakes none, and is met by one that would run.
            with suppress(TimeoutError):
                async with asyncio.timeout(_NOTICES_WITHIN):
                    while await vm.status() == "running":
                        await vm.changed.wait()
                        vm.changed.clear()
        status: str
        _, status = await together(monitor.execute("stop"), vm.status())
        if status in ("running", "inmigrate"):
            raise Fault(f"QEMU was told to stop and says {status}")
        return status

    async def _out_of_guest(self, vm: Vm, *, stopped: bool, sealed: bool = False) -> None:
        """Waits until no thread is inside the guest. Fault, just before the step's time is over.

        `stopped`: the kernel has told every vCPU to stop; `sealed`: no KVM_RUN is begun any more.
        """
        deadline = time.monotonic() + 0.3 * self.policy.limits["stop"]
        while True:
            threads = await asyncio.to_thread(vm.process.threads)
            inside = [t for t in threads if self._inside(vm, t, stopped, sealed)]
            if not inside:
                return
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
        monitor = vm.need_monitor()
        vm.machine, said, status, version = await together(
            look(monitor, vm.process, vm.machine),
            describe(monitor),
            vm.status(),
            monitor.execute("query-version"),
        )
        argv = await asyncio.to_thread(vm.process.cmdline)
        record = {
            "incident": incident.id,
            "cause": incident.cause,
            "events": incident.events,
            "vm": {"name": vm.name, "uuid": vm.uuid, "pid": vm.process.pid, "argv": argv},
            "status": status,
            "version": version,
            "machine": vm.machine.to_json(),
            **said,
        }
        path = self.store.path(incident.id) / "record.json"
        data = json.dumps(record).encode() + b"\n"
        await asyncio.to_thread(write_durably, path, data, lambda: fault_point("inside-record"))
        return Step("done", began, time.time_ns(), path.name, {"machine": vm.machine.to_json()})

    # -- release -------------------------------------------------------------

    async def _release(self, vm: Vm, incident: Incident, began: int) -> Step:
        monitor = vm.need_monitor()
        # An earlier try may have closed what would tell now.
        known = incident.steps["record"].facts.get("machine")
        if known:
            vm.machine = Machine.from_json(known)
        machine = vm.machine
        # What cannot be released spares nothing else.
        (backends, taps), devices, released, _ = await whatever_fails(
            self._release_network(vm, monitor),
            asyncio.to_thread(net.stop_dma, vm.process),
            disks.release(
                monitor,
                vm.process,
                frozenset(machine.images),
                poisoned=bool(incident.poison),
                given=machine.given,
            ),
            asyncio.to_thread(outside.nothing_else, vm.process, machine.devices),
        )
        await asyncio.to_thread(self._network_is_gone, vm)
        if released.detached and machine.remotes:
            said = "QEMU says its disks are gone, and is connected to"
            await asyncio.to_thread(self._disconnected, vm, said)
        fault_point("inside-release")
        await self.hooks(vm, incident)
        facts = {"detached": released.detached, "backends": backends, "taps": taps, "devices": devices}
        parts = [f"disks {released.how}"]
        parts += (
            [f"network {', '.join(vm.machine.taps) or 'backends'} off"] if backends or vm.machine.taps else []
        )
        parts += [f"bus mastering of {', '.join(devices)} off"] if devices else []
        return Step("done", began, time.time_ns(), "; ".join(parts), facts)

    @staticmethod
    async def _release_network(vm: Vm, monitor: Monitor) -> tuple[list[str], list[str]]:
        backends = await net.release_backends(monitor)
        taps = await net.release_taps(list(vm.machine.taps), vm.process)
        fault_point("amid-release")
        return backends, taps

    @staticmethod
    def _network_is_gone(vm: Vm) -> None:
        """Fault if not. In a thread, as all looks at the process."""
        if still := vm.process.taps():
            raise Fault(f"QEMU says its network is gone, and holds {', '.join(still)}")
        for tap, state in net.tap_states(list(vm.machine.taps), vm.process.pid).items():
            if state["up"] or state["bridged"]:
                raise Fault(
                    f"{tap} is {'up' if state['up'] else 'on a bridge'} again: something else sets it"
                )

    @staticmethod
    def _disconnected(vm: Vm, what: str) -> None:
        """Fault if it is connected to what may be its disks. Blocks."""
        machine = vm.machine
        if still := outside.connected(vm.process, frozenset(machine.remotes), frozenset(machine.peers)):
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
        )
        # Somebody may have let it go on before the seal, which a vCPU meets when it leaves the guest.
        self.kernel.stop(vm.process)
        facts = {"weaker": sealed.weaker, "process": sealed.process}
        return Step("weaker" if sealed.weaker else "done", began, time.time_ns(), sealed.how, facts)

    async def _verify_in_time(self, vm: Vm, incident: Incident) -> None:
        """`_verify`, within the time that the seal has: an image on a server that is dead does not answer."""
        limit = self.policy.limits["seal"]
        try:
            async with asyncio.timeout(limit):
                await self._verify(vm, incident)
        except TimeoutError:
            raise Fault(f"what was released could not be looked at again within {limit:g} s") from None

    async def _verify(self, vm: Vm, incident: Incident) -> None:
        """What FROZEN says, looked at again, all of it after the seal. Fault if something does not hold."""
        if not self.sealer.holds(vm.process, incident.steps["seal"].facts):
            raise Fault("the seal is not in force any more")
        # Once more: the seal bars a vCPU that begins KVM_RUN, not one that is asleep within it.
        stopped = not isinstance(self.kernel.stop(vm.process), str)
        await self._out_of_guest(vm, stopped=stopped, sealed=True)
        await asyncio.to_thread(self._released, vm, bool(incident.steps["release"].facts.get("detached")))
        # Last: of a process that has ended nothing is seen, and all looks well.
        if not vm.process.alive():
            raise Fault("QEMU has ended")

    def _released(self, vm: Vm, detached: bool) -> None:
        machine = vm.machine
        held = disks.still_held(vm.process, frozenset(machine.images), machine.given)
        if any(h.locked or detached for h in held):
            raise Fault(f"QEMU has taken back {', '.join(h.path for h in held)}")
        if detached:
            self._disconnected(vm, "QEMU has taken back")
        outside.nothing_else(vm.process, machine.devices)
        self._network_is_gone(vm)
        net.dma_is_stopped(vm.process)

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
