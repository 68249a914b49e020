# SPDX-License-Identifier: MIT
"""Threads for calls that block, some of which may never come back."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

__all__ = ["Threads"]


class Threads(ThreadPoolExecutor):
    """An executor whose end waits for nobody: what hangs ends with the process."""

    def __init__(self, most: int, name: str) -> None:
        super().__init__(most, thread_name_prefix=name)

    def begin(self, count: int) -> None:
        """Makes that many threads now. Who needs one later does not wait for it to be made."""
        together = threading.Barrier(count)
        for _ in range(count):
            self.submit(together.wait, 60.0)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Never waits."""
        super().shutdown(wait=False, cancel_futures=True)
