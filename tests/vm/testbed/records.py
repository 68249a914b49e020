# SPDX-License-Identifier: MIT
"""Readers for the injection records of mce-inject, mcelog and aer-inject.

The grammars are those of andikleen/mce-inject (mce.lex, mce.y, SPEC),
andikleen/mcelog (input of `mcelog --ascii`) and intel/aer-inject (SPEC).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .errors import TestbedError


@dataclass(frozen=True)
class MceRecord:
    """One machine check. `cpu`, `cpuid`, `vendor`: None is the machine's own."""

    status: int = 0
    addr: int = 0
    misc: int = 0
    mcgstatus: int = 0
    bank: int = 0
    cpu: int | None = None
    socket: int = 0
    cpuid: int | None = None
    vendor: int | None = None
    ip: int = 0
    cs: int = 0
    tsc: int | None = None
    time: int | None = None
    mcgcap: int = 0
    apicid: int = 0
    synd: int = 0
    ipid: int = 0
    broadcast: bool = True

    def beyond_mce_inject(self) -> list[str]:
        """Names of fields that are set and that the mce-inject module cannot express."""
        names = ("mcgstatus", "socket", "cpuid", "vendor", "ip", "cs", "tsc", "time", "mcgcap", "apicid",
                 "ipid")  # fmt: skip
        default = MceRecord()
        return [n for n in names if getattr(self, n) != getattr(default, n)]


@dataclass(frozen=True)
class AerRecord:
    """One AER injection: status registers' bits, TLP header if any, device if named."""

    cor_status: int = 0
    uncor_status: int = 0
    header_log: tuple[int, int, int, int] | None = None
    device: str | None = None


MCI_VAL, MCI_OVER, MCI_UC, MCI_EN = 1 << 63, 1 << 62, 1 << 61, 1 << 60
MCI_MISCV, MCI_ADDRV, MCI_PCC, MCI_S, MCI_AR = 1 << 59, 1 << 58, 1 << 57, 1 << 56, 1 << 55
MCG_LMCES = 1 << 3

_MCI = {
    "val": MCI_VAL,
    "over": MCI_OVER,
    "uc": MCI_UC,
    "en": MCI_EN,
    "pcc": MCI_PCC,
    "s": MCI_S,
    "ar": MCI_AR,
    "tes_green": 1 << 53,
    "tes_yellow": 2 << 53,
    "corrected": MCI_VAL | MCI_EN,
    "uncorrected": MCI_VAL | MCI_UC | MCI_EN,
    "fatal": MCI_VAL | MCI_UC | MCI_EN | MCI_PCC,
}
_MCG = {"ripv": 1, "eipv": 2, "mcip": 4, "lmces": 8, "seam_nr": 1 << 12, "tes_p": 1 << 11}


def parse_mce_inject(text: str) -> list[MceRecord]:
    """Records in mce-inject's language. Raises TestbedError with the line's number."""
    records: list[MceRecord] = []
    for line, words in _records(text, {"cpu", "mce"}):
        records.append(_mce_record(line, words, base=0, mark_valid=True))
    return records


def parse_mcelog(text: str) -> list[MceRecord]:
    """Records as mcelog reads them: as mce-inject's, but numbers without 0x are hexadecimal."""
    records: list[MceRecord] = []
    for line, words in _records(text, {"cpu"}):
        records.append(_mce_record(line, words, base=16, mark_valid=False))
    return records


