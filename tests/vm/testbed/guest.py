# SPDX-License-Identifier: MIT
"""A real QEMU guest inside the test VM, up in a moment: its firmware is a program of ours.

The program writes a byte to the debug console, then does what `code` says:
  halt   sleeps for ever
  count  adds one to the 32-bit word at guest-physical 0x500, for ever
  exit-user    the same, and leaves for QEMU (a port) each time
  exit-kernel  the same, and leaves for KVM (cpuid) each time
  emulate  goes on where no memory is, so that KVM would have to emulate what it cannot fetch
  mmx      reads memory that is not there by an instruction that KVM does not emulate
  triple   has an exception and no way to handle it
  panic    says through pvpanic's port that it panicked, then sleeps
  crash    says through it that its crash kernel runs, then sleeps
  read     reads sector 0x1234 of its first IDE disk, and counts
  later-X  counts until `Guest.go()`, then does X
Memory is what `backing` says:
  anon          4 KiB pages of anonymous memory
  thp           transparent huge pages
  memfd         a memfd, MAP_SHARED         memfd-private  MAP_PRIVATE
  hugetlb       hugetlbfs 2 MiB, MAP_SHARED hugetlb-private
  file          the file `path`, MAP_SHARED file-private
Two guests with the same `path` share their memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid as uuid_module
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from .errors import TestbedError
from .kernel import put
from .qmp import Qmp, QmpError

STATE = Path("/run/hwerr/guests")
COUNTER_GPA = 0x500
NOWHERE = 0x2000_0000  # no guest's memory, unless it has more than this
MMX = b"\x2e\x0f\xef\x05" + struct.pack("<I", NOWHERE)  # pxor mm0, cs:[NOWHERE]
_GDTR = 0x110
BACKINGS = (
    "anon",
    "thp",
    "memfd",
    "memfd-private",
    "hugetlb",
    "hugetlb-private",
    "file",
    "file-private",
)
_LATER = ("emulate", "mmx", "triple", "panic", "crash", "read")
CODES = ("halt", "count", "exit-user", "exit-kernel", *_LATER, *(f"later-{code}" for code in _LATER))
_GO_GPA = 0x600
_DEBUGCON = 0xE9
_THP = Path("/sys/kernel/mm/transparent_hugepage")
_HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_HUGE_SIZE = 2 << 20
_READY_SECONDS = 60.0
# An emulated SVM now and then loses a guest's first interrupt: such a guest is made anew.
_TRIES = 3


def firmware(code: str) -> bytes:
    """64 KiB of ROM for the top of the address space: the guest's whole program, 16-bit."""
    program = b"\xb0\x52\xe6" + bytes([_DEBUGCON])  # mov al, 'R'; out 0xe9, al
    program += b"\x31\xc0\x8e\xd8"  # xor ax, ax; mov ds, ax
    halt = b"\xfa\xf4\xeb\xfd"  # cli; 1: hlt; jmp 1b
    count = b"\x66\xff\x06" + struct.pack("<H", COUNTER_GPA)  # inc dword [COUNTER_GPA]
    if code.startswith("later-"):
        code = code.removeprefix("later-")
        # 1: inc dword [COUNTER_GPA]; cmp byte [GO], 0; je 1b
        program += count + b"\x80\x3e" + struct.pack("<H", _GO_GPA) + b"\x00\x74"
        program += (256 - len(count) - 7).to_bytes(1, "little")
    if code in ("emulate", "mmx"):
        # mov ax, cs; mov ds, ax; lgdt [GDTR]; mov eax, cr0; or al, 1; mov cr0, eax; jmp 8:...
        program += b"\x8c\xc8\x8e\xd8\x66\x0f\x01\x16" + struct.pack("<H", _GDTR)
        program += b"\x0f\x20\xc0\x0c\x01\x0f\x22\xc0\x66\xea"
        there = NOWHERE if code == "emulate" else 0xF0000 + len(program) + 6
        program += struct.pack("<IH", there, 8) + MMX
        # Flat 32-bit code, accessed already: it is in ROM. Then what the register is loaded with.
        program = program.ljust(_GDTR - 16, b"\x90") + struct.pack("<QQ", 0, 0x00CF9B000000FFFF)
        program += struct.pack("<HI", 15, 0xF0000 + _GDTR - 16)
    elif code == "triple":
        # lidt [0x700], which is zero; int3
        program += b"\x0f\x01\x1e\x00\x07\xcc"
    elif code in ("panic", "crash"):
        # mov dx, 0x505; mov al, n; out dx, al
        program += b"\xba\x05\x05\xb0" + bytes([1 if code == "panic" else 2]) + b"\xee" + halt
    elif code == "read":
        # ATA, PIO: registers 0x1f2 ... 0x1f7 are one sector, its number, the drive, READ SECTORS.
        program += b"\xba\xf2\x01"  # mov dx, 0x1f2
        for value in (1, 0x34, 0x12, 0, 0xE0, 0x20):
            program += b"\xb0" + bytes([value]) + b"\xee\x42"  # mov al, value; out dx, al; inc dx
        program += count + b"\xeb" + (256 - len(count) - 2).to_bytes(1, "little")
    elif code in ("count", "exit-user", "exit-kernel"):
        # 1: inc dword [0x500]; [out 0x80, al; | cpuid;] jmp 1b
        loop = count + {"count": b"", "exit-user": b"\xe6\x80", "exit-kernel": b"\x0f\xa2"}[code]
        program += loop + b"\xeb" + (256 - len(loop) - 2).to_bytes(1, "little")
    else:
        program += halt
    # The CPU starts at the last 16 bytes: jmp 0xf000:0000.
    rom = program.ljust(0x10000 - 16, b"\x90") + b"\xea\x00\x00\x00\xf0"
    return rom.ljust(0x10000, b"\x90")


