# SPDX-License-Identifier: MIT
"""The parsers against any bytes, led by what they cover; see tests/fuzz.

HWERR_FUZZ_SECONDS: how long each. What was found is a file in build/fuzz.
"""

import os
import subprocess
import sys
from pathlib import Path

import hwerr_notify
from hwerr_notify import Severity, Source

TOP = Path(__file__).resolve().parents[2]
OUT = TOP / "build" / "fuzz"
SECONDS = int(os.environ.get("HWERR_FUZZ_SECONDS", "5"))


def _run(name: str, *argv: str | Path) -> None:
    """Runs a libFuzzer program; it begins with one good record and keeps what it learns."""
    corpus = OUT / f"corpus-{name}"
    corpus.mkdir(parents=True, exist_ok=True)
    seed = hwerr_notify.build(severity=Severity.CORRECTED, source=Source.USER, text="seed")
    (corpus / "seed").write_bytes(seed.raw)
    done = subprocess.run(
        [*argv, f"-max_total_time={SECONDS}", "-max_len=8192", f"-artifact_prefix={OUT}/{name}-", corpus],
        capture_output=True, text=True, check=False, timeout=SECONDS + 120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    # It ran, and it saw that what it does makes a difference.
    assert "NEW" in done.stderr or "REDUCE" in done.stderr or "INITED" in done.stderr, done.stderr[-2000:]


def test_c_parser_and_classifier() -> None:
    subprocess.run(["make", "-s", "-C", TOP / "tests" / "fuzz", f"OUT={OUT}", OUT / "parse"], check=True)
    _run("c", OUT / "parse")


def test_python_parser() -> None:
    _run("python", sys.executable, TOP / "tests" / "fuzz" / "parse.py")