def _records(text: str, starts: set[str]) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Split into records: (line, [(line, word), ...]); comments and blank lines are gone."""
    current: list[tuple[int, str]] = []
    for number, raw in enumerate(text.splitlines(), 1):
        for word in re.findall(r"[^\s:{}<>]+|[:{}<>]", raw.partition("#")[0]):
            if word.lower() in starts and current:
                yield current[0][0], current
                current = []
            current.append((number, word))
    if current:
        yield current[0][0], current


def _mce_record(first: int, words: list[tuple[int, str]], base: int, mark_valid: bool) -> MceRecord:
    reader = _Reader(words, base)
    record = MceRecord()
    if reader.take().lower() == "cpu":
        record = replace(record, cpu=reader.decimal())
        if reader.peek_number():
            record = replace(record, bank=reader.decimal())
    status = mcgstatus = 0
    while reader.more():
        key = reader.take().lower()
        match key:
            case "status":
                # The names mce-inject knows for MCG_STATUS are numbers here too.
                status |= reader.flags(_MCI | _MCG)
            case "mcgstatus":
                mcgstatus |= reader.flags(_MCG)
            case "addr":
                record = replace(record, addr=reader.number())
                status |= MCI_ADDRV if mark_valid else 0
            case "misc":
                record = replace(record, misc=reader.number())
                status |= MCI_MISCV if mark_valid else 0
            case "bank":
                record = replace(record, bank=reader.decimal())
            case "tsc":
                record = replace(record, tsc=reader.number())
            case "time":
                record = replace(record, time=reader.decimal())
            case "rip":
                ip, cs = reader.rip()
                record = replace(record, ip=ip, cs=cs)
            case "processor":
                vendor = reader.decimal()
                reader.expect(":")
                record = replace(record, vendor=vendor, cpuid=reader.number())
            case "socketid":
                record = replace(record, socket=reader.decimal())
            case "mcgcap":
                record = replace(record, mcgcap=reader.number())
            case "apicid":
                record = replace(record, apicid=reader.number())
            case "synd":
                record = replace(record, synd=reader.number())
            case "ipid":
                record = replace(record, ipid=reader.number())
            case "nobroadcast":
                record = replace(record, broadcast=False)
            case "in_irq" | "in_proc" | "hold":
                pass  # how it is raised; a record handed to the decoders is raised one way
            case _:
                raise TestbedError(f"line {reader.line}: '{key}' is no field of a machine check")
    if status == 0:
        raise TestbedError(f"line {first}: the record has no STATUS")
    return replace(record, status=status, mcgstatus=mcgstatus)


class _Reader:
    def __init__(self, words: list[tuple[int, str]], base: int) -> None:
        self._words = words
        self._at = 0
        self._base = base

    @property
    def line(self) -> int:
        return self._words[min(self._at, len(self._words) - 1)][0]

    def more(self) -> bool:
        return self._at < len(self._words)

    def take(self) -> str:
        if not self.more():
            raise TestbedError(f"line {self.line}: the record ends within a field")
        self._at += 1
        return self._words[self._at - 1][1]

    def expect(self, word: str) -> None:
        got = self.take()
        if got != word:
            raise TestbedError(f"line {self.line}: '{word}' expected, not '{got}'")

    def _parse(self, word: str, base: int) -> int | None:
        try:
            # C's strtoull(…, 0): a leading zero is octal, which Python's base 0 refuses.
            if base == 0 and re.fullmatch(r"0[0-7]+", word):
                return int(word, 8)
            return int(word, base)
        except ValueError:
            return None

    def peek_number(self) -> bool:
        return self.more() and self._parse(self._words[self._at][1], 0) is not None

    def number(self) -> int:
        return self._number(self._base)

    def decimal(self) -> int:
        """A field that every dialect writes in C's way (CPU, BANK, TIME, …)."""
        return self._number(0)

    def _number(self, base: int) -> int:
        word = self.take()
        value = self._parse(word, base)
        if value is None or not 0 <= value < 1 << 64:
            raise TestbedError(f"line {self.line}: '{word}' is no 64-bit number")
        return value

    def flags(self, names: dict[str, int]) -> int:
        value = 0
        first = True
        while self.more():
            word = self._words[self._at][1].lower()
            if word in names:
                value |= names[word]
            elif self._parse(word, self._base) is not None:
                value |= self.number()
                self._at -= 1
            elif first:
                raise TestbedError(f"line {self.line}: '{word}' is no status bit")
            else:
                break
            first = False
            self._at += 1
        return value

    def rip(self) -> tuple[int, int]:
        """(ip, cs) of NUMBER, CS:NUMBER or CS:<NUMBER> with an optional {SYMBOL}."""
        value, cs = self.number(), 0
        if self.more() and self._words[self._at][1] == ":":
            self._at += 1
            cs = value
            if self.more() and self._words[self._at][1] == "<":
                self._at += 1
                value = self.number()
                self.expect(">")
            else:
                value = self.number()
        if self.more() and self._words[self._at][1] == "{":
            while self.take() != "}":
                pass
        return value, cs


# Names of aer-inject; the values are the bits of the status registers
# (include/uapi/linux/pci_regs.h, PCI_ERR_COR_* and PCI_ERR_UNC_*).
AER_COR = {"rcvr": 0x1, "bad_tlp": 0x40, "bad_dllp": 0x80, "rep_roll": 0x100, "rep_timer": 0x1000}
AER_UNCOR = {
    "train": 0x1,
    "dlp": 0x10,
    "poison_tlp": 0x1000,
    "fcp": 0x2000,
    "comp_time": 0x4000,
    "comp_abort": 0x8000,
    "unx_comp": 0x10000,
    "rx_over": 0x20000,
    "malf_tlp": 0x40000,
    "ecrc": 0x80000,
    "unsup": 0x100000,
}
_PCI_ID = re.compile(r"(?:[0-9a-f]{1,4}:)?[0-9a-f]{1,2}:[0-9a-f]{1,2}\.[0-7]", re.IGNORECASE)


def parse_aer_inject(text: str) -> list[AerRecord]:
    """Records in aer-inject's language. Raises TestbedError with the line's number."""
    # A PCI address holds the colons that the other languages split at.
    lines = "\n".join(re.sub(r"(?<=[0-9a-fA-F]):(?=[0-9a-fA-F])", "\x01", ln) for ln in text.splitlines())
    records: list[AerRecord] = []
    for first, words in _records(lines, {"aer"}):
        if words[0][1].lower() != "aer":
            raise TestbedError(f"line {first}: a record begins with AER")
        records.append(_aer_record(first, [(n, w.replace("\x01", ":")) for n, w in words]))
    return records


def _aer_record(first: int, words: list[tuple[int, str]]) -> AerRecord:
    reader = _Reader(words, 0)
    reader.take()
    record = AerRecord()
    while reader.more():
        key = reader.take().lower()
        match key:
            case "cor_status" | "cor":
                record = replace(record, cor_status=record.cor_status | reader.flags(AER_COR))
            case "uncor_status" | "uncor":
                record = replace(record, uncor_status=record.uncor_status | reader.flags(AER_UNCOR))
            case "header_log" | "hl":
                a, b, c, d = (reader.number() for _ in range(4))
                record = replace(record, header_log=(a, b, c, d))
            case "pci_id" | "id":
                device = reader.take()
                if not _PCI_ID.fullmatch(device):
                    raise TestbedError(f"line {reader.line}: '{device}' is no PCI address (0000:01:00.0)")
                record = replace(record, device=device)
            case _:
                raise TestbedError(f"line {reader.line}: '{key}' is no field of an AER record")
    if not record.cor_status and not record.uncor_status:
        raise TestbedError(f"line {first}: the record has neither COR_STATUS nor UNCOR_STATUS")
    return record
