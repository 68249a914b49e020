# SPDX-License-Identifier: MIT
"""The systemd units: that systemd understands them, and what becomes of a service that ends."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = sorted((Path(__file__).resolve().parents[2] / "packaging/systemd").iterdir())
ANALYZE = shutil.which("systemd-analyze")


def verified(unit: Path) -> tuple[int, str]:
    argv = [str(ANALYZE), "verify", "--man=no", str(unit)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(ANALYZE is None, reason="no systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_understands_it(tmp_path: Path, unit: Path) -> None:
    # Its program is installed somewhere else, or not yet.
    text = re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text("utf-8"))
    copy = tmp_path / unit.name
    copy.write_text(text, "utf-8")
    assert verified(copy) == (0, "")
    # What it does not know is only told.
    copy.write_text(text.replace("[Service]\n", "[Service]\nRestartNever=yes\n"), "utf-8")
    assert "RestartNever" in verified(copy)[1]


def test_a_policy_that_cannot_be_used_is_not_tried_again(tmp_path: Path) -> None:
    """Ten times a second: the unit restarts what fails, without a limit."""
    policy = tmp_path / "guard.toml"
    policy.write_text("wrong", "utf-8")
    program = "import sys; from hwerr_notify.cli import hwerr_guard; sys.exit(hwerr_guard())"
    argv = [sys.executable, "-c", program, "--policy", str(policy), "run"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert "guard.toml:1" in done.stderr
    (unit,) = [unit for unit in UNITS if unit.name == "hwerr-guard.service"]
    prevented = re.findall(r"(?m)^RestartPreventExitStatus=(.*)$", unit.read_text("utf-8"))
    assert str(done.returncode) in " ".join(prevented).split()


def test_what_the_probe_may() -> None:
    """What tests/vm/test_trust.py tries it with, and nothing that could be got besides."""
    (unit,) = [unit for unit in UNITS if unit.name == "hwerr-probe.service"]
    text = unit.read_text("utf-8")
    (bounded,) = re.findall(r"(?m)^CapabilityBoundingSet=(.*)$", text)
    assert set(bounded.split()) == {
        "CAP_BPF", "CAP_PERFMON", "CAP_SYS_ADMIN",
        "CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH", "CAP_DAC_OVERRIDE",
    }  # fmt: skip
    for line in ("NoNewPrivileges=yes", "ProtectSystem=strict", "RestrictNamespaces=yes"):
        assert f"\n{line}\n" in text
    # None that gives some back.
    assert "AmbientCapabilities" not in text
