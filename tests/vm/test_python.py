# SPDX-License-Identifier: MIT
"""hwerr_notify on the real device."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hit import Injector
from testbed import inject, pagemap
from testbed.guest import Guest as Vm
from testbed.guest import GuestConfig
from testbed.victim import Victim

import hwerr_notify as h

S = h.Severity
TOP = Path(__file__).resolve().parents[2]
TICK = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
# Longer than an emulated CPU takes for anything here; nothing waits for it unless it fails.
LIMIT = 60.0


def start_ns(pid: int) -> int:
    """Start of a process, to the clock tick."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) * TICK


@pytest.fixture
def publisher() -> Iterator[h.Device]:
    with h.open(publish=True) as device:
        yield device


def record(n: int = 0, severity: h.Severity = S.RECOVERABLE, *infos: h.Info, **more: object) -> h.Event:
    """A record whose raw_severity tells it from others."""
    return h.build(*infos, severity=severity, raw_severity=n, **more)  # type: ignore[arg-type]


def numbers(events: list[h.Event]) -> list[int]:
    return [e.raw_severity for e in events]


# -- reading and publishing --------------------------------------------------


def test_what_is_published_is_read(publisher: h.Device) -> None:
    infos = (
        h.Mce(status=1 << 63, bank=3, socket=1),
        h.Pci(0, 1, 8, status=0x1000, tlp=(1, 2, 3, 4), flags=1),
        h.Edac(0, 1, -1, -1, label="DIMM_A1", grain=64),
        h.Memory(0x1000, 4096, mf_type=-1, mf_result=-1),
        h.Guest(1, h.GuestFlags.KVM, start_ns=5, vm_id=6, hva=7, gpa=None, len=8, slot=9, comm="qemu"),
        h.Task(2, start_ns=3, va=4, len=5, comm="task"),
        h.Cper(uuid.uuid4(), fru_text="FRU", data=b"abc"),
        h.Text("words"),
    )
    sent = h.build(
        *infos, severity=S.DEFERRED, source=h.Source.CPER, kind=h.Kind.UCNA, component=h.Component.CACHE,
        flags=h.Flags.ACTION_REQUIRED, cpu=1, count=3, raw_severity=77,
    )  # fmt: skip
    with h.open(names=False) as reader:
        before = time.time_ns()
        publisher.publish(sent)
        (got,) = reader.read(timeout=LIMIT)
        assert got.infos == infos
        for name in (
            "severity",
            "source",
            "kind",
            "component",
            "cpu",
            "count",
            "raw_severity",
            "action_required",
        ):
            assert getattr(got, name) == getattr(sent, name), name
        assert got.software
        assert got.id == got.seq == reader.info().next_seq - 1
        assert before <= got.time_real_ns <= time.time_ns()
        assert 0 < got.time_mono_ns <= time.monotonic_ns()
        assert got.to_json()["origin"] == "software"


def test_many_in_one_write_keep_their_order(publisher: h.Device) -> None:
    with h.open() as reader:
        publisher.publish(*(record(n) for n in range(100)))
        assert numbers(reader.drain()) == list(range(100))
        assert reader.drain() == []


def test_a_read_waits_no_longer_than_told(publisher: h.Device) -> None:
    with h.open() as reader:
        for timeout in (0.0, 0.2):
            start = time.monotonic()
            assert reader.read(timeout=timeout) == []
            assert time.monotonic() - start >= timeout
        publisher.publish(record(5))
        assert numbers(reader.read(timeout=0)) == [5]


def test_a_waiting_read_gets_what_comes(publisher: h.Device) -> None:
    got: list[h.Event] = []
    with h.open() as reader:
        readers = publisher.stats().readers
        thread = threading.Thread(target=lambda: got.extend(reader.read()))
        thread.start()
        assert readers == publisher.stats().readers
        publisher.publish(record(6))
        thread.join(LIMIT)
        assert numbers(got) == [6]


def test_iteration(publisher: h.Device) -> None:
    with h.open() as reader, h.open(nonblock=True) as short:
        publisher.publish(*(record(n) for n in range(10)))
        events = iter(reader)
        assert [next(events).raw_severity for _ in range(10)] == list(range(10))
        assert numbers(list(short)) == list(range(10))
        assert list(short) == []
        assert short.read() == []


