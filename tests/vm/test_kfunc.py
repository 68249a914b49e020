# SPDX-License-Identifier: MIT
"""bpf_hwerr_publish(), called by BPF programs: what it takes, and from where."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from testbed.kernel import put
from testbed.wait import until

import hwerr_notify as h
from hwerr_notify import bpf

TOP = Path(__file__).resolve().parents[2]
LIMIT = 60.0
SLOTS, TIMES = 32, 48  # kmod/kfunc.c, kfunc.bpf.c
CALL = struct.Struct("=IIIIIi")
KEY = bytes(4)


@pytest.fixture(scope="module")
def objects() -> Iterator[Path]:
    """The programs, compiled against any kernel's types."""
    out = TOP / "build/tests" / os.uname().release
    out.mkdir(parents=True, exist_ok=True)
    flags = (
        "-g",
        "-O2",
        "-target",
        "bpf",
        "-mcpu=v3",
        "-D__TARGET_ARCH_x86",
        "-std=gnu11",
        "-Wall",
        "-Werror",
        # A newer kernel's types than clang knows what to make of.
        "-Wno-missing-declarations",
    )
    include = (f"-I{TOP / path}" for path in ("bpf", "build/bpf", "kmod/uapi", "kmod"))
    source = TOP / "tests/vm/kfunc.bpf.c"
    subprocess.run(["clang", *flags, *include, "-c", source, "-o", out / "kfunc.bpf.o"], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpf, "OBJECTS", out)
        yield out


class Caller:
    """Some of the programs, attached."""

    def __init__(self, *programs: str) -> None:
        with contextlib.ExitStack() as stack:
            self._object = stack.enter_context(bpf.BpfObject("kfunc"))
            self._object.only(*programs)
            self._object.load()
            self._map = stack.enter_context(bpf.Map(os.dup(self._object.map_fd("hwerr_call"))))
            for program in programs:
                self._object.attach(program)
            self._stack = stack.pop_all()

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def detach(self) -> None:
        """No program runs any more; what they did can still be read."""
        self._object.close()

    def give(self, record: bytes, length: int | None = None, armed: bool = False) -> None:
        """What the program publishes from now on."""
        size = len(record) if length is None else length
        value = CALL.pack(os.getpid(), size, armed, 0, 0, 0) + record
        self._map.set(KEY, value.ljust(self._map.value_size, b"\0"))

    def counts(self) -> tuple[int, int, int]:
        """Calls, how many were refused, and why the last of them."""
        return CALL.unpack_from(self._map[KEY])[3:]

    def call(self, record: bytes, length: int | None = None) -> int:
        """The result of one call, from this task."""
        self.give(record, length)
        os.getpgid(0)
        calls, _, result = self.counts()
        assert calls == 1
        return result


@pytest.fixture
def device() -> Iterator[h.Device]:
    with h.open(names=False) as opened:
        yield opened


def record(text: str = "it", **more: Any) -> bytes:
    return bytes(h.build(h.Text(text), severity=h.Severity.RECOVERABLE, source=h.Source.KVM, cpu=1, **more))


def await_records(device: h.Device, wanted: int) -> list[h.Event]:
    deadline = time.monotonic() + LIMIT
    events: list[h.Event] = []
    while len(events) < wanted and (left := deadline - time.monotonic()) > 0:
        events += device.read(left)
    assert len(events) == wanted
    return events


def test_a_record_is_published(objects: Path, device: h.Device) -> None:
    with Caller("hwerr_in_task") as caller:
        before = time.monotonic_ns()
        assert caller.call(record()) == 0
        (event,) = await_records(device, 1)
        assert before < event.time_mono_ns < time.monotonic_ns()
        assert abs(event.time_real_ns - time.time_ns()) < 60 * 10**9
        assert (event.source, event.cpu, event.text, event.count) == (h.Source.KVM, 1, "it", 1)
        assert event.software
        assert event.id == event.seq
        # Times that are given stay; so does the longest record as a whole.
        longest = record("x" * (4096 - 72 - 8 - 1), time_mono_ns=5, time_real_ns=7)
        assert len(longest) == 4096
        assert caller.call(longest) == 0
        (event,) = await_records(device, 1)
        assert (event.time_mono_ns, event.time_real_ns) == (5, 7)
        assert len(event.text or "") == 4096 - 72 - 8 - 1


def changed(at: int, form: str, value: int) -> bytes:
    raw = bytearray(record())
    struct.pack_into(form, raw, at, value)
    return bytes(raw)


