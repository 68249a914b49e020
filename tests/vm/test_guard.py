# SPDX-License-Identifier: MIT
"""hwerr-guard: a guest that an error hits is stopped, released, sealed, kept, told of."""

from __future__ import annotations

import subprocess
import uuid
from pathlib import Path

import pytest
from guarded import Daemon, counter, guest_config, vcpu_time
from testbed import inject, pagemap
from testbed.guest import COUNTER_GPA, Guest

pytestmark = pytest.mark.amd

HIT_GPA = 0x200000


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


def hit(guest: Guest, gpa: int = HIT_GPA) -> None:
    """An uncorrected error in the guest's memory: memory_failure() on the page."""
    inject.hwpoison(pagemap.pfn_of(guest.pid, guest.gpa2hva(gpa)))


def locked_by_nobody(path: Path) -> bool:
    """Whether another QEMU could have the image."""
    done = subprocess.run(["qemu-io", "-c", "write 0 4096", str(path)], capture_output=True, check=False)
    return done.returncode == 0


def test_an_error_freezes_the_guest(home: Path) -> None:
    disk = image(home)
    extra = ("-blockdev", f"driver=qcow2,node-name=d0,file.driver=file,file.filename={disk}",
             "-device", "virtio-blk-pci,drive=d0,id=vd0", "-netdev", "user,id=n0",
             "-device", "virtio-net-pci,netdev=n0")  # fmt: skip
    with Guest.start(guest_config("web1", home, *extra)) as guest, Daemon(home) as daemon:
        assert daemon.vm("web1")["state"] == "guarded"
        assert not locked_by_nobody(disk)
        hva = guest.gpa2hva(COUNTER_GPA)
        with daemon.follow() as events:
            hit(guest)
            told = events.next("GUEST_FROZEN", "INCIDENT_FAILED")
        assert told["event"] == "GUEST_FROZEN", (told, daemon.said())
        (incident,) = daemon.incidents()
        assert incident["state"] == "frozen"
        assert daemon.vm("web1")["state"] == "frozen"
        assert locked_by_nobody(disk)
        before = vcpu_time(guest), counter(guest, hva)
        print(daemon.said(), incident["steps"])
        assert (vcpu_time(guest), counter(guest, hva)) == before
        done = daemon.run("status", "web1")
        assert done.returncode == 10
        assert "FROZEN" in done.stdout
