# SPDX-License-Identifier: MIT
"""Hypothesis strategies for records and their parts."""

from __future__ import annotations

from hypothesis import strategies as st

import hwerr_notify as h
from hwerr_notify._uapi import lib

u8, u16, u32, u64 = (st.integers(0, (1 << n) - 1) for n in (8, 16, 32, 64))
s32 = st.integers(-(1 << 31), (1 << 31) - 1)
layer = st.integers(-1, 255)


def short_text(size: int) -> st.SearchStrategy[str]:
    """Text without NUL that fits `size` bytes with its NUL, surrogates excluded."""
    alphabet = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    return st.text(alphabet, max_size=size).filter(lambda t: len(t.encode()) < size)


mces = st.builds(
    h.Mce, status=u64, addr=u64, misc=u64, mcgstatus=u64, mcgcap=u64, synd=u64, ipid=u64, ppin=u64, tsc=u64,
    ip=u64, cpuid=u32, microcode=u32, socket=u32, apicid=u32, bank=u8, vendor=u8, cs=u8,
)  # fmt: skip
pcis = st.builds(
    h.Pci, domain=u32, bus=u8, devfn=u8, status=u32, flags=u32, tlp=st.tuples(u32, u32, u32, u32), vendor=u16,
    device=u16,
)  # fmt: skip
edacs = st.builds(
    h.Edac, mc=s32, top=layer, mid=layer, low=layer, syndrome=u64, grain=u64,
    label=short_text(lib.HWERR_LABEL_MAX),
)  # fmt: skip
memories = st.builds(h.Memory, phys_addr=u64, phys_len=u64, resolve_ns=u32, mf_type=s32, mf_result=s32)
guests = st.builds(
    h.Guest, pid=s32, flags=u32.map(h.GuestFlags), start_ns=u64, vm_id=u64, hva=u64,
    gpa=st.none() | st.integers(0, lib.HWERR_NO_GPA - 1), len=u64, slot=u32, comm=short_text(16),
    name=st.none(), uuid=st.none(),
)  # fmt: skip
tasks = st.builds(
    h.Task, pid=s32, flags=u32.map(h.TaskFlags), start_ns=u64, va=u64, len=u64, comm=short_text(16)
)
texts = st.builds(h.Text, short_text(200))
cpers = st.builds(
    h.Cper, section=st.uuids(), fru_id=st.none() | st.uuids().filter(lambda u: u.int),
    fru_text=short_text(24), flags=u32, etype=u32, data=st.binary(max_size=300),
)  # fmt: skip
stops = st.builds(h.Stop, pid=s32, vcpus=u32, start_ns=u64, mono_ns=u64, running=u32)
vcpus = st.builds(
    h.Vcpu, vcpu=s32, exit_reason=u32, suberror=u32, error=s32, rip=st.none() | u64, detail=u64,
    insn=st.binary(max_size=16),
)  # fmt: skip
blocks = st.builds(
    h.Block, major=u32, minor=u32, sector=u64, bytes=u64, op=u32, status=u32, disk=short_text(32)
)
unknowns = st.builds(
    h.Unknown,
    u16.filter(lambda n: n not in set(h.InfoType)),
    st.binary(max_size=64).map(lambda b: b + bytes(-len(b) % 8)),
)
infos = st.one_of(
    mces, pcis, edacs, memories, guests, tasks, texts, cpers, stops, vcpus, blocks, unknowns
)  # fmt: skip

heads = st.fixed_dictionaries(
    {
        "severity": u8.map(h.Severity),
        "source": u8.map(h.Source),
        "kind": u8.map(h.Kind),
        "component": u8.map(h.Component),
        "flags": u32.map(h.Flags),
        "cpu": st.none() | st.integers(0, (1 << 31) - 1),
        "count": u32,
        "raw_severity": u32,
        "seq": u64,
        "id": u64,
        "lost": u64,
        "time_mono_ns": u64,
        "time_real_ns": u64,
    }
)
events = st.builds(lambda parts, head: h.build(*parts, **head), st.lists(infos, max_size=5), heads)
