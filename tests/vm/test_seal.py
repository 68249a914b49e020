# SPDX-License-Identifier: MIT
"""The seal on real QEMU/KVM guests: what is sealed never runs again, and nobody else notices."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed.guest import STATE, Guest, GuestConfig
from testbed.qmp import QmpError
from testbed.wait import until

from hwerr_notify import bpf
from hwerr_notify.bpf import PIN_DIR, Seal, start_of
from hwerr_notify.guard.process import Process
from hwerr_notify.guard.seal import Sealer

KVM_RUN = 0xAE80
MEM = 16 << 20
LIMIT = 60.0


@pytest.fixture
def seal() -> Iterator[Seal]:
    with Seal.load() as loaded:
        for tgid in loaded.sealed():
            loaded.unseal(tgid)
        yield loaded
        for tgid in loaded.sealed():
            loaded.unseal(tgid)


def counting(name: str, *extra: str) -> Guest:
    return Guest.start(GuestConfig(name=name, mem=MEM, code="count", extra=extra))


def counts(guest: Guest) -> bool:
    """Whether the guest's word goes up. A guest that runs counts between two monitor commands."""
    before = guest.counter()
    return any(guest.counter() != before for _ in range(20))


def vcpu_ns(guest: Guest) -> int:
    """CPU time of all vCPU threads so far."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in guest.vcpus())


def tries_to_run(guest: Guest) -> None:
    """`cont`, and wait for QEMU to have given up again."""
    assert guest.qmp is not None
    guest.qmp.events.clear()
    guest.qmp.execute("cont")
    guest.qmp.wait_event("STOP")


@pytest.mark.amd
def test_sealed_guest_never_runs_again(seal: Seal, tmp_path: Path) -> None:
    with counting("sealed") as guest, counting("free") as free:
        assert guest.qmp is not None
        assert counts(guest)
        assert counts(free)
        guest.qmp.execute("stop")
        still = guest.counter()
        seal.seal(guest.pid, start_of(guest.pid))

        tries_to_run(guest)
        assert guest.status() == "internal-error"
        assert "kvm run failed Operation not permitted" in (STATE / "sealed" / "log").read_text()
        refused = seal.sealed()[guest.pid].refusals
        assert refused >= 1
        assert guest.counter() == still

        for n in range(2):
            with pytest.raises(QmpError, match="Resetting the Virtual Machine is required"):
                guest.qmp.execute("cont")
            guest.qmp.execute("system_reset")
            tries_to_run(guest)
            assert guest.counter() == still
            assert seal.sealed()[guest.pid].refusals >= refused + n + 1
        os.kill(guest.pid, signal.SIGSTOP)
        os.kill(guest.pid, signal.SIGCONT)
        assert not counts(guest)
        assert guest.alive()

        core = Path("/tmp/core")
        guest.qmp.execute("dump-guest-memory", paging=False, protocol=f"file:{core}")
        with core.open("rb") as dump:
            assert dump.read(4) == b"\x7fELF"
        assert core.stat().st_size >= MEM
        core.unlink()

        assert counts(free)
        assert seal.sealed().keys() == {guest.pid}

        seal.unseal(guest.pid)
        guest.qmp.execute("system_reset")
        guest.qmp.execute("cont")
        assert counts(guest)


@pytest.mark.amd
def test_a_guard_whose_pins_are_gone_seals_all_the_same(seal: Seal) -> None:
    """It sees that what it has open is in force no more, and whom it had sealed is sealed again."""
    sealer = Sealer()
    sealer.open()
    with counting("before") as before, counting("after") as after:
        for guest in (before, after):
            assert guest.qmp is not None
            guest.qmp.execute("stop")
        stays = [guest.counter() for guest in (before, after)]
        first, second = Process.open(before.pid), Process.open(after.pid)
        try:
            sealed = asyncio.run(sealer.seal(first, kvm=True, whole=False, limit=LIMIT))
            assert not sealed.weaker
            assert sealer.holds(first, {})
            for pin in (*PIN_DIR.glob("hwerr_seal_*"), PIN_DIR / "hwerr_seals", PIN_DIR / "hwerr_kept_out"):
                pin.unlink()
            assert not sealer.holds(first, {})
            sealed = asyncio.run(sealer.seal(second, kvm=True, whole=False, limit=LIMIT))
            assert not sealed.weaker
            for guest, process, still in zip((before, after), (first, second), stays, strict=True):
                assert sealer.holds(process, {})
                tries_to_run(guest)
                assert guest.status() == "internal-error"
                assert guest.counter() == still
                assert sealer.refusals(process)
        finally:
            for process in (first, second):
                sealer.release(process)
                process.close()
            sealer.close()


@pytest.mark.amd
def test_where_a_disk_is_not_found_nobody_may_name_it_otherwise(seal: Seal) -> None:
    """QEMU opens it by whatever name it is told: then it is told nothing more."""
    sealer = Sealer()
    sealer.open()
    with counting("renamed") as guest:
        assert guest.qmp is not None
        guest.qmp.execute("stop")
        process = Process.open(guest.pid)
        try:
            gone = ["nosuch/disk.img"]
            sealed = asyncio.run(sealer.seal(process, kvm=True, whole=False, limit=LIMIT, images=gone))
            assert (sealed.weaker, sealed.process) == (False, True)
            assert "but for nosuch/disk.img" in sealed.how
            assert sealer.freezer.frozen(process)
        finally:
            sealer.freezer.thaw(process)
            sealer.release(process)
            process.close()
            sealer.close()


@pytest.mark.amd
def test_seal_takes_a_running_guest_at_its_next_exit(seal: Seal) -> None:
    """A vCPU that never leaves the guest is not taken out of it: that is what the stop is for."""
    with counting("running") as guest:
        assert guest.qmp is not None
        seal.seal(guest.pid, start_of(guest.pid))
        guest.qmp.events.clear()
        guest.qmp.execute("stop")
        tries_to_run(guest)
        assert not counts(guest)


@pytest.mark.amd
def test_several_vcpus(seal: Seal) -> None:
    with Guest.start(GuestConfig(name="smp", mem=MEM, code="count", smp=3)) as guest:
        assert guest.qmp is not None
        guest.qmp.execute("stop")
        seal.seal(guest.pid, start_of(guest.pid))
        spent = vcpu_ns(guest)
        tries_to_run(guest)
        assert not counts(guest)
        # What the refused call and its report cost, not a guest that spins.
        ran = vcpu_ns(guest) - spent
        guest.qmp.execute("system_reset")
        tries_to_run(guest)
        first = vcpu_ns(guest)
        assert not counts(guest)
        assert vcpu_ns(guest) - first <= ran


LOADER = """
    import os, signal, sys
    from hwerr_notify.bpf import Seal, start_of
    seal = Seal.load()
    seal.seal(int(sys.argv[1]), start_of(int(sys.argv[1])))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.amd
