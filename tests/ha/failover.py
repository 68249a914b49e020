# SPDX-License-Identifier: MIT
"""One failover: an error under the guest, and all that follows, on one clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bed import Bed, Remote, Write
from timeline import Moment, Timeline

LIMIT = 300.0

# The page that the guest writes its sectors from: it is read all the time.
USED_GPA = 0x1000


@dataclass(frozen=True)
class Failover:
    """What happened. Writes are those the disk's server was asked for, after the error too."""

    source: str
    target: str
    incident: dict[str, Any]
    pid: int
    first_write: Write
    timeline: Timeline


class Clock:
    """Turns times of the nodes into the host's."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.before: dict[str, tuple[int, int]] = dict(
            zip(bed.nodes, bed.each(lambda n: n.offset()), strict=True)
        )
        self.after: dict[str, tuple[int, int]] = {}

    def stop(self) -> None:
        """The comparison after what was timed."""
        self.after = dict(zip(self.bed.nodes, self.bed.each(lambda n: n.offset()), strict=True))

    def host(self, node: str, ns: int) -> int:
        """In ns since the epoch."""
        return ns - (self.before[node][0] + self.after[node][0]) // 2

    @property
    def error(self) -> float:
        """How wrong a time may be, seconds: a round trip, and what the clock went off meanwhile."""
        return max(
            max(self.before[n][1], self.after[n][1]) + abs(self.before[n][0] - self.after[n][0]) / 2
            for n in self.before
        ) / 1e9  # fmt: skip


def alert_ns(line: str) -> int:
    """Of a line of the alert agent: "SECONDS.MICROSECONDS ..."."""
    whole, _, micro = line.split()[0].partition(".")
    return int(whole) * 1_000_000_000 + int(micro) * 1000


class Alerts:
    """What Pacemaker's alert agents write from now on."""

    def __init__(self, bed: Bed) -> None:
        self.nodes = dict(bed.nodes)
        self.before = {name: len(node.alerts()) for name, node in self.nodes.items()}

    def of(self, name: str, task: str, status: int = 0) -> tuple[int, int] | None:
        """When the node began and ended the first action of that name with that status, by its own clock."""
        for line in self.nodes[name].alerts()[self.before[name] :]:
            _, kind, where, what, did, rc, took = line.split()[:7]
            if (kind, where, what, did, rc) == ("resource", name, "counter", task, str(status)):
                ended = alert_ns(line)
                return ended - int(took) * 1_000_000, ended
        return None


class Builder:
    """Puts a timeline together. The error is on `source` at `began`, by its own clock."""

    def __init__(self, clock: Clock, source: str, began: int) -> None:
        self.clock = clock
        self.zero = clock.host(source, began)
        self.moments = [Moment(0.0, "error", source, "uncorrected, in the guest's memory")]

    def add(self, node: str, ns: int, what: str, detail: str = "") -> None:
        self.moments.append(Moment((self.clock.host(node, ns) - self.zero) / 1e9, what, node, detail))

    def moved(self, source: Remote, target: Remote, alerts: Alerts, first: Write) -> None:
        """The guest's going away from one node, and coming up on the other."""
        if act := alerts.of(source.name, "stop"):
            self.add(source.name, act[0], "Pacemaker acts", f"its stop took {(act[1] - act[0]) / 1e6:.0f} ms")
        if act := alerts.of(target.name, "start"):
            self.add(target.name, act[0], "start begins")
            self.add(target.name, act[1], "start done")
        self.add(target.name, target.began(pid=target.pid()), "QEMU started")
        wrote = (first.done_ns - self.zero) / 1e9
        self.moments.append(Moment(wrote, "first write", target.name, f"number {first.number}"))

    def timeline(self, title: str, *notes: str) -> Timeline:
        ordered = tuple(sorted(self.moments, key=lambda m: m.seconds))
        return Timeline(title, ordered, self.clock.error, notes)


def stock_fail_over(
    bed: Bed, source: Remote, title: str = "ocf:heartbeat:anything, monitor every 10 s"
) -> Timeline:
    """The same error under a guest that nothing guards; until it writes on the other node."""
    target = bed.other(source)
    clock, alerts = Clock(bed), Alerts(bed)
    writes = len(bed.disk)
    hit = source.inject(gpa=USED_GPA, poison=True)
    first = bed.await_write(target.name, writes, LIMIT)
    source.settle()
    clock.stop()
    line = Builder(clock, source.name, hit["time"])
    if ended := source.when_ended(pid=hit["pid"]):
        line.add(source.name, ended, "QEMU ended", "killed or reset by the error")
    # What `anything` says of a process that is gone and left its PID file.
    if seen := alerts.of(source.name, "monitor", 1):
        line.add(source.name, seen[0], "monitor misses it")
    line.moved(source, target, alerts, first)
    kept = "QEMU kept" if source.alive(pid=hit["pid"]) else "QEMU ended: nothing is left to look at"
    return line.timeline(title, kept)


def fail_over(
    bed: Bed, source: Remote, incidents: int, title: str = "hwerr-guard, ocf:hwerr:guest"
) -> Failover:
    """Hits the guest on `source`, where it is incident number `incidents`; until it writes on the other."""
    target = bed.other(source)
    clock, alerts = Clock(bed), Alerts(bed)
    writes = len(bed.disk)
    hit = source.inject(gpa=USED_GPA, poison=True)
    first = bed.await_write(target.name, writes, LIMIT)
    incident = source.await_told(count=incidents)
    source.settle()
    to_real = source.mono_to_real()
    clock.stop()
    line = Builder(clock, source.name, hit["time"])
    steps = incident["steps"]
    if "mono_ns" in steps["stop"]["facts"]:
        line.add(source.name, steps["stop"]["facts"]["mono_ns"] + to_real, "stopped", steps["stop"]["detail"])
    for name, what in (("release", "released"), ("seal", "sealed")):
        line.add(source.name, steps[name]["ended_ns"], what, steps[name]["detail"])
    line.add(source.name, incident["frozen_ns"], "FROZEN")
    if "tell" in steps:
        line.add(source.name, steps["tell"]["ended_ns"], "told", steps["tell"]["detail"])
    line.moved(source, target, alerts, first)
    alive = "QEMU kept" if source.alive(pid=hit["pid"]) else "QEMU ended"
    kept = f"{alive}; core of {incident['dump']['stored'] >> 10} KiB" if incident["dump"] else alive
    return Failover(source.name, target.name, incident, hit["pid"], first, line.timeline(title, kept))
