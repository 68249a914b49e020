# SPDX-License-Identifier: MIT
"""hwerr-guard: a guest that an error hits is stopped, released, sealed, kept, told of."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guarded import LIMIT, Daemon, agent, counter, few, guest_config, vcpu_time
from hit import Injector
from probed import Service, bad_disk
from testbed import inject, pagemap, vfio
from testbed.core import core_bytes, core_ranges
from testbed.guest import COUNTER_GPA, Guest, GuestConfig
from testbed.qmp import Qmp, QmpError
from testbed.records import MCI_ADDRV, MCI_EN, MCI_MISCV, MCI_S, MCI_UC, MCI_VAL, AerRecord, MceRecord
from testbed.victim import Victim
from testbed.wait import until

import hwerr_notify
from hwerr_notify import probe
from hwerr_notify.bpf import Seal

pytestmark = pytest.mark.amd

HIT_GPA = 0x200000
CLUSTER = ("cibadmin", "attrd_updater", "crm_node", "crm_resource")
PAGE = 4096


@pytest.fixture
def home() -> Path:
    """Sockets cannot be bound in the checkout."""
    path = Path("/run/hwerr-test") / uuid.uuid4().hex[:8]
    path.mkdir(parents=True)
    return path


def image(home: Path, name: str = "disk.qcow2", form: str = "qcow2") -> Path:
    path = home / name
    subprocess.run(["qemu-img", "create", "-q", "-f", form, str(path), "16M"], check=True)
    return path


def disk_options(disk: Path) -> tuple[str, ...]:
    return (
        "-blockdev", f"driver=qcow2,node-name=d0,file.driver=file,file.filename={disk}",
        "-device", "virtio-blk-pci,drive=d0,id=vd0",
    )  # fmt: skip


def hit(guest: Guest, gpa: int = HIT_GPA) -> None:
    """An uncorrected error in the guest's memory: memory_failure() on the page."""
    inject.hwpoison(pagemap.pfn_of(guest.pid, guest.gpa2hva(gpa)))


def locked_by_nobody(path: Path) -> bool:
    """Whether another QEMU could have the image."""
    argv = ["qemu-io", "-f", path.suffix[1:], "-c", "write -P 7 0 4096", str(path)]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def tries_to_run(monitor: Qmp, *commands: str) -> None:
    """Tells QEMU all of it, refused or not, until it says that the guest does not run."""
    for command in commands:
        with contextlib.suppress(QmpError):
            monitor.execute(command)
    while monitor.execute("query-status")["running"]:
        monitor.wait_event("STOP")


def takes_back(monitor: Qmp, disk: Path) -> None:
    """Tells QEMU to open the image again, and to write to it: it cannot."""
    link = disk.with_suffix(".link")
    os.link(disk, link)
    for name in (disk, link):
        for read_only in (False, True):
            with pytest.raises(QmpError, match="Operation not permitted"):
                monitor.execute(
                    "blockdev-add",
                    driver="qcow2",
                    **{"node-name": "again", "read-only": read_only},
                    file={"driver": "file", "filename": str(name)},
                )
    link.unlink()
    with contextlib.suppress(QmpError):
        monitor.execute("human-monitor-command", **{"command-line": f'qemu-io "{disk}" "write -P 9 0 4096"'})


def is_handed(monitor: Qmp, disk: Path, locking: str) -> None:
    """Gives QEMU the image as an open file, and tells it to write to it: it cannot."""
    with disk.open("r+b") as file, socket.socket(fileno=os.dup(monitor._fd)) as sock:
        socket.send_fds(sock, [b" "], [file.fileno()])
        monitor.execute("add-fd", fdset_id=9)
    node = {"node-name": f"handed-{locking}", "driver": "file", "filename": "/dev/fdset/9"}
    monitor.execute("blockdev-add", **node, locking=locking)
    writes(monitor, node["node-name"])


def writes(monitor: Qmp, node: str) -> None:
    """Tells QEMU to write nines to one of its nodes; what comes of it it says elsewhere."""
    with contextlib.suppress(QmpError):
        monitor.execute("human-monitor-command", **{"command-line": f'qemu-io {node} "write -P 9 0 4096"'})


# -- the whole -----------------------------------------------------------------


def stopped_by(incident: dict[str, Any]) -> str:
    """What stopped it. A vCPU's interrupt may come late where CPUs are emulated, and the record says so."""
    detail = str(incident["steps"]["stop"]["detail"])
    (stop,) = incident["cause"]["stops"]
    assert ("asked in" in detail) == bool(stop["running"])
    return detail.replace("asked in", "in")


def test_an_error_freezes_the_guest_for_good(home: Path) -> None:
    disk = image(home)
    extra = (*disk_options(disk), "-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0")
    with Guest.start(guest_config("web1", home, *extra)) as guest, Daemon(home) as daemon:
        assert daemon.vm("web1")["state"] == "guarded"
        assert daemon.vm("web1")["stopped_by"] == "kernel", daemon.said()
        assert daemon.run("status", "web1").returncode == 0
        assert not locked_by_nobody(disk)
        hva = guest.gpa2hva(COUNTER_GPA)
        with daemon.follow() as events:
            hit(guest)
            told = events.next("GUEST_FROZEN", "INCIDENT_FAILED")
            assert told["event"] == "GUEST_FROZEN", daemon.said()
            assert not told["weaker"]
            before = vcpu_time(guest), counter(guest, hva)
            dumped = events.next("INCIDENT_DUMPED", "INCIDENT_FAILED")
        assert dumped["event"] == "INCIDENT_DUMPED", daemon.said()
        (incident,) = daemon.incidents()
        assert incident["state"] == "frozen"
        assert incident["cause"]["stopped"]
        assert stopped_by(incident) == "by the kernel, in the event path"
        assert locked_by_nobody(disk)
        content = disk.read_bytes()

        assert guest.qmp is not None
        tries_to_run(guest.qmp, "cont")
        tries_to_run(guest.qmp, "system_reset", "cont")
        tries_to_run(guest.qmp, "system_wakeup", "cont", "system_reset", "cont")
        os.kill(guest.pid, signal.SIGCONT)
        tries_to_run(guest.qmp, "stop", "cont")
        assert counter(guest, hva) == before[1]
        assert [t for t, _ in vcpu_time(guest)] == [t for t, _ in before[0]]
        assert daemon.vm("web1")["refused_runs"] > 0
        takes_back(guest.qmp, disk)
        for how in ("on", "off"):
            refused = daemon.vm("web1")["refused_opens"]
            assert refused > 0
            is_handed(guest.qmp, disk, how)
            assert daemon.vm("web1")["refused_opens"] > refused, how
        assert disk.read_bytes() == content
        assert locked_by_nobody(disk)
        assert guest.alive()

        (incident,) = daemon.incidents()
        core = Path(incident["dump"]["path"])
        assert [hex(HIT_GPA), PAGE] in incident["dump"]["skipped"]
        assert core_bytes(core, COUNTER_GPA, 4) == before[1].to_bytes(4, "little")
        assert core_bytes(core, HIT_GPA, PAGE) == bytes(PAGE)

        done = daemon.run("status", "web1")
        assert done.returncode == 10
        assert "FROZEN" in done.stdout
        assert json.loads(daemon.run("inspect", incident["id"]).stdout)["state"] == "frozen"
        done = daemon.run("clear", incident["id"])
        assert done.returncode == 0, done.stderr
        assert not guest.alive()
        assert core.exists()
        assert daemon.incidents()[0]["state"] == "cleared"
        assert daemon.stop() == 0
    with Seal.open_pinned() as seal:
        assert guest.pid not in seal.sealed()


