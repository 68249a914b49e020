# SPDX-License-Identifier: MIT
"""Threads for calls that block, some of which may never come back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

__all__ = ["Threads"]


class Threads(ThreadPoolExecutor):
    """An executor whose end waits for nobody: what hangs ends with the process."""

    def __init__(self, most: int, name: str) -> None:
        super().__init__(most, thread_name_prefix=name)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Never waits."""
        super().shutdown(wait=False, cancel_futures=True)
