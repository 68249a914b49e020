# SPDX-License-Identifier: MIT
"""A process with memory of its own, for errors that hit a task and no guest."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from .errors import TestbedError


@dataclass(frozen=True)
class Memory:
    """Where the victim's memory is: address in it, length, frame of the first page."""

    pid: int
    va: int
    len: int
    pfn: int


# Errors in the same memory within ten seconds are taken for one; a page that an earlier victim
# gave back is no fresh one until then. Frame of the first page, and when it was given back.
_FRESH_AFTER = 11.0
_used: dict[int, float] = {}


class Victim:
    """Context manager for the process; it is always killed at the end.

    Its first page was no other victim's within the last seconds.
    """

    def __init__(self, length: int = 4096, shared: bool = False) -> None:
        others: list[subprocess.Popen[str]] = []
        while True:
            self._start(length, shared)
            if time.monotonic() - _used.get(self.memory.pfn, -_FRESH_AFTER) >= _FRESH_AFTER:
                break
            others.append(self._process)
        for process in others:
            process.kill()
            process.communicate()

    def _start(self, length: int, shared: bool) -> None:
        argv = [sys.executable, "-m", "testbed.madvise", "--len", str(length)]
        if shared:
            argv.append("--shared")
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        facts = json.loads(self._read())
        self.memory = Memory(facts["pid"], int(facts["va"], 16), facts["len"], facts["pfn"])

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise TestbedError(f"the victim process ended ({self._process.wait()})")
        return line

    def poison(self) -> None:
        """madvise(MADV_HWPOISON) on its first page, by the process itself."""
        assert self._process.stdin is not None
        self._process.stdin.write("poison\n")
        self._process.stdin.flush()
        self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        _used[self.memory.pfn] = time.monotonic()
