# SPDX-License-Identifier: MIT
"""The parser: what it gives, what it refuses, what it keeps of the future."""

from __future__ import annotations

import pickle
import struct
from typing import Any
from uuid import UUID

import pytest
from event_strategies import events, heads, infos
from hypothesis import given
from hypothesis import strategies as st

import hwerr_notify as h
from hwerr_notify._uapi import ffi, lib

HEAD = ffi.sizeof("struct hwerr_record")
MEMORY = h.Memory(0xAE00000, 4096)
SAMPLE = h.build(MEMORY, h.Task(300, va=0x7F0000000000, len=4096, comm="postgres"),
                 severity=h.Severity.RECOVERABLE, source=h.Source.MCE, seq=17)  # fmt: skip


def offset(field: str, of: str = "hwerr_record") -> int:
    return int(ffi.offsetof(f"struct {of}", field))


def patched(event: h.Event, at: int, form: str, value: int) -> bytes:
    raw = bytearray(event.raw)
    struct.pack_into(f"={form}", raw, at, value)
    return bytes(raw)


def parse_or_error(data: bytes) -> list[h.Event] | None:
    """The records, None if the error about them is a good one. Anything else is raised."""
    error = None
    try:
        return h.parse(data)
    except h.RecordError as caught:
        error = caught
    assert 0 <= error.offset < len(data)
    return None


@given(st.lists(infos, max_size=5), heads)
def test_what_is_built_is_what_is_parsed(parts: list[h.Info], head: dict[str, Any]) -> None:
    event = h.Event.from_bytes(h.build(*parts, **head).raw)
    assert event.infos == tuple(parts)
    assert {name: getattr(event, name) for name in head} == head


@given(st.lists(events, max_size=6))
def test_a_buffer_gives_its_records_in_order(several: list[h.Event]) -> None:
    assert h.parse(h.encode(several)) == several


@given(st.binary(max_size=600))
def test_arbitrary_bytes_are_an_error_or_records_that_work(data: bytes) -> None:
    found = parse_or_error(data)
    if found is not None:
        assert h.encode(found) == data


@given(events, st.data())
def test_a_damaged_record_is_an_error_or_a_record_that_works(event: h.Event, data: st.DataObject) -> None:
    raw = bytearray(event.raw)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    for one in parse_or_error(bytes(raw)) or []:
        assert one.message.isprintable()
        assert one.to_json()["seq"] == one.seq


@given(events, st.integers(1, 64))
def test_a_cut_record_is_an_error(event: h.Event, cut: int) -> None:
    with pytest.raises(h.RecordError):
        h.parse(event.raw[: max(1, len(event.raw) - cut)])


def test_nothing_is_no_record() -> None:
    assert h.parse(b"") == []
    with pytest.raises(h.RecordError):
        h.Event.from_bytes(b"")
    with pytest.raises(h.RecordError, match="2 records"):
        h.Event.from_bytes(SAMPLE.raw * 2)


@pytest.mark.parametrize(
    ("at", "form", "value", "where"),
    [
        (offset("len"), "I", 0, 0),
        (offset("len"), "I", HEAD - 8, 0),
        (offset("len"), "I", len(SAMPLE.raw) + 8, 0),
        (offset("len"), "I", len(SAMPLE.raw) - 4, 0),
        (offset("len"), "I", 0xFFFFFFF8, 0),
        (offset("hdr_len"), "H", 0, 0),
        (offset("hdr_len"), "H", HEAD - 8, 0),
        (offset("hdr_len"), "H", HEAD + 4, 0),
        (offset("hdr_len"), "H", 0xFFF8, 0),
        (HEAD, "I", 0, HEAD),
        (HEAD, "I", 12, HEAD),
        (HEAD, "I", 8, HEAD),
        (HEAD, "I", 0xFFFFFFF8, HEAD),
        (HEAD + 40, "I", 64, HEAD + 40),
        (HEAD + 40, "I", 48, HEAD + 40),
    ],
)
def test_a_wrong_length_is_told_with_its_offset(at: int, form: str, value: int, where: int) -> None:
    good = SAMPLE.raw
    with pytest.raises(h.RecordError) as caught:
        h.parse(good + patched(SAMPLE, at, form, value))
    assert caught.value.offset == len(good) + where
    assert str(len(good) + where) in str(caught.value)


def test_cper_data_beyond_its_info_is_an_error() -> None:
    event = h.build(h.Cper(UUID(int=5), data=b"abc"), severity=h.Severity.FATAL)
    at = HEAD + offset("data_len", "hwerr_info_cper")
    (cper,) = h.parse(patched(event, at, "I", 8))[0].infos
    assert isinstance(cper, h.Cper)
    assert cper.data == b"abc" + bytes(5)
    with pytest.raises(h.RecordError):
        h.parse(patched(event, at, "I", 9))


