# SPDX-License-Identifier: MIT
"""The core of a Linux guest, opened by crash(8), says what QEMU's own says.

The guest is the debug kernel (scripts/kernel debug), whose symbols are at hand; it has no root
file system, so it panics. HWERR_CRASH names the crash to use: it must know the guest's kernel.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from pathlib import Path

import pytest

from hwerr_notify.guard.dump import write_core
from hwerr_notify.guard.layout import parse_registers, ranges
from hwerr_notify.guard.monitor import QmpMonitor, hmp

TOP = Path(__file__).resolve().parents[2]
CRASH = os.environ.get("HWERR_CRASH", "crash")
# What was asked must not depend on the file's name or on when it was made.
COMMANDS = "log\nps\nbt -a\nfiles 1\nkmem -i\nrd -p 1000000 64\nquit\n"


def kernel(verb: str) -> Path:
    done = subprocess.run([TOP / "scripts/kernel", verb, "debug"], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


async def panicked(home: Path, cores: dict[str, Path]) -> None:
    """A guest that panics, and its memory as hwerr-guard and as QEMU write it."""
    path = home / "qmp"
    argv = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "768M", "-nodefaults", "-display",
            "none", "-kernel", str(kernel("path")), "-append", "console=ttyS0 panic=0", "-serial", "stdio",
            "-qmp", f"unix:{path},server=on,wait=off"]  # fmt: skip
    guest = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    assert guest.stdout is not None
    try:
        while b"end Kernel panic" not in (line := await guest.stdout.readline()):
            assert line, "QEMU ended"
        monitor = await QmpMonitor.connect(path, lambda _event: None, limit=60)
        await monitor.execute("stop")
        registers = parse_registers(await hmp(monitor, "info registers -a"))
        memory = await ranges(monitor)
        await asyncio.to_thread(write_core, cores["own"], guest.pid, memory, registers, [], {})
        arguments = {"paging": False, "protocol": f"file:{cores['qemu']}"}
        await monitor.execute("dump-guest-memory", arguments, limit=300)
        await monitor.aclose()
    finally:
        guest.kill()
        await guest.wait()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_crash_opens_the_core(tmp_path: Path) -> None:
    cores = {name: tmp_path / name for name in ("own", "qemu")}
    asyncio.run(panicked(tmp_path, cores))
    symbols = kernel("kdir") / "vmlinux"
    said = {}
    for name, core in cores.items():
        done = subprocess.run(
            [CRASH, "-s", "--no_panic", symbols, core],
            input=COMMANDS, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said[name] = done.stdout
    assert said["own"] == said["qemu"]
    assert "Kernel panic - not syncing: VFS: Unable to mount root fs" in said["own"]
    assert re.search(r"\] mount_root_generic at ", said["own"])
    assert re.search(r"^>? +1 +0 +0 .* swapper/0$", said["own"], re.MULTILINE)
