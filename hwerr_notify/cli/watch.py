# SPDX-License-Identifier: MIT
"""hwerr-watch: look at hardware errors as they come."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from .. import device as hwerr
from ..enums import Flags, Severity, Source
from ..event import Event, Guest, RecordError, Task
from ..message import hits, printable, what, where
from . import (
    EXIT_ERROR,
    EXIT_NO_DEVICE,
    EXIT_NO_PERMISSION,
    EXIT_NOTHING,
    EXIT_OK,
    EXIT_USAGE,
    complain,
    output,
)
from .parser import Parser

if TYPE_CHECKING:
    from ..probe import ProbeStatus

PROG = "hwerr-watch"

EPILOG = """\
exit status:
  0    done: --count reached, --timeout over and something had come, --stats shown
  1    an error that none of these names; stderr says which
  2    wrong usage
  3    --timeout is over and nothing came
  4    no device: the module is not loaded, and it does not go without
  5    no permission
  130  interrupted (Ctrl-C)
  141  the reader of the output went away

examples:
  hwerr-watch                              follow, one line an error
  hwerr-watch --since boot -v              everything of this boot, with details, then follow
  hwerr-watch --since oldest --timeout 0   what is held, and end
  hwerr-watch --vm web1 --severity recoverable --json | while read -r event; do ...

