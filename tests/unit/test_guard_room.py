# SPDX-License-Identifier: MIT
"""A dump leaves room on its disk for the records of later incidents."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from hwerr_notify.guard import check as check_module
from hwerr_notify.guard.check import guest_memory, room
from hwerr_notify.guard.dump import write_core
from hwerr_notify.guard.errors import Fault
from hwerr_notify.guard.layout import Range
from hwerr_notify.guard.policy import Policy, PolicyError, parse

MIB = 1 << 20
MEMORY = 4 * MIB


@pytest.fixture
def memory() -> Iterator[Range]:
    """Of this process, none of it zeros."""
    data = ctypes.create_string_buffer(b"\xa5" * MEMORY, MEMORY)
    yield Range(0, MEMORY, ctypes.addressof(data))
    del data


def free(of: int) -> SimpleNamespace:
    return SimpleNamespace(f_bavail=of // 4096, f_frsize=4096)


def test_a_dump_stops_before_the_reserve(
    tmp_path: Path, memory: Range, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk on which what is written is gone from what is free."""
    size = 10 * MIB

    def left(fd: int) -> SimpleNamespace:
        return free(size - os.fstat(fd).st_blocks * 512)

    monkeypatch.setattr(os, "fstatvfs", left)
    core = tmp_path / "memory.core"
    with pytest.raises(Fault, match=r"less than 8 MiB would be left .*\(dump.reserve\)"):
        write_core(core, os.getpid(), [memory], [], [], {}, reserve=8 * MIB)
    assert list(tmp_path.iterdir()) == []
    write_core(core, os.getpid(), [memory], [], [], {}, reserve=5 * MIB)
    assert core.exists()


def test_pages_of_zeros_take_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fstatvfs", lambda _fd: free(0))
    zeros = ctypes.create_string_buffer(MEMORY)
    core = tmp_path / "memory.core"
    write_core(
        core, os.getpid(), [Range(0, MIB, (ctypes.addressof(zeros) | 4095) + 1)], [], [], {}, reserve=0
    )
    assert core.exists()


VM = '[[vm]]\nqmp = "/run/qemu/*.qmp"\n'


@pytest.mark.parametrize(
    ("text", "size"),
    [("", 256 * MIB), ("reserve = 0", 0), ("reserve = 4096", 4096), ('reserve = "2 GiB"', 2 << 30),
     ('reserve = "512MiB"', 512 * MIB), ('reserve = "10KiB"', 10240), ('reserve = "1TiB"', 1 << 40)],
)  # fmt: skip
def test_the_reserve(text: str, size: int) -> None:
    assert parse(f"[dump]\n{text}\n{VM}", Path("/p")).dump_reserve == size


@pytest.mark.parametrize("value", ["-1", "true", '"2 GB"', '"much"', "1.5", "[]"])
def test_no_reserve(value: str) -> None:
    with pytest.raises(PolicyError, match=r"^/p:2: dump.reserve: must be a size"):
        parse(f"[dump]\nreserve = {value}\n{VM}", Path("/p"))


@pytest.mark.parametrize(
    ("argv", "size"),
    [
        (["qemu-system-x86_64", "-m", "16M"], 16 * MIB),
        (["/usr/bin/qemu-system-x86_64", "-m", "size=4194304k,slots=16,maxmem=8G"], 4 << 30),
        (["qemu-system-x86_64", "-m", "2048"], 2 << 30),
        (["qemu-system-x86_64", "-m", "1.5G"], 1536 * MIB),
        (["kvm", "--m", "slots=2,size=1T"], 1 << 40),
        (["qemu-system-x86_64"], 128 * MIB),
        (["qemu-system-x86_64", "-m", "x"], None),
    ],
)
def test_memory_of_a_guest(argv: list[str], size: int | None) -> None:
    assert guest_memory(argv) == size


def test_room_for_the_largest_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "_guests", lambda: [1 << 30, 4 << 30])
    have = {"free": 5 << 30}
    monkeypatch.setattr(os, "statvfs", lambda _path: free(have["free"]))
    policy = Policy(Path("/p"), dump_dir=tmp_path / "not/yet")
    (found,) = room(policy)
    assert (found.name, found.state) == ("dump", "ok")
    have["free"] = (4 << 30) + 255 * MIB
    (found,) = room(policy)
    assert (found.state, "4096 MiB" in found.text) == ("weaker", True)
    assert list(room(Policy(Path("/p"), dump=False))) == []
