# SPDX-License-Identifier: MIT
"""A failover's moments, as text and as SVG. Times are the host's, see bed.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape


@dataclass(frozen=True)
class Moment:
    """`seconds` after the error; `where` is a node or ""."""

    seconds: float
    what: str
    where: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Timeline:
    """One failover. `clock_error` is how wrong times of different nodes may be, seconds."""

    title: str
    moments: tuple[Moment, ...]
    clock_error: float
    notes: tuple[str, ...] = ()

    def at(self, what: str) -> float:
        """Seconds after the error. KeyError if that did not happen."""
        for moment in self.moments:
            if moment.what == what:
                return moment.seconds
        raise KeyError(f"{what} is not in the timeline: {[m.what for m in self.moments]}")


def seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if abs(value) < 1 else f"{value:.2f} s"


def text(line: Timeline) -> str:
    rows = [line.title]
    for moment in line.moments:
        when = f"  {seconds(moment.seconds):>9}  {moment.where:6} "
        rows.append(f"{when}{moment.what:28} {moment.detail}".rstrip())
    rows.append(f"  (clocks of the nodes: ± {line.clock_error * 1000:.1f} ms)")
    rows += [f"  {note}" for note in line.notes]
    return "\n".join(rows)


_WIDTH, _LEFT, _RIGHT = 960, 40, 40
_LANE, _ROW = 96, 20
_COLOURS = ("#1f6f8b", "#b5482a", "#6b6b6b")


def svg(lines: Sequence[Timeline], foot: str) -> str:
    """Lanes with numbered dots on one axis of time, and below what the numbers are."""
    end = max(m.seconds for line in lines for m in line.moments) * 1.03
    rows = max(len(line.moments) + len(line.notes) for line in lines)
    below = 30 + _LANE * len(lines) + 40
    height = below + _ROW * (rows + 3)

    def x(value: float) -> float:
        return _LEFT + max(value, 0) / end * (_WIDTH - _LEFT - _RIGHT)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        "<!-- SPDX-License-Identifier: MIT -->",
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
    ]
    base = 30 + _LANE * len(lines)
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if end / s <= 12)
    for n in range(int(end / step) + 1):
        at = x(n * step)
        out.append(f'<line x1="{at:.1f}" y1="24" x2="{at:.1f}" y2="{base}" stroke="#e4e4e4"/>')
        out.append(f'<text x="{at:.1f}" y="{base + 14}" text-anchor="middle">{n * step:g} s</text>')
    columns = (_WIDTH - _LEFT - _RIGHT) / len(lines)
    for lane, line in enumerate(lines):
        colour = _COLOURS[lane % len(_COLOURS)]
        y = 30 + _LANE * lane + 66
        last = line.moments[-1].seconds
        title = f'font-weight="bold" fill="{colour}">{escape(line.title)}</text>'
        out.append(f'<text x="{_LEFT}" y="{y - 44}" {title}')
        out.append(
            f'<line x1="{x(0):.1f}" y1="{y}" x2="{x(last):.1f}" y2="{y}" stroke="{colour}" stroke-width="3"/>'
        )
        # Dots that would lie on one another go up, with a line down to their moment.
        right = [-100.0] * 3
        for number, moment in enumerate(line.moments, 1):
            at = x(moment.seconds)
            level = next((n for n in range(3) if at - right[n] >= 17), 2)
            shown = max(at, right[level] + 17)
            right[level] = shown
            up = y - 15 * level
            if level or shown != at:
                out.append(f'<line x1="{at:.1f}" y1="{y}" x2="{shown:.1f}" y2="{up}" stroke="{colour}"/>')
            out.append(f'<circle cx="{shown:.1f}" cy="{up}" r="8" fill="{colour}"/>')
            out.append(
                f'<text x="{shown:.1f}" y="{up + 4}" text-anchor="middle" font-size="10" fill="#fff">'
                f"{number}</text>"
            )
        left = _LEFT + columns * lane
        out.append(f'<text x="{left:.0f}" y="{below}" {title}')
        for number, moment in enumerate(line.moments, 1):
            row = below + _ROW * number
            what = " ".join(p for p in (moment.what, f"({moment.where})" if moment.where else "") if p)
            end_at = f'y="{row}" text-anchor="end"'
            out.append(f'<text x="{left + 18:.0f}" {end_at} fill="{colour}">{number}</text>')
            out.append(f'<text x="{left + 92:.0f}" {end_at}>{seconds(moment.seconds)}</text>')
            out.append(f'<text x="{left + 102:.0f}" y="{row}">{escape(what)}</text>')
        for number, note in enumerate(line.notes, len(line.moments) + 1):
            row = below + _ROW * number
            out.append(f'<text x="{left:.0f}" y="{row}" fill="#555">{escape(note)}</text>')
    out.append(f'<text x="{_LEFT}" y="{height - 12}" fill="#555">{escape(foot)}</text>')
    return "\n".join([*out, "</svg>", ""])