NO_COLOR in the environment turns colour off, FORCE_COLOR on.
"""

SOURCE_NAMES = {s.label: s for s in Source} | {"memfail": Source.MEMORY_FAILURE}
SEVERITY_NAMES = {s.label: s for s in Severity}

STYLE = {
    Severity.INFO: "dim",
    Severity.CORRECTED: "green",
    Severity.DEFERRED: "yellow",
    Severity.RECOVERABLE: "bold red",
    Severity.FATAL: "bold white on red",
}

Segments = list[tuple[str, str]]

# Segments of a line, and whether it may be cut to the width of a terminal.
Lines = Iterator[tuple[Segments, bool]]


def _severity(text: str) -> Severity:
    try:
        return SEVERITY_NAMES[text.lower()]
    except KeyError:
        names = ", ".join(SEVERITY_NAMES)
        raise argparse.ArgumentTypeError(f"{text!r} is no severity: one of {names}") from None


def _sources(text: str) -> list[Source]:
    found = []
    for name in text.split(","):
        source = SOURCE_NAMES.get(name.strip().lower().replace("-", "_"))
        if source is None:
            names = ", ".join(s.label for s in Source)
            raise argparse.ArgumentTypeError(f"{name!r} is no source: one of {names}")
        found.append(source)
    return found


def _since(text: str) -> hwerr.Since:
    match text:
        case "now" | "oldest" | "boot":
            return text
    if text.isascii() and text.isdigit() and 0 < int(text) < 1 << 64:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is none of now, oldest, boot, or a number from 1")


def _count(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 1")


def _pid(text: str) -> int:
    if text.isascii() and text.isdigit() and 0 < int(text) < 1 << 31:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no process number")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    # A month is more than anybody waits, and less than what poll() takes.
    if not 0 <= value <= 2_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0 to 2000000")
    return value


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog=PROG,
        description="Show hardware errors as they come, and whom they hit.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = p.add_argument
    add("--since", type=_since, default="now", metavar="now|oldest|boot|SEQ",
        help="begin with what comes from now on, the oldest held, the oldest of this boot, "
        "or a sequence number (default: now)")  # fmt: skip
    add("--severity", type=_severity, metavar="LEAST",
        help=f"only this severity and worse: {', '.join(SEVERITY_NAMES)}")  # fmt: skip
    add("--source", type=_sources, action="extend", default=[], metavar="NAME[,NAME...]",
        help=f"only these sources; repeatable: {', '.join(s.label for s in Source)}")  # fmt: skip
    add("--pid", type=_pid, metavar="PID", help="only what hits this process")
    add("--vm", metavar="NAME|UUID", help="only what hits this VM")
    add("--count", type=_count, metavar="N", help="end after N events")
    add("--timeout", type=_seconds, metavar="S",
        help="end after S seconds, with status 3 if nothing came; 0: show what is there and end")  # fmt: skip
    add("--json", action="store_true", help="one JSON object a line, for programs")
    add("-v", "--verbose", action="store_true", help="all details of each event")
    add("--stats", action="store_true", help="show totals since the module was loaded, and end")
    add("--device", default=hwerr.DEFAULT_PATH, metavar="PATH", help="default: %(default)s")
    return p


# -- the forms of an event ---------------------------------------------------


def _clock(ns: int, today: datetime) -> str:
    if not ns:
        return "(unknown)"
    then = datetime.fromtimestamp(ns // 1_000_000_000)
    if then.date() == today.date():
        return f"{then:%H:%M:%S}.{ns // 1_000_000 % 1000:03d}"
    return f"{then:%b %d %H:%M}" if then.year == today.year else f"{then:%Y-%m-%d}"


def _who(event: Event) -> str:
    owners: list[Guest | Task] = [*event.guests, *event.tasks]
    if not owners:
        return "(unknown)" if Flags.OWNERS_UNKNOWN in event.flags else "-"
    first = owners[0]
    name = (first.name if isinstance(first, Guest) else None) or first.comm or "?"
    text = f"{printable(name)}({first.pid})"
    if isinstance(first, Guest) and first.gpa is not None:
        text += f" {first.gpa:#x}"
    more = len({o.pid for o in owners}) - 1
    return f"{text} +{more}" if more else text


def _notes(event: Event) -> str:
    notes = []
    if event.action_required:
        notes.append("cannot go on")
    if Flags.STOPPED in event.flags:
        notes.append("VM stopped")
    if event.software:
        notes.append("from software")
    if Flags.LINKED in event.flags:
        notes.append(f"same as {event.id}")
    if event.earlier_boot:
        notes.append("before this boot")
    elif Flags.EARLIER in event.flags:
        notes.append("before the module")
    return f" [{', '.join(notes)}]" if notes else ""


def _cut(text: str, width: int) -> str:
    """In a column: what is too long for it is whole with -v and in JSON."""
    return text.ljust(width) if len(text) <= width else f"{text[: width - 1]}+"


def line(event: Event, today: datetime) -> Segments:
    """The event in columns."""
    source = "memfail" if event.source == Source.MEMORY_FAILURE else event.source.label
    style = STYLE.get(event.severity, "bold magenta")
    return [
        (f"{_clock(event.time_real_ns, today):12} ", "dim"),
        (f"{event.severity.label:11} ", style),
        (f"{source:8}", ""),
        (f"{_cut(where(event) or '-', 12)} ", "cyan"),
        (f"{_cut(_who(event), 26)} ", "bold"),
        (what(event) + _notes(event), ""),
    ]


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k}={_flat(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list):
        return ",".join(_flat(v) for v in value)
    return printable(str(value).lower() if isinstance(value, bool) else str(value))


def details(event: Event) -> Iterator[Segments]:
    """The lines that -v adds."""
    form = event.to_json()
    rest = {k: v for k, v in form.items() if not isinstance(v, dict | list) and k not in ("message", "text")}
    rest = {k: v for k, v in rest.items() if v is not None and v is not False}
    yield [("    message  ", "dim"), (printable(event.message), "")]
    if whom := hits(event, most=1000):
        yield [("    hits     ", "dim"), (whom.removeprefix("hits "), "")]
    yield [("    record   ", "dim"), (_flat(rest), "")]
    if event.text:
        yield [("    text     ", "dim"), (printable(event.text), "")]
    for name, value in form.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                label = name.removesuffix("s") if isinstance(value, list) else name
                yield [(f"    {label:8} ", "dim"), (_flat(item), "")]


def lost_line(n: int) -> Segments:
    return [(f"-- {n} record{'s' * (n != 1)} lost here: this reader was too slow, or they are too old --",
             "bold magenta")]  # fmt: skip


# -- where it goes -----------------------------------------------------------


def plain_writer(lines: Lines) -> None:
    sys.stdout.write("".join("".join(text for text, _ in segs).rstrip() + "\n" for segs, _ in lines))


def rich_writer(colour: bool) -> Callable[[Lines], None]:
    """Colour, and one line an event however narrow the terminal is."""
    from rich.console import Console
    from rich.text import Text

    class Pipe(Console):
        """rich would end the process by itself."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError(errno.EPIPE, "output was closed by its reader")

    console = Pipe(highlight=False, markup=False, emoji=False)

    def write(lines: Lines) -> None:
        for segs, one_line in lines:
            text = Text.assemble(*(seg if colour else seg[0] for seg in segs))
            text.rstrip()
            if one_line and console.is_terminal:
                console.print(text, no_wrap=True, overflow="ellipsis", crop=True)
            else:
                console.print(text, soft_wrap=True)

    return write


