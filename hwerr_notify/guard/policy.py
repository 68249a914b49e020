# SPDX-License-Identifier: MIT
"""What the operator wants, from a TOML file; packaging/guard.toml describes it.

Every complaint names file, line and key. Nothing is guessed: an unknown key is an
error, because a misspelt one would leave a VM unguarded.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any, Literal, TypeVar

from ..enums import Kind, Severity
from .errors import GuardError
from .store import STEPS

__all__ = ["DEFAULT_PATH", "Hook", "Layer", "Policy", "PolicyError", "Threshold", "VmPolicy", "load", "parse"]

DEFAULT_PATH = Path("/etc/hwerr/guard.toml")

T = TypeVar("T")
Layer = Literal["hardware", "kvm", "block", "panic"]
LAYERS: tuple[Layer, ...] = ("hardware", "kvm", "block", "panic")
OCCASIONS = ("release", "frozen", "failed", "gone", "error", "degraded", "dumped", "cleared")
PER = ("page", "dimm", "vm")


class PolicyError(GuardError):
    """The policy cannot be used; the message names file, line and key."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """A VM is degraded when `errors` corrected ones come within `within` seconds, of one `per`."""

    errors: int
    within: float
    per: Literal["page", "dimm", "vm"]


@dataclass(frozen=True, slots=True)
class Hook:
    """A program to run on some occasions, JSON on its stdin. One of `release` that fails fails the step."""

    run: tuple[str, ...]
    on: frozenset[str]
    limit: float


@dataclass(frozen=True, slots=True)
class VmPolicy:
    """For VMs whose name matches. `freeze_severity` None: hardware errors never freeze it."""

    name: str = "*"
    qmp: str | None = None
    libvirt: str | None = None
    freeze_severity: Severity | None = Severity.RECOVERABLE
    freeze_kinds: frozenset[Kind] = frozenset()
    # Not "panic" and "block": what is to blame for these may be wherever the guest goes, its own kernel or
    # shared storage, and then it would be frozen on each node in turn.
    freeze_on: frozenset[str] = frozenset({"hardware", "kvm"})
    tell_severity: Severity = Severity.DEFERRED
    degraded: tuple[Threshold, ...] = ()
    freeze_process: bool = False
    front: bool = False

    def matches(self, name: str) -> bool:
        return fnmatchcase(name, self.name)

    def reaches(self, where: str) -> bool:
        """Whether its monitors are there: that socket, or that libvirt."""
        return where == self.libvirt if self.qmp is None else PurePath(where).match(self.qmp)


@dataclass(frozen=True, slots=True)
class Policy:
    """The whole file. Times in seconds."""

    path: Path
    vms: tuple[VmPolicy, ...] = ()
    state_dir: Path = Path("/var/lib/hwerr/guard")
    run_dir: Path = Path("/run/hwerr/guard")
    limits: dict[str, float] = field(
        default_factory=lambda: {
            "stop": 2.0, "record": 5.0, "release": 10.0, "seal": 2.0, "tell": 10.0, "keep": 3600.0
        }
    )  # fmt: skip
    dump: bool = True
    dump_dir: Path | None = None
    dump_retain: int = 5
    dump_reserve: int = 256 << 20  # bytes
    incidents_retain: int = 100
    hooks: tuple[Hook, ...] = ()
    pacemaker_resource: str | None = None
    metrics_file: Path | None = None
    metrics_socket: Path | None = None

    def vm(self, name: str, where: str | None = None) -> VmPolicy | None:
        """The first that matches, by the name and by where its monitor is, if that is known."""
        return next((v for v in self.vms if v.matches(name) and (where is None or v.reaches(where))), None)


# -- where in the file ---------------------------------------------------------


def _line(text: str, where: tuple[str | int, ...]) -> int:
    """Line of the key or table at `where`; of what holds it if it is written inside something."""
    best, best_length = 1, 0
    table: tuple[str | int, ...] = ()
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        at: tuple[str | int, ...]
        if match := re.match(r"\s*\[\[\s*([^]]+?)\s*\]\]", line):
            name = match[1]
            # What is below it begins anew.
            counts = {k: n for k, n in counts.items() if not k.startswith(f"{name}.")}
            counts[name] = counts.get(name, -1) + 1
            at = table = _numbered(name, counts)
        elif match := re.match(r"\s*\[\s*([^]]+?)\s*\]", line):
            at = table = _numbered(match[1], counts)
        elif match := re.match(r"\s*([A-Za-z0-9_.\"'-]+)\s*=", line):
            at = (*table, *(part.strip("\"'") for part in match[1].split(".")))
        else:
            continue
        if len(at) > best_length and where[: len(at)] == at:
            best, best_length = number, len(at)
    return best


def _numbered(name: str, counts: dict[str, int]) -> tuple[str | int, ...]:
    """The dotted name of a table, with the numbers of the arrays that it is in."""
    found: list[str | int] = []
    parts = name.split(".")
    for n, part in enumerate(parts, 1):
        found.append(part)
        if (number := counts.get(".".join(parts[:n]))) is not None:
            found.append(number)
    return tuple(found)


def _name(where: tuple[str | int, ...]) -> str:
    out = ""
    for part in where:
        out += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if out else part
    return out


# -- checking ------------------------------------------------------------------


class _Table:
    """A table whose keys are taken one by one; `end()` complains of what is left."""

    def __init__(
        self, path: Path, text: str, data: dict[str, Any], where: tuple[str | int, ...] = ()
    ) -> None:
        self.path = path
        self.text = text
        self.data = dict(data)
        self.where = where
        self.known: list[str] = []

    def wrong(self, key: str | None, what: str) -> PolicyError:
        where = self.where if key is None else (*self.where, key)
        place = f"{self.path}:{_line(self.text, where)}"
        return PolicyError(f"{place}: {_name(where)}: {what}" if where else f"{place}: {what}")

    def take(self, key: str, default: T, convert: Callable[[Any], T]) -> T:
        """The value, checked and converted; ValueError of `convert` becomes a complaint."""
        self.known.append(key)
        if key not in self.data:
            return default
        try:
            return convert(self.data.pop(key))
        except ValueError as error:
            raise self.wrong(key, str(error)) from None

    def table(self, key: str) -> _Table:
        self.known.append(key)
        value = self.data.pop(key, {})
        if not isinstance(value, dict):
            raise self.wrong(key, f"write it as a table, [{key}]")
        return _Table(self.path, self.text, value, (*self.where, key))

    def tables(self, key: str) -> list[_Table]:
        self.known.append(key)
        value = self.data.pop(key, [])
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            raise self.wrong(key, f"write it as tables, [[{key}]]")
        return [_Table(self.path, self.text, v, (*self.where, key, n)) for n, v in enumerate(value)]

    def end(self) -> None:
        for key in self.data:
            raise self.wrong(key, f"there is no such key here; there are {', '.join(sorted(self.known))}")


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a text, in quotes")
    return value


def _path(value: Any) -> Path:
    path = Path(_text(value))
    if not path.is_absolute():
        raise ValueError(f"{value!r} must be an absolute path")
    return path


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError("must be a whole number from 1")
    return value


_SIZES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def _size(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = re.fullmatch(r"(\d{1,9})\s*([KMGT]iB)", value if isinstance(value, str) else "")
    if not match:
        raise ValueError('must be a size: a number of bytes, or "512MiB", "2GiB"')
    return int(match[1]) * _SIZES[match[2]]


_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def _seconds(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    else:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|min|h|d)", value if isinstance(value, str) else "")
        if not match:
            raise ValueError('must be a time: a number of seconds, or "500ms", "10s", "5min", "24h", "7d"')
        seconds = float(match[1]) * _UNITS[match[2]]
    if not 0 < seconds <= 366 * 86400:
        raise ValueError("must be a time above 0 and below a year")
    return seconds


def _one_of(value: Any, names: dict[str, T], what: str) -> T:
    if not isinstance(value, str) or value.lower() not in names:
        raise ValueError(f"{value!r} is no {what}: one of {', '.join(names)}")
    return names[value.lower()]


def _set_of(names: dict[str, T], what: str) -> Callable[[Any], frozenset[T]]:
    def convert(value: Any) -> frozenset[T]:
        if not isinstance(value, list):
            raise ValueError(f"must be a list of {what}s: {', '.join(names)}")
        return frozenset(_one_of(v, names, what) for v in value)

    return convert


_SEVERITIES: dict[str, Severity] = {s.label: s for s in Severity}
_KINDS: dict[str, Kind] = {k.label: k for k in Kind}
_LAYERS: dict[str, str] = {name: name for name in LAYERS}
_OCCASIONS: dict[str, str] = {name: name for name in OCCASIONS}
_PER: dict[str, Literal["page", "dimm", "vm"]] = {"page": "page", "dimm": "dimm", "vm": "vm"}


def _severity(value: Any) -> Severity:
    return _one_of(value, _SEVERITIES, "severity")


def _severity_or_never(value: Any) -> Severity | None:
    if value == "never":
        return None
    found = _severity(value)
    if found < Severity.DEFERRED:
        raise ValueError(
            f'{value!r} errors do no harm and never freeze: "deferred" or worse, or "never"; '
            "for many of them there is [[vm.degraded]]"
        )
    return found


def _argv(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
        raise ValueError("must be a list: the program's absolute path, then its arguments")
    _path(value[0])
    return tuple(value)


def _threshold(table: _Table) -> Threshold:
    found = Threshold(
        errors=table.take("errors", 0, _number),
        within=table.take("within", 86400.0, _seconds),
        per=table.take("per", "vm", lambda v: _one_of(v, _PER, "unit")),
    )
    table.end()
    if not found.errors:
        raise table.wrong(None, "say how many: errors = N")
    return found


def _vm(table: _Table) -> VmPolicy:
    default = VmPolicy()
    found = VmPolicy(
        name=table.take("name", default.name, _text),
        qmp=table.take("qmp", None, lambda v: str(_path(v))),
        libvirt=table.take("libvirt", None, _text),
        freeze_severity=table.take("freeze_severity", default.freeze_severity, _severity_or_never),
        freeze_kinds=table.take("freeze_kinds", default.freeze_kinds, _set_of(_KINDS, "kind")),
        freeze_on=table.take("freeze_on", default.freeze_on, _set_of(_LAYERS, "layer")),
        tell_severity=table.take("tell_severity", default.tell_severity, _severity),
        degraded=tuple(map(_threshold, table.tables("degraded"))),
        freeze_process=table.take("freeze_process", default.freeze_process, _flag),
        front=table.take("front", default.front, _flag),
    )
    table.end()
    if (found.qmp is None) == (found.libvirt is None):
        raise table.wrong(
            None, "say how to reach its monitor: qmp = SOCKET (may hold *), or libvirt = URI; not both"
        )
    if found.front and found.libvirt:
        raise table.wrong("front", "the monitor of a libvirt guest stays libvirt's")
    return found


def _hook(table: _Table, limits: dict[str, float]) -> Hook:
    """`limits` of the steps: what runs in one and is cut off with it would not be known to have hung."""
    on: frozenset[str] = table.take("on", frozenset(), _set_of(_OCCASIONS, "occasion"))
    steps = {"release": "release", "frozen": "tell"}
    within = {step: limits[step] for occasion, step in steps.items() if occasion in on}

    def limit(value: Any) -> float:
        seconds = _seconds(value)
        for step, most in within.items():
            if seconds >= most:
                raise ValueError(f"must be less than limits.{step}, {most:g} s, within which it runs")
        return seconds

    found = Hook(
        run=table.take("run", (), _argv),
        on=on,
        limit=table.take("limit", min([5.0, *(most / 2 for most in within.values())]), limit),
    )
    table.end()
    if not found.run or not found.on:
        raise table.wrong(None, f"say what and when: run = [PROGRAM, ...], on = [{', '.join(OCCASIONS)}]")
    return found


def parse(text: str, path: Path) -> Policy:
    """A checked policy. PolicyError names file, line and key."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        match = re.search(r"\(at line (\d+), column \d+\)", str(error))
        place = f"{path}:{match[1]}" if match else f"{path}:{len(text.splitlines())}"
        raise PolicyError(f"{place}: {re.sub(r' *[(]at .*[)]', '', str(error))}") from None
    default = Policy(path)
    top = _Table(path, text, data)
    limits, dump, pacemaker, metrics = (top.table(n) for n in ("limits", "dump", "pacemaker", "metrics"))
    incidents = top.table("incidents")
    steps = {step: limits.take(step, default.limits[step], _seconds) for step in STEPS}
    policy = Policy(
        path=path,
        state_dir=top.take("state_dir", default.state_dir, _path),
        run_dir=top.take("run_dir", default.run_dir, _path),
        vms=tuple(map(_vm, top.tables("vm"))),
        limits=steps,
        dump=dump.take("auto", default.dump, _flag),
        dump_dir=dump.take("dir", None, _path),
        dump_retain=dump.take("retain", default.dump_retain, _number),
        dump_reserve=dump.take("reserve", default.dump_reserve, _size),
        incidents_retain=incidents.take("retain", default.incidents_retain, _number),
        hooks=tuple(_hook(table, steps) for table in top.tables("hook")),
        pacemaker_resource=pacemaker.take("resource", None, _text),
        metrics_file=metrics.take("file", None, _path),
        metrics_socket=metrics.take("socket", None, _path),
    )
    for table in (limits, dump, incidents, pacemaker, metrics, top):
        table.end()
    if not policy.vms:
        raise top.wrong(None, "it guards nothing: write [[vm]] with qmp = SOCKET or libvirt = URI")
    return policy


def load(path: Path) -> Policy:
    """Reads and checks the file. PolicyError."""
    try:
        return parse(path.read_text("utf-8"), path)
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path}: it is no UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise PolicyError(f"{path}: {error.strerror}: write a policy, or name one with --policy") from None
