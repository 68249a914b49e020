# SPDX-License-Identifier: MIT
"""Parts of hwerr-guard that need no guest."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hwerr_notify import Edac, Event, Flags, Guest, GuestFlags, Memory, Severity, Source, build
from hwerr_notify.guard.decide import Corrected, Exceeded, decide, of_qmp, poisoned
from hwerr_notify.guard.errors import Fault, GuardError
from hwerr_notify.guard.front import harmless
from hwerr_notify.guard.layout import parse_registers
from hwerr_notify.guard.net import backends
from hwerr_notify.guard.policy import LAYERS, Threshold, VmPolicy
from hwerr_notify.guard.process import Process
from hwerr_notify.guard.store import Incident, Step, Store
from hwerr_notify.guard.tell import marker, run_program

S = Severity
NO_FLAGS = Flags(0)
GUEST = Guest(7, GuestFlags.KVM, start_ns=5, gpa=0x5000, hva=0x7F0000005000, len=4096)
INCIDENT = Incident("20260102T030405.006-web1", "boot", "web1", None, 7, 5, "/run/q", {"message": "m"}, 1, 2)


def event(severity: Severity, source: Source = Source.MCE, flags: Flags = NO_FLAGS) -> Event:
    return build(Memory(0x1000, 4096), GUEST, severity=severity, source=source, flags=flags)


@pytest.mark.parametrize(
    ("severity", "source", "policy", "expected"),
    [
        (S.RECOVERABLE, Source.MCE, {}, "freeze"),
        (S.DEFERRED, Source.MCE, {}, "tell"),
        (S.CORRECTED, Source.EDAC, {}, None),
        (S.CORRECTED, Source.EDAC, {"tell_severity": S.CORRECTED}, "tell"),
        (S.RECOVERABLE, Source.MCE, {"freeze_severity": S.FATAL}, "tell"),
        (S.FATAL, Source.AER, {"freeze_severity": None}, "tell"),
        (S.FATAL, Source.AER, {"freeze_on": frozenset({"kvm"})}, "tell"),
        (S.RECOVERABLE, Source.KVM, {"freeze_severity": None}, "freeze"),
        (S.RECOVERABLE, Source.PANIC, {"freeze_on": frozenset({"kvm"})}, "tell"),
        (S.INFO, Source.BLOCK, {}, None),
        (S.RECOVERABLE, Source.BLOCK, {}, "tell"),
    ],
)
def test_decisions(severity: Severity, source: Source, policy: dict[str, Any], expected: str | None) -> None:
    assert decide(event(severity, source), GUEST, VmPolicy(**policy)) == expected


def test_what_the_kernel_stopped_is_frozen_whatever_the_policy_says_now() -> None:
    guest = replace(GUEST, flags=GuestFlags.KVM | GuestFlags.STOPPED)
    assert decide(event(S.CORRECTED), guest, VmPolicy(freeze_severity=None)) == "freeze"


def test_what_a_program_published_as_hardware_freezes_nobody() -> None:
    assert decide(event(S.FATAL, flags=Flags.SOFTWARE), GUEST, VmPolicy()) == "tell"


def test_poison() -> None:
    assert poisoned(event(S.RECOVERABLE), GUEST) == (0x5000, 0x7F0000005000, 4096)
    assert poisoned(event(S.CORRECTED), GUEST) is None


def test_events_of_qemu() -> None:
    data = {"action": "stop", "nospace": False, "device": "d", "reason": "x"}
    io: dict[str, Any] = {"event": "BLOCK_IO_ERROR", "data": data}
    every = VmPolicy(freeze_on=frozenset(LAYERS))
    assert of_qmp(io, every) == ("block", "I/O error on d: None: x")
    # What may go with the guest to the next node does not freeze it unless that is wanted.
    assert of_qmp(io, VmPolicy()) is None
    io["data"]["nospace"] = True
    assert of_qmp(io, every) is None
    assert of_qmp({"event": "GUEST_PANICKED"}, every) == ("panic", "the guest's kernel panicked")
    assert of_qmp({"event": "GUEST_PANICKED"}, VmPolicy()) is None
    assert of_qmp({"event": "STOP", "data": 3}, every) is None


def test_thresholds() -> None:
    policy = VmPolicy(degraded=(Threshold(3, 10.0, "dimm"), Threshold(5, 10.0, "vm")))
    counter = Corrected()

    def add(seconds: float, label: str, count: int = 1) -> Exceeded | None:
        made = build(
            Edac(0, label=label), GUEST, severity=S.CORRECTED, source=Source.EDAC, count=count,
            time_mono_ns=int((100 + seconds) * 1e9),
        )  # fmt: skip
        return counter.add(made, GUEST, policy)

    assert add(0, "A") is None
    assert add(1, "A") is None
    assert add(10.5, "A") is None  # the first is out of the window
    found = add(10.6, "A")
    assert found
    assert (found.unit, found.errors) == ("DIMM A", 3)
    assert add(10.7, "B") is None
    found = add(30, "B", count=3)
    assert found
    assert found.unit == "DIMM B"


def test_a_dimm_is_counted_though_the_machine_check_came_first() -> None:
    """Only EDAC's record, which is linked to that of the machine check, knows the DIMM."""
    policy = VmPolicy(degraded=(Threshold(3, 86400.0, "dimm"), Threshold(4, 86400.0, "vm")))
    counter = Corrected()
    found = []
    for n in range(4):
        more: dict[str, Any] = {"severity": S.CORRECTED, "time_mono_ns": n}
        found.append(
            counter.add(build(Memory(0x1000, 4096), GUEST, source=Source.MCE, **more), GUEST, policy)
        )
        edac = build(Edac(0, label="A"), Memory(0x1000, 4096), GUEST, source=Source.EDAC,
                     flags=Flags.LINKED, **more)  # fmt: skip
        found.append(counter.add(edac, GUEST, policy))
    units = [(n, exceeded.unit, exceeded.errors) for n, exceeded in enumerate(found) if exceeded]
    # The machine checks alone count for the VM.
    assert units == [(5, "DIMM A", 3), (6, "VM 7", 4)]


