# SPDX-License-Identifier: MIT
"""The parsers against any bytes, led by what they cover; see tests/fuzz.

HWERR_FUZZ_SECONDS: how long each. What was found is a file in build/fuzz; what is in tests/fuzz/regress
is tried each time.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hwerr_notify
from hwerr_notify import Severity, Source

TOP = Path(__file__).resolve().parents[2]
OUT = TOP / "build" / "fuzz"
SECONDS = int(os.environ.get("HWERR_FUZZ_SECONDS", "5"))

# Longer than what a test has elsewhere, where it fuzzes longer.
pytestmark = [pytest.mark.once, pytest.mark.timeout(SECONDS + 600)]


def _run(name: str, least: int, *argv: str | Path) -> None:
    """Runs a libFuzzer program on what is kept, on one good record, and on what it makes of them.

    `least` is what it has to have covered in the end.
    """
    corpus = OUT / f"corpus-{name}"
    corpus.mkdir(parents=True, exist_ok=True)
    seed = hwerr_notify.build(severity=Severity.CORRECTED, source=Source.USER, text="seed")
    (corpus / "seed").write_bytes(seed.raw)
    kept = TOP / "tests" / "fuzz" / "regress" / name
    assert any(kept.iterdir())
    done = subprocess.run(
        [*argv, f"-max_total_time={SECONDS}", "-max_len=8192", f"-artifact_prefix={OUT}/{name}-",
         corpus, kept],
        capture_output=True, text=True, check=False, timeout=SECONDS + 120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    covered = re.findall(r"^#\d+\s+DONE\s+cov: (\d+) ", done.stderr, re.MULTILINE)
    print(done.stderr[-1000:])
    # It came into the parser, and not just to where nonsense is refused.
    assert covered, done.stderr[-2000:]
    assert int(covered[-1]) >= least, done.stderr[-2000:]


def test_c_parser_and_classifier() -> None:
    subprocess.run(["make", "-s", "-C", TOP / "tests" / "fuzz", f"OUT={OUT}", OUT / "parse"], check=True)
    _run("c", 120, OUT / "parse")


def test_python_parser() -> None:
    _run("python", 280, sys.executable, TOP / "tests" / "fuzz" / "parse.py")
