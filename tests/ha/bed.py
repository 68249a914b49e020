# SPDX-License-Identifier: MIT
"""Two cluster nodes: two VMs of the test bed, a network between them, a disk that both have.

Each node is one `tests/vm/run` (its splats, its taint and its loss are told as ever) with node.py as its
command. The network is a pair of UNIX datagram sockets between the two QEMUs. The disk is nbdkit on
the host, whose log says in one order and by one clock which node wrote which sector when: the
judge of who wrote is neither of the nodes.

Clocks: a VM's clock is its own. Each is compared with the host's over the node's port before and
after what is timed, and times of nodes are given as the host's; half the shortest round trip is how
wrong they may be.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

TREE = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("HWERR_CACHE") or Path.home() / ".cache" / "hwerr")
NODES = ("alpha", "beta")
SECTOR = 512
LOG_SECTOR = 64
DISK_SIZE = 256 << 20
# Each write takes so long on the disk's server: a disk's time, in which a freeze may come.
WRITE_DELAY_MS = 5
_BOOT_LIMIT = 600.0
_ANSWER_LIMIT = 600.0


class BedError(Exception):
    """The bed, not what is tested, failed."""


def say(text: str) -> None:
    sys.stderr.write(f"ha: {text}\n")
    sys.stderr.flush()


@dataclass(frozen=True)
class Write:
    """A write that the disk's server was asked for. By the host's clock; `done_ns` is 0 if it did not end."""

    ns: int
    node: str
    sector: int
    done_ns: int

    @property
    def number(self) -> int | None:
        """The number it put into the log, None for the head."""
        return self.sector - LOG_SECTOR if self.sector >= LOG_SECTOR else None


class Disk:
    """The disk's server and what it saw."""

    _LINE = re.compile(r"(\S+ \S+) connection=(\d+) (\.\.\.)?(\w+)(.*)")

    def __init__(self, home: Path, root: Path) -> None:
        self.path = home / "disk"
        self.socket = home / "nbd"
        self.kept = home / "nbd.log"
        with self.path.open("wb") as file:
            file.truncate(DISK_SIZE)
        log = home / "nbd.fifo"
        os.mkfifo(log)
        self._lines = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
        self._nodes: dict[str, str] = {}
        self._open: dict[tuple[str, str], tuple[int, int]] = {}
        self._order: list[tuple[str, str]] = []
        self._done: dict[tuple[str, str], int] = {}
        self._asked: dict[tuple[str, str], tuple[int, int]] = {}
        self._changed = threading.Condition()
        plugins = next(root.glob("usr/lib/*/nbdkit"), None)
        binary = str(root / "usr/bin/nbdkit")
        environment = {**os.environ, "TZ": "UTC"}
        where: Callable[[str], str]
        if plugins is None:
            binary, where = "nbdkit", lambda name: name.rpartition("-")[0].removeprefix("nbdkit-")
        else:
            environment["LD_LIBRARY_PATH"] = str(plugins.parent)
            where = lambda name: str(next(plugins.glob(f"*/{name}.so")))  # noqa: E731
        self._process = subprocess.Popen(
            [binary, "-f", "--unix", str(self.socket),
             f"--filter={where('nbdkit-log-filter')}", f"--filter={where('nbdkit-delay-filter')}",
             where("nbdkit-file-plugin"), str(self.path), f"logfile={log}", f"wdelay={WRITE_DELAY_MS}ms"],
            stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
        )  # fmt: skip
        self._ended = os.pidfd_open(self._process.pid)
        threading.Thread(target=self._read, daemon=True).start()

    def await_socket(self, limit: float = 30) -> None:
        """Until it can be connected to."""
        deadline = time.monotonic() + limit
        while not self.socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BedError("nbdkit does not serve the disk, see above")
            select.select([self._ended], [], [], 0.05)

    def _read(self) -> None:
        rest = b""
        with self.kept.open("wb") as kept:
            while True:
                select.select([self._lines, self._ended], [], [])
                try:
                    data = os.read(self._lines, 1 << 16)
                except BlockingIOError:
                    data = b""
                if not data:
                    if self._process.poll() is not None:
                        return
                    # Not opened yet, or flushed: nothing to read until it is.
                    select.select([self._ended], [], [], 0.05)
                    continue
                kept.write(data)
                *lines, rest = (rest + data).split(b"\n")
                with self._changed:
                    for line in lines:
                        self._take(line.decode("utf-8", "replace"))
                    self._changed.notify_all()

    def _take(self, line: str) -> None:
        match = self._LINE.match(line)
        if match is None:
            return
        stamp, connection, leaves, action, rest = match.groups()
        if action == "Connect" and (export := re.search(r'export=["\']?(\w+)', rest)):
            self._nodes[connection] = export.group(1)
        if action != "Write" or not (ident := re.search(r"id=(\d+)", rest)):
            return
        when = datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S.%f").replace(tzinfo=UTC)
        ns = int(when.timestamp()) * 1_000_000_000 + when.microsecond * 1000
        key = connection, ident.group(1)
        if leaves:
            self._done[key] = ns
        else:
            offset = re.search(r"offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)", rest)
            assert offset is not None
            if int(offset.group(2), 16) != SECTOR:
                raise BedError(f"a write of something else than a sector: {line}")
            self._asked[key] = ns, int(offset.group(1), 16) // SECTOR
            self._order.append(key)

    def _write(self, key: tuple[str, str]) -> Write:
        ns, sector = self._asked[key]
        return Write(ns, self._nodes.get(key[0], "?"), sector, self._done.get(key, 0))

    def writes(self) -> list[Write]:
        """All so far, in the order in which they were asked for."""
        with self._changed:
            return [self._write(key) for key in self._order]

    def __len__(self) -> int:
        return len(self._order)

    def await_write(self, node: str, after: int, limit: float) -> Write:
        """The first log entry that the node wrote after the first `after` writes, when it is done."""
        deadline = time.monotonic() + limit
        with self._changed:
            while True:
                for key in self._order[after:]:
                    write = self._write(key)
                    if write.node == node and write.number is not None and write.done_ns:
                        return write
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise TimeoutError(f"{node} wrote no number within {limit:g} s")

    def entry(self, number: int) -> tuple[str, int, str]:
        """What the log on the disk holds there: magic, number, the writer's UUID."""
        with self.path.open("rb") as file:
            file.seek((LOG_SECTOR + number) * SECTOR)
            data = file.read(SECTOR)
        text = data[16:32].hex()
        uuid = "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
        return data[:8].decode("latin-1"), int.from_bytes(data[8:12], "little"), uuid

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)


