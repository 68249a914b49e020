# SPDX-License-Identifier: MIT
"""The tables and plots of docs/benchmarks.md, from what side_by_side.py measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

HWERR = "hwerr-poll"
KINDS = ("mc_event", "mce_record", "aer_event", "memory_failure")
TITLES = {
    "mc_event": "memory controller",
    "mce_record": "machine check",
    "aer_event": "PCIe AER",
    "memory_failure": "memory_failure()",
}


@dataclass(frozen=True)
class Goal:
    what: str
    measured: str
    goal: str
    met: bool | None


def percentile(values: list[float], share: float) -> float:
    """The least value that so many of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


# Of fewer values the 99th percentile is the greatest, and is called so.
ENOUGH = 100


def high(values: list[float]) -> tuple[str, float]:
    """What most values do not exceed, and what to call it."""
    name = "p99" if len(values) >= ENOUGH else f"max of {len(values)}"
    return name, percentile(values, 0.99)


def time_text(ns: float) -> str:
    """Two digits are all that an emulated machine gives."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= size:
            return f"{ns / size:.2g} {unit}" if ns / size < 100 else f"{ns / size:.0f} {unit}"
    return f"{ns:.0f} ns"


def ratio_text(values: list[float]) -> str:
    mid, low, high = median(values), min(values), max(values)
    return f"{mid:.2g} × ({low:.2g} … {high:.2g}; {len(values)} pairs)"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def put_section(path: Path, name: str, text: str) -> None:
    """Replace what is between the markers of this name, or append it with them."""
    begin, end = f"<!-- bench-peers {name}: begin -->", f"<!-- bench-peers {name}: end -->"
    old = path.read_text("utf-8")
    section = f"{begin}\n{text}\n{end}"
    if begin in old:
        head, rest = old.split(begin)
        new = f"{head}{section}{rest.split(end)[1]}"
    else:
        new = f"{old.rstrip()}\n\n{section}\n"
    path.write_text(new, encoding="utf-8")


class Report:
    def __init__(self, result: dict[str, Any]) -> None:
        self.m: dict[str, Any] = result["measure"]
        self.severity: dict[str, Any] = result.get("severity", {})
        self.idles: dict[str, int] = result.get("idle", {})
        self.kernel: str = result["kernel"]
        self.load: list[float] = result.get("load", [])
        self.titles: dict[str, str] = self.m["titles"]

    # -- latency -----------------------------------------------------------------

    def ns(self, peer: str, kind: str, turns: list[dict[str, Any]] | None = None) -> list[float]:
        """What was seen of a kind, of all turns."""
        rounds = self.m["latency"] if turns is None else turns
        values = [v for r in rounds if peer in r for v in r[peer]["ns"].get(kind, [])]
        return [v for v in values if v is not None]

    def unseen(self, peer: str) -> tuple[int, int]:
        """(not visible in time, injected)"""
        values = [v for r in self.m["latency"] if peer in r for k in r[peer]["ns"].values() for v in k]
        return sum(v is None for v in values), len(values)

    def pairs(self, peer: str, pick: Callable[[list[float]], float] = median, of: str = HWERR) -> list[float]:
        """`of` / the peer, of the medians or what `pick` makes of them; one for a kind and a round."""
        found = []
        for turn in self.m["latency"]:
            for kind in KINDS:
                ours, theirs = (self.ns(p, kind, [turn]) for p in (of, peer))
                if ours and theirs:
                    found.append(pick(ours) / pick(theirs))
        return found

    def daemons(self) -> list[str]:
        """The rasdaemons that show what happens as it happens."""
        return [p for p in self.titles if p.startswith("rasdaemon") and self.pairs(p)]

    def latency(self) -> str:
        rows = []
        for peer, title in self.titles.items():
            cells = [title]
            for kind in KINDS:
                values = self.ns(peer, kind)
                listens = any(kind in r[peer]["ns"] for r in self.m["latency"] if peer in r)
                if values:
                    name, most = high(values)
                    cells.append(f"{time_text(percentile(values, 0.5))} / {time_text(most)} ({name})")
                else:
                    cells.append("**none seen**" if listens else "–")
            pairs = self.pairs(peer)
            missing, of = self.unseen(peer)
            cells.append(f"{missing} of {of}")
            for values in (pairs, self.pairs(peer, min)):
                cells.append("1" if peer == HWERR else ratio_text(values) if values else "–")
            rows.append(cells)
        return table(
            [
                "consumer",
                *TITLES.values(),
                "not seen",
                "hwerr-poll's median / its",
                "hwerr-poll's least / its",
            ],
            rows,
        )

    # -- storm ---------------------------------------------------------------------

    def storm_of(self, peer: str) -> list[dict[str, Any]]:
        return [r[peer] for r in self.m["storm"] if peer in r]

    def cost(self, peer: str) -> list[float]:
        """CPU ns for each error that was seen, of each storm: the consumer's, and the raiser's
        above what raising costs when nobody listens.
        """
        storms = self.storm_of(peer)
        return [
            s["cpu_ns"] / s["through"] + max(0, s["raise_ns"] - nobody) / s["seen"]
            for s, nobody in zip(storms, self.m["nobody_ns"], strict=False)
            if s["through"]
        ]

    def paced(self, peer: str) -> list[float]:
        """CPU ns of the consumer for each error, one at a time, of each round."""
        return [r[peer]["cpu_ns"] for r in self.m["latency"] if r.get(peer, {}).get("cpu_ns")]

    def storms(self) -> str:
        rows = []
        for peer, title in self.titles.items():
            storms = self.storm_of(peer)
            if not storms:
                continue
            raised = storms[0]["raised"]
            seen = median(s["seen"] for s in storms)
            worse = f"{median(s['uncorrected'] for s in storms):.0f} of {1 + (raised - 1 + 499) // 500}"
            untold = [s["raised"] - s["seen"] - s["told"] for s in storms]
            lost = median(s["raised"] - s["seen"] for s in storms)
            told = "all" if not any(untold) else "**none**" if not any(s["told"] for s in storms) else "some"
            rest = ""
            if not all(s["settled"] for s in storms):
                rest = f" (of them {storms[0]['through']:,} after {storms[0]['seconds']:.0f} s)"
                worse = "–"
            cost = self.cost(peer)
            paced = self.paced(peer)
            rows.append(
                [title, f"{seen:,.0f}{rest}", worse, f"{lost:,.0f}", told,
                 f"{max(untold, key=abs):,}", time_text(median(cost)) if cost else "–",
                 time_text(median(paced)) if paced else "–"]
            )  # fmt: skip
        return table(
            ["consumer", "seen", "of them uncorrected", "lost", "of that told", "untold, at worst",
             "CPU an error seen, storm", "CPU of the consumer an error, one at a time"],
            rows,
        )  # fmt: skip

    # -- severity, guests, idle ------------------------------------------------------

    def graded(self, peer: str) -> dict[str, int]:
        grades = [c["by"][peer]["grade"] for c in self.severity.values() if peer in c["by"]]
        return {g: grades.count(g) for g in ("right", "wrong", "silent", "missing")}

    def severities(self) -> str:
        if not self.severity:
            return "Not measured: `scripts/bench-peers --only severity`."
        present = [p for p in self.titles if any(p in c["by"] for c in self.severity.values())]
        rows = []
        for name, case in self.severity.items():
            cells = [name, " + ".join(case["wanted"])]
            for peer in present:
                by = case["by"][peer]
                said = " + ".join(s or "no word of it" for s in by["said"]) or "no event"
                cells.append(said if by["grade"] == "right" else f"**{said}**")
            rows.append(cells)
        total = ["right", f"{len(self.severity)}"]
        total += [str(self.graded(p)["right"]) for p in present]
        return table(["case", "expected", *(self.titles[p] for p in present)], [*rows, total])

    def named(self) -> str:
        rows = []
        for peer, title in self.titles.items():
            turns = [r[peer] for r in self.m["latency"] if peer in r]
            if not any("memory_failure" in t["ns"] for t in turns):
                rows.append([title, "does not listen to it"])
                continue
            said = {t["named"] for t in turns}
            cell = " or ".join(sorted(said)) if any(said) else "no"
            rows.append(
                [title, f"{cell}; the monitor it comes on is the guest's" if peer == "qemu" else cell]
            )
        return table(["consumer", "says of the guest whose page was hit"], rows)

    def idle(self) -> str:
        if not self.idles:
            return "Not measured: `scripts/bench-peers --only severity`."
        titles = self.titles | {"hwerr-guard": "hwerr-guard run, no guest"}
        rows = [[titles[p], str(n)] for p, n in self.idles.items()]
        return table(["consumer", "context switches in 10 s"], rows)

    # -- all of it -------------------------------------------------------------------

    def goals(self) -> list[Goal]:
        found = []
        for peer in self.daemons():
            pairs = self.pairs(peer)
            what = f"latency, median, hwerr-poll / {self.titles[peer]}"
            found.append(Goal(what, ratio_text(pairs), "≤ 0.1 ×", median(pairs) <= 0.1))
            # What does nothing but to be woken and to print: no consumer can be faster here.
            if floor := self.pairs(peer, of="perf"):
                found.append(Goal(f"the same of perf_event_open, woken for each event / {self.titles[peer]}",
                                  ratio_text(floor), "–", None))  # fmt: skip
        for peer in (HWERR, "hwerr-watch"):
            untold = max((abs(s["raised"] - s["seen"] - s["told"]) for s in self.storm_of(peer)), default=-1)
            what = f"untold loss in a storm of {self.storm_of(peer)[0]['raised'] - 1:,}, {peer}"
            found.append(Goal(what, f"{untold}", "0", untold == 0))
        if self.severity:
            right, of = self.graded("hwerr-watch")["right"], len(self.severity)
            found.append(Goal("severity of the shared cases", f"{right} of {of}", "all", right == of))
        for peer in [p for p in self.titles if p.startswith("rasdaemon")]:
            for name, cost in (("in a storm", self.cost), ("one at a time", self.paced)):
                ours, theirs = cost(HWERR), cost(peer)
                if not theirs:
                    continue
                ratios = [a / b for a, b in zip(ours, theirs, strict=False)]
                what = f"CPU an error seen, {name}, hwerr-poll / {self.titles[peer]}"
                found.append(Goal(what, ratio_text(ratios), "≤ 0.1 ×", median(ratios) <= 0.1))
        return found

    def markdown(self) -> str:
        suffix = ".".join(self.kernel.split(".")[:2])
        said = {True: "met", False: "**missed**", None: ""}
        goals = table(
            ["what", "measured", "goal", ""],
            ([g.what, g.measured, g.goal, said[g.met]] for g in self.goals()),
        )
        rings = self.m["rings"]
        rounds, storms = len(self.m["latency"]), len(self.m["storm"])
        busy = ""
        if self.load:
            busy = f" The machine's load meanwhile: {self.load[0]:.0f} on {self.load[1]:.0f} CPUs."
        return f"""\
