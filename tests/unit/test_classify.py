# SPDX-License-Identifier: MIT
"""What an error means: kmod/classify.h against other projects' records, the kernel's table, the manuals."""

from __future__ import annotations

import csv
import itertools
import sys
from pathlib import Path
from uuid import UUID

import classifier
import grade
import pytest
from classifier import (
    AMD,
    CMCI,
    EXCEPTION,
    HYGON,
    INTEL,
    KERNEL_RECOV,
    OVERFLOW_RECOV,
    SER,
    SMCA,
    SUCCOR,
    TES,
    ZHAOXIN,
    Class,
)
from grade import ADDRV, AR, DEFERRED, EIPV, EN, MCIP, MISCV, OVER, PCC, RIPV, SEAM_NR, UC, VAL, Context, S

from hwerr_notify import Component, Kind, Severity

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS / "vm"))

from testbed.records import (  # noqa: E402
    MCI_UC,
    AerRecord,
    MceRecord,
    parse_aer_inject,
    parse_mce_inject,
    parse_mcelog,
)

CASES = TESTS / "cases"
POISON = 1 << 43
PHYSICAL_PAGE = 0x8C  # MISC: mode 2 (physical), least significant bit 12


def rows(name: str) -> list[dict[str, str]]:
    with (CASES / name / "expected.tsv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def ids(row: dict[str, str]) -> str:
    return f"{row['file']}-{row['rec']}"


# -- records of other projects -----------------------------------------------


def test_no_case_is_left_out() -> None:
    """Every file has rows, every record of it one, and every row a record."""
    for name, directory, parse in (
        ("mce-inject", "mce-inject", parse_mce_inject),
        ("aer-inject", "aer-inject", parse_aer_inject),
    ):
        files = {p.name for p in (CASES / directory).iterdir()} - {"expected.tsv"}
        assert {(r["file"], int(r["rec"])) for r in rows(name)} == {
            (f, n) for f in files for n in range(len(parse((CASES / directory / f).read_text("utf-8"))))
        }
    files = {p.name for p in (CASES / "mcelog/input").iterdir()}
    assert {r["file"] for r in rows("mcelog")} == files


@pytest.mark.parametrize("row", rows("mce-inject"), ids=ids)
def test_mce_inject_cases(row: dict[str, str]) -> None:
    record = parse_mce_inject((CASES / "mce-inject" / row["file"]).read_text("utf-8"))[int(row["rec"])]
    assert (record.status, record.mcgstatus) == (int(row["status"], 0), int(row["mcg_status"], 0))
    # mce-inject raises uncorrected ones as #MC.
    facts = EXCEPTION if record.status & MCI_UC else 0
    got = classifier.mce(facts, status=record.status, mcgstatus=record.mcgstatus, cs=record.cs)
    expected = {
        "corrected": (Severity.CORRECTED, Kind.NONE),
        "fatal": (Severity.FATAL, Kind.NONE),
        "srar": (Severity.RECOVERABLE, Kind.SRAR),
    }
    assert (got.severity, got.kind) == expected[row["expected_class"]]
    assert got.action_required == (row["expected_class"] == "srar")


def mcelog_record(file: str) -> MceRecord:
    text = (CASES / "mcelog/input" / file).read_text("utf-8")
    if file == "xen":
        assert "Bank 2: d400008000040150 at    182c480179cf0" in text
        return MceRecord(status=0xD400008000040150, addr=0x182C480179CF0, bank=2)
    (record,) = parse_mcelog(text)
    return record


@pytest.mark.parametrize("row", rows("mcelog"), ids=ids)
def test_mcelog_cases(row: dict[str, str]) -> None:
    record = mcelog_record(row["file"])
    assert record.status == int(row["status"], 0)
    fields = {
        "status": record.status,
        "mcgstatus": record.mcgstatus,
        "mcgcap": record.mcgcap or SER | CMCI,
        "misc": record.misc,
        "addr": record.addr,
        "bank": record.bank,
        "cpuid": record.cpuid or 0,
    }
    got = classifier.mce(**fields)
    assert got.severity.name.lower() == row["expected_class"]
    assert got.kind.name.lower() == row["expected_kind"]
    assert got.component.name.lower() == row["expected_component"]
    assert got.action_required == (row["expected_kind"] == "srar")
    assert classifier.mce_get("count", **fields) == int(row["count"])
    # None of these addresses is a physical one: MISC names another mode or is not valid.
    assert not classifier.mce_is("addr_is_physical", **fields)


# Uncorrectable errors that are fatal by default: PCIe 7.8.4.4, the register's reset value.
AER_FATAL_BY_DEFAULT = 0x0046_2030


def aer_events(record: AerRecord) -> list[tuple[int, int]]:
    """(status, aer_event's severity) of what the kernel reports for an injection."""
    events = []
    if record.cor_status:
        events.append((record.cor_status, 2))
    if record.uncor_status:
        events.append((record.uncor_status, int(bool(record.uncor_status & AER_FATAL_BY_DEFAULT))))
    return events


@pytest.mark.parametrize("row", rows("aer-inject"), ids=ids)
def test_aer_inject_cases(row: dict[str, str]) -> None:
    record = parse_aer_inject((CASES / "aer-inject" / row["file"]).read_text("utf-8"))[int(row["rec"])]
    events = aer_events(record)
    assert [status for status, _ in events] == [int(s, 0) for s in row["status"].split("+")]
    got = [classifier.by_number("aer", severity) for _, severity in events]
    expected = {
        "corrected": (Severity.CORRECTED, Kind.NONE),
        "nonfatal": (Severity.RECOVERABLE, Kind.NONFATAL),
        "fatal": (Severity.FATAL, Kind.NONE),
    }
    assert [(c.severity, c.kind) for c in got] == [
        expected[name] for name in row["expected_severity"].split(" + ")
    ]
    assert {c.component for c in got} == {Component.PCIE}


# -- machine checks: Intel, against the kernel's table ------------------------

CODES = (0x0000, 0x0005, 0x009F, 0x00C0, 0x00C5, 0x10C0, 0x0134, 0x1134, 0x0150, 0x017A, 0x0400, 0x0E0B)
MCG = (
    *(sum(c) for n in range(4) for c in itertools.combinations((RIPV, EIPV, MCIP), n)),
    SEAM_NR | RIPV | EIPV | MCIP,
)
# Where we differ from the table, and why; each is asserted where it applies.
KEEP_FOR_POLL = "Non signaled machine check"


def intel_expected(status: int, mcgstatus: int, context: Context, ser: bool) -> tuple[Severity, Kind | None]:
    """In an exception."""
    # What the table leaves to the poller is graded as the poller would: as valid, as enabled.
    rule = grade.intel(status | EN, mcgstatus, context, ser, True)
    if not status & UC and not status & PCC:
        # The table judges the situation, we the bank: a corrected error stays one.
        return Severity.CORRECTED, Kind.NONE
    match rule.severity:
        case "PANIC":
            return Severity.FATAL, Kind.NONE
        case "AO":
            return Severity.RECOVERABLE, Kind.SRAO
        case "UCNA":
            return Severity.RECOVERABLE, Kind.UCNA
        case "AR":
            return Severity.RECOVERABLE, Kind.SRAR
        case "UC":
            return Severity.RECOVERABLE, Kind.NONE
        case "SOME":
            assert status & S
            assert not status & AR
            return Severity.RECOVERABLE, Kind.SRAO
        case "KEEP" if rule.message == KEEP_FOR_POLL:
            # UC and AR without S, and OVER: no class of the SDM, and an error is lost.
            assert status & UC
            assert status & AR
            assert status & OVER
            return Severity.FATAL, Kind.NONE
        case "KEEP":
            assert "unaffected thread" in rule.message
            return Severity.RECOVERABLE, Kind.SRAR
    raise AssertionError(rule)


@pytest.mark.parametrize("ser", [True, False])
@pytest.mark.parametrize("context", list(Context))
@pytest.mark.parametrize("vendor", [INTEL, ZHAOXIN])
def test_intel_exceptions_as_the_kernel_grades_them(vendor: int, context: Context, ser: bool) -> None:
    facts = EXCEPTION | (KERNEL_RECOV if context is Context.KERNEL_RECOV else 0)
    cs = 0x33 if context is Context.USER else 0x10
    wrong = []
    for bits in itertools.product((0, 1), repeat=8):
        status = VAL | sum(
            b * flag for b, flag in zip(bits, (OVER, UC, EN, MISCV, ADDRV, PCC, S, AR), strict=True)
        )
        for code, mcgstatus in itertools.product(CODES, MCG):
            got = classifier.mce(
                facts,
                status=status | code,
                mcgstatus=mcgstatus,
                mcgcap=SER if ser else 1,
                cs=cs,
                vendor=vendor,
            )
            expected = intel_expected(status | code, mcgstatus, context, ser)
            if (got.severity, got.kind) != expected:
                wrong.append((hex(status | code), hex(mcgstatus), got, expected))
    assert not wrong, (len(wrong), wrong[:5])


def test_action_is_required_exactly_where_the_code_that_was_hit_cannot_go_on() -> None:
    srar = VAL | UC | EN | MISCV | ADDRV | S | AR | 0x134
    user = {"mcgstatus": RIPV | EIPV | MCIP, "mcgcap": SER, "cs": 0x33}
    assert classifier.mce(status=srar, **user).action_required
    # Seen by a thread that did not consume it (RIPV without EIPV).
    other = classifier.mce(status=srar, mcgstatus=RIPV | MCIP, mcgcap=SER)
    assert (other.severity, other.kind, other.action_required) == (Severity.RECOVERABLE, Kind.SRAR, False)
    for status in (srar & ~AR, srar & ~(AR | S), srar & ~UC, srar | PCC):
        assert not classifier.mce(status=status, **user).action_required
    # Without recovery in the CPU, the process that was hit is killed.
    old = classifier.mce(status=VAL | UC | EN, mcgstatus=RIPV | EIPV | MCIP, mcgcap=1, cs=0x33)
    assert (old.severity, old.kind, old.action_required) == (Severity.RECOVERABLE, Kind.NONE, True)


def test_a_polled_bank_is_graded_by_its_bits_alone() -> None:
    """MCG_STATUS and the code segment are of no exception, so they say nothing."""
    for vendor in (INTEL, ZHAOXIN):
        for s, ar, code, kind in (
            (0, 0, 0x9F, Kind.UCNA),
            (0, 0, 0xC0, Kind.SRAO),  # also by CMCI, with S clear
            (0, 0, 0x10CF, Kind.SRAO),  # bit 12 is no part of the code
            (0, 0, 0x17A, Kind.SRAO),
            (S, 0, 0x9F, Kind.SRAO),
            (S, AR, 0x134, Kind.SRAR),
            (S, AR, 0x150, Kind.SRAR),
        ):
            status = VAL | UC | EN | MISCV | ADDRV | s | ar | code
            got = classifier.mce(status=status, mcgcap=SER, vendor=vendor)
            assert (got.severity, got.kind) == (Severity.RECOVERABLE, kind), hex(status)
    # Required by another code, or without saying where.
    for status in (VAL | UC | S | AR | MISCV | ADDRV | 0x9F, VAL | UC | S | AR | ADDRV | 0x134):
        assert classifier.mce(status=status, mcgcap=SER).severity == Severity.FATAL


def test_pcc_is_fatal_whatever_else_is_set() -> None:
    every = itertools.product((0, 1), repeat=7)
    for vendor, bits in itertools.product((INTEL, AMD, HYGON, ZHAOXIN, 1), every):
        status = VAL | PCC | sum(
            b * flag for b, flag in zip(bits, (OVER, UC, EN, MISCV, ADDRV, S, DEFERRED), strict=True)
        )  # fmt: skip
        for facts in (0, EXCEPTION, SUCCOR | OVERFLOW_RECOV | SMCA):
            assert classifier.mce(facts, status=status, vendor=vendor).severity == Severity.FATAL


def test_a_bank_that_is_not_valid_is_told_as_information() -> None:
    for vendor in (INTEL, AMD, HYGON, ZHAOXIN):
        got = classifier.mce(status=(UC | PCC | S | AR | DEFERRED | 0x134), vendor=vendor)
        assert got == Class(Severity.INFO, Kind.NONE, Component.UNKNOWN, False)


def test_bit_44_is_deferred_on_amd_only() -> None:
    """On Intel bits 52:38 count corrected errors: 64 to 127 set bit 44."""
    for count in (64, 100, 127):
        status = VAL | EN | count << 38 | 0x9F
        assert status & DEFERRED
        for vendor in (INTEL, ZHAOXIN):
            fields = {"status": status, "vendor": vendor, "mcgcap": SER | CMCI}
            assert classifier.mce(**fields).severity == Severity.CORRECTED
            assert classifier.mce_get("count", **fields) == count
        for vendor in (AMD, HYGON):
            assert classifier.mce(status=status, vendor=vendor).severity == Severity.DEFERRED
            assert classifier.mce_get("count", status=status, vendor=vendor, mcgcap=CMCI) == 1


def test_skylake_patrol_scrub_is_uncorrected_though_it_says_corrected() -> None:
    status = VAL | EN | MISCV | ADDRV | 0x0010_00C3
    assert classifier.mce(status=status, bank=13, cpuid=0x50654).kind == Kind.SRAO
    assert classifier.mce(status=status, bank=18, cpuid=0x50657).severity == Severity.RECOVERABLE
    for other in (
        {"bank": 12, "cpuid": 0x50654},
        {"bank": 19, "cpuid": 0x50654},
        {"bank": 13, "cpuid": 0x50653},
        {"bank": 13, "cpuid": 0x606A6},
        {"bank": 13, "cpuid": 0x50654, "vendor": ZHAOXIN},
    ):
        assert classifier.mce(status=status, **other).severity == Severity.CORRECTED
    assert classifier.mce(status=status & ~ADDRV, bank=13, cpuid=0x50654).severity == Severity.CORRECTED


def test_yellow_is_above_the_threshold_if_the_cpu_has_one() -> None:
    yellow, green = VAL | EN | 2 << 53, VAL | EN | 1 << 53
    assert classifier.mce_get("is_yellow", status=yellow, mcgcap=TES)
    assert classifier.mce(status=yellow, mcgcap=TES).severity == Severity.CORRECTED
    for fields in (
        {"status": yellow},
        {"status": green, "mcgcap": TES},
        {"status": yellow | UC, "mcgcap": TES},
        {"status": yellow, "mcgcap": TES, "vendor": AMD},
    ):
        assert not classifier.mce_get("is_yellow", **fields)


def test_counts_and_repetitions() -> None:
    base = {"status": VAL | EN | 0x9F, "mcgcap": SER | CMCI}
    assert classifier.mce_get("count", **base) == 1
    assert classifier.mce_get("count", **base | {"status": base["status"] | 5 << 38}) == 5
    assert classifier.mce_get("count", **base | {"status": base["status"] | 5 << 38, "mcgcap": SER}) == 1
    assert classifier.mce_get("count", **base | {"status": base["status"] | 5 << 38 | UC}) == 1
    ident = classifier.mce_get("status_ident", **base)
    assert classifier.mce_get("status_ident", **base | {"status": base["status"] | 77 << 38 | OVER}) == ident
    assert classifier.mce_get("status_ident", **base | {"status": base["status"] | 1}) == ident
    assert classifier.mce_get("status_ident", **base | {"status": base["status"] ^ 1}) != ident
    assert classifier.mce_get("status_ident", status=VAL | DEFERRED, vendor=AMD) != VAL


# -- machine checks: AMD ------------------------------------------------------


@pytest.mark.parametrize("vendor", [AMD, HYGON])
@pytest.mark.parametrize("context", list(Context))
@pytest.mark.parametrize("abilities", [(0, 0), (0, SUCCOR), (OVERFLOW_RECOV, 0), (OVERFLOW_RECOV, SUCCOR)])
def test_amd_exceptions_as_the_kernel_grades_them(
    vendor: int, context: Context, abilities: tuple[int, int]
) -> None:
    facts = EXCEPTION | sum(abilities) | (KERNEL_RECOV if context is Context.KERNEL_RECOV else 0)
    cs = 0x33 if context is Context.USER else 0x10
    meaning = {
        "PANIC": (Severity.FATAL, Kind.NONE, False),
        "DEFERRED": (Severity.DEFERRED, Kind.NONE, False),
        "KEEP": (Severity.CORRECTED, Kind.NONE, False),
        "AR": (Severity.RECOVERABLE, Kind.SRAR, True),
    }
    for bits in itertools.product((0, 1), repeat=5):
        status = VAL | EN | sum(b * f for b, f in zip(bits, (OVER, UC, PCC, AR, DEFERRED), strict=True))
        got = classifier.mce(facts, status=status, vendor=vendor, cs=cs, mcgstatus=RIPV | EIPV | MCIP)
        expected = meaning[grade.amd(status, context, bool(abilities[0]), bool(abilities[1]))]
        assert (got.severity, got.kind, got.action_required) == expected, hex(status)


def test_amd_uncorrected_that_no_exception_reported_is_contained() -> None:
    for facts in (0, SUCCOR, SMCA | SUCCOR | OVERFLOW_RECOV):
        got = classifier.mce(facts, status=VAL | UC | EN | OVER, vendor=AMD)
        assert (got.severity, got.kind, got.action_required) == (Severity.RECOVERABLE, Kind.NONE, False)


# -- components ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "component"),
    [
        ((0x0000, 0x0001, 0x0008, 0x0020, 0x0040, 0x0200, 0x0234), Component.UNKNOWN),
        ((0x0002, 0x0004, 0x0005, 0x0007, 0x0400, 0x0401, 0x040B, 0x07FF), Component.PROCESSOR),
        ((0x0003,), Component.BUS),
        ((0x0006,), Component.FIRMWARE),
        ((0x000C, 0x000D, 0x000E, 0x000F), Component.CACHE),
        ((0x0010, 0x0014, 0x001F), Component.TLB),
        ((0x0080, 0x009F, 0x00C0, 0x00FF, 0x0280, 0x02FF), Component.MEMORY),
        ((0x0100, 0x0134, 0x0150, 0x017A, 0x01FF), Component.CACHE),
        ((0x0800, 0x0813, 0x0E0F, 0x0FFF), Component.BUS),
        ((0x0808, 0x0E0B, 0x0F0A), Component.IO),
    ],
)
def test_component_by_code(codes: tuple[int, ...], component: Component) -> None:
    for code, filtered in itertools.product(codes, (0, 0x1000)):
        assert classifier.mce(status=VAL | EN | filtered | code).component == component, hex(code)