def test_what_iteration_holds_is_not_lost(publisher: h.Device) -> None:
    with h.open(sources=[h.Source.USER]) as reader:
        publisher.publish(record(1), record(2, S.FATAL), record(3))
        assert next(iter(reader)).raw_severity == 1
        with pytest.raises(ValueError, match="begin at 1"):
            reader.seek(0)
        assert numbers(reader.read(timeout=LIMIT)) == [2, 3]
        publisher.publish(record(4), record(5, S.FATAL), record(6))
        assert next(iter(reader)).raw_severity == 4
        reader.set_filter(severity=S.FATAL, sources=[h.Source.USER])
        assert numbers(reader.drain()) == [5]


def test_poll_and_epoll(publisher: h.Device) -> None:
    with h.open() as reader, select.epoll() as epoll:
        epoll.register(reader, select.EPOLLIN | select.EPOLLET)
        assert epoll.poll(0) == []
        assert select.select([reader], [], [], 0) == ([], [], [])
        publisher.publish(record(1))
        assert epoll.poll(LIMIT) == [(reader.fileno(), select.EPOLLIN)]
        assert select.select([reader], [], [], 0) == ([reader], [], [])
        assert epoll.poll(0) == []
        assert numbers(reader.drain()) == [1]
        publisher.publish(record(2))
        assert epoll.poll(LIMIT) == [(reader.fileno(), select.EPOLLIN)]


def test_the_file_is_not_inherited(publisher: h.Device) -> None:
    assert not os.get_inheritable(publisher.fileno())


# -- filters and positions ---------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"severity": S.INFO}, [0, 1, 2, 3, 4]),
        ({"severity": S.DEFERRED}, [2, 3, 4]),
        ({"severity": S.FATAL}, [4]),
        ({"severities": [S.INFO, S.FATAL]}, [0, 4]),
        ({"sources": [h.Source.KVM]}, [1, 3]),
        ({"sources": [h.Source.KVM, h.Source.USER]}, [0, 1, 2, 3, 4]),
        ({"sources": [h.Source.KVM], "severity": S.RECOVERABLE}, [3]),
        ({"pid": 4242}, [2]),
        ({"pid": 4243}, [3]),
        ({"pid": 4244}, []),
    ],
)
def test_filters(publisher: h.Device, arguments: dict[str, object], expected: list[int]) -> None:
    owners: dict[int, tuple[h.Info, ...]] = {2: (h.Task(4242),), 3: (h.Guest(4243), h.Task(5))}
    with h.open(**arguments) as reader, h.open() as all_of_it:  # type: ignore[arg-type]
        for n, severity in enumerate(S):
            source = h.Source.KVM if n % 2 else h.Source.USER
            # A text of its own keeps corrected ones from being told as repetitions.
            publisher.publish(
                record(n, severity, *owners.get(n, ()), source=source, text=str(time.time_ns()))
            )
        assert numbers(all_of_it.drain()) == [0, 1, 2, 3, 4]
        assert numbers(reader.drain()) == expected


def test_the_filter_in_force_is_told_and_replaced(publisher: h.Device) -> None:
    with h.open(severity=S.RECOVERABLE, sources=[h.Source.MCE], pid=7) as reader:
        assert reader.get_filter() == h.Filter(
            frozenset({S.RECOVERABLE, S.FATAL}), frozenset({h.Source.MCE}), 7
        )
        publisher.publish(record(8))
        assert reader.drain() == []
        reader.set_filter()
        assert reader.get_filter() == h.Filter()
        publisher.publish(record(9))
        assert numbers(reader.drain()) == [8, 9]


def test_a_severity_the_kernel_does_not_know_is_refused() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        h.open(severities=[h.Severity(40)])