def parse_size(text: str) -> int:
    """Bytes of "64M", "1G". Raises TestbedError."""
    match = re.fullmatch(r"(\d+)([KMGkmg]?)", text)
    if match is None or not int(match.group(1)):
        raise TestbedError(f"'{text}' is no size; write 64M or 1G")
    return int(match.group(1)) << {"": 0, "k": 10, "m": 20, "g": 30}[match.group(2).lower()]


@dataclass(frozen=True)
class GuestConfig:
    """How a guest is made. `mem` in bytes; `path`: for backing file, or hugetlb shared by two."""

    name: str = "guest"
    mem: int = 64 << 20
    backing: str = "anon"
    accel: str = "kvm"
    code: str = "halt"
    smp: int = 1
    prealloc: bool = True
    uuid: str = ""
    path: str = ""
    extra: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises TestbedError for what cannot be."""
        if self.backing not in BACKINGS:
            raise TestbedError(f"backing '{self.backing}' is none of {', '.join(BACKINGS)}")
        if self.code not in CODES:
            raise TestbedError(f"code '{self.code}' is none of {', '.join(CODES)}")
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", self.name):
            raise TestbedError(f"'{self.name}' is no guest name: letters, digits, _ . -")
        if self.mem < 1 << 20 or self.mem % 4096:
            raise TestbedError("guest memory must be at least 1M, and whole pages")
        if self.backing.startswith("hugetlb") and self.mem % _HUGE_SIZE:
            raise TestbedError("memory of a hugetlb guest must be a multiple of 2M")
        if self.backing.startswith("file") and not self.path:
            raise TestbedError("backing file needs a path")
        if self.accel == "kvm" and not Path("/dev/kvm").exists():
            raise TestbedError("there is no /dev/kvm: start the VM with --cpu amd, or use accel tcg")


class GuestStalled(TestbedError):
    """A guest's program did not begin."""


