# SPDX-License-Identifier: MIT
"""The reader of cores on one of QEMU's own; and with it hwerr-guard's on a real QEMU, without a VM around."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from testbed.core import core_bytes, core_ranges

from hwerr_notify.guard import layout
from hwerr_notify.guard.dump import write_core
from hwerr_notify.guard.monitor import QmpMonitor, hmp

MIB = 1 << 20
LIMIT = 60.0


@pytest.mark.parametrize("options", [("-m", "16M"), ("-m", "16M", "-smp", "3"), ("-M", "q35", "-m", "40M")])
def test_the_core_is_what_qemu_would_have_written(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Of a guest that has not begun: in real mode, with ROMs that are read as memory."""
    own, ours, socket = tmp_path / "own", tmp_path / "ours", tmp_path / "qmp"

    async def main() -> None:
        qemu = await asyncio.create_subprocess_exec(
            "qemu-system-x86_64", "-accel", "tcg", "-S", "-nodefaults", "-no-user-config", "-display", "none",
            "-qmp", f"unix:{socket},server=on,wait=off", *options, stdin=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            while not socket.exists():
                assert qemu.returncode is None
                await asyncio.sleep(0.02)
            monitor = await QmpMonitor.connect(socket, lambda _event: None, limit=LIMIT)
            await monitor.execute(
                "dump-guest-memory", {"paging": False, "protocol": f"file:{own}"}, limit=LIMIT
            )
            ranges = await layout.ranges(monitor)
            cpus = layout.parse_registers(await hmp(monitor, "info registers -a"))
            write_core(ours, qemu.pid, ranges, cpus, [], {})
            await monitor.aclose()
        finally:
            qemu.kill()
            await qemu.wait()

    asyncio.run(main())
    assert sum(n for _, n in core_ranges(ours).values()) == sum(n for _, n in core_ranges(own).values())
    assert sum(n for _, n in core_ranges(own).values()) > int(options[options.index("-m") + 1][:-1]) * MIB
    for gpa, (_, size) in core_ranges(ours).items():
        assert core_bytes(ours, gpa, size) == core_bytes(own, gpa, size), hex(gpa)
    with pytest.raises(AssertionError, match="is not in"):
        core_bytes(own, 0, 1 << 31)