def test_positions(publisher: h.Device) -> None:
    with h.open() as mark:
        first = mark.info().next_seq
        publisher.publish(*(record(n) for n in range(5)))
        with h.open() as reader:
            assert reader.drain() == []
            reader.seek(first)
            assert numbers(reader.drain()) == [0, 1, 2, 3, 4]
            reader.seek("now")
            assert reader.drain() == []
        with h.open(since=first + 3) as reader:
            assert [e.seq for e in reader.drain()] == [first + 3, first + 4]
        for since in ("oldest", "boot"):
            with h.open(since=since) as reader:
                assert reader.info().oldest_seq == reader.read(timeout=0)[0].seq
        following = mark.info().next_seq
        with h.open(since=following) as reader:
            assert reader.drain() == []
            with pytest.raises(ValueError, match=f"the next is {following}"):
                reader.seek(following + 1)
        with pytest.raises(ValueError, match="no record"):
            h.open(since=following + 1)


# -- the same file, by its number ----------------------------------------------


def test_a_buffer_that_is_too_short_loses_nothing(publisher: h.Device) -> None:
    with h.open(sources=[h.Source.USER]) as reader:
        publisher.publish(record(1, text="x" * 100))
        for size in (8, 80):
            with pytest.raises(OSError, match="Invalid argument"):
                os.read(reader.fileno(), size)
        (event,) = reader.drain()
        assert (event.raw_severity, event.lost) == (1, 0)


def test_who_shares_the_file_shares_its_cursor(publisher: h.Device) -> None:
    """By dup(2), and over fork(2)."""
    one = len(h.encode([record(1)]))
    with h.open(sources=[h.Source.USER]) as reader:
        publisher.publish(*(record(n) for n in range(4)))
        copy = os.dup(reader.fileno())
        try:
            assert numbers(h.parse(os.read(copy, one))) == [0]
            child = os.fork()
            if not child:
                os._exit(0 if numbers(h.parse(os.read(copy, one))) == [1] else 1)
            assert os.waitpid(child, 0) == (child, 0)
        finally:
            os.close(copy)
        assert numbers(reader.drain()) == [2, 3]


# -- counts ------------------------------------------------------------------


def test_repeated_corrected_errors_are_counted(publisher: h.Device) -> None:
    with h.open(sources=[h.Source.USER]) as reader:
        # In one write, so within the second.
        publisher.publish(*[record(1, S.CORRECTED, text="the same")] * 5)
        events: list[h.Event] = []
        while sum(e.count for e in events) < 5:
            more = reader.read(timeout=LIMIT)
            assert more
            events += more
        first, rest = events
        assert (first.count, rest.count, rest.id) == (1, 4, first.seq)
        assert not first.flags & h.Flags.COALESCED
        assert rest.flags & h.Flags.COALESCED


def test_sixteen_readers_and_one_error_among_corrected_ones(publisher: h.Device) -> None:
    """Each knows exactly what it lost, and it was not the one that is not corrected."""
    n = 4000
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(h.open(sources=[h.Source.USER])) for _ in range(16)]
        publisher.publish(record(0, S.FATAL))
        for i in range(1, n, 100):
            publisher.publish(*(record(k, S.CORRECTED, text=f"{k}") for k in range(i, min(i + 100, n))))
        for reader in readers:
            events = reader.drain()
            assert [e.raw_severity for e in events if e.severity == S.FATAL] == [0]
            lost = sum(e.lost for e in events)
            assert lost > 0
            assert len(events) + lost == n


def test_loss_is_exact(publisher: h.Device) -> None:
    n = 400
    with h.open(severities=[S.FATAL]) as slow, h.open() as other:
        start = slow.stats()
        for i in range(n):
            publisher.publish(record(i, S.FATAL, text="x" * 3000))
            publisher.publish(record(i, S.INFO, text=f"{i}"))
        got = slow.drain()
        assert got[0].lost > 0
        assert [e.lost for e in got[1:]] == [0] * (len(got) - 1)
        assert got[0].lost + len(got) == n
        assert numbers(got) == list(range(n - len(got), n))
        stats = slow.stats()
        assert (stats.reader_read, stats.reader_lost, stats.reader_pending) == (len(got), n - len(got), 0)
        assert stats.records - start.records == 2 * n
        assert stats.by_severity[S.FATAL] - start.by_severity[S.FATAL] == n
        assert stats.by_source[h.Source.USER] - start.by_source[h.Source.USER] == 2 * n
        everything = other.drain()
        assert sum(e.lost for e in everything) + len(everything) == 2 * n