def test_outlives_its_loader() -> None:
    shutil.rmtree(PIN_DIR, ignore_errors=True)
    with counting("orphan") as guest:
        assert guest.qmp is not None
        guest.qmp.execute("stop")
        still = guest.counter()
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(LOADER), str(guest.pid)], check=False)
        assert done.returncode == -signal.SIGKILL
        tries_to_run(guest)
        assert guest.counter() == still
        with Seal.open_pinned() as seal:
            assert seal.sealed()[guest.pid].refusals >= 1
        # Loading again, as a daemon that starts does, changes nothing.
        with Seal.load() as seal:
            assert seal.sealed()[guest.pid].refusals >= 1
            guest.qmp.execute("system_reset")
            tries_to_run(guest)
            assert guest.counter() == still
            seal.unseal(guest.pid)


@pytest.mark.amd
def test_a_reused_number_is_not_hit(seal: Seal) -> None:
    with counting("other") as guest:
        seal.seal(guest.pid, start_of(guest.pid) - 10_000_000)
        assert guest.qmp is not None
        guest.qmp.execute("stop")
        guest.qmp.execute("cont")
        assert counts(guest)
        assert seal.sealed()[guest.pid].refusals == 0
        assert seal.forget_dead() == 1
        assert seal.sealed() == {}