def test_every_code_has_the_component_of_its_class() -> None:
    """Exhaustive, against the SDM's tables written as patterns."""
    patterns = [
        ("0000000000000010", Component.PROCESSOR),
        ("0000000000000011", Component.BUS),
        ("0000000000000100", Component.PROCESSOR),
        ("0000000000000101", Component.PROCESSOR),
        ("0000000000000110", Component.FIRMWARE),
        ("0000000000000111", Component.PROCESSOR),
        ("000F0000000011LL", Component.CACHE),
        ("000F00000001TTLL", Component.TLB),
        ("000F00001MMMCCCC", Component.MEMORY),
        ("000F0001RRRRTTLL", Component.CACHE),
        ("000F00101MMMCCCC", Component.MEMORY),
        ("000F01xxxxxxxxxx", Component.PROCESSOR),
        ("000F1PPTRRRR10LL", Component.IO),
        ("000F1PPTRRRRIILL", Component.BUS),
    ]
    compiled = [
        (
            int("".join("1" if c in "01" else "0" for c in p), 2) & 0xEFFF,
            int("".join(c if c in "01" else "0" for c in p), 2) & 0xEFFF,
            component,
        )
        for p, component in patterns
    ]
    for code in range(1 << 16):
        expected = next((c for mask, value, c in compiled if code & mask == value), Component.UNKNOWN)
        assert classifier.mce(status=VAL | EN | code).component == expected, hex(code)


