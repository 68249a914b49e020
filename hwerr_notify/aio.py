# SPDX-License-Identifier: MIT
"""Events for asyncio, without threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from . import device
from .enums import Severity, Source
from .event import Event

# Imported where it runs: it takes longer to load than the rest of the package.
if TYPE_CHECKING:
    import asyncio

__all__ = ["Watch", "watch"]


class Watch:
    """An asynchronous iterator over events; also an async context manager.

    A cancelled wait loses nothing: what was read is given to the next. One task at
    a time may wait (RuntimeError for a second). Belongs to one event loop at a time.
    """

    def __init__(self, source: device.Device) -> None:
        """Takes over `source`."""
        self.device = source
        self._events: deque[Event] = deque()
        self._wait: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self.device.closed:
                raise StopAsyncIteration
            self._events.extend(self.device.read_nonblocking())
            if not self._events:
                await self._readable()
            else:
                # Others have their turn, however fast records come.
                await _turn()
        return self._events.popleft()

    async def _readable(self) -> None:
        import asyncio

        if self._wait:
            raise RuntimeError("another task waits on this watch: make one for each")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self.device.fileno(), _settle, future)
        self._wait = loop, future
        try:
            await future
        finally:
            self._unregister()

    def _unregister(self) -> None:
        if self._wait:
            loop, future = self._wait
            self._wait = None
            loop.remove_reader(self.device.fileno())
            _settle(future)

    async def aclose(self) -> None:
        """Closes the device; an iteration that waits ends."""
        self._unregister()
        self.device.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


async def _turn() -> None:
    import asyncio

    await asyncio.sleep(0)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def watch(
    path: str | os.PathLike[str] = device.DEFAULT_PATH,
    *,
    severity: Severity | None = None,
    severities: Iterable[Severity] = (),
    sources: Iterable[Source] = (),
    pid: int | None = None,
    since: device.Since = "now",
    names: bool = True,
) -> Watch:
    """Opens the device, at once, for `async for event in watch()`.

    Arguments and errors are those of `open()`.
    """
    return Watch(
        device.open(
            path,
            severity=severity,
            severities=severities,
            sources=sources,
            pid=pid,
            since=since,
            names=names,
        )
    )