class Remote:
    """A node as the host has it: its VM and the port to node.py."""

    def __init__(self, bed: Bed, name: str) -> None:
        self.bed = bed
        self.name = name
        self.log = bed.home / f"{name}.out"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(bed.home / f"{name}.port"))
        self._listener.listen(1)
        self._lock = threading.Lock()
        other = NODES[1 - NODES.index(name)]
        number = NODES.index(name) + 1
        argv = [
            str(TREE / "tests/vm/run"), "--kernel", bed.kernel, "--hostname", name, "--mem", "1536M",
            # A CPU of the host for each of them.
            "--no-iommu", "--one-thread", "--timeout", "3000", "--boot-timeout", str(_BOOT_LIMIT),
            "--qemu-opts",
            "-chardev", f"socket,id=bed,path={bed.home}/{name}.port",
            "-device", "virtserialport,bus=ports.0,chardev=bed,name=org.hwerr.bed",
            "-netdev", f"dgram,id=ha,local.type=unix,local.path={bed.home}/{name}.net,"
                       f"remote.type=unix,remote.path={bed.home}/{other}.net",
            "-device", f"virtio-net-pci,netdev=ha,mac=52:54:00:77:00:{number:02x}",
            "-blockdev", f"driver=nbd,node-name=shared,export={name},"
                         f"server.type=unix,server.path={bed.disk.socket}",
            "-device", "virtio-blk-pci,drive=shared,share-rw=on,serial=shared",
            "--", "python", str(TREE / "tests/ha/node.py"),
        ]  # fmt: skip
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(argv, cwd=TREE, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        self._file: Any = None

    def connect(self, limit: float = _BOOT_LIMIT) -> None:
        """Until node.py answers."""
        pidfd = os.pidfd_open(self.process.pid)
        try:
            found, _, _ = select.select([self._listener.fileno(), pidfd], [], [], limit)
        finally:
            os.close(pidfd)
        if self._listener.fileno() not in found:
            raise BedError(f"the VM of {self.name} did not come up:\n{self.said()}")
        port, _ = self._listener.accept()
        port.settimeout(limit)
        self._port = port
        self._file = port.makefile("rwb", buffering=0)
        self.time()
        port.settimeout(_ANSWER_LIMIT)

    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        """Whatever node.py's Node has."""
        if verb.startswith("_"):
            raise AttributeError(verb)
        return lambda **more: self._ask(verb, **more)

    def _ask(self, verb: str, **more: Any) -> Any:
        with self._lock:
            try:
                self._file.write(json.dumps({"do": verb, **more}).encode() + b"\n")
                line = self._file.readline()
            except TimeoutError:
                raise BedError(f"{self.name} did not answer {verb}:\n{self.said()}") from None
        if not line:
            raise BedError(f"{self.name} is gone:\n{self.said()}")
        reply = json.loads(line)
        if "error" in reply:
            raise BedError(reply["error"])
        return reply["ok"]

    def offset(self) -> tuple[int, int]:
        """(node's clock - host's, how wrong that may be), ns: of the fastest of some round trips."""
        tries = []
        for _ in range(12):
            before = time.time_ns()
            theirs = self.time()
            after = time.time_ns()
            tries.append(((after - before) // 2, theirs - (before + after) // 2))
        error, offset = min(tries)
        return offset, error

    def end(self, limit: float = 120) -> int:
        """The runner's status: what became of the VM."""
        if self._file is not None and self.process.poll() is None:
            with contextlib.suppress(BedError, OSError):
                self._ask("end")
        try:
            status = self.process.wait(limit if self._file is not None else 1)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            status = self.process.wait(60)
        self._listener.close()
        return status


class Bed:
    """Both nodes, up and in one cluster. A context manager; the VMs' splats raise at its end."""

    def __init__(self, kernel: str = "6.12") -> None:
        self.kernel = kernel
        self.home = Path(tempfile.mkdtemp(prefix="hwerr-ha."))
        self.root = Path(self._output(TREE / "scripts/ha-root"))
        self._assemble()
        # Once: both nodes find it done.
        self._output(TREE / "scripts/build-module", kernel)
        self._output(TREE / "scripts/build-bpf")
        self.disk = Disk(self.home, self.root)
        self.nodes: dict[str, Remote] = {}

    @staticmethod
    def _output(*argv: str | Path) -> str:
        done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise BedError(f"{argv[0]} failed, see above")
        return done.stdout.strip()

    def _assemble(self) -> None:
        """The guest's ROM, where the VMs can read it."""
        where = TREE / "build/ha"
        where.mkdir(parents=True, exist_ok=True)
        self.rom = where / "writer.rom"
        built = where / "writer.o"
        self._output("as", "-o", built, TREE / "tests/ha/writer.S")
        self._output("ld", "-m", "elf_x86_64", "-Ttext=0", "--oformat", "binary", "-o", self.rom, built)

    def __enter__(self) -> Self:
        try:
            self.disk.await_socket()
            say("booting two nodes")
            for name in NODES:
                self.nodes[name] = Remote(self, name)
            self.each(lambda node: node.connect())
            say("corosync and Pacemaker")
            self.each(lambda node: node.prepare(root=str(self.root), rom=str(self.rom)))
            self.each(lambda node: node.cluster())
            self.each(lambda node: node.await_members())
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def each(self, what: Callable[[Remote], Any]) -> list[Any]:
        """On all nodes at the same time."""
        with ThreadPoolExecutor(len(NODES)) as pool:
            return list(pool.map(what, self.nodes.values()))

    def await_write(self, node: str, after: int, limit: float) -> Write:
        """As Disk.await_write(); if none comes, the error says where that node's guest is."""
        try:
            return self.disk.await_write(node, after, limit)
        except TimeoutError as error:
            raise BedError(f"{error}:\n{self.nodes[node].stuck()}") from None

    def other(self, node: Remote) -> Remote:
        return self.nodes[NODES[1 - NODES.index(node.name)]]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        statuses: dict[str, int] = {}
        if self.nodes:
            with ThreadPoolExecutor(len(NODES)) as pool:
                ended = pool.map(lambda n: n.end(), self.nodes.values())
                statuses = dict(zip(self.nodes, ended, strict=True))
        self.disk.close()
        texts = [f"{name}: {code}\n{self.nodes[name].said()}" for name, code in statuses.items() if code]
        if error is None:
            shutil.rmtree(self.home, ignore_errors=True)
        else:
            say(f"the nodes' output and the disk's log are in {self.home}")
        if texts and error is None:
            raise BedError("a node did not end well: " + "\n".join(texts))
