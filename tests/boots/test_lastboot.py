# SPDX-License-Identifier: MIT
"""Errors of an earlier boot: two boots of one machine, which is lost in the first.

Each test boots its VMs itself, with a persistent store (ACPI ERST) that outlives them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import erst
from erst import CORRECTED, FATAL, FIRMWARE, MEMORY, RECOVERABLE, Section

TOP = Path(__file__).resolve().parents[2]
KERNEL = os.environ.get("HWERR_KERNEL", "6.12")
LOST = 71
# VAL UC EN MISCV ADDRV PCC S, memory controller, channel 0
STATUS, ADDR, BANK = 0xBF000000000000C0, 0x40001000, 9
INJECT = (
    f"hwerr-inject mce-real --bank {BANK} --status {STATUS:#x} --addr {ADDR:#x} --misc 0x8c --mcgstatus 0x5"
)
SHOW = "hwerr-watch --since oldest --timeout 0 --json"


def boot(store: Path, script: str, *options: str, append: str = "") -> subprocess.CompletedProcess[str]:
    backend = f"memory-backend-file,id=erst,mem-path={store},size=0x10000,share=on"
    argv = [
        str(TOP / "tests/vm/run"), "--kernel", KERNEL, "--cpu", "intel", "--quiet", "--append", append,
        "--qemu-opts", "-object", backend, "-device", "acpi-erst,memdev=erst", *options,
        "--", "bash", "-c", script,
    ]  # fmt: skip
    return subprocess.run(argv, cwd=TOP, capture_output=True, text=True, timeout=500, check=False)


def parse(lines: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.splitlines() if line.startswith("{")]


def test_a_fatal_machine_check_is_an_event_of_the_next_boot(tmp_path: Path) -> None:
    store = tmp_path / "erst"
    start = datetime.now(UTC).replace(microsecond=0)
    # A new store is empty, and says nothing.
    lost = boot(store, f"{SHOW} >&2; {INJECT}; sleep 60")
    assert lost.returncode == LOST, lost.stderr
    assert "Kernel panic - not syncing: Fatal machine check" in lost.stderr
    assert not parse(lost.stderr)

    again = boot(
        store,
        f"ls /sys/fs/pstore; cat /proc/sys/kernel/random/boot_id; {SHOW}; echo ---;"
        f" hwerr-watch --since boot --timeout 0 --json; echo ---; rmmod hwerr; insmod $HWERR_KO; {SHOW}",
    )
    assert again.returncode == 0, again.stderr
    first, this_boot, second = (parse(part) for part in again.stdout.split("---\n"))
    (event,) = first
    got = {
        k: event[k]
        for k in ("source", "severity", "earlier", "boot_id", "time_mono_ns", "phys_addr", "origin")
    }
    assert got == {
        "source": "mce", "severity": "fatal", "earlier": True, "boot_id": None, "time_mono_ns": 0,
        "phys_addr": f"{ADDR:#x}", "origin": "hardware",
    }  # fmt: skip
    assert (event["mce"]["status"], event["mce"]["bank"]) == (f"{STATUS:#x}", BANK)
    # Whose the page was then is not known now, and that is said.
    assert event["owners_unknown"]
    assert not event["guests"] + event["tasks"]
    assert start <= datetime.fromisoformat(event["time"]) <= datetime.now(UTC)
    # Nothing of this boot, and nothing cleared: pstore has it, and the next load tells it again.
    assert not this_boot
    (record,) = re.findall(r"^mce-erst-(\d+)$", again.stdout, re.M)
    assert f"{int(record):#x}" in event["text"]
    assert [e["mce"] for e in second] == [event["mce"]]


THEN = datetime(2031, 2, 3, 4, 5, 6, tzinfo=UTC)
UNKNOWN = UUID("01234567-89ab-cdef-0123-456789abcdef")
DMESG = UUID("c197e04e-d545-4a70-9c17-a5549419eb12")
MCE = UUID("fe08ffbe-95e4-4be7-bc73-4096044a38fc")
REGION, REGION_LEN = 0x30000000, 0x10000


def test_records_of_firmware_and_records_that_lie(tmp_path: Path) -> None:
    dimm = Section(MEMORY, FATAL, erst.memory(0x12345678000), b"DIMM_A1")
    other = Section(UNKNOWN, CORRECTED, b"\x01\x02\x03")
    erst.write_store(
        tmp_path / "erst",
        [
            erst.record(0x101, [dimm, other], time=THEN),
            erst.record(0x102, [Section(MEMORY, RECOVERABLE, erst.memory(0x5000))], flags=4),
            # None of these may be told, nor end the kernel.
            erst.record(0x201, [Section(DMESG, FATAL, b"log")]),
            erst.record(0x202, [Section(MEMORY, FATAL, b"", offset=0x7FFFFFFF, length=80)]),
            erst.record(0x203, [Section(MEMORY, FATAL, b"", length=0xFFFFFFFF)]),
            erst.record(0x204, [Section(MCE, FATAL, b"\xff" * 40)]),
            erst.record(0x205, [Section(MEMORY, FATAL, bytes(80))], signature=b"NOPE"),
        ],
    )
    # A section that the count only claims, and one too short for an address.
    region = (
        erst.status_block(
            [erst.generic_data(dimm, THEN), erst.generic_data(Section(FIRMWARE, RECOVERABLE, b"abc"))], FATAL
        )
        + erst.status_block([erst.generic_data(Section(MEMORY, CORRECTED, bytes(8)))], CORRECTED)
        + erst.status_block([erst.generic_data(dimm, length=0xFFFFFFF0)], FATAL)
    )
    (tmp_path / "region").write_bytes(region)
    (tmp_path / "bert").write_bytes(erst.bert_table(REGION, REGION_LEN))
    done = boot(
        tmp_path / "erst",
        f"{SHOW}; echo ---; dmesg | grep BERT:",
        "-acpitable", f"sig=BERT,data={tmp_path}/bert",
        "-device", f"loader,file={tmp_path}/region,addr={REGION:#x},force-raw=on",
        append=f"memmap={REGION_LEN:#x}${REGION:#x}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    events, kernel = done.stdout.split("---\n")
    # The kernel itself found and printed the region, which zeroes the blocks' status.
    assert "BERT: Total records found" in kernel
    told = [
        (
            e["text"],
            e["severity"],
            e["component"],
            e["cper"]["section"],
            e["cper"]["data"],
            e.get("phys_addr"),
            e["time"],
        )
        for e in parse(events)
    ]
    time, data = "2031-02-03T04:05:06.000000000Z", dimm.data.hex()
    assert told == [
        ("kept in ERST as 0x101", "fatal", "memory", str(MEMORY), data, "0x12345678000", time),
        ("kept in ERST as 0x101", "corrected", "unknown", str(UNKNOWN), "010203", None, time),
        ("kept in ERST as 0x102 (simulated)", "recoverable", "memory", str(MEMORY),
         erst.memory(0x5000).hex(), "0x5000", None),
        ("kept in BERT", "fatal", "memory", str(MEMORY), data, "0x12345678000", time),
        ("kept in BERT", "recoverable", "unknown", str(FIRMWARE), "616263", None, None),
        ("kept in BERT", "corrected", "memory", str(MEMORY), bytes(8).hex(), None, None),
    ]  # fmt: skip
    for e in parse(events):
        assert e["earlier"]
        # Not even where the time is not known is it taken for this boot's.
        assert e["boot_id"] is None
        assert not e["linked"]
        assert not e["coalesced"]
        assert (e["source"], e["origin"], e["time_mono_ns"]) == ("cper", "hardware", 0)
    assert parse(events)[0]["cper"]["fru_text"] == "DIMM_A1"
