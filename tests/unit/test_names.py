# SPDX-License-Identifier: MIT
"""Names of VMs, with files laid out as /proc and libvirt lay them out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from uuid import UUID

import pytest

import hwerr_notify as h
from hwerr_notify import names
from hwerr_notify.names import Names, qemu_identity

U = UUID("12345678-1234-5678-1234-567812345678")
TICK = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("argv", "name", "uuid"),
    [
        ("qemu -name guest=web1,debug-threads=on -uuid " + str(U), "web1", U),
        ("qemu -name web1", "web1", None),
        ("qemu -name web1,process=x", "web1", None),
        ("qemu -name process=x,guest=web1", "web1", None),
        ("qemu --name web1 --uuid " + str(U), "web1", U),
        ("qemu -name a,,b,process=x", "a,b", None),
        ("qemu -name debug-threads=on", None, None),
        ("qemu -name old -name new", "new", None),
        ("qemu -name", None, None),
        ("qemu -uuid nonsense", None, None),
        ("qemu -name guest=", None, None),
        ("", None, None),
    ],
)
def test_qemu_command_line(argv: str, name: str | None, uuid: UUID | None) -> None:
    assert qemu_identity(argv.split()) == (name, uuid)


class World:
    """A /proc and a /run/libvirt of our own."""

    def __init__(self, top: Path) -> None:
        self.proc, self.libvirt = top / "proc", top / "libvirt"
        self.names = Names(limit=3, proc=self.proc, libvirt=self.libvirt)

    def process(self, pid: int, start: int, cmdline: str, comm: str = "qemu") -> h.Guest:
        """Starts it, `start` ticks after boot; the guest a record would name."""
        there = self.proc / str(pid)
        there.mkdir(parents=True, exist_ok=True)
        fields = ["S", *["0"] * 18, str(start), *["0"] * 30]
        (there / "stat").write_text(f"{pid} ({comm}) {' '.join(fields)}\n")
        (there / "comm").write_text(f"{comm}\n")
        (there / "cmdline").write_bytes(cmdline.replace(" ", "\0").encode() + b"\0")
        return h.Guest(pid, start_ns=start * TICK + TICK // 3)

    def domain(self, name: str, pid: int, xml: str) -> None:
        there = self.libvirt / "qemu"
        there.mkdir(parents=True, exist_ok=True)
        (there / f"{name}.pid").write_text(f"{pid}\n")
        (there / f"{name}.xml").write_text(xml)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_from_the_command_line(world: World) -> None:
    assert world.names(world.process(5, 100, f"qemu -name web1 -uuid {U}")) == ("web1", U)


def test_a_name_that_looks_like_a_stat_line(world: World) -> None:
    guest = world.process(5, 100, "qemu -name web1", comm="x) S 1 2 (y")
    assert world.names(guest)[0] == "web1"


def test_a_reused_number_is_not_misnamed(world: World) -> None:
    first = world.process(5, 100, "qemu -name web1")
    assert world.names(first)[0] == "web1"
    second = world.process(5, 300, "qemu -name other")
    assert world.names(second)[0] == "other"
    assert world.names(first)[0] == "web1"
    never_seen = h.Guest(5, start_ns=200 * TICK)
    assert world.names(never_seen) == (None, None)


def test_a_process_that_is_gone(world: World) -> None:
    guest = world.process(5, 100, "qemu -name web1")
    assert world.names(guest)[0] == "web1"
    shutil.rmtree(world.proc / "5")
    assert world.names(guest)[0] == "web1", "remembered"
    assert world.names(h.Guest(6, start_ns=1)) == (None, None)


def test_a_vm_that_dies_of_its_error_was_known_before(world: World) -> None:
    guest = world.process(5, 100, "qemu -name web1", comm="qemu-system-x86")
    other = world.process(6, 100, "sh -name web2", comm="sh")
    world.names.learn()
    shutil.rmtree(world.proc)
    assert world.names(guest) == ("web1", None)
    assert world.names(other) == (None, None)
    world.names.learn()


def test_learning_again_looks_at_what_is_new_only(world: World) -> None:
    first = world.process(5, 100, "qemu -name web1", comm="qemu-system-x86")
    world.names.learn()
    (world.proc / "5" / "cmdline").unlink()
    second = world.process(6, 100, "qemu -name web2", comm="qemu-system-x86")
    world.names.learn()
    shutil.rmtree(world.proc)
    assert [world.names(g)[0] for g in (first, second)] == ["web1", "web2"]


def test_what_is_remembered_is_bounded(world: World) -> None:
    guests = [world.process(n, 100, f"qemu -name vm{n}") for n in range(1, 6)]
    for guest in guests:
        world.names(guest)
    shutil.rmtree(world.proc)
    assert [world.names(g)[0] for g in reversed(guests)] == ["vm5", "vm4", "vm3", None, None]


def test_no_name_is_asked_again_later_and_a_name_is_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 100.0
    monkeypatch.setattr(names, "monotonic", lambda: clock)
    guest = world.process(7, 100, "vmm")
    assert world.names(guest) == (None, None)
    world.domain("db1", 7, "<domain><name>db1</name></domain>")
    assert world.names(guest) == (None, None), "believed for a moment"
    clock += names.RETRY_S
    assert world.names(guest) == ("db1", None)
    shutil.rmtree(world.proc)
    clock += names.RETRY_S
    assert world.names(guest) == ("db1", None), "kept when the process has gone"


def test_from_libvirt(world: World) -> None:
    guest = world.process(7, 100, "cloud-hypervisor --api-socket x", comm="ch")
    world.domain("other", 8, "<nonsense")
    world.domain("db1", 7, f"<domstatus><domain><name>db1</name><uuid>{U}</uuid></domain></domstatus>")
    assert world.names(guest) == ("db1", U)


@pytest.mark.parametrize("xml", ["", "<a", "<domstatus/>", "<domain><uuid>x</uuid></domain>"])
def test_libvirt_files_that_are_broken(world: World, xml: str) -> None:
    guest = world.process(7, 100, "vmm")
    world.domain("db1", 7, xml)
    assert world.names(guest)[0] in (None, "db1")
    assert world.names(guest)[1] is None


def test_a_command_line_gives_what_libvirt_lacks(world: World) -> None:
    guest = world.process(7, 100, "qemu -name web1")
    world.domain("web1", 7, f"<domain><name>x</name><uuid>{U}</uuid></domain>")
    assert world.names(guest) == ("web1", U)


def test_files_that_may_not_be_read(world: World) -> None:
    guest = world.process(5, 100, "qemu -name web1")
    (world.proc / "5" / "cmdline").unlink()
    (world.proc / "5" / "cmdline").mkdir()
    assert world.names(guest) == (None, None)


def test_this_process_is_found_in_the_real_proc() -> None:
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    assert Names()._start(os.getpid()) == int(stat[19])
    assert Names()._start(1 << 30) is None
