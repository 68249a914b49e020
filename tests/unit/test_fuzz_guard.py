# SPDX-License-Identifier: MIT
"""hwerr-guard's sockets, fed by a grammar of what QMP and its control protocol look like, and do not.

HWERR_FUZZ_SECONDS is the time for each; a few seconds in `make test`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwerr_notify.guard.control import Control
from hwerr_notify.guard.daemon import Guard
from hwerr_notify.guard.errors import MonitorError, Refused
from hwerr_notify.guard.front import Front, harmless
from hwerr_notify.guard.policy import Policy, VmPolicy
from hwerr_notify.guard.process import Process
from hwerr_notify.guard.vm import Vm

SECONDS = float(os.environ.get("HWERR_FUZZ_SECONDS", "10"))

# Longer than what a test has elsewhere, where it fuzzes longer: what is left of the examples is made, too.
pytestmark = [pytest.mark.once, pytest.mark.timeout(2 * SECONDS + 600)]

FUZZ = settings(
    max_examples=100 if SECONDS <= 10 else 100_000, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip

COMMANDS = (
    "qmp_capabilities", "query-status", "query-block", "x-query-virtio", "cont", "stop", "system_reset",
    "quit", "migrate", "loadvm", "pmemsave", "dump-guest-memory", "getfd", "add-fd", "human-monitor-command",
    "qom-get", "qom-set", "blockdev-add", "device_add", "Query-status", "query-status ", "query-\n", "",
)  # fmt: skip
LINES = (
    "info registers", "info", "x /4 0", "cont", "c", "info;cont", "infocont", " info status", "help\ncont",
    "system_reset", "p 1", "print $rip", "xp/4 0", "memsave 0 1 f", "pmemsave", "loadvm x", "\x00info",
)  # fmt: skip

leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
value = st.recursive(
    leaf, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3)
)
command = st.sampled_from(COMMANDS) | value
arguments = st.fixed_dictionaries({"command-line": st.sampled_from(LINES) | value}) | value
request = st.fixed_dictionaries(
    {}, optional={"execute": command, "exec-oob": command, "arguments": arguments, "id": value, "x": value}
)


def encoded(made: Any) -> bytes:
    return json.dumps(made).encode() + b"\n"


spoilt = st.tuples(request.map(encoded), st.integers(0, 60), st.binary(max_size=4)).map(
    lambda t: t[0][: t[1]] + t[2] + b"\n"
)
line = request.map(encoded) | value.map(encoded) | spoilt | st.binary(max_size=40).map(lambda b: b + b"\n")


class Qemu:
    """A monitor that keeps what it was told, and answers anything."""

    def __init__(self, answers: list[Any]) -> None:
        self.told: list[tuple[str, Any]] = []
        self.answers = answers
        self.closed = asyncio.Event()

    async def execute(self, command: str, arguments: Any = None, *, limit: float = 5.0) -> Any:
        self.told.append((command, arguments))
        answer = self.answers[len(self.told) % len(self.answers)] if self.answers else {}
        if answer == "refuse":
            raise Refused("GenericError", "no")
        if answer == "gone":
            raise MonitorError("it went away")
        return answer


class Ends:
    """Raises when the time is over, so that hypothesis stops."""

    def __init__(self) -> None:
        self.at = time.monotonic() + SECONDS
        self.count = 0

    def over(self) -> bool:
        self.count += 1
        return time.monotonic() > self.at


async def say(path: Path, data: bytes, answers: int = 0) -> list[bytes]:
    """All that comes back. First `answers` lines are waited for: who goes away gives his requests up."""
    reader, writer = await asyncio.open_unix_connection(path, limit=1 << 24)
    writer.write(data)
    try:
        async with asyncio.timeout(60):
            lines = [await reader.readline() for _ in range(answers)]
            writer.write_eof()
            return [*lines, *(await reader.read()).splitlines()]
    finally:
        writer.close()


def guard(home: Path) -> Guard:
    return Guard(Policy(Path("/none"), state_dir=home / "s", run_dir=home / "r"), "/nowhere")


def test_front(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever comes: JSON goes back, an answer a line, and a frozen QEMU is told only what is harmless."""
    ends = Ends()

    @FUZZ
    @given(
        lines=st.lists(line, max_size=8), poisoned=st.booleans(),
        state=st.sampled_from(["freezing", "frozen", "failed"]),
        answers=st.lists(value | st.sampled_from(["refuse", "gone"]), max_size=3),
    )  # fmt: skip
    def run(lines: list[bytes], poisoned: bool, state: str, answers: list[Any]) -> None:
        if not ends.over():
            asyncio.run(one(lines, poisoned, state, answers))

    async def one(lines: list[bytes], poisoned: bool, state: str, answers: list[Any]) -> None:
        with tempfile.TemporaryDirectory(dir="/tmp") as home:
            owner = guard(Path(home))
            qemu = Qemu(answers)
            process = Process.open(os.getpid())
            vm = Vm("web1", None, process, VmPolicy(front=True), "/q", qemu, incident="i")  # type: ignore[arg-type]
            poison = ((0, 0, 4096),) if poisoned else ()
            incident = SimpleNamespace(id="i", open=True, state=state, poison=poison)
            owner.incidents["i"] = incident  # type: ignore[assignment]
            front = Front(vm, Path(home, "front"), owner)
            await front.start()
            hello = b'{"execute": "qmp_capabilities"}\n'
            # The greeting, and an answer for each line that is not blank.
            asked = [part for part in (hello + b"".join(lines)).split(b"\n") if part.strip()]
            replies = await say(front.path, hello + b"".join(lines), 1 + len(asked))
            for reply in replies:
                form = json.loads(reply)
                assert isinstance(form, dict)
                assert len({"return", "error", "event", "QMP"} & set(form)) == 1
            assert len(replies) == 1 + len(asked)
            for name, given_arguments in qemu.told:
                assert harmless(name, given_arguments, poisoned), f"QEMU was told {name} {given_arguments!r}"
            # It still serves.
            assert len(await say(front.path, hello)) == 2
            await front.close()
            process.close()

    run()
    print(f"{ends.count} conversations")
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


VERBS = ("status", "freeze", "dump", "clear", "events", "", "Status", "run")


def test_control(caplog: pytest.LogCaptureFixture) -> None:
    """One request: lines, then one end, and the daemon goes on."""
    ends = Ends()
    asks = st.fixed_dictionaries(
        {}, optional={"verb": st.sampled_from([v for v in VERBS if v != "events"]) | value, "name": value}
    )

    @FUZZ
    @given(data=asks.map(encoded) | line)
    def run(data: bytes) -> None:
        if not ends.over():
            asyncio.run(one(data))

    async def one(data: bytes) -> None:
        with tempfile.TemporaryDirectory(dir="/tmp") as home:
            control = Control(guard(Path(home)), Path(home, "control"))
            await control.start()
            forms = [json.loads(reply) for reply in await say(control.path, data)]
            try:
                json.loads(data[: data.index(b"\n") + 1])
            except (ValueError, RecursionError):
                assert forms == []
            else:
                assert [set(f) for f in forms[:-1]] == [{"line"}] * (len(forms) - 1)
                assert set(forms[-1]) == {"end"}
                assert set(forms[-1]["end"]) == {"status", "error"}
            (status, end) = await say(control.path, b'{"verb": "status"}\n')
            assert json.loads(status)["line"]["daemon"] == os.getpid()
            assert json.loads(end)["end"]["status"] == 0
            await control.close()

    run()
    print(f"{ends.count} requests")
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
