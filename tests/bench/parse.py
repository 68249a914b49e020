#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Records parsed a second, against struct.unpack of the head alone.

A buffer of 32 records, each a machine check with its memory range and the guest it
hits, as one read(2) brings them. Both are measured in turns, so that what else runs on
the machine slows both of a turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import timeit
from typing import Any

import hwerr_notify as h
from hwerr_notify.layout import Layout

RECORDS = 32


def measure(turns: int = 25, loops: int = 300) -> dict[str, Any]:
    """{"parse_per_s", "unpack_per_s": of the best turn, "ratios": of each turn}"""
    head = Layout("hwerr_record").struct
    record = h.build(
        h.Mce(status=0xBD000000000000C0, addr=0xAE00000, misc=0x8C, bank=9),
        h.Memory(0xAE00000, 4096, resolve_ns=41000),
        h.Guest(251, h.GuestFlags.KVM, start_ns=61230000000, hva=0x7F9E70E00000, gpa=0x5000000, len=4096),
        severity=h.Severity.RECOVERABLE, source=h.Source.MCE, seq=1 << 20, id=1 << 20, count=1,
        time_mono_ns=81262000111, time_real_ns=1767323045123456789,
    )  # fmt: skip
    buffer, only_head, form = record.raw * RECORDS, record.raw[: head.size], head.format
    parse, unpack = h.parse, struct.unpack

    def reference() -> None:
        for _ in range(RECORDS):
            unpack(form, only_head)

    took = []
    for _ in range(turns):
        heads = timeit.timeit(reference, number=loops)
        took.append((heads, timeit.timeit(lambda: parse(buffer), number=loops)))
    each = loops * RECORDS
    return {
        "parse_per_s": each / min(p for _, p in took),
        "unpack_per_s": each / min(u for u, _ in took),
        "ratios": [u / p for u, p in took],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args()
    result = measure()
    if args.json:
        print(json.dumps(result))
        return
    print(f"parse          {result['parse_per_s']:12,.0f} records/s")
    print(f"struct.unpack  {result['unpack_per_s']:12,.0f} heads/s")
    print(f"ratio          {statistics.median(result['ratios']):12.2f}")


if __name__ == "__main__":
    main()