def _threads(pid: int) -> str:
    """What a process's threads do: name, state and CPU time, and where in the kernel they are."""
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        with contextlib.suppress(OSError):
            stat = (task / "stat").read_text("utf-8")
            state, *_, user, system = stat.rpartition(")")[2].split()[:13]
            stack = (task / "stack").read_text("utf-8").split("\n")
            where = " < ".join(line.partition("] ")[2].partition("+")[0] for line in stack[:4] if line)
            comm = (task / "comm").read_text("utf-8").strip()
            lines.append(f"  {comm} {state} {user}+{system} ticks: {where}")
    return "\n".join(lines)


@dataclass
class Guest:
    """A running guest. A context manager that always kills it; `testguest` keeps it without one."""

    config: GuestConfig
    pid: int
    qmp_path: Path
    uuid: str
    ram_id: str = "ram"
    qmp: Qmp | None = field(default=None, repr=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    # -- life ----------------------------------------------------------

    @classmethod
    def start(cls, config: GuestConfig) -> Guest:
        """Start it and wait until its program runs. Raises TestbedError with QEMU's message."""
        for _ in range(_TRIES - 1):
            try:
                return cls._start(config)
            except GuestStalled as error:
                sys.stderr.write(f"testguest: {error}\n")
        return cls._start(config)

    @classmethod
    def _start(cls, config: GuestConfig) -> Guest:
        config.check()
        STATE.mkdir(parents=True, exist_ok=True)
        uuid = config.uuid or str(uuid_module.uuid4())
        home = STATE / config.name
        if (home / "state.json").exists() and _alive(json.loads((home / "state.json").read_text())["pid"]):
            raise TestbedError(f"a guest named {config.name} runs already: `testguest stop {config.name}`")
        home.mkdir(exist_ok=True)
        for old in home.iterdir():
            old.unlink()
        (home / "rom").write_bytes(firmware(config.code))
        _reserve(config)
        ours, theirs = socket.socketpair()
        log = (home / "log").open("wb")
        # QEMU inherits it over fork and exec; a guest of small pages must have no huge ones.
        _disable_thp(config.backing == "anon")
        try:
            process = subprocess.Popen(
                cls._command(config, home, uuid, theirs.fileno()),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=(theirs.fileno(),), start_new_session=True,
            )  # fmt: skip
        except FileNotFoundError:
            raise TestbedError("qemu-system-x86_64 is not installed: run scripts/setup") from None
        finally:
            _disable_thp(False)
            log.close()
            theirs.close()
        guest = cls(config, process.pid, home / "qmp", uuid, _process=process)
        try:
            guest._await_program(ours, home / "log")
            guest.qmp = Qmp.connect(guest.qmp_path)
        except BaseException:
            guest.kill()
            raise
        finally:
            ours.close()
        (home / "state.json").write_text(
            json.dumps({"pid": process.pid, "uuid": uuid, "config": asdict(config)}), encoding="utf-8"
        )
        return guest

    @classmethod
    def attach(cls, name: str) -> Guest:
        """A guest that an earlier process started. Raises TestbedError if there is none."""
        state = STATE / name / "state.json"
        try:
            facts = json.loads(state.read_text("utf-8"))
        except FileNotFoundError:
            raise TestbedError(f"there is no guest named {name}; `testguest list` shows them") from None
        if not _alive(facts["pid"]):
            raise TestbedError(f"guest {name} (pid {facts['pid']}) has ended")
        config = GuestConfig(**{**facts["config"], "extra": tuple(facts["config"]["extra"])})
        guest = cls(config, facts["pid"], STATE / name / "qmp", facts["uuid"])
        guest.qmp = Qmp.connect(guest.qmp_path)
        return guest

    @staticmethod
    def _command(config: GuestConfig, home: Path, uuid: str, fd: int) -> list[str]:
        size = f"size={config.mem},prealloc={'on' if config.prealloc else 'off'}"
        private = config.backing.endswith("-private")
        share = f"share={'off' if private else 'on'}"
        match config.backing.removesuffix("-private"):
            case "anon" | "thp":
                memory = f"memory-backend-ram,id=ram,{size}"
            case "memfd":
                memory = f"memory-backend-memfd,id=ram,{size},{share}"
            case "hugetlb":
                where = config.path or "/dev/hugepages"
                memory = f"memory-backend-file,id=ram,mem-path={where},{size},{share}"
            case _:
                memory = f"memory-backend-file,id=ram,mem-path={config.path},{size},{share}"
        return [
            os.environ.get("HWERR_QEMU") or "qemu-system-x86_64",
            "-nodefaults", "-no-user-config", "-display", "none",
            "-name", f"guest={config.name},debug-threads=on", "-uuid", uuid,
            "-machine", f"pc,memory-backend=ram,accel={config.accel}",
            "-cpu", "max" if config.accel == "tcg" else "host",
            "-smp", str(config.smp), "-m", f"{config.mem // 1024}K", "-object", memory,
            "-bios", str(home / "rom"),
            "-chardev", f"socket,id=up,fd={fd}", "-device", f"isa-debugcon,iobase={_DEBUGCON:#x},chardev=up",
            "-qmp", f"unix:{home / 'qmp'},server=on,wait=off",
            *config.extra,
        ]  # fmt: skip

    def _await_program(self, port: socket.socket, log: Path) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        ready, _, _ = select.select([port], [], [], deadline - time.monotonic())
        if ready and port.recv(1) == b"R":
            return
        said = log.read_text("utf-8", errors="replace").strip()
        if not ready:
            what = f"guest {self.config.name} did not run within {_READY_SECONDS:g} s"
            raise GuestStalled(f"{what}; QEMU says: {said}\n{_threads(self.pid)}")
        status = self._process.wait() if self._process else None
        raise TestbedError(f"QEMU ended ({status}) before the guest ran: {said or 'it says nothing'}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End it at once, whatever its state."""
        self._close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._reap(10.0)

    def shutdown(self, timeout: float = 30.0) -> None:
        """Have QEMU quit in order. Raises TestbedError if it does not within `timeout` seconds."""
        self._monitor().execute("quit")
        if not self._reap(timeout):
            raise TestbedError(f"QEMU of {self.config.name} did not quit within {timeout:g} s")
        self._close()

    def _reap(self, timeout: float) -> bool:
        if self._process is not None:
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                return False
        else:
            try:
                fd = os.pidfd_open(self.pid)
            except ProcessLookupError:
                pass
            else:
                ended = bool(select.select([fd], [], [], timeout)[0])
                os.close(fd)
                if not ended:
                    return False
        shutil.rmtree(STATE / self.config.name, ignore_errors=True)
        return True

    def detach(self) -> None:
        """Leave it running; `attach` finds it again."""
        self._close()
        self._process = None

    def _close(self) -> None:
        if self.qmp is not None:
            self.qmp.close()
            self.qmp = None

    def alive(self) -> bool:
        """Whether its QEMU runs."""
        return self._process.poll() is None if self._process is not None else _alive(self.pid)

    # -- what it knows --------------------------------------------------

    def _monitor(self) -> Qmp:
        if self.qmp is None:
            raise TestbedError(f"guest {self.config.name} is closed")
        return self.qmp

    def hmp(self, line: str) -> str:
        """What QEMU's human monitor answers."""
        return self._monitor().hmp(line)

    def _address(self, line: str, pattern: str) -> int:
        answer = self.hmp(line).strip()
        match = re.search(pattern, answer)
        if match is None:
            raise TestbedError(f"QEMU: {line}: {answer}")
        return int(match.group(1), 16)

    def gpa2hva(self, gpa: int) -> int:
        """Address in QEMU's process of a guest-physical one, as QEMU says. TestbedError if it is no RAM."""
        return self._address(f"gpa2hva {gpa:#x}", r"is (?:at )?(0x[0-9a-f]+)\s*$")

    def gpa2hpa(self, gpa: int) -> int:
        """Host-physical address of a guest-physical one, as QEMU says. TestbedError if the page is absent."""
        return self._address(f"gpa2hpa {gpa:#x}", r"is (?:at )?(0x[0-9a-f]+)\s*$")

    def go(self) -> None:
        """Has a `later-` program do what it waits to do."""
        with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(self.gpa2hva(_GO_GPA))
            memory.write(b"\1")

    def mtree(self) -> str:
        """QEMU's flat view of guest memory."""
        return self.hmp("info mtree -f")

    def status(self) -> str:
        """QEMU's run state: running, paused, internal-error, ..."""
        return str(self._monitor().execute("query-status")["status"])

    def counter(self) -> int:
        """The word that a `count` guest counts up."""
        answer = self.hmp(f"xp /1wx {COUNTER_GPA:#x}")
        return int(answer.split(":")[1].split()[0], 16)

    def vcpus(self) -> list[Path]:
        """/proc/PID/task/TID of each vCPU's thread."""
        return vcpus_of(self.pid)

    def files(self) -> set[str]:
        """What QEMU has open, as /proc/PID/fd says; some are opened and closed meanwhile."""
        found = set()
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.add(os.readlink(link))
        return found

    def ram_gpas(self) -> list[tuple[int, int]]:
        """(guest-physical start, length) of its RAM, without what the firmware overlays."""
        ranges = []
        for view in self.mtree().split("FlatView")[1:]:
            if 'AS "memory"' not in view:
                continue
            for match in re.finditer(r"([0-9a-f]{16})-([0-9a-f]{16}) \(prio \d+, ram\): ram\b", view):
                start, end = int(match.group(1), 16), int(match.group(2), 16)
                ranges.append((start, end - start + 1))
            break
        return ranges


def vcpus_of(pid: int) -> list[Path]:
    """/proc/PID/task/TID of each vCPU's thread of a QEMU with debug-threads=on."""
    tasks = sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda task: int(task.name))
    found = [task for task in tasks if (task / "comm").read_text("utf-8").startswith("CPU ")]
    if not found:
        raise TestbedError(f"process {pid} has no thread of a vCPU")
    return found


def _alive(pid: int) -> bool:
    try:
        return "qemu" in Path(f"/proc/{pid}/comm").read_text("utf-8") and not Path(
            f"/proc/{pid}/stat"
        ).read_text("utf-8").rpartition(")")[2].lstrip().startswith("Z")
    except FileNotFoundError:
        return False


def _disable_thp(disable: bool) -> None:
    """PR_SET_THP_DISABLE for this process and what it starts."""
    ctypes.CDLL(None).prctl(41, int(disable), 0, 0, 0)


def _reserve(config: GuestConfig) -> None:
    """Huge pages for the guest, if its backing wants them."""
    if config.backing == "thp":
        put(_THP / "enabled", "always")
        put(_THP / "defrag", "always")
    if config.backing.startswith("hugetlb"):
        want = config.mem // _HUGE_SIZE
        free = int((_HUGE_PAGES / "free_hugepages").read_text("ascii"))
        have = int((_HUGE_PAGES / "nr_hugepages").read_text("ascii"))
        if free < want:
            put(Path("/proc/sys/vm/compact_memory"), "1")
            put(_HUGE_PAGES / "nr_hugepages", str(have + want - free))
            free = int((_HUGE_PAGES / "free_hugepages").read_text("ascii"))
        if free < want:
            raise TestbedError(f"only {free} of {want} huge pages could be had: give the VM more --mem")


def running() -> list[str]:
    """Names of the guests that run."""
    names = []
    for state in sorted(STATE.glob("*/state.json")):
        if _alive(json.loads(state.read_text("utf-8"))["pid"]):
            names.append(state.parent.name)
    return names


def stop_all(names: Sequence[str] = ()) -> None:
    """Kill the guests of these names, or all."""
    for name in names or running():
        try:
            Guest.attach(name).kill()
        except QmpError:
            continue