def test_info(publisher: h.Device) -> None:
    info = publisher.info()
    assert info.abi_version == 1
    assert info.record_max == h.RECORD_MAX
    assert info.scope == "all"
    assert h.Source.MCE in info.sources
    assert all(size >= h.RECORD_MAX for size in info.ring_bytes)
    publisher.publish(record())
    assert publisher.info().next_seq == info.next_seq + 1
    assert publisher.info().oldest_seq > 0
    with h.open():
        more = publisher.stats().readers
    assert publisher.stats().readers == more - 1


def test_the_json_of_counts_has_every_field(publisher: h.Device) -> None:
    form = publisher.stats().to_json() | publisher.info().to_json()
    assert set(form["by_severity"]) == {s.label for s in S}
    assert set(form["by_source"]) == {s.label for s in h.Source}
    assert "mce" in form["sources"]


# -- errors ------------------------------------------------------------------


def test_a_wrong_record_publishes_nothing(publisher: h.Device) -> None:
    good = record(1)
    wrong = bytearray(good.raw)
    wrong[8] = 99
    with h.open() as reader:
        for records in ((bytes(wrong),), (good, bytes(wrong)), (good.raw[:40],), (good,) * 2000, ()):
            with pytest.raises(ValueError, match="refused"):
                publisher.publish(*records)
        assert reader.drain() == []


def test_publishing_needs_a_file_opened_for_it() -> None:
    with h.open() as reader, pytest.raises(PermissionError, match="publish=True"):
        reader.publish(record())


def test_what_is_no_device() -> None:
    with pytest.raises(FileNotFoundError):
        h.open("/dev/hwerr-is-not-here")
    with pytest.raises(OSError, match="ioctl"):
        h.open("/dev/null")


def test_no_file_is_left_open_by_an_error() -> None:
    before = os.listdir("/proc/self/fd")
    for arguments in (
        {"since": 1 << 62},
        {"pid": 0},
        {"severities": [h.Severity(40)]},
        {"path": "/dev/null"},
    ):
        with pytest.raises((ValueError, OSError)):
            h.open(**arguments)
    assert os.listdir("/proc/self/fd") == before


# -- scope -------------------------------------------------------------------

UNPRIVILEGED = """
import ctypes, json, mmap, os, sys
import hwerr_notify as h
memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[0] = 1
d = h.open()
out = {"va": ctypes.addressof(ctypes.c_char.from_buffer(memory)), "scope": d.info().scope,
       "next_seq": d.info().next_seq, "records": d.stats().records}
for name, call in (("pid", lambda: d.set_filter(pid=1)),
                   ("publish", lambda: h.open(publish=True).publish(h.build(severity=h.Severity.INFO)))):
    try:
        call()
        out[name] = "allowed"
    except PermissionError:
        out[name] = "refused"
d.set_filter(pid=os.getpid())
d.set_filter()
print(json.dumps(out), flush=True)
sys.stdin.readline()
for event in d.drain():
    print(json.dumps(event.to_json()), flush=True)
"""


def test_without_the_capability_only_own_events_are_seen(publisher: h.Device) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", UNPRIVILEGED],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, user=65534, group=65534, extra_groups=[],
    ) as child, h.open(sources=[h.Source.MEMORY_FAILURE]) as reader:  # fmt: skip
        assert child.stdout
        facts = json.loads(child.stdout.readline())
        va = facts.pop("va")
        assert facts == {"scope": "self", "next_seq": 0, "records": 0, "pid": "refused", "publish": "refused"}
        pfn = pagemap.pfn_of(child.pid, va)
        publisher.publish(
            record(1, S.FATAL, h.Memory(pfn * 4096, 4096), h.Task(1, comm="other"), text="secret")
        )
        inject.hwpoison(pfn)
        seen = reader.read(timeout=LIMIT)
        out, _ = child.communicate("\n")
    assert [t.pid for e in seen for t in e.tasks] == [child.pid]
    (event,) = map(json.loads, out.splitlines())
    assert event["seq"] == seen[0].seq
    assert (event["source"], event["redacted"], event["cpu"]) == ("memory_failure", True, None)
    assert [(t["pid"], t["va"]) for t in event["tasks"]] == [(child.pid, hex(va))]
    assert "phys_addr" not in event
    assert hex(pfn)[2:] not in out
    assert "secret" not in out