def test_a_threshold_hides_no_event_from_the_next() -> None:
    policy = VmPolicy(degraded=(Threshold(1, 10.0, "vm"), Threshold(3, 10.0, "page")))
    counter = Corrected()
    units = []
    for n in range(4):
        made = build(Memory(0x1000, 4096), GUEST, severity=S.CORRECTED, source=Source.MCE, time_mono_ns=n)
        exceeded = counter.add(made, GUEST, policy)
        assert exceeded
        units.append(exceeded.unit)
    assert counter._seen[GUEST.pid, GUEST.start_ns, 1, "page 0x1000"]
    assert units == ["VM 7"] * 4
    # The first is not full any more: what the other has counted is told.
    policy = VmPolicy(degraded=(Threshold(100, 10.0, "vm"), Threshold(3, 10.0, "page")))
    made = build(Memory(0x1000, 4096), GUEST, severity=S.CORRECTED, source=Source.MCE, time_mono_ns=5)
    exceeded = counter.add(made, GUEST, policy)
    assert exceeded
    assert exceeded.unit == "page 0x1000"


def test_incidents_on_disk(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.prepare()
    with pytest.raises(GuardError, match="another hwerr-guard"):
        Store(tmp_path).prepare()
    incident = replace(
        INCIDENT.with_step("stop", Step("done", 1, 2, "x", {"a": 1})),
        poison=((1, 2, 3),), events=({"a": 1},), notes=("n",), state="frozen",
    )  # fmt: skip
    store.save(incident)
    assert list(store.all()) == [incident]
    (tmp_path / "incidents/20260102T030405.007-x").mkdir()
    assert list(store.all()) == [incident]
    (tmp_path / "incidents/20260102T030405.007-x/incident.json").write_text("{")
    _, damaged = store.all()
    assert "is damaged" in str(damaged)
    for bad in ("../x", "", ".x", "x/y"):
        with pytest.raises(GuardError):
            store.load(bad)


def test_a_save_that_fails_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.prepare()
    store.save(INCIDENT)
    for call in ("fsync", "write"):

        def fail(*args: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space"):
            store.save(replace(INCIDENT, state="frozen"))
        monkeypatch.undo()
        assert store.load(INCIDENT.id) == INCIDENT
        assert [p.name for p in store.path(INCIDENT.id).iterdir()] == ["incident.json"]


@pytest.mark.parametrize(
    ("command", "arguments", "clean", "poison"),
    [
        ("query-status", None, True, True),
        ("query-cpus-fast", {}, True, True),
        ("cont", None, False, False),
        ("pmemsave", {}, True, False),
        ("human-monitor-command", {"command-line": "info registers"}, True, True),
        ("human-monitor-command", {"command-line": "xp /4x 0"}, True, False),
        ("human-monitor-command", {"command-line": "cont"}, False, False),
        ("human-monitor-command", {"command-line": "information; cont"}, False, False),
        ("human-monitor-command", None, False, False),
        ("human-monitor-command", {"command-line": 3}, False, False),
        ("xen-load-devices-state", {}, False, False),
        # These read the guest's memory inside QEMU: page tables, queues, the screen.
        ("x-query-virtio-queue-element", {}, True, False),
        ("x-query-virtio", {}, True, False),
        ("screendump", {}, True, False),
        ("qom-get", {}, True, False),
        *(
            ("human-monitor-command", {"command-line": line}, True, False)
            for line in (
                "info tlb",
                "info mem",
                "gva2gpa 0xffff",
                "info virtio-queue-element /x 0",
                "info mtree",
                "print $pc",
                "info registers-x",
                "info block-jobs",
                "info",
            )
        ),
        *(
            ("human-monitor-command", {"command-line": f"info {what}"}, True, True)
            for what in ("registers -a", "block", "network", "status", "version", "chardev", " cpus")
        ),
    ],
)
def test_what_a_frozen_guest_may_be_told(command: str, arguments: object, clean: bool, poison: bool) -> None:
    assert harmless(command, arguments, False) is clean
    assert harmless(command, arguments, True) is poison


def test_names_of_backends() -> None:
    text = (
        "e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:56\n"
        " \\ #net000: index=0,type=user,net=10.0.2.0,restrict=off\n"
        "hub 0\n \\ hub0port0: index=1,type=hubport\n"
        "n1: index=0,type=tap,ifname=tap0,script=no\n"
    )
    assert backends(text) == ["#net000", "hub0port0", "n1"]


def test_registers() -> None:
    text = (
        "\nCPU#0\nRAX=0000000000000001 RBX=ffffffff81000000 RCX=0 RDX=0\nR8 =00000000000000aa R9 =1\n"
        "RIP=ffffffff8100abcd RFL=00000246 [---Z-P-] CPL=0\n"
        "CS =0010 0000000000000000 ffffffff 00a09b00 DPL=0\n"
        "GDT=     fffffe0000001000 0000007f\nCR0=80050033 CR2=0 CR3=0000000002610000 CR4=000006f0\n"
        "\nCPU#1\nEAX=00000007 EBX=0\nEIP=00000008 EFL=00000002 [-------]\n"
        "ES =0000 00000000 0000ffff 00009300\n"
    )
    first, second = parse_registers(text)
    assert (first.rip, first.plain["r8"], first.plain["cr3"]) == (0xFFFFFFFF8100ABCD, 0xAA, 0x2610000)
    assert first.segments["cs"] == (0x10, 0, 0xFFFFFFFF, 0xA09B00)
    assert first.segments["gdt"] == (0, 0xFFFFFE0000001000, 0x7F, 0)
    assert (second.cpu, second.rip, second.plain["rax"], second.plain["rfl"]) == (1, 8, 7, 2)
    assert parse_registers("PC=0 X00=1") == []


def test_a_process_is_known_by_its_start() -> None:
    me = Process.open(os.getpid())
    assert me.alive()
    assert me.is_of(os.getpid(), me.start_ns)
    assert not me.is_of(os.getpid(), me.start_ns + 10_000_000)
    with pytest.raises(ProcessLookupError):
        Process.open(os.getpid(), me.start_ticks + 1)
    assert not any(t.in_guest for t in me.threads())
    me.close()
    assert not me.alive()


def test_programs() -> None:
    import asyncio

    assert asyncio.run(run_program(["/bin/cat"], b"x", 10)) == "x"
    with pytest.raises(Fault, match="status 3: oops"):
        asyncio.run(run_program(["/bin/sh", "-c", "echo oops; exit 3"], b"", 10))
    with pytest.raises(Fault, match="did not end within"):
        asyncio.run(run_program(["/bin/sh", "-c", "sleep 1000 & wait"], b"", 0.1))
    with pytest.raises(Fault, match="No such file"):
        asyncio.run(run_program(["/nowhere"], b"", 1))


def test_markers_stay_in_their_directory() -> None:
    assert marker(Path("/run/g"), "frozen", "../../x").parent == Path("/run/g/frozen")


def test_pacemaker_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    from hwerr_notify.guard.policy import Policy
    from hwerr_notify.guard.tell import Teller

    tools = ("cibadmin", "attrd_updater", "crm_node", "crm_resource")
    policy = Policy(Path("/none"), pacemaker_resource="vm-{name}", limits={"tell": 1.0})
    teller = Teller(policy)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert asyncio.run(teller.push("web1", "i1")) == [
        f"{tool} is not installed, and the policy has [pacemaker]" for tool in tools
    ]

    def program(name: str, does: str = "echo node1", says: bool = True) -> None:
        said = f'echo {name} "$@" >> {tmp_path}/said\n' if says else ""
        (tmp_path / name).write_text(f"#!/bin/sh\n{said}{does}\n", "utf-8")
        (tmp_path / name).chmod(0o755)

    def told(late: bool = False) -> list[str]:
        """What the programs are told, cibadmin apart."""
        (tmp_path / "said").unlink(missing_ok=True)
        assert asyncio.run(teller.push("web1", "i1", late=late)) == []
        lines = (tmp_path / "said").read_text("utf-8").splitlines()
        assert "cibadmin --query --xpath //constraints//expression[@attribute='hwerr-vm-web1']" in lines
        return [line for line in lines if not line.startswith("cibadmin")]

    for name in tools:
        program(name)
    policy.limits["tell"] = 30.0
    failure = "crm_resource --fail --resource vm-web1 --node node1"
    locate = "crm_resource --locate --resource vm-web1 --quiet"
    attribute = "attrd_updater --name hwerr-vm-web1 --update i1"
    # With a rule that goes by the attribute that is all.
    assert told() == told(late=True) == [attribute]
    # Without one the failure follows. The node's name is asked for once.
    program("cibadmin", "exit 105")
    assert told() == [attribute, "crm_node -n", failure]
    assert told() == [attribute, failure]
    # Told again: no failure of what the cluster has moved away.
    assert told(late=True) == [attribute, locate, failure]
    program("crm_resource", "echo node2")
    assert told(late=True) == [attribute, locate]
    (tmp_path / "said").unlink()
    assert asyncio.run(teller.cleared("web1")) == []
    # A failed freeze is the failure alone: the resource may come back here.
    assert asyncio.run(teller.push_failed("web1")) == []
    assert (tmp_path / "said").read_text("utf-8").splitlines() == [
        "attrd_updater --name hwerr-vm-web1 --delete", failure
    ]  # fmt: skip
    # All that fail are named, in the same order, whichever is first; what is not known is not acted on.
    policy.limits["tell"] = 1.0
    (tmp_path / "said").unlink()
    for first in tools[:2]:
        for name in tools[:2]:
            program(name, "exit 1" if name == first else "exec /bin/sleep 1000", says=False)
        hung, ended = "did not end within 0.22 s", "ended with status 1: it says nothing"
        assert asyncio.run(teller.push("web1", "i1")) == [
            f"{name} {ended if name == first else hung}" for name in tools[:2]
        ]
    assert not (tmp_path / "said").exists()
    # The failure is told though there is no attribute.
    policy.limits["tell"] = 30.0
    program("cibadmin", "exit 105")
    program("attrd_updater", "exit 1", says=False)
    assert asyncio.run(teller.push("web1", "i1")) == ["attrd_updater ended with status 1: it says nothing"]
    assert (tmp_path / "said").read_text("utf-8").splitlines()[-1] == failure
