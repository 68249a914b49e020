# SPDX-License-Identifier: MIT
"""`make bench-peers`: how it reads what others say, and what it makes of the numbers.

The lines of rasdaemon are its own, of 0.8.1 on kernel 6.12.
"""

from __future__ import annotations

import copy
import csv
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS / "bench/peers"))

import report  # noqa: E402
import words  # noqa: E402

HEAD = "           <...>-219   [001] .....     0.000012 "
STAMP = "2026-11-24 16:36:46 +0000 "
MC = f"{HEAD}mc_event {STAMP}1 {{}} error: one on DIMM_A2 (mc: 0 location: 0:1 address: 0x00010040 grain: 6)"
AER = f"{HEAD}aer_event {STAMP}0000:01:00.0 {{}}"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (MC.format("Corrected"), "corrected"),
        (MC.format("Uncorrected"), "recoverable"),
        (MC.format("Fatal"), "fatal"),
        (AER.format("Bad DLLP, RELAY_NUM Rollover Corrected"), "corrected"),
        (AER.format("Advisory Non-Fatal Corrected"), "corrected"),
        (AER.format("Completer Abort TLP Header: 00000000 0 0 0 Uncorrected (Non-Fatal)"), "recoverable"),
        (AER.format("Malformed TLP Uncorrected (Fatal)"), "fatal"),
        (AER.format("Malformed TLP"), None),
        (f"{HEAD}mce_record {STAMP}bank=1, mci=Corrected_error, mca=x", "corrected"),
        (f"{HEAD}mce_record {STAMP}bank=1, mci=Uncorrected_error Error_enabled SRAR, mca=x", "recoverable"),
        (f"{HEAD}mce_record {STAMP}bank=1, mci=Uncorrected_error Processor_context_corrupt", "fatal"),
        (f"{HEAD}mce_record {STAMP}bank=7, mca=Don't know how to decode this bank", None),
        (f"{HEAD}memory_failure_event {STAMP}pfn=0x30000 page_type=unknown page action_result=Failed ", None),
    ],
)
def test_rasdaemons_severity(line: str, said: str | None) -> None:
    assert words.rasdaemon(line) == said


def test_rasdaemons_other_lines_are_no_events() -> None:
    text = (
        "overriding event (1351) ras:mc_event with new print handler\nCalling ras_mc_event_opendb()\n"
        + MC.format("Corrected")
    )
    assert words.events(text, " mc_event") == [MC.format("Corrected")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("  sh-1 [000] .... 1.5: mc_event: 1 Corrected error: x on DIMM_A1", "corrected"),
        ("  sh-1 [000] .... 1.5: mc_event: 1 Uncorrected error: x on y", "recoverable"),
        ("  irq-1 [000] . 1: aer_event: 0 PCIe Bus Error: severity=Corrected, x", "corrected"),
        ("  irq-1 [000] . 1: aer_event: 0 PCIe Bus Error: severity=Uncorrected, non-fatal, x", "recoverable"),
        ("  irq-1 [000] . 1: aer_event: 0 PCIe Bus Error: severity=Fatal, x", "fatal"),
        ("  sh-1 [000] .... 1: mce_record: CPU: 0, MCGc/s: 0/0, MC1: b200000000000000", None),
    ],
)  # fmt: skip
def test_the_kernels_own_words(line: str, said: str | None) -> None:
    assert words.trace(line) == said


def test_loss_is_read_from_each() -> None:
    assert words.told_lost(["12 records lost", "13 corrected source 2", "3 records lost"]) == 15
    assert words.told_lost(['{"seq": 1, "lost": 7, "x": 1}', '{"seq": 2, "lost": 0}']) == 7
    assert words.told_lost(["CPU:1 [LOST 40 EVENTS]", "  sh-1 [000] mc_event: lost 5", "LOST 2"]) == 42


def test_grades() -> None:
    assert words.grade(["corrected"], ["corrected"]) == "right"
    assert words.grade(["corrected"], ["fatal"]) == "wrong"
    assert words.grade(["corrected"], ["corrected", "recoverable"]) == "wrong"
    assert words.grade([None], ["fatal"]) == "silent"
    assert words.grade([], ["fatal"]) == "missing"


def test_every_shared_case_has_a_class() -> None:
    known = {"info", "corrected", "deferred", "recoverable", "fatal"}
    for source in ("mce-inject", "mcelog", "aer-inject"):
        with (TESTS / "cases" / source / "expected.tsv").open(encoding="utf-8") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                assert set(words.expected(row)) <= known, row


