# SPDX-License-Identifier: GPL-2.0-only
"""The kernel's rules for machine checks, transcribed: severities[] and mce_severity_amd() of
arch/x86/kernel/cpu/mce/severity.c (6.12). An oracle that shares nothing with kmod/classify.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

VAL, OVER, UC, EN, MISCV, ADDRV, PCC, S, AR = (1 << n for n in range(63, 54, -1))
DEFERRED = 1 << 44
RIPV, EIPV, MCIP, SEAM_NR = 1, 2, 4, 1 << 12
MCACOD, SCRUBMSK, SCRUB, L3WB, DATA, INSTR = 0xEFFF, 0xEFF0, 0xC0, 0x17A, 0x134, 0x150
ADDR = ADDRV | MISCV


class Context(StrEnum):
    KERNEL = "kernel"
    USER = "user"
    KERNEL_RECOV = "kernel with a fixup"


@dataclass(frozen=True)
class Rule:
    severity: str
    message: str
    mask: int = 0
    result: int = 0
    mcgmask: int = 0
    mcgres: int = 0
    ser: bool | None = None
    context: Context | None = None
    exception: bool | None = None


def _set(bits: int) -> dict[str, Any]:
    return {"mask": bits, "result": bits}


KERNEL, USER, RECOV = Context.KERNEL, Context.USER, Context.KERNEL_RECOV
SAR = UC | S | AR
RULES = [
    Rule("NO", "Invalid", VAL, 0),
    Rule("NO", "Not enabled", EN, 0, exception=True),
    Rule("PANIC", "Processor context corrupt", **_set(PCC)),
    Rule("PANIC", "MCIP not set in MCA handler", mcgmask=MCIP, exception=True),
    Rule("PANIC", "Neither restart nor error IP", mcgmask=RIPV | EIPV, exception=True),
    Rule("PANIC", "In kernel and no restart IP", mcgmask=RIPV, context=KERNEL, exception=True),
    Rule("PANIC", "In kernel and no restart IP", mcgmask=RIPV, context=RECOV, exception=True),
    Rule("KEEP", "Corrected error", UC, 0, ser=False),
    Rule("AO", "memory scrubbing error", UC | AR | SCRUBMSK, UC | SCRUB, ser=True),
    Rule("AO", "last level cache writeback error", UC | AR | MCACOD, UC | L3WB, ser=True),
    # The Skylake patrol scrubber's rule, which depends on model and bank, is tested alone.
    Rule("UCNA", "Uncorrected no action required", SAR, UC, ser=True),
    Rule("PANIC", "Illegal combination (UCNA with AR=1)", OVER | SAR, UC | AR, ser=True),
    Rule("KEEP", "Non signaled machine check", S, 0, ser=True),
    Rule("PANIC", "Action required with lost events", **_set(OVER | SAR), ser=True),
    Rule("KEEP", "Action required but unaffected thread is continuable", OVER | SAR | ADDR, SAR | ADDR,
         RIPV | EIPV, RIPV, ser=True),
    Rule("AR", "data load in recoverable area", OVER | SAR | ADDR | MCACOD, SAR | ADDR | DATA, ser=True,
         context=RECOV),
    Rule("AR", "data load in a user process", OVER | SAR | ADDR | MCACOD, SAR | ADDR | DATA, ser=True,
         context=USER),
    Rule("AR", "instruction fetch in a user process", OVER | SAR | ADDR | MCACOD, SAR | ADDR | INSTR,
         ser=True, context=USER),
    Rule("AR", "data load in SEAM non-root mode", OVER | SAR | ADDR | MCACOD, SAR | ADDR | DATA, SEAM_NR,
         SEAM_NR, ser=True, context=KERNEL),
    Rule("AR", "instruction fetch in SEAM non-root mode", OVER | SAR | ADDR | MCACOD, SAR | ADDR | INSTR,
         SEAM_NR, SEAM_NR, ser=True, context=KERNEL),
    Rule("PANIC", "data load in unrecoverable area", OVER | SAR | ADDR | MCACOD, SAR | ADDR | DATA,
         ser=True, context=KERNEL),
    Rule("PANIC", "instruction fetch in kernel", OVER | SAR | ADDR | MCACOD, SAR | ADDR | INSTR, ser=True,
         context=KERNEL),
    Rule("PANIC", "Action required: unknown MCACOD", OVER | SAR, SAR, ser=True),
    Rule("SOME", "Action optional: unknown MCACOD", OVER | SAR, UC | S, ser=True),
    Rule("SOME", "Action optional with lost events", OVER | SAR, OVER | UC | S, ser=True),
    Rule("PANIC", "Overflowed uncorrected", **_set(OVER | UC)),
    Rule("PANIC", "Uncorrected in kernel", **_set(UC), context=KERNEL),
    Rule("UC", "Uncorrected", **_set(UC)),
    Rule("SOME", "No match"),
]  # fmt: skip


def intel(status: int, mcgstatus: int, context: Context, ser: bool, exception: bool) -> Rule:
    """The first rule that matches, as mce_severity_intel()."""
    for rule in RULES:
        if (
            status & rule.mask == rule.result
            and mcgstatus & rule.mcgmask == rule.mcgres
            and rule.ser in (None, ser)
            and rule.context in (None, context)
            and rule.exception in (None, exception)
        ):
            return rule
    raise AssertionError("the last rule matches everything")


def amd(status: int, context: Context, overflow_recov: bool, succor: bool) -> str:
    """mce_severity_amd()."""
    if status & PCC:
        return "PANIC"
    if status & DEFERRED:
        return "DEFERRED"
    if not status & UC:
        return "KEEP"
    if status & OVER and not overflow_recov:
        return "PANIC"
    if not succor:
        return "PANIC"
    return "PANIC" if context == KERNEL else "AR"