@pytest.mark.parametrize(
    ("hwid", "types", "code", "component"),
    [
        (0x96, (0, 1), 0x0000, Component.MEMORY),
        (0xB0, (2, 7), 0x0000, Component.CACHE),
        (0xB0, (0, 1, 0x10), 0x0114, Component.CACHE),
        (0xB0, (0, 1, 0x10), 0x0014, Component.TLB),
        (0xB0, (3, 5, 6), 0x0114, Component.PROCESSOR),
        (0x2E, (0, 1, 2), 0x0000, Component.BUS),
        (0x2E, (4,), 0x0000, Component.CACHE),
        (0x46, (0, 1), 0x0000, Component.PCIE),
        (0x18, (0,), 0x0000, Component.IO),
        (0x50, (0,), 0x0000, Component.BUS),
        (0x01, (0, 1, 2, 3), 0x0000, Component.FIRMWARE),
        (0xABC, (0,), 0x0134, Component.CACHE),  # not known: by the code
        (0xABC, (0,), 0x0000, Component.UNKNOWN),
    ],
)
def test_component_by_smca_bank(hwid: int, types: tuple[int, ...], code: int, component: Component) -> None:
    for kind, vendor in itertools.product(types, (AMD, HYGON)):
        ipid = kind << 48 | hwid << 32 | 0x1234
        assert classifier.mce(SMCA, status=VAL | code, vendor=vendor, ipid=ipid).component == component
    # Without scalable MCA, and on Intel, there is no such register.
    ipid = 0x96 << 32
    assert classifier.mce(0, status=VAL | 0x0134, vendor=AMD, ipid=ipid).component == Component.CACHE
    assert classifier.mce(SMCA, status=VAL | 0x0134, vendor=INTEL, ipid=ipid).component == Component.CACHE


