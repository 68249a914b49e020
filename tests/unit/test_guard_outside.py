# SPDX-License-Identifier: MIT
"""What reaches the outside by other ways than image files and taps: with real QEMUs."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_guard_release import QEMUS, Refuses, free, image, with_qemu

from hwerr_notify.bpf import inode_of
from hwerr_notify.guard import disks, outside
from hwerr_notify.guard.errors import Fault
from hwerr_notify.guard.kernel import KernelGuard
from hwerr_notify.guard.policy import Policy, VmPolicy
from hwerr_notify.guard.process import Connection, Process
from hwerr_notify.guard.seal import Sealer
from hwerr_notify.guard.steps import Steps
from hwerr_notify.guard.store import Incident, Step, Store
from hwerr_notify.guard.vm import Machine, Vm, look

LIMITS = {"stop": 60.0, "record": 60.0, "release": 60.0, "seal": 60.0, "tell": 1.0, "keep": 60.0}


async def release(home: Path, monitor: Refuses, process: Process, machine: Machine) -> Step:
    """The step, as it is done with a guest of which `machine` was known. Fault."""

    async def no_hooks(_vm: Vm, _incident: Incident) -> None:
        return

    policy = Policy(Path("/none"), state_dir=home, limits=LIMITS)
    steps = Steps(policy, Store(home), KernelGuard(None), Sealer(), no_hooks)
    vm = Vm("web1", None, process, VmPolicy(qmp="/x"), "x", monitor, machine)
    incident = Incident("i", "boot", "web1", None, process.pid, process.start_ticks, "x", {}, 1, 1)
    incident = incident.with_step("record", Step("done", 1, 2, "", {"machine": machine.to_json()}))
    return await steps._release(vm, incident, time.time_ns())


@contextmanager
def serving(path: Path, *argv: str) -> Iterator[None]:
    """A program that listens there."""
    with subprocess.Popen(argv) as child:
        try:
            while not path.exists():
                assert child.poll() is None, argv
                os.sched_yield()
            yield
        finally:
            child.kill()


def run(
    qemu: str, home: Path, options: list[str], job: Callable[[Refuses, Process], Awaitable[None]], **more: Any
) -> None:
    asyncio.run(with_qemu(qemu, home, options, job, **more))


# -- devices ------------------------------------------------------------------


@pytest.mark.parametrize("qemu", QEMUS)
@pytest.mark.parametrize("name", ["v0", None])
def test_a_device_whose_other_half_is_another_program(qemu: str, name: str | None, tmp_path: Path) -> None:
    """It stays in use: not released, and said by name. What can be is released all the same."""
    disk, other, path = image(tmp_path, "disk", "raw"), image(tmp_path, "other", "raw"), tmp_path / "socket"
    options = [
        "-object", "memory-backend-memfd,id=ram,size=16M,share=on", "-machine", "memory-backend=ram",
        "-chardev", f"socket,id=c0,path={path}",
        "-device", "vhost-user-blk-pci,chardev=c0" + (f",id={name}" if name else ""),
        "-blockdev", f"driver=file,node-name=n0,filename={other}", "-device", "virtio-blk-pci,drive=n0",
    ]  # fmt: skip
    shown = f"vhost-user-blk {name or 'device[0]'}"

    async def job(monitor: Refuses, process: Process) -> None:
        machine = await look(monitor, process)
        assert machine.devices == (shown,)
        assert Machine.from_json(machine.to_json()) == machine
        with pytest.raises(Fault) as failed:
            await release(tmp_path, monitor, process, machine)
        assert str(failed.value) == f"{shown}: not released by this version"
        assert free(other)
        # QEMU's word alone does not undo what was known.
        monitor.lies = {"qom-list": []}
        assert (await look(monitor, process, machine)).devices == (shown,)

    server = [
        "qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f0,filename={disk}", "--export",
        f"vhost-user-blk,id=e0,addr.type=unix,addr.path={path},node-name=f0,writable=on",
    ]  # fmt: skip
    with serving(path, *server):
        run(qemu, tmp_path, options, job)


@pytest.mark.parametrize("qemu", QEMUS)
@pytest.mark.parametrize("kind", ["nvdimm", "virtio-pmem"])
def test_memory_that_is_a_file_of_others_too(qemu: str, kind: str, tmp_path: Path) -> None:
    """What the guest wrote there may reach the file whenever the kernel likes."""
    file = image(tmp_path, "pmem", "raw")
    os.truncate(file, 16 << 20)
    device = "nvdimm" if kind == "nvdimm" else "virtio-pmem-pci"
    options = [
        "-machine", "nvdimm=on", "-m", "16M,slots=2,maxmem=1G",
        "-object", f"memory-backend-file,id=m0,share=on,mem-path={file},size=16M",
        "-device", f"{device},memdev=m0,id=p0",
    ]  # fmt: skip

    async def job(monitor: Refuses, process: Process) -> None:
        machine = await look(monitor, process)
        assert machine.devices == (f"{kind} p0",)
        with pytest.raises(Fault, match=f"^{kind} p0: not released by this version$"):
            await release(tmp_path, monitor, process, machine)

    run(qemu, tmp_path, options, job)


def test_what_the_kernel_serves_is_seen_without_qemu(tmp_path: Path) -> None:
    """By the files that it has open, but for what goes with the network, and a vsock."""
    (child := subprocess.Popen(["sleep", "1000"])).poll()
    process = Process.open(child.pid)
    try:
        files = ["/dev/vhost-net", "/dev/vhost-vsock", "/dev/vhost-scsi", "/dev/vhost-vdpa-3", "/dev/null"]
        process._links = lambda: [(str(n), f) for n, f in enumerate(files)]  # type: ignore[method-assign]
        assert process.names() == process.peek()[1] == files
        with pytest.raises(Fault, match="/dev/vhost-scsi: not released by this version; /dev/vhost-vdpa-3: "):
            outside.nothing_else(process.names(), [])
    finally:
        child.kill()
        child.wait()


# -- network disks ---------------------------------------------------------------------


def connections(process: Process) -> tuple[Connection, ...]:
    assert process.look().connections == ()
    return process.look(connections=True).connections


def a_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("qemu", QEMUS)
@pytest.mark.parametrize("kind", ["unix", "inet"])
def test_a_disk_on_the_network_is_seen_to_be_gone(qemu: str, kind: str, tmp_path: Path) -> None:
    """By its connection, whatever else is connected: a serial port, another's socket."""
    disk, serial, other = image(tmp_path, "disk", "raw"), tmp_path / "serial", tmp_path / "other"
    path, port = tmp_path / "nbd", a_port()
    if kind == "unix":
        place, listens = f"server.type=unix,server.path={path}", ["-k", str(path)]
    else:
        place, listens = f"server.type=inet,server.host=127.0.0.1,server.port={port}", ["-p", str(port)]
    peer = str(path) if kind == "unix" else f"127.0.0.1:{port}"
    with (
        socket.create_server(("127.0.0.1", 0)) as far,
        socket.socket(socket.AF_UNIX) as near,
        serving(tmp_path / "pid", "qemu-nbd", "-f", "raw", *listens, "-t", "-e", "4",
                "--pid-file", str(tmp_path / "pid"), str(disk)),
    ):  # fmt: skip
        near.bind(str(serial))
        near.listen()
        options = [
            "-blockdev", f"driver=nbd,node-name=n0,{place}", "-device", "virtio-blk-pci,drive=n0,id=v0",
            "-chardev", f"socket,id=c0,path={serial}",
            "-chardev", f"socket,id=c1,host=127.0.0.1,port={far.getsockname()[1]}",
            "-vnc", f"unix:{other}",
        ]  # fmt: skip

        async def job(monitor: Refuses, process: Process) -> None:
            machine = await look(monitor, process)
            assert len(machine.remotes) == 1
            known = frozenset(machine.remotes), frozenset(machine.peers)
            assert outside.connected(connections(process), *known) == [peer]
            assert Machine.from_json(machine.to_json()) == machine
            # QEMU says that there is none.
            monitor.lies = {"query-block": [], "query-named-block-nodes": []}
            with pytest.raises(Fault, match=f"QEMU says its disks are gone, and is connected to {peer}"):
                await release(tmp_path, monitor, process, machine)
            monitor.lies = {}
            step = await release(tmp_path, monitor, process, machine)
            assert step.facts["detached"]
            assert outside.connected(connections(process), *known) == []
            # Somebody has it connect once more: seen, whatever the node is called.
            back = {"driver": "nbd", "node-name": "back", "server": {"type": "unix", "path": str(path)}}
            if kind == "inet":
                back["server"] = {"type": "inet", "host": "127.0.0.1", "port": str(port)}
            await monitor.execute("blockdev-add", back)
            assert outside.connected(connections(process), *known) == [peer]

        run(qemu, tmp_path, options, job)


