# SPDX-License-Identifier: MIT
"""Incidents on disk. What `save` returned from is there after a crash or a power cut.

One directory an incident, in it incident.json, replaced as a whole: write, fsync,
rename, fsync of the directory. Other files there (record.json, memory.core) are named
by it only when they are complete.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from .errors import GuardError, NoSuchError

__all__ = ["FINAL", "STEPS", "Incident", "Step", "Store", "create", "no_such", "write_durably"]

FORMAT = 1

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]*")
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")

# In their order. FROZEN is when the first four are done.
STEPS = ("stop", "record", "release", "seal", "tell", "keep")
FREEZING = STEPS[:4]

State = Literal["freezing", "frozen", "failed", "clearing", "gone", "cleared"]
FINAL: frozenset[str] = frozenset({"gone", "cleared"})


def _fields(of: Any) -> dict[str, Any]:
    """As dataclasses.asdict(), without a copy of all that is below."""
    return {name: getattr(of, name) for name in of.__slots__}


@dataclass(frozen=True, slots=True)
class Step:
    """What became of a step. Times in ns since the epoch; `detail` is for people."""

    state: Literal["done", "failed", "weaker"]
    began_ns: int
    ended_ns: int
    detail: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Incident:
    """A VM hit and what was done about it. `start_ticks` and `pid` name the process, in `boot_id`."""

    id: str
    boot_id: str
    vm: str
    uuid: str | None
    pid: int
    start_ticks: int
    monitor: str
    cause: dict[str, Any]
    began_ns: int
    began_mono_ns: int
    state: State = "freezing"
    frozen_ns: int = 0
    frozen_mono_ns: int = 0
    steps: dict[str, Step] = field(default_factory=dict)
    events: tuple[dict[str, Any], ...] = ()
    poison: tuple[tuple[int, int, int], ...] = ()  # (gpa or -1, hva or -1, length)
    machine: dict[str, Any] = field(default_factory=dict)
    dump: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    # The cluster has not taken yet that it failed, or that it is cleared. Of frozen the step `tell` says it.
    untold: bool = False

    def done(self, step: str) -> bool:
        """Whether the step came to its end, if only by weaker means."""
        return step in self.steps and self.steps[step].state != "failed"

    @property
    def open(self) -> bool:
        """Whether there is still something to do, or to keep."""
        return self.state not in FINAL

    def with_step(self, name: str, step: Step) -> Self:
        return replace(self, steps={**self.steps, name: step})

    def to_json(self) -> dict[str, Any]:
        """For json.dumps(), not to be changed; the form of incident.json."""
        steps = {name: _fields(step) for name, step in self.steps.items()}
        return {"format": FORMAT, **_fields(self), "steps": steps}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """ValueError, KeyError, TypeError if it is not what `to_json` gives."""
        if data.get("format") != FORMAT:
            raise ValueError(f"format {data.get('format')!r} is not {FORMAT}")
        values = {k: v for k, v in data.items() if k in cls.__slots__}
        values["steps"] = {k: Step(**v) for k, v in values["steps"].items()}
        values["events"] = tuple(values["events"])
        values["poison"] = tuple((a, b, c) for a, b, c in values["poison"])
        values["notes"] = tuple(values["notes"])
        return cls(**values)


def no_such(incident_id: str) -> NoSuchError:
    """For people."""
    return NoSuchError(f"there is no incident {incident_id}: `hwerr-guard status --all` lists them")


def create(path: Path) -> int:
    """A file that is new and root's, for reading and writing, whatever is of that name. OSError.

    Others may write to the directory: nothing of theirs is followed or filled.
    """
    with suppress(FileNotFoundError):
        path.unlink()
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o600)


def write_durably(path: Path, data: bytes, written: Callable[[], None] = lambda: None) -> None:
    """Replaces the file; what is there after a crash is the old one or the new one. OSError.

    `written` is called when the new one is on disk, and not yet in its place.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        fd = create(part)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        written()
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Makes what was created, renamed or removed in it durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass(slots=True)
class _Turns:
    """Saves of one incident, in their order. `lock` is held while one is made, and guards `written`."""

    given: int = 0
    written: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Store:
    """The state directory. One daemon at a time has it: `lock()`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.incidents = root / "incidents"
        self._lock_fd = -1
        self._turns: dict[str, _Turns] = {}

    def prepare(self) -> None:
        """Makes the directories and takes the lock. GuardError says what to do."""
        import fcntl

        try:
            self.incidents.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock_fd = os.open(self.root / "lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GuardError(f"another hwerr-guard runs on {self.root}") from None
        except OSError as error:
            raise GuardError(
                f"{error.filename or self.root}: {error.strerror}: name a writable state_dir"
            ) from None

    def close(self) -> None:
        """Gives the lock back."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def path(self, incident_id: str) -> Path:
        """Directory of an incident. GuardError for what cannot be an id."""
        if not _ID.fullmatch(incident_id):
            raise NoSuchError(f"{incident_id!r} is no incident: `hwerr-guard status --all` lists them")
        return self.incidents / incident_id

    def new_id(self, vm: str, pid: int) -> str:
        """Sorts by time, holds the VM's name as far as a file name can, and its process."""
        now = time.time_ns()
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now // 1_000_000_000))
        safe = _UNSAFE.sub("_", vm)[:64]
        return f"{stamp}.{now // 1_000_000 % 1000:03d}-{safe}-{pid}"

    def turn(self, incident_id: str) -> int:
        """The next in the order of its saves. From the event loop's thread."""
        turns = self._turns.setdefault(incident_id, _Turns())
        turns.given += 1
        return turns.given

    def save(
        self, incident: Incident, turn: int | None = None, first: Callable[[], None] | None = None
    ) -> None:
        """Durable when it returns, or a newer one is. OSError.

        `first` writes what the incident names, when it has its directory. OSError as from this.

        A disk may hold up a save for longer than it was waited for: its thread comes back some time, when
        newer ones were made. So each takes a turn before its thread begins; without, this is the newest.
        """
        turn = turn or self.turn(incident.id)
        turns = self._turns[incident.id]
        home = self.path(incident.id)
        with turns.lock:
            late = turn < turns.written
            if late and first is None:
                return
            if not home.is_dir():
                home.mkdir(mode=0o700)
                fsync_directory(self.incidents)
            if first is not None:
                first()
            if late:
                return
            # On one line: json indents in Python, and the guest waits.
            write_durably(home / "incident.json", json.dumps(incident.to_json()).encode() + b"\n")
            turns.written = turn

    def load(self, incident_id: str) -> Incident:
        """GuardError if there is none, or it cannot be read."""
        path = self.path(incident_id) / "incident.json"
        try:
            return Incident.from_json(json.loads(path.read_bytes()))
        except FileNotFoundError:
            raise no_such(incident_id) from None
        except OSError as error:
            raise GuardError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise GuardError(f"{path} is damaged ({error}): move its directory away") from None

    def remove(self, incident: Incident) -> None:
        """The incident with all that is kept of it. Blocks. What cannot be removed stays."""
        if incident.dump is not None:
            with suppress(OSError):
                os.unlink(incident.dump["path"])
        # The record last: what has none is no incident.
        home = self.path(incident.id)
        for path in sorted(home.glob("*"), key=lambda p: p.name == "incident.json"):
            with suppress(OSError):
                path.unlink()
        with suppress(OSError):
            home.rmdir()

    def all(self) -> Iterator[Incident | GuardError]:
        """Oldest first; of one that cannot be read, why."""
        try:
            names = sorted(p.name for p in self.incidents.iterdir() if p.is_dir())
        except OSError:
            return
        for name in names:
            try:
                yield self.load(name)
            except GuardError as error:
                # A directory without the file: a crash before the first save. Nothing was done yet.
                if (self.incidents / name / "incident.json").exists():
                    yield error
