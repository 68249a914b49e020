# SPDX-License-Identifier: MIT
"""hwerr-trace: raw tracepoints, next to the records that hwerr made of them."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import select
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from .. import device as hwerr
from ..bccprobe import Missing, NotPermitted, Probe, Wanted, formats, missing
from ..enums import Source
from ..event import Event, RecordError
from ..message import printable
from ..tracepoint import KNOWN, Pairer, RawEvent, bars, hist_key
from . import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_NO_PERMISSION,
    EXIT_NOTHING,
    EXIT_OK,
    EXIT_USAGE,
    complain,
    output,
)
from .parser import Parser
from .watch import Lines, Segments, _count, _pid, _seconds, _severity, line, writer

PROG = "hwerr-trace"
EXIT_MISSING = 6

EPILOG = """\
exit status:
  0    done: --count reached, --timeout over and something had come; --hist: shown, by Ctrl-C too
  1    an error that none of these names; stderr says which
  2    wrong usage
  3    --timeout is over and nothing came
  5    no permission, or the kernel is locked down
  6    bcc, the kernel's headers or its tracepoints are missing; stderr says what to do
  130  interrupted (Ctrl-C)
  141  the reader of the output went away

examples:
  hwerr-trace                              every raw error event, and the record made of it
  hwerr-trace --source mce --bank 4 --stack
  hwerr-trace --hist dimm --timeout 3600   an hour's errors, by DIMM

The probe is compiled for what is asked, which takes some seconds; on an emulated machine, minutes.
"""

SOURCES = {s.label: s for s in Source if any(k.source == s for k in KNOWN.values())}
SOURCES["memfail"] = Source.MEMORY_FAILURE
HISTS = ("bank", "device", "dimm", "vm", "minute")
_SECOND = 1_000_000_000


def _sources(text: str) -> list[Source]:
    found = []
    for name in text.split(","):
        source = SOURCES.get(name.strip().lower().replace("-", "_"))
        if source is None:
            names = ", ".join(n for n in SOURCES if n != "memfail")
            raise argparse.ArgumentTypeError(f"{name!r} is no source with tracepoints: one of {names}")
        found.append(source)
    return found


def _bank(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) < 256:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no bank from 0 to 255")


def _cpu(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) < 1 << 16:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no CPU number")


def _name(text: str) -> str:
    if text:
        return text
    raise argparse.ArgumentTypeError("an empty name is none")


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog=PROG,
        description="Show the kernel's raw error events, each next to the record that hwerr made of it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = p.add_argument
    names = ", ".join(n for n in SOURCES if n != "memfail")
    add("--source", type=_sources, action="extend", default=[], metavar="NAME[,NAME...]",
        help=f"only these sources; repeatable: {names}")  # fmt: skip
    add("--severity", type=_severity, metavar="LEAST", help="only this severity and worse")
    one = p.add_mutually_exclusive_group()
    one.add_argument("--bank", type=_bank, metavar="N", help="only machine checks of this bank")
    one.add_argument("--device", type=_name, metavar="ADDRESS", help="only PCIe errors of it: 0000:01:00.0")
    one.add_argument("--dimm", type=_name, metavar="LABEL", help="only memory controllers' errors of it")
    add("--pid", type=_pid, metavar="PID", help="only what the kernel found while this process ran")
    add("--cpu", type=_cpu, metavar="N", help="only what was reported on this CPU")
    add("--stack", action="store_true", help="with the kernel's stack")
    add("--hist", choices=HISTS, help="count, and show the counts at the end")
    add("--no-records", action="store_true", help="raw events only, without hwerr's records")
    add("--count", type=_count, metavar="N", help="end after N events")
    add("--timeout", type=_seconds, metavar="S", help="end after S seconds, with status 3 if nothing came")
    add("--hold", type=_seconds, default=2.0, metavar="S",
        help="wait at most so long for an event's record (default: %(default)g)")  # fmt: skip
    add("--json", action="store_true", help="one JSON object a line, for programs")
    add("--record-device", metavar="PATH",
        help=f"where the records are; default: {hwerr.DEFAULT_PATH}, or what goes without it")  # fmt: skip
    return p


# -- the forms of an event ---------------------------------------------------


class Clock:
    """CLOCK_MONOTONIC as time of day."""

    def __init__(self) -> None:
        now = time.clock_gettime_ns
        self._offset = now(time.CLOCK_REALTIME) - now(time.CLOCK_MONOTONIC)

    def real_ns(self, mono_ns: int) -> int:
        return mono_ns + self._offset


def fields(raw: RawEvent) -> str:
    """name=value, as in the kernel's order; text that holds blanks is quoted."""
    parts = []
    for name, value in raw.to_json()["fields"].items():
        if isinstance(value, list):
            value = ",".join(map(str, value))
        elif isinstance(value, str) and (not value or " " in value):
            value = f'"{value}"'
        parts.append(f"{name}={printable(str(value))}")
    return " ".join(parts)