def test_a_longer_head_and_longer_infos_are_stepped_over() -> None:
    head = bytearray(SAMPLE.raw[:HEAD] + b"new head" * 2)
    memory = bytearray(SAMPLE.raw[HEAD : HEAD + 40] + b"new tail")
    task = SAMPLE.raw[HEAD + 40 :]
    struct.pack_into("=I", memory, 0, len(memory))
    struct.pack_into("=IH", head, 0, len(head) + len(memory) + len(task), len(head))
    newer = bytes(head + memory + task)
    first, second = h.parse(newer + SAMPLE.raw)
    assert first.infos == SAMPLE.infos
    assert second == SAMPLE
    assert first.with_lost(5).infos == SAMPLE.infos
    assert h.Event.from_bytes(first.with_lost(5).raw).lost == 5


def test_numbers_of_the_future_are_kept() -> None:
    raw = bytearray(SAMPLE.raw)
    for field in ("severity", "source", "kind", "component"):
        raw[offset(field)] = 200
    struct.pack_into("=I", raw, offset("flags"), 1 << 31 | lib.HWERR_F_SOFTWARE)
    event = h.Event.from_bytes(bytes(raw))
    assert event.severity == 200
    assert event.severity > h.Severity.FATAL
    assert event.severity is h.Severity(200)
    assert event.severity.name == "UNKNOWN(200)"
    assert not event.severity.known
    assert event.flags == h.Flags.SOFTWARE | 1 << 31
    form = event.to_json()
    assert (form["severity"], form["source"], form["kind"]) == ("unknown(200)",) * 3
    assert event.message
    assert list(h.Severity)[-1] is h.Severity.FATAL


def test_an_unknown_info_is_kept_as_bytes() -> None:
    event = h.build(h.Unknown(999, b"12345678"), MEMORY, severity=h.Severity.INFO)
    assert event.infos == (h.Unknown(999, b"12345678"), MEMORY)
    assert event.memory == MEMORY


def test_bytes_that_are_no_utf8_are_shown_as_escapes() -> None:
    event = h.build(h.Task(1, comm="abc"), severity=h.Severity.INFO)
    raw = event.raw.replace(b"abc\0", b"a\xff\x1b\0")
    assert h.Event.from_bytes(raw).tasks[0].comm == "a\\xff\x1b"
    assert "\x1b" not in h.Event.from_bytes(raw).message


def test_a_text_is_cut_between_characters() -> None:
    event = h.build(h.Task(1, comm="é" * 20), text="x" * 5000, severity=h.Severity.INFO)
    assert event.tasks[0].comm == "é" * 7
    assert len(event.raw) == h.RECORD_MAX
    assert event.text is not None
    assert set(event.text) == {"x"}
    assert h.Flags.INFO_TRUNCATED in event.flags
    assert h.build(text="short", severity=h.Severity.INFO).flags == 0


def test_no_kvm_guest_has_no_gpa() -> None:
    event = h.build(h.Guest(5, hva=0x1000, len=4096), severity=h.Severity.FATAL)
    at = HEAD + offset("gpa", "hwerr_info_guest")
    assert struct.unpack_from("=Q", event.raw, at) == (lib.HWERR_NO_GPA,)
    assert event.guests[0].gpa is None


def test_events_are_values() -> None:
    twin = h.Event.from_bytes(SAMPLE.raw)
    assert twin == SAMPLE
    assert hash(twin) == hash(SAMPLE)
    assert len({twin, SAMPLE}) == 1
    assert bytes(twin) == SAMPLE.raw
    assert pickle.loads(pickle.dumps(twin)) == twin
    with pytest.raises(AttributeError):
        twin.raw = b""  # type: ignore[misc]
    with pytest.raises(AttributeError):
        twin.infos[0].phys_addr = 1  # type: ignore[misc, union-attr]


def test_a_name_does_not_change_the_record() -> None:
    event = h.build(h.Guest(5, hva=1, len=1), severity=h.Severity.FATAL)
    uuid = UUID(int=7)
    named = event.named(lambda guest: ("web1", uuid))
    assert named == event
    assert (named.guests[0].name, named.guests[0].uuid) == ("web1", uuid)
    assert event.guests[0].name is None
    assert SAMPLE.named(lambda guest: ("x", None)) is SAMPLE


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        h.build(severity=h.Severity.INFO, cpu=1 << 40)
    with pytest.raises(ValueError, match="fewer infos"):
        h.build(*[MEMORY] * 200, severity=h.Severity.INFO)
    with pytest.raises(ValueError, match="does not fit"):
        h.build(h.Pci(0, 0, 0, tlp=(1, 2, 3)), severity=h.Severity.INFO)  # type: ignore[arg-type]


def test_parse_takes_any_buffer() -> None:
    for data in (bytearray(SAMPLE.raw), memoryview(SAMPLE.raw), memoryview(b"x" + SAMPLE.raw)[1:]):
        assert h.parse(data) == [SAMPLE]
