# SPDX-License-Identifier: MIT
"""hwerr-trace as far as it needs no kernel: entries, pairing, forms, what is compiled, usage."""

from __future__ import annotations

import json
import re
import struct
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import UUID

import pytest

import hwerr_notify as h
from hwerr_notify import Event, Flags, Severity, Source, bccprobe, build
from hwerr_notify.bccprobe import Missing, NotPermitted, Wanted, cpu_facts, flags, words
from hwerr_notify.cli import trace as cli
from hwerr_notify.tracepoint import KNOWN, Format, Pairer, RawEvent, bars, hist_key, parse_format

TOP = Path(__file__).resolve().parents[2]
SECOND = 1_000_000_000
NO_FLAGS = Flags(0)
COMMON = "\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\n"


def described(*fields: tuple[str, int, int, int]) -> str:
    """A format file, of (declaration, offset, size, signed)."""
    lines = [f"\tfield:{d};\toffset:{o};\tsize:{s};\tsigned:{g};\n" for d, o, s, g in fields]
    return f'name: x\nID: 113\nformat:\n{COMMON}{"".join(lines)}\nprint fmt: "field: %d", REC->x\n'


# As Linux 6.12 says them.
MCE = parse_format("mce:mce_record", described(
    ("u64 mcgcap", 8, 8, 0), ("u64 mcgstatus", 16, 8, 0), ("u64 status", 24, 8, 0), ("u64 addr", 32, 8, 0),
    ("u64 misc", 40, 8, 0), ("u64 synd", 48, 8, 0), ("u64 ipid", 56, 8, 0), ("u64 ip", 64, 8, 0),
    ("u64 tsc", 72, 8, 0), ("u64 ppin", 80, 8, 0), ("u64 walltime", 88, 8, 0), ("u32 cpu", 96, 4, 0),
    ("u32 cpuid", 100, 4, 0), ("u32 apicid", 104, 4, 0), ("u32 socketid", 108, 4, 0), ("u8 cs", 112, 1, 0),
    ("u8 bank", 113, 1, 0), ("u8 cpuvendor", 114, 1, 0), ("u32 microcode", 116, 4, 0)))  # fmt: skip
MC = parse_format("ras:mc_event", described(
    ("unsigned int error_type", 8, 4, 0), ("__data_loc char[] msg", 12, 4, 0),
    ("__data_loc char[] label", 16, 4, 0), ("u16 error_count", 20, 2, 0), ("u8 mc_index", 22, 1, 0),
    ("s8 top_layer", 23, 1, 1), ("s8 middle_layer", 24, 1, 1), ("s8 lower_layer", 25, 1, 1),
    ("long address", 32, 8, 1), ("u8 grain_bits", 40, 1, 0), ("long syndrome", 48, 8, 1),
    ("__data_loc char[] driver_detail", 56, 4, 0)))  # fmt: skip
AER = parse_format("ras:aer_event", described(
    ("__data_loc char[] dev_name", 8, 4, 0), ("u32 status", 12, 4, 0), ("u8 severity", 16, 1, 0),
    ("u8 tlp_header_valid", 17, 1, 0), ("u32 tlp_header[4]", 20, 16, 0)))  # fmt: skip
FAILURE = parse_format("ras:memory_failure_event", described(
    ("unsigned long pfn", 8, 8, 0), ("int type", 16, 4, 1), ("int result", 20, 4, 1)))  # fmt: skip
EXIT = parse_format("kvm:kvm_userspace_exit", described(("__u32 reason", 8, 4, 0), ("int errno", 12, 4, 1)))
INSN = parse_format("kvm:kvm_emulate_insn", described(
    ("__u64 rip", 8, 8, 0), ("__u32 csbase", 16, 4, 0), ("__u8 len", 20, 1, 0), ("__u8 insn[15]", 21, 15, 0),
    ("__u8 flags", 36, 1, 0), ("__u8 failed", 37, 1, 0)))  # fmt: skip
