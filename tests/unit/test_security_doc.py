# SPDX-License-Identifier: MIT
"""docs/security.md names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
TEXT = (TOP / "docs/security.md").read_text("utf-8")
NAMED = re.findall(r"`(tests/[\w/.]+)::(\w+)`", TEXT)


def names_of(path: Path) -> set[str]:
    text = path.read_text("utf-8")
    if path.suffix == ".c":
        # The table of its tests, and a function for each.
        found = set(re.findall(r"\bT\((\w+)\)", text))
        return {name for name in found if f"static void t_{name}(void)" in text}
    return set(re.findall(r"^(?:async )?def (test_\w+)\(", text, re.MULTILINE))


def test_every_test_it_names_is_there() -> None:
    assert len(NAMED) > 60
    missing = {f"{file}::{name}" for file, name in NAMED if name not in names_of(TOP / file)}
    assert not missing


def test_every_line_names_one() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ")]
    heads = {
        "| who | may | held by |",
        "| attempt | what comes of it | held by |",
        "| program | needs | held by |",
    }
    lines = [row for row in rows if row not in heads]
    assert len(lines) > 35
    for line in lines:
        assert re.search(r"::\w+`", line.split("|")[-2]), f"nothing holds: {line}"


def test_the_promises_of_the_device_are_all_run() -> None:
    """A test in abi.c that is not in its table would hold nothing."""
    text = (TOP / "tests/abi/abi.c").read_text("utf-8")
    assert set(re.findall(r"^static void t_(\w+)\(void\)", text, re.MULTILINE)) == names_of(
        TOP / "tests/abi/abi.c"
    )