def writer(prog: str) -> Callable[[Lines], None]:
    """The one for this output and environment."""
    colour = not os.environ.get("NO_COLOR")
    if sys.stdout.isatty() or (colour and os.environ.get("FORCE_COLOR")):
        try:
            return rich_writer(colour)
        except ImportError:
            complain(prog, "no colour: the Python package rich is not installed")
    return plain_writer


def text_form(verbose: bool) -> Callable[[Sequence[Event]], None]:
    write = writer(PROG)

    def lines(events: Sequence[Event]) -> Lines:
        today = datetime.now()
        for event in events:
            if event.lost:
                yield lost_line(event.lost), False
            yield line(event, today), not verbose
            if verbose:
                for more in details(event):
                    yield more, False

    def show(events: Sequence[Event]) -> None:
        with output():
            write(lines(events))

    return show


def json_form(events: Sequence[Event]) -> None:
    with output():
        sys.stdout.write("".join(json.dumps(e.to_json()) + "\n" for e in events))


def _probes() -> list[ProbeStatus]:
    """The BPF probes; none where there are none, or one may not see them."""
    from ..probe import status

    return status()


_MODES = {"module": "the module hwerr", "bpf": "BPF on tracepoints, without the module"}


def _mode(device: hwerr.Device) -> str:
    return "module" if type(device) is hwerr.Device else "bpf"


def show_stats(device: hwerr.Device, as_json: bool) -> None:
    info, stats = device.info(), device.stats()
    probes = _probes()
    missing: dict[str, str] = getattr(device, "missing", {})
    if as_json:
        forms = {"mode": _mode(device), "missing": missing, "probes": {p.name: p.to_json() for p in probes}}
        with output():
            print(json.dumps(info.to_json() | stats.to_json() | forms))
        return
    rows: list[tuple[str, str]] = [
        ("mode", _MODES[_mode(device)]),
        ("sources", " ".join(sorted(s.label for s in info.sources)) or "none attached"),
        *((f"  without {name}", reason) for name, reason in missing.items()),
        ("records", f"{stats.records} published, {stats.evicted} evicted, {stats.linked} linked"),
        ("held", f"{info.oldest_seq} to {info.next_seq - 1}" if info.oldest_seq else "none"),
        ("errors", f"{stats.errors}, {stats.coalesced} of them in another record's count"),
        ("  dropped", f"{stats.dropped} for which no record could be made"),
        ("  owners unknown", str(stats.owners_unknown)),
    ]
    rows += [(f"  {s.label}", str(n)) for s, n in stats.by_severity.items()]
    rows += [(f"  from {s.label}", str(n)) for s, n in stats.by_source.items() if n]
    rows += [("readers", f"{stats.readers}, this one included")]
    if probes:
        rows += [("probes", "")]
    for p in probes:
        state = f"{p.emitted} passed on {p.way}, {p.dropped} lost"
        rows += [(f"  {p.name}", state if p.attached else f"missing: {p.reason}; {state}")]
    with output():
        for name, value in rows:
            print(f"{name:20} {value}")


# -- main --------------------------------------------------------------------


