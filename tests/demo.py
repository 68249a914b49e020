# SPDX-License-Identifier: MIT
"""`make demo`: a KVM guest, one real error on each path under it, and what hwerr-watch shows.

Runs as root in the test VM. Ends with status 0 if every error came out of
/dev/hwerr and those in the guest's memory named the guest and the address that
QEMU itself gives for the page.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "vm"))

from testbed import inject
from testbed.guest import Guest, GuestConfig
from testbed.records import MceRecord

import hwerr_notify

# An uncorrected DRAM error as AMD's northbridge (bank 4) logs it: VAL UC EN MISCV ADDRV,
# extended code 8, which is the one the kernel takes for DRAM on a CPU without SMCA.
RECOVERABLE_READ = 0xBC00_0000_0008_0813


def step(text: str) -> None:
    print(f"\n\033[2m# {text}\033[0m" if "NO_COLOR" not in os.environ else f"\n# {text}", flush=True)


def expect(device: hwerr_notify.Device, source: hwerr_notify.Source) -> hwerr_notify.Event:
    """Wait for an event of that source, and fail if none comes."""
    while True:
        events = device.read(timeout=60)
        if not events:
            sys.exit(f"demo: no {source.name} event came within 60 s")
        for event in events:
            if event.source == source:
                return event


def check(event: hwerr_notify.Event, guest: Guest, gpa: int) -> None:
    """The event must name the guest and the page."""
    named = [(g.pid, g.gpa) for g in event.guests]
    if (guest.pid, gpa) not in named:
        sys.exit(f"demo: expected pid {guest.pid} gpa {gpa:#x}, the event names {named}")


def main() -> int:
    step("starting a KVM guest, web1, with 64 MiB")
    with Guest.start(GuestConfig(name="web1", code="count")) as guest, hwerr_notify.open() as device:
        pages = {"mce": 0x1000000, "edac": 0x1803000, "poison": 0x2004000}
        phys = {name: guest.gpa2hpa(gpa) for name, gpa in pages.items()}
        watch = subprocess.Popen(
            ["hwerr-watch", "--since", str(device.info().next_seq), "--count", "4",
             "--source", "mce,aer,edac,memory_failure"]
        )  # fmt: skip

        step(
            f"machine check at {phys['mce']:#x}, which QEMU says is web1's {pages['mce']:#x}:"
            " mce-inject, decode chain"
        )
        inject.mce(MceRecord(status=RECOVERABLE_READ, addr=phys["mce"], misc=0x8C, bank=4))
        check(expect(device, hwerr_notify.Source.MCE), guest, pages["mce"])

        step("poisoned TLP from a PCIe device: the virtual machine's own AER interrupt")
        inject.aer_real("aer0", "POISON_TLP")
        expect(device, hwerr_notify.Source.AER)

        step(f"corrected error of DIMM_A1 at web1's {pages['edac']:#x}: the memory controller's driver")
        mc, layers = inject.edac_layers("DIMM_A1")
        inject.edac("ce", mc=mc, layers=layers, page=phys["edac"] >> 12, grain=64)
        check(expect(device, hwerr_notify.Source.EDAC), guest, pages["edac"])

        step(f"memory_failure() takes web1's page {pages['poison']:#x} out of use")
        inject.hwpoison(phys["poison"] >> 12)
        check(expect(device, hwerr_notify.Source.MEMORY_FAILURE), guest, pages["poison"])

        status = watch.wait(timeout=60)
        step("the same, for a program")
        subprocess.run(
            ["hwerr-watch", "--json", "--since", "oldest", "--source", "mce", "--count", "1"], check=True
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