STANDARD = parse_format("ras:non_standard_event", described(
    ("char sec_type[16]", 8, 16, 0), ("char fru_id[16]", 24, 16, 0), ("__data_loc char[] fru_text", 40, 4, 0),
    ("u8 sev", 44, 1, 0), ("u32 len", 48, 4, 0), ("__data_loc u8[] buf", 52, 4, 0)))  # fmt: skip
LAYOUTS = {1: MCE, 2: MC, 3: AER, 4: FAILURE, 5: EXIT, 6: INSN, 7: STANDARD}


def raw(layout: Format, time_ns: int = SECOND, pid: int = 7, **values: Any) -> RawEvent:
    """An event through the probe's bytes: what is given is put where the format says."""
    entry = bytearray(1024)
    end = 128
    for name, value in values.items():
        (f,) = [f for f in layout.fields if f.name == name]
        if f.loc:
            data = value.encode() + b"\0" if isinstance(value, str) else value
            entry[end : end + len(data)] = data
            value = (end | len(data) << 16).to_bytes(4, "little")
            end += len(data)
        elif isinstance(value, int):
            value = value.to_bytes(f.size, "little", signed=value < 0)
        entry[f.offset : f.offset + len(value)] = value
    number = next(n for n, known in LAYOUTS.items() if known is layout)
    head = struct.pack("<QIIIIiI16s", time_ns, number, 1, pid, pid, -1, 0, b"qemu")
    return RawEvent.parse(head + bytes(entry), LAYOUTS)


STATUS = 0x9C00400000080000
AN_MCE = {"status": STATUS, "addr": 0x1234000, "misc": 0x8C, "bank": 4, "cpu": 1}


def mce_record(flags: Flags = NO_FLAGS, count: int = 1, **more: Any) -> Event:
    info = h.Mce(status=STATUS, addr=0x1234000, misc=0x8C, bank=4)
    given = {"severity": Severity.CORRECTED, "source": Source.MCE, "cpu": 1, "time_mono_ns": SECOND, "seq": 5}
    # As the kernel gives it: build() is for what programs publish, and marks nothing.
    return build(info, flags=flags, count=count, **(given | more))


# -- entries -----------------------------------------------------------------


def test_fields_have_the_kernels_names_and_values() -> None:
    event = raw(MC, error_type=1, msg="memory error", label="DIMM_A1", error_count=1, top_layer=-1,
                address=-4096, syndrome=0x1234, driver_detail="")  # fmt: skip
    assert event.name == "ras:mc_event"
    assert (event.cpu, event.pid, event.comm, event.stack) == (1, 7, "qemu", -1)
    assert "common_type" not in event.fields
    f = event.fields
    assert (f["error_type"], f["msg"], f["label"], f["top_layer"]) == (1, "memory error", "DIMM_A1", -1)
    assert (f["driver_detail"], f["middle_layer"], f["address"]) == ("", 0, -4096)
    form = event.to_json()["fields"]
    assert (form["address"], form["syndrome"]) == ("0xfffffffffffff000", "0x1234")


def test_arrays_and_bytes() -> None:
    event = raw(AER, dev_name="0000:01:00.0", status=0x1000, tlp_header=struct.pack("<4I", 1, 2, 3, 0xFF))
    assert event.fields["tlp_header"] == [1, 2, 3, 255]
    assert event.to_json()["fields"]["tlp_header"] == ["0x1", "0x2", "0x3", "0xff"]
    assert event.to_json()["fields"]["status"] == "0x1000"
    assert raw(INSN, insn=bytes(range(15))).fields["insn"] == bytes(range(15)).hex()
    event = raw(STANDARD, sec_type=b"\x11" * 16, fru_id=b"DIMM", fru_text="A", buf=b"\1\2")
    assert (event.fields["sec_type"], event.fields["fru_id"]) == ("11" * 16, "DIMM")
    assert event.fields["buf"] == "0102"


def test_a_string_that_points_outside_is_cut() -> None:
    entry = bytearray(1024)
    entry[8:12] = (1020 | 0xFFFF << 16).to_bytes(4, "little")
    entry[1020:] = b"abcd"
    head = struct.pack("<QIIIIiI16s", 1, 3, 0, 0, 0, -1, 0, b"")
    assert RawEvent.parse(head + bytes(entry), LAYOUTS).fields["dev_name"] == "abcd"


