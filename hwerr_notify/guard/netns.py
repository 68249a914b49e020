# SPDX-License-Identifier: MIT
"""Network namespaces: of another process's interfaces, and how to work in one.

A namespace is known by what its links in /proc say, `net:[4026531840]`. What it is to be called is others'
affair: it has no name, or several.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from .errors import Fault

__all__ = ["OWN", "inside", "of_tap"]

OWN = "/proc/self/ns/net"

# linux/if_tun.h: _IO('T', 227), since 5.2 (0c3e0e3bb623). The owner of its interface's namespace may ask.
_TUNGETDEVNETNS = 0x54E3
_CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def of_tap(fd: int) -> str:
    """The namespace of the interface behind a file of /dev/net/tun. OSError."""
    found = fcntl.ioctl(fd, _TUNGETDEVNETNS)
    try:
        return os.readlink(f"/proc/self/fd/{found}")
    finally:
        os.close(found)


def inside(namespace: str | None, pid: int, job: Callable[[], Any]) -> Any:
    """What `job` returns, done there; None is here. Blocks. Fault if the namespace is not found.

    It is looked for in process `pid` first.
    """
    if namespace is None or namespace == os.readlink(OWN):
        return job()
    fd = _open(namespace, pid)
    results: list[Any] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            if _libc.setns(fd, _CLONE_NEWNET) != 0:
                code = ctypes.get_errno()
                raise Fault(f"{namespace} is not entered: {os.strerror(code)}")
            results.append(job())
        except BaseException as error:
            errors.append(error)

    # A namespace is its thread's: this one's ends with it.
    thread = Thread(target=work, name="netns")
    try:
        thread.start()
        thread.join()
    finally:
        os.close(fd)
    if errors:
        raise errors[0]
    return results[0]


def _open(namespace: str, pid: int) -> int:
    for path in _places(pid):
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if os.readlink(f"/proc/self/fd/{fd}") == namespace or _is(fd, namespace):
                return fd
            os.close(fd)
    raise Fault(f"no process and no name has its network namespace ({namespace})")


def _is(fd: int, namespace: str) -> bool:
    """A link to what is mounted under a name shows that name: the inode is the number in the other."""
    return namespace == f"net:[{os.fstat(fd).st_ino}]"


def _places(pid: int) -> Iterator[str]:
    yield f"/proc/{pid}/ns/net"
    for named in ("/run/netns", "/var/run/netns"):
        with suppress(OSError):
            yield from map(str, Path(named).iterdir())
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            yield f"/proc/{entry}/ns/net"