def test_a_guest_is_named_by_process_and_address() -> None:
    ours = "17 recoverable source 3\n  guest pid 251 qemu-system-x86 hva 0x7f00 gpa 0x401000 len 4096\n"
    assert words.names(ours, 251, 0x401000) == "pid, address"
    assert (
        words.names('{"seq": 1, "guests": [{"pid": 251, "gpa": "0x401000"}]}', 251, 0x401000)
        == "pid, address"
    )
    # The number of a process that is not the guest's, and of one that begins like it.
    assert words.names("sh-251 [001] pfn=0x401", 251, 0x401000) == ""
    assert words.names("guest pid 2510 gpa 0x4010001", 251, 0x401000) == ""


# -- the report ------------------------------------------------------------------------


def _turn(ns: int, cpu: int, named: str = "") -> dict[str, Any]:
    return {"ns": {"mc_event": [ns, ns], "memory_failure": [ns]}, "named": named, "cpu_ns": cpu}


def _storm(seen: int, told: int, cpu: int) -> dict[str, Any]:
    return {
        "seen": seen,
        "through": seen,
        "seconds": 1.0,
        "told": told,
        "cpu_ns": cpu,
        "raise_ns": 2000,
        "raised": 1001,
        "uncorrected": 3,
        "settled": True,
    }


@pytest.fixture
def result() -> dict[str, Any]:
    turn = {
        "hwerr-poll": _turn(1000, 10, "pid, address"),
        "hwerr-watch": _turn(2000, 50),
        "rasdaemon-1": _turn(20_000, 1000),
        "qemu": _turn(3000, 0) | {"ns": {"memory_failure": [3000]}},
    }
    silent: dict[str, Any] = {"ns": {"mc_event": [None, None]}, "named": "", "cpu_ns": None}
    storm = {"hwerr-poll": _storm(901, 100, 9010), "hwerr-watch": _storm(801, 200, 9010),
             "rasdaemon-1": _storm(101, 0, 101_000)}  # fmt: skip
    case = {
        "wanted": ["fatal"],
        "by": {"hwerr-watch": {"said": ["fatal"], "grade": "right", "lines": []},
               "rasdaemon-1": {"said": [None], "grade": "silent", "lines": []}},
    }  # fmt: skip
    return {
        "kernel": "6.12.1-test",
        "measure": {
            "titles": {"hwerr-poll": "hwerr", "hwerr-watch": "watch", "rasdaemon-1": "rasdaemon 1",
                       "rasdaemon-0": "rasdaemon 0", "qemu": "QEMU"},
            "latency": [{**turn, "rasdaemon-0": silent}, turn],
            "storm": [storm, storm],
            "nobody_ns": [1000, 1000],
            "rings": {"hwerr": 1, "trace": 2, "perf": 3},
        },
        "severity": {"x/y": case},
        "idle": {"hwerr-watch": 0, "hwerr-guard": 3},
    }  # fmt: skip


def test_all_goals_met(result: dict[str, Any]) -> None:
    goals = report.Report(result).goals()
    assert [g.met for g in goals] == [True] * len(goals)
    assert len(goals) == 6


@pytest.mark.parametrize(
    ("path", "value", "missed"),
    [
        (("measure", "latency", 0, "hwerr-poll", "ns", "mc_event"), [4000, 4000], 1),
        (("measure", "storm", 1, "hwerr-poll", "told"), 99, 1),
        (("measure", "storm", 1, "hwerr-poll", "told"), 101, 1),
        (("severity", "x/y", "by", "hwerr-watch", "grade"), "wrong", 1),
    ],
)
def test_a_goal_that_is_missed_is_said(
    result: dict[str, Any], path: tuple[Any, ...], value: Any, missed: int
) -> None:
    result = copy.deepcopy(result)
    at: Any = result
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    assert sum(not g.met for g in report.Report(result).goals()) == missed


def test_what_was_not_measured_meets_no_goal(result: dict[str, Any]) -> None:
    del result["severity"], result["idle"]
    found = report.Report(result)
    assert not [g for g in found.goals() if "severity" in g.what]
    assert found.markdown().count("Not measured") == 2


def test_what_is_never_seen_is_said_and_not_averaged(result: dict[str, Any]) -> None:
    found = report.Report(result)
    text = found.markdown()
    (row,) = (
        line for line in text.splitlines() if line.startswith("| rasdaemon 0 |") and "none seen" in line
    )
    assert "2 of 2" in row
    assert found.daemons() == ["rasdaemon-1"]


