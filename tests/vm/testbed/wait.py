# SPDX-License-Identifier: MIT
"""Waiting, but never for ever: for an event, and for what no event tells."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hwerr_notify import Device, Event

# Long for what comes at all, also on a kernel that checks itself.
_SECONDS = 120.0
_LOOK_AGAIN = 0.05


def wait_event(
    device: Device,
    wanted: Callable[[Event], bool],
    seconds: float = _SECONDS,
    unread: deque[Event] | None = None,
) -> Event:
    """The first event like this. AssertionError if none comes in time.

    What one read gave beyond it is put into `unread`, which is looked at before the device, or is lost.
    """
    unread = deque() if unread is None else unread
    deadline = time.monotonic() + seconds
    seen: list[Event] = []
    while (left := deadline - time.monotonic()) > 0:
        if not unread:
            unread.extend(device.read(left))
        while unread:
            event = unread.popleft()
            if wanted(event):
                return event
            seen.append(event)
    raise AssertionError(f"not within {seconds:g} s among {[e.message for e in seen]}")


def wait_events(
    device: Device, *wanted: Callable[[Event], bool], seconds: float = _SECONDS
) -> tuple[Event, ...]:
    """The first event like each, in whatever order they come. AssertionError if one does not in time."""
    found: dict[int, Event] = {}

    def completes(event: Event) -> bool:
        found.update({i: event for i, like in enumerate(wanted) if i not in found and like(event)})
        return len(found) == len(wanted)

    wait_event(device, completes, seconds)
    return tuple(found[i] for i in range(len(wanted)))


def until(holds: Callable[[], object], seconds: float, said: Callable[[], object] | None = None) -> None:
    """Looks until it holds. AssertionError if it does not in time, with what `said` gives by then."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s{f': {said()}' if said else ''}")
        time.sleep(_LOOK_AGAIN)