def test_amd_dram_before_zen() -> None:
    dram = VAL | 8 << 16 | 0x0813
    assert classifier.mce(status=dram, vendor=AMD, bank=4).component == Component.MEMORY
    assert classifier.mce(status=dram, vendor=AMD, bank=3).component == Component.BUS
    assert classifier.mce(status=dram ^ 1 << 16, vendor=AMD, bank=4).component == Component.BUS
    assert classifier.mce(status=dram, vendor=INTEL, bank=4).component == Component.BUS


# -- addresses ----------------------------------------------------------------


def test_intel_address_is_physical_only_where_misc_says_so() -> None:
    status = VAL | UC | MISCV | ADDRV | 0x9F
    for vendor in (INTEL, ZHAOXIN):
        for misc in range(1 << 9):
            physical = misc >> 6 == 2 and misc & 0x3F <= 12
            assert classifier.mce_is("addr_is_physical", status=status, misc=misc, vendor=vendor) == physical
        for missing in (VAL, MISCV, ADDRV):
            assert not classifier.mce_is(
                "addr_is_physical", status=status & ~missing, misc=PHYSICAL_PAGE, vendor=vendor
            )


def test_amd_address_is_physical_for_poison_and_old_dram_only() -> None:
    def physical(facts: int = 0, bank: int = 1, **fields: int) -> bool:
        return classifier.mce_is("addr_is_physical", facts, vendor=AMD, bank=bank, **fields)

    dram = VAL | ADDRV | 8 << 16
    assert physical(status=dram, bank=4)
    assert not physical(status=dram & ~ADDRV, bank=4)
    assert not physical(status=VAL | ADDRV | POISON, bank=4)  # bit 43 is something else there
    assert not physical(SMCA, status=dram, bank=4, ipid=0x96 << 32)  # the channel's address
    assert physical(SMCA, status=VAL | ADDRV | POISON, bank=4)
    assert physical(0, status=VAL | ADDRV | POISON, bank=1)
    assert not physical(SMCA, status=VAL | ADDRV | UC, misc=PHYSICAL_PAGE)