@pytest.mark.parametrize(
    "data", [b"", bytes(48), struct.pack("<QIIIIiI16s", 1, 99, 0, 0, 0, 0, 0, b"") + bytes(9)]
)
def test_bytes_that_are_no_event(data: bytes) -> None:
    with pytest.raises(ValueError, match="an event of"):
        RawEvent.parse(data, LAYOUTS)


def test_a_format_without_fields() -> None:
    with pytest.raises(ValueError, match="names no fields"):
        parse_format("x:y", "name: y\nformat:\n" + COMMON)


def test_an_event_without_fields_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("new_event", described(("u32 x", 8, 4, 0))), ("bare_event", f"format:\n{COMMON}")):
        where = tmp_path / "events/ras" / name
        where.mkdir(parents=True)
        (where / "format").write_text(text, "ascii")
    monkeypatch.setattr(bccprobe, "TRACEFS", (tmp_path,))
    found, absent = bccprobe.formats(Wanted())
    assert [f.name for f in found.values()] == ["ras:new_event"]
    assert set(absent) == set(KNOWN)


# -- pairing -----------------------------------------------------------------


def pairs(pairer: Pairer, now: int) -> list[tuple[str, int | None]]:
    return [(r.name, e.seq if e else None) for r, e in pairer.due(now)]


@pytest.mark.parametrize("first", ["raw", "record"])
def test_whichever_is_seen_first(first: str) -> None:
    pairer = Pairer(2 * SECOND)
    if first == "raw":
        pairer.raw(raw(MCE, **AN_MCE), 0)
        assert pairs(pairer, 1) == []
        assert pairer.wait_ns(SECOND) == SECOND
        pairer.record(mce_record(), 1)
    else:
        pairer.record(mce_record(), 0)
        pairer.raw(raw(MCE, **AN_MCE), 1)
    assert pairs(pairer, 1) == [("mce:mce_record", 5)]
    assert pairer.wait_ns(1) is None
    # One record is one event's.
    pairer.raw(raw(MCE, **AN_MCE), 1)
    assert pairs(pairer, 2) == []
    assert pairs(pairer, 1 + 2 * SECOND) == [("mce:mce_record", None)]


@pytest.mark.parametrize("other", [{"bank": 5}, {"addr": 0x1235000}, {"cpu": 0}, {"status": STATUS | 1}])
def test_another_error_is_not_taken_for_it(other: dict[str, int]) -> None:
    pairer = Pairer(SECOND)
    pairer.record(mce_record(), 0)
    pairer.raw(raw(MCE, **(AN_MCE | other)), 0)
    assert pairs(pairer, 0) == []
    assert [e for _, e in pairer.flush()] == [None]


def test_repetitions_share_a_record() -> None:
    """The first has one of its own; the others, with counters that differ, one together."""
    pairer = Pairer(2 * SECOND)
    for n in range(4):
        pairer.raw(raw(MCE, **(AN_MCE | {"status": STATUS | n << 38})), n)
    pairer.record(mce_record(), 5)
    assert pairs(pairer, 5) == [("mce:mce_record", 5)]
    pairer.record(mce_record(Flags.COALESCED, 3, seq=6), 6)
    assert pairs(pairer, 6) == [("mce:mce_record", 6)] * 3
    pairer.raw(raw(MCE, **AN_MCE), 7)
    assert pairs(pairer, 8) == []


def test_order_is_kept() -> None:
    pairer = Pairer(2 * SECOND)
    pairer.raw(raw(FAILURE, pfn=1, type=2, result=3), 0)
    pairer.raw(raw(MCE, **AN_MCE), 1)
    pairer.record(mce_record(), 1)
    assert pairs(pairer, 2) == []
    assert pairs(pairer, 2 * SECOND) == [("ras:memory_failure_event", None), ("mce:mce_record", 5)]