CALLER = """
    #include <errno.h>
    #include <fcntl.h>
    #include <stdio.h>
    #include <sys/ioctl.h>
    int main(void)
    {
        int fd = open("/dev/null", O_RDONLY);

        puts("ready");
        fflush(stdout);
        while (getchar() != EOF) {
            printf("%d %d %d\\n", ioctl(fd, 0xae80, 0) ? errno : 0,
                   ioctl(fd, 0xae81, 0) ? errno : 0, ioctl(fd, 0xaf01, 0) ? errno : 0);
            fflush(stdout);
        }
        return 0;
    }
"""


@pytest.mark.parametrize("bits", [64, 32])
def test_callers_of_both_widths(seal: Seal, bits: int, tmp_path: Path) -> None:
    (tmp_path / "caller.c").write_text(textwrap.dedent(CALLER))
    caller = tmp_path / f"caller{bits}"
    subprocess.run(["gcc", f"-m{bits}", "-o", caller, tmp_path / "caller.c"], check=True)
    with subprocess.Popen(
        [caller], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"

        def call() -> list[int]:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            return [int(n) for n in child.stdout.readline().split()]

        assert call() == [errno.ENOTTY] * 3
        seal.seal(child.pid, start_of(child.pid))
        # KVM_RUN; another call to KVM; one to vhost.
        assert call() == [errno.EPERM, errno.ENOTTY, errno.EPERM]
        assert seal.sealed()[child.pid].refusals == 1
        assert seal.refused_opens(child.pid) == 1
        seal.seal(child.pid, start_of(child.pid))
        assert seal.sealed()[child.pid].refusals == 1
        seal.unseal(child.pid)
        assert call() == [errno.ENOTTY] * 3
        child.stdin.close()


OPENER = """
    import os, sys
    print("ready", flush=True)
    for line in sys.stdin:
        path, flags = line.split()
        try:
            os.close(os.open(path, int(flags), 0o600))
            print(0, flush=True)
        except OSError as error:
            print(error.errno, flush=True)
"""


def test_what_it_was_released_from_is_not_opened_again(seal: Seal, tmp_path: Path) -> None:
    """Images and devices, by whatever name and mode; other files are, and by others all are."""
    image, other, new = Path("/run/seal.image"), tmp_path / "other", tmp_path / "new"
    link = image.with_suffix(".link")
    for path in (image, other):
        path.write_bytes(bytes(4096))
    link.unlink(missing_ok=True)
    os.link(image, link)
    # A block device that is there is refused before it is asked what it is.
    block = Path("/dev/hwerr-seal")
    block.unlink(missing_ok=True)
    os.mknod(block, 0o600 | stat.S_IFBLK, os.makedev(7, 0))
    sealed, free = (
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(OPENER)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )
        for _ in range(2)
    )  # fmt: skip
    try:

        def opens(child: subprocess.Popen[str], path: object, flags: int) -> int:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(f"{path} {flags}\n")
            return int(child.stdout.readline())

        for child in (sealed, free):
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        names = [image, link, block, Path("/dev/net/tun")]
        before = {
            (path, flags): opens(sealed, path, flags) for path in names for flags in (os.O_RDONLY, os.O_RDWR)
        }
        assert before[image, os.O_RDWR] == 0
        seal.seal(sealed.pid, start_of(sealed.pid), [bpf.inode_of(image)])
        for refused, (path, flags) in enumerate(before, 1):
            # What is not there is not refused; what has no driver is, before one is looked for.
            if before[path, flags] != errno.ENOENT:
                assert opens(sealed, path, flags) == errno.EPERM, path
            assert opens(free, path, flags) == before[path, flags], path
            assert 0 < seal.refused_opens(sealed.pid) <= refused
        count = seal.refused_opens(sealed.pid)
        for path, flags in (
            (other, os.O_RDWR), (new, os.O_RDWR | os.O_CREAT | os.O_EXCL), (Path("/dev/null"), os.O_RDWR),
            (Path("/dev/urandom"), os.O_RDONLY), (other, os.O_WRONLY | os.O_TRUNC),
        ):  # fmt: skip
            assert opens(sealed, path, flags) == 0, path
        assert seal.refused_opens(sealed.pid) == count
        assert seal.sealed()[sealed.pid].refusals == 0
        # Again: nothing is lost. And one more file.
        seal.seal(sealed.pid, start_of(sealed.pid), [bpf.inode_of(other)])
        assert opens(sealed, image, os.O_RDONLY) == errno.EPERM
        assert opens(sealed, other, os.O_RDONLY) == errno.EPERM
        assert seal.refused_opens(sealed.pid) == count + 2
        assert seal.refused_opens(free.pid) == 0
        seal.unseal(sealed.pid)
        assert opens(sealed, image, os.O_RDWR) == 0
        assert seal.refused_opens(sealed.pid) == 0
        # Under its number there is nothing left for a later process.
        seal.seal(sealed.pid, start_of(sealed.pid))
        assert opens(sealed, image, os.O_RDWR) == 0
    finally:
        for child in (sealed, free):
            child.kill()
            child.communicate()
        for path in (image, link, block):
            path.unlink()


