# SPDX-License-Identifier: MIT
"""Words for people: what broke, where it is, whom it hits."""

from __future__ import annotations

from .enums import Component, Flags, Kind, MfResult, Severity, Source
from .event import Event, Guest, Pci, Task

__all__ = ["aer_names", "hits", "message", "owner", "printable", "size", "what", "where"]

# Bits of the AER status registers (PCIe base specification, 7.8.4.2 and 7.8.4.5) under
# the names that Linux logs (drivers/pci/pcie/aer.c).
AER_CORRECTABLE = {
    0: "RxErr", 6: "BadTLP", 7: "BadDLLP", 8: "Rollover", 12: "Timeout", 13: "NonFatalErr",
    14: "CorrIntErr", 15: "HeaderOF",
}  # fmt: skip
AER_UNCORRECTABLE = {
    0: "Undefined", 4: "DLP", 5: "SDES", 12: "TLP", 13: "FCP", 14: "CmpltTO", 15: "CmpltAbrt",
    16: "UnxCmplt", 17: "RxOF", 18: "MalfTLP", 19: "ECRC", 20: "UnsupReq", 21: "ACSViol",
    22: "UncorrIntErr", 23: "BlockedTLP", 24: "AtomicOpBlocked", 25: "TLPBlockedErr",
    26: "PoisonTLPBlocked",
}  # fmt: skip

_COMPONENT = {
    Component.UNKNOWN: "hardware",
    Component.MEMORY: "memory",
    Component.CACHE: "cache",
    Component.TLB: "TLB",
    Component.BUS: "bus",
    Component.PROCESSOR: "processor",
    Component.PCIE: "PCIe",
    Component.IO: "I/O",
    Component.STORAGE: "storage",
    Component.GUEST: "guest",
    Component.FIRMWARE: "firmware",
}

_SEVERITY = {
    Severity.INFO: "",
    Severity.CORRECTED: "corrected",
    Severity.DEFERRED: "deferred",
    Severity.RECOVERABLE: "uncorrected",
    Severity.FATAL: "fatal",
}

_KIND = {
    Kind.UCNA: "no action needed",
    Kind.SRAO: "found before use",
    Kind.SRAR: "consumed",
    Kind.NONFATAL: "nonfatal",
}

_RESULT = {
    MfResult.IGNORED: "left in use",
    MfResult.FAILED: "could not be taken out of use",
    MfResult.DELAYED: "will be taken out of use later",
    MfResult.RECOVERED: "taken out of use",
}

# MCi_STATUS.MCACOD of a memory controller error is 000F 0000 1MMM CCCC (SDM 3B, 16.9.2);
# F says that some further reports are left out.
_MCACOD_MEMORY, _MCACOD_MEMORY_MASK = 0x0080, 0xEF80


def printable(text: str) -> str:
    """`text` with what could move a cursor or forge a line written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size(n: int) -> str:
    """Bytes, in the largest unit that divides them: "4 KiB"."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if n and not n % (1 << shift):
            return f"{n >> shift} {unit}"
    return f"{n} B"


def aer_names(event: Event, pci: Pci) -> list[str]:
    """Names of the bits set in the AER status register; a bit without one as "bit 31"."""
    if event.source == Source.AER:
        corrected = event.raw_severity == 2
    else:
        corrected = event.severity <= Severity.CORRECTED
    names = AER_CORRECTABLE if corrected else AER_UNCORRECTABLE
    return [names.get(n, f"bit {n}") for n in range(32) if pci.status >> n & 1]


def where(event: Event) -> str:
    """The part, as short as can be: "DIMM_A1", "bank 9", "0000:01:00.0"; "" if unknown."""
    if event.edac:
        e = event.edac
        if e.label:
            return printable(e.label)
        layers = "/".join("-" if n < 0 else str(n) for n in e.layers)
        return f"mc{e.mc} {layers}"
    if event.pci:
        return event.pci.address
    if event.vcpu:
        return f"vCPU {event.vcpu.vcpu}"
    if event.block:
        return printable(event.block.disk) or f"{event.block.major}:{event.block.minor}"
    if event.cper and event.cper.fru_text:
        return printable(event.cper.fru_text)
    if event.mce:
        return "firmware" if event.mce.bank == 255 else f"bank {event.mce.bank}"
    return ""


