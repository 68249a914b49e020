# SPDX-License-Identifier: MIT
"""The daemon: finds VMs, reads events, freezes, tells.

It sleeps until something happens: a record, a monitor's event, a socket that appears, a
process that ends, a client. Whatever it does with one VM is one task, so a monitor that
hangs holds up nobody else.
"""

from __future__ import annotations

import asyncio
import gc
import glob
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from .. import device as hwerr
from .. import message as message  # what an event needs is loaded before one comes
from ..aio import Watch
from ..enums import Flags, GuestFlags, Severity, Source
from ..event import Event, Memory, Stop, build, parse
from ..event import Guest as GuestHit
from ..jsonform import boot_id
from ..names import qemu_identity
from . import decide, net
from .control import Control
from .cursor import Cursor
from .errors import (
    CannotBeginError,
    Fault,
    GuardError,
    MonitorError,
    NobodyListensError,
    NoSuchError,
    Refused,
)
from .fault import fault_point
from .front import Front
from .inotify import DirectoryWatch
from .kernel import KernelGuard
from .metrics import Metrics
from .monitor import Monitor, QmpMonitor, answer, sent
from .notify import notify, watchdog_interval
from .policy import Policy, VmPolicy
from .process import TICK_NS, Process
from .seal import Sealer
from .steps import Asked, Steps, a_bug, core_path, in_event_path, lost_monitor
from .store import Incident, Step, Store, no_such
from .tell import Teller
from .threads import Threads
from .vm import Machine, Vm, identity, safe_name

__all__ = ["Guard"]

log = logging.getLogger("hwerr-guard")

# How long an error waits for QEMU to be told, seconds: as long as QEMU takes to find out that it is stopped.
_HEAD_START = 0.01

# A cluster that did not take what it was told is told again after so many seconds, first.
_CLUSTER_RETRY_FIRST = 1.0
# The cluster was told before, maybe, and may have acted, ns.
_CLUSTER_ACTS_AFTER = 2_000_000_000

# A monitor that cannot be had is asked again after so many seconds, first and at most.
_RETRY_FIRST, _RETRY_MOST = 0.05, 60.0

# How long after a socket was made somebody listens on it, seconds.
_LISTENS_WITHIN = 5.0
# The record of an error that the kernel has stopped a VM for already.
_RECORD_WITHIN = 3.0

# How long the first try at all monitors may hold up the start, seconds.
_FIRST_TRY = 5.0

# How long a process that was killed may take to end before an operator is told that it does not, seconds. A
# large guest's memory is given back in that time.
_ENDS_WITHIN = 30.0

# Threads for what blocks, made as they are needed. One that looks at a file on a dead server, or writes to
# a disk that does not answer, does not come back: others must be left.
_THREADS = 64

# As many as the steps of one VM use at the same time.
_AT_ONCE = 4

# How long a thread may keep Python's lock that another wants, seconds.
_SWITCH = 0.0005

# In so many turns of the event loop a record that is there is read and dealt with.
_TURNS = 8

# Events that a subscriber may be behind with before it is cut off.
_BACKLOG = 1024