def test_a_few_values_have_no_percentile(result: dict[str, Any]) -> None:
    few = report.Report(result)
    assert "1 µs / 1 µs (max of 4)" in few.markdown()
    assert "p99 1" not in few.plots()["latency"]
    for turn in result["measure"]["latency"]:
        turn["hwerr-poll"]["ns"]["mc_event"] = [1000] * 59 + [9000]
    many = report.Report(result)
    # One in sixty is more than one in a hundred.
    assert "1 µs / 9 µs (p99)" in many.markdown()
    assert "max of" in many.markdown()
    assert report.high([1.0] * 99 + [9.0]) == ("p99", 1.0)
    assert report.high([1.0] * 98 + [9.0]) == ("max of 99", 9.0)


def test_plots_are_svg_for_both_backgrounds(result: dict[str, Any]) -> None:
    for name, svg in report.Report(result).plots().items():
        assert ET.fromstring(svg).tag.endswith("svg"), name
        assert "prefers-color-scheme: dark" in svg
        assert "SPDX-License-Identifier" in svg


def test_a_section_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "x.md"
    file.write_text("# head\n", encoding="utf-8")
    for name, text in (("6.1", "one"), ("6.12", "two"), ("6.1", "three")):
        report.put_section(file, name, text)
    text = file.read_text("utf-8")
    assert [w for w in ("one", "two", "three") if w in text] == ["two", "three"]
    assert text.startswith("# head\n")
    assert text.index("three") < text.index("two")


# -- visible -----------------------------------------------------------------------------

# Stands where rasdaemon stands: of each error a row, then a line.
CONSUMER = """\
import sqlite3, sys
db = sqlite3.connect(sys.argv[2], isolation_level=None)
db.execute("create table if not exists t (x)")
print("up", flush=True)
while True:
    for error in open(sys.argv[1]):
        if error.startswith("row"):
            db.execute("insert into t values (?)", (error,))
        if "line" in error:
            print("event", error.strip(), flush=True)
"""


@pytest.fixture
def visible(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`visible` on such a consumer, whose errors are what is written to tmp_path/errors."""
    binary = tmp_path / "visible"
    source = TESTS / "bench/peers/visible.c"
    subprocess.run(["gcc", "-std=gnu11", "-O2", "-pthread", "-o", binary, source], check=True)
    (tmp_path / "db").mkdir()
    os.mkfifo(tmp_path / "errors")
    argv = [sys.executable, "-c", CONSUMER, str(tmp_path / "errors"), str(tmp_path / "db/x.db")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as consumer:
        assert consumer.stdout is not None
        assert consumer.stdout.readline() == b"up\n"
        fd = consumer.stdout.fileno()
        with subprocess.Popen(
            [binary, str(fd), tmp_path / "db"], pass_fds=(fd,), text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=(tmp_path / "said").open("w"),
        ) as process:  # fmt: skip
            yield process
            process.kill()
        consumer.kill()


def _inject(visible: subprocess.Popen[str], path: Path, text: str, patience: int) -> dict[str, int | None]:
    assert visible.stdin is not None
    assert visible.stdout is not None
    visible.stdin.write(f" line\t{patience}\t{path}\t{text.encode().hex()}\n")
    visible.stdin.flush()
    return dict(json.loads(visible.stdout.readline()))


def test_visible_sees_the_commit_before_the_line(visible: subprocess.Popen[str], tmp_path: Path) -> None:
    for _ in range(3):
        seen = _inject(visible, tmp_path / "errors", "row line\n", 30_000)
        assert seen["row"] is not None
        assert seen["line"] is not None
        assert 0 < seen["row"] <= seen["line"]


def test_visible_says_what_did_not_come(visible: subprocess.Popen[str], tmp_path: Path) -> None:
    seen = _inject(visible, tmp_path / "errors", "line\n", 30_000)
    assert seen["line"] is not None
    assert seen["row"] is None
    assert _inject(visible, tmp_path / "errors", "nothing\n", 200) == {"line": None, "row": None}


def test_visible_ends_when_an_injection_is_refused(visible: subprocess.Popen[str], tmp_path: Path) -> None:
    assert visible.stdin is not None
    assert visible.stdout is not None
    visible.stdin.write(f"x\t100\t{tmp_path / 'absent' / 'file'}\t00\n")
    visible.stdin.flush()
    assert visible.stdout.readline() == ""
    assert visible.wait(30) == 1
    assert "absent" in (tmp_path / "said").read_text("utf-8")
