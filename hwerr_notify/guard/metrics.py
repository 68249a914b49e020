# SPDX-License-Identifier: MIT
"""OpenMetrics: a file for a node exporter's textfile collector, and HTTP on a UNIX socket."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..enums import Flags
from ..event import Event
from .errors import GuardError

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from .daemon import Guard

__all__ = ["Metrics"]

STATES = ("guarded", "freezing", "frozen", "failed")


class Metrics:
    """Counts, and shows what the guard knows."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.errors: Counter[tuple[str, str]] = Counter()
        self._server: asyncio.Server | None = None
        self._file_task: asyncio.Task[None] | None = None

    def count(self, event: Event) -> None:
        """Every error that was read: a coalesced record stands for several, a linked one for none."""
        if event.flags & Flags.LINKED:
            return
        self.errors[event.source.label, event.severity.label] += max(1, event.count)

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        guard = self.guard
        vms = GaugeMetricFamily("hwerr_guard_vms", "VMs by state", labels=["state"])
        states = Counter(guard.state(vm) for vm in guard.vms.values())
        for state in STATES:
            vms.add_metric([state], states[state])
        yield vms
        degraded = GaugeMetricFamily("hwerr_guard_degraded", "VMs with too many corrected errors")
        degraded.add_metric([], sum(vm.degraded is not None for vm in guard.vms.values()))
        yield degraded
        incidents = GaugeMetricFamily("hwerr_guard_incidents", "Incidents by state", labels=["state"])
        for state, count in Counter(i.state for i in guard.incidents.values()).items():
            incidents.add_metric([state], count)
        yield incidents
        frozen = GaugeMetricFamily(
            "hwerr_guard_frozen_seconds",
            "From the beginning of an incident to FROZEN",
            labels=["vm", "incident"],
        )
        for incident in guard.incidents.values():
            if incident.frozen_mono_ns:
                seconds = (incident.frozen_mono_ns - incident.began_mono_ns) / 1e9
                frozen.add_metric([incident.vm, incident.id], seconds)
        yield frozen
        errors = CounterMetricFamily(
            "hwerr_errors", "Errors read from the device", labels=["source", "severity"]
        )
        for labels, count in self.errors.items():
            errors.add_metric(list(labels), count)
        yield errors
        lost = CounterMetricFamily("hwerr_records_lost", "Records that the guard was too slow to read")
        lost.add_metric([], guard.lost)
        yield lost

    def text(self) -> bytes:
        """The OpenMetrics text. GuardError if prometheus-client is not installed."""
        try:
            from prometheus_client import CollectorRegistry
            from prometheus_client.openmetrics.exposition import generate_latest
        except ImportError:
            raise GuardError("metrics need the Python package prometheus-client") from None
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        generate: Callable[[CollectorRegistry], bytes] = generate_latest
        return generate(registry)

    async def start(self) -> None:
        """GuardError."""
        policy = self.guard.policy
        if policy.metrics_socket is not None:
            self.text()
            with suppress(FileNotFoundError):
                policy.metrics_socket.unlink()
            try:
                self._server = await asyncio.start_unix_server(self._http, policy.metrics_socket)
            except OSError as error:
                raise GuardError(f"{policy.metrics_socket}: {error.strerror}") from None
        if policy.metrics_file is not None:
            self.text()
            self._file_task = asyncio.create_task(self._keep_file(policy.metrics_file))

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._file_task is not None:
            self._file_task.cancel()

    async def _keep_file(self, path: Path) -> None:
        """Written when something has happened, not by the clock."""
        queue = self.guard.subscribe()
        part = path.with_name(f".{path.name}.part")
        while True:
            with suppress(OSError):
                part.write_bytes(self.text())
                os.replace(part, path)
            if await queue.get() is None:
                queue = self.guard.subscribe()
            while not queue.empty():
                queue.get_nowait()

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(10):
                request = await reader.readline()
                while (await reader.readline()).strip():
                    pass
                ok = request.startswith((b"GET /metrics ", b"GET / "))
                body = self.text() if ok else b"there is /metrics\n"
                kind = "application/openmetrics-text; version=1.0.0; charset=utf-8" if ok else "text/plain"
                head = f"HTTP/1.0 {'200 OK' if ok else '404 Not Found'}\r\nContent-Type: {kind}\r\n"
                writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                await writer.drain()
        except (TimeoutError, ConnectionError, ValueError):
            pass
        finally:
            writer.close()
