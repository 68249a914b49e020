# SPDX-License-Identifier: MIT
"""Data races of the module, on the kernel that finds them: who publishes and who reads, on each CPU."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest
from testbed.kernel import DEBUGFS

import hwerr_notify
from hwerr_notify import Severity, Source
from hwerr_notify.event import build

SECONDS = 30.0

pytestmark = pytest.mark.kcsan


def counters() -> dict[str, int]:
    """What KCSAN counts (kernel/kcsan/debugfs.c)."""
    lines = (DEBUGFS / "kcsan").read_text("ascii").splitlines()
    pairs = (line.split(": ") for line in lines if line.count(": ") == 1)
    return {name: int(value) for name, value in pairs if value.isdigit()}


def publish(cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})
    record = build(severity=Severity.RECOVERABLE, source=Source.MCE).raw
    fd = os.open("/dev/hwerr", os.O_RDWR)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        for _ in range(50):
            os.write(fd, record)


def read(cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        with hwerr_notify.open(since="oldest") as device:
            for _ in range(20):
                device.read(timeout=0.01)
                device.stats()
                device.info()


def test_publishing_and_reading_on_each_cpu() -> None:
    assert Path("/sys/module/hwerr").exists()
    before = counters()
    work = [multiprocessing.Process(target=do, args=(cpu,)) for do in (publish, read) for cpu in (0, 1)]
    for process in work:
        process.start()
    for process in work:
        process.join()
        assert process.exitcode == 0
    after = counters()
    # That it looked: of so many accesses it stopped who made them, to see whether another comes.
    assert after["setup_watchpoints"] - before["setup_watchpoints"] > 10_000
    # What it finds it tells on the console as well, and that fails any run.
    assert after["data_races"] == 0