def test_a_socket_under_another_path_and_another_protocol(tmp_path: Path) -> None:
    """A server's path may lead by a link, its name may be abstract, its address of 128 bits."""
    me = Process.open(os.getpid())
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    bound, used = f"{tmp_path}/run/hw-nbd", f"{tmp_path}/link/hw-nbd"
    with (
        socket.socket(socket.AF_UNIX) as server,
        socket.socket(socket.AF_UNIX) as client,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX) as to_abstract,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as six,
        socket.create_connection(six.getsockname()[:2]) as to_six,
        six.accept()[0],
    ):
        server.bind(bound)
        server.listen()
        client.connect(used)
        abstract.bind(f"\0hw-{os.getpid()}-abstract")
        abstract.listen()
        to_abstract.connect(abstract.getsockname())
        others = frozenset(c.peer for c in connections(me) if c.fd != to_six.fileno())
        port = f"[::1]:{six.getsockname()[1]}"
        disk = frozenset({f"nbd nbd+unix:///?socket={used}"})
        assert sorted(outside.connected(connections(me), disk, others)) == sorted([bound, port])
        assert outside.connected(connections(me), disk, others | {port}) == [bound]
        disk = frozenset({f'nbd json:{{"path": "hw-{os.getpid()}-abstract"}}'})
        assert outside.connected(connections(me), disk, others | {port}) == [f"@hw-{os.getpid()}-abstract"]
    me.close()


