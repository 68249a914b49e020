# SPDX-License-Identifier: MIT
"""The numbers of the protocol, under the names that people see.

The values come from the compiled header. A number that is newer than this
package is kept: `Severity(9)` is a member named `UNKNOWN(9)`.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Self

from ._uapi import lib

__all__ = [
    "Component",
    "Flags",
    "GuestFlags",
    "InfoType",
    "Kind",
    "MfResult",
    "Severity",
    "Source",
    "TaskFlags",
]


class _OpenEnum(IntEnum):
    """An IntEnum that makes a member for a number it does not know."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, int) or not -(1 << 31) <= value < 1 << 32:
            return None
        member = int.__new__(cls, value)
        member._name_ = f"UNKNOWN({value})"
        member._value_ = value
        # The fields are bytes or rarely used words: what hostile records can add is bounded.
        if 0 <= value < 1 << 16:
            cls._value2member_map_[value] = member
        return member

    @property
    def known(self) -> bool:
        """Whether this package has a name for it."""
        return self._name_ in type(self).__members__

    @property
    def label(self) -> str:
        """Its name in JSON and on the command line: "memory_failure", "unknown(9)"."""
        return self._name_.lower()

    def __str__(self) -> str:
        return self.label


class Severity(_OpenEnum):
    """One ladder for every source; a greater number is worse."""

    INFO = lib.HWERR_SEV_INFO
    CORRECTED = lib.HWERR_SEV_CORRECTED
    DEFERRED = lib.HWERR_SEV_DEFERRED
    RECOVERABLE = lib.HWERR_SEV_RECOVERABLE
    FATAL = lib.HWERR_SEV_FATAL


class Source(_OpenEnum):
    """Who reported the error."""

    MCE = lib.HWERR_SRC_MCE
    AER = lib.HWERR_SRC_AER
    EDAC = lib.HWERR_SRC_EDAC
    MEMORY_FAILURE = lib.HWERR_SRC_MEMORY_FAILURE
    CPER = lib.HWERR_SRC_CPER
    KVM = lib.HWERR_SRC_KVM
    SIGBUS = lib.HWERR_SRC_SIGBUS
    BLOCK = lib.HWERR_SRC_BLOCK
    PANIC = lib.HWERR_SRC_PANIC
    USER = lib.HWERR_SRC_USER


class Kind(_OpenEnum):
    """What the source proves beyond the severity."""

    NONE = lib.HWERR_KIND_NONE
    UCNA = lib.HWERR_KIND_UCNA
    SRAO = lib.HWERR_KIND_SRAO
    SRAR = lib.HWERR_KIND_SRAR
    NONFATAL = lib.HWERR_KIND_NONFATAL


class Component(_OpenEnum):
    """What broke."""

    UNKNOWN = lib.HWERR_COMP_UNKNOWN
    MEMORY = lib.HWERR_COMP_MEMORY
    CACHE = lib.HWERR_COMP_CACHE
    TLB = lib.HWERR_COMP_TLB
    BUS = lib.HWERR_COMP_BUS
    PROCESSOR = lib.HWERR_COMP_PROCESSOR
    PCIE = lib.HWERR_COMP_PCIE
    IO = lib.HWERR_COMP_IO
    STORAGE = lib.HWERR_COMP_STORAGE
    GUEST = lib.HWERR_COMP_GUEST
    FIRMWARE = lib.HWERR_COMP_FIRMWARE


class InfoType(_OpenEnum):
    """Kinds of info in a record."""

    MCE = lib.HWERR_INFO_MCE
    PCI = lib.HWERR_INFO_PCI
    EDAC = lib.HWERR_INFO_EDAC
    MEMORY = lib.HWERR_INFO_MEMORY
    GUEST = lib.HWERR_INFO_GUEST
    TASK = lib.HWERR_INFO_TASK
    TEXT = lib.HWERR_INFO_TEXT
    CPER = lib.HWERR_INFO_CPER
    STOP = lib.HWERR_INFO_STOP
    VCPU = lib.HWERR_INFO_VCPU
    BLOCK = lib.HWERR_INFO_BLOCK


class MfResult(_OpenEnum):
    """What memory_failure() came to (enum mf_result of the kernel)."""

    IGNORED = 0
    FAILED = 1
    DELAYED = 2
    RECOVERED = 3


class Flags(IntFlag):
    """Flags of a record. Bits that this package does not know are kept."""

    ACTION_REQUIRED = lib.HWERR_F_ACTION_REQUIRED
    SOFTWARE = lib.HWERR_F_SOFTWARE
    OWNERS_UNKNOWN = lib.HWERR_F_OWNERS_UNKNOWN
    OWNERS_TRUNCATED = lib.HWERR_F_OWNERS_TRUNCATED
    COALESCED = lib.HWERR_F_COALESCED
    LINKED = lib.HWERR_F_LINKED
    EARLIER = lib.HWERR_F_EARLIER
    OTHER_BOOT = lib.HWERR_F_OTHER_BOOT
    REDACTED = lib.HWERR_F_REDACTED
    STOPPED = lib.HWERR_F_STOPPED
    INFO_TRUNCATED = lib.HWERR_F_INFO_TRUNCATED


class GuestFlags(IntFlag):
    """Flags of a `Guest`."""

    KVM = lib.HWERR_GUEST_KVM
    DEVICE = lib.HWERR_GUEST_DEVICE
    STOPPED = lib.HWERR_GUEST_STOPPED


class TaskFlags(IntFlag):
    """Flags of a `Task`."""

    DEVICE = lib.HWERR_TASK_DEVICE
