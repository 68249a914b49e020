# SPDX-License-Identifier: MIT
"""`make demo-ha`: an error under a guest on one node; it runs on the other. The timeline, printed and drawn.

Then the same without hwerr: a stock agent that looks every 10 s. Ends with status 0 if the guest was
FROZEN, its replacement wrote on, and the counter on their disk did not go back.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import timeline
from bed import TREE, Bed, BedError, say
from failover import LIMIT, fail_over, stock_fail_over

DRAWING = TREE / "build/ha/failover.svg"
FOOT = "Two emulated machines on one host: times compare with one another only."


def guarded(bed: Bed) -> tuple[timeline.Timeline, bool]:
    """With hwerr-guard: the timeline, and whether all was as it should be."""
    say("hwerr-guard on both nodes, the guest on alpha")
    bed.each(lambda node: node.guarded())
    alpha = bed.nodes["alpha"]
    alpha.configure()
    bed.await_write("alpha", 0, LIMIT)
    alpha.settle()
    say("an uncorrected memory error under it")
    done = fail_over(bed, alpha, 1)
    writes = bed.disk.writes()
    last = max(w.number or 0 for w in writes if w.node == "alpha")
    number = done.first_write.number or 0
    print(timeline.text(done.timeline))
    print(f"  the last number of alpha: {last}; the first of beta: {number}", flush=True)
    alpha.clear(incident=done.incident["id"])
    return done.timeline, done.incident["state"] == "frozen" and last < number


def stock(bed: Bed) -> timeline.Timeline:
    """Without hwerr-guard, in the same cluster."""
    say("the same without hwerr-guard, the guest on alpha")
    alpha = bed.nodes["alpha"]
    alpha.configure(what="nothing")
    alpha.settle()
    bed.each(lambda node: node.unguarded())
    before = len(bed.disk)
    alpha.configure(what="stock")
    bed.await_write("alpha", before, LIMIT)
    alpha.settle()
    say("an uncorrected memory error under it")
    line = stock_fail_over(bed, alpha)
    print(timeline.text(line), flush=True)
    return line


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/ha/demo.py", description=__doc__)
    parser.add_argument("--kernel", default="6.12", help="of the test bed (default: %(default)s)")
    parser.add_argument("--guarded-only", action="store_true", help="not the comparison")
    parser.add_argument("--svg", type=Path, default=DRAWING, help="default: %(default)s")
    args = parser.parse_args()
    try:
        with Bed(args.kernel) as bed:
            line, good = guarded(bed)
            lines = [line]
            if not args.guarded_only:
                lines.append(stock(bed))
                ratio = lines[1].at("QEMU started") / line.at("QEMU started")
                print(f"error → QEMU started on the other node: {ratio:.1f} times as long without")
            args.svg.parent.mkdir(parents=True, exist_ok=True)
            args.svg.write_text(timeline.svg(lines, FOOT), "utf-8")
            print(f"drawn: {args.svg}")
    except (BedError, TimeoutError) as error:
        say(str(error))
        return 1
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
