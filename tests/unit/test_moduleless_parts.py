# SPDX-License-Identifier: MIT
"""What is made of the samples of the mode without the module: events, repetitions, links."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("hwerr_notify._libbpf")

from hwerr_notify import Event, Flags, Mce, Severity, Source
from hwerr_notify.bpf import _library
from hwerr_notify.cli import watch
from hwerr_notify.device import Filter
from hwerr_notify.event import _put
from hwerr_notify.moduleless import _BATCH, Moduleless, _Book, _compose, _layouts

PAGE = 4096
SECOND = 10**9
KVM, SLOT, GONE = 1, 2, 4


def sample(*whos: dict[str, Any], data: bytes = b"", **fields: Any) -> bytes:
    head, who = _layouts()
    fields = {"time_ns": SECOND, "count": 1, "mf_type": -1, "mf_result": -1, "whos": len(whos), **fields}
    return head.pack(fields) + b"".join(who.pack(w) for w in whos) + data


def owner(pid: int, va: int, **more: Any) -> dict[str, Any]:
    return {"tgid": pid, "va": va, "len": PAGE, "start_ns": pid * SECOND, "comm": b"name", **more}


def slot(of: int, va: int, gpa: int, vm: int = 7) -> dict[str, Any]:
    return {"flags": SLOT, "owner": of, "va": va, "len": PAGE, "gpa": gpa, "vm": vm, "slot": 3}


REPEATED: dict[str, Any] = {
    "severity": 1, "source": int(Source.EDAC), "ident": (1, 2, 3, 4), "phys_addr": 0x9000, "phys_len": PAGE,
}  # fmt: skip


def corrected(mono_ns: int, **more: Any) -> bytes:
    return sample(time_ns=mono_ns, severity=1, source=int(Source.EDAC), ident=(1, 2, 3, 4), **more)


def test_owners_come_as_the_module_lists_them() -> None:
    event, _ = _compose(
        sample(
            owner(10, 0x1000),
            owner(11, 0x2000, flags=GONE),
            owner(12, 0x3000, exe=b"qemu-system-x86"),
            owner(13, 0x4000, flags=KVM, vm=7),
            owner(14, 0x5000, flags=KVM, vm=9),
            slot(3, 0x4000, 0xA000),
            slot(3, 0x4000, 0xB000),
            severity=3, source=int(Source.MCE), phys_addr=0x9000, phys_len=PAGE, resolve_ns=5,
        )
    )  # fmt: skip
    assert [(g.pid, g.hva, g.gpa, g.kvm) for g in event.guests] == [
        (13, 0x4000, 0xA000, True), (13, 0x4000, 0xB000, True), (14, 0x5000, None, True),
        (12, 0x3000, None, False),
    ]  # fmt: skip
    assert [(t.pid, t.va, t.len, t.comm) for t in event.tasks] == [(10, 0x1000, PAGE, "name")]
    ids = [g.vm_id for g in event.guests]
    assert ids[0] == ids[1] != ids[2] != 0
    assert ids[3] == 0
    # The kernel's pointers are nobody's business.
    assert 7 not in ids
    assert event.memory is not None
    assert (event.memory.phys_addr, event.memory.resolve_ns, event.memory.result) == (0x9000, 5, None)


def test_more_owners_than_a_record_has_room_for() -> None:
    whos = [owner(13, 0x4000, flags=KVM, vm=7), *(slot(0, 0x4000, n * PAGE) for n in range(63))]
    event, _ = _compose(sample(*whos, severity=3, phys_len=PAGE))
    assert Flags.OWNERS_TRUNCATED in event.flags
    assert 30 < len(event.guests) < 63


def test_an_info_is_taken_as_it_is() -> None:
    mce = Mce(status=1 << 63, addr=0x1234, bank=4, vendor=2)
    body = _put(mce)
    event, _ = _compose(sample(body=body, body_len=len(body), severity=1))
    assert event.mce == mce


def test_text_of_each_source() -> None:
    edac, _ = _compose(sample(source=int(Source.EDAC), text=b"one", detail=b"two"))
    assert edac.text == "one: two"
    failure, _ = _compose(sample(source=int(Source.MEMORY_FAILURE), text=b"dirty page", mf_flags=0x20))
    assert failure.text == "dirty page (simulated)"


def test_repetitions_are_counted_with_the_first() -> None:
    book = _Book()
    first = book.enter(*_compose(corrected(SECOND)))
    assert first is not None
    for n in range(3):
        assert book.enter(*_compose(corrected(SECOND + n, count=2))) is None
    # Another one is not among them.
    assert book.enter(*_compose(sample(severity=1, source=int(Source.MCE), ident=(1, 2, 3, 4)))) is not None
    assert book.due() == 2 * SECOND
    assert not book.over(2 * SECOND - 1)
    (told,) = book.over(2 * SECOND)
    assert (told.count, told.id, told.seq) == (6, first.id, 3)
    assert Flags.COALESCED in told.flags
    assert book.due() == 0
    assert (book.errors, book.records, book.coalesced) == (8, 3, 6)


def test_repetitions_have_the_owners_of_the_last() -> None:
    book = _Book()
    for n, pid in enumerate((10, 11, 12)):
        book.enter(*_compose(sample(owner(pid, 0x1000), time_ns=SECOND + n, **REPEATED)))
    (told,) = book.over(3 * SECOND)
    assert ([t.pid for t in told.tasks], told.count) == ([12], 2)


def test_uncorrected_errors_are_never_repetitions() -> None:
    book = _Book()
    raw = sample(severity=3, source=int(Source.EDAC), ident=(1, 2, 3, 4))
    assert [book.enter(*_compose(raw)) is not None for _ in range(3)] == [True] * 3


def hit(book: _Book, source: Source, severity: Severity, at: int, addr: int = 0x9000) -> Event:
    raw = sample(
        time_ns=at,
        severity=int(severity),
        source=int(source),
        phys_addr=addr,
        phys_len=PAGE,
        ident=(at, 0, 0, 0),
    )
    event = book.enter(*_compose(raw))
    assert event is not None
    return event


def test_records_of_one_error_are_linked() -> None:
    book = _Book()
    first = hit(book, Source.MCE, Severity.RECOVERABLE, SECOND)
    second = hit(book, Source.MEMORY_FAILURE, Severity.FATAL, 2 * SECOND)
    assert (second.id, Flags.LINKED in second.flags) == (first.id, True)
    # Counted once, as the worst.
    assert (book.errors, book.linked) == (1, 1)
    assert (book.by_severity[Severity.RECOVERABLE], book.by_severity[Severity.FATAL]) == (0, 1)
    # The same source again, other memory, a corrected one, or later: another error.
    for other in (
        hit(book, Source.MCE, Severity.RECOVERABLE, 3 * SECOND),
        hit(book, Source.EDAC, Severity.RECOVERABLE, 3 * SECOND, addr=0xF000),
        hit(book, Source.EDAC, Severity.CORRECTED, 3 * SECOND),
        hit(book, Source.CPER, Severity.RECOVERABLE, 30 * SECOND),
    ):
        assert other.id == other.seq
        assert Flags.LINKED not in other.flags
    assert book.errors == 5


def test_a_full_table_forgets_none_that_has_something_to_tell() -> None:
    book = _Book()
    for n in range(32):
        for _ in range(2):
            raw = sample(time_ns=SECOND + n, severity=1, source=int(Source.EDAC), ident=(n + 1, 0, 0, 0))
            book.enter(*_compose(raw))
    extra = sample(time_ns=SECOND + 40, severity=1, source=int(Source.EDAC), ident=(99, 0, 0, 0))
    assert [book.enter(*_compose(extra)) is not None for _ in range(2)] == [True, True]
    assert sum(e.count for e in book.over(3 * SECOND)) == 32
    assert book.errors == 66


class Buffer:
    """A ring buffer without a kernel behind it."""

    def __init__(self, reader: Moduleless) -> None:
        self.samples: deque[bytes] = deque()
        self._reader = reader

    def consume(self) -> None:
        while self.samples:
            self._reader._sample(self.samples.popleft())


@pytest.fixture
def reader() -> Iterator[Moduleless]:
    """One whose buffers hold what a test puts there."""
    device = Moduleless.__new__(Moduleless)
    _, device._lib = _library()
    device._timer = device._lib.hwerr_timer_new()
    device._fd = device._timer
    device._names = None
    device._ready = deque()
    device._filter = Filter()
    device._book = _Book()
    device._samples = []
    device._room = device._read = device._lost = device._pending = device._carried = 0
    device._passed = {}
    device._dropped = {bytes(4): bytes(1024)}  # type: ignore[assignment]
    device._programs = SimpleNamespace(misses=dict)  # type: ignore[assignment]
    device._rings = [Buffer(device), Buffer(device)]  # type: ignore[list-item]
    yield device
    device._fd = -1
    os.close(device._timer)


def fill(reader: Moduleless, n: int, ident: int, **more: Any) -> None:
    now = time.monotonic_ns()
    buffer: Any = reader._rings[0]
    for order in range(len(buffer.samples), len(buffer.samples) + n):
        fields = {"severity": 1, "source": int(Source.EDAC), "order": order, "time_ns": now, **more}
        buffer.samples.append(sample(ident=(ident, 0, 0, 0), **fields))


def test_a_batch_of_repetitions_hides_nothing_behind_it(reader: Moduleless) -> None:
    fill(reader, 1 + 3 * _BATCH, ident=1)
    fill(reader, 1, ident=2)
    assert [e.count for e in reader.drain()] == [1, 1]
    assert reader.stats().coalesced == 3 * _BATCH


def test_a_batch_that_the_filter_drops_hides_nothing_behind_it(reader: Moduleless) -> None:
    reader._filter = Filter(sources=frozenset({Source.MCE}))
    for n in range(2 * _BATCH):
        fill(reader, 1, ident=n + 1)
    fill(reader, 1, ident=1, source=int(Source.MCE))
    assert [e.source for e in reader.read(0)] == [Source.MCE]


def test_now_is_behind_all_that_there_was(reader: Moduleless) -> None:
    fill(reader, 1 + 3 * _BATCH, ident=1)
    fill(reader, 1, ident=2)
    reader.seek("now")
    assert reader.drain() == []


def test_watch_shows_all_that_there_was_when_its_time_is_over(
    reader: Moduleless, capfd: pytest.CaptureFixture[str]
) -> None:
    reader._maps = [SimpleNamespace(max_entries=1)] * 3  # type: ignore[list-item]
    reader._programs.attached = []
    for n in range(3 * _BATCH):
        fill(reader, 1, ident=n + 1)
    assert watch.follow(reader, watch.parser().parse_args(["--json", "--timeout", "0"])) == 0
    assert capfd.readouterr().out.count("\n") == 3 * _BATCH


def test_losses_are_told_by_the_next_that_is_read(reader: Moduleless) -> None:
    """Whether it was reported before the gap or after: the programs count, and do not say when."""
    fill(reader, 1, ident=1)
    dropped = bytearray(1024)
    dropped[8 * (16 + int(Source.EDAC))] = 7
    reader._dropped = {bytes(4): bytes(dropped)}  # type: ignore[assignment]
    assert reader.read(0)[0].lost == 7
    fill(reader, 1, ident=2)
    assert reader.read(0)[0].lost == 0
    stats = reader.stats()
    assert (stats.reader_lost, stats.dropped, stats.reader_pending) == (7, 7, 0)


def test_a_storm_is_not_waited_out(reader: Moduleless) -> None:
    """What comes faster than it is read, and is not wanted, keeps nobody."""
    reader._filter = Filter(sources=frozenset({Source.AER}))
    buffer: Any = reader._rings[0]

    def consume() -> None:
        for _ in range(_BATCH):
            fill(reader, 1, ident=0)
        type(buffer).consume(buffer)

    buffer.consume = consume
    assert reader.read(0) == []
    reader.seek("now")