## Kernel {self.kernel}

Again: `scripts/bench-peers --kernel {suffix}`. Turns of each consumer: {rounds} for the latency, {storms} \
for the storm.{busy}

{goals}

### From the injection to the first sign of it

![Latency: median and greatest of each consumer, logarithmic](latency-{suffix}.svg)

The median, and the greatest, or the 99th percentile where there are {ENOUGH} or more; the last two columns \
compare the medians and the leasts of each kind in each round. The least is what the machine's other work \
disturbs least.

{self.latency()}

### A storm, as fast as the kernel raises it

![Storm: errors seen, lost and told, lost and not told](storm-{suffix}.svg)

Each consumer has the buffer it comes with: hwerr {rings["hwerr"]} KiB in all, rasdaemon \
and trace_pipe {rings["trace"]} KiB, perf {rings["perf"]} KiB.

{self.storms()}

### Severity of the shared cases

{self.severities()}

### The guest that was hit

{self.named()}

### Nothing happens

{self.idle()}"""

    # -- plots -----------------------------------------------------------------------

    def plots(self) -> dict[str, str]:
        return {"latency": self._latency_plot(), "storm": self._storm_plot()}

    def _latency_plot(self) -> str:
        rows = []
        for peer, title in self.titles.items():
            values = [v for kind in KINDS for v in self.ns(peer, kind)]
            rows.append((title, values))
        known = [percentile(values, share) for _, values in rows if values for share in (0.5, 0.99)]
        first, last = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
        plot = Plot(len(rows))

        def x(ns: float) -> float:
            return plot.left + (math.log10(ns) - first) / (last - first) * plot.width

        for power in range(first, last + 1):
            plot.tick(x(10**power), time_text(10**power))
        for n, (title, values) in enumerate(rows):
            y = plot.label(n, title)
            if not values:
                plot.text(plot.left + 6, y + 4, "nothing seen", "dim")
                continue
            p50, (name, most) = percentile(values, 0.5), high(values)
            plot.line(x(p50), x(most), y, "a")
            plot.dot(x(p50), y, "a", f"p50 {time_text(p50)}")
            plot.bar_end(x(most), y, "a", f"{name} {time_text(most)}")
            plot.text(x(most) + 8, y + 4, f"{time_text(p50)} / {time_text(most)}", "dim")
        bar = f"greatest (bar; p99 of {ENOUGH} or more)"
        return plot.svg(f"Injection to first sign, all kinds together: median (dot) to {bar}")

    def _storm_plot(self) -> str:
        rows = [(self.titles[p], self.storm_of(p)) for p in self.titles if self.storm_of(p)]
        plot = Plot(len(rows))
        for share in range(0, 101, 25):
            plot.tick(plot.left + plot.width * share / 100, f"{share}%")
        for n, (title, storms) in enumerate(rows):
            y = plot.label(n, title)
            raised = storms[0]["raised"]
            seen = median(s["seen"] for s in storms)
            told = min(median(s["told"] for s in storms), raised - seen)
            at = float(plot.left)
            for value, style in ((seen, "a"), (told, "b"), (raised - seen - told, "c")):
                width = plot.width * value / raised
                plot.box(at, y, width, style)
                at += width
        plot.legend((("a", "seen"), ("b", "lost, and told"), ("c", "lost, not told")))
        return plot.svg("A storm of errors: what each consumer saw")


class Plot:
    """Rows of a chart, as SVG that is read on light and on dark."""

    left, width, row, top = 350, 420, 26, 44
    STYLE = """\
