# SPDX-License-Identifier: MIT
"""Who holds a device: AER errors of a device that VFIO gave to user space."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from holder import PAGE, Holder
from testbed import inject, vfio
from testbed.guest import Guest, GuestConfig
from testbed.records import AerRecord
from testbed.wait import wait_event

import hwerr_notify
from hwerr_notify import Device, Event, Flags, Source

pytestmark = pytest.mark.amd

UNSURE = Flags.OWNERS_UNKNOWN | Flags.OWNERS_TRUNCATED


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with hwerr_notify.open() as device:
        yield device


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    yield vfio.bind("aer0")
    vfio.unbind("aer0")


@pytest.fixture
def holder() -> Iterator[Holder]:
    with Holder() as holder:
        yield holder


# Each another error: the same ones would be counted in the first one's record.
_BITS = itertools.cycle(
    [0x0001, 0x0040, 0x0080, 0x0100, 0x1000, 0x0041, 0x0081, 0x0101, 0x1001, 0x00C0, 0x0140]
)


def error(device: Device, ident: str = "aer0") -> Event:
    """The event of a correctable error of that device."""
    address = inject.pci_address(ident)
    device.seek("now")
    inject.aer(AerRecord(cor_status=next(_BITS), device=address))
    return wait_event(
        device, lambda e: e.source == Source.AER and e.pci is not None and e.pci.address == address
    )


def test_held_by_nobody(device: Device, address: str) -> None:
    event = error(device)
    assert not event.guests
    assert not event.tasks
    assert not event.flags & UNSURE


def test_held_by_a_process(device: Device, address: str, holder: Holder) -> None:
    holder.vfio(address)
    event = error(device)
    assert not event.guests
    assert not event.flags & UNSURE
    (task,) = event.tasks
    assert (task.pid, task.va, task.len, task.by_device) == (holder.pid, 0, 0, True)
    with holder.fork() as child:
        assert {t.pid for t in error(device).tasks} == {holder.pid, child.pid}


def test_repetitions_name_who_holds_it_then(device: Device, address: str) -> None:
    for bits in (0x1041, 0x1081, 0x1101, 0x10C0, 0x1140, 0x1180, 0x00C1, 0x0141):
        record = AerRecord(cor_status=bits, device=address)
        # The module is loaded anew for a record only: the repetition must come within a second.
        data = inject.aer_data(record)

        def told(data: bytes = data, status: int = bits) -> Event:
            device.seek("now")
            inject.AER_INJECT.write_bytes(data)
            return wait_event(device, lambda e: e.pci is not None and e.pci.status == status)

        with Holder() as holder:
            holder.vfio(address)
            first = told()
            assert [t.pid for t in first.tasks] == [holder.pid]
        later = told()
        assert not later.tasks
        assert not later.flags & UNSURE
        if later.flags & Flags.COALESCED:
            assert (later.id, later.count) == (first.seq, 1)
            return
    raise AssertionError("no second error came within a second of the first")


def test_held_by_a_vmm(device: Device, address: str, holder: Holder) -> None:
    holder.vfio(address)
    va = holder.mmap(PAGE)
    holder.vm_slot(holder.vm(), 0, 0, PAGE, va)
    event = error(device)
    assert not event.tasks
    assert not event.flags & UNSURE
    (guest,) = event.guests
    assert (guest.pid, guest.kvm, guest.by_device) == (holder.pid, True, True)
    assert (guest.gpa, guest.hva, guest.len) == (None, 0, 0)
    assert guest.vm_id


def test_held_by_a_guest(device: Device, address: str) -> None:
    config = GuestConfig(name="passed", extra=("-device", f"vfio-pci,host={address}"))
    with Guest.start(config) as qemu:
        event = error(device)
        assert not event.tasks
        assert not event.flags & UNSURE
        (guest,) = event.guests
        assert (guest.pid, guest.comm) == (qemu.pid, "qemu-system-x86")
        assert guest.kvm
        assert guest.by_device
        assert guest.gpa is None
    assert not error(device).guests


def test_holder_of_another_device_is_not_named(device: Device, address: str, holder: Holder) -> None:
    other = vfio.bind("aer1")
    try:
        holder.vfio(other)
        event = error(device)
        assert not event.guests
        assert not event.tasks
        assert not event.flags & UNSURE
        assert [t.pid for t in error(device, "aer1").tasks] == [holder.pid]
    finally:
        holder.kill()
        vfio.unbind("aer1")


def test_device_of_the_host(device: Device) -> None:
    event = error(device, "aer1")
    assert not event.guests
    assert not event.tasks
    assert not event.flags & UNSURE
