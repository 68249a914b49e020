# SPDX-License-Identifier: MIT
"""Every promise of the file, from 64-bit and from 32-bit callers; see tests/abi/abi.c."""

import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
BUILD = TOP / "build" / "abi"


def _names() -> list[str]:
    subprocess.run(["make", "-s", "-C", TOP / "tests" / "abi", f"OUT={BUILD}"], check=True)
    out = subprocess.run([BUILD / "abi64", "--list"], check=True, capture_output=True, text=True)
    return out.stdout.split()


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("name", _names())
def test_promise(name: str, bits: int) -> None:
    argv = [str(BUILD / f"abi{bits}"), name]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr or f"status {run.returncode}"
