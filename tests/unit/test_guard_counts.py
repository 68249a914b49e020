# SPDX-License-Identifier: MIT
"""What is counted, and shown as OpenMetrics: each error once, in a form that is read by others."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from hwerr_notify import Event, Flags, Guest, GuestFlags, Memory, Severity, Source, build
from hwerr_notify.guard import net
from hwerr_notify.guard.daemon import Guard
from hwerr_notify.guard.decide import Corrected
from hwerr_notify.guard.errors import Fault
from hwerr_notify.guard.policy import Policy, Threshold, VmPolicy
from hwerr_notify.guard.process import Process
from hwerr_notify.guard.store import Incident
from hwerr_notify.guard.vm import Vm

GUEST = Guest(7, GuestFlags.KVM, start_ns=5, gpa=0x5000, hva=0x7F0000005000, len=4096)
EVIL = 'web"1\\n\n{x="y"} 7 # EOF'


def event(flags: Flags = Flags(0), **more: Any) -> Event:  # noqa: B008
    return build(
        Memory(0x1000, 4096), GUEST, severity=Severity.CORRECTED, source=Source.EDAC, flags=flags,
        time_mono_ns=1, **more,
    )  # fmt: skip


def test_an_error_told_twice_is_one_error() -> None:
    """By EDAC and by the machine check behind it, for instance: the second record is linked to the first."""
    counter, policy = Corrected(), VmPolicy(degraded=(Threshold(2, 10.0, "vm"),))
    assert counter.add(event(), GUEST, policy) is None
    assert counter.add(event(Flags.LINKED), GUEST, policy) is None
    assert counter.add(event(), GUEST, policy) is not None


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    """One that knows something."""
    guard = Guard(
        Policy(
            Path("/none"), state_dir=tmp_path / "s", run_dir=tmp_path / "r", metrics_socket=tmp_path / "m"
        ),
        "/nowhere",
    )
    process = Process.open(os.getpid())
    incident = Incident(
        "20260102T030405.006-x-7", "b", EVIL, None, process.pid, process.start_ticks, "/q", {}, 1,
        1_000_000_000, state="frozen", frozen_mono_ns=1_250_000_000,
    )  # fmt: skip
    guard.incidents[incident.id] = incident
    vm = Vm(EVIL, None, process, VmPolicy(), "/q", incident=incident.id, degraded="often")
    guard.vms[vm.key] = vm
    guard.metrics.count(event(count=3))
    guard.metrics.count(event(Flags.LINKED, count=3))
    guard.metrics.frozen(incident)
    guard.lost = 5
    guard.unreachable[EVIL] = "why"
    yield guard
    process.close()


def values(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    parse: Callable[[str], Iterator[Any]] = text_string_to_metric_families
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def right(found: dict[tuple[str, tuple[tuple[str, str], ...]], float]) -> bool:
    expected = {
        ("hwerr_guard_vms", (("state", "frozen"),)): 1,
        ("hwerr_guard_vms", (("state", "guarded"),)): 0,
        ("hwerr_guard_degraded", ()): 1,
        ("hwerr_guard_incidents", (("state", "frozen"),)): 1,
        ("hwerr_guard_frozen_seconds_sum", ()): 0.25,
        ("hwerr_guard_frozen_seconds_count", ()): 1,
        ("hwerr_guard_events", ()): 0,
        ("hwerr_guard_kernel", ()): 0,
        ("hwerr_guard_seal", ()): 0,
        ("hwerr_guard_unreachable", ()): 1,
        ("hwerr_errors_total", (("severity", "corrected"), ("source", "edac"))): 3,
        ("hwerr_records_lost_total", ()): 5,
    }
    return expected.items() <= found.items()


def test_the_text_is_openmetrics(guard: Guard) -> None:
    """A VM chooses its name."""
    assert right(values(guard.metrics.text().decode()))


def test_so_is_what_the_socket_serves(guard: Guard, tmp_path: Path) -> None:
    async def main() -> None:
        await guard.metrics.start()
        for request, status in (("GET /metrics HTTP/1.1", "200"), ("GET /other HTTP/1.1", "404")):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "m")
            writer.write(f"{request}\r\nHost: x\r\n\r\n".encode())
            head, _, body = (await asyncio.wait_for(reader.read(), 60)).partition(b"\r\n\r\n")
            writer.close()
            first, *lines = head.decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines)
            assert first.split()[1] == status
            assert int(headers["Content-Length"]) == len(body)
            if status == "200":
                assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
                assert right(values(body.decode()))
        await guard.metrics.close()

    asyncio.run(main())


# -- taps ----------------------------------------------------------------------


class NetlinkError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Links:
    """The kernel's links, one on a bridge of Open vSwitch: its master is not to be set."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.up = {"tap0": True, "tap1": True}
        self.mastered = {"tap0": True, "tap1": True}

    def __call__(self) -> Links:
        return self

    def __enter__(self) -> Links:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def link_lookup(self, ifname: str) -> list[int]:
        return [int(ifname[-1])]

    def link(self, verb: str, index: int, state: str | None = None, master: int | None = None) -> None:
        assert verb == "set"
        name = f"tap{index}"
        if master is not None:
            if name == "tap0":
                raise NetlinkError(self.code)
            self.mastered[name] = False
        if state is not None:
            self.up[name] = state == "up"


def test_a_tap_whose_master_stays_is_down_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is enough where a master does not give its own away; any other failure is one."""
    for code in (errno.EOPNOTSUPP, errno.EPERM):
        links = Links(code)
        module = SimpleNamespace(IPRoute=links, NetlinkError=NetlinkError)
        monkeypatch.setitem(sys.modules, "pyroute2", module)
        if code == errno.EPERM:
            with pytest.raises(Fault, match="tap0: Operation not permitted"):
                net.release_taps(["tap0", "tap1"], os.getpid())
        else:
            assert list(net.release_taps(["tap0", "tap1"], os.getpid())) == ["tap0", "tap1"]
        assert links.up == {"tap0": False, "tap1": False}
        assert links.mastered == {"tap0": True, "tap1": False}
