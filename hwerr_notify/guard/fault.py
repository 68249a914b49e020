# SPDX-License-Identifier: MIT
"""For tests: the places where the daemon can be killed."""

from __future__ import annotations

import os
import signal

__all__ = ["fault_point"]


def fault_point(name: str) -> None:
    """HWERR_GUARD_FAULT=NAME in the environment is where it is."""
    if os.environ.get("HWERR_GUARD_FAULT") == name:
        os.kill(os.getpid(), signal.SIGKILL)
