# SPDX-License-Identifier: MIT
"""The seal: the guest never runs again, whoever says what to QEMU.

The strong one is the LSM program (bpf/seal.bpf.c), which refuses KVM_RUN to the
process, and to open a device or one of its images again, to write to one, and to connect a socket. The
weaker is the cgroup v2 freezer: nothing in the process runs, its monitor neither, but whoever may write
to the cgroup can thaw it, and then nothing keeps it from its disks. Both may be wanted: for a process whose
disks could not be detached, its monitor must be silent as well.
"""

from __future__ import annotations

import asyncio
import os
import select
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import bpf
from .errors import Fault
from .fault import fault_point
from .outside import FDSET, Given
from .process import TICK_NS, Process

__all__ = ["Freezer", "Inodes", "Sealed", "Sealer", "inodes"]

_CGROUPS = Path("/sys/fs/cgroup")

# (device, inode) of files, and names under which there is none.
Inodes = tuple[list[tuple[int, int]], list[str]]


@dataclass(frozen=True, slots=True)
class Sealed:
    """`weaker`: not by the LSM program. `process`: its monitor is silent too."""

    weaker: bool
    process: bool
    how: str


class Freezer:
    """The cgroup v2 freezer, for whole processes."""

    @staticmethod
    def missing() -> str | None:
        """None if there is one, else why not."""
        if not (_CGROUPS / "cgroup.controllers").exists():
            return f"{_CGROUPS} is not a cgroup2 file system"
        return None

    @staticmethod
    def _home(process: Process) -> Path:
        return _CGROUPS / "hwerr-guard" / f"{process.pid}-{process.start_ticks}"

    def has(self, process: Process) -> bool:
        """Whether it was ever given a cgroup of ours."""
        return self._home(process).exists()

    def frozen(self, process: Process) -> bool:
        """Whether it is in its cgroup of ours and that is frozen."""
        home = self._home(process)
        try:
            inside = str(process.pid) in (home / "cgroup.procs").read_text("ascii").split()
            return inside and "frozen 1" in (home / "cgroup.events").read_text("ascii")
        except OSError:
            return False

    def freeze(self, process: Process, limit: float) -> None:
        """Blocks until it is, at most `limit` seconds. Fault."""
        if reason := self.missing():
            raise Fault(reason)
        home = self._home(process)
        deadline = time.monotonic() + limit
        try:
            home.mkdir(parents=True, exist_ok=True)
            (home / "cgroup.procs").write_text(str(process.pid), "ascii")
            (home / "cgroup.freeze").write_text("1", "ascii")
            with (home / "cgroup.events").open("rb", buffering=0) as events:
                poll = select.poll()
                poll.register(events, select.POLLPRI)
                while b"frozen 1" not in events.read():
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise Fault(
                            f"the process did not freeze within {limit:g} s: a thread waits in the kernel"
                        )
                    poll.poll(left * 1000)
                    events.seek(0)
        except OSError as error:
            raise Fault(f"{error.filename or home}: {error.strerror}") from None

    def thaw(self, process: Process) -> None:
        """Lets it run again, if it was frozen. Fault."""
        try:
            # Each freeze begins with it, and there is seldom something to thaw.
            fd = os.open(self._home(process) / "cgroup.freeze", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, b"0")
            finally:
                os.close(fd)
        except FileNotFoundError:
            return
        except OSError as error:
            raise Fault(f"{error.filename or self._home(process)}: {error.strerror}") from None

    def remove(self, process: Process) -> None:
        """Its cgroup, once the process has ended."""
        with suppress(OSError):
            self._home(process).rmdir()


