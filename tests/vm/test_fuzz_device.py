# SPDX-License-Identifier: MIT
"""The device against every call there is, at random; see tests/fuzz/device.c."""

import os
import subprocess
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
SECONDS = int(os.environ.get("HWERR_FUZZ_SECONDS", "60"))


def test_device() -> None:
    """The kernel's checks see to the rest: a splat ends the whole run (tests/vm/run)."""
    out = TOP / "build" / "fuzz"
    subprocess.run(["make", "-s", "-C", TOP / "tests" / "fuzz", f"OUT={out}", out / "device"], check=True)
    # Said, so that a failure can be repeated as far as threads allow.
    seed = os.environ.get("HWERR_FUZZ_SEED") or str(time.time_ns())
    print(f"HWERR_FUZZ_SEED={seed}")
    run = subprocess.run(
        [out / "device", str(SECONDS), seed],
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS + 300,
    )
    print(run.stdout)
    assert run.returncode == 0, f"{run.stderr}{run.stdout} seed {seed}, status {run.returncode}"
