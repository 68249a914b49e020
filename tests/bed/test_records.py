# SPDX-License-Identifier: MIT
"""The readers for other projects' injection records."""

import pytest
from testbed.errors import TestbedError
from testbed.records import AerRecord, parse_aer_inject, parse_mce_inject, parse_mcelog


def test_mce_inject_reads_names_numbers_and_validity() -> None:
    text = (
        "# two\nCPU 0 BANK 1\nSTATUS CORRECTED\nADDR 0xabcd\n#\n"
        "cpu 1 2\nstatus uncorrected 0x134 AR s MISC 010\n"
    )
    first, second = parse_mce_inject(text)
    assert (first.cpu, first.bank, first.status, first.addr) == (0, 1, 0x9400000000000000, 0xABCD)
    # VAL UC EN MISCV S AR and 0x134
    assert (second.cpu, second.bank, second.status, second.misc) == (1, 2, 0xB980000000000134, 8)


def test_mce_inject_reads_the_rest() -> None:
    (record,) = parse_mce_inject(
        "CPU 3 BANK 1\nMCGSTATUS RIPV EIPV MCIP LMCES SEAM_NR\nNOBROADCAST\nSTATUS FATAL\n"
        "RIP 0x3f:<0x5678>{do_idle}\nPROCESSOR 0:0x806f0\nTSC 0x10\nTIME 12"
    )
    assert record.mcgstatus == 0x100F
    assert (record.cs, record.ip) == (0x3F, 0x5678)
    assert (record.vendor, record.cpuid, record.tsc, record.time) == (0, 0x806F0, 16, 12)
    assert not record.broadcast
    assert set(record.beyond_mce_inject()) == {"mcgstatus", "cpuid", "vendor", "ip", "cs", "tsc", "time"}


def test_mcelog_numbers_are_hexadecimal_and_nothing_is_added() -> None:
    (record,) = parse_mcelog("CPU 0 7\nPROCESSOR 0:0x406f0\nSTATUS 0x8800000000000080\nMISC 20000000000\n")
    assert (record.bank, record.cpuid, record.misc) == (7, 0x406F0, 0x20000000000)
    (plain,) = parse_mcelog("CPU 0 2\nSTATUS 1234\nADDR 10\nRIP 3f:<5678>\nMCGSTATUS 0x123")
    assert (plain.status, plain.addr, plain.cs, plain.ip, plain.mcgstatus) == (
        0x1234,
        16,
        0x3F,
        0x5678,
        0x123,
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("CPU 0\nSTATUS BOGUS", "line 2"),
        ("CPU 0 BANK 1", "no STATUS"),
        ("CPU 0\nSTATUS 0x10000000000000000", "64-bit"),
        ("CPU 0\nSTATUS UC\nADDR", "ends"),
        ("CPU 0\nSTATUS UC\nCOLOUR 3", "'colour'"),
        ("CPU x\nSTATUS UC", "'x'"),
    ],
)
def test_mce_errors_name_line_or_word(text: str, says: str) -> None:
    with pytest.raises(TestbedError, match=says):
        parse_mce_inject(text)


def test_aer_inject_reads_aliases_several_bits_octal_and_one_line() -> None:
    text = (
        "AER\nPCI_ID 0000:01:00.0\nCOR_STATUS BAD_DLLP REP_ROLL\nHEADER_LOG 010 0x9 0xa 0xB\n"
        "aer\nid 02:1f.7 uncor malf_tlp hl 4 5 6 7\nAER COR_STATUS 0x2"
    )
    assert parse_aer_inject(text) == [
        AerRecord(cor_status=0x180, header_log=(8, 9, 10, 11), device="0000:01:00.0"),
        AerRecord(uncor_status=0x40000, header_log=(4, 5, 6, 7), device="02:1f.7"),
        AerRecord(cor_status=0x2),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "COR_STATUS BAD_TLP",
        "AER",
        "AER COR_STATUS",
        "AER COR_STATUS NOPE",
        "AER COR 1 HL 1 2 3",
        "AER COR 1 ID 1:2",
    ],
)
def test_aer_errors(text: str) -> None:
    with pytest.raises(TestbedError, match="line 1"):
        parse_aer_inject(text)
