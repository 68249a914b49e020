# SPDX-License-Identifier: MIT
"""Runs in a VM with lockdown=integrity and module.sig_enforce=1: real errors, and what is told of them.

debugfs is closed there, so every error comes from the virtual hardware, or from what the
kernel offers to everybody with the right. Prints one JSON object a line; an assertion that
fails is its status.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from testbed import inject
from testbed.guest import Guest, GuestConfig
from testbed.kernel import put
from testbed.records import MceRecord
from testbed.victim import Victim
from testbed.wait import wait_events

import hwerr_notify
from hwerr_notify import Device, Event, Flags, Kind, Severity, Source
from hwerr_notify.moduleless import Moduleless

PAGE = 4096
VAL, UC, EN, MISCV, ADDRV, S = (1 << n for n in (63, 61, 60, 59, 58, 56))
PHYSICAL_PAGE = 2 << 6 | 12
AMD_DRAM = 8 << 16 | 0x0813
UNSURE = Flags.OWNERS_UNKNOWN | Flags.OWNERS_TRUNCATED
PAGES = 50


def wait(device: Device, *wanted: Callable[[Event], bool]) -> tuple[Event, ...]:
    events = wait_events(device, *wanted)
    for event in events:
        print(json.dumps(event.to_json()), flush=True)
    return events


def told(event: Event, guest: Guest, gpa: int | None, hva: int) -> None:
    assert not event.flags & UNSURE, event.flags
    assert not event.tasks
    (hit,) = event.guests
    assert (hit.pid, hit.gpa, hit.hva, hit.len) == (guest.pid, gpa, hva, PAGE), (hit, gpa, hva)


def locked_down() -> None:
    assert "[integrity]" in Path("/sys/kernel/security/lockdown").read_text("ascii")
    done = subprocess.run(["insmod", os.environ["HWERR_SIM_KO"]], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Key was rejected" in done.stderr, done.stderr


def memory_failure(device: Device) -> None:
    with Victim() as victim:
        victim.poison()
        (event,) = wait(device, lambda e: e.source == Source.MEMORY_FAILURE)
        assert [(t.pid, t.va) for t in event.tasks] == [(victim.memory.pid, victim.memory.va)]
    with Guest.start(GuestConfig(name="hard", code="count", backing="memfd")) as guest:
        gpa = 0x600000
        hva = guest.gpa2hva(gpa)
        put(Path("/sys/devices/system/memory/hard_offline_page"), f"{guest.gpa2hpa(gpa):#x}")
        (event,) = wait(device, lambda e: e.source == Source.MEMORY_FAILURE)
        told(event, guest, gpa, hva)


def pci_express(device: Device) -> None:
    inject.aer_real("aer0", "POISON_TLP", header_log=(5, 6, 7, 8))
    (event,) = wait(device, lambda e: e.source == Source.AER)
    assert (event.severity, event.kind) == (Severity.RECOVERABLE, Kind.NONFATAL)
    assert event.pci is not None
    assert (event.pci.address, event.pci.status) == (inject.pci_address("aer0"), 0x1000)


def random_pages(device: Device) -> None:
    """Corrected errors in a bank of the CPU, found by the kernel's poll; each is told before the next."""
    inject.poll_banks()
    starts = [(0, 0xA0000), (0x100000, (64 << 20) - 0x100000)]
    for backing in ("anon", "thp", "hugetlb", "memfd"):
        random.seed(backing)
        with Guest.start(GuestConfig(name=backing, code="count", backing=backing)) as guest:
            for n in range(PAGES):
                first, length = random.choice(starts)
                gpa = first + random.randrange(length // PAGE) * PAGE
                addr = guest.gpa2hpa(gpa)
                status = VAL | EN | ADDRV | MISCV | AMD_DRAM
                misc = n << 32 | PHYSICAL_PAGE
                inject.mce_real(MceRecord(status=status, addr=addr, misc=misc, bank=4))
                (event,) = wait(device, lambda e, m=misc: e.mce is not None and e.mce.misc == m)  # type: ignore[misc]
                told(event, guest, gpa, guest.gpa2hva(gpa))


def machine_check(device: Device) -> None:
    """#MC, with memory_failure() behind it."""
    with Guest.start(GuestConfig(name="tcg", accel="tcg", backing="memfd")) as guest:
        gpa = 0x600000
        addr, hva = guest.gpa2hpa(gpa), guest.gpa2hva(gpa)
        status = VAL | UC | EN | MISCV | ADDRV | S | 0xC0
        inject.mce_real(MceRecord(status=status, mcgstatus=0xD, addr=addr, misc=PHYSICAL_PAGE, bank=9))
        first, second = wait(
            device, lambda e: e.source == Source.MCE, lambda e: e.source == Source.MEMORY_FAILURE
        )
        assert (first.severity, first.kind) == (Severity.RECOVERABLE, Kind.SRAO)
        told(first, guest, None, hva)
        assert second.id == first.seq
        assert second.flags & Flags.LINKED
        told(second, guest, None, hva)


def main() -> int:
    locked_down()
    with hwerr_notify.open() as device:
        assert isinstance(device, Moduleless)
        assert not device.missing
        if os.environ["HWERR_VM_CPU"] == "amd":
            memory_failure(device)
            pci_express(device)
            random_pages(device)
        else:
            machine_check(device)
        assert device.stats().dropped == 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