def test_all_sources() -> None:
    events = [
        (raw(AER, dev_name="0000:01:00.0", status=0x1000, severity=0),
         build(h.Pci(0, 1, 0, status=0x1000), severity=Severity.RECOVERABLE, source=Source.AER)),
        (raw(MC, error_type=0, label="DIMM_A1" * 20, mc_index=2, top_layer=1, middle_layer=-1, lower_layer=-1,
             syndrome=-1),
         build(h.Edac(2, 1, -1, -1, (1 << 64) - 1, label=("DIMM_A1" * 20)[:63]), severity=Severity.CORRECTED,
               source=Source.EDAC, raw_severity=0)),
        (raw(FAILURE, pfn=0x12345, type=13, result=3),
         build(h.Memory(0x12345000, 4096, mf_type=13, mf_result=3), severity=Severity.RECOVERABLE,
               source=Source.MEMORY_FAILURE)),
        (raw(EXIT, pid=251, reason=17, errno=0),
         build(h.Vcpu(0, 17), h.Guest(251), severity=Severity.RECOVERABLE, source=Source.KVM)),
        (raw(INSN, pid=251, rip=0x7C00, failed=1),
         build(h.Vcpu(0, 17, rip=0x7C00), h.Guest(251), severity=Severity.RECOVERABLE, source=Source.KVM)),
        (raw(STANDARD, sev=2, fru_text="slot 3"),
         build(h.Cper(section=UUID(int=1), fru_text="slot 3"), severity=Severity.RECOVERABLE,
               source=Source.CPER, raw_severity=2)),
    ]  # fmt: skip
    for wrong in (False, True):
        for n, (seen, record) in enumerate(events):
            pairer = Pairer(SECOND)
            pairer.record(events[n - 1][1] if wrong else record, 0)
            pairer.raw(seen, 0)
            found = [e is record for _, e in pairer.flush()]
            # The two of KVM tell of the same exit and may share their record.
            assert found == [not wrong] or (wrong and seen.name.startswith("kvm:"))


def test_one_exit_of_kvm_is_the_record_of_both_its_tracepoints() -> None:
    record = build(h.Vcpu(0, 17, rip=0x7C00), h.Guest(251), severity=Severity.FATAL, source=Source.KVM, seq=9)
    pairer = Pairer(SECOND)
    pairer.raw(raw(INSN, pid=251, rip=0x7C00, failed=1), 0)
    pairer.raw(raw(EXIT, pid=251, reason=17), 0)
    pairer.record(record, 0)
    assert pairs(pairer, 0) == [("kvm:kvm_emulate_insn", 9), ("kvm:kvm_userspace_exit", 9)]


def test_what_a_program_published_is_no_tracepoints() -> None:
    pairer = Pairer(0)
    pairer.record(mce_record(Flags.SOFTWARE), 0)
    pairer.record(mce_record(Flags.EARLIER), 0)
    pairer.raw(raw(MCE, **AN_MCE), 0)
    assert pairs(pairer, 0) == [("mce:mce_record", None)]


def test_a_storm_is_bounded() -> None:
    pairer = Pairer(1 << 62, most=10)
    for n in range(100):
        pairer.record(mce_record(seq=n + 1, cpu=n), 0)
        pairer.raw(raw(MCE, **AN_MCE, tsc=n), 0)
        list(pairer.due(0))
    assert len(pairer._raw) <= 10
    assert len(pairer._records) <= 10


# -- what is compiled --------------------------------------------------------


def test_flags_say_what_is_wanted() -> None:
    found = flags(Wanted(bank=4, pid=7, cpu=1, severity=Severity.DEFERRED, stacks=True), {1: MCE}, 0x1C)
    assert {
        "-DTRACE_MCE_RECORD=1", "-DMCE_RECORD_BANK=113", "-DMCE_RECORD_STATUS=24", "-DONLY_BANK=4",
        "-DONLY_PID=7", "-DONLY_CPU=1", "-DONLY_SEVERITY=2", "-DSTACKS", "-DMCE_FACTS=0x1c",
    } <= set(found)  # fmt: skip
    assert not [f for f in found if "NAME" in f or "AER" in f]
    plain = flags(Wanted(severity=Severity.INFO), LAYOUTS)
    assert not [f for f in plain if "ONLY" in f or f == "-DSTACKS"]