def raw_line(raw: RawEvent, real_ns: int) -> Segments:
    """The event in columns."""
    then = datetime.fromtimestamp(real_ns // _SECOND)
    return [
        (f"{then:%H:%M:%S}.{real_ns // 1000 % 1_000_000:06d} ", "dim"),
        (f"{raw.name:25} ", "bold"),
        (f"cpu {raw.cpu:<3} {printable(raw.comm)}({raw.tid}) ", "dim"),
        (fields(raw), ""),
    ]


def lines(raw: RawEvent, event: Event | None, stack: Sequence[str], clock: Clock, paired: bool) -> Lines:
    """The event, its stack, its record."""
    yield raw_line(raw, clock.real_ns(raw.time_ns)), False
    for function in stack:
        yield [("      ", ""), (function, "dim")], False
    if event is not None:
        delta = (event.time_mono_ns - raw.time_ns) / 1e6
        when = f" {delta:+.3f} ms" if event.time_mono_ns else ""
        segs = line(event, datetime.now())
        yield [(f"  = record {event.seq}{when}: ", "dim"), *segs[1:]], False
    elif paired:
        yield [("  = no record of hwerr's", "bold magenta")], False


def to_json(raw: RawEvent, event: Event | None, stack: Sequence[str], clock: Clock) -> dict[str, Any]:
    """For json.dumps(): the event, with `record` as docs/json.md has it, or null."""
    real = clock.real_ns(raw.time_ns)
    then = datetime.fromtimestamp(real // _SECOND, UTC)
    out = {"time": f"{then:%Y-%m-%dT%H:%M:%S}.{real % _SECOND:09d}Z", **raw.to_json()}
    if stack:
        out["stack"] = list(stack)
    out["record"] = event.to_json() if event else None
    return out


def lost_line(n: int) -> Segments:
    return [(f"-- {n} event{'s' * (n != 1)} lost: the probe's buffer was full --", "bold magenta")]


# -- following ---------------------------------------------------------------


class Shown:
    """Where events go: lines, JSON, or counts."""

    def __init__(self, args: argparse.Namespace, probe: Probe, paired: bool) -> None:
        self.args = args
        self.probe = probe
        self.paired = paired
        self.clock = Clock()
        self.total = 0
        self.lost = 0
        self.counts: Counter[str] = Counter()
        self._write: Callable[[Lines], None] | None = None

    def event(self, raw: RawEvent, event: Event | None) -> None:
        self.total += 1
        if self.args.hist:
            for key in hist_key(self.args.hist, raw, event, self.clock.real_ns(raw.time_ns)):
                self.counts[key] += 1
            return
        stack = self.probe.stack(raw.stack) if self.args.stack else []
        if self.args.json:
            self._json(to_json(raw, event, stack, self.clock))
        else:
            self._lines(lines(raw, event, stack, self.clock, self.paired))

    def losses(self) -> None:
        """Tells what the probe lost since the last time."""
        lost = self.probe.lost()
        if lost > self.lost:
            n, self.lost = lost - self.lost, lost
            if self.args.hist:
                return
            if self.args.json:
                self._json({"lost": n})
            else:
                self._lines(iter([(lost_line(n), False)]))

    def end(self) -> None:
        """The counts, if they were wanted."""
        by = self.args.hist
        if not by:
            return
        if self.args.json:
            self._json({"by": by, "counts": self._labelled(), "events": self.total, "lost": self.lost})
            return
        self._lines(self._table())

    def _labelled(self) -> dict[str, int]:
        if self.args.hist != "minute":
            return dict(self.counts)
        return {_minute(key): n for key, n in sorted(self.counts.items())}

    def _table(self) -> Iterator[tuple[Segments, bool]]:
        yield [(f"{self.total} event{'s' * (self.total != 1)} by {self.args.hist}", "bold")], False
        rows = list(bars(self.counts))
        if self.args.hist == "minute":
            rows = [(_minute(name), n, bar) for name, n, bar in sorted(rows)]
        width = max((len(printable(name)) for name, _, _ in rows), default=0)
        for name, n, bar in rows:
            yield [(f"  {printable(name):{width}} ", "cyan"), (f"{n:8} ", "bold"), (bar, "dim")], False
        if self.lost:
            yield lost_line(self.lost), False

    @staticmethod
    def _json(form: dict[str, Any]) -> None:
        with output():
            sys.stdout.write(json.dumps(form) + "\n")

    def _lines(self, what: Lines) -> None:
        if self._write is None:
            self._write = writer(PROG)
        with output():
            self._write(what)


def _minute(key: str) -> str:
    return f"{datetime.fromtimestamp(int(key)):%Y-%m-%d %H:%M}"


def _records(args: argparse.Namespace) -> hwerr.Device | None:
    """The device, or None: then there are raw events only."""
    if args.no_records:
        return None
    path = args.record_device or hwerr.DEFAULT_PATH
    try:
        device = hwerr.open(path)
    except OSError as error:
        if args.record_device or error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            raise
        _, without, reason = (error.strerror or "").partition("without the module: ")
        more = f"; without it: {reason}" if without else ""
        complain(PROG, f"raw events only: {path} is not there (modprobe hwerr){more}")
        return None
    if device.info().scope != "all":
        device.close()
        complain(PROG, "raw events only: without CAP_SYS_ADMIN hwerr does not show its records")
        return None
    return device


def follow(args: argparse.Namespace, probe: Probe, device: hwerr.Device | None) -> int:
    """Shows what comes; the exit status."""
    pairer = Pairer(int(args.hold * _SECOND) if device else 0)
    shown = Shown(args, probe, device is not None)
    deadline = None if args.timeout is None else time.monotonic() + args.timeout
    poll = select.poll()
    poll.register(probe.fileno(), select.POLLIN)
    if device:
        poll.register(device.fileno(), select.POLLIN)
    poll.register(sys.stdout.fileno(), 0)
    mine = {probe.fileno(), *([device.fileno()] if device else [])}
    try:
        while True:
            now = time.monotonic_ns()
            for event in device.drain() if device else []:
                pairer.record(event, now)
            for raw in probe.read():
                pairer.raw(raw, now)
            over = deadline is not None and time.monotonic() >= deadline
            for raw, paired in pairer.flush() if over else pairer.due(now):
                shown.event(raw, paired)
                if shown.total == args.count:
                    break
            shown.losses()
            if over or shown.total == args.count:
                break
            waits = [w / 1e9 for w in [pairer.wait_ns(now)] if w is not None]
            if deadline is not None:
                waits.append(deadline - time.monotonic())
            ready = poll.poll(math.ceil(max(0, min(waits)) * 1000) if waits else None)
            if any(fd not in mine for fd, _ in ready):
                raise BrokenPipeError(errno.EPIPE, "output was closed by its reader")
    except KeyboardInterrupt:
        if not args.hist:
            raise
        for raw, paired in pairer.flush():
            shown.event(raw, paired)
    shown.end()
    return EXIT_OK if shown.total else EXIT_NOTHING


def run(args: argparse.Namespace) -> int:
    wanted = Wanted(
        sources=frozenset(args.source),
        severity=args.severity,
        bank=args.bank,
        device=args.device,
        dimm=args.dimm,
        pid=args.pid,
        cpu=args.cpu,
        stacks=args.stack,
    )
    if not any(wanted.event(name) for name in KNOWN):
        complain(PROG, "nothing can pass: --bank is of mce, --device of aer, --dimm of edac; see --source")
        return EXIT_USAGE
    missing()
    layouts, absent = formats(wanted)
    if absent:
        complain(PROG, f"without {', '.join(absent)}: not in this kernel now (kvm's come with its module)")
    if not layouts:
        raise Missing("this kernel has none of the tracepoints that are wanted now")
    device = _records(args)
    try:
        complain(PROG, f"compiling the probe for {', '.join(f.name for f in layouts.values())} ...")
        start = time.monotonic()
        try:
            probe = Probe(wanted, layouts, lambda s: complain(PROG, f"compiling: {s:.0f} s ..."))
        except KeyboardInterrupt:
            # The compiler goes on in its thread, and must not meet the end of the interpreter.
            complain(PROG, "interrupted")
            os._exit(EXIT_INTERRUPTED)
        with probe:
            complain(PROG, f"attached, after {time.monotonic() - start:.1f} s")
            return follow(args, probe, device)
    finally:
        if device:
            device.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the arguments, runs, and returns the exit status."""
    p = parser()
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(p)
    args = p.parse_args(argv)
    try:
        return run(args)
    except BrokenPipeError:
        raise
    except Missing as error:
        complain(PROG, str(error))
        return EXIT_MISSING
    except NotPermitted as error:
        complain(PROG, str(error))
        return EXIT_NO_PERMISSION
    except RecordError as error:
        complain(PROG, f"a record that this version does not understand: {error}")
        return EXIT_ERROR
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            complain(PROG, f"{error.filename or 'the probe'}: not permitted: run as root")
            return EXIT_NO_PERMISSION
        complain(PROG, f"{error.filename or error}: {error.strerror or error}")
        return EXIT_ERROR
