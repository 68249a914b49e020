# SPDX-License-Identifier: MIT
"""What programs say of an error, read as a person would read it. Nothing here needs a kernel.

A class is info, corrected, deferred, recoverable (uncorrected, but not said to be fatal) or
fatal; None is that nothing is said. Doubt is in favour of who says it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

# The words of expected.tsv, of each of its three sets of cases.
EXPECTED = {"srar": "recoverable", "nonfatal": "recoverable"}

_MC = re.compile(r"\bmc_event:? .*?\b(Corrected|Uncorrected|Fatal|Deferred|Info) error")
_MC_CLASS = {
    "Corrected": "corrected",
    "Uncorrected": "recoverable",
    "Fatal": "fatal",
    "Deferred": "deferred",
    "Info": "info",
}


def expected(row: dict[str, str]) -> list[str]:
    """The classes of a row of expected.tsv, one for each event it makes."""
    words = (row.get("expected_class") or row["expected_severity"]).split(" + ")
    return [EXPECTED.get(word, word) for word in words]


def rasdaemon(line: str) -> str | None:
    """The class that a line of rasdaemon's log states."""
    if found := _MC.search(line):
        return _MC_CLASS[found[1]]
    if re.search(r"\baer_event:? ", line):
        # The last words of the line; a name of an error may be "Advisory Non-Fatal".
        if line.rstrip().endswith("Uncorrected (Fatal)"):
            return "fatal"
        if line.rstrip().endswith("Uncorrected (Non-Fatal)"):
            return "recoverable"
        return "corrected" if line.rstrip().endswith("Corrected") else None
    if re.search(r"\bmce_record:? ", line):
        if "Processor_context_corrupt" in line:
            return "fatal"
        if "Uncorrected_error" in line or re.search(r"\b(UCNA|SRAO|SRAR)\b", line):
            return "recoverable"
        if re.search(r"Corrected_error|corrected error", line):
            return "corrected"
    return None


def trace(line: str) -> str | None:
    """The class that the kernel's own text of a tracepoint states."""
    if found := _MC.search(line):
        return _MC_CLASS[found[1]]
    found = re.search(r"\baer_event: .* severity=(Corrected|Fatal|Uncorrected, non-fatal)", line)
    if found:
        return {"Corrected": "corrected", "Fatal": "fatal"}.get(found[1], "recoverable")
    return None


def watch(line: str) -> str | None:
    """The class in a line of `hwerr-watch --json`."""
    event: dict[str, Any] = json.loads(line)
    return str(event["severity"])


def events(text: str, mark: str) -> list[str]:
    """The lines that are about an error."""
    return [line for line in text.splitlines() if mark in line]


def grade(said: Iterable[str | None], wanted: list[str]) -> str:
    """right, wrong, or silent (there is an event, and no word of its severity), or missing."""
    classes = list(said)
    if not classes:
        return "missing"
    if any(c is None for c in classes):
        return "silent"
    return "right" if classes == wanted else "wrong"


_LOST: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], int]], ...] = (
    (re.compile(r"^(\d+) records lost$"), lambda m: int(m[1])),  # examples/hwerr-poll.c
    (re.compile(r"^\{.*\"lost\": ?(\d+)"), lambda m: int(m[1])),  # hwerr-watch --json
    (re.compile(r"^CPU:\d+ \[LOST (\d+) EVENTS\]$"), lambda m: int(m[1])),  # trace_pipe
    (re.compile(r"^LOST (\d+)$"), lambda m: int(m[1])),  # perfread
)


def told_lost(lines: Iterable[str]) -> int:
    """How many errors a consumer says it missed."""
    return sum(count(m) for line in lines for pattern, count in _LOST if (m := pattern.match(line)))


def about_loss(text: str) -> list[str]:
    """Lines in which a program could mean loss, whatever its words."""
    return [line for line in text.splitlines() if re.search(r"\b(lost|overrun|missed|dropped)\b", line, re.I)]


def names(text: str, pid: int, gpa: int | None) -> str:
    """Whether the guest's process and its guest-physical address are said: "pid, address" or less."""
    said = ["pid"] if re.search(rf"(?:\bpid|\"pid\":) ?{pid}\b", text) else []
    if gpa is not None and re.search(rf"\b{gpa:#x}\b", text):
        said.append("address")
    return ", ".join(said)