@pytest.mark.parametrize("why", ["command", "error"])
def test_a_guest_that_sleeps(home: Path, why: str) -> None:
    """Its vCPUs have halted, interrupts off: nothing but QEMU's own stop wakes them."""
    with (
        Guest.start(guest_config("web1", home, code="halt", smp=2)) as guest,
        Daemon(home) as daemon,
        daemon.follow() as events,
    ):
        if why == "command":
            done = daemon.run("freeze", "web1")
            assert (done.returncode, done.stderr) == (0, ""), daemon.said()
        else:
            hit(guest)
        told = events.next("GUEST_FROZEN", "INCIDENT_FAILED")
        assert told["event"] == "GUEST_FROZEN", daemon.said()
        before = vcpu_time(guest)
        assert guest.qmp is not None
        tries_to_run(guest.qmp, "cont", "system_reset", "cont")
        assert [t for t, _ in vcpu_time(guest)] == [t for t, _ in before]


def test_only_the_guest_that_was_hit(home: Path) -> None:
    """Errors on neighbours, on other processes, of lesser severity: nothing happens."""
    with (
        Guest.start(guest_config("web1", home)) as guest,
        Guest.start(guest_config("db1", home)) as other,
        Guest.start(guest_config("spare", home)) as unguarded,
        Victim() as victim,
        Daemon(home, vm='name = "[wd]*"') as daemon,
        daemon.follow() as events,
    ):
        assert {v["name"] for v in daemon.status()["vms"]} == {"web1", "db1"}
        # Corrected, in the guest that must go on.
        hpa = other.gpa2hpa(HIT_GPA)
        inject.mce(MceRecord(status=MCI_VAL | MCI_EN | MCI_ADDRV | 8 << 16, bank=4, addr=hpa))
        inject.hwpoison(victim.memory.pfn)
        hit(unguarded)
        # Records come in order: what these had done would have been done before this is told.
        hit(guest)
        first = events.next("GUEST_FROZEN", "INCIDENT_FAILED")
        assert (first["event"], first["vm"]) == ("GUEST_FROZEN", "web1")
        assert [v["state"] for v in daemon.status()["vms"]] == ["guarded", "frozen"]
        assert (other.status(), unguarded.status()) == ("running", "running")
        assert len(daemon.incidents()) == 1


@pytest.mark.long
def test_an_error_while_the_daemon_is_away(home: Path) -> None:
    with Guest.start(guest_config("web1", home)) as guest, Daemon(home) as daemon:
        assert daemon.vm("web1")["state"] == "guarded"
        daemon.kill()
        with hwerr_notify.open(pid=guest.pid) as device:
            hit(guest)
            (event, *_) = device.read(30)
        assert [stop.pid for stop in event.stops] == [guest.pid]
        daemon.start()
        incident = daemon.await_state(("frozen", "failed"), "web1")
        assert incident["state"] == "frozen"
        assert incident["cause"]["source"] == "memory_failure"


@pytest.mark.parametrize("who", few(["kinds", "tcg"], "tcg"))
def test_an_error_of_a_guest_that_only_the_daemon_stops_while_it_is_away(home: Path, who: str) -> None:
    """The kernel does not stop it, so the record is all that is left of the error."""
    vm = 'freeze_kinds = ["srao", "srar"]' if who == "kinds" else ""
    accel = "kvm" if who == "kinds" else "tcg"
    with Guest.start(guest_config("web1", home, accel=accel)) as guest, Daemon(home, vm=vm) as daemon:
        assert daemon.vm("web1")["stopped_by"] == "qemu"
        daemon.kill()
        with hwerr_notify.open(pid=guest.pid) as device:
            status = MCI_VAL | MCI_UC | MCI_EN | MCI_MISCV | MCI_ADDRV | MCI_S | 8 << 16 | 0xC0
            # Of Intel's kinds, where the kernel of an AMD machine believes an address. memory_failure() would
            # send a SIGBUS, which kills a QEMU without KVM.
            inject.mce_sim(
                MceRecord(
                    status=status, mcgstatus=1, mcgcap=1 << 24, bank=4, vendor=0, misc=0x8C,
                    addr=guest.gpa2hpa(HIT_GPA),
                )
            )  # fmt: skip
            (event, *_) = device.read(30)
        assert not event.guests[0].stopped
        daemon.start()
        incident = daemon.await_state(("frozen", "failed"), "web1")
        assert incident["state"] == "frozen", daemon.said()
        assert incident["cause"]["layer"] == "hardware"
        assert incident["cause"]["seq"] == event.seq
        assert incident["poison"]
        # Once more: what was done is not done again.
        daemon.kill()
        daemon.start()
        assert len(daemon.incidents()) == 1


@pytest.mark.long
def test_an_armed_guest_whose_monitor_is_out_of_reach(home: Path) -> None:
    """An earlier run has armed it, so the kernel stops it: that is told, and it is sealed."""
    with Guest.start(guest_config("web1", home)) as guest, Daemon(home) as daemon:
        assert daemon.vm("web1")["stopped_by"] == "kernel"
        hva = guest.gpa2hva(COUNTER_GPA)
        daemon.kill()
        (home / "qmp/web1.qmp").unlink()
        daemon.start()
        assert daemon.vm("web1")["monitor"] is None
        with daemon.follow() as events:
            hit(guest)
            told = events.next("GUEST_FROZEN", "INCIDENT_FAILED")
        assert (told["event"], told["step"]) == ("INCIDENT_FAILED", "record"), daemon.said()
        before = counter(guest, hva)
        assert guest.qmp is not None
        tries_to_run(guest.qmp, "system_reset", "cont")
        assert counter(guest, hva) == before
        assert daemon.vm("web1")["refused_runs"] > 0


# -- other layers -------------------------------------------------------------------


