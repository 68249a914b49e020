# SPDX-License-Identifier: MIT
"""Taking disks away from a real QEMU: of this machine, and of another release where HWERR_QEMU names one."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hwerr_notify.bpf import inode_of
from hwerr_notify.guard import disks
from hwerr_notify.guard.errors import Fault, MonitorError, Refused
from hwerr_notify.guard.monitor import QmpMonitor
from hwerr_notify.guard.process import Process

QEMUS = ["qemu-system-x86_64", *filter(None, [os.environ.get("HWERR_QEMU")])]


class Refuses(QmpMonitor):
    """A monitor that does not do one command, and lies about others."""

    refused = "nothing"
    lies: Mapping[str, Any] = {}

    async def execute(self, command: str, arguments: dict[str, Any] | None = None, **more: Any) -> Any:
        if command == self.refused:
            raise Refused("GenericError", "not today")
        if command in self.lies:
            return self.lies[command]
        # A machine that is busy takes its time.
        return await super().execute(command, arguments, **{**more, "limit": 60.0})


def image(home: Path, name: str, form: str) -> Path:
    path = home / f"{name}.{form}"
    subprocess.run(["qemu-img", "create", "-q", "-f", form, str(path), "16M"], check=True)
    return path


def free(path: Path) -> bool:
    """Whether another QEMU could have the image."""
    argv = ["qemu-io", "-f", path.suffix[1:], "-c", "write -P 7 0 4096", str(path)]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


async def with_qemu(
    qemu: str,
    home: Path,
    options: list[str],
    job: Callable[[Refuses, Process], Awaitable[None]],
    **more: Any,
) -> None:
    """Starts a guest that has no program, and stops it. `more` is for its process."""
    path = home / "qmp"
    argv = [qemu, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc,accel=tcg",
            "-m", "16M", "-qmp", f"unix:{path},server=on,wait=off", *options]  # fmt: skip
    child = await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.DEVNULL, **more)
    try:
        monitor = None
        while monitor is None:
            assert child.returncode is None
            # It may have made its socket and not listen yet.
            with suppress(MonitorError):
                monitor = await Refuses.connect(path, lambda _event: None, limit=60)
            await asyncio.sleep(0.02)
        assert isinstance(monitor, Refuses)
        process = Process.open(child.pid)
        await monitor.execute("stop")
        await job(monitor, process)
        process.close()
        await monitor.aclose()
    finally:
        child.kill()
        await child.wait()


@pytest.mark.parametrize("qemu", QEMUS)
def test_every_kind_of_disk_is_detached_for_good(qemu: str, tmp_path: Path) -> None:
    images = {form + kind: image(tmp_path, kind, form) for form, kind in
              (("qcow2", "thread"), ("qcow2", "legacy"), ("raw", "ide"), ("raw", "scsi"))}  # fmt: skip
    thread, legacy, ide, scsi = images.values()
    options = [
        "-object", "iothread,id=io0",
        "-blockdev", f"driver=qcow2,node-name=n0,file.driver=file,file.filename={thread}",
        "-device", "virtio-blk-pci,drive=n0,iothread=io0",
        "-drive", f"file={legacy},if=none,id=l0,format=qcow2", "-device", "virtio-blk-pci,drive=l0",
        "-drive", f"file={ide},if=ide,format=raw,index=0",
        "-device", "virtio-scsi-pci,id=s0",
        "-blockdev", f"driver=file,node-name=n1,filename={scsi}", "-device", "scsi-hd,drive=n1",
    ]  # fmt: skip

    async def job(monitor: Refuses, process: Process) -> None:
        assert not any(map(free, images.values()))
        paths = frozenset(map(str, images.values()))
        released = await disks.release(monitor, paths, poisoned=True)
        assert disks.verify(process, paths, (), released, process.look()) == released
        assert released.detached, released.how
        for again in range(2):
            assert all(map(free, images.values()))
            assert disks.still_held(process, paths) == []
            # Another reset, another start: it has nothing to take back.
            await monitor.execute("system_reset")
            await monitor.execute("cont")
            if not again:
                assert (await disks.release(monitor, paths, poisoned=True)).detached

    asyncio.run(with_qemu(qemu, tmp_path, options, job))


USERS = {
    "a job": (
        ("blockdev-mirror", {"job-id": "j0", "device": "n0", "target": "n1", "sync": "full", "speed": 1}),
    ),
    "an NBD export": (
        ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "{home}/nbd"}}}),
        ("block-export-add", {"type": "nbd", "id": "e0", "node-name": "n0"}),
    ),
    "a vhost-user export": (
        ("block-export-add", {"type": "vhost-user-blk", "id": "e0", "node-name": "n1", "writable": True,
                              "addr": {"type": "unix", "path": "{home}/vu"}}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("qemu", QEMUS)
@pytest.mark.parametrize("user", USERS)
def test_who_else_uses_a_disk_is_found_where_it_stays(qemu: str, user: str, tmp_path: Path) -> None:
    """What was asked in good time says nothing of jobs and exports."""
    paths = [image(tmp_path, name, "raw") for name in ("first", "second")]
    options = [word for n, path in enumerate(paths) for word in (
        "-blockdev", f"driver=file,node-name=n{n},filename={path}")]  # fmt: skip
    options += ["-device", "virtio-blk-pci,drive=n0"]

    async def job(monitor: Refuses, process: Process) -> None:
        for command, arguments in USERS[user]:
            text = json.dumps(arguments).replace("{home}", str(tmp_path))
            await monitor.execute(command, json.loads(text))
        assert not free(paths[0])
        asked = [await monitor.execute(*question) for question in disks.QUESTIONS]
        images = frozenset(map(str, paths))
        released = await disks.release(monitor, images, asked, poisoned=True)
        assert released == disks.Released(True, "detached")
        assert disks.verify(process, images, (), released, process.look()) == released
        assert await monitor.execute("query-jobs") == []
        assert await monitor.execute("query-block-exports") == []
        assert all(map(free, paths))

    asyncio.run(with_qemu(qemu, tmp_path, options, job))


@pytest.mark.parametrize("qemu", QEMUS)
def test_what_stays_attached_is_made_inactive(qemu: str, tmp_path: Path) -> None:
    """By the command for it, from QEMU 10.0; before, by migrating. `cont` undoes it."""
    disk = image(tmp_path, "disk", "qcow2")
    options = ["-blockdev", f"driver=qcow2,node-name=n0,file.driver=file,file.filename={disk}",
               "-device", "virtio-blk-pci,drive=n0"]  # fmt: skip

    async def job(monitor: Refuses, process: Process) -> None:
        major = (await monitor.execute("query-version"))["qemu"]["major"]
        monitor.refused = "qom-set"
        if major < 10:
            with pytest.raises(Fault, match="would read the poisoned page"):
                await disks.release(monitor, frozenset({str(disk)}), poisoned=True)
            assert not free(disk)
        released = await disks.release(monitor, frozenset({str(disk)}), poisoned=major >= 10)
        assert not released.detached
        assert ("blockdev-set-active" if major >= 10 else "migrated to nowhere") in released.how
        assert free(disk)
        # Whoever did it may have ended before he could note it.
        assert await disks.release(monitor, frozenset({str(disk)}), poisoned=major >= 10) == released
        assert free(disk)
        await monitor.execute("cont")
        assert not free(disk)

    asyncio.run(with_qemu(qemu, tmp_path, options, job))


def test_an_image_is_known_by_what_it_is(tmp_path: Path) -> None:
    """Open under a name of which QEMU says nothing: a link to it. Not: another file of a name that it had."""
    real, link, other = tmp_path / "real.raw", tmp_path / "link.raw", tmp_path / "other.raw"
    for path in (real, other):
        path.write_bytes(bytes(4096))
    os.link(real, link)
    me = Process.open(os.getpid())
    with link.open("r+b"), other.open("r+b"):
        assert [h.path for h in disks.still_held(me, frozenset({str(real)}))] == [str(link)]
        assert disks.still_held(me, frozenset({str(tmp_path / "gone.raw")})) == []
        # As QEMU was given it, from where it runs.
        relative = os.path.relpath(real)
        assert [h.path for h in disks.still_held(me, frozenset({relative}))] == [str(link)]
        assert inode_of(relative, os.getpid()) == inode_of(real) == inode_of(link, os.getpid())
        assert inode_of(real)[1] == real.stat().st_ino
    assert disks.still_held(me, frozenset({str(real)})) == []
    me.close()