DOER = """
    import fcntl, os, socket, sys
    files = {path: os.open(path, os.O_RDWR | os.O_CREAT) for path in sys.argv[1:]}
    print("ready", flush=True)
    for line in sys.stdin:
        what, path = line.split()
        try:
            match what:
                case "write":
                    os.write(files[path], b"x")
                case "pwrite":
                    os.pwrite(files[path], b"x", 0)
                case "grow":
                    os.posix_fallocate(files[path], 0, 8192)
                case "lock" | "unlock":
                    kind = fcntl.LOCK_EX if what == "lock" else fcntl.LOCK_UN
                    fcntl.lockf(files[path], kind, 1, 100)
                case "read":
                    os.pread(files[path], 1, 0)
                case "tcp" | "udp":
                    kind = socket.SOCK_STREAM if what == "tcp" else socket.SOCK_DGRAM
                    with socket.socket(socket.AF_INET, kind) as sock:
                        sock.connect(("127.0.0.1", int(path)))
                case "unix":
                    with socket.socket(socket.AF_UNIX) as sock:
                        sock.connect(path)
            print(0, flush=True)
        except OSError as error:
            print(error.errno, flush=True)
"""


class Doer:
    """A process that does to its open files, and with sockets, what it is told."""

    def __init__(self, *files: Path) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(DOER), *map(str, files)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.pid = self._child.pid
        assert self._said() == "ready\n"

    def _said(self) -> str:
        assert self._child.stdout is not None
        return self._child.stdout.readline()

    def does(self, what: str, path: object) -> int:
        """0, or the error's number."""
        assert self._child.stdin is not None
        self._child.stdin.write(f"{what} {path}\n")
        return int(self._said())

    def __enter__(self) -> Doer:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate()


