# SPDX-License-Identifier: MIT
"""What can go wrong, in words for an operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = [
    "CannotBeginError",
    "Fault",
    "GuardError",
    "MonitorError",
    "NoSuchError",
    "NobodyListensError",
    "Refused",
    "each",
    "raise_all",
]


class GuardError(Exception):
    """One line that says what is wrong and, where it can, what to do."""


class CannotBeginError(GuardError):
    """The daemon cannot begin here, now."""


class NoSuchError(GuardError):
    """There is no VM, or no incident, of that name."""


class MonitorError(GuardError):
    """QEMU's monitor is gone, does not answer in time, or answers nonsense."""


class NobodyListensError(MonitorError):
    """The monitor's socket is there, and no process behind it."""


class Refused(MonitorError):
    """QEMU understood the command and refused it. `kind` is QMP's error class."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Fault(GuardError):
    """A step did not reach its end. The guest is not FROZEN."""


def raise_all(failed: Sequence[BaseException]) -> None:
    """What failed, as one; nothing if nothing did."""
    # What nobody expects goes first, and as it is.
    for error in failed:
        if not isinstance(error, GuardError | OSError):
            raise error
    if len(failed) == 1:
        raise failed[0]
    if failed:
        # A monitor that is away is another matter than what it has refused.
        away = any(isinstance(error, MonitorError) and not isinstance(error, Refused) for error in failed)
        raise (MonitorError if away else Fault)("; ".join(dict.fromkeys(map(str, failed))))


def each(*jobs: Callable[[], Any]) -> list[Any]:
    """What they return; each is done, whatever becomes of the others. All that failed is told."""
    done, failed = [], []
    for job in jobs:
        try:
            done.append(job())
        except Exception as error:
            failed.append(error)
    raise_all(failed)
    return done
