# SPDX-License-Identifier: MIT
"""Messages and the JSON form."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import pytest
from event_strategies import events
from hypothesis import given

import hwerr_notify as h
from hwerr_notify.jsonform import boot_id, rfc3339

S, K, C, F = h.Severity, h.Kind, h.Component, h.Flags


def srao(*more: h.Info, **fields: Any) -> h.Event:
    """The example of the JSON form's reference."""
    given: dict[str, Any] = {
        "severity": S.RECOVERABLE, "source": h.Source.MCE, "kind": K.SRAO, "component": C.MEMORY, "cpu": 0,
        "seq": 17, "id": 17, "count": 1, "time_mono_ns": 5, "time_real_ns": 1767323045123456789,
    }  # fmt: skip
    mce = h.Mce(0xBD000000000000C0, addr=0xAE00000, misc=0x8C, mcgstatus=0x5, bank=9)
    return h.build(mce, h.Memory(0xAE00000, 4096), *more, **given | fields)


def aer(status: int, raw: int, severity: h.Severity, *more: h.Info) -> h.Event:
    return h.build(h.Pci(0, 1, 0, status=status), *more, severity=severity, source=h.Source.AER,
                   component=C.PCIE, raw_severity=raw, count=1)  # fmt: skip


GUEST = h.Guest(251, h.GuestFlags.KVM, hva=0x7F9E70E00000, gpa=0x5000000, len=4096, comm="qemu-system-x86")


def named(event: h.Event) -> h.Event:
    return event.named(lambda guest: ("web1", UUID("12345678-1234-5678-1234-567812345678")))


def test_the_message_says_what_where_and_whom() -> None:
    assert named(srao(GUEST)).message == (
        "uncorrected memory error (found before use) on channel 0, 4 KiB at 0xae00000, in bank 9 of CPU 0, "
        "socket 0; hits VM web1 (pid 251) at guest address 0x5000000"
    )


@pytest.mark.parametrize(
    ("event", "part"),
    [
        (srao(), "hits no process"),
        (srao(flags=F.OWNERS_UNKNOWN), "could not be determined"),
        (srao(GUEST, flags=F.OWNERS_UNKNOWN), "others unknown"),
        (srao(GUEST, flags=F.OWNERS_TRUNCATED), "more than are listed"),
        (srao(GUEST, flags=F.ACTION_REQUIRED, kind=K.SRAR), "(consumed)"),
        (srao(h.Guest(7, h.GuestFlags.KVM | h.GuestFlags.STOPPED, gpa=0, comm="q")), "which was stopped"),
        (srao(*[h.Task(n, va=n, comm="t") for n in range(1, 10)]), "and 5 more"),
        (srao(flags=F.COALESCED, severity=S.CORRECTED, kind=K.NONE, count=37), "repeated 37 times"),
        (h.build(h.Edac(0, 0, 1, label="DIMM_A1"), severity=S.CORRECTED, source=h.Source.EDAC,
                 component=C.MEMORY, count=3), "corrected memory error, 3 times, in DIMM_A1 (controller 0)"),
        (h.build(h.Edac(0, 0, 1), severity=S.CORRECTED, source=h.Source.EDAC, count=1), "mc0 0/1/-"),
        (h.build(h.Memory(0x1000, 1 << 21, mf_type=3, mf_result=3), severity=S.RECOVERABLE, count=1,
                 source=h.Source.MEMORY_FAILURE), "memory of 2 MiB at 0x1000 taken out of use"),
        (h.build(text="disk 3 is slow", severity=S.INFO, count=1), "disk 3 is slow"),
        (h.build(severity=S.INFO, source=h.Source.CPER, component=C.FIRMWARE), "firmware report"),
        (h.build(h.Cper(UUID(int=1), fru_text="DIMM 7"), severity=S.FATAL, source=h.Source.CPER,
                 component=C.MEMORY), "fatal memory error, in DIMM 7"),
        (aer(0x1000, 2, S.CORRECTED), "corrected PCIe error Timeout, in 0000:01:00.0"),
        (aer(0x1000, 0, S.RECOVERABLE), "uncorrected PCIe error TLP, in"),
        (aer(1 << 18 | 1 << 31, 1, S.FATAL), "MalfTLP, bit 31"),
        (aer(0x1000, 1, S.FATAL, h.Guest(9, h.GuestFlags.DEVICE | h.GuestFlags.KVM, comm="qemu")),
         "hits VM qemu (pid 9), which holds the device"),
    ],
)  # fmt: skip
def test_a_message_has(event: h.Event, part: str) -> None:
    assert part in event.message