# -- names -------------------------------------------------------------------


@pytest.mark.amd
def test_a_vm_has_its_name_and_uuid(publisher: h.Device) -> None:
    with Vm.start(GuestConfig(name="web1")) as guest:
        there = h.Guest(guest.pid, h.GuestFlags.KVM, start_ns=start_ns(guest.pid), gpa=0, hva=1, len=1)
        reused = h.Guest(guest.pid, h.GuestFlags.KVM, start_ns=start_ns(guest.pid) - TICK, gpa=0)
        with h.open() as reader, h.open(names=False) as plain:
            publisher.publish(record(0, S.FATAL, there, reused))
            first, second = reader.read(timeout=LIMIT)[0].guests
            assert (first.name, first.uuid) == ("web1", uuid.UUID(guest.uuid))
            assert (second.name, second.uuid) == (None, None)
            assert plain.read(timeout=LIMIT)[0].guests[0].name is None
    with h.open() as reader:
        publisher.publish(record(0, S.FATAL, there, h.Guest(guest.pid, start_ns=5)))
        first, second = reader.read(timeout=LIMIT)[0].guests
        assert first.name == "web1", "remembered, though the process has gone"
        assert second.name is None


def test_a_task_that_is_hit(publisher: h.Device) -> None:
    with Victim() as victim, h.open(sources=[h.Source.MEMORY_FAILURE]) as reader:
        victim.poison()
        (event,) = reader.read(timeout=LIMIT)
    assert not event.software
    assert event.guests == ()
    assert [(t.pid, t.va, t.len) for t in event.tasks] == [(victim.memory.pid, victim.memory.va, 4096)]
    assert event.memory
    assert (event.memory.phys_addr, event.memory.phys_len) == (victim.memory.pfn * 4096, 4096)
    assert f"(pid {victim.memory.pid})" in event.message


# -- asyncio -----------------------------------------------------------------


def test_async_events_come_in_order(publisher: h.Device) -> None:
    async def main() -> list[int]:
        async with h.watch() as watch:
            loop = asyncio.get_running_loop()
            loop.call_soon(publisher.publish, record(0), record(1))
            got = [(await anext(watch)).raw_severity for _ in range(2)]
            loop.call_soon(publisher.publish, record(2))
            got.append((await anext(watch)).raw_severity)
            return got

    assert asyncio.run(asyncio.wait_for(main(), LIMIT)) == [0, 1, 2]


def test_a_cancelled_wait_loses_nothing(publisher: h.Device) -> None:
    async def main() -> list[int]:
        got: list[int] = []
        async with h.watch() as watch:
            for n in range(50):
                waiting = asyncio.ensure_future(anext(watch))
                await asyncio.sleep(0)
                publisher.publish(record(2 * n), record(2 * n + 1))
                # From before the event is seen to after it is there: cancel at every stage.
                for _ in range(n % 4):
                    await asyncio.sleep(0)
                waiting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    got.append((await waiting).raw_severity)
            while len(got) < 100:
                got.append((await anext(watch)).raw_severity)
        return got

    assert asyncio.run(asyncio.wait_for(main(), LIMIT)) == list(range(100))


def test_two_watches_and_one_waiter_each(publisher: h.Device) -> None:
    async def main() -> None:
        async with h.watch() as one, h.watch(severity=S.FATAL) as two:
            first, second = asyncio.ensure_future(anext(one)), asyncio.ensure_future(anext(two))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="another task"):
                await anext(one)
            publisher.publish(record(1), record(2, S.FATAL))
            assert (await first).raw_severity == 1
            assert (await second).raw_severity == 2

    asyncio.run(asyncio.wait_for(main(), LIMIT))


