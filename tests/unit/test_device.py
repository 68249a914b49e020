# SPDX-License-Identifier: MIT
"""What Device does with what it has read, over a pipe; tests/vm/test_python.py has the real file."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import hwerr_notify as h
from hwerr_notify.device import at_least


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    out, into = os.pipe()
    os.set_blocking(out, False)
    yield out, into
    os.close(into)


def earlier(lost: int) -> h.Event:
    flags = h.Flags.EARLIER | h.Flags.OTHER_BOOT
    return h.build(severity=h.Severity.FATAL, flags=flags, time_real_ns=1, lost=lost, seq=1)


def now(lost: int) -> h.Event:
    return h.build(severity=h.Severity.FATAL, time_mono_ns=1, lost=lost, seq=2)


def test_this_boot_only_keeps_the_count_of_what_was_lost(pipe: tuple[int, int]) -> None:
    with h.Device(pipe[0], this_boot_only=True) as device:
        os.write(pipe[1], h.encode([earlier(3), now(1), now(0)]))
        assert [e.lost for e in device.read_nonblocking()] == [4, 0]
        os.write(pipe[1], earlier(2).raw)
        assert device.read_nonblocking() == []
        os.write(pipe[1], now(0).raw)
        assert [e.lost for e in device.read(timeout=0)] == [2]


def test_an_iteration_that_stops_loses_nothing(pipe: tuple[int, int]) -> None:
    with h.Device(pipe[0], nonblock=True) as device:
        os.write(pipe[1], h.encode([now(n) for n in range(5)]))
        for event in device:
            assert event.lost == 0
            break
        assert [e.lost for e in device.read_nonblocking()] == [1, 2, 3, 4]
        os.write(pipe[1], h.encode([now(5), now(6)]))
        assert [e.lost for e in device] == [5, 6]
        assert list(device) == []


def test_a_closed_device_says_so(pipe: tuple[int, int]) -> None:
    device = h.Device(pipe[0])
    device.close()
    device.close()
    assert device.closed
    assert "closed" in repr(device)
    for use in (device.fileno, device.read_nonblocking, device.stats, lambda: device.read(timeout=1)):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_at_least() -> None:
    s = h.Severity
    assert at_least(s.INFO) == frozenset()
    assert at_least(s.RECOVERABLE) == {s.RECOVERABLE, s.FATAL}
    assert at_least(s.CORRECTED) == set(s) - {s.INFO}


def test_arguments_that_make_no_sense(pipe: tuple[int, int]) -> None:
    with h.Device(pipe[0]) as device:
        with pytest.raises(TypeError, match="not both"):
            device.set_filter(severity=h.Severity.FATAL, severities=[h.Severity.INFO])
        for pid in (0, -1, 1 << 31):
            with pytest.raises(ValueError, match="no process number"):
                device.set_filter(pid=pid)
        for since in (0, -1, 1 << 64, "yesterday", None):
            with pytest.raises(ValueError, match=r"since|sequence"):
                device.seek(since)  # type: ignore[arg-type]