def owner(of: Guest | Task) -> str:
    """A process hit: "VM web1 (pid 251)", "postgres (pid 300)"."""
    if isinstance(of, Guest):
        return f"VM {printable(of.name or of.comm or '?')} (pid {of.pid})"
    return f"{printable(of.comm or '?')} (pid {of.pid})"


def _hit(of: Guest | Task) -> str:
    if isinstance(of, Guest):
        end = ", which was stopped" if of.stopped else ""
        if of.by_device:
            return f"{owner(of)}, which holds the device{end}"
        if of.as_a_whole:
            return f"{owner(of)}{end}"
        if of.gpa is not None:
            return f"{owner(of)} at guest address {of.gpa:#x}{end}"
        return f"{owner(of)} at {of.hva:#x}{end}"
    if of.by_device:
        return f"{owner(of)}, which holds the device"
    return f"{owner(of)} at {of.va:#x}"


def hits(event: Event, most: int = 4) -> str:
    """Whom it hits, at most `most` of them: "hits VM web1 (pid 251) at guest address 0x5000000"."""
    flags = event.flags
    owners: list[Guest | Task] = [*event.guests, *event.tasks]
    unknown = "others unknown" if owners else "whom it hits could not be determined"
    text = ""
    if owners:
        text = "hits " + " and ".join(_hit(o) for o in owners[:most])
        if len(owners) > most:
            text += f" and {len(owners) - most} more"
    elif event.memory and not flags & (Flags.OWNERS_UNKNOWN | Flags.REDACTED):
        text = "hits no process"
    more = []
    if flags & Flags.OWNERS_TRUNCATED:
        more.append("more than are listed")
    if flags & Flags.OWNERS_UNKNOWN:
        more.append(unknown)
    return "; ".join([text, *more] if text else more)


def what(event: Event) -> str:
    """What broke and how: "uncorrected memory error (found before use), 4 KiB at 0xae00000"."""
    m = event.memory
    component = _COMPONENT.get(event.component, str(event.component))
    if event.source == Source.MEMORY_FAILURE and m:
        result = _RESULT.get(m.result, str(m.result)) if m.result is not None else "hit"
        text = f"memory of {size(m.phys_len)} at {m.phys_addr:#x} {result}"
    elif event.source in (Source.USER, Source.KVM, Source.SIGBUS, Source.BLOCK, Source.PANIC) and event.text:
        text = printable(event.text)
    else:
        severity = _SEVERITY.get(event.severity, str(event.severity))
        noun = "report" if event.severity == Severity.INFO else "error"
        text = " ".join(w for w in (severity, component, noun) if w)
        if event.kind != Kind.NONE:
            text += f" ({_KIND.get(event.kind, str(event.kind))})"
        if event.pci and event.pci.status:
            text += f" {', '.join(aer_names(event, event.pci))}"
        if event.mce and event.mce.status & _MCACOD_MEMORY_MASK == _MCACOD_MEMORY:
            channel = event.mce.status & 0xF
            if channel != 0xF and event.mce.vendor != 2:
                text += f" on channel {channel}"
        if m:
            text += f", {size(m.phys_len)} at {m.phys_addr:#x}"
        if event.text:
            text += f": {printable(event.text)}"
    if event.flags & Flags.COALESCED:
        text += f", repeated {event.count} times"
    elif event.count > 1:
        text += f", {event.count} times"
    return text


def message(event: Event) -> str:
    """The whole in one line; see `Event.message`."""
    parts = [what(event)]
    place = where(event)
    if event.mce and event.mce.bank != 255:
        cpu = f" of CPU {event.cpu}" if event.cpu is not None else ""
        place = f"{place}{cpu}, socket {event.mce.socket}"
    elif event.source == Source.EDAC and event.edac and event.edac.label:
        place += f" (controller {event.edac.mc})"
    if place:
        parts[0] = f"{parts[0]}, in {place}" if ": " not in parts[0] else f"{place}: {parts[0]}"
    whom = hits(event)
    if whom:
        parts.append(whom)
    if event.action_required:
        parts.append("it cannot go on")
    return "; ".join(parts)