def test_a_redacted_event_does_not_claim_that_nobody_is_hit() -> None:
    assert "no process" not in srao(flags=F.REDACTED).message


@given(events)
def test_a_message_is_one_printable_line_and_json_is_json(event: h.Event) -> None:
    assert event.message.isprintable()
    form = json.loads(json.dumps(event.to_json()))
    assert form["seq"] == event.seq
    assert len(form["guests"]) == len(event.guests)
    assert all(isinstance(g["hva"], str | None) for g in form["guests"])


def test_the_json_form() -> None:
    form = named(srao(GUEST, h.Task(300, va=0x7F0000001000, len=4096, comm="postgres"))).to_json()
    mce = form.pop("mce")
    assert {k: mce[k] for k in ("bank", "status", "misc", "addr", "mcgstatus", "socket")} == {
        "bank": 9, "status": "0xbd000000000000c0", "misc": "0x8c", "addr": "0xae00000", "mcgstatus": "0x5",
        "socket": 0,
    }  # fmt: skip
    assert form.pop("message")
    assert form == {
        "seq": 17, "id": 17, "time": "2026-01-02T03:04:05.123456789Z", "time_mono_ns": 5,
        "boot_id": boot_id(), "lost": 0, "count": 1, "source": "mce", "severity": "recoverable",
        "raw_severity": 0, "kind": "srao", "action_required": False, "origin": "hardware",
        "component": "memory", "cpu": 0, "phys_addr": "0xae00000", "phys_len": 4096, "resolve_ns": 0,
        "coalesced": False, "linked": False, "earlier": False, "redacted": False, "stopped": False,
        "owners_unknown": False, "owners_truncated": False, "info_truncated": False,
        "guests": [{"pid": 251, "comm": "qemu-system-x86", "name": "web1",
                    "uuid": "12345678-1234-5678-1234-567812345678", "kvm": True, "hva": "0x7f9e70e00000",
                    "gpa": "0x5000000", "len": 4096, "device": None, "stopped": False, "slot": 0,
                    "vm_id": None, "start_ns": 0}],
        "tasks": [{"pid": 300, "comm": "postgres", "va": "0x7f0000001000", "len": 4096, "device": None,
                   "start_ns": 0}],
    }  # fmt: skip


def test_what_does_not_apply_is_left_out() -> None:
    form = h.build(severity=S.INFO, flags=F.SOFTWARE).to_json()
    assert not {"mce", "pci", "edac", "cper", "memory_failure", "phys_addr", "phys_len", "text"} & set(form)
    assert form["origin"] == "software"
    assert form["guests"] == form["tasks"] == []
    assert form["time"] is None
    assert form["cpu"] is None
    assert form["kind"] is None


def test_registers_that_are_not_valid_are_null() -> None:
    form = h.build(h.Mce(1 << 63, addr=5, misc=6, ip=7), severity=S.CORRECTED, source=h.Source.MCE).to_json()
    assert (form["mce"]["addr"], form["mce"]["misc"], form["mce"]["ip"]) == (None, None, None)


def test_an_event_of_another_boot_has_no_boot_id() -> None:
    old = h.build(severity=S.FATAL, flags=F.EARLIER | F.OTHER_BOOT, time_real_ns=1)
    assert old.to_json()["boot_id"] is None
    # A poisoned page found at load: of this boot, at a time nobody knows.
    assert h.build(severity=S.FATAL, flags=F.EARLIER | F.OTHER_BOOT).to_json()["boot_id"] is None
    assert h.build(severity=S.FATAL, flags=F.EARLIER).to_json()["boot_id"] == boot_id()
    assert h.build(severity=S.FATAL, flags=F.EARLIER, time_mono_ns=1).to_json()["boot_id"] == boot_id()


def test_pci_in_json() -> None:
    holder = h.Guest(9, h.GuestFlags.DEVICE | h.GuestFlags.KVM, comm="qemu")
    form = aer(0x1001, 2, S.CORRECTED, holder).to_json()
    assert form["pci"]["device"] == "0000:01:00.0"
    assert form["pci"]["names"] == ["RxErr", "Timeout"]
    assert form["guests"][0]["device"] == "0000:01:00.0"
    assert form["guests"][0]["hva"] is None


def test_time() -> None:
    assert rfc3339(0) is None
    assert rfc3339(1) == "1970-01-01T00:00:00.000000001Z"
    assert rfc3339((1 << 64) - 1) == "2554-07-21T23:34:33.709551615Z"
