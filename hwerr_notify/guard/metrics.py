# SPDX-License-Identifier: MIT
"""OpenMetrics: a file for a node exporter's textfile collector, and HTTP on a UNIX socket."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..enums import Flags
from ..event import Event
from .errors import GuardError
from .store import Incident, create

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from .daemon import Guard

__all__ = ["Metrics"]

log = logging.getLogger("hwerr-guard")

STATES = ("guarded", "freezing", "frozen", "failed", "clearing")
# What they hold is no secret, and who collects it is not root.
_FILE_MODE, _SOCKET_MODE = 0o644, 0o666
# Who may ask at the same time: descriptors are for guests.
_CLIENTS = 16


class Metrics:
    """Counts, and shows what the guard knows."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.errors: Counter[tuple[str, str]] = Counter()
        self._server: asyncio.Server | None = None
        self._file_task: asyncio.Task[None] | None = None
        self._frozen: list[float] = [0, 0.0]  # how many, and their seconds
        self._clients = 0

    def frozen(self, incident: Incident) -> None:
        """One more guest is FROZEN."""
        self._frozen[0] += 1
        self._frozen[1] += (incident.frozen_mono_ns - incident.began_mono_ns) / 1e9

    def count(self, event: Event) -> None:
        """Every error that was read: a coalesced record stands for several, a linked one for none."""
        if event.flags & Flags.LINKED:
            return
        self.errors[event.source.label, event.severity.label] += max(1, event.count)

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily

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
        number, seconds = self._frozen
        yield SummaryMetricFamily(
            "hwerr_guard_frozen_seconds",
            "From the beginning of an incident to FROZEN",
            count_value=int(number),
            sum_value=seconds,
        )
        for name, text, why_not in (
            ("hwerr_guard_events", "1 if errors are read", guard.why_deaf),
            ("hwerr_guard_kernel", "1 if the kernel can stop VMs in the event path", guard.kernel.missing()),
            ("hwerr_guard_seal", "1 if the seal is the strong one", guard.sealer.why_weaker),
        ):
            able = GaugeMetricFamily(name, text)
            able.add_metric([], 0 if why_not else 1)
            yield able
        unreachable = GaugeMetricFamily("hwerr_guard_unreachable", "Monitors that cannot be reached")
        unreachable.add_metric([], len(guard.unreachable))
        yield unreachable
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
        """What cannot be is logged: guests are guarded without it."""
        policy = self.guard.policy
        try:
            if policy.metrics_socket is not None or policy.metrics_file is not None:
                self.text()
        except GuardError as error:
            log.error("no metrics: %s", error)
            return
        if policy.metrics_socket is not None:
            try:
                policy.metrics_socket.unlink(missing_ok=True)
                self._server = await asyncio.start_unix_server(self._http, policy.metrics_socket)
                policy.metrics_socket.chmod(_SOCKET_MODE)
            except OSError as error:
                log.error("no metrics: %s: %s", policy.metrics_socket, error.strerror or error)
        if policy.metrics_file is not None:
            self._file_task = asyncio.create_task(self._keep_file(policy.metrics_file))

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._file_task is not None:
            self._file_task.cancel()

    async def _keep_file(self, path: Path) -> None:
        """Written when something has happened, not by the clock."""
        queue = self.guard.subscribe()
        why = None
        while True:
            try:
                self._write(path)
                why = None
            except Exception as error:
                if why != (why := str(error)):
                    bug = None if isinstance(error, OSError) else error
                    log.error("metrics: %s: %s", path, getattr(error, "strerror", why), exc_info=bug)
            if await queue.get() is None:
                queue = self.guard.subscribe()
            while not queue.empty():
                queue.get_nowait()

    def _write(self, path: Path) -> None:
        """OSError."""
        part = path.with_name(f".{path.name}.part")
        fd = create(part)
        with open(fd, "wb") as file:
            file.write(self.text())
            os.fchmod(fd, _FILE_MODE)
        part.replace(path)

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            if self._clients > _CLIENTS:
                return
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
            self._clients -= 1
            writer.close()
