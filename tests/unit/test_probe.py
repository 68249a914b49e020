# SPDX-License-Identifier: MIT
"""What the BPF probes say, as events: pure, from the bytes that the shared header lays down."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hwerr_notify as h
from hwerr_notify import bpf, probe
from hwerr_notify.bpf import BpfError
from hwerr_notify.cli import probe as cli
from hwerr_notify.layout import Layout

libbpf = pytest.importorskip("hwerr_notify._libbpf")
ffi, lib = libbpf.ffi, libbpf.lib

STRUCTS = {
    lib.HWERR_PROBE_KVM: "hwerr_probe_kvm",
    lib.HWERR_PROBE_PANIC: "hwerr_probe_kvm",
    lib.HWERR_PROBE_DEATH: "hwerr_probe_death",
    lib.HWERR_PROBE_SIGBUS: "hwerr_probe_sigbus",
    lib.HWERR_PROBE_BLOCK: "hwerr_probe_block",
}
GONE = 1 << 22  # no process has this number: the kernel's own limit is below


def sample(kind: int, **fields: Any) -> bytes:
    head = {"type": kind, "time_ns": 5_000_000_000, "start_ns": 77, "cpu": 3, "tgid": GONE, "tid": GONE + 1,
            "comm": b"qemu".ljust(16, b"\0")}  # fmt: skip
    return Layout(STRUCTS[kind], ffi).pack({f"head.{k}": v for k, v in head.items()} | fields)


def compose(kind: int, **fields: Any) -> h.Event:
    event = probe.Composer()(sample(kind, **fields))
    assert event is not None
    assert (event.cpu, event.time_mono_ns, event.software) == (3, 5_000_000_000, False)
    return event


def test_every_type_has_a_probe_and_a_struct() -> None:
    assert len(probe.PROBES) == lib.HWERR_PROBE_COUNT
    assert set(STRUCTS) == set(range(lib.HWERR_PROBE_COUNT))
    for name in set(STRUCTS.values()) | {"hwerr_probe_head", "hwerr_probe_count", "hwerr_probe_told"}:
        Layout(name, ffi)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"exit_reason": 17, "suberror": 1, "rip": 0x10, "flags": 1, "insn_len": 2,
          "insn": bytes([0x0F, 0xA2]).ljust(16, b"\0")},
         "KVM internal error at 0x10: emulation failure, instruction 0f a2"),
        ({"exit_reason": 17, "suberror": 99}, "KVM internal error: suberror 99"),
        ({"exit_reason": 8, "rip": 0x7, "flags": 1}, "the guest shut down by a triple fault at 0x7"),
        ({"exit_reason": 9, "detail": 0x80000021},
         "KVM could not enter the guest, hardware reason 0x80000021"),
        ({"exit_reason": 0, "detail": 5}, "KVM left the guest for an unknown reason 0x5"),
        ({"exit_reason": 2, "error": -14}, "KVM_RUN failed: Bad address"),
    ],
)  # fmt: skip
def test_kvm(fields: dict[str, Any], text: str) -> None:
    event = compose(lib.HWERR_PROBE_KVM, vcpu=2, **fields)
    assert event.text == text
    assert event.vcpu is not None
    assert (event.vcpu.vcpu, event.vcpu.rip is None) == (2, "flags" not in fields)
    assert (event.source, event.severity) == (h.Source.KVM, h.Severity.RECOVERABLE)
    assert event.action_required
    (guest,) = event.guests
    assert (guest.pid, guest.start_ns, guest.kvm, guest.gpa, guest.as_a_whole) == (GONE, 77, True, None, True)
    assert "vCPU 2" in event.message
    assert event.message.endswith(f"hits VM qemu (pid {GONE}); it cannot go on")


@pytest.mark.parametrize(
    ("signal_number", "oom", "sender", "deliberate", "text"),
    [
        (signal.SIGKILL, 0, 9, True, "killed by SIGKILL from bash (pid 9)"),
        (signal.SIGKILL, 0, 0, False, "killed by SIGKILL from the kernel"),
        (signal.SIGKILL, 1, 0, False, "killed by SIGKILL, because memory was short"),
        (signal.SIGTERM, 0, -1, True, "killed by SIGTERM"),
        (signal.SIGSEGV, 0, -1, False, "killed by SIGSEGV"),
        (64, 0, -1, False, "killed by signal 64"),
        (32, 0, -1, False, "killed by signal 32"),
    ],
)
def test_death(signal_number: int, oom: int, sender: int, deliberate: bool, text: str) -> None:
    event = compose(
        lib.HWERR_PROBE_DEATH, signal=signal_number, oom=oom, sender=sender,
        sender_comm=b"bash".ljust(16, b"\0"),
    )  # fmt: skip
    assert (event.text or "").endswith(text)
    assert event.severity == (h.Severity.INFO if deliberate else h.Severity.RECOVERABLE)
    assert event.action_required != deliberate
    assert event.raw_severity == 0x10000 + signal_number


def test_signals_have_the_names_that_the_probe_has() -> None:
    source = (Path(__file__).resolve().parents[2] / "bpf/process.bpf.c").read_text("ascii")
    table = source.partition("names[NAMES][12] = {")[2].partition("}")[0]
    names = re.findall(r'"(\w+)"', table)
    assert [probe._signal_name(n) for n in range(1, 32)] == names[1:]


def test_panic() -> None:
    said = {byte: compose(lib.HWERR_PROBE_PANIC, exit_reason=2, detail=byte).text for byte in (1, 2, 3)}
    assert "crash kernel" not in (said[1] or "")
    assert "crash kernel" in (said[2] or "")
    assert said[3] == said[1]
    assert "system event" in (compose(lib.HWERR_PROBE_PANIC, exit_reason=24, detail=3).text or "")


@pytest.mark.parametrize(("code", "required"), [(4, True), (5, False)])
def test_sigbus_without_a_known_cause(code: int, required: bool) -> None:
    event = compose(lib.HWERR_PROBE_SIGBUS, addr=0x7000_1234, code=code, lsb=12)
    (task,) = event.tasks
    assert (task.pid, task.va, task.len) == (GONE, 0x7000_1000, 4096)
    assert event.action_required == required
    assert event.kind == (h.Kind.SRAR if required else h.Kind.SRAO)
    assert h.Flags.LINKED not in event.flags
    assert event.id == 0  # the kernel gives it one
    assert f"thread {GONE + 1}" in (event.text or "")


def test_sigbus_takes_the_guest_from_its_cause() -> None:
    guest = h.Guest(
        GONE, h.GuestFlags.KVM | h.GuestFlags.STOPPED, 77, 5, 0x7000_0000, 0x20_0000, 2 << 20, 1, "qemu"
    )
    cause = h.build(
        h.Memory(0x1000, 2 << 20), guest, severity=h.Severity.RECOVERABLE, source=h.Source.MCE, seq=9, id=9
    )

    class Causes:
        def find(self, pid: int, start_ns: int, address: int, time_ns: int) -> tuple[h.Event, h.Guest]:
            assert (pid, start_ns, address, time_ns) == (GONE, 77, 0x7000_1234, 5_000_000_000)
            return cause, guest

    composer = probe.Composer(Causes())  # type: ignore[arg-type]
    event = composer(sample(lib.HWERR_PROBE_SIGBUS, addr=0x7000_1234, code=4, lsb=12))
    assert event is not None
    (hit,) = event.guests
    assert (hit.hva, hit.gpa, hit.len, hit.vm_id, hit.slot) == (0x7000_1000, 0x20_1000, 4096, 5, 1)
    # That it was stopped is the kernel's to say.
    assert hit.flags == h.GuestFlags.KVM
    assert event.id == 9
    assert h.Flags.LINKED in event.flags


def test_sigbus_of_a_huge_page_that_begins_before_the_guests_memory() -> None:
    guest = h.Guest(GONE, h.GuestFlags.KVM, 77, 5, 0x7000_1000, 0, 4096, 1, "qemu")
    cause = h.build(
        h.Memory(0x1000, 4096), guest, severity=h.Severity.RECOVERABLE, source=h.Source.MCE, seq=9, id=9
    )
    causes = SimpleNamespace(find=lambda *_: (cause, guest))
    composer = probe.Composer(causes)  # type: ignore[arg-type]
    event = composer(sample(lib.HWERR_PROBE_SIGBUS, addr=0x7000_1234, code=4, lsb=21))
    assert event is not None
    (hit,) = event.guests
    assert (hit.hva, hit.gpa, hit.len) == (0x7000_0000, None, 2 << 20)
    assert h.encode([event])


def test_a_cause_is_of_the_same_process_not_of_its_number() -> None:
    def hit(start_ns: int) -> h.Event:
        task = h.Task(GONE, start_ns=start_ns, va=0x7000_0000, len=4096)
        return h.build(
            h.Memory(0x1000, 4096), task, severity=h.Severity.RECOVERABLE, source=h.Source.MCE, seq=start_ns
        )

    class Held:
        def drain(self) -> list[h.Event]:
            return [hit(77), hit(88)]

    causes = probe.Causes(Held(), wait=0)  # type: ignore[arg-type]
    found = causes.find(GONE, 77, 0x7000_0010, 0)
    assert found is not None
    assert (found[0].seq, found[1].start_ns) == (77, 77)
    assert causes.find(GONE, 99, 0x7000_0010, 0) is None


def test_block() -> None:
    event = compose(
        lib.HWERR_PROBE_BLOCK, sector=0x1234, bytes=512, major=8, minor=16, op=0, status=7,
        disk=b"sdb".ljust(32, b"\0"),
    )  # fmt: skip
    assert event.text == "read of 512 bytes at sector 4660 failed with a critical medium error"
    assert event.block == h.Block(8, 16, 0x1234, 512, 0, 7, "sdb")
    assert event.to_json()["block"]["device"] == "8:16"
    assert event.message.startswith(
        "read of 512 bytes at sector 4660 failed with a critical medium error, in sdb"
    )


def test_a_disk_is_held_through_what_is_stacked_on_it(tmp_path: Path) -> None:
    """sdb, sdb1, a logical volume on that, an encrypted one on the volume; and a disk beside them."""

    def disk(path: str, number: str) -> Path:
        where = tmp_path / "devices" / path
        (where / "holders").mkdir(parents=True)
        (where / "dev").write_text(f"{number}\n")
        return where

    sdb, part = disk("sdb", "8:16"), disk("sdb/sdb1", "8:17")
    (part / "partition").write_text("1\n")
    # Of an NVMe disk that is a character device.
    (sdb / "device").mkdir()
    (sdb / "device/dev").write_text("243:0\n")
    volume, crypt = disk("dm-0", "253:0"), disk("dm-1", "253:1")
    disk("sdc", "8:32")
    (part / "holders/dm-0").symlink_to(volume)
    (volume / "holders/dm-1").symlink_to(crypt)
    (crypt / "holders/dm-0").symlink_to(volume)
    root = tmp_path / "block"
    root.mkdir()
    (root / "8:16").symlink_to(sdb)
    stack = probe._stack(h.Block(8, 16, 0, 512, 0, 10, "sdb"), root)
    assert stack == {os.makedev(*n) for n in ((8, 16), (8, 17), (253, 0), (253, 1))}
    assert probe._stack(h.Block(8, 48, 0, 512, 0, 10, "sdd"), root) == set()


@pytest.mark.parametrize(
    ("own", "inside", "holders", "named", "sure"),
    [
        (False, {}, set(), [], True),
        (False, {}, {1}, [1], True),
        (False, {}, {1, 2}, [], False),
        (True, {1}, {1, 2}, [1], True),
        # Of another one's cgroup, whoever has the disk open as well.
        (True, set(), {1}, [], True),
        (True, {1, 2}, {2, 3}, [2], True),
        (True, {1, 2}, {3}, [], False),
        (True, {1, 2}, {1, 2}, [], False),
    ],
)
def test_whose_request_it_was(
    own: bool, inside: set[int], holders: set[int], named: list[int], sure: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, answer in {
        "vms": lambda: [1, 2, 3],
        "_is_own": lambda cgroup: own,
        "_cgroup_of": lambda pid, cgroup: pid in inside,
        "_holds": lambda pid, devices: pid in holders,
        "_guest_of": h.Guest,
    }.items():
        monkeypatch.setattr(probe, name, answer)
    guests, certain = probe.block_owners(h.Block(8, 16, 0, 512, 0, 10, "sdb"), 77)
    assert ([g.pid for g in guests], certain) == (named, sure)


def test_who_holds_a_device(tmp_path: Path) -> None:
    with (tmp_path / "image").open("wb") as image, open("/dev/null", "rb") as null:
        assert probe._holds(os.getpid(), {os.fstat(image.fileno()).st_dev})
        # A character device; a block device may have that number.
        assert not probe._holds(os.getpid(), {os.fstat(null.fileno()).st_rdev})
    assert not probe._holds(GONE, {os.stat(tmp_path).st_dev})


def test_a_status_that_kernels_number_differently_is_told_by_number() -> None:
    """16 is "active zones exceeded" in 6.1, and "device offline" in 6.12."""
    for status in (13, 14, 16, 17):
        event = compose(lib.HWERR_PROBE_BLOCK, bytes=512, status=status)
        assert event.raw_severity == status
        assert (f"a status {status} error" in (event.text or "")) == (status > 13)


def test_what_is_not_known_is_passed_over() -> None:
    whole = sample(lib.HWERR_PROBE_KVM)
    assert probe.Composer()(whole[:-8]) is None
    other = bytearray(whole)
    at = Layout("hwerr_probe_head", ffi)
    other[: at.size] = at.pack(at.unpack(whole) | {"type": 77})
    assert probe.Composer()(bytes(other)) is None


def test_no_probe_where_there_is_none(tmp_path: Any) -> None:
    assert probe.status(tmp_path) == []
    assert not probe.unload(tmp_path)


def test_only_one_has_the_probes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of whatever build: neither another that runs, nor one that would unload them under it."""
    home = tmp_path / "probe-before"
    home.mkdir()
    monkeypatch.setattr(probe, "unavailable", lambda pin_dir: None)
    monkeypatch.setattr(cli, "capable", lambda *_: True)
    only_one, unload = probe.only_one, probe.unload
    monkeypatch.setattr(probe, "only_one", lambda *homes: only_one(*(homes or (tmp_path,))))
    monkeypatch.setattr(probe, "unload", lambda: unload(tmp_path))
    with only_one(tmp_path):
        with pytest.raises(BlockingIOError):
            probe.Probes(tmp_path)
        assert cli.main(["unload"]) == 1
        assert "stop it first" in capsys.readouterr().err
        assert home.exists()
    assert cli.main(["unload"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("level", ["integrity", "confidentiality"])
def test_a_lockdown_that_keeps_programs_from_reading_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    lockdown = tmp_path / "lockdown"
    levels = ("none", "integrity", "confidentiality")
    lockdown.write_text(" ".join(f"[{name}]" if name == level else name for name in levels), "ascii")
    monkeypatch.setattr(bpf, "LOCKDOWN", lockdown)
    monkeypatch.setattr(probe, "unavailable", lambda pin_dir: None)
    if level == "integrity":
        assert bpf.unreadable() is None
        return
    with pytest.raises(BpfError, match="lockdown=confidentiality keeps"):
        probe.Probes(tmp_path / "pins")
    assert not (tmp_path / "pins").exists()


def test_probes_that_cannot_be_had_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> None:
        raise BpfError(1, f"{name} was refused")

    monkeypatch.setattr(probe, "unavailable", lambda pin_dir: None)
    monkeypatch.setattr(probe, "BpfObject", refused)
    with pytest.raises(BpfError, match="sigbus was refused"):
        probe.Probes(tmp_path)
    assert list(tmp_path.iterdir()) == []


class Busy:
    """A publisher with a ring buffer, and what the probes publish by themselves; never the device."""

    def __init__(self, rounds: int) -> None:
        self._ring, self._filled = os.pipe()
        self._own, self._told = os.pipe()
        self.stop_fd, self._end = os.pipe()
        self.rounds = rounds
        self.looked = 0
        self.endless = False
        self.ring = SimpleNamespace(fileno=lambda: self._ring)
        self.direct = SimpleNamespace(fileno=lambda: self._own, drain=lambda: os.read(self._own, 64))
        self.probes = SimpleNamespace(retry=lambda: False, reasons={})

    def storm(self) -> None:
        os.write(self._filled, b"x")
        self.endless = True

    def publish_directly(self) -> None:
        os.write(self._told, b"x")

    def run_once(self) -> int:
        return int(self.endless)

    def tell_losses(self) -> None:
        self.looked += 1
        if self.looked == self.rounds:
            os.write(self._end, b"x")

    def serve(self) -> None:
        probe.serve(self, self.probes, self.direct, self.stop_fd)  # type: ignore[arg-type]
        for fd in (self._ring, self._filled, self._own, self._told, self.stop_fd, self._end):
            os.close(fd)


@pytest.mark.timeout(60)
def test_losses_are_told_while_a_storm_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_LOSS_S", 0.02)
    busy = Busy(rounds=5)
    busy.storm()
    busy.serve()
    assert busy.looked == 6


@pytest.mark.timeout(60)
def test_losses_of_what_goes_by_no_loader_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_LOSS_S", 0.02)
    # Twice for what was there before it began; then nothing, until something is published.
    busy = Busy(rounds=4)
    timer = threading.Timer(0.5, busy.publish_directly)
    timer.start()
    start = time.monotonic()
    busy.serve()
    timer.join()
    assert busy.looked == 5
    assert time.monotonic() - start >= 0.5


def test_a_probe_that_is_missing_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Pinned:
        def __init__(self, path: Path) -> None:
            self.size = 32 if path.name == "hwerr_counts" else 24

        def __enter__(self) -> Pinned:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __getitem__(self, key: bytes) -> bytes:
            return bytes(self.size)

    monkeypatch.setattr(probe, "Map", SimpleNamespace(pinned=Pinned))
    monkeypatch.setattr(probe, "_missed", lambda home, kind: 0)
    missing = {"kvm": "the kernel module kvm is not loaded"}
    monkeypatch.setattr(probe, "_unloaded", lambda p: missing.get(p.object))
    home = tmp_path / "probe-x"
    home.mkdir()
    for program in ("hwerr_signal_kill", "hwerr_vm_release", "hwerr_signal_bus"):
        (home / program).touch()
    found = probe.status(tmp_path)
    assert {s.name: s.reason for s in found} == {
        "kvm": missing["kvm"], "panic": missing["kvm"], "death": None, "sigbus": None,
        "block": "hwerr-probe says why when it starts",
    }  # fmt: skip
    monkeypatch.setattr(cli, "unavailable", lambda: None)
    monkeypatch.setattr(probe, "status", lambda: found)
    assert cli.main(["status"]) == 1
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split()[:2] == ["kvm", "missing"]
    assert rows[0].endswith(missing["kvm"])
    assert rows[3].endswith("through hwerr-probe and write()")


def test_a_record_that_is_not_understood_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(path: str) -> int:
        raise h.RecordError("version 9", 64)

    monkeypatch.setattr(cli, "run", run)
    assert cli.main(["run"]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("hwerr-probe: /dev/hwerr gave a record that this version does not understand: ")
    assert "version 9" in said


@pytest.mark.parametrize("argv", [[], ["walk"], ["run", "--nothing"]])
def test_wrong_usage_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert os.linesep in said.err