FAILS = {
    # What the guest does, whether hwerr-probe watches, what the incident says.
    "a panic, told by QEMU": ("panic", False, "panic", "panicked"),
    "a panic, seen in KVM": ("panic", True, "panic", "panic"),
    "code that KVM cannot emulate, told by QEMU": ("emulate", False, "kvm", "internal-error"),
    "code that KVM cannot emulate, seen in KVM": ("emulate", True, "kvm", ""),
    # QEMU takes it for a reboot.
    "a triple fault": ("triple", True, "kvm", "triple fault"),
    "a disk that cannot read": ("read", False, "block", "I/O error"),
}


@pytest.mark.parametrize("what", few(FAILS, "a triple fault", "a disk that cannot read"))
def test_a_guest_that_cannot_go_on(home: Path, what: str) -> None:
    code, probes, layer, text = FAILS[what]
    extra: tuple[str, ...] = ("-device", "pvpanic", "-action", "panic=pause")
    with contextlib.ExitStack() as stack:
        if code == "read":
            disk = stack.enter_context(bad_disk())
            extra += ("-drive", f"file={disk},if=ide,index=0,format=raw,rerror=stop,werror=stop")
        if probes:
            service = Service()
            stack.callback(probe.unload)
            stack.callback(service.stop)
        guest = stack.enter_context(Guest.start(guest_config("web1", home, *extra, code=f"later-{code}")))
        daemon = stack.enter_context(Daemon(home, vm='freeze_on = ["kvm", "block", "panic"]'))
        events = stack.enter_context(daemon.follow())
        hva = guest.gpa2hva(COUNTER_GPA)
        guest.go()
        told = events.next("GUEST_FROZEN", "INCIDENT_FAILED")
        assert told["event"] == "GUEST_FROZEN", daemon.said()
        (incident,) = daemon.incidents()
        assert incident["cause"]["layer"] == layer
        assert text in incident["cause"]["message"]
        before = counter(guest, hva)
        assert guest.qmp is not None
        tries_to_run(guest.qmp, "system_reset", "cont")
        assert counter(guest, hva) == before


@pytest.mark.long
def test_a_machine_check(home: Path) -> None:
    with (
        Guest.start(guest_config("web1", home)) as guest,
        Daemon(home) as daemon,
        daemon.follow() as events,
    ):
        hpa = guest.gpa2hpa(HIT_GPA)
        status = MCI_VAL | MCI_EN | MCI_ADDRV | MCI_UC | 8 << 16 | 0x0813
        inject.mce_sim(MceRecord(status=status, bank=4, addr=hpa))
        assert events.next("GUEST_FROZEN", "INCIDENT_FAILED")["event"] == "GUEST_FROZEN"
        (incident,) = daemon.incidents()
        assert incident["cause"]["source"] == "mce"
        assert stopped_by(incident) == "by the kernel, in the event path"


@pytest.mark.long
def test_an_error_of_a_device_it_was_given(home: Path) -> None:
    """The device's bus mastering is off afterwards, and stays so whatever QEMU's monitor is told."""
    address = vfio.bind("aer0")
    config = Path(f"/sys/bus/pci/devices/{address}/config")

    def gives_it_back(monitor: Qmp) -> None:
        """As the guest would: Command register of its device 16, with memory, I/O and bus mastering."""
        for line in ("o /w 0xcf8 0x80008004", "o /h 0xcfc 7"):
            monitor.execute("human-monitor-command", **{"command-line": line})

    try:
        with (
            Guest.start(guest_config("web1", home, "-device", f"vfio-pci,host={address},addr=0x10")) as guest,
            Daemon(home) as daemon,
            daemon.follow() as events,
        ):
            assert guest.qmp is not None
            gives_it_back(guest.qmp)
            assert config.read_bytes()[4] & 4
            inject.aer(AerRecord(uncor_status=0x8000, device=address, header_log=(1, 2, 3, 4)))
            told = events.next("GUEST_FROZEN", "INCIDENT_FAILED")
            assert told["event"] == "GUEST_FROZEN", daemon.said()
            (incident,) = daemon.incidents()
            assert incident["cause"]["source"] == "aer"
            assert incident["steps"]["release"]["facts"]["devices"] == [address]
            for command in ("cont", "system_reset"):
                tries_to_run(guest.qmp, command)
                gives_it_back(guest.qmp)
                assert not config.read_bytes()[4] & 4
            assert daemon.vm("web1")["refused_opens"] > 0
            assert guest.alive()
    finally:
        vfio.unbind("aer0")


@pytest.mark.long
def test_corrected_errors_degrade_and_do_not_freeze(home: Path) -> None:
    policy = '[[vm.degraded]]\nerrors = 3\nper = "page"'
    with (
        Guest.start(guest_config("web1", home)) as guest,
        Injector() as injector,
        Daemon(home, vm=policy) as daemon,
        daemon.follow() as events,
    ):
        phys = guest.gpa2hpa(HIT_GPA)
        injector.hit(phys)
        # Of another page: they do not count with it.
        for _ in range(2):
            injector.hit(guest.gpa2hpa(HIT_GPA + PAGE))
        injector.hit(phys)
        injector.hit(phys)
        told = events.next("DEGRADED", "GUEST_FROZEN", "INCIDENT_FAILED")
        assert (told["event"], told["vm"]) == ("DEGRADED", "web1")
        assert f"3 corrected errors of page {phys:#x}" in told["reason"]
        done = daemon.run("status", "web1")
        assert (done.returncode, "degraded" in done.stdout) == (0, True)
        marker = json.loads((home / "run/degraded/web1").read_text("utf-8"))
        assert marker["pid"] == guest.pid
        assert (guest.status(), daemon.incidents()) == ("running", [])


@pytest.mark.long
def test_kvm_gives_up(home: Path) -> None:
    """KVM_RUN fails and QEMU goes to internal-error: here because it is refused, by somebody else's seal."""
    with (
        Guest.start(guest_config("web1", home)) as guest,
        Daemon(home) as daemon,
        daemon.follow() as events,
        Seal.load() as seal,
    ):
        seal.seal(guest.pid, int(daemon.vm("web1")["start_ticks"]) * 10_000_000)
        # It leaves the guest when it is asked something, and cannot go back.
        guest.hmp("info registers")
        assert events.next("GUEST_FROZEN", "INCIDENT_FAILED")["event"] == "GUEST_FROZEN"
        (incident,) = daemon.incidents()
        assert incident["cause"]["layer"] == "kvm"


