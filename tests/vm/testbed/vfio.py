# SPDX-License-Identifier: MIT
"""Hands a PCI device to guests: binds it to vfio-pci. Needs a VM with an IOMMU."""

from __future__ import annotations

import contextlib
from pathlib import Path

from .errors import TestbedError
from .inject import pci_address
from .kernel import modprobe, put

_PCI = Path("/sys/bus/pci")


def bind(device: str) -> str:
    """Bind a device (address, or QEMU id such as aer0) to vfio-pci; returns its address.

    A guest gets it with `-device vfio-pci,host=ADDRESS`. Raises TestbedError without an IOMMU.
    """
    address = pci_address(device)
    home = _PCI / "devices" / address
    if not (home / "iommu_group").exists():
        raise TestbedError(f"{address} is in no IOMMU group: start the VM without --no-iommu")
    modprobe("vfio-pci")
    if (home / "driver").exists():
        if (home / "driver").resolve().name == "vfio-pci":
            return address
        put(home / "driver/unbind", address)
    put(home / "driver_override", "vfio-pci")
    put(_PCI / "drivers_probe", address)
    if not (home / "driver").exists():
        raise TestbedError(f"vfio-pci does not take {address}; see dmesg")
    return address


def unbind(device: str) -> None:
    """Give a device back to its own driver."""
    address = pci_address(device)
    home = _PCI / "devices" / address
    with contextlib.suppress(TestbedError):
        put(home / "driver/unbind", address)
    put(home / "driver_override", "\n")
    put(_PCI / "drivers_probe", address)