# Offsets of uapi/hwerr.h; the info begins at 72.
INVALID: dict[str, Callable[[], tuple[bytes, int | None]]] = {
    "nothing": lambda: (b"", 0),
    "half a head": lambda: (record(), 71),
    "cut": lambda: (record(), len(record()) - 8),
    "more than it says": lambda: (record(), len(record()) + 8),
    "two": lambda: (record() + record(), None),
    "too long": lambda: (record().ljust(4104, b"\0"), None),
    "len 0": lambda: (changed(0, "<I", 0), None),
    "hdr_len": lambda: (changed(4, "<H", 64), None),
    "version": lambda: (changed(6, "<H", 2), None),
    "severity": lambda: (changed(8, "<B", 5), None),
    "source": lambda: (changed(9, "<B", 10), None),
    "kind": lambda: (changed(10, "<B", 5), None),
    "component": lambda: (changed(11, "<B", 11), None),
    "redacted": lambda: (changed(12, "<I", 0x80), None),
    "stopped": lambda: (changed(12, "<I", 0x100), None),
    "unknown flag": lambda: (changed(12, "<I", 0x80000000), None),
    "cpu": lambda: (changed(56, "<i", -2), None),
    "padding": lambda: (changed(68, "<I", 1), None),
    "info of 0 bytes": lambda: (changed(72, "<I", 0), None),
    "info beyond the end": lambda: (changed(72, "<I", 24), None),
    "info of no type": lambda: (changed(76, "<H", 0), None),
    "the kernel's own info": lambda: (changed(76, "<H", 9), None),
    "text without an end": lambda: (changed(80, "<Q", 0x7878787878787878), None),
}


def test_what_is_invalid_is_refused(objects: Path, device: h.Device) -> None:
    before = device.stats().records
    with Caller("hwerr_in_task") as caller:
        # Twice, which is more than there are places: none of them keeps one.
        for name, make in (*INVALID.items(), *INVALID.items()):
            assert caller.call(*make()) == -errno.EINVAL, name
        assert caller.call(record()) == 0
    assert [e.text for e in await_records(device, 1)] == ["it"]
    assert device.stats().records == before + 1


def test_more_than_there_is_room_for(objects: Path, device: h.Device) -> None:
    """From where a lock is held that waking a reader takes, and interrupts are off."""
    with Caller("hwerr_in_switch") as caller:
        caller.give(record(), armed=True)
        until(lambda: caller.counts()[0] >= TIMES, LIMIT)
        assert caller.counts() == (TIMES, TIMES - SLOTS, -errno.ENOBUFS)
        events = await_records(device, SLOTS)
        assert [e.seq for e in events] == list(range(events[0].seq, events[0].seq + SLOTS))
        # And they are free again.
        caller.give(record(), armed=True)
        await_records(device, SLOTS)


def test_from_an_nmi(objects: Path, device: h.Device) -> None:
    with Caller("hwerr_in_nmi") as caller:
        caller.give(record())
        put(Path("/proc/sysrq-trigger"), "l")
        until(lambda: caller.counts()[0], LIMIT)
        caller.detach()
        calls, refused, _ = caller.counts()
        assert {e.text for e in await_records(device, calls - refused)} == {"it"}


def test_a_program_that_its_own_record_runs(objects: Path, device: h.Device) -> None:
    """Else it would publish for ever, in an interrupt."""
    with Caller("hwerr_in_task", "hwerr_in_itself") as caller:
        caller.give(record())
        os.getpgid(0)
        await_records(device, 1)
        assert caller.counts() == (2, 1, -errno.EBUSY)
    assert device.drain() == []


@pytest.mark.parametrize(("more", "status"), [("", 9), (",+sys_admin", 0)])
def test_the_function_is_for_those_who_may_load_programs(objects: Path, more: str, status: int) -> None:
    """With CAP_SYS_ADMIN, which write() takes as well: CAP_BPF and CAP_PERFMON are too little."""
    code = (
        "import sys, pathlib; from hwerr_notify import bpf\n"
        f"bpf.OBJECTS = pathlib.Path({str(objects)!r})\n"
        "o = bpf.BpfObject('kfunc'); o.only('hwerr_in_task')\n"
        "try: o.load()\n"
        "except OSError as error: print(error.strerror); sys.exit(9)\n"
    )
    keep = f"-all,+bpf,+perfmon{more}"
    done = subprocess.run(
        ["setpriv", "--bounding-set", keep, "--inh-caps", keep, sys.executable, "-c", code],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
