# SPDX-License-Identifier: MIT
"""Finds kernel splats on a console log.

What a *handled* hardware error prints is no splat: "[Hardware Error]" lines,
"Memory failure: 0x…: recovery action …", "MCE: Killing …", AER's reports.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# "[   12.345678] " with an optional caller ("[ T123]"), as CONFIG_PRINTK_CALLER adds it.
_STAMP = re.compile(r"^\[\s*\d+\.\d+\](\[\s*[TC]\d+\])?\s?")

_SPLAT = re.compile(
    r"""
      ^WARNING:\s                                  # WARN(), lockdep, suspicious RCU usage
    | ^(watchdog:\s)?BUG:\s                        # BUG:, KASAN, soft lockup, scheduling while atomic
    | ^BUG\s\S+\s\(.*\):\s                         # SLUB: redzone, poison overwritten
    | ^kernel\sBUG\sat\s
    | ^------------\[\scut\shere
    | \bOops:\s
    | ^(general\sprotection\sfault|double\sfault|invalid\sopcode|divide\serror|stack\ssegment)[,:\s]
    | ^traps:\s.*\sin\skernel\smode
    | \b(KASAN|KCSAN|KMSAN|UBSAN|KFENCE):\s
    | ^INFO:\stask\s.*\sblocked\sfor\smore\sthan
    | ^INFO:\s(trying\sto\sregister\snon-static\skey|possible\srecursive\slocking|inconsistent\slock\sstate)
    | ^(rcu:\s)?INFO:\srcu_.*\s(detected|self-detected)\s
    | Watchdog\sdetected\shard\sLOCKUP
    | ^kmemleak:\s\d+\snew\ssuspected\smemory\sleaks
    | ^unreferenced\sobject\s0x
    | sleeping\sfunction\scalled\sfrom\sinvalid\scontext
    | \bscheduling\swhile\satomic
    | ^refcount_t:\s
    | ^(list_add|list_del)\scorruption
    | ^ODEBUG:\s
    | ^usercopy:\s
    | ^Kernel\spanic\s-\snot\ssyncing
    | \[\sBUG:\s.*\s\]                             # lockdep: "[ BUG: bad unlock balance detected! ]"
    """,
    re.VERBOSE,
)

# Lines that belong to the report just begun.
_CONTEXT_LINES = 60
_END = re.compile(r"^---\[ end (trace|Kernel panic)|^ </TASK>|^=+$")

# /proc/sys/kernel/tainted: what only a splat sets (Documentation/admin-guide/tainted-kernels.rst).
_TAINTS = {5: "bad page", 7: "oops or BUG", 9: "warning", 14: "soft lockup"}


def strip_stamp(line: str) -> str:
    """The message of a console line, without time stamp and caller."""
    return _STAMP.sub("", line.rstrip("\r\n"), count=1)


def is_splat(line: str) -> bool:
    """Whether a console line begins a splat."""
    text = strip_stamp(line)
    return "[Hardware Error]" not in text and _SPLAT.search(text) is not None


def find_splats(lines: Iterable[str], allow: Sequence[str] = ()) -> list[str]:
    """The splats on a console, each with the lines of its report.

    A splat one of whose lines matches a regular expression in `allow` is left out.
    """
    found: list[str] = []
    current: list[str] | None = None
    allowed = [re.compile(a) for a in allow]

    def close() -> None:
        nonlocal current
        if current and not any(a.search(ln) for a in allowed for ln in current):
            found.append("\n".join(current))
        current = None

    for line in lines:
        if current is None and is_splat(line):
            current = []
        if current is not None:
            current.append(line.rstrip("\r\n"))
            ends = len(current) > 1 and _END.search(strip_stamp(line))
            if (ends and not strip_stamp(line).startswith("=")) or len(current) >= _CONTEXT_LINES:
                close()
    close()
    return found


def deaf_cpu(text: str) -> str | None:
    """The number of a CPU that was sent an NMI to say where it is, and did not; the last such.

    A console on which it may still come has to be looked at again.
    """
    *_, asked = (None, *re.finditer(r"Sending NMI from CPU \d+ to CPUs (\d+):", text))
    if asked is None or f"NMI backtrace for cpu {asked[1]}" in text[asked.end() :]:
        return None
    return asked[1]


def taint_names(tainted: int) -> list[str]:
    """What splats the taint flags tell of."""
    return [name for bit, name in _TAINTS.items() if tainted >> bit & 1]
