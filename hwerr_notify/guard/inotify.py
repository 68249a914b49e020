# SPDX-License-Identifier: MIT
"""Sockets that appear, without asking again and again (inotify(7))."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

from .errors import GuardError

__all__ = ["DirectoryWatch"]

# linux/inotify.h
_IN_CREATE, _IN_MOVED_TO, _IN_ONLYDIR = 0x100, 0x80, 0x01000000
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC


class DirectoryWatch:
    """Calls back when something is made in, or moved into, one of some directories."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = self._libc.inotify_init1(_FLAGS)
        if self._fd < 0:
            raise GuardError(
                f"inotify: {os.strerror(ctypes.get_errno())}: raise fs.inotify.max_user_instances"
            )
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._read)

    def add(self, path: Path) -> None:
        """Watches it, or while it is not there, the nearest that is above it. Again does nothing."""
        flags = _IN_CREATE | _IN_MOVED_TO | _IN_ONLYDIR
        while True:
            while not path.is_dir() and path != path.parent:
                path = path.parent
            if self._libc.inotify_add_watch(self._fd, os.fsencode(path), flags) >= 0:
                return
            code = ctypes.get_errno()
            # Gone since it was looked at.
            if code not in (errno.ENOENT, errno.ENOTDIR) or path == path.parent:
                raise GuardError(f"inotify on {path}: {os.strerror(code)}: raise fs.inotify.max_user_watches")

    def _read(self) -> None:
        try:
            os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return
        self._changed()

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