@pytest.mark.long
def test_a_policy_that_does_not_want_it(home: Path) -> None:
    extra = ("-device", "pvpanic", "-action", "panic=pause")
    with (
        Guest.start(guest_config("web1", home, *extra)) as guest,
        Guest.start(guest_config("db1", home, *extra)) as other,
        Daemon(home, vm='name = "web1"\nfreeze_on = ["hardware"]\n[[vm]]\nqmp = "/none"') as daemon,
    ):
        assert {v["name"] for v in daemon.status()["vms"]} == {"web1"}
        guest.hmp("o /b 0x505 1")
        other.hmp("o /b 0x505 1")
        with daemon.follow() as events:
            hit(guest)
            assert events.next("GUEST_FROZEN")["vm"] == "web1"
        (incident,) = daemon.incidents()
        assert incident["cause"]["layer"] == "hardware"


# -- killed in between -----------------------------------------------------------

STEPS = ("stop", "record", "release", "seal", "tell", "keep")
POINTS = [
    "begin", "begun", "amid-release", "before-tell", "inside-tell", "after-tell",
    "before-keep", "inside-keep",
    *(f"{when}-{step}" for step in STEPS[:4] for when in ("before", "inside", "after")),
]  # fmt: skip


# Where a command that was not saved would be forgotten, and its guest thought to be hit.
COMMANDED = [f"freeze: {point}" for point in ("begin", "before-stop", "inside-stop")]


@pytest.mark.parametrize(
    "case", few([*POINTS, *COMMANDED], "before-record", "amid-release", "freeze: inside-stop")
)
def test_killed_and_started_again(home: Path, case: str) -> None:
    why, point = "freeze" if case in COMMANDED else "hit", case.removeprefix("freeze: ")
    disk = image(home)
    with Guest.start(guest_config("web1", home, *disk_options(disk))) as guest:
        hva = guest.gpa2hva(COUNTER_GPA)
        with Daemon(home).start(fault=point) as daemon:
            if why == "hit":
                hit(guest)
            else:
                assert daemon.run("freeze", "web1").returncode == 1
            daemon.wait_killed()
            # Never a FROZEN that is not.
            if any(i["state"] == "frozen" for i in daemon.incidents()):
                assert locked_by_nobody(disk)
            before = counter(guest, hva)
            daemon.start()
            with daemon.follow() as events:
                while daemon.vm("web1")["state"] != "frozen":
                    events.next()
            (incident,) = daemon.incidents()
            assert (incident["state"], guest.alive()) == ("frozen", True)
            assert incident["cause"]["layer"] == ("hardware" if why == "hit" else "command")
            if why == "freeze" and point != "inside-stop":
                # Nothing had been done: it ran until the daemon came back.
                before = counter(guest, hva)
            assert locked_by_nobody(disk)
            lines, status, error = daemon.ask("dump", name="web1")
            assert (status, error) == (0, None)
            assert lines[-1]["path"]
            (incident,) = daemon.incidents()
            assert all(incident["steps"][s]["state"] == "done" for s in STEPS)
            assert guest.qmp is not None
            tries_to_run(guest.qmp, "system_reset", "cont")
            assert counter(guest, hva) == before


def start_as(pid: int, config: GuestConfig) -> Guest:
    """A guest whose process has that number, which must be free."""
    for _ in range(20):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1), "ascii")
        guest = Guest.start(config)
        if guest.pid == pid:
            return guest
        guest.kill()
    raise AssertionError(f"no process got the number {pid}")


@pytest.mark.long
def test_a_number_used_again(home: Path) -> None:
    """A frozen guest ends while the daemon is away; what has its number now is somebody else."""
    with Guest.start(guest_config("web1", home)) as guest, Daemon(home) as daemon:
        assert daemon.run("freeze", "web1").returncode == 0
        daemon.kill()
        pid = guest.pid
    with start_as(pid, guest_config("db1", home)) as other, daemon.start():
        daemon.await_state(("gone",), "web1")
        (found,) = daemon.status()["vms"]
        assert (found["name"], found["state"], found["pid"]) == ("db1", "guarded", pid)
        assert other.status() == "running"
        hva = other.gpa2hva(COUNTER_GPA)
        assert other.qmp is not None
        other.qmp.execute("stop")
        before = counter(other, hva)
        other.qmp.execute("cont")
        while counter(other, hva) == before:
            assert other.status() == "running"


# -- what goes wrong -----------------------------------------------------------------


@pytest.mark.long
def test_a_monitor_that_hangs(home: Path) -> None:
    """QEMU does not answer: stopped and sealed, but not FROZEN; everything else goes on."""
    with (
        Guest.start(guest_config("web1", home)) as guest,
        Guest.start(guest_config("db1", home)) as other,
        Daemon(home, policy="[limits]\nrecord = 1\nrelease = 1") as daemon,
        daemon.follow() as events,
    ):
        pfn = pagemap.pfn_of(guest.pid, guest.gpa2hva(HIT_GPA))
        # /proc shows its vCPUs within KVM_RUN. They are not: the signal has taken them out, and SIGCONT
        # lets them begin anew, into the kernel's stop. The first step that fails is that which asks.
        os.kill(guest.pid, signal.SIGSTOP)
        inject.hwpoison(pfn)
        assert events.next("HARDWARE_ERROR")["vm"] == "web1"
        assert daemon.vm("web1")["state"] == "freezing"
        hit(other)
        told = events.next("GUEST_FROZEN", "INCIDENT_FAILED")
        assert (told["event"], told["vm"]) == ("GUEST_FROZEN", "db1")
        told = events.next("INCIDENT_FAILED")
        assert (told["vm"], told["step"]) == ("web1", "record")
        assert daemon.run("status", "web1").returncode == 11
        os.kill(guest.pid, signal.SIGCONT)
        # It answers again: once more, from the step that failed.
        done = daemon.run("freeze", "web1")
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("what", few(["full", "read-only"], "full"))
def test_a_disk_that_takes_nothing(home: Path, what: str) -> None:
    """No incident that is not on disk is called FROZEN; once more when there is room."""
    state = home / "state"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(state)], check=True)
    try:
        with Guest.start(guest_config("web1", home)) as guest, Daemon(home) as daemon:
            hva = guest.gpa2hva(COUNTER_GPA)
            if what == "full":
                with contextlib.suppress(OSError), (state / "ballast").open("wb", buffering=0) as ballast:
                    while True:
                        ballast.write(bytes(PAGE))
            else:
                subprocess.run(["mount", "-o", "remount,ro", str(state)], check=True)
            with daemon.follow() as events:
                hit(guest)
                told = events.next("GUEST_FROZEN", "INCIDENT_FAILED")
            assert (told["event"], told["step"]) == ("INCIDENT_FAILED", "record")
            assert {"full": "No space left", "read-only": "Read-only"}[what] in told["reason"]
            assert daemon.run("status", "web1").returncode == 11
            # The cluster is not told that it runs, nor that it is stopped.
            assert agent(home, "monitor") == 1
            assert agent(home, "stop") == 1, "its process lives"
            assert agent(home, "start") == 4
            # Not FROZEN, and sealed all the same.
            before = counter(guest, hva)
            assert guest.qmp is not None
            tries_to_run(guest.qmp, "system_reset", "cont")
            assert counter(guest, hva) == before
            if what == "full":
                (state / "ballast").unlink()
            else:
                subprocess.run(["mount", "-o", "remount,rw", str(state)], check=True)
            done = daemon.run("freeze", "web1")
            assert (done.returncode, done.stderr) == (0, "")
            assert agent(home, "monitor") == 7
            daemon.kill()
    finally:
        subprocess.run(["umount", "-l", str(state)], check=True)