text { font: 12px sans-serif; fill: #24292f } .dim { fill: #57606a } .title { font-weight: bold }
.grid { stroke: #8c959f; stroke-opacity: .4 } .a { fill: #0969da; stroke: #0969da }
.b { fill: #bf8700; stroke: #bf8700 } .c { fill: #cf222e; stroke: #cf222e } .box { stroke: none }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .dim { fill: #9198a1 } .a { fill: #58a6ff; stroke: #58a6ff }
.b { fill: #d29922; stroke: #d29922 } .c { fill: #f85149; stroke: #f85149 } }"""

    def __init__(self, rows: int) -> None:
        self.bottom = self.top + rows * self.row
        self._parts: list[str] = []

    def add(self, element: str) -> None:
        self._parts.append(element)

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "start") -> None:
        self.add(
            f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def tick(self, x: float, text: str) -> None:
        self.add(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{self.top - 6}" y2="{self.bottom}"/>')
        self.text(x, self.bottom + 16, text, "dim", "middle")

    def label(self, n: int, text: str) -> float:
        y = self.top + (n + 0.5) * self.row
        self.text(self.left - 10, y + 4, text, anchor="end")
        return y

    def line(self, x1: float, x2: float, y: float, style: str) -> None:
        self.add(f'<line class="{style}" stroke-width="2" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y}" y2="{y}"/>')

    def dot(self, x: float, y: float, style: str, hint: str) -> None:
        self.add(f'<circle class="{style}" cx="{x:.1f}" cy="{y}" r="4"><title>{hint}</title></circle>')

    def bar_end(self, x: float, y: float, style: str, hint: str) -> None:
        self.add(
            f'<line class="{style}" stroke-width="2" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 6}" y2="{y + 6}">'
            f"<title>{hint}</title></line>"
        )

    def box(self, x: float, y: float, width: float, style: str) -> None:
        self.add(
            f'<rect class="{style} box" x="{x:.1f}" y="{y - 8}" width="{max(width, 0):.1f}" height="16"/>'
        )

    def legend(self, entries: Iterable[tuple[str, str]]) -> None:
        x = float(self.left)
        for style, text in entries:
            self.box(x, self.bottom + 36, 12, style)
            self.text(x + 18, self.bottom + 40, text)
            x += 60 + 7 * len(text)

    def svg(self, title: str) -> str:
        width, height = self.left + self.width + 140, self.bottom + 56
        body = "\n".join(self._parts)
        return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" \
role="img" aria-label="{escape(title)}">
<!-- SPDX-License-Identifier: MIT -->
<style>
{self.STYLE}
</style>
<text x="10" y="20" class="title">{escape(title)}</text>
{body}
</svg>
"""
