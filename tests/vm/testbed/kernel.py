# SPDX-License-Identifier: MIT
"""The running kernel: modules, log, files that switch something."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import TestbedError

DEBUGFS = Path("/sys/kernel/debug")


def modprobe(module: str, *args: str) -> None:
    """Load a module of the kernel's own. Raises TestbedError with modprobe's reason."""
    if not args and loaded(module):
        return
    done = subprocess.run(["modprobe", module, *args], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TestbedError(f"module {module} does not load: {done.stderr.strip()}")


def loaded(module: str) -> bool:
    """Whether a module is loaded."""
    return Path("/sys/module", module.replace("-", "_"), "initstate").exists()


def load_sim() -> None:
    """Load hwerr_sim.ko if it is not loaded."""
    if loaded("hwerr_sim"):
        return
    path = os.environ.get("HWERR_SIM_KO")
    if path is None:
        raise TestbedError("HWERR_SIM_KO is not set: start the VM with tests/vm/run")
    done = subprocess.run(["insmod", path], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TestbedError(f"{path} does not load: {done.stderr.strip()}")


def put(path: Path, text: str) -> None:
    """Write to a kernel file. Raises TestbedError that names file, text and reason."""
    try:
        with path.open("wb", buffering=0) as file:
            file.write(text.encode())
    except OSError as error:
        raise TestbedError(f"the kernel refuses {text!r} in {path}: {error.strerror}") from error


class KernelLog:
    """What the kernel logs from now on."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)

    def close(self) -> None:
        os.close(self._fd)

    def lines(self, timeout: float) -> Iterator[str]:
        """Messages as they arrive; ends `timeout` seconds from now."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self._fd], [], [], left)[0]:
                return
            try:
                record = os.read(self._fd, 8192)
            except BlockingIOError:
                continue
            except BrokenPipeError:
                continue  # overwritten before we read it; the next read goes on behind the gap
            yield record.decode(errors="replace").partition(";")[2].split("\n", 1)[0]

    def wait(self, pattern: str, timeout: float = 30.0) -> str:
        """The first message that matches. Raises TestbedError if none comes in time."""
        seen: list[str] = []
        for line in self.lines(timeout):
            seen.append(line)
            if re.search(pattern, line):
                return line
        tail = "; ".join(seen[-5:])
        raise TestbedError(f"the kernel logged nothing like /{pattern}/ within {timeout:g} s; last: {tail}")


@contextmanager
def kernel_log() -> Iterator[KernelLog]:
    """A KernelLog for a with statement."""
    log = KernelLog()
    try:
        yield log
    finally:
        log.close()


@contextmanager
def zram_swap() -> Iterator[None]:
    """Compressed memory to swap to."""
    modprobe("zram")
    put(Path("/sys/block/zram0/disksize"), "256M")
    subprocess.run(["mkswap", "-q", "/dev/zram0"], check=True, capture_output=True)
    subprocess.run(["swapon", "/dev/zram0"], check=True)
    try:
        yield
    finally:
        subprocess.run(["swapoff", "/dev/zram0"], check=True)
        put(Path("/sys/block/zram0/reset"), "1")
