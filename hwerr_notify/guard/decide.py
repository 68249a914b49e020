# SPDX-License-Identifier: MIT
"""What an error means for a VM under its policy. Pure, but for the memory of corrected errors."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any, Literal

from ..enums import Flags, Severity, Source
from ..event import Event, Guest
from .policy import Layer, Threshold, VmPolicy
from .process import Process

__all__ = ["Corrected", "decide", "layer_of", "of_qmp", "poisoned"]

_LAYER: dict[Source, Layer] = {Source.KVM: "kvm", Source.BLOCK: "block", Source.PANIC: "panic"}

# Different pages, DIMMs and VMs remembered; the least recently hit is forgotten.
_REMEMBERED = 4096


def layer_of(event: Event) -> Layer:
    """The layer whose error it is."""
    return _LAYER.get(event.source, "hardware")


def decide(event: Event, guest: Guest, policy: VmPolicy) -> Literal["freeze", "tell"] | None:
    """What to do with a VM that an event hits. A guest that the kernel has stopped is always frozen."""
    if guest.stopped:
        return "freeze"
    layer = layer_of(event)
    if layer == "hardware":
        # What a program wrote is told, never acted upon: freezing is for what hardware said.
        freeze = (
            layer in policy.freeze_on
            and policy.freeze_severity is not None
            and event.severity >= policy.freeze_severity
            and (not policy.freeze_kinds or event.kind in policy.freeze_kinds)
            and (not event.software or event.source == Source.SIGBUS)
        )
    else:
        # A request that failed on the host may be tried again, or reported to a guest that can live with it.
        # QEMU knows: where it does not go on (werror=stop, rerror=stop) it says so, and of_qmp() hears it.
        freeze = layer in policy.freeze_on and layer != "block" and event.severity >= Severity.RECOVERABLE
    if freeze:
        return "freeze"
    return "tell" if event.severity >= policy.tell_severity else None


def of_qmp(event: dict[str, Any], policy: VmPolicy) -> tuple[Layer, str] | None:
    """The layer and a sentence, if an event of QEMU's own monitor means that the guest cannot go on."""
    data = event.get("data")
    data = data if isinstance(data, dict) else {}
    match event.get("event"):
        case "GUEST_PANICKED":
            found: tuple[Layer, str] = "panic", "the guest's kernel panicked"
        case "BLOCK_IO_ERROR" if data.get("action") == "stop" and not data.get("nospace"):
            where = data.get("node-name") or data.get("device") or "?"
            found = "block", f"I/O error on {where}: {data.get('operation')}: {data.get('reason')}"
        case _:
            return None
    return found if found[0] in policy.freeze_on else None


def poisoned(event: Event, guest: Guest) -> tuple[int, int, int] | None:
    """(gpa or -1, hva or -1, length) of memory that must not be read, None if there is none."""
    if event.memory is None or event.severity < Severity.DEFERRED or guest.by_device or not guest.len:
        return None
    return (-1 if guest.gpa is None else guest.gpa), (guest.hva or -1), guest.len


@dataclass(frozen=True, slots=True)
class Exceeded:
    """A threshold that was reached, and at what."""

    threshold: Threshold
    unit: str
    errors: int


class Corrected:
    """Counts corrected errors per page, DIMM and VM, in sliding windows."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[Any, ...], deque[tuple[int, int]]] = OrderedDict()

    def add(self, event: Event, guest: Guest, policy: VmPolicy) -> Exceeded | None:
        """Takes an event into account; the first threshold that it makes full. Uses the event's own clock."""
        if event.severity != Severity.CORRECTED:
            return None
        found: Exceeded | None = None
        for n, threshold in enumerate(policy.degraded):
            unit = self._unit(event, guest, threshold)
            # One that another record told before is the same error, once more. Which DIMM it is, though, only
            # EDAC knows, whose record comes after that of the machine check and is linked to it.
            if unit is None or (event.flags & Flags.LINKED and threshold.per != "dimm"):
                continue
            key = guest.pid, guest.start_ns, n, unit
            window = self._seen.setdefault(key, deque())
            self._seen.move_to_end(key)
            window.append((event.time_mono_ns, max(1, event.count)))
            since = event.time_mono_ns - int(threshold.within * 1e9)
            while window and window[0][0] < since:
                window.popleft()
            # A record stands for many errors, so what a window holds is bounded by the threshold.
            while len(window) > threshold.errors:
                window.popleft()
            # The others count it, too: what they find full is told with the next one.
            errors = sum(count for _, count in window)
            if found is None and errors >= threshold.errors:
                window.clear()
                found = Exceeded(threshold, unit, errors)
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return found

    def forget(self, process: Process) -> None:
        """Begins anew for that VM."""
        for key in [k for k in self._seen if process.is_of(k[0], k[1])]:
            del self._seen[key]

    @staticmethod
    def _unit(event: Event, guest: Guest, threshold: Threshold) -> str | None:
        match threshold.per:
            case "vm":
                return f"VM {guest.pid}"
            case "page":
                return None if event.memory is None else f"page {event.memory.phys_addr & -4096:#x}"
        if event.edac is not None:
            return f"DIMM {event.edac.label or event.edac.layers}"
        return None
