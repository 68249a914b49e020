# SPDX-License-Identifier: MIT
"""The module itself: loaded and unloaded under a storm, and what it leaves behind."""

import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from testbed import inject
from testbed.kernel import DEBUGFS, load_sim, loaded, put
from testbed.records import MceRecord

import hwerr_notify
from hwerr_notify import Source

ROUNDS = 100 if os.environ.get("HWERR_LONG") else 10
# What other users of a cache may keep meanwhile.
NOISE = max(20, ROUNDS // 2)
SETTLED = 5.0
TRACING = Path("/sys/kernel/tracing")
SIM = DEBUGFS / "hwerr_sim"
SOURCES = Path("/sys/module/hwerr/parameters/sources")
SLABS = Path("/sys/kernel/slab")


def _areas(caller: str) -> list[str]:
    """Areas of vmalloc that were allocated from there."""
    lines = Path("/proc/vmallocinfo").read_text("ascii").splitlines()
    return [line for line in lines if re.search(rf"^\S+\s+\d+ {caller}", line)]


def _objects() -> dict[str, int]:
    """Objects in use in each cache of kmalloc().

    What is cached as free counts as in use, so it is given back first, and nothing is done in between.
    """
    found = {}
    for cache in SLABS.glob("kmalloc-*"):
        put(cache / "shrink", "1")
        table = Path("/proc/slabinfo").read_text("ascii")
        if line := re.search(rf"^{cache.name} +(\d+)", table, re.MULTILINE):
            found[cache.name] = int(line[1])
    return found


def _least_objects() -> dict[str, int]:
    """The same when nothing waits to be freed any more: RCU does it seconds later, which nothing tells."""
    least = _objects()
    fell = time.monotonic()
    while time.monotonic() < fell + SETTLED:
        time.sleep(0.5)
        now = _objects()
        if any(now.get(name, 0) < n for name, n in least.items()):
            least = {name: min(n, now.get(name, 0)) for name, n in least.items()}
            fell = time.monotonic()
    return least


class Storm:
    """mc_event without a pause until the block ends.

    Two other listeners stay on the tracepoint. Else attaching patches the code that
    the other CPU is executing, and an emulated CPU may trap on a breakpoint that is
    gone already ("Oops: int3" in whoever raises the event).

    Now and then a machine check, for the decode chain.
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._failed: BaseException | None = None
        self.raised = 0

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                put(SIM / "bench", f"n=2000 ce={self.raised % 2}")
                self.raised += 1
                if self.raised % 10 == 0:
                    # Corrected, and of no page: nobody takes a page out for it.
                    inject.mce_sim(MceRecord(status=0x9800_0000_0000_0135, misc=self.raised, bank=1))
        except BaseException as error:
            self._failed = error

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
        if self._failed:
            raise self._failed


def _life(ko: str) -> None:
    """One load, until the storm has reached a reader, and the unload in the middle of it."""
    subprocess.run(["insmod", ko], check=True)
    with hwerr_notify.open(sources=[Source.EDAC]) as device, hwerr_notify.open(pid=os.getpid()):
        assert device.read(timeout=60)
    subprocess.run(["rmmod", "hwerr"], check=True)


def _kept_by_lives(ko: str) -> set[str]:
    """Caches in which more is in use for good after ROUNDS loads under a storm."""
    before = _least_objects()
    with Storm() as storm:
        for _ in range(ROUNDS):
            _life(ko)
    assert storm.raised > ROUNDS
    # The name of a caller whose module is gone is a bare address.
    assert _areas(r"(0x|\S+ \[hwerr\])") == []
    return {name for name, n in _least_objects().items() if n - before.get(name, 0) > NOISE}


@pytest.fixture
def unloaded() -> Iterator[str]:
    """The module's file, the module not loaded; it is again after the test."""
    load_sim()
    ko = os.environ["HWERR_KO"]
    subprocess.run(["rmmod", "hwerr"], check=True)
    yield ko
    if not loaded("hwerr"):
        subprocess.run(["insmod", ko], check=True)


def test_loaded_and_unloaded_under_a_storm(unloaded: str) -> None:
    """It loads each time, and leaves no memory behind; a splat ends the whole run (tests/vm/run)."""
    subprocess.run(["insmod", unloaded], check=True)
    # Else what is looked for at the end would never be found.
    assert len(_areas(r"\S+ \[hwerr\]")) >= 3
    subprocess.run(["rmmod", "hwerr"], check=True)
    with Storm():
        # What the kernel keeps once, and what the storm leaves, is there by now.
        _life(unloaded)
    # What others keep meanwhile they keep once; a leak is there each time.
    leaks = _kept_by_lives(unloaded)
    for _ in range(2):
        if leaks:
            leaks &= _kept_by_lives(unloaded)
    assert not leaks


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