def test_length_is_what_misc_says_or_the_page() -> None:
    status = VAL | MISCV | ADDRV
    for lsb in range(64):
        assert classifier.mce_get("addr_len", status=status, misc=2 << 6 | lsb) == 1 << lsb
        for mode in (0, 1, 3, 4, 5, 6, 7):
            assert classifier.mce_get("addr_len", status=status, misc=mode << 6 | lsb) == 4096
    assert classifier.mce_get("addr_len", status=status & ~MISCV, misc=2 << 6 | 6) == 4096


def test_firmware_in_a_machine_checks_dress() -> None:
    """Bank 255 as apei_mce_report_mem_error() makes it, on whatever CPU."""
    base = VAL | EN | ADDRV | MISCV | 0x9F
    for vendor, facts in itertools.product((INTEL, AMD, HYGON), (0, SMCA, SMCA | SUCCOR)):
        for more, severity in (
            (0, Severity.CORRECTED),
            (UC, Severity.RECOVERABLE),
            (UC | PCC, Severity.FATAL),
        ):
            fields = {"status": base | more, "bank": 255, "vendor": vendor, "misc": PHYSICAL_PAGE}
            assert classifier.mce(facts, **fields) == Class(severity, Kind.NONE, Component.MEMORY, False)
            assert classifier.mce_is("addr_is_physical", facts, **fields)
            assert classifier.mce_get("addr_len", **fields) == 4096