def test_every_flag_is_one_the_source_knows() -> None:
    """And every macro that the source compares is given."""
    source = (TOP / "bpf/trace.bcc.c").read_text("utf-8")
    used = set(re.findall(r"\b(?:TRACE|ONLY|MCE|AER|MC|MEMORY|EXTLOG|NON|ARM|KVM)_[A-Z0-9_]+\b", source))
    layouts = {n: Format(name, (*LAYOUTS[1].fields, *[
        type(LAYOUTS[1].fields[0])(f, "u8", 8, 1, False, False, False)
        for f in {"sev", *sum((k.fields for k in KNOWN.values()), ())} if LAYOUTS[1].offset(f) is None
    ])) for n, name in enumerate([*KNOWN, "ras:new_event"], 1)}  # fmt: skip
    wanted = Wanted(severity=Severity.FATAL, bank=1, dimm="x", pid=1, cpu=1, stacks=True)
    given = {f.removeprefix("-D").partition("=")[0] for f in flags(wanted, layouts)}
    defined = set(re.findall(r"#define (\w+)", source))
    assert not given - used - {"RING_PAGES", "STACKS", "MC_EVENT_LABEL"} - defined
    compared = {u for u in used if not u.startswith(("KVM_EXIT", "TRACE_OTHER"))} - defined
    assert compared <= given | {"MCE_FACTS"}


def test_names_are_compared_in_words() -> None:
    found = flags(Wanted(device="0000:01:00.0"), {3: AER})
    assert f"-DONLY_NAME_0={int.from_bytes(b'0000:01:', 'little'):#x}ULL" in found
    assert "-DONLY_NAME_7=0x0ULL" in found
    # A quote or a blank is no part of a command line; what is too long is cut as the kernel cuts it.
    assert b"".join(w.to_bytes(8, "little") for w in words('a" b' + "x" * 99)) == b'a" b' + b"x" * 59 + b"\0"


def test_a_kernel_with_other_fields_is_told() -> None:
    other = parse_format("mce:mce_record", described(("u64 status", 8, 8, 0)))
    with pytest.raises(Missing, match=r"mce:mce_record has no field addr"):
        flags(Wanted(), {1: other})


@pytest.mark.parametrize(
    ("wanted", "passes"),
    [
        (Wanted(), {"mce", "aer", "edac", "kvm", "memory_failure", "cper", "new"}),
        (Wanted(pid=1), {"mce", "aer", "edac", "kvm", "memory_failure", "cper", "new"}),
        (Wanted(bank=0), {"mce"}),
        (Wanted(device="x"), {"aer"}),
        (Wanted(dimm="x"), {"edac"}),
        (Wanted(severity=Severity.FATAL), {"mce", "aer", "edac", "kvm", "memory_failure", "cper"}),
        (Wanted(sources=frozenset({Source.KVM})), {"kvm"}),
        (Wanted(sources=frozenset({Source.KVM}), bank=0), set()),
    ],
)
def test_what_can_pass(wanted: Wanted, passes: set[str]) -> None:
    found = {known.source.label for name, known in KNOWN.items() if wanted.event(name)}
    assert found | ({"new"} if wanted.event("ras:new_event") else set()) == passes


