# SPDX-License-Identifier: MIT
"""kmod/classify.h, compiled on this machine with the host's compiler and called from Python."""

from __future__ import annotations

import importlib.util
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from cffi import FFI

from hwerr_notify import Component, Flags, Kind, Severity

KMOD = Path(__file__).resolve().parents[2] / "kmod"

_DECLARATIONS = """
struct hwerr_class { uint8_t severity; uint8_t kind; uint8_t component; uint32_t flags; };
struct hwerr_info_mce {
    uint64_t status, addr, misc, mcgstatus, mcgcap, ipid; uint32_t cpuid; uint8_t bank, vendor, cs; ...;
};
struct hwerr_class hwerr_class_mce(const struct hwerr_info_mce *, uint32_t);
int hwerr_mce_addr_is_physical(const struct hwerr_info_mce *, uint32_t);
int hwerr_mce_is_memory(const struct hwerr_info_mce *, uint32_t);
int hwerr_mce_is_yellow(const struct hwerr_info_mce *);
uint64_t hwerr_mce_addr_len(const struct hwerr_info_mce *);
uint64_t hwerr_mce_status_ident(const struct hwerr_info_mce *);
uint32_t hwerr_mce_count(const struct hwerr_info_mce *);
struct hwerr_class hwerr_class_aer(uint32_t);
struct hwerr_class hwerr_class_edac(uint32_t);
struct hwerr_class hwerr_class_memfail(int32_t, int);
struct hwerr_class hwerr_class_cper(uint32_t, uint8_t);
struct hwerr_class hwerr_class_ghes(uint32_t, uint8_t);
uint8_t hwerr_cper_component(const uint8_t *);
"""

EXCEPTION, KERNEL_RECOV, SMCA, OVERFLOW_RECOV, SUCCOR = 1, 2, 4, 8, 16
INTEL, AMD, HYGON, ZHAOXIN = 0, 2, 9, 10
SER, TES, CMCI = 1 << 24, 1 << 11, 1 << 10


class Class(NamedTuple):
    """What the classifier answers."""

    severity: Severity
    kind: Kind
    component: Component
    action_required: bool


@cache
def _built() -> Any:
    ffi = FFI()
    ffi.cdef(_DECLARATIONS)
    ffi.set_source(
        "_classify",
        '#include "classify.h"',
        include_dirs=[str(KMOD)],
        extra_compile_args=["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter",
                            "-Wno-unused-function"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        spec = importlib.util.spec_from_file_location("_classify", ffi.compile(directory))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def _class(c: Any) -> Class:
    flags = Flags(c.flags)
    assert not flags & ~Flags.ACTION_REQUIRED
    return Class(Severity(c.severity), Kind(c.kind), Component(c.component), bool(flags))


def _mce(fields: dict[str, int]) -> Any:
    return _built().ffi.new("struct hwerr_info_mce *", fields)


def mce(facts: int = 0, **fields: int) -> Class:
    """Class of a machine check; `fields` of struct hwerr_info_mce, the others zero."""
    return _class(_built().lib.hwerr_class_mce(_mce(fields), facts))


def mce_is(name: str, facts: int = 0, **fields: int) -> bool:
    """hwerr_mce_<name>() of the two that take facts."""
    return bool(getattr(_built().lib, f"hwerr_mce_{name}")(_mce(fields), facts))


def mce_get(name: str, **fields: int) -> int:
    """hwerr_mce_<name>() of those that take the registers alone."""
    return int(getattr(_built().lib, f"hwerr_mce_{name}")(_mce(fields)))


def by_number(source: str, *args: int) -> Class:
    """hwerr_class_<source>() of the sources that have a number."""
    return _class(getattr(_built().lib, f"hwerr_class_{source}")(*args))


def cper_component(guid: bytes) -> Component:
    return Component(_built().lib.hwerr_cper_component(guid))