def test_memory_errors() -> None:
    for code, memory in ((0x9F, True), (0x134, True), (0x0C, True), (0x10, False), (0x0813, False)):
        assert classifier.mce_is("is_memory", status=VAL | code) == memory
    assert not classifier.mce_is("is_memory", status=VAL | 0x134, vendor=AMD)
    assert classifier.mce_is("is_memory", SMCA, status=VAL, vendor=AMD, ipid=0x96 << 32)
    assert not classifier.mce_is("is_memory", status=0x9F)


# -- sources that say themselves how bad it is ---------------------------------

SEV = Severity


@pytest.mark.parametrize(
    ("source", "more", "severities"),
    [
        ("aer", (), (SEV.RECOVERABLE, SEV.FATAL, SEV.CORRECTED)),
        ("edac", (), (SEV.CORRECTED, SEV.RECOVERABLE, SEV.DEFERRED, SEV.FATAL, SEV.INFO)),
        ("memfail", (0,), (SEV.FATAL, SEV.RECOVERABLE, SEV.RECOVERABLE, SEV.RECOVERABLE)),
        ("cper", (Component.BUS,), (SEV.RECOVERABLE, SEV.FATAL, SEV.CORRECTED, SEV.INFO)),
        ("ghes", (Component.BUS,), (SEV.INFO, SEV.CORRECTED, SEV.RECOVERABLE, SEV.FATAL)),
    ],
)
def test_numbering(source: str, more: tuple[int, ...], severities: tuple[Severity, ...]) -> None:
    got = [classifier.by_number(source, n, *more) for n in range(len(severities))]
    assert tuple(c.severity for c in got) == severities
    # A number that is not known is taken for the worst, and never dropped.
    for unknown in (len(severities), 0x7FFFFFFF):
        assert classifier.by_number(source, unknown, *more).severity == Severity.FATAL
    component = {"aer": Component.PCIE, "edac": Component.MEMORY, "memfail": Component.MEMORY}
    assert {c.component for c in got} == {component.get(source, Component.BUS)}
    kinds = {c.kind for c in got}
    assert kinds == ({Kind.NONE, Kind.NONFATAL} if source == "aer" else {Kind.NONE})