def test_a_seal_that_is_gone_is_made_again(home: Path) -> None:
    """As after an upgrade, or with bpffs unmounted: the next daemon seals what it finds FROZEN."""
    with Guest.start(guest_config("web1", home)) as guest, Daemon(home) as daemon:
        hva = guest.gpa2hva(COUNTER_GPA)
        with daemon.follow() as events:
            hit(guest)
            assert events.next("GUEST_FROZEN", "INCIDENT_FAILED")["event"] == "GUEST_FROZEN"
        before = counter(guest, hva)
        daemon.kill()
        with Seal.open_pinned() as seal:
            assert guest.pid in seal.sealed()
            seal.unseal(guest.pid)
        daemon.start()
        # No event tells: to all others it has been FROZEN all the time.
        until(lambda: "made again" in daemon.incidents()[0]["steps"]["seal"]["detail"], LIMIT, daemon.said)
        assert daemon.vm("web1")["state"] == "frozen"
        assert daemon.vm("web1")["refused_runs"] is not None
        assert agent(home, "monitor") == 7
        assert guest.qmp is not None
        tries_to_run(guest.qmp, "system_reset", "cont")
        assert counter(guest, hva) == before


@pytest.mark.parametrize("cluster", ["absent", "hung"])
@pytest.mark.long
def test_pacemaker_that_is_not_there(home: Path, cluster: str) -> None:
    """FROZEN is told to all others at once, status answers, and what could not be told is said in time."""
    tools = home / "bin"
    tools.mkdir()
    if cluster == "hung":
        for name in CLUSTER:
            (tools / name).write_text("#!/bin/sh\nexec /bin/sleep 1000\n", "utf-8")
            (tools / name).chmod(0o755)
    daemon = Daemon(home, policy='[pacemaker]\nresource = "vm-{name}"')
    guest = Guest.start(guest_config("web1", home))
    with guest, daemon.start(path=tools), daemon.follow() as events:
        hit(guest)
        assert events.next("GUEST_FROZEN", "INCIDENT_FAILED")["event"] == "GUEST_FROZEN"
        assert daemon.vm("web1")["state"] == "frozen"
        while "tell" not in (incident := daemon.incidents()[0])["steps"]:
            events.next()
        assert incident["state"] == "frozen"
        assert incident["steps"]["tell"]["state"] == "failed"
        why = {
            "absent": [f"{name} is not installed, and the policy has [pacemaker]" for name in CLUSTER],
            # Without what the first says, the others are not asked.
            "hung": [f"{name} did not end within 6.6 s" for name in CLUSTER[:2]],
        }[cluster]
        assert incident["steps"]["tell"]["detail"] == "; ".join(why)
        # It is told again until it has taken it, and the attribute is taken back in the same way.
        for name in CLUSTER:
            new = tools / f".{name}"
            status = 105 if name == "cibadmin" else 0
            new.write_text(
                f'#!/bin/sh\necho {name} "$@" >>{tools}/said; echo node1; exit {status}\n', "utf-8"
            )
            new.chmod(0o755)
            new.replace(tools / name)
        events.next("INCIDENT_TOLD")
        assert daemon.incidents()[0]["steps"]["tell"]["state"] == "done"
        said = (tools / "said").read_text("utf-8")
        assert f"attrd_updater --name hwerr-vm-web1 --update {incident['id']}\n" in said
        assert "crm_resource --fail --resource vm-web1 --node node1\n" in said


@pytest.mark.long
def test_qemu_dies_during_the_release(home: Path) -> None:
    hook = home / "hook"
    hook.write_text(
        "#!/usr/bin/python3\nimport json, os, select, sys\n"
        'pid = json.load(sys.stdin)["pid"]\nfd = os.pidfd_open(pid)\nos.kill(pid, 9)\n'
        "select.select([fd], [], [])\n",
        "utf-8",
    )
    hook.chmod(0o755)
    with (
        Guest.start(guest_config("web1", home)) as guest,
        Daemon(home, policy=f'[[hook]]\nrun = ["{hook}"]\non = ["release"]') as daemon,
        daemon.follow() as events,
    ):
        hit(guest)
        told = events.next("GUEST_FROZEN", "INCIDENT_FAILED", "INCIDENT_GONE")
        assert told["event"] == "INCIDENT_GONE"
        assert daemon.incidents()[0]["state"] == "gone"
        assert daemon.run("status", "web1").returncode == 3


@pytest.mark.long
def test_hooks_and_their_time(home: Path) -> None:
    """Each gets the facts; one that hangs, and what it has started, is killed and told of."""
    told, slow = home / "told", home / "slow"
    told.write_text(f"#!/bin/sh\ncat > {home}/said\n", "utf-8")
    slow.write_text("#!/bin/sh\nsleep 1000 & echo $! > $0.pid; wait\n", "utf-8")
    told.chmod(0o755)
    slow.chmod(0o755)
    policy = (
        f'[[hook]]\nrun = ["{told}"]\non = ["frozen"]\n'
        f'[[hook]]\nrun = ["{slow}"]\non = ["frozen"]\nlimit = "500ms"\n'
    )
    with Guest.start(guest_config("web1", home)), Daemon(home, policy=policy) as daemon:
        done = daemon.run("freeze", "web1")
        assert done.returncode == 0, done.stderr
        with daemon.follow() as events:
            while "tell" not in (incident := daemon.incidents()[0])["steps"]:
                events.next()
        facts = json.loads((home / "said").read_text("utf-8"))
        assert (facts["occasion"], facts["vm"], facts["incident"]) == ("frozen", "web1", incident["id"])
        assert incident["state"] == "frozen"
        assert "slow did not end within 0.5 s" in incident["steps"]["tell"]["detail"]
        child = Path("/proc") / (home / "slow.pid").read_text("ascii").strip() / "stat"
        # Killed, and then its new parent takes note of it when it likes.
        until(
            lambda: not child.exists() or child.read_text("ascii").rpartition(")")[2].split()[0] in "ZX",
            LIMIT,
        )


