# SPDX-License-Identifier: MIT
"""What can go wrong, in words for an operator."""

from __future__ import annotations

__all__ = [
    "CannotBeginError",
    "Fault",
    "GuardError",
    "MonitorError",
    "NoSuchError",
    "NobodyListensError",
    "Refused",
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
