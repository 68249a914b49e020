# SPDX-License-Identifier: MIT
"""The bindings say what the header says."""

from __future__ import annotations

import hashlib
import re
from enum import IntEnum, IntFlag
from pathlib import Path

import pytest

import hwerr_notify as h
from hwerr_notify._uapi import ffi, lib
from hwerr_notify.layout import Layout

HEADER = Path(__file__).resolve().parents[2] / "kmod/uapi/hwerr.h"


def test_the_bindings_are_of_this_header() -> None:
    built = ffi.string(lib.HWERR_HEADER_SHA256).decode()
    assert built == hashlib.sha256(HEADER.read_bytes()).hexdigest(), "run: .venv/bin/pip install -e ."


@pytest.mark.parametrize(
    ("members", "name", "prefix"),
    [
        (h.Severity, "hwerr_severity", "HWERR_SEV_"),
        (h.Source, "hwerr_source", "HWERR_SRC_"),
        (h.Kind, "hwerr_kind", "HWERR_KIND_"),
        (h.Component, "hwerr_component", "HWERR_COMP_"),
        (h.InfoType, "hwerr_info_type", "HWERR_INFO_"),
    ],
)
def test_every_enumerator_has_a_member(members: type[IntEnum], name: str, prefix: str) -> None:
    values = ffi.typeof(f"enum {name}").relements
    values.pop(f"{prefix}COUNT")
    assert {prefix + m.name: m.value for m in members} == values


@pytest.mark.parametrize(
    ("members", "prefix"),
    [(h.Flags, "HWERR_F_"), (h.GuestFlags, "HWERR_GUEST_"), (h.TaskFlags, "HWERR_TASK_")],
)
def test_every_flag_has_a_member(members: type[IntFlag], prefix: str) -> None:
    values = {n: getattr(lib, n) for n in dir(lib) if n.startswith(prefix) and n != "HWERR_F_ALL"}
    assert {f"{prefix}{m.name}": m.value for m in members} == values


def test_every_macro_of_the_header_is_there() -> None:
    text = HEADER.read_text(encoding="utf-8")
    names = set(re.findall(r"^#define (HWERR_\w+)[ \t]+\S", text, re.MULTILINE))
    assert len(names) > 30
    assert names <= set(dir(lib))


def test_every_struct_can_be_described() -> None:
    names = set(re.findall(r"^struct (\w+) \{", HEADER.read_text(encoding="utf-8"), re.MULTILINE))
    assert len(names) >= 14
    for name in names:
        layout = Layout(name)
        assert layout.size == ffi.sizeof(f"struct {name}")
        fields = layout.unpack(bytes(layout.size))
        assert layout.unpack(layout.pack(fields)) == fields


def test_a_layout_puts_each_field_where_the_compiler_does() -> None:
    layout = Layout("hwerr_record")
    for name, field in ffi.typeof("struct hwerr_record").fields:
        raw = layout.pack({name: 1})
        assert [n for n, byte in enumerate(raw) if byte] == [field.offset]


def test_public_names_can_be_had() -> None:
    for name in h.__all__:
        assert getattr(h, name) is not None
    assert set(h.__all__) <= set(dir(h))
    with pytest.raises(AttributeError):
        h.nothing_of_that_name  # noqa: B018
