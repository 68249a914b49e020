# SPDX-License-Identifier: MIT
"""Hardware errors as events, named by the VM they hit.

>>> import hwerr_notify
>>> with hwerr_notify.open(severity=hwerr_notify.Severity.RECOVERABLE) as device:
...     for event in device:
...         print(event.message, [guest.name for guest in event.guests])
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .aio import Watch, watch
    from .device import DEFAULT_PATH, Device, DeviceInfo, Filter, Guard, Stats, open
    from .enums import (
        Component,
        Flags,
        GuestFlags,
        InfoType,
        Kind,
        MfResult,
        Severity,
        Source,
        TaskFlags,
    )
    from .event import (
        RECORD_MAX,
        Block,
        Cper,
        Edac,
        Event,
        Guest,
        Info,
        Mce,
        Memory,
        Pci,
        RecordError,
        Stop,
        Task,
        Text,
        Unknown,
        Vcpu,
        build,
        encode,
        parse,
    )
    from .names import Names

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_PATH",
    "RECORD_MAX",
    "Block",
    "Component",
    "Cper",
    "Device",
    "DeviceInfo",
    "Edac",
    "Event",
    "Filter",
    "Flags",
    "Guard",
    "Guest",
    "GuestFlags",
    "Info",
    "InfoType",
    "Kind",
    "Mce",
    "Memory",
    "MfResult",
    "Names",
    "Pci",
    "RecordError",
    "Severity",
    "Source",
    "Stats",
    "Stop",
    "Task",
    "TaskFlags",
    "Text",
    "Unknown",
    "Vcpu",
    "Watch",
    "build",
    "encode",
    "open",
    "parse",
    "watch",
]

_HOME = {
    "aio": ("Watch", "watch"),
    "device": ("DEFAULT_PATH", "Device", "DeviceInfo", "Filter", "Guard", "Stats", "open"),
    "enums": (
        "Component", "Flags", "GuestFlags", "InfoType", "Kind", "MfResult", "Severity", "Source", "TaskFlags",
    ),
    "event": (
        "RECORD_MAX", "Block", "Cper", "Edac", "Event", "Guest", "Info", "Mce", "Memory", "Pci",
        "RecordError", "Stop", "Task", "Text", "Unknown", "Vcpu", "build", "encode", "parse",
    ),
    "names": ("Names",),
}  # fmt: skip
_MODULE = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> object:
    """Loads a public name when it is first used: a command must be able to start at once."""
    from importlib import import_module

    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
