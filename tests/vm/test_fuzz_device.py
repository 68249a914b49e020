# SPDX-License-Identifier: MIT
"""The device against every call there is, at random; see tests/fuzz/device.c."""

import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
FUZZ = TOP / "tests" / "fuzz"
SEEDS = [
    line.split()[0]
    for line in (FUZZ / "regress" / "device").read_text("utf-8").splitlines()
    if not line.startswith("#")
]
SECONDS = int(os.environ.get("HWERR_FUZZ_SECONDS", "60"))
LOADS = int(os.environ.get("HWERR_FAILED_LOADS", "40"))


def _fuzz(seconds: int, seed: str) -> None:
    """The kernel's checks see to the rest: a splat ends the whole run (tests/vm/run)."""
    out = TOP / "build" / "fuzz"
    subprocess.run(["make", "-s", "-C", FUZZ, f"OUT={out}", out / "device"], check=True)
    # Said, so that a failure can be repeated as far as threads allow.
    print(f"HWERR_FUZZ_SEED={seed}")
    run = subprocess.run(
        [out / "device", str(seconds), seed],
        check=False,
        capture_output=True,
        text=True,
        timeout=seconds + 300,
    )
    print(run.stdout)
    assert run.returncode == 0, f"{run.stderr}{run.stdout} seed {seed}, status {run.returncode}"


@pytest.mark.once
@pytest.mark.timeout(SECONDS + 400)
def test_device() -> None:
    _fuzz(SECONDS, os.environ.get("HWERR_FUZZ_SEED") or str(time.time_ns()))


@pytest.mark.once
@pytest.mark.parametrize("seed", SEEDS)
def test_seeds_that_are_kept(seed: str) -> None:
    _fuzz(min(SECONDS, 10), seed)


def _nth(*argv: str | Path) -> str:
    out = TOP / "build" / "fuzz"
    subprocess.run(["make", "-s", "-C", FUZZ, f"OUT={out}", out / "nth"], check=True)
    run = subprocess.run([out / "nth", *argv], check=False, capture_output=True, text=True, timeout=1800)
    print(run.stdout)
    assert run.returncode == 0, run.stderr + run.stdout
    return run.stdout


@pytest.mark.debug
def test_each_allocation_of_a_call_fails() -> None:
    told = dict(re.findall(r"^(\w+) .* (\d+) told$", _nth("device"), re.MULTILINE))
    # Nothing can fail in poll(), and its table is on the stack.
    assert all(int(n) for name, n in told.items() if name != "poll"), told


@pytest.mark.debug
@pytest.mark.once
def test_allocations_of_loading_fail() -> None:
    """Some of them, chosen anew each time: there are hundreds, most of them not ours."""
    ko = os.environ["HWERR_KO"]
    # In memory: 6.12's 9p puts a request once too often when an allocation of its read fails.
    copy = Path(shutil.copy(ko, "/dev/shm/hwerr.ko"))
    subprocess.run(["rmmod", "hwerr"], check=True)
    try:
        count = int(_nth("module-count", copy).split()[-1])
        seed = time.time_ns()
        chosen = sorted(random.Random(seed).sample(range(1, count), LOADS))
        said = _nth("module", copy, *map(str, chosen))
    finally:
        subprocess.run(["insmod", ko], check=False)
        copy.unlink()
    assert "Cannot allocate memory" in said, f"none of {LOADS} failures was noticed, seed {seed}"
