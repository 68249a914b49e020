# SPDX-License-Identifier: MIT
"""The module itself: loaded and unloaded under a storm, and what it leaves behind."""

import os
import subprocess
import threading
from pathlib import Path
from typing import Self

import pytest
from testbed import inject
from testbed.kernel import DEBUGFS, load_sim, put

import hwerr_notify

ROUNDS = 100
TRACING = Path("/sys/kernel/tracing")
SIM = DEBUGFS / "hwerr_sim"
SOURCES = Path("/sys/module/hwerr/parameters/sources")


def _vmalloc_kib() -> int:
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        if line.startswith("VmallocUsed:"):
            return int(line.split()[1])
    raise AssertionError("no VmallocUsed in /proc/meminfo")


class Storm:
    """mc_event without a pause until the block ends.

    Two other listeners stay on the tracepoint. Else attaching patches the code that
    the other CPU is executing, and an emulated CPU may trap on a breakpoint that is
    gone already ("Oops: int3" in whoever raises the event).
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.raised = 0

    def _run(self) -> None:
        while not self._stop.is_set():
            put(SIM / "bench", f"n=200 ce={self.raised % 2}")
            self.raised += 1

    def _listeners(self, on: str) -> None:
        for root in (TRACING, self._instance):
            put(root / "events/ras/mc_event/enable", on)

    def __enter__(self) -> Self:
        self._instance = TRACING / "instances/storm"
        self._instance.mkdir()
        self._listeners("1")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._listeners("0")
        self._instance.rmdir()


@pytest.mark.long
def test_loaded_and_unloaded_under_a_storm() -> None:
    """A splat ends the whole run (tests/vm/run); here: it loads each time, and memory comes back."""
    load_sim()
    ko = os.environ["HWERR_KO"]
    with Storm() as storm:
        subprocess.run(["rmmod", "hwerr"], check=True)
        subprocess.run(["insmod", ko], check=True)
        subprocess.run(["rmmod", "hwerr"], check=True)
        before = _vmalloc_kib()
        for _ in range(ROUNDS):
            subprocess.run(["insmod", ko], check=True)
            subprocess.run(["rmmod", "hwerr"], check=True)
        # One module's rings are 512 KiB: a leak of them would be 50 MiB.
        assert _vmalloc_kib() - before < 4096
        subprocess.run(["insmod", ko], check=True)
    assert storm.raised > ROUNDS


@pytest.mark.long
def test_sources_unplugged_under_a_storm() -> None:
    load_sim()
    names = SOURCES.read_text("ascii").strip().split(",")
    assert "edac" in names
    assert "mce" in names
    with Storm():
        for _ in range(20):
            for name in names:
                put(SOURCES, f"-{name}")
            assert SOURCES.read_text("ascii").strip() == ""
            for name in names:
                put(SOURCES, f"+{name}")
    assert SOURCES.read_text("ascii").strip().split(",") == names


@pytest.mark.long
def test_an_unplugged_source_is_silent() -> None:
    load_sim()
    with hwerr_notify.open(sources=[hwerr_notify.Source.EDAC]) as device:
        put(SOURCES, "-edac")
        inject.edac("ue", syndrome=1)
        put(SOURCES, "+edac")
        inject.edac("ue", syndrome=2)
        (event,) = device.read(timeout=30)
        assert event.edac is not None
        assert event.edac.syndrome == 2