def test_who_accepts_is_not_who_connects(tmp_path: Path) -> None:
    """Monitors, VNC and their like are others' connections."""
    me = Process.open(os.getpid())
    path = str(tmp_path / "socket")
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as to_unix,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as lone,
    ):
        unix.bind(path)
        unix.listen()
        lone.bind(("127.0.0.1", 0))
        mine = {fd.fileno() for fd in (tcp, unix, to_unix, lone)}
        to_unix.connect(path)
        with socket.create_connection(tcp.getsockname()) as to_tcp, tcp.accept()[0], unix.accept()[0]:
            mine.add(to_tcp.fileno())
            where = f"127.0.0.1:{tcp.getsockname()[1]}"
            found = {(c.fd, c.peer) for c in connections(me) if c.fd in mine or c.peer == where}
            assert found == {(to_unix.fileno(), path), (to_tcp.fileno(), where)}
    me.close()


# -- open files ------------------------------------------------------------------------


def handed(home: Path, form: str) -> tuple[Path, int, list[str]]:
    """An image, open; and what makes it a disk of the QEMU that has the file, too."""
    disk = image(home, "disk", form)
    fd = os.open(disk, os.O_RDWR)
    options = [
        "-add-fd", f"fd={fd},set=7",
        "-blockdev", f"driver={form},node-name=n0,file.driver=file,file.filename=/dev/fdset/7",
        "-device", "virtio-blk-pci,drive=n0,id=v0",
    ]  # fmt: skip
    return disk, fd, options


@pytest.mark.parametrize("qemu", QEMUS)
def test_an_image_that_was_given_as_an_open_file(qemu: str, tmp_path: Path) -> None:
    """What it is is known, though it has no name. QEMU keeps a file of its own: if it does not close that,
    the process is to be frozen, too."""
    disk, fd, options = handed(tmp_path, "raw")

    async def job(monitor: Refuses, process: Process) -> None:
        os.close(fd)
        machine = await look(monitor, process)
        images = frozenset(machine.images)
        (given,) = machine.given
        status = disk.stat()
        assert given.shown == (status.st_dev, status.st_ino)
        assert given.kernel == inode_of(disk)
        assert Machine.from_json(machine.to_json()) == machine
        monitor.lies = {"query-block": [], "query-named-block-nodes": []}
        with pytest.raises(Fault, match=f"QEMU says its disks are gone, and holds {disk}"):
            await release(tmp_path, monitor, process, machine)
        monitor.lies = {}
        step = await release(tmp_path, monitor, process, machine)
        assert free(disk)
        assert step.facts["detached"] is (disks.still_held(process, images, machine.given) == [])
        assert step.facts["detached"] or f"QEMU keeps the open file that it was given: {disk}" in step.detail
        # Those that it has taken back count as before.
        back = {"driver": "file", "node-name": "back", "filename": str(disk)}
        await monitor.execute("blockdev-add", back)
        assert disks.still_held(process, images, machine.given)

    run(qemu, tmp_path, options, job, pass_fds=(fd,))


@pytest.mark.parametrize("qemu", QEMUS)
def test_a_given_file_whose_set_is_forgotten(qemu: str, tmp_path: Path) -> None:
    """Whoever told QEMU so: what it locks is known."""
    disk, fd, options = handed(tmp_path, "qcow2")

    async def job(monitor: Refuses, process: Process) -> None:
        os.close(fd)
        await monitor.execute("cont")
        await monitor.execute("remove-fd", {"fdset-id": 7})
        machine = await look(monitor, process)
        assert [given.kernel for given in machine.given] == [inode_of(disk)]
        assert not free(disk)
        await release(tmp_path, monitor, process, machine)
        assert free(disk)

    run(qemu, tmp_path, options, job, pass_fds=(fd,))


# -- one part that fails --------------------------------------------------------


def test_a_network_that_stays_does_not_keep_the_disks(tmp_path: Path) -> None:
    disk = image(tmp_path, "disk", "qcow2")
    options = ["-blockdev", f"driver=qcow2,node-name=n0,file.driver=file,file.filename={disk}",
               "-device", "virtio-blk-pci,drive=n0,id=v0", "-netdev", "user,id=u0"]  # fmt: skip

    async def job(monitor: Refuses, process: Process) -> None:
        machine = await look(monitor, process)
        monitor.refused = "netdev_del"
        assert not free(disk)
        with pytest.raises(Fault, match="network backend u0: not today"):
            await release(tmp_path, monitor, process, machine)
        assert free(disk)
        # And both are told.
        monitor.lies = {"query-block": ["nonsense"]}
        with pytest.raises(AttributeError):
            await release(tmp_path, monitor, process, machine)

    run("qemu-system-x86_64", tmp_path, options, job)
