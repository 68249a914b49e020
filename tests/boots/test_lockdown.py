# SPDX-License-Identifier: MIT
"""A machine that takes no module of ours and locks its kernel against root: the same events without."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
KERNEL = os.environ.get("HWERR_KERNEL", "6.12")
# Each case boots for itself, and takes its time.
pytestmark = pytest.mark.long
ENFORCED = "lockdown={} module.sig_enforce=1"


def boot(cpu: str, lockdown: str, *command: str) -> subprocess.CompletedProcess[str]:
    argv = [
        str(TOP / "tests/vm/run"), "--kernel", KERNEL, "--cpu", cpu, "--quiet", "--no-module",
        "--timeout", "1400", "--append", ENFORCED.format(lockdown), "--", *command,
    ]  # fmt: skip
    return subprocess.run(argv, cwd=TOP, capture_output=True, text=True, timeout=1500, check=False)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("cpu", "events"), [("amd", 203), ("intel", 2)])
def test_the_same_events_under_lockdown(cpu: str, events: int) -> None:
    done = boot(cpu, "integrity", "python", "tests/boots/locked.py")
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(told) == events
    assert all(t["lost"] == 0 and t["origin"] == "hardware" for t in told)
    assert "/dev/hwerr is not there" in done.stderr


def test_confidentiality_is_said() -> None:
    done = boot("amd", "confidentiality", "hwerr-watch", "--timeout", "0")
    assert done.returncode == 4, done.stderr
    assert "lockdown=confidentiality" in done.stderr
