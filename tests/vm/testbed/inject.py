# SPDX-License-Identifier: MIT
"""Injections, each through the path a real error takes from the named point on.

mce_real, aer_real   the VM's QEMU raises #MC or the AER interrupt
mce                  the kernel's mce-inject module: from the decode chain on
mce_sim              hwerr_sim.ko calls mce_log(): from the record pool on, any field
aer                  the kernel's aer_inject module: from the root port's interrupt on
edac                 hwerr_sim.ko calls edac_mc_handle_error()
extlog, non_standard hwerr_sim.ko raises the RAS tracepoint that GHES raises
hwpoison, unpoison   the kernel's hwpoison-inject module: memory_failure()

Every function returns when the injection was accepted, not when it was handled.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import Any

from .errors import TestbedError
from .kernel import DEBUGFS, load_sim, modprobe, put
from .qmp import Monitor
from .records import MCG_LMCES, MCI_UC, AerRecord, MceRecord

SIM = DEBUGFS / "hwerr_sim"
AER_INJECT = Path("/dev/aer_inject")
_PCI = Path("/sys/bus/pci")
# include/uapi/linux/pci_regs.h: PCI_COMMAND, PCI_COMMAND_SERR.
_COMMAND, _SERR = 4, 0x100
_CHECK_INTERVAL = Path("/sys/devices/system/machinecheck/machinecheck0/check_interval")

# include/linux/cper.h, what GHES and extlog put into `sev`.
CPER_SEV = {"recoverable": 0, "fatal": 1, "corrected": 2, "informational": 3}
# include/acpi/ghes.h, what non_standard_event's `sev` holds.
GHES_SEV = {"none": 0, "corrected": 1, "recoverable": 2, "panic": 3}


# -- machine checks --------------------------------------------------------


def mce_real(record: MceRecord, broadcast: bool | None = None) -> None:
    """Put a machine check into a bank of the virtual CPU; an uncorrected one raises #MC.

    A corrected one waits in the bank for the kernel's next poll: see `poll_banks`.
    `broadcast` raises #MC on every CPU, as Intel's CPUs do unless MCG_STATUS says LMCES (8);
    None is as they do. QEMU gives each of the other CPUs a record of its own: bank 1, status
    0xa000000000000000. A kernel that waits for CPUs that took no #MC panics; an AMD VM
    panics on any uncorrected #MC, because its CPU cannot recover (no SUCCOR), unless
    the kernel takes it for an Intel one meanwhile (hwerr_sim.ko, vendor).
    Raises TestbedError if QEMU refuses it, for instance because the bank holds
    an uncorrected error already.
    """
    if broadcast is None:
        broadcast = bool(record.status & MCI_UC) and not record.mcgstatus & MCG_LMCES
    words = ["mce"]
    if broadcast:
        words.append("-b")
    values = (record.bank, record.status, record.mcgstatus, record.addr, record.misc)
    words += [str(record.cpu or 0), *(f"{v:#x}" for v in values)]
    with Monitor() as monitor:
        answer = monitor.hmp(" ".join(words)).strip()
    if answer:
        raise TestbedError(f"QEMU refuses the machine check: {answer}")


def poll_banks(seconds: int = 1) -> None:
    """Have the kernel poll the banks for corrected errors every so many seconds."""
    put(_CHECK_INTERVAL, str(seconds))


def mce(record: MceRecord) -> None:
    """Hand a machine check to the kernel's decode chain through mce-inject, flag "sw".

    Raises TestbedError for a record with fields that mce-inject has no file for.
    """
    beyond = record.beyond_mce_inject()
    if beyond:
        raise TestbedError(
            f"mce-inject cannot express {', '.join(beyond)}; it takes status, addr, misc, synd, bank, cpu. "
            "Use --via sim (hwerr_sim.ko), which takes every field"
        )
    directory = _mce_inject()
    put(directory / "flags", "sw\n")
    put(directory / "cpu", str(record.cpu or 0))
    for name in ("status", "addr", "misc", "synd"):
        put(directory / name, f"{getattr(record, name):#x}")
    # Writing the bank injects.
    put(directory / "bank", str(record.bank))


def mce_sim(record: MceRecord) -> None:
    """Hand a machine check with any field set to mce_log() through hwerr_sim.ko."""
    optional = {"cpuid": record.cpuid, "vendor": record.vendor, "tsc": record.tsc, "time": record.time}
    fields: dict[str, Any] = {
        name: getattr(record, name)
        for name in ("status", "addr", "misc", "mcgstatus", "bank", "socket", "ip", "cs", "mcgcap",
                     "apicid", "synd", "ipid")
    }  # fmt: skip
    fields["cpu"] = record.cpu or 0
    fields |= {k: v for k, v in optional.items() if v is not None}
    _sim("mce", fields)


def mce_any(record: MceRecord) -> str:
    """Through mce-inject if it can express the record, else through hwerr_sim.ko; says which."""
    if record.beyond_mce_inject():
        mce_sim(record)
        return "sim"
    mce(record)
    return "mce-inject"


def _mce_inject() -> Path:
    modprobe("mce-inject")
    directory = DEBUGFS / "mce-inject"
    if not directory.is_dir():
        raise TestbedError(f"{directory} does not exist though mce-inject is loaded: is debugfs mounted?")
    return directory


# -- PCI Express -----------------------------------------------------------


# hw/pci/pcie_aer.c, pcie_aer_error_list
_QEMU_CORRECTABLE = {
    "RCVR", "BAD_TLP", "BAD_DLLP", "REP_ROLL", "REP_TIMER", "ADV_NONFATAL", "INTERNAL", "HL_OVERFLOW"
}  # fmt: skip


def qemu_reports_correctable() -> bool:
    """Whether correctable AER errors of the virtual hardware raise an interrupt.

    Before QEMU 8.0 pcie_aer_msg_alldev() passed on uncorrectable messages only.
    """
    with Monitor() as monitor:
        return int(monitor.execute("query-version")["qemu"]["major"]) >= 8


def aer_real(device: str, error: str, correctable: bool = False, header_log: tuple[int, ...] = ()) -> str:
    """Have a device of the virtual machine report an AER error; returns what QEMU says.

    `error` is one of QEMU's names (POISON_TLP, MALF_TLP, BAD_TLP, ...) or one status bit
    as a number, then of the correctable register if `correctable`. Raises TestbedError for
    a correctable error if this QEMU cannot report it (see `qemu_reports_correctable`).
    """
    if (correctable or error.upper() in _QEMU_CORRECTABLE) and not qemu_reports_correctable():
        raise TestbedError(
            "this QEMU sets the bit of a correctable error but sends no message to the root port; "
            "use the aer_inject module (`hwerr-inject aer --cor-status BITS`)"
        )
    _undo_aer_inject()
    words = ["pcie_aer_inject_error"]
    if correctable:
        words.append("-c")
    words += [device, error, *(f"{w:#x}" for w in header_log)]
    with Monitor() as monitor:
        answer = monitor.hmp(" ".join(words)).strip()
    if not answer.startswith("OK"):
        raise TestbedError(f"QEMU refuses the AER error: {answer}")
    return answer


def pci_rescan(device: str) -> str:
    """Take a device off its bus and find it anew; returns its address.

    What an earlier error left in its registers is cleared with it. A fatal error has the kernel
    reset the device's link, and a driver without error handlers does not set it up again: it
    reports no further error. Raises TestbedError if it stays away.
    """
    address = pci_address(device)
    home = _PCI / "devices" / address
    put(home / "remove", "1")
    put(_PCI / "rescan", "1")
    if not home.exists():
        raise TestbedError(f"{address} did not come back after it was removed; see dmesg")
    # The firmware enables SERR# at boot, the kernel never; QEMU sends no error message without.
    with (home / "config").open("r+b", buffering=0) as config:
        config.seek(_COMMAND)
        command = int.from_bytes(config.read(2), "little")
        config.seek(_COMMAND)
        config.write((command | _SERR).to_bytes(2, "little"))
    return address


def pci_address(device: str) -> str:
    """The address (0000:01:00.0) of a device given by it or by its QEMU id. Raises TestbedError."""
    for candidate in (device, f"0000:{device}"):
        if Path("/sys/bus/pci/devices", candidate).exists():
            return candidate
    with Monitor() as monitor:
        found = _find_pci(monitor.execute("query-pci"), device)
    if found is None:
        raise TestbedError(f"there is no PCI device '{device}': give its address, or a QEMU id such as aer0")
    return found


def _find_pci(buses: list[dict[str, Any]], ident: str) -> str | None:
    for bus in buses:
        for device in bus["devices"]:
            if device["qdev_id"] == ident:
                return f"0000:{device['bus']:02x}:{device['slot']:02x}.{device['function']}"
            bridge = device.get("pci_bridge", {})
            found = _find_pci([{"devices": bridge.get("devices", [])}], ident)
            if found:
                return found
    return None


def _undo_aer_inject() -> None:
    """aer_inject answers for the error registers of a device it was used on, until it goes."""
    if Path("/sys/module/aer_inject").exists():
        subprocess.run(["rmmod", "aer_inject"], check=True)


def aer(record: AerRecord, mask_override: bool = False) -> None:
    """Inject AER status bits through the kernel's aer_inject module.

    `mask_override` loads it so that bits masked in the device are reported too.
    """
    data = aer_data(record, mask_override)
    try:
        with AER_INJECT.open("wb", buffering=0) as file:
            file.write(data)
    except OSError as error:
        raise TestbedError(
            f"aer_inject refuses it for {record.device}: {error.strerror}"
            " (EINVAL: all its bits are masked in the device, see --mask-override; "
            "EPROTONOSUPPORT: the device or its root port has no AER)"
        ) from error


def aer_data(record: AerRecord, mask_override: bool = False) -> bytes:
    """Load aer_inject; what is written to AER_INJECT then injects the record."""
    if record.device is None:
        raise TestbedError("the record names no device; give one with --bdf")
    # Bits of an earlier injection that nobody cleared would be reported again.
    _undo_aer_inject()
    modprobe("aer_inject", f"aer_mask_override={int(mask_override)}")
    domain, bus, slot, function = _split_address(pci_address(record.device))
    # struct aer_error_inj of drivers/pci/pcie/aer_inject.c
    header = record.header_log or (0, 0, 0, 0)
    status = record.uncor_status, record.cor_status
    return struct.pack("=BBBxIIIIIII", bus, slot, function, *status, *header, domain)


def _split_address(address: str) -> tuple[int, int, int, int]:
    domain, bus, rest = address.split(":")
    slot, function = rest.split(".")
    return int(domain, 16), int(bus, 16), int(slot, 16), int(function)


# -- memory controllers and firmware ---------------------------------------


def edac(
    kind: str = "ce",
    *,
    mc: int = 0,
    page: int = 0,
    offset: int = 0,
    grain: int = 64,
    syndrome: int = 0,
    layers: tuple[int, int, int] = (0, 0, -1),
    count: int = 1,
    repeat: int = 1,
    msg: str = "simulated error",
) -> None:
    """Report an error of a memory controller; `kind`: ce, ue, deferred, fatal, info.

    `repeat` reports it so many times, each an event of its own.
    """
    top, mid, low = layers
    fields = {"mc": mc, "type": kind, "page": page, "offset": offset, "grain": grain, "syndrome": syndrome,
              "top": top, "mid": mid, "low": low, "count": count, "repeat": repeat}  # fmt: skip
    _sim("edac", fields, f"msg={msg}")


def edac_layers(label: str) -> tuple[int, tuple[int, int, int]]:
    """Controller and layers of a DIMM of hwerr_sim.ko: "DIMM_D2" is (1, (1, 1, -1))."""
    load_sim()
    for dimm in sorted(Path("/sys/devices/system/edac/mc").glob("mc*/dimm*")):
        if (dimm / "dimm_label").read_text("ascii").strip() == label:
            # "channel 1 slot 0 "
            places = [int(w) for w in (dimm / "dimm_location").read_text("ascii").split() if w.isdigit()]
            return int(dimm.parent.name.removeprefix("mc")), (places[0], places[1], -1)
    raise TestbedError(f"there is no DIMM '{label}'; there are DIMM_A1 DIMM_A2 … DIMM_D2")


def extlog(
    severity: str, addr: int | None = None, mask: int = 0, text: str = "", **fields: int | str
) -> None:
    """Report a memory error as the extended MCA log does; `severity`: a key of CPER_SEV."""
    values: dict[str, Any] = {"sev": CPER_SEV[severity], "mask": mask, **fields}
    if addr is not None:
        values["addr"] = addr
    _sim("extlog", values, f"text={text}")


def non_standard(
    severity: str, section: str, data: bytes = b"", fru: str | None = None, text: str = ""
) -> None:
    """Report a firmware error record of section type `section`; `severity`: a key of GHES_SEV."""
    values: dict[str, Any] = {"sev": GHES_SEV[severity], "section": section}
    if data:
        values["data"] = data.hex()
    if fru:
        values["fru"] = fru
    _sim("non_standard", values, f"text={text}")


def _sim(name: str, fields: dict[str, Any], rest: str = "") -> None:
    load_sim()
    # 64-bit values in hexadecimal would be refused for a signed field; decimal suits all.
    line = " ".join(f"{k}={v}" for k, v in fields.items())
    put(SIM / name, f"{line} {rest}".strip())


# -- poisoned memory -------------------------------------------------------


def hwpoison(pfn: int) -> None:
    """memory_failure() on a page frame, as for a real uncorrected error."""
    modprobe("hwpoison-inject")
    put(DEBUGFS / "hwpoison/corrupt-pfn", str(pfn))


def unpoison(pfn: int) -> None:
    """Take a page frame back into use."""
    modprobe("hwpoison-inject")
    put(DEBUGFS / "hwpoison/unpoison-pfn", str(pfn))