def test_what_is_open_is_not_written_to(seal: Seal, tmp_path: Path) -> None:
    """Nor locked: an image and a device, by whatever call. Another file is, a null device is, and by others
    all are."""
    image, other, null = Path("/run/seal.image"), tmp_path / "other", Path("/dev/null")
    # A character device that takes what it is written.
    device = Path("/dev/kmsg")
    with Doer(image, other, null, device) as sealed, Doer(image, other, null, device) as free:
        for what in ("write", "pwrite", "grow", "read", "lock"):
            assert sealed.does(what, image) == 0, what
        assert sealed.does("write", device) == 0
        seal.seal(sealed.pid, start_of(sealed.pid), [bpf.inode_of(image)])
        refused = 0
        for what in ("write", "pwrite", "grow"):
            assert sealed.does(what, image) == errno.EPERM, what
            refused += 1
            assert seal.refused_opens(sealed.pid) == refused
            assert free.does(what, image) == 0
            assert sealed.does(what, other) == 0
        assert sealed.does("write", device) == errno.EPERM
        assert seal.refused_opens(sealed.pid) == refused + 1
        assert free.does("write", device) == 0
        assert sealed.does("write", null) == 0
        assert sealed.does("read", image) == 0
        # What it has locked it can let go, and cannot take back.
        assert sealed.does("unlock", image) == 0
        assert sealed.does("lock", image) == errno.EPERM
        refused += 1
        assert free.does("lock", image) == 0
        assert sealed.does("lock", other) == 0
        assert seal.refused_opens(sealed.pid) == refused + 1
        seal.unseal(sealed.pid)
        assert sealed.does("write", image) == 0
        assert sealed.does("write", device) == 0
    image.unlink()


def test_nothing_is_connected(seal: Seal) -> None:
    """By whatever protocol; what is connected stays so, and others connect."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        Doer() as sealed,
        Doer() as free,
    ):
        path = "/run/seal.socket"
        unix.bind(path)
        unix.listen()
        port = tcp.getsockname()[1]
        tries = [("tcp", port), ("udp", port), ("unix", path)]
        for what, where in tries:
            assert sealed.does(what, where) == 0, what
        seal.seal(sealed.pid, start_of(sealed.pid))
        for refused, (what, where) in enumerate(tries, 1):
            assert sealed.does(what, where) == errno.EPERM, what
            assert seal.refused_connects(sealed.pid) == refused
            assert free.does(what, where) == 0, what
        assert seal.refused_opens(sealed.pid) == 0
        assert seal.refused_connects(free.pid) == 0
        seal.unseal(sealed.pid)
        for what, where in tries:
            assert sealed.does(what, where) == 0, what
        os.unlink(path)


def test_full_map_forgets_the_dead(seal: Seal) -> None:
    size = seal._map.max_entries
    for n in range(size):
        seal.seal((1 << 30) + n, 1)
    seal.seal(os.getpid(), start_of(os.getpid()))
    assert seal.sealed().keys() == {os.getpid()}


def test_a_seal_that_does_not_refuse_is_told(seal: Seal) -> None:
    for pin in PIN_DIR.glob("hwerr_seal_*"):
        pin.unlink()
    with pytest.raises(FileNotFoundError):
        Seal.open_pinned()
    # A pin that is something else stands for one that does nothing.
    with bpf.BpfObject("seal") as programs:
        programs.load()
        programs.pin_map("hwerr_seals", PIN_DIR / "hwerr_seal_ioctl")
    with pytest.raises(bpf.BpfError, match="does not refuse"):
        Seal.open_pinned()
    (PIN_DIR / "hwerr_seal_ioctl").unlink()
    # The map is still there, and is taken up again.
    seal.seal(1 << 30, 7)
    with Seal.load() as again:
        assert again.sealed()[1 << 30].start_ns == 7


@pytest.mark.parametrize("hook", ["ioctl", "open", "write", "lock", "connect"])
def test_each_hook_that_is_gone_is_told(seal: Seal, hook: str) -> None:
    """Whoever removed the pin: it is seen by trying, and loading makes it good."""

    def told() -> bool:
        try:
            Seal.open_pinned().close()
        except (FileNotFoundError, bpf.BpfError):
            return True
        return False

    (PIN_DIR / f"hwerr_seal_{hook}").unlink()
    # The kernel detaches it from a work item.
    until(told, 60)
    Seal.load().close()


def test_unprivileged(seal: Seal) -> None:
    code = "import os; os.setuid(65534); from hwerr_notify.bpf import Seal; print(Seal.available())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "run as root" in done.stdout