# -- release ----------------------------------------------------------------------------


@pytest.mark.long
def test_every_kind_of_disk(home: Path) -> None:
    forms = {"thread": "qcow2", "legacy": "qcow2", "ide": "raw", "scsi": "raw", "base": "qcow2"}
    images = {name: image(home, f"{name}.{form}", form) for name, form in forms.items()}
    overlay = home / "overlay.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(images["base"]), "-F", "qcow2", str(overlay)],
        check=True,
    )
    extra = (
        "-object", "iothread,id=io0",
        "-blockdev", f"driver=qcow2,node-name=n0,file.driver=file,file.filename={images['thread']}",
        "-device", "virtio-blk-pci,drive=n0,iothread=io0",
        "-drive", f"file={images['legacy']},if=none,id=l0,format=qcow2", "-device", "virtio-blk-pci,drive=l0",
        "-drive", f"file={images['ide']},if=ide,format=raw,index=0",
        "-device", "virtio-scsi-pci,id=s0",
        "-blockdev", f"driver=file,node-name=n1,filename={images['scsi']}", "-device", "scsi-hd,drive=n1",
        "-blockdev", f"driver=qcow2,node-name=n2,file.driver=file,file.filename={overlay}",
        "-device", "scsi-hd,drive=n2",
    )  # fmt: skip
    with Guest.start(guest_config("web1", home, *extra)) as guest, Daemon(home) as daemon:
        assert not any(locked_by_nobody(path) for name, path in images.items() if name != "base")
        done = daemon.run("freeze", "web1")
        assert done.returncode == 0, done.stderr
        assert daemon.incidents()[0]["steps"]["release"]["facts"]["detached"]
        assert all(map(locked_by_nobody, [*images.values(), overlay]))
        assert guest.qmp is not None
        tries_to_run(guest.qmp, "system_reset", "cont")
        assert all(map(locked_by_nobody, [*images.values(), overlay]))


@pytest.fixture
def bridge() -> Iterator[str]:
    subprocess.run(["modprobe", "tun"], check=True)
    subprocess.run(["modprobe", "bridge"], check=True)
    Path("/dev/net").mkdir(exist_ok=True)
    if not Path("/dev/net/tun").exists():
        os.mknod("/dev/net/tun", 0o600 | 0o020000, os.makedev(10, 200))
    subprocess.run(["ip", "link", "add", "hwbr0", "type", "bridge"], check=True)
    subprocess.run(["ip", "tuntap", "add", "hwtap0", "mode", "tap"], check=True)
    subprocess.run(["ip", "link", "set", "hwtap0", "up", "master", "hwbr0"], check=True)
    yield "hwbr0"
    # One test deletes it itself.
    subprocess.run(["ip", "link", "del", "hwtap0"], check=False, stderr=subprocess.DEVNULL)
    subprocess.run(["ip", "link", "del", "hwbr0"], check=True)


TAP = Path("/sys/class/net/hwtap0")


def tap_options(*, vhost: bool = False) -> tuple[str, ...]:
    if vhost:
        subprocess.run(["modprobe", "vhost_net"], check=True)
    backend = f"tap,id=n0,ifname=hwtap0,script=no,downscript=no,vhost={'on' if vhost else 'off'}"
    return ("-netdev", backend, "-device", "virtio-net-pci,netdev=n0,romfile=")


def reaches_the_tap(bridge: str) -> bool:
    """Whether a frame that the bridge sends out of every port is handed to the tap."""
    kind = b"\x88\xb5"
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as heard,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw,
    ):
        heard.bind(("hwtap0", 3))  # ETH_P_ALL: what goes out, too
        heard.setblocking(False)
        raw.bind((bridge, 0))
        # When this returns the frame has gone where it goes.
        raw.send(b"\xff" * 6 + b"\x02\0\0\0\0\1" + kind + bytes(50))
        with contextlib.suppress(OSError):
            while frame := heard.recv(2048):
                if frame[12:14] == kind:
                    return True
    return False


@pytest.mark.long
@pytest.mark.parametrize("vhost", [False, True])
def test_the_tap_is_down_and_off_its_bridge(home: Path, bridge: str, vhost: bool) -> None:
    extra = tap_options(vhost=vhost)
    with Guest.start(guest_config("web1", home, *extra)) as guest, Daemon(home) as daemon:
        assert (TAP / "master").exists()
        subprocess.run(["ip", "link", "set", bridge, "up"], check=True)
        assert reaches_the_tap(bridge)
        done = daemon.run("freeze", "web1")
        assert done.returncode == 0, done.stderr
        (incident,) = daemon.incidents()
        assert incident["steps"]["release"]["facts"]["taps"] == ["hwtap0"]
        assert not (TAP / "master").exists()
        assert not int((TAP / "flags").read_text(), 16) & 1
        infos = [p.read_text() for p in Path(f"/proc/{guest.pid}/fdinfo").iterdir()]
        assert not any(re.search(r"^iff:", i, re.M) for i in infos)
        assert "/dev/vhost-net" not in guest.files()
        assert guest.qmp is not None
        tries_to_run(guest.qmp, "system_reset", "cont")
        assert not reaches_the_tap(bridge)


@pytest.fixture
def macvtap() -> Iterator[tuple[int, str]]:
    """One on a link of its own: an open file of its device, and its name."""
    for module in ("dummy", "macvtap"):
        subprocess.run(["modprobe", module], check=True)
    subprocess.run(["ip", "link", "add", "hwlow0", "type", "dummy"], check=True)
    subprocess.run(["ip", "link", "add", "link", "hwlow0", "hwmac0", "type", "macvtap"], check=True)
    for name in ("hwlow0", "hwmac0"):
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
    number = Path("/sys/class/net/hwmac0/ifindex").read_text("ascii").strip()
    fd = os.open(f"/dev/tap{number}", os.O_RDWR)
    yield fd, "hwmac0"
    os.close(fd)
    subprocess.run(["ip", "link", "del", "hwlow0"], check=True)


@pytest.mark.long
def test_a_macvtap_is_down(home: Path, macvtap: tuple[int, str]) -> None:
    """It is seen by its device; QEMU is given it as an open file, as libvirt does."""
    fd, name = macvtap
    extra = ("-device", "virtio-net-pci,id=nic0,romfile=")
    with Guest.start(guest_config("web1", home, *extra)) as guest:
        assert guest.qmp is not None
        with socket.socket(fileno=os.dup(guest.qmp._fd)) as sock:
            socket.send_fds(sock, [b" "], [fd])
            guest.qmp.execute("getfd", fdname="mac")
        guest.qmp.execute("netdev_add", type="tap", id="n0", fd="mac")
        flags = Path(f"/sys/class/net/{name}/flags")
        with Daemon(home) as daemon:
            assert int(flags.read_text(), 16) & 1
            done = daemon.run("freeze", "web1")
            assert done.returncode == 0, done.stderr
            assert daemon.incidents()[0]["steps"]["release"]["facts"]["taps"] == [name]
            assert not int(flags.read_text(), 16) & 1
            assert not any(re.fullmatch(r"/dev/tap\d+", f) for f in guest.files())