class Sealer:
    """Seals processes by the best means there is. Not for several threads at once."""

    def __init__(self) -> None:
        self._lsm: bpf.Seal | None = None
        self.why_weaker: str | None = "not loaded"
        self.freezer = Freezer()

    def open(self) -> None:
        """Loads the LSM program, or remembers why it could not be."""
        try:
            self._lsm = bpf.Seal.load()
            self.why_weaker = None
        except OSError as error:
            self.why_weaker = str(error.strerror or error)

    def close(self) -> None:
        """The seals stay."""
        if self._lsm is not None:
            self._lsm.close()
            self._lsm = None

    def refusals(self, process: Process) -> int | None:
        """How often KVM_RUN was refused to it; None if it is not sealed by an LSM program in force."""
        if self._lsm is None or not self._lsm.in_force():
            return None
        entry = self._lsm.state(process.pid)
        if entry is None:
            return None
        return entry.refusals if entry.start_ns // TICK_NS == process.start_ticks else None

    def refused_opens(self, process: Process) -> int | None:
        """How often it was refused to open a device or an image, or to write; None as of `refusals`."""
        if self._lsm is None or self.refusals(process) is None:
            return None
        return self._lsm.refused_opens(process.pid)

    def refused_connects(self, process: Process) -> int | None:
        """How often it was refused to connect a socket; None as of `refusals`."""
        if self._lsm is None or self.refusals(process) is None:
            return None
        return self._lsm.refused_connects(process.pid)

    async def seal(
        self,
        process: Process,
        *,
        kvm: bool,
        whole: bool,
        limit: float,
        images: Iterable[str] = (),
        given: Iterable[Given] = (),
        looked: asyncio.Task[Inodes] | None = None,
    ) -> Sealed:
        """`whole`: freeze the process too; without KVM there is nothing else. Fault if it is not sealed.

        `images` are not opened by it again, as far as there are files of these names where it looks for them;
        nor is what it was `given`. `looked` is a look at them (`inodes()`) that was begun before.
        """
        by_lsm = with_images = False
        why = self.why_weaker or ("it does not run under KVM" if not kvm else None)
        if self._lsm is not None and kvm:
            try:
                with_images = self._seal_by_lsm(process, looked)
                by_lsm = self.refusals(process) is not None
                why = None if by_lsm else "the seal did not stay"
            except OSError as error:
                why = error.strerror or str(error)
        fault_point("inside-seal")
        if whole or not by_lsm:
            await self._freeze(process, limit, f"KVM_RUN is not refused ({why})" if why else "")
        if by_lsm:
            looked = looked or asyncio.create_task(
                asyncio.to_thread(inodes, process.pid, images, tuple(given))
            )
            how = "KVM_RUN, its disks and connecting refused"
            let_in = await self._keep_out(process, looked, limit / 2, with_images)
            if let_in and not whole:
                # It may open them by other names, if it is told to: then nobody may tell it anything.
                await self._freeze(process, limit / 2, f"its disks are not refused ({let_in})")
                whole = True
            how += f" ({let_in})" if let_in else ""
            return Sealed(False, whole, how + (", process frozen" if whole else ""))
        return Sealed(True, True, f"process frozen by cgroup; KVM_RUN is not refused: {why}")

    async def _freeze(self, process: Process, limit: float, why: str) -> None:
        """The whole process, because of that. Fault."""
        try:
            await asyncio.to_thread(self.freezer.freeze, process, limit)
            fault_point("after-freezer")
        except Fault as error:
            raise Fault(f"{why + ', and ' if why else ''}the process cannot be frozen: {error}") from None

    def _seal_by_lsm(self, process: Process, looked: asyncio.Task[Inodes] | None) -> bool:
        """Whether with its images, too, because they are known already. OSError if it is not sealed."""
        assert self._lsm is not None
        self._lsm = self._lsm.renewed()
        if looked is not None and looked.done():
            # There may be no room for them, and the look may have failed: it is sealed all the same.
            with suppress(Exception, asyncio.CancelledError):
                self._lsm.seal(process.pid, process.start_ns, looked.result()[0])
                return True
        self._lsm.seal(process.pid, process.start_ns)
        return False

    async def _keep_out(
        self, process: Process, looked: asyncio.Task[Inodes], limit: float, done: bool
    ) -> str:
        """From its images, by their inodes; of which not, for people, else "". It is sealed in any case."""
        assert self._lsm is not None
        try:
            async with asyncio.timeout(limit):
                files, unknown = await looked
            if not done:
                self._lsm.seal(process.pid, process.start_ns, files)
        except (OSError, TimeoutError) as error:
            return f"devices only: {error if str(error) else 'its images do not answer'}"
        return f"but for {', '.join(unknown)}" if unknown else ""

    def holds(self, process: Process, sealed: dict[str, Any]) -> bool:
        """Whether what `seal` did is still in force; `sealed` are its facts."""
        if not sealed.get("weaker") and self.refusals(process) is None:
            return False
        return not sealed.get("process") or self.freezer.frozen(process)

    def release(self, process: Process) -> None:
        """After the process has ended."""
        if self._lsm is not None:
            with suppress(OSError, KeyError):
                self._lsm.unseal(process.pid)
        self.freezer.remove(process)


def inodes(pid: int, images: Iterable[str], given: Iterable[Given] = ()) -> Inodes:
    """Of those that are there, and the others: a name may be of something that is no file, or is gone.

    And of what it was `given`. Blocks: a look at a file on a dead NFS server does not come back.
    """
    found, unknown = [], []
    for image in images:
        try:
            found.append(bpf.inode_of(image, pid))
        except OSError:
            unknown.append(image)
    handed = [file.kernel for file in given]
    if handed and all(handed):
        unknown = [image for image in unknown if not image.startswith(FDSET)]
    return found + [inode for inode in handed if inode], unknown