def test_closing_ends_an_iteration_that_waits() -> None:
    async def main() -> int:
        watch = h.watch()
        fd = watch.device.fileno()

        async def consume() -> int:
            return len([event async for event in watch])

        task = asyncio.ensure_future(consume())
        await asyncio.sleep(0)
        await watch.aclose()
        await watch.aclose()
        assert not Path(f"/proc/self/fd/{fd}").exists()
        return await task

    assert asyncio.run(asyncio.wait_for(main(), LIMIT)) == 0


def test_an_idle_watch_does_not_run(publisher: h.Device) -> None:
    async def main() -> float:
        async with h.watch() as watch:
            used = time.process_time()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(watch), 1)
            return time.process_time() - used

    assert asyncio.run(main()) < 0.5


# -- the consumer in C -------------------------------------------------------


@pytest.fixture
def program() -> Path:
    """The example, compiled."""
    path = TOP / "build" / "examples" / os.uname().release / "hwerr-poll"
    path.parent.mkdir(parents=True, exist_ok=True)
    source, include = TOP / "examples/hwerr-poll.c", TOP / "kmod/uapi"
    warnings = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
    subprocess.run(["gcc", *warnings, "-O2", "-o", path, source, f"-I{include}"], check=True)
    return path


@pytest.mark.amd
@pytest.mark.parametrize("user", [0, 65534], ids=["root", "nobody"])
def test_the_example_in_c_sees_its_own(publisher: h.Device, program: Path, user: int) -> None:
    """Also in a PID namespace of its own, where its number is not the one that the kernel tells."""
    readers = publisher.stats().readers
    namespace = ["unshare", "--pid", "--fork", "--kill-child"] if user else []
    # What unshare's --kill-child asked for is undone by another user's credentials.
    drop = ["setpriv", f"--reuid={user}", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all",
            "--pdeathsig=KILL"]  # fmt: skip
    argv = [*namespace, *(drop if user else []), str(program)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            while publisher.stats().readers == readers and process.poll() is None:
                select.select([process.stdout], [], [], 0.05)
            assert process.poll() is None
            (pid,) = (
                [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
                if user
                else [process.pid]
            )
            data = next(
                int(line.split("-")[0], 16)
                for line in Path(f"/proc/{pid}/maps").read_text("utf-8").splitlines()
                if line.endswith("/hwerr-poll") and " rw" in line
            )
            pfn = pagemap.pfn_of(pid, data)
            with Injector() as injector:
                injector.hit(1 << 30)
                injector.hit(pfn * 4096)
            lines = [process.stdout.readline().rstrip()]
            while not lines[-1].startswith("  task "):
                lines.append(process.stdout.readline().rstrip())
        finally:
            process.kill()
            # Until the last that has it is gone.
            process.stdout.read()
    # The first error, of somebody else's memory, it is not told.
    assert re.fullmatch(r"\d+ corrected source 0", lines[0])
    assert lines[1:-1] == ([] if user else [f"  memory {pfn * 4096:#x} len 4096"])
    assert lines[-1] == f"  task pid {pid} hwerr-poll va {data:#x} len 4096"


def test_the_example_in_c(publisher: h.Device, program: Path) -> None:
    readers = publisher.stats().readers
    with subprocess.Popen([program, "-a"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            # It is there when it has opened the file. Nothing else tells, so the number is asked for again.
            while publisher.stats().readers == readers and process.poll() is None:
                select.select([process.stdout], [], [], 0.05)
            seq = publisher.info().next_seq
            publisher.publish(
                record(1, S.FATAL, h.Guest(5, hva=0x7000, gpa=0x5000, len=4096, comm="qemu"), h.Edac(0)),
                record(2, S.RECOVERABLE, h.Task(6, va=0x8000, len=64, comm="task"), h.Memory(0x9000, 64)),
            )
            lines = [process.stdout.readline().rstrip() for _ in range(5)]
        finally:
            process.kill()
    assert lines == [
        f"{seq} fatal source 9",
        "  guest pid 5 qemu hva 0x7000 gpa 0x5000 len 4096",
        f"{seq + 1} recoverable source 9",
        "  task pid 6 task va 0x8000 len 64",
        "  memory 0x9000 len 64",
    ]