def _wanted(vm: str | None) -> Callable[[Event], bool]:
    if vm is None:
        return lambda event: True
    try:
        uuid = UUID(vm)
    except ValueError:
        return lambda event: any(g.name == vm for g in event.guests)
    return lambda event: any(g.uuid == uuid or g.name == vm for g in event.guests)


def follow(device: hwerr.Device, args: argparse.Namespace) -> int:
    """Shows what comes; the exit status."""
    show = json_form if args.json else text_form(args.verbose)
    wanted = _wanted(args.vm)
    deadline = None if args.timeout is None else time.monotonic() + args.timeout
    left_to_show = args.count
    shown = lost = 0
    end: int | None = None
    poll = select.poll()
    poll.register(device.fileno(), select.POLLIN)
    # Nothing is asked for, so what comes is that its reader went away.
    poll.register(sys.stdout.fileno(), 0)
    while True:
        seq, events = 0, []
        over = deadline is not None and time.monotonic() >= deadline
        # Without the module events have numbers only when they are read: all that there is, then.
        last = over and _mode(device) == "bpf"
        for event in device.drain() if last else device.read_nonblocking():
            seq = event.seq
            lost += event.lost
            if wanted(event):
                # What was lost before an event that is not shown is told with the next.
                events.append(event if event.lost == lost else event.with_lost(lost))
                lost = 0
        events = events[:left_to_show]
        if events:
            show(events)
            shown += len(events)
            if left_to_show is not None:
                left_to_show -= len(events)
                if not left_to_show:
                    return EXIT_OK
        left = None if deadline is None else deadline - time.monotonic()
        if over and end is None:
            # What came before the end of the time is shown, and a storm does not prolong it.
            end = device.info().next_seq
        ready = poll.poll(None if left is None else max(0, math.ceil(left * 1000)))
        if any(fd != device.fileno() for fd, _ in ready):
            raise BrokenPipeError(errno.EPIPE, "output was closed by its reader")
        if over and (last or not ready or (end and seq + 1 >= end)):
            if missed := lost + device.stats().reader_pending:
                complain(PROG, f"{missed} more were lost at the end; of which VM, nobody knows")
            return EXIT_OK if shown else EXIT_NOTHING


def run(args: argparse.Namespace) -> int:
    # Totals are wanted whatever the filter, and a filter could be refused.
    selection = {} if args.stats else {"severity": args.severity, "sources": args.source, "pid": args.pid,
                                       "since": args.since}  # fmt: skip
    with hwerr.open(args.device, **selection) as device:
        if device.info().scope == "self":
            complain(PROG, "without CAP_SYS_ADMIN only events that hit this process are seen: run it as root")
        if args.stats:
            show_stats(device, args.json)
            return EXIT_OK
        return follow(device, args)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the arguments, runs, and returns the exit status."""
    p = parser()
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(p)
    args = p.parse_args(argv)
    path = args.device
    try:
        return run(args)
    except BrokenPipeError:
        raise
    except RecordError as error:
        complain(PROG, f"{path} gave a record that this version does not understand: {error}")
        return EXIT_ERROR
    except ValueError as error:
        complain(PROG, f"{error}")
        return EXIT_USAGE
    except OSError as error:
        return _os_error(error, path)


def _os_error(error: OSError, path: str) -> int:
    match error.errno:
        case errno.ENOENT | errno.ENODEV | errno.ENXIO:
            _, without, reason = (error.strerror or "").partition("without the module: ")
            more = f"; without it: {reason}" if without else ""
            complain(PROG, f"{path} is not there: load the module with `modprobe hwerr`{more}")
            return EXIT_NO_DEVICE
        case errno.EACCES:
            complain(PROG, f"{path} may not be read by this user: run as root, or ask for its permissions")
            return EXIT_NO_PERMISSION
        case errno.EPERM:
            complain(PROG, "without CAP_SYS_ADMIN --pid can only name this process: run as root")
            return EXIT_NO_PERMISSION
        case errno.ENOTTY:
            complain(PROG, f"{path} is not a hwerr device")
            return EXIT_ERROR
    complain(PROG, f"{error.filename or path}: {error.strerror or error}")
    return EXIT_ERROR
