# SPDX-License-Identifier: MIT
"""The kernel's guard behind /dev/hwerr: stops VMs in the event path and on command.

A module without it is a host where the stop comes later, through QEMU; everything
here then says so and does nothing.
"""

from __future__ import annotations

import errno
from contextlib import suppress

from ..device import Device, Guard
from ..enums import Severity
from ..event import Stop
from .process import Process

__all__ = ["KernelGuard"]


class KernelGuard:
    """Arms and stops VMs through an open device; without one, nothing."""

    def __init__(self, device: Device | None) -> None:
        self._device = device

    def missing(self) -> str | None:
        """None if there is one, else why not."""
        if self._device is None:
            return "/dev/hwerr is not open"
        try:
            self._device.guards()
        except OSError as error:
            if error.errno == errno.ENOTTY:
                return "the loaded module has no guard: load the one of this version"
            return f"the module refuses: {error.strerror}"
        return None

    def arm(self, process: Process, severity: Severity) -> str | None:
        """Outlives this process; None, or why the kernel would not."""
        if self._device is None:
            return "/dev/hwerr is not open"
        try:
            self._device.guard(process.pidfd, severity, keep=True)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return "it does not run under KVM"
            return error.strerror or str(error)
        return None

    def disarm(self, process: Process) -> None:
        """Not an error if it was not armed."""
        if self._device is not None:
            with suppress(OSError):
                self._device.unguard(process.pidfd)

    def stop(self, process: Process) -> Stop | str:
        """Stops every KVM guest of the process now; why not, if not."""
        if self._device is None:
            return "/dev/hwerr is not open"
        try:
            return self._device.stop(process.pidfd)
        except OSError as error:
            return error.strerror or str(error)

    def kept(self) -> list[Guard]:
        """The guards that outlive who armed them."""
        if self._device is None:
            return []
        try:
            return [g for g in self._device.guards() if g.keep]
        except OSError:
            return []

    def stopped_ns(self, process: Process) -> int | None:
        """When (CLOCK_MONOTONIC) a guard last stopped it, None if none has or none can tell."""
        if self._device is None:
            return None
        try:
            guards = self._device.guards()
        except OSError:
            return None
        for guard in guards:
            if process.is_of(guard.pid, guard.start_ns) and guard.stops:
                return guard.stopped_ns
        return None
