# SPDX-License-Identifier: MIT
"""hwerr-guard with a guest that libvirt runs: its monitor stays libvirt's."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import guarded
import pytest
from guarded import LIMIT, Daemon, counter
from testbed import inject, pagemap
from testbed.guest import COUNTER_GPA, firmware
from testbed.wait import until

pytestmark = [pytest.mark.amd, pytest.mark.long]

URI = "qemu:///system"
HIT_GPA = 0x200000
RUNS, FAILED, NOT_RUNNING, REFUSED = 0, 1, 7, 4

DOMAIN = """\
<domain type="kvm"><name>{name}</name><memory unit="MiB">64</memory>
<memoryBacking><allocation mode="immediate"/></memoryBacking><vcpu>1</vcpu>
<os><type arch="x86_64" machine="pc">hvm</type><loader type="rom">{rom}</loader></os>
<on_crash>preserve</on_crash>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type="file" device="disk"><driver name="qemu" type="qcow2"/><source file="{disk}"/>
<target dev="vda" bus="virtio"/></disk>
<interface type="user"><model type="virtio"/></interface></devices></domain>
"""

# What the package libvirt-daemon-system would set up, in a mount namespace of its own.
SETUP = """\
set -e
mount -t tmpfs tmpfs /var/lib
mkdir -p /var/lib/libvirt /var/cache/libvirt /var/log/libvirt
cp /etc/passwd {home}/passwd
cp /etc/group {home}/group
grep -q ^libvirt-qemu: {home}/passwd || echo libvirt-qemu:x:64055:64055::/:/bin/false >>{home}/passwd
grep -q ^libvirt-qemu: {home}/group || echo libvirt-qemu:x:64055: >>{home}/group
mount --bind {home}/passwd /etc/passwd
mount --bind {home}/group /etc/group
mount --bind {home}/etc /etc/libvirt
exec libvirtd
"""

QEMU_CONF = """\
user = "root"
group = "root"
security_driver = "none"
remember_owner = 0
dynamic_ownership = 0
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"""


def virsh(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["virsh", "-q", "-c", URI, *argv], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture
def home() -> Path:
    path = Path("/run/hwerr-test") / uuid.uuid4().hex[:8]
    (path / "etc/qemu").mkdir(parents=True)
    return path


@pytest.fixture
def libvirtd(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    (home / "etc/qemu.conf").write_text(QEMU_CONF, "utf-8")
    (home / "etc/libvirtd.conf").write_text('auth_unix_rw = "none"\nunix_sock_group = "root"\n', "utf-8")
    Path("/run/libvirt").mkdir(exist_ok=True)
    with (home / "libvirtd.log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "-m", "bash", "-c", SETUP.format(home=home)], stdout=log, stderr=log
        )
    try:
        # Its socket is there before it answers: virsh waits.
        while not Path("/run/libvirt/libvirt-sock").exists():
            assert process.poll() is None, (home / "libvirtd.log").read_text("utf-8")
            select.select([], [], [], 0.1)
        yield process
    finally:
        os.kill(process.pid, signal.SIGCONT)
        virsh("destroy", "web1")
        process.terminate()
        process.wait(60)


def create(home: Path, name: str) -> Path:
    """Starts a domain; its disk."""
    disk, rom, xml = home / f"{name}.qcow2", home / "rom", home / f"{name}.xml"
    rom.write_bytes(firmware("count"))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "16M"], check=True)
    xml.write_text(DOMAIN.format(name=name, rom=rom, disk=disk), "utf-8")
    done = virsh("create", str(xml))
    assert done.returncode == 0, done.stderr + (home / "libvirtd.log").read_text("utf-8")
    return disk


@pytest.fixture
def disk(home: Path, libvirtd: object) -> Path:
    """Of the domain web1, which runs."""
    return create(home, "web1")


class Domain:
    """Just enough of a guest for `counter`."""

    def __init__(self, pid: int, name: str = "web1") -> None:
        self.pid, self.name = pid, name

    def address(self, gpa: int) -> int:
        said = virsh("qemu-monitor-command", self.name, "--hmp", f"gpa2hva {gpa:#x}").stdout
        return int(said.strip().rpartition("0x")[2], 16)


def unlocked(disk: Path) -> bool:
    argv = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 4096", str(disk)]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def daemon_of(home: Path) -> Daemon:
    daemon = Daemon(home)
    text = daemon.policy.read_text("utf-8").replace(f'qmp = "{home}/qmp/*.qmp"', f'libvirt = "{URI}"')
    daemon.policy.write_text(text, "utf-8")
    return daemon


def agent(home: Path, action: str) -> int:
    """What ocf:hwerr:guest says of the domain; it leaves a healthy one to ocf:heartbeat:VirtualDomain."""
    return guarded.agent(home, action, config=str(home / "web1.xml"))


def test_frozen_whatever_libvirt_is_told(home: Path, disk: Path) -> None:
    with daemon_of(home) as daemon, daemon.follow() as events:
        guest = Domain(daemon.vm("web1")["pid"])
        hva = guest.address(COUNTER_GPA)
        assert not unlocked(disk)
        inject.hwpoison(pagemap.pfn_of(guest.pid, guest.address(HIT_GPA)))
        told = events.next("GUEST_FROZEN", "INCIDENT_FAILED")
        assert told["event"] == "GUEST_FROZEN", daemon.said()
        before = counter(guest, hva)
        assert unlocked(disk)
        for verbs in (("resume",), ("reset", "resume"), ("suspend", "resume"), ("reset",)):
            for verb in verbs:
                virsh(verb, "web1")
            assert counter(guest, hva) == before
            assert unlocked(disk)
        assert agent(home, "monitor") == NOT_RUNNING
        assert agent(home, "start") == REFUSED
        assert agent(home, "stop") == 0
        assert Path(f"/proc/{guest.pid}").exists()
        daemon.kill()
        daemon.start()
        assert daemon.vm("web1")["state"] == "frozen"
        (incident,) = daemon.incidents()
        assert daemon.run("clear", incident["id"]).returncode == 0
        assert not Path(f"/proc/{guest.pid}").exists()


def test_libvirt_hangs(home: Path, disk: Path, libvirtd: subprocess.Popen[bytes]) -> None:
    """Stopped by the kernel, sealed; not FROZEN, said so in time; FROZEN when libvirt answers again."""
    with daemon_of(home) as daemon, daemon.follow() as events:
        guest = Domain(daemon.vm("web1")["pid"])
        hva = guest.address(COUNTER_GPA)
        pfn = pagemap.pfn_of(guest.pid, guest.address(HIT_GPA))
        os.kill(libvirtd.pid, signal.SIGSTOP)
        # It gives libvirt 0.6 s, and then looks for the process itself; VirtualDomain would wait for ever.
        assert agent(home, "monitor") == RUNS
        inject.hwpoison(pfn)
        told = events.next("GUEST_FROZEN", "INCIDENT_FAILED")
        assert (told["event"], told["step"]) == ("INCIDENT_FAILED", "record")
        assert agent(home, "monitor") == FAILED
        before = counter(guest, hva)
        os.kill(libvirtd.pid, signal.SIGCONT)
        virsh("resume", "web1")
        assert counter(guest, hva) == before
        # A connection that was silent for too long is made anew.
        until(lambda: daemon.vm("web1")["monitor"] is not None, LIMIT, daemon.said)
        done = daemon.run("freeze", "web1")
        assert done.returncode == 0, done.stderr + daemon.said()
        assert unlocked(disk)


def test_one_qemu_hangs(home: Path, disk: Path) -> None:
    """Both are hit, the one that hangs first: the other is FROZEN."""
    other_disk = create(home, "web2")
    with daemon_of(home) as daemon, daemon.follow() as events:
        hung = Domain(daemon.vm("web1")["pid"])
        other = Domain(daemon.vm("web2")["pid"], "web2")
        pfns = [pagemap.pfn_of(d.pid, d.address(HIT_GPA)) for d in (hung, other)]
        hva = other.address(COUNTER_GPA)
        pidfd = os.pidfd_open(hung.pid)
        try:
            os.kill(hung.pid, signal.SIGSTOP)
            for pfn in pfns:
                inject.hwpoison(pfn)
            told: dict[str, str] = {}
            while len(told) < 2:
                event = events.next("GUEST_FROZEN", "INCIDENT_FAILED")
                told[event["vm"]] = event["event"]
            assert told == {"web1": "INCIDENT_FAILED", "web2": "GUEST_FROZEN"}, daemon.said()
            before = counter(other, hva)
            assert unlocked(other_disk)
            virsh("resume", "web2")
            assert counter(other, hva) == before
        finally:
            # Before libvirt is told to destroy them: it asks QEMU. web1 may be dead of its page by then.
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
            virsh("destroy", "web2")