class Guard:
    """All of it. `run()` returns after SIGTERM or SIGINT."""

    def __init__(self, policy: Policy, device: str) -> None:
        self.policy = policy
        self.device_path = device
        self.store = Store(policy.state_dir)
        self.sealer = Sealer()
        self.teller = Teller(policy)
        self.metrics = Metrics(self)
        self.corrected = decide.Corrected()
        self.device: hwerr.Device | None = None
        self._events: hwerr.Device | None = None
        self.kernel = KernelGuard(None)
        self.steps = Steps(policy, self.store, self.kernel, self.sealer, self._release_hooks)
        self.steps.latest = self._merged
        self.cursor = Cursor(policy.run_dir / "cursor", device)
        self._handled = 0  # seq of the last record
        self._begun: dict[str, int] = {}  # incidents that may not be on disk yet, and the record of each
        self._looked = False  # whether what was there at the start is dealt with
        self._learning: dict[str, asyncio.Task[Any]] = {}
        self._errors: dict[tuple[int, int] | None, _Errors] = {}
        self.vms: dict[tuple[int, int], Vm] = {}
        self.incidents: dict[str, Incident] = {}
        self.damaged: list[str] = []
        self.unreachable: dict[str, str] = {}
        self.fronts: dict[tuple[int, int], Front] = {}
        self.subscribers: set[asyncio.Queue[dict[str, Any] | None]] = set()
        self.lost = 0
        self._sockets: dict[str, asyncio.Task[None]] = {}
        self._tried: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._libvirts: list[Any] = []
        self._stop = asyncio.Event()
        self._reading: asyncio.Task[Any] | None = None
        self._device_watch: DirectoryWatch | None = None
        # Why no errors are read, None if they are.
        self.why_deaf: str | None = f"{device}: not looked at"
        # Set, and replaced, to have monitors that are away tried at once.
        self._hurry = asyncio.Event()
        # Incidents that were tried once more when their monitor was there again.
        self._again: set[str] = set()
        self._cluster: dict[str, asyncio.Lock] = {}

    # -- life ------------------------------------------------------------------

    async def run(self) -> None:
        """CannotBeginError; what goes wrong later is told, and it goes on.

        GuardError if it cannot read errors any more.
        """
        # Threads here do little but wait for the kernel; the one that talks to QEMU must not wait for them.
        sys.setswitchinterval(_SWITCH)
        control = Control(self, self.policy.run_dir / "control")
        try:
            self._prepare()
            await control.start()
            watch = DirectoryWatch(self._scan)
        except GuardError as error:
            raise CannotBeginError(str(error)) from None
        stop = self._stop
        loop = asyncio.get_running_loop()
        loop.set_default_executor(threads := Threads(_THREADS, "hwerr-guard"))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        try:
            await self._first_look(watch)
            # What a freeze needs is there before one comes: threads, code that has run once, and no memory
            # that a collection of garbage looks through which is not garbage until the end.
            threads.begin(_AT_ONCE)
            _rehearse()
            gc.collect()
            gc.freeze()
            self._listen()
            self.spawn(self.cursor.keep(self._done))
            self.spawn(self._watchdog())
            await self.metrics.start()
            notify(f"READY=1\nSTATUS={self._hears()}")
            log.info("guarding %d VMs", len(self.vms))
            await stop.wait()
            reading = self._reading
            if reading is not None and _failed(reading):
                # Whoever started it starts it again; it would be deaf.
                raise GuardError(f"{self.device_path}: no more errors can be read: {reading.exception()!r}")
        finally:
            notify("STOPPING=1")
            watch.close()
            if self._device_watch is not None:
                self._device_watch.close()
            await self.metrics.close()
            await control.close()
            await self._end()

    def _prepare(self) -> None:
        self.store.prepare()
        try:
            self.policy.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GuardError(f"{self.policy.run_dir}: {error.strerror}: name a writable run_dir") from None
        try:
            self._open_device()
        except OSError:
            log.error("%s: no hardware errors are seen until it is there", self.why_deaf)
        if (reason := self.kernel.missing()) and self.device is not None:
            log.warning("VMs are stopped through QEMU, not in the event path: %s", reason)
        self.sealer.open()
        if self.sealer.why_weaker:
            log.warning("weaker seal, the cgroup freezer: %s", self.sealer.why_weaker)
        if reason := net.missing():
            log.error("a guest with a network cannot be FROZEN: %s", reason)

    def _open_device(self) -> None:
        """Errors are seen from here on. OSError; GuardError if it shows this process's own only."""
        try:
            self.device = hwerr.open(self.device_path, module=True, names=False)
            if self.device.info().scope != "all":
                raise GuardError(f"{self.device_path}: not permitted: run as root (CAP_SYS_ADMIN)")
            # From before any VM is looked at: what comes in between is not missed.
            self._events = self._open_events(self.cursor.since(self.device))
            self.why_deaf = None
        except BaseException as error:
            if self.device is not None:
                self.device.close()
            self.device = None
            self.why_deaf = f"{self.device_path}: {getattr(error, 'strerror', None) or error}"
            raise
        finally:
            self.kernel = self.steps.kernel = KernelGuard(self.device)

    def _hears(self) -> str:
        """For systemctl status."""
        return f"deaf: {self.why_deaf}" if self.why_deaf else "errors are read"

    def _listen(self) -> None:
        """Reads events from now on, or as soon as there is a device."""
        if self._events is None:
            try:
                self._device_watch = DirectoryWatch(self._device_came)
                self._device_watch.add(Path(self.device_path).parent)
            except GuardError as error:
                log.error("%s is not waited for: %s", self.device_path, error)
            # Since it was looked for.
            self._device_came()
            return
        self._reading = reading = self.spawn(self._read_events())
        reading.add_done_callback(lambda task: self._stop.set() if _failed(task) else None)

    def _device_came(self) -> None:
        """Maybe: something was made where it should be."""
        if self._events is not None or not Path(self.device_path).exists():
            return
        before = self.why_deaf
        try:
            self._open_device()
        except (OSError, GuardError):
            if self.why_deaf != before:
                log.error("%s: no hardware errors are seen", self.why_deaf)
            return
        log.warning("%s is there: hardware errors are seen from now on", self.device_path)
        notify(f"STATUS={self._hears()}")
        if self._device_watch is not None:
            self._device_watch.close()
            self._device_watch = None
        for vm in self.vms.values():
            if vm.incident is None:
                self._arm(vm)
                self._arm_kvm(vm)
        self._listen()

    def _open_events(self, since: hwerr.Since) -> hwerr.Device:
        more: dict[str, Any] = {"severity": self._least(), "module": True, "names": False}
        try:
            return hwerr.open(self.device_path, since=since, **more)
        except ValueError:
            # The numbers are others than those that were noted.
            return hwerr.open(self.device_path, since="boot", **more)

    async def _end(self) -> None:
        for task in [*self._tasks, *self._sockets.values()]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._sockets.values(), return_exceptions=True)
        for front in self.fronts.values():
            await front.close()
        for vm in self.vms.values():
            if vm.monitor is not None:
                await vm.monitor.aclose()
        if self._handled:
            self.cursor.write(self._done())
        self.sealer.close()
        self.store.close()
        for device in (self.device, self._events):
            if device is not None:
                device.close()

    def spawn(self, job: Any) -> asyncio.Task[Any]:
        """A task that is cancelled at the end, and whose failure is logged."""
        task = asyncio.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task failed: %r", error, exc_info=error)

    async def _watchdog(self) -> None:
        interval = watchdog_interval()
        while interval:
            notify("WATCHDOG=1")
            await asyncio.sleep(interval)

    # -- finding VMs -------------------------------------------------------------

    async def _first_look(self, watch: DirectoryWatch) -> None:
        """What there is, then what an earlier run of the daemon left to do."""
        self._watch = watch
        self._load_incidents()
        # Nothing of these is written any more. In a thread: the disk of the dumps may not answer.
        alive = {vm.incident for vm in self.vms.values()}
        dead = [incident for incident in self.incidents.values() if incident.id not in alive]
        self.spawn(asyncio.to_thread(self._forget_parts, dead))
        for vm in [v for v in self.vms.values() if v.policy.front]:
            await self._start_front(vm)
        self._scan()
        if any(policy.libvirt for policy in self.policy.vms):
            from .libvirt import Libvirt

            for uri in {p.libvirt for p in self.policy.vms if p.libvirt}:
                libvirt = Libvirt(uri, self)
                self._libvirts.append(libvirt)
                self._tried[uri] = libvirt.tried
                self.spawn(libvirt.run())
        # The first try at each socket; a monitor that hangs is not waited for.
        first = [asyncio.create_task(tried.wait()) for tried in self._tried.values()]
        if first:
            await asyncio.wait(first, timeout=_FIRST_TRY)
        for waiting in first:
            waiting.cancel()
        await self._adopt_guarded()
        for incident in list(self.incidents.values()):
            self._take_up(incident)
        # The records say why; what was stopped and has none comes last.
        for event in self._events.drain() if self._events else ():
            self._handle(event)
            await asyncio.sleep(0)
        self._looked = True
        for vm in list(self.vms.values()):
            self._stopped_while_away(vm)
        self.spawn(self._prune())

    async def _adopt_guarded(self) -> None:
        """VMs that an earlier run has armed and whose monitor cannot be had: the kernel stops them all the
        same, and that must not happen in silence. Those of which the policy wants nothing are let go."""

        def is_known(guard: hwerr.Guard) -> bool:
            return any(vm.process.is_of(guard.pid, guard.start_ns) for vm in self.vms.values())

        for guard in self.kernel.kept():
            if is_known(guard):
                continue
            try:
                process = Process.open(guard.pid, guard.start_ns // TICK_NS)
            except ProcessLookupError:
                continue
            argv: list[str] = []
            with suppress(TimeoutError):
                async with asyncio.timeout(_FIRST_TRY):
                    argv = await asyncio.to_thread(process.cmdline)
            said, uuid = qemu_identity(argv)
            name = safe_name(said) or f"pid-{process.pid}"
            policy = self.policy.vm(name) or (VmPolicy(qmp="/none") if guard.stops else None)
            if policy is None:
                log.info("process %d (%s): not of this policy any more: disarmed", process.pid, name)
                self.kernel.disarm(process)
            if policy is None or is_known(guard):
                process.close()
                continue
            vm = Vm(name, str(uuid) if uuid else None, process, policy, policy.qmp or policy.libvirt or "")
            self._adopt(vm)
            self._arm(vm)
            log.warning(
                "VM %s (process %d): an earlier run has armed it; its monitor is not reached",
                name, process.pid,
            )  # fmt: skip

    def _scan(self) -> None:
        """A task for each socket that matches and has none."""
        for policy in self.policy.vms:
            if policy.qmp is None:
                continue
            try:
                for directory in _directories(policy.qmp):
                    self._watch.add(directory)
            except GuardError as error:
                self.cannot_reach(policy.qmp, str(error))
            for path in glob.glob(policy.qmp):
                if path not in self._sockets:
                    self._serve(path)

    def _serve(self, path: str) -> None:
        self._tried[path] = asyncio.Event()
        task = self._sockets[path] = self.spawn(self._serve_socket(path))
        task.add_done_callback(lambda _: self._forget_socket(path))

    def _forget_socket(self, path: str) -> None:
        self._tried.pop(path).set()
        self._sockets.pop(path, None)
        if not Path(path).exists():
            self.unreachable.pop(path, None)

    async def _serve_socket(self, path: str) -> None:
        """Keeps a monitor connected as long as its socket exists."""
        wait = _RETRY_FIRST
        while Path(path).exists():
            try:
                vm = await self._connect(path)
            except Exception as error:
                self.cannot_reach(path, error)
                self._tried[path].set()
                # One that was just made is listened on at once. Another process makes the file anew.
                if isinstance(error, NobodyListensError) and wait > _LISTENS_WITHIN:
                    return
                hurried = await self.pause(wait)
                wait = _RETRY_FIRST if hurried else min(2 * wait, _RETRY_MOST)
                continue
            wait = _RETRY_FIRST
            self.unreachable.pop(path, None)
            self._tried[path].set()
            if vm is None:
                return
            assert vm.monitor is not None
            await vm.monitor.closed.wait()

    def cannot_reach(self, where: str, error: Exception | str) -> None:
        """Shown by `status` until it is reached; logged when it begins, or is for another reason."""
        why = str(error)
        if isinstance(error, OSError):
            why = error.strerror or str(error)
        elif isinstance(error, Exception) and not isinstance(error, GuardError):
            why = a_bug(error)
        if self.unreachable.get(where) != why:
            bug = None if isinstance(error, str | OSError | GuardError) else error
            log.warning("%s: not guarded: %s", where, why, exc_info=bug)
        self.unreachable[where] = why

    async def pause(self, seconds: float) -> bool:
        """Before what is away is tried again. Whether somebody is in a hurry for it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await self._hurry.wait()
        return False

    def _look_for_monitor(self, vm: Vm) -> None:
        """It is needed now: whoever waits before the next try does not wait any longer."""
        if vm.connected:
            return
        before, self._hurry = self._hurry, asyncio.Event()
        before.set()
        if vm.policy.qmp is not None and vm.where and vm.where not in self._sockets:
            self._serve(vm.where)

    async def _connect(self, path: str) -> Vm | None:
        """The VM behind a socket, None if the policy wants none of it."""
        found: list[Vm] = []
        early: list[dict[str, Any]] = []

        def on_event(event: dict[str, Any]) -> None:
            if found:
                self.monitor_event(found[0], event)
            else:
                early.append(event)

        monitor = await QmpMonitor.connect(Path(path), on_event)
        try:
            if not await asyncio.to_thread(_listens, monitor.pid, path):
                raise MonitorError(
                    f"{path}: process {monitor.pid}, which made it, has it no longer: let QEMU itself make it"
                )
            name, uuid = await identity(monitor)
            name = name or Path(path).stem
            policy = self.policy.vm(name, path)
            if policy is None:
                await monitor.aclose()
                return None
            vm = await self.add(name, uuid, monitor.pid, policy, path, monitor)
        except BaseException:
            await monitor.aclose()
            raise
        found.append(vm)
        for event in early:
            self.monitor_event(vm, event)
        return vm

    async def add(
        self, name: str, uuid: str | None, pid: int, policy: VmPolicy, where: str, monitor: Monitor
    ) -> Vm:
        """A VM whose monitor has just been connected: new, or one that lost its monitor."""
        process = Process.open(pid)
        known = self.vms.get((process.pid, process.start_ticks))
        if known is not None:
            process.close()
            vm = known
            old, vm.monitor = vm.monitor, monitor
            vm.missed()
            if old is not None and old is not monitor:
                await old.aclose()
            vm.where = where
            self._once_more(vm)
        else:
            vm = Vm(name, uuid, process, policy, where, monitor)
            self._adopt(vm)
        vm.policy = policy
        if vm.incident is None:
            # First: a monitor that hangs now is no reason not to stop it when it is hit.
            self._arm(vm)
            await vm.look_anew()
            self._arm_kvm(vm)
            # Asked again when it is needed.
            with suppress(Refused):
                await vm.ask_once()
            if vm.machine.taps:
                await asyncio.to_thread(net.get_ready)
            for what in vm.machine.devices:
                log.warning("VM %s: %s is not released by this version: it cannot be FROZEN", vm.name, what)
        if policy.front and vm.key not in self.fronts:
            await self._start_front(vm)
        log.info("VM %s (process %d): guarded", vm.name, vm.process.pid)
        await self._unheard(vm)
        return vm

    async def _unheard(self, vm: Vm) -> None:
        """What happened while nobody listened. MonitorError."""
        monitor = vm.need_monitor()
        status = await vm.status(monitor)
        if status not in ("running", "inmigrate", "suspended"):
            vm.halted.set()
        if status == "io-error" and not await _io_failed(monitor):
            # Out of space, say: QEMU goes on when it is told to, as nothing is broken.
            return
        if vm.incident is None and status in ("internal-error", "guest-panicked", "io-error"):
            self._found_stopped(vm, status)

    async def look_again(self, vm: Vm) -> None:
        """At one whose events may have been lost, while its monitor is there."""
        # Without it there is none to ask, and it is asked when there is.
        with suppress(MonitorError):
            await self._unheard(vm)

    def _arm(self, vm: Vm) -> None:
        severity = vm.policy.freeze_severity
        if severity is None or vm.policy.freeze_kinds or "hardware" not in vm.policy.freeze_on:
            vm.armed = "the policy is not one that the kernel could follow"
            # An earlier run may have had another policy; what its guard did already is still acted upon.
            if self.kernel.stopped_ns(vm.process) is None:
                self.kernel.disarm(vm.process)
        else:
            vm.armed = self.kernel.arm(vm.process, severity)

    @staticmethod
    def _arm_kvm(vm: Vm) -> None:
        if not vm.machine.kvm:
            # The kernel takes a guard for a VM that is yet to be made.
            vm.armed = vm.armed or "it does not run under KVM"

    async def _start_front(self, vm: Vm) -> None:
        """Without one, which is logged, the VM is guarded all the same."""
        front = Front(vm, self.policy.run_dir / "front", self)
        # A VM chooses its own name, but does not take another's clients by it.
        for other in [f for f in self.fronts.values() if f.path == front.path]:
            if other.vm.process.alive():
                log.warning(
                    "VM %s (process %d): no front: it is that of process %d",
                    vm.name, vm.process.pid, other.vm.process.pid,
                )  # fmt: skip
                return
            await other.close()
            self.fronts.pop(other.vm.key, None)
        try:
            await front.start()
        except OSError as error:
            log.warning("VM %s: no front: %s: %s", vm.name, front.path, error.strerror or error)
            return
        self.fronts[vm.key] = front

    def _adopt(self, vm: Vm) -> None:
        self.vms[vm.key] = vm
        # As an earlier run has found it.
        vm.degraded = self.teller.reason("degraded", vm.name, self._marker(vm))
        asyncio.get_running_loop().add_reader(vm.process.pidfd, self._process_ended, vm)

    def _process_ended(self, vm: Vm) -> None:
        asyncio.get_running_loop().remove_reader(vm.process.pidfd)
        self.spawn(self._after_end(vm))

    async def _after_end(self, vm: Vm) -> None:
        self.vms.pop(vm.key, None)
        if vm.work is not None and not vm.work.done():
            await asyncio.wait([vm.work], timeout=sum(self.policy.limits.values()))
        if front := self.fronts.pop(vm.key, None):
            await front.close()
        if vm.monitor is not None:
            await vm.monitor.aclose()
        for what in ("frozen", "failed", "degraded"):
            self.teller.unmark(what, vm.name, self._marker(vm))
        incident = self.incidents.get(vm.incident or "")
        try:
            if incident is not None and incident.state == "clearing":
                await self._cleared(incident)
            elif incident is not None and incident.open:
                note = "QEMU ended without `clear`; its memory is lost unless it was dumped"
                incident = await self._put(replace(incident, state="gone", notes=(*incident.notes, note)))
                await self._tell("gone", vm, incident)
        finally:
            self.sealer.release(vm.process)
            vm.process.close()
            vm.gone.set()
        log.info("VM %s: its process has ended", vm.name)
        await self._prune()

    # -- after a restart -----------------------------------------------------------

    def _load_incidents(self) -> None:
        for found in self.store.all():
            if isinstance(found, GuardError):
                log.error("%s", found)
                self.damaged.append(str(found))
                continue
            self.incidents[found.id] = found
            if not found.open or found.boot_id != boot_id():
                continue
            with suppress(ProcessLookupError):
                process = Process.open(found.pid, found.start_ticks)
                policy = self.policy.vm(found.vm, found.monitor) or VmPolicy(qmp=found.monitor)
                vm = Vm(found.vm, found.uuid, process, policy, found.monitor, incident=found.id)
                # As it was when it was hit, which is later than when its monitor was connected.
                recorded = found.steps["record"].facts.get("machine") if "record" in found.steps else None
                try:
                    vm.machine = Machine.from_json(recorded or found.machine)
                except (KeyError, TypeError, ValueError) as error:
                    log.error("incident %s: what its VM is like cannot be read: %r", found.id, error)
                self._adopt(vm)

    def _take_up(self, incident: Incident) -> None:
        """Goes on with an incident of an earlier run."""
        if not incident.open:
            # The attribute goes with the boot.
            if incident.untold and incident.boot_id == boot_id():
                self.spawn(self._clear_again(incident))
            return
        vm = next((v for v in self.vms.values() if v.incident == incident.id), None)
        if vm is None:
            self.spawn(self._gone_while_away(incident))
            return
        if self._learn_poison(incident.id, self._poison_of(vm)):
            self._save_learnt(vm, incident.id)
        if incident.state == "clearing":
            self.spawn(self._go_on_clearing(vm))
        elif incident.state != "failed":
            self._work(vm, self.incidents[incident.id])
        else:
            _not_told(vm.name, self._mark(vm, "failed"))
            if incident.untold:
                self.spawn(self._failed_again(vm, incident.id))

    async def _gone_while_away(self, incident: Incident) -> None:
        if incident.state == "clearing":
            await self._cleared(incident)
            return
        note = "when hwerr-guard started, its process was gone"
        incident = await self._put(replace(incident, state="gone", notes=(*incident.notes, note)))
        facts = _facts(incident)
        self.publish({"event": "INCIDENT_GONE", **facts})
        _not_told(incident.vm, await self.teller.hooks("gone", facts))

    def _stopped_while_away(self, vm: Vm) -> None:
        """The kernel's guard may have stopped it while nobody read the file."""
        if vm.incident is None and (at := self.kernel.stopped_ns(vm.process)) is not None:
            stopped = [e for e in self._records(vm) if any(self._stopped(vm, e))]
            if not stopped:
                self.spawn(self._stopped_without_record(vm))
                return
            form = stopped[-1].to_json()
            at = in_event_path(form, vm.process) or at
            self.begin(vm, {**form, "layer": "hardware", "stopped": True, "stopped_mono_ns": at})

    async def _stopped_without_record(self, vm: Vm) -> None:
        """Just now: the kernel stops a VM before memory_failure(), whose record comes after it, and begins
        the incident. Or by an earlier run, for what QEMU had said, that ended before it could save that.
        """
        await asyncio.sleep(_RECORD_WITHIN)
        at = self.kernel.stopped_ns(vm.process)
        if vm.incident is None and vm.process.alive() and at is not None:
            message = "the kernel's guard stopped it; no record says why"
            cause = {"layer": "unknown", "message": message, "stopped": True, "stopped_mono_ns": at}
            self.begin(vm, cause)

    @staticmethod
    def _stopped(vm: Vm, event: Event) -> Iterator[bool]:
        return (g.stopped and vm.process.is_of(g.pid, g.start_ns) for g in event.guests)

    def _records(self, vm: Vm) -> list[Event]:
        """What the kernel still holds of uncorrected errors that hit the VM, oldest first."""
        try:
            with hwerr.open(
                self.device_path, severity=Severity.DEFERRED, pid=vm.process.pid, since="boot", module=True,
                names=False,
            ) as device:  # fmt: skip
                return [
                    e for e in device.drain() if any(vm.process.is_of(g.pid, g.start_ns) for g in e.guests)
                ]
        except OSError:
            return []

    @staticmethod
    def _poison(vm: Vm, event: Event) -> list[tuple[int, int, int]]:
        found = [decide.poisoned(event, g) for g in event.guests if vm.process.is_of(g.pid, g.start_ns)]
        return [page for page in found if page is not None]

    def _poison_of(self, vm: Vm) -> list[tuple[int, int, int]]:
        """All that the kernel's records know, of whatever the policy did not freeze for, too."""
        return [page for event in self._records(vm) for page in self._poison(vm, event)]

    def _learn_poison(self, incident_id: str, pages: Iterable[tuple[int, int, int]]) -> bool:
        """Whether any of them is new."""
        known = self.incidents[incident_id]
        poison = tuple(dict.fromkeys((*known.poison, *pages)))
        if poison == known.poison:
            return False
        self.incidents[incident_id] = replace(known, poison=poison)
        return True

    def _save_learnt(self, vm: Vm, incident_id: str) -> None:
        """After the work that is under way, which takes it up."""
        if incident_id in self._learning:
            return

        async def save() -> None:
            saved = None
            while (now := self.incidents[incident_id]).poison != saved:
                if vm.work is not None and not vm.work.done():
                    await asyncio.wait([vm.work])
                else:
                    saved = (await self._put(now)).poison

        self._learning[incident_id] = task = self.spawn(save())
        task.add_done_callback(lambda _: self._learning.pop(incident_id, None))

    # -- events ----------------------------------------------------------------------

    def _least(self) -> Severity:
        least = Severity.FATAL
        for vm in self.policy.vms:
            wanted = [vm.tell_severity, Severity.RECOVERABLE, vm.freeze_severity or Severity.FATAL]
            wanted += [Severity.CORRECTED] if vm.degraded else []
            least = min(least, *wanted)
        return least

    async def _read_events(self) -> None:
        if self._events is None:
            return
        async for event in Watch(self._events):
            if early := self._ask_early(event):
                # All else that an error brings with it is done while QEMU does what it is told.
                await asyncio.wait([asking for _, asking in early], timeout=_HEAD_START)
                await sent()
            self._handle(event)
            for vm, asking in early:
                incident = self.incidents.get(vm.incident or "")
                begun = incident is not None and incident.state == "freezing" and not incident.steps
                await self.steps.take_early(vm.incident if begun else None, asking)
            # A storm of records leaves everything else its turn.
            await asyncio.sleep(0)

    def _ask_early(self, event: Event) -> list[tuple[Vm, asyncio.Task[Asked]]]:
        """Tells QEMU of each VM that the kernel has stopped for the error."""
        early: list[tuple[Vm, asyncio.Task[Asked]]] = []
        for guest in event.guests:
            # Which is always frozen.
            vm = self._vm_of(guest) if guest.stopped else None
            if vm is None or vm.incident is not None or any(vm is other for other, _ in early):
                continue
            if asking := self.steps.ask_early(vm):
                early.append((vm, asking))
        return early

    def _vm_of(self, guest: GuestHit) -> Vm | None:
        return next((v for v in self.vms.values() if v.process.is_of(guest.pid, guest.start_ns)), None)

    def _handle(self, event: Event) -> None:
        self.lost += event.lost
        self.metrics.count(event)
        try:
            self._event(event)
        except Exception:
            log.exception("record %d", event.seq)
        self._handled = event.seq
        self.cursor.moved()

    def _done(self) -> int:
        """Up to which record nothing is left to do: not beyond one whose incident is not on disk."""
        self._begun = {i: seq for i, seq in self._begun.items() if i not in self.steps.saved}
        if self._begun:
            self.cursor.moved()
        return min((seq - 1 for seq in self._begun.values()), default=self._handled)

    def _event(self, event: Event) -> None:
        seen: set[tuple[int, int]] = set()
        for guest in event.guests:
            vm = self._vm_of(guest)
            if vm is None:
                continue
            known = self.incidents.get(vm.incident or "")
            if known and (page := decide.poisoned(event, guest)) and self._learn_poison(known.id, [page]):
                self._save_learnt(vm, known.id)
            if vm.key in seen:
                continue
            seen.add(vm.key)
            what = decide.decide(event, guest, vm.policy)
            if full := self.corrected.add(event, guest, vm.policy):
                self._degraded(vm, full)
            if what is None:
                continue
            form = event.to_json()
            if what == "freeze":
                # Its work comes before that of those who are told.
                cause = {**form, "layer": decide.layer_of(event), "stopped": guest.stopped}
                self.begin(vm, cause, tuple(self._poison(vm, event)))
            self.publish({"event": "HARDWARE_ERROR", "vm": vm.name, "error": form})
            if front := self.fronts.get(vm.key):
                front.hardware_error(event)
            if what != "freeze":
                self._tell_error(vm, event, form)
        if event.flags & (Flags.OWNERS_UNKNOWN | Flags.OWNERS_TRUNCATED) and (
            event.severity >= Severity.RECOVERABLE
        ):
            form = event.to_json()
            self.publish({"event": "HARDWARE_ERROR", "vm": None, "error": form})
            self._tell_error(None, event, form)

    def _tell_error(self, vm: Vm | None, event: Event, form: dict[str, Any]) -> None:
        """One telling of a VM's errors at a time, of `None` those whose VM is not known; what comes meanwhile
        is told after it together, the worst of it in full."""
        key = vm.key if vm else None
        if (waiting := self._errors.get(key)) is not None:
            waiting.add(event.severity, form)
            return
        waiting = self._errors[key] = _Errors()
        waiting.add(event.severity, form)

        async def tell() -> None:
            try:
                while waiting.count:
                    worst, others = waiting.take()
                    if vm is None:
                        log.warning("an error of which not all owners are known: %s", worst["message"])
                    await self._tell("error", vm, None, error=worst, others=others)
            finally:
                del self._errors[key]

        self.spawn(tell())

    def _degraded(self, vm: Vm, full: decide.Exceeded) -> None:
        text = f"{full.errors} corrected errors of {full.unit} within {full.threshold.within:g} s"
        vm.degraded = text
        log.warning("VM %s is degraded: %s", vm.name, text)
        with suppress(Fault):
            self.teller.mark("degraded", vm.name, {**self._marker(vm), "reason": text})
        self.publish({"event": "DEGRADED", "vm": vm.name, "reason": text})
        self.spawn(self._tell("degraded", vm, None, reason=text))

    def undegrade(self, vm: Vm) -> None:
        """On command: its errors are counted anew from now on. GuardError if it is not degraded."""
        if vm.degraded is None:
            raise GuardError(f"{vm.name} is not degraded")
        log.warning("VM %s is not degraded any more, on command; it was: %s", vm.name, vm.degraded)
        vm.degraded = None
        self.corrected.forget(vm.process)
        self.teller.unmark("degraded", vm.name, self._marker(vm))
        self.publish({"event": "DEGRADED_CLEARED", "vm": vm.name})

    def monitor_event(self, vm: Vm, event: dict[str, Any]) -> None:
        vm.heard(event)
        if front := self.fronts.get(vm.key):
            front.pass_on(event)
        if vm.incident is not None:
            return
        if found := decide.of_qmp(event, vm.policy):
            layer, text = found
            self.begin(vm, {"layer": layer, "message": text, "qmp": event})
        elif event.get("event") == "STOP":
            self.spawn(self._why_stopped(vm))

    async def _why_stopped(self, vm: Vm) -> None:
        # The kernel's record and QEMU's event are there at the same time: it is read first.
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        if vm.incident is not None:
            return
        with suppress(MonitorError):
            status = await vm.status()
            # The record that says why comes first if there is one: the kernel wrote it before QEMU knew.
            if vm.incident is None and status == "internal-error":
                self._found_stopped(vm, status)

    def _found_stopped(self, vm: Vm, status: str) -> None:
        layer = {"internal-error": "kvm", "guest-panicked": "panic", "io-error": "block"}[status]
        if status == "internal-error" and self.kernel.stopped_ns(vm.process) is not None:
            # At the start the records that nobody has read yet come first.
            if self._looked:
                self._stopped_while_away(vm)
        elif layer in vm.policy.freeze_on:
            self.begin(vm, {"layer": layer, "message": f"QEMU stopped the guest: {status}"})

    # -- incidents ----------------------------------------------------------------------

    def begin(self, vm: Vm, cause: dict[str, Any], poison: tuple[tuple[int, int, int], ...] = ()) -> Incident:
        """A new incident of the VM, or its open one with another event; its work goes on by itself."""
        known = self.incidents.get(vm.incident or "")
        if known is not None and known.open:
            if "seq" not in cause or all(e.get("seq") != cause["seq"] for e in (known.cause, *known.events)):
                known = replace(known, events=(*known.events, cause)[-64:])
                self.incidents[known.id] = known
            return known
        # A command first goes to disk: nobody else would know of it.
        if not cause.get("stopped") and cause.get("layer") != "command":
            done = self.kernel.stop(vm.process)
            if not isinstance(done, str):
                cause = {**cause, "stopped": True, "stopped_mono_ns": done.mono_ns}
        incident = Incident(
            id=self.store.new_id(vm.name, vm.process.pid),
            boot_id=boot_id() or "",
            vm=vm.name,
            uuid=vm.uuid,
            pid=vm.process.pid,
            start_ticks=vm.process.start_ticks,
            monitor=vm.where,
            cause=cause,
            began_ns=time.time_ns(),
            began_mono_ns=time.monotonic_ns(),
            poison=poison,
            machine=vm.machine.to_json(),
        )
        vm.incident = incident.id
        self.incidents[incident.id] = incident
        self._look_for_monitor(vm)
        self._learn_poison(incident.id, self._poison_of(vm))
        if "seq" in cause:
            self._begun[incident.id] = cause["seq"]
        log.warning("VM %s: incident %s: %s", vm.name, incident.id, cause.get("message"))
        self._work(vm, self.incidents[incident.id])
        return self.incidents[incident.id]

    def retry(self, vm: Vm, incident: Incident) -> None:
        """A failed freeze once more; what was recorded first stays."""
        incident = _anew(incident)
        self.incidents[incident.id] = incident
        self._look_for_monitor(vm)
        self._work(vm, incident)

    def _once_more(self, vm: Vm) -> None:
        """Its monitor was connected: a freeze that failed because it was away is tried again, once."""
        vm.reconnected.set()
        incident = self.incidents.get(vm.incident or "")
        if incident is not None and lost_monitor(incident) and incident.id not in self._again:
            self._again.add(incident.id)
            log.warning("VM %s: its monitor is there again: it is frozen once more", vm.name)
            self.retry(vm, incident)

    def _work(self, vm: Vm, incident: Incident) -> None:
        before = vm.work

        async def work() -> None:
            if before is not None and not before.done():
                await asyncio.wait([before])
            await self._through(vm, incident)

        vm.work = self.spawn(work())

    async def _put(self, incident: Incident) -> Incident:
        """Takes over what was learnt meanwhile, saves, and shows it; a disk that refuses is a note."""
        self.incidents[incident.id] = incident = self._merged(incident)
        try:
            await self.steps.save(incident)
        except Fault as error:
            log.error("incident %s: not on disk: %s", incident.id, error)
        return incident

    async def _through(self, vm: Vm, incident: Incident) -> None:
        """All that is left to do for an incident. What nobody has thought of is a failure like others."""
        try:
            await self._do(vm, incident)
        except Exception as error:
            log.exception("VM %s: incident %s", vm.name, incident.id)
            now = self.incidents[incident.id]
            if now.state == "freezing":
                why = a_bug(error)
                failed = await self._put(replace(now, state="failed", notes=(*now.notes, why)))
                await self._told_failed(vm, failed, step=None, reason=why)

    async def _freeze(self, vm: Vm, incident: Incident) -> Incident:
        """Once more, if its monitor went away and is there again already."""
        before = vm.monitor
        done = await self.steps.freeze(vm, replace(incident, state="freezing"))
        if lost_monitor(done) and vm.monitor is not before and vm.connected and done.id not in self._again:
            self._again.add(done.id)
            log.warning("VM %s: its monitor was away: it is frozen once more", vm.name)
            done = await self.steps.freeze(vm, _anew(self._merged(done)))
        return done

    async def _do(self, vm: Vm, incident: Incident) -> None:
        if incident.state in ("freezing", "failed"):
            if incident.cause.get("layer") == "command" and not incident.steps:
                incident = await self._put(incident)
            fault_point("begin")
            incident = await self._freeze(vm, incident)
        elif incident.state == "frozen":
            incident = await self.steps.confirm(vm, incident)
        was, incident = incident, self._merged(incident)
        self.incidents[incident.id] = incident
        if incident != was:
            incident = await self._put(incident)
        if incident.state == "gone":
            await self._tell("gone", vm, incident)
            return
        if incident.state != "frozen":
            step = next((n for n, s in incident.steps.items() if s.state == "failed"), None)
            why = incident.steps[step].detail if step else "; ".join(incident.notes)
            log.error("VM %s is not frozen: %s: %s", vm.name, step or incident.state, why)
            if incident.state == "failed":
                await self._told_failed(vm, incident, step=step, reason=why)
            return
        await self._told(vm, incident)
        incident = self.incidents[incident.id]
        if self.policy.dump and not incident.done("keep"):
            await self.dump(vm)

    def _merged(self, incident: Incident, step: str = "") -> Incident:
        """With what was learnt meanwhile; with `step`, of its steps only that one is its own."""
        now = self.incidents.get(incident.id, incident)
        steps = {**now.steps, step: incident.steps[step]} if step else incident.steps
        return replace(incident, events=now.events, poison=now.poison, steps=steps)

    async def _told(self, vm: Vm, incident: Incident) -> None:
        if incident.done("tell"):
            # The marker is not on disk: it goes with the boot, and the process.
            _not_told(vm.name, self._mark(vm, "frozen"))
            return
        began = time.time_ns()
        fault_point("before-tell")
        facts = _facts(incident)
        failed = self._mark(vm, "frozen")
        self.metrics.frozen(incident)
        if front := self.fronts.get(vm.key):
            try:
                front.frozen(incident)
            except Exception as error:
                log.exception("VM %s: its front", vm.name)
                failed.append(f"the front: {a_bug(error)}")
        self.publish({"event": "GUEST_FROZEN", **facts})
        log.warning("VM %s is FROZEN (incident %s)", vm.name, incident.id)
        fault_point("inside-tell")
        # Each has its time: a hook that takes all of it does not make the cluster's answer unknown, nor is
        # it forgotten when the cluster is told again.
        hooks, refused = await asyncio.gather(
            self._in_time("hooks", self.teller.hooks("frozen", facts)),
            self._in_time("the cluster", self._push(vm, incident.id)),
        )
        failed += hooks
        _not_told(vm.name, (*failed, *refused))
        step = Step(
            "failed" if failed or refused else "done", began, time.time_ns(), "; ".join((*failed, *refused))
        )
        await self._put(incident.with_step("tell", step))
        fault_point("after-tell")
        if refused:
            self.spawn(self._push_again(vm, incident.id, step, failed))

    async def _in_time(self, whose: str, job: Awaitable[list[str]]) -> list[str]:
        """What failed, within the time that telling has."""
        limit = self.policy.limits["tell"]
        try:
            async with asyncio.timeout(limit):
                return await job
        except TimeoutError:
            return [f"{whose}: not done within {limit:g} s"]

    def _mark(self, vm: Vm, what: Literal["frozen", "failed"]) -> list[str]:
        """Makes that marker, then removes the other, so that there is always one. What failed."""
        try:
            self.teller.mark(what, vm.name, self._marker(vm))
        except Fault as error:
            return [str(error)]
        finally:
            self.teller.unmark("failed" if what == "frozen" else "frozen", vm.name, self._marker(vm))
        return []

    async def _told_failed(self, vm: Vm, incident: Incident, **more: Any) -> None:
        """The cluster recovers it as it would without a guard, and fences this node if it must."""
        _not_told(vm.name, self._mark(vm, "failed"))
        untold = self.policy.pacemaker_resource is not None
        self.incidents[incident.id] = incident = replace(incident, untold=untold)
        # A disk that does not answer is not waited for.
        saved = asyncio.ensure_future(self._put(incident)) if untold else None
        _, refused = await asyncio.gather(
            self._tell("failed", vm, incident, **more),
            # What was FROZEN may run elsewhere: that one is not to be taken for it.
            self._push_failed(vm, incident.id, late=bool(incident.frozen_ns)),
        )
        if saved is not None:
            await saved
        _not_told(vm.name, refused)
        if refused:
            self.spawn(self._failed_again(vm, incident.id))
        elif untold:
            await self._put(replace(self.incidents[incident.id], untold=False))

    async def _failed_again(self, vm: Vm, incident_id: str) -> None:
        """Until the cluster has taken it."""

        def wanted() -> bool:
            return self.incidents[incident_id].state == "failed"

        if (
            await self._until_taken(wanted, lambda: self._push_failed(vm, incident_id, late=True))
            and wanted()
        ):
            incident = await self._put(replace(self.incidents[incident_id], untold=False))
            log.warning("VM %s: the cluster is told", vm.name)
            self.publish({"event": "INCIDENT_TOLD", **_facts(incident)})

    def _alone(self, name: str) -> asyncio.Lock:
        """What the cluster is told of a VM must come in the order in which it became so."""
        return self._cluster.setdefault(name, asyncio.Lock())

    async def _push(self, vm: Vm, incident_id: str) -> list[str]:
        """That it is FROZEN, while it is so; what failed."""
        async with self._alone(vm.name):
            refused = []
            if self.incidents[incident_id].state == "frozen":
                late = time.time_ns() - self.incidents[incident_id].frozen_ns > _CLUSTER_ACTS_AFTER
                refused = await self.teller.push(vm.name, incident_id, late)
        if self.incidents[incident_id].state != "frozen":
            return await self._clear(vm.name)
        return refused

    async def _push_failed(self, vm: Vm, incident_id: str, late: bool = False) -> list[str]:
        """That it could not be frozen, while that is so; what failed."""
        async with self._alone(vm.name):
            if self.incidents[incident_id].state != "failed":
                return []
            return await self.teller.push_failed(vm.name, late)

    async def _clear(self, name: str) -> list[str]:
        """Takes the attribute back, if no VM of that name has an open incident; what failed."""
        async with self._alone(name):
            return await self.teller.cleared(name) if self._nothing_open(name)() else []

    async def _clear_again(self, incident: Incident) -> None:
        """Until the cluster has taken it, or there is another reason for the attribute."""
        await self._until_taken(self._nothing_open(incident.vm), lambda: self._clear(incident.vm))
        await self._put(replace(self.incidents[incident.id], untold=False))

    async def _push_again(self, vm: Vm, incident_id: str, step: Step, failed: list[str]) -> None:
        """Until the cluster has taken it. Its attribute is what moves the guest: once is not enough."""

        def wanted() -> bool:
            return self.incidents[incident_id].state == "frozen"

        if await self._until_taken(wanted, lambda: self._push(vm, incident_id)) and wanted():
            step = Step("failed" if failed else "done", step.began_ns, time.time_ns(), "; ".join(failed))
            incident = await self._put(self.incidents[incident_id].with_step("tell", step))
            log.warning("VM %s: the cluster is told", vm.name)
            self.publish({"event": "INCIDENT_TOLD", **_facts(incident)})

    async def _until_taken(self, wanted: Callable[[], bool], job: Callable[[], Awaitable[list[str]]]) -> bool:
        """Does it again, ever more seldom, until nothing fails; False if it is not wanted any more."""
        wait = _CLUSTER_RETRY_FIRST
        while wanted():
            # A cluster that comes back raises no event here.
            await asyncio.sleep(wait)
            wait = min(2 * wait, _RETRY_MOST)
            if not wanted():
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(self.policy.limits["tell"]):
                    if not await job():
                        return True
        return False

    async def dump(self, vm: Vm) -> Incident:
        """Dumps a stopped VM's memory, by its incident's own record."""
        incident = self.incidents[vm.incident or ""]
        kept = await self.steps.keep(vm, incident)
        # The cluster may have taken what it was told meanwhile.
        incident = await self._put(self._merged(kept, "keep"))
        step = incident.steps["keep"]
        log.info("VM %s: dump: %s", vm.name, step.detail)
        if step.state == "done":
            await self._tell("dumped", vm, incident)
            await asyncio.to_thread(self._forget_old_dumps)
        return incident

    def _forget_old_dumps(self) -> None:
        """Of closed incidents only the newest keep their core. Blocks."""
        closed = [i for i in list(self.incidents.values()) if not i.open and i.dump]
        for incident in sorted(closed, key=lambda i: i.id, reverse=True)[self.policy.dump_retain :]:
            assert incident.dump is not None
            with suppress(OSError):
                os.unlink(incident.dump["path"])

    def _forget_parts(self, dead: list[Incident]) -> None:
        """What dumps have left that did not come to an end. Blocks."""
        for incident in dead:
            core = core_path(self.policy, self.store, incident.id)
            with suppress(OSError):
                core.with_name(f".{core.name}.part").unlink()

    async def _prune(self) -> None:
        """Of closed incidents only the newest are kept, and of their cores fewer."""
        await asyncio.to_thread(self._forget_old_dumps)
        closed = [i for i in self.incidents.values() if not i.open and not i.untold]
        for incident in sorted(closed, key=lambda i: i.id, reverse=True)[self.policy.incidents_retain :]:
            await asyncio.to_thread(self.store.remove, incident)
            self.incidents.pop(incident.id, None)

    async def clear(self, incident_id: str) -> Incident:
        """Ends the process, takes the seal back. GuardError."""
        incident = self.incidents.get(incident_id)
        if incident is None:
            raise no_such(incident_id)
        if not incident.open:
            raise GuardError(f"incident {incident_id} is {incident.state} already")
        vm = next((v for v in self.vms.values() if v.incident == incident_id), None)
        if vm is not None and vm.work is not None and not vm.work.done():
            raise GuardError(f"incident {incident_id} is being worked on: see `hwerr-guard status`")
        if vm is None:
            return await self._cleared(incident)
        # Until its process has ended it is not cleared, and a daemon that comes after this one goes on.
        await self._put(replace(incident, state="clearing"))
        fault_point("clearing")
        await self._end_process(vm)
        return self.incidents.get(incident_id, replace(incident, state="cleared"))

    async def _end_process(self, vm: Vm) -> None:
        """And what follows from it, which is `_after_end`. GuardError if it does not end in time."""
        if vm.process.alive():
            vm.process.kill()
        try:
            async with asyncio.timeout(_ENDS_WITHIN):
                await vm.gone.wait()
        except TimeoutError:
            if not vm.process.alive():
                # It has ended; that is being told.
                await vm.gone.wait()
                return
            raise GuardError(
                f"killed; process {vm.process.pid} does not end (a thread of it waits in the kernel): "
                f"incident {vm.incident} is cleared when it does"
            ) from None

    async def _go_on_clearing(self, vm: Vm) -> None:
        try:
            await self._end_process(vm)
        except GuardError as error:
            log.error("VM %s: %s", vm.name, error)

    async def _cleared(self, incident: Incident) -> Incident:
        """Its process has ended."""
        untold = self.policy.pacemaker_resource is not None and incident.boot_id == boot_id()
        incident = await self._put(replace(incident, state="cleared", untold=untold))
        if refused := await self._clear(incident.vm):
            _not_told(incident.vm, refused)
            self.spawn(self._clear_again(incident))
        elif untold:
            incident = await self._put(replace(incident, untold=False))
        facts = _facts(incident)
        self.publish({"event": "INCIDENT_CLEARED", **facts})
        _not_told(incident.vm, await self.teller.hooks("cleared", facts))
        return incident

    def _nothing_open(self, name: str) -> Callable[[], bool]:
        """Whether no VM of that name has an open incident: then its attribute should be gone."""
        return lambda: not any(i.open and i.vm == name for i in self.incidents.values())

    # -- telling --------------------------------------------------------------------------

    @staticmethod
    def _marker(vm: Vm) -> dict[str, Any]:
        """packaging/ocf/guest reads it line by line with sed: keep it flat."""
        return {"pid": vm.process.pid, "start_ticks": vm.process.start_ticks, "incident": vm.incident}

    async def _tell(self, occasion: str, vm: Vm | None, incident: Incident | None, **more: Any) -> None:
        facts: dict[str, Any] = {"vm": vm.name if vm else None, "uuid": vm.uuid if vm else None}
        if vm and incident:
            facts = _facts(incident)
        if occasion not in ("error", "degraded"):
            self.publish({"event": f"INCIDENT_{occasion.upper()}", **facts, **more})
        _not_told(vm.name if vm else "?", await self.teller.hooks(occasion, {**facts, **more}))

    async def _release_hooks(self, vm: Vm, incident: Incident) -> None:
        if failed := await self.teller.hooks("release", _facts(incident)):
            raise Fault("; ".join(failed))

    def publish(self, event: dict[str, Any]) -> None:
        """To everyone who follows; one that does not read is cut off."""
        event = {"time_ns": time.time_ns(), **event}
        for queue in list(self.subscribers):
            try:
                queue.put_nowait(event)
            except asyncio.QueueFull:
                self.subscribers.discard(queue)
                queue.get_nowait()
                queue.put_nowait(None)

    def subscribe(self) -> asyncio.Queue[dict[str, Any] | None]:
        """Events from now on; None is the end."""
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(_BACKLOG)
        self.subscribers.add(queue)
        return queue

    def find(self, name: str) -> Vm:
        """A VM by name, UUID or process number. GuardError if there is none or several."""
        found = [v for v in self.vms.values() if name in (v.name, v.uuid, str(v.process.pid))]
        if not found:
            known = ", ".join(sorted(v.name for v in self.vms.values())) or "none"
            raise NoSuchError(f"no VM {name} is guarded; there are: {known}")
        if len(found) > 1:
            pids = ", ".join(str(v.process.pid) for v in found)
            raise GuardError(f"{len(found)} VMs are named {name}: name one by its process number: {pids}")
        return found[0]

    def state(self, vm: Vm) -> str:
        """guarded, or its incident's state."""
        incident = self.incidents.get(vm.incident or "")
        return incident.state if incident is not None and incident.open else "guarded"

    def status(self) -> dict[str, Any]:
        """For `hwerr-guard status --json`. Asks nobody: it always answers."""
        return {
            "daemon": os.getpid(),
            "policy": str(self.policy.path),
            "kernel_guard": self.kernel.missing() or "ok",
            "seal": self.sealer.why_weaker or "ok",
            "events": self.why_deaf or "ok",
            "network": net.missing() or "ok",
            "lost": self.lost,
            "vms": [self._vm_status(vm) for vm in sorted(self.vms.values(), key=lambda v: v.name)],
            "incidents": [summary(i) for i in sorted(self.incidents.values(), key=lambda i: i.id)],
            "unreachable": self.unreachable,
            "damaged": self.damaged,
        }

    def _vm_status(self, vm: Vm) -> dict[str, Any]:
        incident = self.incidents.get(vm.incident or "")
        return {
            "name": vm.name,
            "uuid": vm.uuid,
            "pid": vm.process.pid,
            "start_ticks": vm.process.start_ticks,
            "state": self.state(vm),
            "weaker": _weaker(incident) if incident is not None and incident.open else None,
            "stopped_by": "qemu" if vm.armed else "kernel",
            "why_not_kernel": vm.armed,
            "monitor": vm.where if vm.connected else None,
            "incident": vm.incident,
            "degraded": vm.degraded,
            "refused_runs": self.sealer.refusals(vm.process),
            "refused_opens": self.sealer.refused_opens(vm.process),
            "refused_connects": self.sealer.refused_connects(vm.process),
            "dumping": list(vm.progress) if vm.progress else None,
        }


def _rehearse() -> None:
    """Reads an event like one that stops a VM: the first takes several times as long as those after it."""
    marks = GuestFlags.KVM | GuestFlags.STOPPED
    hit = GuestHit(1, marks, start_ns=1, gpa=0, hva=4096, len=4096)
    made = build(
        Memory(0, 4096), hit, Stop(1, 1, 1, 1), severity=Severity.RECOVERABLE, source=Source.MEMORY_FAILURE
    )
    for event in parse(made.raw):
        json.dumps(event.to_json())


def _anew(incident: Incident) -> Incident:
    """To be frozen once more: what was recorded first stays."""
    steps = {n: s for n, s in incident.steps.items() if n == "record" and s.state != "failed"}
    return replace(incident, state="freezing", steps=steps, untold=False)


def _weaker(incident: Incident) -> bool | None:
    """Whether its seal is the weaker one; None if it has none."""
    return bool(incident.steps["seal"].facts.get("weaker")) if "seal" in incident.steps else None


def _facts(incident: Incident) -> dict[str, Any]:
    """What is told of it."""
    return {
        "vm": incident.vm,
        "uuid": incident.uuid,
        "pid": incident.pid,
        "incident": incident.id,
        "state": incident.state,
        "cause": incident.cause,
        "frozen_mono_ns": incident.frozen_mono_ns,
        "weaker": _weaker(incident),
    }


def _not_told(name: str, why: Iterable[str]) -> None:
    for failed in why:
        log.error("VM %s: telling: %s", name, failed)


def _listens(pid: int, path: str) -> bool:
    """Whether that process has the socket. ProcessLookupError."""
    process = Process.open(pid)
    try:
        return process.listens_on(path)
    finally:
        process.close()


def summary(incident: Incident) -> dict[str, Any]:
    """An incident in a few fields."""
    failed = next((name for name, step in incident.steps.items() if step.state == "failed"), None)
    return {
        "id": incident.id,
        "vm": incident.vm,
        "pid": incident.pid,
        "state": incident.state,
        "open": incident.open,
        "weaker": _weaker(incident),
        "message": incident.cause.get("message"),
        "failed_step": failed,
        "why": incident.steps[failed].detail if failed else "; ".join(incident.notes) or None,
        "dump": incident.dump["path"] if incident.dump else None,
    }


def _directories(pattern: str) -> list[Path]:
    """Those in which something may appear because of which more matches a glob pattern."""
    found, level = [], [Path("/")]
    for part in Path(pattern).parts[1:-1]:
        if glob.has_magic(part):
            found += level
            level = [Path(p) for d in level for p in glob.glob(f"{glob.escape(str(d))}/{part}/")]
        else:
            level = [d / part for d in level]
    return found + level


async def _io_failed(monitor: Monitor) -> bool:
    """Whether a disk has failed, and not only run out of space. MonitorError."""
    devices = answer(await monitor.execute("query-block"), list, "query-block")
    return any(isinstance(d, dict) and d.get("io-status") == "failed" for d in devices)


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None


class _Errors:
    """Errors of one VM that wait to be told: the worst, and how many."""

    def __init__(self) -> None:
        self.count = 0
        self._worst: tuple[Severity, dict[str, Any]] | None = None

    def add(self, severity: Severity, form: dict[str, Any]) -> None:
        self.count += 1
        if self._worst is None or severity >= self._worst[0]:
            self._worst = severity, form

    def take(self) -> tuple[dict[str, Any], int]:
        """The worst, the last of several, and how many others there were."""
        assert self._worst is not None
        found = self._worst[1], self.count - 1
        self.count, self._worst = 0, None
        return found