class Vswitch:
    """A datapath of Open vSwitch in the kernel, told as ovs-vswitchd would (linux/openvswitch.h)."""

    def __init__(self, name: str) -> None:
        subprocess.run(["modprobe", "openvswitch"], check=True)
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16)  # NETLINK_GENERIC
        self._sock.bind((0, 0))
        self._name = self._attribute(1, name.encode() + b"\0")
        # OVS_DP_CMD_NEW: OVS_DP_ATTR_NAME, OVS_DP_ATTR_UPCALL_PID
        self._ask("ovs_datapath", 1, 2, 0, self._name + self._attribute(2, bytes(4)))
        self.index = socket.if_nametoindex(name)

    def add(self, port: str) -> None:
        """OVS_VPORT_CMD_NEW: OVS_VPORT_ATTR_TYPE (netdev), _NAME, _UPCALL_PID."""
        kind = self._attribute(2, struct.pack("I", 1))
        name = self._attribute(3, port.encode() + b"\0")
        self._ask("ovs_vport", 1, 1, self.index, kind + name + self._attribute(5, bytes(4)))

    def delete(self) -> None:
        self._ask("ovs_datapath", 2, 2, 0, self._name)
        self._sock.close()

    @staticmethod
    def _attribute(kind: int, data: bytes) -> bytes:
        return struct.pack("HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)

    def _ask(self, family: str, command: int, version: int, index: int, attributes: bytes) -> None:
        # GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_NAME; CTRL_ATTR_FAMILY_ID is a number of 16 bits.
        found = self._request(16, struct.pack("BBH", 3, 1, 0) + self._attribute(2, family.encode() + b"\0"))
        at = found.index(struct.pack("HH", 6, 1)) + 4
        (number,) = struct.unpack_from("H", found, at)
        self._request(number, struct.pack("BBHI", command, version, 0, index) + attributes)

    def _request(self, kind: int, body: bytes) -> bytes:
        """NLM_F_REQUEST | NLM_F_ACK; what came before the acknowledgement."""
        self._sock.send(struct.pack("IHHII", 16 + len(body), kind, 5, 1, 0) + body)
        answer = b""
        while True:
            data = self._sock.recv(1 << 16)
            if struct.unpack_from("H", data, 4)[0] == 2:  # NLMSG_ERROR
                code = -struct.unpack_from("i", data, 16)[0]
                if code:
                    raise OSError(code, os.strerror(code))
                return answer
            answer += data


@pytest.mark.long
def test_a_tap_on_open_vswitch_is_down(home: Path, bridge: str) -> None:
    """It stays there, as that does not give it away, and carries nothing."""
    subprocess.run(["ip", "link", "set", "hwtap0", "nomaster"], check=True)
    switch = Vswitch("hwovs0")
    try:
        switch.add("hwtap0")
        assert (TAP / "master").resolve().name == "hwovs0"
        with Guest.start(guest_config("web1", home, *tap_options())), Daemon(home) as daemon:
            assert int((TAP / "flags").read_text(), 16) & 1
            done = daemon.run("freeze", "web1")
            assert done.returncode == 0, done.stderr
            assert daemon.incidents()[0]["steps"]["release"]["facts"]["taps"] == ["hwtap0"]
            assert not int((TAP / "flags").read_text(), 16) & 1
            assert (TAP / "master").exists()
    finally:
        switch.delete()


@pytest.mark.long
def test_the_tap_is_gone_already(home: Path, bridge: str) -> None:
    with Guest.start(guest_config("web1", home, *tap_options())), Daemon(home) as daemon:
        subprocess.run(["ip", "link", "del", "hwtap0"], check=True)
        done = daemon.run("freeze", "web1")
        assert done.returncode == 0, done.stderr
        assert daemon.incidents()[0]["steps"]["release"]["facts"]["taps"] == []


@pytest.mark.long
def test_the_tap_is_set_up_again(home: Path, bridge: str) -> None:
    """By a tool that thinks that it should be: not FROZEN, and said."""
    hook = home / "hook"
    hook.write_text("#!/bin/sh\n/sbin/ip link set hwtap0 up master hwbr0\n", "utf-8")
    hook.chmod(0o755)
    policy = f'[[hook]]\nrun = ["{hook}"]\non = ["release"]'
    with Guest.start(guest_config("web1", home, *tap_options())), Daemon(home, policy=policy) as daemon:
        done = daemon.run("freeze", "web1")
        assert done.returncode == 7, done.stderr
        assert "hwtap0 is up again" in done.stderr
        assert daemon.incidents()[0]["state"] == "failed"


@pytest.fixture
def server(home: Path) -> Iterator[tuple[Path, Path]]:
    """An image that is served over a socket; both."""
    disk, path = image(home, "served.raw", "raw"), home / "nbd"
    ready = home / "nbd.pid"
    argv = ["qemu-nbd", "-f", "raw", "-k", *map(str, (path, "-t", "-e", 9, "--pid-file", ready, disk))]
    with subprocess.Popen(argv) as child:
        until(ready.exists, LIMIT)
        yield disk, path
        child.kill()


def test_a_disk_on_the_network(home: Path, server: tuple[Path, Path]) -> None:
    """Its connection is gone, and there is no other, whoever tells QEMU to make one."""
    disk, path = server
    place = {"driver": "nbd", "server": {"type": "unix", "path": str(path)}}
    extra = (
        "-blockdev", f"driver=nbd,node-name=n0,server.type=unix,server.path={path}",
        "-device", "virtio-blk-pci,drive=n0,id=v0",
    )  # fmt: skip
    with Guest.start(guest_config("web1", home, *extra)) as guest, Daemon(home) as daemon:
        assert guest.qmp is not None
        # Before, anybody may.
        guest.qmp.execute("blockdev-add", **place, **{"node-name": "again"})
        writes(guest.qmp, "again")
        guest.qmp.execute("blockdev-del", **{"node-name": "again"})
        content = disk.read_bytes()
        assert content[0] == 9
        done = daemon.run("freeze", "web1")
        assert done.returncode == 0, done.stderr
        facts = daemon.incidents()[0]["steps"]["release"]["facts"]
        assert facts["detached"]
        with pytest.raises(QmpError, match="Operation not permitted"):
            guest.qmp.execute("blockdev-add", **place, **{"node-name": "again"})
        assert daemon.vm("web1")["refused_connects"] > 0
        assert disk.read_bytes() == content


def test_a_device_that_another_program_serves(home: Path) -> None:
    """It cannot be taken away: not FROZEN, and said by name. What can be released is."""
    served, disk, path = image(home, "served.raw", "raw"), image(home), home / "vhost"
    argv = [
        "qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f0,filename={served}", "--export",
        f"vhost-user-blk,id=e0,addr.type=unix,addr.path={path},node-name=f0,writable=on",
    ]  # fmt: skip
    extra = (*disk_options(disk), "-chardev", f"socket,id=c0,path={path}",
             "-device", "vhost-user-blk-pci,chardev=c0,id=v0")  # fmt: skip
    with subprocess.Popen(argv) as child:
        try:
            until(path.exists, LIMIT)
            with Guest.start(guest_config("web1", home, *extra)), Daemon(home) as daemon:
                done = daemon.run("freeze", "web1")
                assert done.returncode == 7, done.stderr
                assert "vhost-user-blk v0: not released by this version" in done.stderr
                (incident,) = daemon.incidents()
                assert incident["state"] == "failed"
                assert incident["steps"]["seal"]["state"] == "done"
                assert locked_by_nobody(disk)
        finally:
            child.kill()


# -- keep -------------------------------------------------------------------------------


@pytest.mark.long
def test_the_core_is_what_qemu_would_have_written(home: Path) -> None:
    with Guest.start(guest_config("web1", home, smp=2)) as guest, Daemon(home) as daemon:
        done = daemon.run("freeze", "web1")
        assert done.returncode == 0, done.stderr
        lines, status, _ = daemon.ask("dump", name="web1")
        assert (status, lines[-1]["skipped"]) == (0, [])
        core, own = Path(lines[-1]["path"]), home / "own"
        assert guest.qmp is not None
        guest.qmp.execute("dump-guest-memory", paging=False, protocol=f"file:{own}")
        assert sum(n for _, n in core_ranges(core).values()) == sum(n for _, n in core_ranges(own).values())
        for gpa, (_, size) in core_ranges(core).items():
            assert core_bytes(core, gpa, size) == core_bytes(own, gpa, size), hex(gpa)
        assert core.stat().st_blocks * 512 < core.stat().st_size // 4
        said = subprocess.run(
            ["gdb", "-batch", "-nx", "-ex", "set architecture i386:x86-64", "-ex", f"core-file {core}",
             "-ex", "info registers rip cs", "-ex", f"x/1wx {COUNTER_GPA}", "-ex", "info threads"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        word = int.from_bytes(core_bytes(core, COUNTER_GPA, 4), "little")
        assert f"0x{word:08x}" in said
        registers = guest.hmp("info registers")
        rip = re.search(r"[ER]IP=([0-9a-f]+)", registers)
        assert rip
        assert re.search(rf"^rip\s+{int(rip[1], 16):#x}\b", said, re.M), said


# -- the front ----------------------------------------------------------------------------


@pytest.mark.long
def test_the_front(home: Path) -> None:
    with (
        Guest.start(guest_config("web1", home)) as guest,
        Daemon(home, vm="front = true") as daemon,
        Qmp.connect(home / "run/front/web1.qmp") as front,
        Qmp.connect(home / "run/front/web1.qmp") as second,
    ):
        assert front.execute("query-status")["status"] == "running"
        front.execute("stop")
        front.wait_event("STOP")
        front.execute("cont")
        second.wait_event("RESUME")
        with pytest.raises(QmpError, match="no-such-command") as refused:
            front.execute("no-such-command")
        assert refused.value.kind == "CommandNotFound"
        hit(guest)
        error = front.wait_event("HARDWARE_ERROR")["data"]
        assert error["severity"] in ("recoverable", "fatal")
        assert error["ranges"] == [{"gpa": HIT_GPA, "length": PAGE}]
        frozen = second.wait_event("GUEST_FROZEN")["data"]
        status = front.execute("query-status")
        assert (status["status"], status["running"]) == ("frozen", False)
        for command in (
            "cont", "system_reset", "quit", "migrate", "blockdev-add", "loadvm", "x-colo-lost-heartbeat",
            "dump-guest-memory", "device_add", "netdev_add", "snapshot-load",
        ):  # fmt: skip
            with pytest.raises(QmpError, match=frozen["incident"]):
                front.execute(command)
        for line in ("cont", "c", "loadvm 1", "xp /1wx 0x200000", "quit"):
            with pytest.raises(QmpError, match=frozen["incident"]):
                front.hmp(line)
        assert "CPU#0" in front.hmp("info registers")
        assert front.execute("query-name")["name"] == "web1"
        assert daemon.vm("web1")["refused_runs"] == 0


# -- the weaker means ---------------------------------------------------------------------


@pytest.mark.long
def test_a_guest_without_kvm_is_frozen_as_a_process(home: Path) -> None:
    with (
        Guest.start(guest_config("web1", home, accel="tcg")) as guest,
        Daemon(home, vm="front = true") as daemon,
    ):
        hva = guest.gpa2hva(COUNTER_GPA)
        done = daemon.run("freeze", "web1")
        assert done.returncode == 0, done.stderr
        (incident,) = daemon.incidents()
        assert incident["steps"]["seal"]["state"] == "weaker"
        before = counter(guest, hva), vcpu_time_of_all(guest)
        os.kill(guest.pid, signal.SIGCONT)
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(guest.qmp_path))
        # Nothing in it answers, and its state is known all the same.
        with Qmp.connect(home / "run/front/web1.qmp") as front:
            assert front.execute("query-status")["status"] == "frozen"
        assert (counter(guest, hva), vcpu_time_of_all(guest)) == before
        lines, status, _ = daemon.ask("dump", name="web1")
        assert status == 0
        assert core_bytes(Path(lines[-1]["path"]), COUNTER_GPA, 4) == before[0].to_bytes(4, "little")
        assert daemon.run("clear", incident["id"]).returncode == 0


def vcpu_time_of_all(guest: Guest) -> list[str]:
    tasks = sorted(Path(f"/proc/{guest.pid}/task").iterdir())
    return [(t / "schedstat").read_text("ascii").split()[0] for t in tasks]


@pytest.mark.long
def test_check_and_status_without_a_daemon(home: Path) -> None:
    daemon = Daemon(home)
    done = daemon.run("check")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^stop +ok +by the kernel", done.stdout, re.M)
    assert re.search(r"^seal +ok +KVM_RUN is refused", done.stdout, re.M)
    assert daemon.run("status").returncode == 6
    done = daemon.run("freeze", "web1")
    assert (done.returncode, done.stderr.count("\n")) == (6, 1)
