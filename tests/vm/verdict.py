# SPDX-License-Identifier: MIT
"""Who was named for an error, judged by what was logged of the processes (test_races.py)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from hwerr_notify import Source

KINDS = ("anon", "thp", "shared", "private", "huge", "ksm", "ksm")
MIB = 1 << 20
# Of the first MiB of a PC, so much is the beginning of its memory; the rest is ROM or a copy of it.
LOW = 0xA0000


@dataclass(frozen=True)
class Claim:
    """struct claim of churn.c; and a guest's memory, or all of the process that runs it."""

    pid: int
    family: int
    va: int
    len: int
    may_begin: int
    must_begin: int
    must_end: int
    may_end: int
    keeper: int = 0
    merges: bool = False
    """KSM may merge its pages with those of any other that merges."""
    ram: bool = False
    """It is a guest's memory, from guest-physical 0 on."""

    def may(self, start: int, end: int) -> bool:
        """Whether it can have been so at some time between the two."""
        return bool(self.may_begin) and self.may_begin <= end and (not self.may_end or self.may_end >= start)

    def must(self, start: int, end: int) -> bool:
        """Whether it was so all the time between the two."""
        return (
            bool(self.must_begin) and self.must_begin < start and (not self.must_end or self.must_end > end)
        )

    def covers(self, va: int) -> bool:
        return self.va <= va < self.va + self.len

    def kin(self, other: Claim) -> bool:
        """Whether the two may share pages."""
        return self.family == other.family or (self.merges and other.merges)

    def gpa(self, va: int) -> int | None:
        """Of an address in a guest's memory; None where that is not all there is to say."""
        at = va - self.va
        return at if self.ram and self.covers(va) and (at < LOW or at >= MIB) else None


@dataclass(frozen=True)
class Name:
    """One that was named: a process, an address in it and the frame that was there afterwards."""

    pid: int
    va: int
    pfn: int | None
    guest: bool = False
    gpa: int | None = None


@dataclass(frozen=True)
class Hit:
    """One error and what came of it; times are CLOCK_MONOTONIC, ns. `target` is the key of a claim."""

    start: int
    end: int
    target: int
    va: int
    pfn: int
    pfn_after: int | None
    source: Source
    named: tuple[Name, ...]
    unsure: bool


@dataclass
class Verdict:
    wrong: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    held: int = 0
    held_unsure: int = 0
    names: int = 0
    guests: int = 0
    """Pages of a guest that it held all the time, and was named for."""
    placed: int = 0
    """Guest-physical addresses that were compared."""


def judge(hits: list[Hit], claims: Mapping[int, Claim]) -> Verdict:
    """What was said of each error, against the log.

    wrong: named, and cannot have had the page, or not at that guest-physical address.
    silent: had it all the time and is not named, nor is it said that somebody is missing.
    unproven: no relative of the target had that address, and it has another frame by now. The frame may
    have gone to a stranger between the look at it and the error, and on from him: rarely.
    """
    of = defaultdict(list)
    for claim in claims.values():
        of[claim.pid].append(claim)
    verdict = Verdict()
    for hit in hits:
        target = claims[hit.target]
        # It had this very frame all the time, so the frame was nobody else's but its kin's.
        held = target.must(hit.start, hit.end) and hit.pfn_after == hit.pfn
        text = f"{hit} target {target}"
        for name in hit.named:
            verdict.names += 1
            covering = [c for c in of.get(name.pid, ()) if c.covers(name.va) and c.may(hit.start, hit.end)]
            kin = [c for c in covering if c.kin(target)]
            if held and not kin:
                verdict.wrong.append(f"{name}: {text}: its claims: {of.get(name.pid)}")
            elif name.pfn != hit.pfn and not kin:
                verdict.unproven.append(
                    f"{name} for frame {hit.pfn} of {target}: its claims: {of.get(name.pid)}"
                )
            places = {c.gpa(name.va) for c in covering} - {None}
            if name.gpa is not None and places:
                verdict.placed += 1
                if name.gpa not in places:
                    verdict.wrong.append(f"{name}, which is {places}: {text}")
        if not held:
            continue
        verdict.held += 1
        verdict.held_unsure += hit.unsure
        own = [n for n in hit.named if (n.pid, n.va) == (target.pid, hit.va)]
        if target.ram:
            own = [n for n in own if n.guest and n.gpa is not None]
            verdict.guests += bool(own)
        if not own and not hit.unsure:
            verdict.silent.append(text)
    return verdict
