# SPDX-License-Identifier: MIT
"""Passed-through devices lose bus mastering: which they are, and that it is seen. On a tree like /sys."""

from __future__ import annotations

from pathlib import Path

import pytest

from hwerr_notify.guard import net
from hwerr_notify.guard.check import passthrough
from hwerr_notify.guard.errors import Fault
from hwerr_notify.guard.process import passed_through

MEMORY_AND_MASTER = 0x0006


class Sysfs:
    """What of /sys is looked at."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def device(
        self, name: str, driver: str | None, bus: str = "pci", *, parent_of_mdevs: bool = False
    ) -> Path:
        home = self.root / "devices" / name
        home.mkdir(parents=True)
        if bus == "pci":
            (home / "config").write_bytes(
                b"\x86\x80\x34\x12" + MEMORY_AND_MASTER.to_bytes(2, "little") + bytes(58)
            )
        if parent_of_mdevs:
            (home / "mdev_supported_types").mkdir()
        self._link(home / "subsystem", self.root / "bus" / bus)
        if driver:
            self._link(home / "driver", self.root / "bus" / bus / "drivers" / driver)
        self._link(self.root / "bus" / bus / "devices" / name, home, make=False)
        return home

    def group(self, number: int, *devices: Path) -> None:
        for device in devices:
            self._link(self.root / f"kernel/iommu_groups/{number}/devices/{device.name}", device, make=False)

    def cdev(self, number: int, device: Path) -> None:
        """drivers/vfio/device_cdev.c, since 6.6."""
        node = device / f"vfio-dev/vfio{number}"
        node.mkdir(parents=True)
        (node / "device").symlink_to(device)
        self._link(self.root / f"class/vfio-dev/vfio{number}", node, make=False)

    @staticmethod
    def _link(path: Path, to: Path, *, make: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if make:
            to.mkdir(parents=True, exist_ok=True)
        path.symlink_to(to)


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path)


def master(device: Path) -> bool:
    return bool((device / "config").read_bytes()[4] & 4)


def test_of_a_group(sysfs: Sysfs) -> None:
    """All that a vfio driver has in it; not the bridge, nor what is in another's group."""
    sysfs.group(
        7,
        sysfs.device("0000:00:01.0", "pcieport"),
        sysfs.device("0000:01:00.0", "vfio-pci"),
        sysfs.device("0000:01:00.1", "mlx5_vfio_pci"),
        sysfs.device("0000:01:00.2", None),
    )
    sysfs.group(8, sysfs.device("0000:02:00.0", "vfio-pci"))
    files = ["/dev/kvm", "/dev/vfio/vfio", "/dev/vfio/7", "/dev/vfio/9", "/tmp/x/dev/vfio/8"]
    assert passed_through(files, sysfs.root) == ["0000:01:00.0", "0000:01:00.1"]


def test_without_an_iommu(sysfs: Sysfs) -> None:
    sysfs.group(0, sysfs.device("0000:01:00.0", "vfio-pci"))
    assert passed_through(["/dev/vfio/noiommu-0"], sysfs.root) == ["0000:01:00.0"]


def test_by_iommufd(sysfs: Sysfs) -> None:
    """Its file is the device's own: whatever the driver calls itself."""
    sysfs.cdev(3, sysfs.device("0000:01:00.0", "hisi_acc_vfio_pci"))
    sysfs.cdev(4, sysfs.device("0000:02:00.0", "vfio-pci"))
    sysfs.cdev(5, sysfs.device("0000:03:00.0", "anything"))
    files = ["/dev/iommu", "/dev/vfio/devices/vfio3", "/dev/vfio/devices/vfio5", "/dev/vfio/devices/vfio9"]
    assert passed_through(files, sysfs.root) == ["0000:01:00.0", "0000:03:00.0"]


def test_what_several_guests_share_is_left_alone(sysfs: Sysfs) -> None:
    """A part of a device (mdev) has no bus mastering of its own, and the device's is its neighbours', too."""
    parent = sysfs.device("0000:01:00.0", "nvidia-vgpu-vfio", parent_of_mdevs=True)
    part = sysfs.device("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", "vfio_mdev", bus="mdev")
    sysfs.group(7, parent, part)
    sysfs.cdev(0, part)
    assert passed_through(["/dev/vfio/7", "/dev/vfio/devices/vfio0"], sysfs.root) == []


def test_bus_mastering_goes_and_nothing_else(sysfs: Sysfs) -> None:
    device = sysfs.device("0000:01:00.0", "vfio-pci")
    other = sysfs.device("0000:02:00.0", "vfio-pci")
    sysfs.cdev(0, device)
    sysfs.cdev(1, other)
    before = (device / "config").read_bytes()
    assert net.stop_dma(["/dev/kvm", "/dev/vfio/devices/vfio0"], sysfs.root) == ["0000:01:00.0"]
    assert (device / "config").read_bytes() == before[:4] + b"\x02" + before[5:]
    assert master(other)


def test_one_that_fails_does_not_spare_the_next(sysfs: Sysfs) -> None:
    first, second = (sysfs.device(f"0000:0{n}:00.0", "vfio-pci") for n in (1, 2))
    sysfs.cdev(0, first)
    sysfs.cdev(1, second)
    (first / "config").unlink()
    with pytest.raises(Fault, match="/config: No such file"):
        net.stop_dma(["/dev/vfio/devices/vfio0", "/dev/vfio/devices/vfio1"], sysfs.root)
    assert not master(second)


def test_that_it_is_on_again_is_seen(sysfs: Sysfs) -> None:
    device = sysfs.device("0000:01:00.0", "vfio-pci")
    sysfs.cdev(0, device)
    net.stop_dma(["/dev/vfio/devices/vfio0"], sysfs.root)
    net.dma_is_stopped(["/dev/vfio/devices/vfio0"], sysfs.root)
    with (device / "config").open("r+b") as config:
        config.seek(4)
        config.write(b"\x06")
    with pytest.raises(Fault, match="has bus mastering on again"):
        net.dma_is_stopped(["/dev/vfio/devices/vfio0"], sysfs.root)


def test_one_that_cannot_be_looked_at_is_not_taken_for_stopped(sysfs: Sysfs) -> None:
    device = sysfs.device("0000:01:00.0", "vfio-pci")
    sysfs.cdev(0, device)
    (device / "config").unlink()
    for look in (net.stop_dma, net.dma_is_stopped):
        with pytest.raises(Fault, match="No such file"):
            look(["/dev/vfio/devices/vfio0"], sysfs.root)


@pytest.mark.parametrize("level", ["none", "integrity", "confidentiality"])
def test_where_it_cannot_be_taken_is_said(level: str, tmp_path: Path) -> None:
    """By `check`: the kernel refuses it under lockdown."""
    path = tmp_path / "lockdown"
    assert list(passthrough(path)) == []
    levels = ("none", "integrity", "confidentiality")
    path.write_text(" ".join(f"[{name}]" if name == level else name for name in levels) + "\n")
    found = [(line.state, line.text) for line in passthrough(path)]
    assert len(found) == (level != "none")
    for state, text in found:
        assert state == "weaker"
        assert f"cannot be FROZEN: lockdown={level} refuses" in text