def test_facts_of_the_cpu() -> None:
    assert cpu_facts("processor : 0\nflags\t\t: fpu smca succor\nbugs : overflow_recov\n") == 0x14
    assert cpu_facts("") == 0


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host that has everything, as files below this directory."""
    (tmp_path / "tracing/events/mce/mce_record").mkdir(parents=True)
    (tmp_path / "tracing/events/mce/mce_record/format").write_text(
        described(*[(f"u64 {n}", 8, 8, 0) for n in KNOWN["mce:mce_record"].fields]), "ascii"
    )
    (tmp_path / "trace.bcc.c").touch()
    monkeypatch.setattr(bccprobe, "TRACEFS", (tmp_path / "tracing",))
    monkeypatch.setattr(bccprobe, "SOURCE", tmp_path / "trace.bcc.c")
    monkeypatch.setattr(bccprobe, "capable", lambda *c: True)
    monkeypatch.setattr("platform.release", lambda: "6.12-x")
    monkeypatch.setattr(bccprobe, "MODULES", tmp_path / "modules")
    monkeypatch.delenv("BCC_KERNEL_SOURCE", raising=False)
    monkeypatch.setitem(sys.modules, "bcc", ModuleType("bcc"))
    (tmp_path / "modules/6.12-x/build").mkdir(parents=True)
    return tmp_path


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    status = cli.main(argv)
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [ln for ln in err.splitlines() if not ln.startswith("hwerr-trace: without ")]
    return status, line.removeprefix("hwerr-trace: ")


def test_what_is_missing_is_said(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bccprobe.missing()
    with monkeypatch.context() as m:
        m.setenv("BCC_KERNEL_SOURCE", str(here / "nowhere"))
        assert complaint(capsys) == (6, f"BCC_KERNEL_SOURCE names {here}/nowhere, which is no directory")
    with monkeypatch.context() as m:
        m.setattr(bccprobe, "capable", lambda *c: False)
        assert complaint(capsys) == (5, "not permitted: run as root")
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "bcc", None)
        status, said = complaint(capsys)
        assert status == 6
        assert said.startswith("bcc is not there: apt-get install python3-bpfcc")
    with monkeypatch.context() as m:
        m.setattr(bccprobe, "TRACEFS", (here / "nowhere",))
        assert complaint(capsys) == (6, f"tracefs is not mounted: mount -t tracefs tracefs {here}/nowhere")
    (here / "modules/6.12-x/build").rmdir()
    status, said = complaint(capsys)
    assert status == 6
    assert said.endswith("build is not there: apt-get install linux-headers-6.12-x")
    (here / "modules/6.12-x/build").mkdir()
    assert complaint(capsys, "--source", "aer") == (
        6,
        "this kernel has none of the tracepoints that are wanted now",
    )
    (here / "trace.bcc.c").unlink()
    status, said = complaint(capsys)
    assert status == 6
    assert "run scripts/build-bpf" in said


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(Missing("no headers"), 6, "no headers"), (NotPermitted("locked down"), 5, "locked down")],
)
def test_how_it_ends_if_the_probe_cannot_be_had(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception,
    status: int, said: str,
) -> None:  # fmt: skip
    def probe(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(cli, "Probe", probe)
    assert cli.main(["--no-records"]) == status
    assert capsys.readouterr().err.splitlines()[-1] == f"hwerr-trace: {said}"


# -- forms -------------------------------------------------------------------


def text(raw_event: RawEvent, event: Event | None, paired: bool = True) -> list[str]:
    shown = cli.lines(raw_event, event, ["f+0x1", "g+0x2"], cli.Clock(), paired)
    return ["".join(part for part, _ in segs) for segs, _ in shown]


def test_why_there_are_raw_events_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(path: str) -> None:
        reason = "No such file; and it does not go without the module: no BTF here"
        raise FileNotFoundError(2, reason, path)

    monkeypatch.setattr(h.device, "open", absent)
    assert cli._records(cli.parser().parse_args([])) is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "raw events only: /dev/hwerr is not there (modprobe hwerr); without it: no BTF here" in said
    with pytest.raises(FileNotFoundError):
        cli._records(cli.parser().parse_args(["--record-device", "/dev/none"]))


def test_an_event_next_to_its_record() -> None:
    first, f, g, record = text(raw(MCE, **AN_MCE), mce_record(time_mono_ns=SECOND + 250_000))
    assert re.match(r"\d\d:\d\d:\d\d\.\d{6} mce:mce_record +cpu 1 +qemu\(7\) mcgcap=0x0 ", first)
    assert "status=0x9c00400000080000 addr=0x1234000 misc=0x8c" in first
    assert " bank=4 " in first
    assert (f.strip(), g.strip()) == ("f+0x1", "g+0x2")
    assert re.match(r"  = record 5 \+0\.250 ms: corrected +mce +bank 4 ", record)
    assert text(raw(MCE, **AN_MCE), None)[-1] == "  = no record of hwerr's"
    assert len(text(raw(MCE, **AN_MCE), None, paired=False)) == 3


def test_what_firmware_wrote_moves_no_cursor() -> None:
    event = raw(MC, label="A\x1b[2J\n", msg="", driver_detail="x y")
    line = text(event, None)[0]
    assert line.isprintable()
    assert "label=A\\x1b[2J\\n" in line
    assert 'driver_detail="x y"' in line
    assert 'msg=""' in line


def test_json() -> None:
    form = json.loads(json.dumps(cli.to_json(raw(MCE, **AN_MCE), mce_record(), ["f"], cli.Clock())))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", form["time"])
    assert (form["event"], form["mono_ns"], form["cpu"], form["pid"]) == ("mce:mce_record", SECOND, 1, 7)
    assert form["fields"]["addr"] == "0x1234000"
    assert form["fields"]["bank"] == 4
    assert form["stack"] == ["f"]
    assert form["record"] == mce_record().to_json()
    bare = cli.to_json(raw(MCE, **AN_MCE), None, [], cli.Clock())
    assert bare["record"] is None
    assert "stack" not in bare


def test_histograms() -> None:
    mce, mc = raw(MCE, **AN_MCE), raw(MC, label="DIMM_A1")
    hit = build(h.Guest(9, comm="qemu"), h.Guest(9, comm="qemu"), h.Guest(8, comm="q"),
                severity=Severity.FATAL)  # fmt: skip
    assert hist_key("bank", mce, None, 0) == ["bank 4"]
    assert hist_key("bank", mc, None, 0) == []
    assert hist_key("dimm", mc, None, 0) == ["DIMM_A1"]
    assert hist_key("dimm", raw(MC, label=""), None, 0) == ["(no label)"]
    assert hist_key("device", raw(AER, dev_name="0000:01:00.0"), None, 0) == ["0000:01:00.0"]
    assert hist_key("vm", mce, hit, 0) == ["q(8)", "qemu(9)"]
    assert hist_key("vm", mce, build(severity=Severity.FATAL), 0) == ["(no VM)"]
    assert hist_key("vm", mce, None, 0) == ["(no record)"]
    assert hist_key("vm", raw(EXIT), None, 0) == ["qemu(7)"]
    assert hist_key("minute", mce, None, 119 * SECOND) == ["60"]
    assert list(bars(Counter({"a": 1, "b": 40, "c": 20}), 40)) == [
        ("b", 40, "*" * 40), ("c", 20, "*" * 20), ("a", 1, "*")
    ]  # fmt: skip
    assert list(bars(Counter())) == []


# -- usage -------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--source", "bad"], ["--source", "user"], ["--source", ""], ["--severity", "bad"], ["--bank", "256"],
        ["--bank", "-1"], ["--bank", "\u0663"], ["--device", ""], ["--dimm", ""], ["--cpu", "x"],
        ["--pid", "0"],
        ["--bank", "1", "--dimm", "x"], ["--count", "0"], ["--timeout", "-1"], ["--hold", "nan"],
        ["--hist", "moon"], ["word"], ["--hi", "vm"],
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(options)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"hwerr-trace: .*\(see hwerr-trace --help\)\n", err)


def test_filters_that_nothing_can_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert complaint(capsys, "--source", "kvm", "--bank", "1")[0] == 2


def test_help_and_man_page_say_how_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    page = (TOP / "docs/man/hwerr-trace.8").read_text("utf-8").replace("\\-", "-")
    for status in (0, 1, 2, 3, 5, 6, 130, 141):
        assert re.search(rf"^  {status} ", out, re.MULTILINE)
        assert re.search(rf"^\.B {status}$", page, re.MULTILINE)
    for option in re.findall(r"^  (--[a-z-]+)", out, re.MULTILINE):
        assert option in page, f"{option} is not in the man page"