def test_memory_failure_requires_action_where_asked_or_where_it_failed() -> None:
    assert [classifier.by_number("memfail", n, 0).action_required for n in range(4)] == [
        False,
        True,
        False,
        False,
    ]
    assert all(classifier.by_number("memfail", n, 1).action_required for n in range(4))


@pytest.mark.parametrize(
    ("section", "component"),
    [
        ("a5bc1114-6f64-4ede-b863-3e83ed7c83b1", Component.MEMORY),
        ("61ec04fc-48e6-d813-25c9-8daa44750b12", Component.MEMORY),
        ("9876ccad-47b4-4bdb-b65e-16f193c4f3db", Component.PROCESSOR),
        ("dc3ea0b0-a144-4797-b95b-53fa242b6e1d", Component.PROCESSOR),
        ("e19e3d16-bc11-11e4-9caa-c2051d5d46b0", Component.PROCESSOR),
        ("d995e954-bbc1-430f-ad91-b44dcb3c6f35", Component.PCIE),
        ("c5753963-3b84-4095-bf78-eddad3f9c9dd", Component.BUS),
        ("81212a96-09ed-4996-9471-8d729c8e69ed", Component.FIRMWARE),
        ("71761d37-32b2-45cd-a7d0-b0fedd93e8cf", Component.IO),
        ("11111111-2222-3333-4444-555566667777", Component.UNKNOWN),
        ("a5bc1114-6f64-4ede-b863-3e83ed7c83b2", Component.UNKNOWN),
        ("00000000-0000-0000-0000-000000000000", Component.UNKNOWN),
    ],
)
def test_component_of_a_firmware_section(section: str, component: Component) -> None:
    assert classifier.cper_component(UUID(section).bytes_le) == component
