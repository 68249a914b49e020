# SPDX-License-Identifier: MIT
"""The public JSON form of an event; docs/json.md is its reference."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from .enums import Flags, Kind
from .event import Block, Cper, Edac, Event, Guest, Mce, Memory, Pci, Stop, Task, Vcpu
from .message import aer_names

__all__ = ["boot_id", "rfc3339", "to_json"]


@lru_cache(maxsize=1)
def boot_id() -> str | None:
    """Identity of this boot, None if the kernel does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def rfc3339(ns: int) -> str | None:
    """UTC with nanoseconds of ns since the epoch, None for 0."""
    if not ns:
        return None
    seconds, rest = divmod(ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def _mce(m: Mce) -> dict[str, Any]:
    return {
        "bank": m.bank,
        "status": hex(m.status),
        "misc": hex(m.misc) if m.misc_valid else None,
        "addr": hex(m.addr) if m.addr_valid else None,
        "mcgstatus": hex(m.mcgstatus),
        "socket": m.socket,
        "mcgcap": hex(m.mcgcap),
        "synd": hex(m.synd) if m.synd else None,
        "ipid": hex(m.ipid) if m.ipid else None,
        "ppin": hex(m.ppin) if m.ppin else None,
        "tsc": hex(m.tsc) if m.tsc else None,
        "ip": hex(m.ip) if m.ip_valid else None,
        "cs": m.cs,
        "cpuid": hex(m.cpuid),
        "microcode": hex(m.microcode),
        "apicid": m.apicid,
        "vendor": m.vendor,
    }


def _pci(event: Event, p: Pci) -> dict[str, Any]:
    return {
        "device": p.address,
        "status": hex(p.status),
        "names": aer_names(event, p),
        "vendor_id": None if p.vendor == 0xFFFF else hex(p.vendor),
        "device_id": None if p.vendor == 0xFFFF else hex(p.device),
        "tlp": [hex(word) for word in p.tlp] if p.tlp_valid else None,
    }


def _edac(e: Edac) -> dict[str, Any]:
    return {
        "mc": e.mc,
        "layers": list(e.layers),
        "label": e.label,
        "grain": e.grain,
        "syndrome": hex(e.syndrome),
    }


def _memory_failure(m: Memory) -> dict[str, Any]:
    return {"result": str(m.result), "page_type": m.mf_type}


def _cper(c: Cper) -> dict[str, Any]:
    return {
        "section": str(c.section),
        "fru_id": str(c.fru_id) if c.fru_id else None,
        "fru_text": c.fru_text,
        "etype": c.etype,
        "data": c.data.hex(),
    }


def _vcpu(v: Vcpu) -> dict[str, Any]:
    return {
        "vcpu": v.vcpu,
        "exit_reason": v.exit_reason,
        "suberror": v.suberror,
        "error": v.error,
        "rip": None if v.rip is None else hex(v.rip),
        "detail": hex(v.detail),
        "insn": v.insn.hex() if v.insn else None,
    }


def _block(b: Block) -> dict[str, Any]:
    return {
        "disk": b.disk,
        "device": f"{b.major}:{b.minor}",
        "sector": b.sector,
        "bytes": b.bytes,
        "op": b.op,
        "status": b.status,
    }


def _guest(g: Guest, pci: Pci | None) -> dict[str, Any]:
    return {
        "pid": g.pid,
        "comm": g.comm,
        "name": g.name,
        "uuid": str(g.uuid) if g.uuid else None,
        "kvm": g.kvm,
        "hva": None if g.as_a_whole else hex(g.hva),
        "gpa": None if g.gpa is None else hex(g.gpa),
        "len": g.len,
        "device": pci.address if g.by_device and pci else None,
        "stopped": g.stopped,
        "slot": g.slot,
        "vm_id": hex(g.vm_id) if g.vm_id else None,
        "start_ns": g.start_ns,
    }


def _task(t: Task, pci: Pci | None) -> dict[str, Any]:
    return {
        "pid": t.pid,
        "comm": t.comm,
        "va": None if t.by_device else hex(t.va),
        "len": t.len,
        "device": pci.address if t.by_device and pci else None,
        "start_ns": t.start_ns,
    }


def _stop(s: Stop) -> dict[str, Any]:
    return {
        "pid": s.pid,
        "start_ns": s.start_ns,
        "vcpus": s.vcpus,
        "running": s.running,
        "time_mono_ns": s.mono_ns,
    }


def to_json(event: Event) -> dict[str, Any]:
    """See `Event.to_json`."""
    flags, pci = event.flags, event.pci
    out: dict[str, Any] = {
        "seq": event.seq,
        "id": event.id,
        "time": rfc3339(event.time_real_ns),
        "time_mono_ns": event.time_mono_ns,
        "boot_id": None if event.earlier_boot else boot_id(),
        "lost": event.lost,
        "count": event.count,
        "source": event.source.label,
        "severity": event.severity.label,
        "raw_severity": event.raw_severity,
        "kind": None if event.kind == Kind.NONE else event.kind.label,
        "action_required": event.action_required,
        "origin": "software" if event.software else "hardware",
        "component": event.component.label,
        "message": event.message,
        "cpu": event.cpu,
        "coalesced": Flags.COALESCED in flags,
        "linked": Flags.LINKED in flags,
        "earlier": Flags.EARLIER in flags,
        "redacted": Flags.REDACTED in flags,
        "stopped": Flags.STOPPED in flags,
        "owners_unknown": Flags.OWNERS_UNKNOWN in flags,
        "owners_truncated": Flags.OWNERS_TRUNCATED in flags,
        "info_truncated": Flags.INFO_TRUNCATED in flags,
    }
    if memory := event.memory:
        out |= {
            "phys_addr": hex(memory.phys_addr),
            "phys_len": memory.phys_len,
            "resolve_ns": memory.resolve_ns,
        }
        if memory.result is not None:
            out["memory_failure"] = _memory_failure(memory)
    if event.mce:
        out["mce"] = _mce(event.mce)
    if pci:
        out["pci"] = _pci(event, pci)
    if event.edac:
        out["edac"] = _edac(event.edac)
    if event.cper:
        out["cper"] = _cper(event.cper)
    if event.vcpu:
        out["vcpu"] = _vcpu(event.vcpu)
    if event.block:
        out["block"] = _block(event.block)
    if event.text is not None:
        out["text"] = event.text
    if event.stops:
        out["stops"] = [_stop(s) for s in event.stops]
    out["guests"] = [_guest(g, pci) for g in event.guests]
    out["tasks"] = [_task(t, pci) for t in event.tasks]
    return out
