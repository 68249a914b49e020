# SPDX-License-Identifier: MIT
"""Runs in the VM: hwerr and its peers on the same injections, by turns; see scripts/bench-peers.

    side_by_side.py measure BUILT PEERS     prints one JSON object on its last line
    side_by_side.py severity BUILT PEERS    the same

BUILT holds the programs, PEERS a directory for each rasdaemon, as its package unpacks.
"""

from __future__ import annotations

import csv
import json
import os
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import words
from testbed import inject
from testbed.guest import Guest, GuestConfig
from testbed.kernel import DEBUGFS, load_sim, modprobe, put
from testbed.records import AerRecord, MceRecord, parse_aer_inject, parse_mce_inject, parse_mcelog

import hwerr_notify

TRACING = Path("/sys/kernel/tracing")
SOURCES = Path("/sys/module/hwerr/parameters/sources")
CASES = Path(__file__).resolve().parents[2] / "cases"
RUN = Path("/run/peers")
PAGE = 4096
KINDS = {
    "mc_event": "ras/mc_event",
    "mce_record": "mce/mce_record",
    "aer_event": "ras/aer_event",
    "memory_failure": "ras/memory_failure_event",
}
# How often each peer has its turn, and how often a turn has each kind of error.
ROUNDS = int(os.environ.get("HWERR_PEERS_ROUNDS", "4"))
# No round begins later than this, on a machine that is slow; the first always does.
SECONDS = float(os.environ.get("HWERR_PEERS_SECONDS", "480"))
REPEAT = 4
# Receiver Error, Bad TLP, Bad DLLP, Replay Timer Timeout: PCI Express 7.8.4.5, as many as REPEAT.
COR_STATUS = (0x1, 0x40, 0x80, 0x1000)
STORM_ROUNDS = int(os.environ.get("HWERR_PEERS_STORMS", "2"))
STORM = int(os.environ.get("HWERR_PEERS_STORM", "100000"))
STORM_UE = 500
# For an event to become visible, ms; and to be told that it does not, where that is known.
PATIENCE, IMPATIENCE = 20_000, 1_000
SETTLE = 60.0

VAL, EN, MISCV, ADDRV = 1 << 63, 1 << 60, 1 << 59, 1 << 58
# A corrected DRAM error of the VM's own, an AMD CPU before Zen: bank 4, extended code 8.
DRAM = VAL | EN | MISCV | ADDRV | 8 << 16 | 0x0813
INTEL, SER, CMCI = 0, 1 << 24, 1 << 10


ALL_SOURCES: list[str] = []


def say(text: str) -> None:
    print(f"peers: {text}", file=sys.stderr, flush=True)


def pause(seconds: float) -> None:
    select.select([], [], [], seconds)


def wait_until(what: str, true: Callable[[], Any], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise SystemExit(f"peers: not within {seconds:g} s: {what}")
        pause(0.02)


def cpu_ns(pid: int) -> int:
    """CPU time of a process, to the nanosecond (clock_getcpuclockid(3))."""
    return time.clock_gettime_ns(~pid << 3 | 2)


def _threads(pid: int) -> Iterator[tuple[str, int]]:
    """State and context switches of each thread."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        status = (task / "status").read_text("utf-8")
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        switches = int(fields["voluntary_ctxt_switches"]) + int(fields["nonvoluntary_ctxt_switches"])
        yield fields["State"][0], switches


def settled(pid: int, quiet: float = 0.5, seconds: float = SETTLE) -> bool:
    """Wait until it has slept for so long, all of it, without a moment of CPU time."""
    deadline = time.monotonic() + seconds
    since, before = time.monotonic(), -1
    while time.monotonic() < deadline:
        now = cpu_ns(pid)
        if now != before or any(state != "S" for state, _ in _threads(pid)):
            since, before = time.monotonic(), now
        elif time.monotonic() - since >= quiet:
            return True
        pause(0.05)
    return False


# -- the peers ---------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A consumer: how it is started, and the lines it says of a kind of error."""

    name: str
    title: str
    argv: tuple[str, ...] = ()
    marks: dict[str, str] = field(default_factory=dict)
    severity: Callable[[str], str | None] | None = None
    root: Path | None = None  # rasdaemon, as unpacked
    wakes: bool | None = None  # rasdaemon: whether it sees to it that poll() wakes it, or we do
    seconds: float = 60.0


TRACE_MARKS = {kind: f" {path.rpartition('/')[2]}" for kind, path in KINDS.items()}


def peers(built: Path, root: Path) -> list[Peer]:
    def every(mark: str) -> dict[str, str]:
        return dict.fromkeys(KINDS, mark)

    old = {kind: mark for kind, mark in TRACE_MARKS.items() if kind != "memory_failure"}
    found = sorted(p.name for p in root.iterdir() if (p / "usr/sbin/rasdaemon").exists())
    daemons = []
    for version in found:
        wakes = b"buffer_percent" in (root / version / "usr/sbin/rasdaemon").read_bytes()
        marks = TRACE_MARKS if wakes else old
        title = f"rasdaemon {version}"
        daemons.append(
            Peer(f"rasdaemon-{version}", title, marks=marks, severity=words.rasdaemon,
                 root=root / version, wakes=wakes)
        )  # fmt: skip
        if not wakes:
            daemons.append(
                Peer(f"rasdaemon-{version}-helped", f"{title}, buffer_percent set to 0 for it", marks=marks,
                     severity=words.rasdaemon, root=root / version, wakes=True)
            )  # fmt: skip
    return [
        Peer("hwerr-poll", "hwerr, examples/hwerr-poll.c", (str(built / "hwerr-poll"), "-a"),
             every(" source ")),
        Peer("hwerr-watch", "hwerr, hwerr-watch --json (Python)", ("hwerr-watch", "--json"),
             every('{"seq"'), words.watch),
        *daemons,
        Peer("trace_pipe", "cat trace_pipe", ("cat", f"{TRACING}/instances/peers/trace_pipe"),
             TRACE_MARKS, words.trace),
        Peer("perf", "perf_event_open, a wake-up an event", (str(built / "perfread"), *KINDS.values()),
             TRACE_MARKS),
    ]  # fmt: skip


class Running:
    """A peer that is up and waits for errors."""

    def __init__(self, peer: Peer, process: subprocess.Popen[bytes], home: Path) -> None:
        self.peer = peer
        self.process = process
        self.pid = process.pid
        self.home = home

    @property
    def database(self) -> Path | None:
        return self.home / "lib/rasdaemon" if self.peer.root else None

    def rows(self) -> int:
        """Committed rows of rasdaemon's database."""
        assert self.database is not None
        with closing(sqlite3.connect(f"file:{self.database}/ras-mc_event.db?mode=ro", uri=True)) as db:
            tables = [t for (t,) in db.execute("select name from sqlite_master where type = 'table'")]
            return sum(int(db.execute(f"select count(*) from {t}").fetchone()[0]) for t in tables)


def _rasdaemon(peer: Peer, home: Path) -> tuple[list[str], dict[str, str]]:
    """Its command, with a /var/lib of its own, and what the unit's EnvironmentFile has."""
    assert peer.root is not None
    (home / "lib/rasdaemon").mkdir(parents=True)
    libraries = peer.root / "usr/lib/x86_64-linux-gnu"
    script = f"mount --bind {home}/lib /var/lib && exec {peer.root}/usr/sbin/rasdaemon -f -r"
    lines = (peer.root / "etc/default/rasdaemon").read_text("utf-8").splitlines()
    settings = (line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    environment = {key: value.strip('"') for key, value in settings}
    return ["unshare", "-m", "sh", "-c", script], environment | {"LD_LIBRARY_PATH": str(libraries)}


def _instance(name: str, events: tuple[str, ...] = ()) -> Path:
    path = TRACING / "instances" / name
    path.mkdir(exist_ok=True)
    for event in events:
        put(path / "events" / event / "enable", "1")
    return path


@contextmanager
def running(peer: Peer, out: int, home: Path) -> Iterator[Running]:
    """Start it with its standard output in `out`; it is up when it sleeps and listens."""
    home.mkdir(parents=True)
    argv = list(peer.argv)
    environment: dict[str, str] = {}
    instance: Path | None = None
    if peer.root:
        argv, environment = _rasdaemon(peer, home)
        instance = TRACING / "instances/rasdaemon"
    elif peer.name == "trace_pipe":
        instance = _instance("peers", tuple(KINDS.values()))
    listen(peer.name.startswith("hwerr"))
    with (home / "err").open("wb") as err:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=os.environ | environment
        )
        try:
            wait_until(f"{peer.title} is up", lambda: _up(peer, process, home))
            if peer.name.endswith("-helped"):
                assert instance is not None
                put(instance / "buffer_percent", "0")
            if not settled(process.pid):
                raise SystemExit(f"peers: {peer.title} does not come to rest")
            yield Running(peer, process, home)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if instance is not None:
                # It would go on tracing, at a cost to the next.
                instance.rmdir()


def listen(hwerr: bool) -> None:
    """Attach hwerr's sources, or none of them: the others are to run as if it were not there."""
    for name in ALL_SOURCES:
        put(SOURCES, f"{'+' if hwerr else '-'}{name}")


def _up(peer: Peer, process: subprocess.Popen[bytes], home: Path) -> bool:
    said = (home / "err").read_text("utf-8", errors="replace")
    if process.poll() is not None:
        raise SystemExit(f"peers: {peer.title} ended ({process.returncode}): {said}")
    if peer.root:
        return "Listening to events" in said and (home / "lib/rasdaemon/ras-mc_event.db").exists()
    if peer.name.startswith("hwerr"):
        # This one is a reader, too.
        with hwerr_notify.open() as device:
            return device.stats().readers > 1
    if peer.name == "perf":
        return "ready" in said
    return "cat" in Path(f"/proc/{process.pid}/comm").read_text("utf-8")


# -- what they make visible ----------------------------------------------------------


class Eye:
    """`visible` on what a consumer says."""

    def __init__(self, built: Path, fd: int, text: Path, database: Path | None = None) -> None:
        self.text = text
        self._read = 0
        self._log = text.open("wb")
        argv = [str(built / "visible"), str(fd), *([str(database)] if database else [])]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, pass_fds=(fd,), text=True
        )

    def inject(self, mark: str, path: Path, data: bytes, patience: int = PATIENCE) -> dict[str, int | None]:
        """{"line": ns, "row": ns}; None for what did not come."""
        return self._ask(f"{mark}\t{patience}\t{path}\t{data.hex()}\n")

    def said(self) -> str:
        """What the consumer said since this was called last."""
        self._ask("flush\n")
        with self.text.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        self._read += len(text)
        return text.decode(errors="replace")

    def _ask(self, line: str) -> dict[str, int | None]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            raise SystemExit(f"peers: visible ended: {self.text.read_text('utf-8')[-500:]}")
        return dict(json.loads(answer))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


class Errors:
    """The injections, the same for every peer but for the page: each is hit once."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self._gpa = 0x400000
        self.gpa = 0
        self._device = inject.pci_address("aer0")
        modprobe("hwpoison-inject")

    def _page(self) -> int:
        """Host-physical address of a page of the guest that had no error yet."""
        self._gpa += PAGE
        self.gpa = self._gpa
        return self.guest.gpa2hpa(self._gpa)

    def turn(self) -> Iterator[tuple[str, Path, bytes]]:
        """(kind, file, what to write to it)."""
        # The kernel clears what it handles, so the module is loaded once a turn.
        # Each is another corrected error: one that hwerr has just told is counted, and told within a second.
        corrected = [inject.aer_data(AerRecord(cor_status=bit, device=self._device)) for bit in COR_STATUS]
        uncorrected = inject.aer_data(AerRecord(uncor_status=0x8000, device=self._device))
        for n in range(REPEAT):
            for severity in ("ce", "ue"):
                line = f"mc=0 type={severity} page={self._page() >> 12} top=0 mid=1 low=-1 msg=side by side"
                yield "mc_event", inject.SIM / "edac", line.encode()
            line = f"status={DRAM} addr={self._page()} misc={2 << 6 | 12} bank=4"
            yield "mce_record", inject.SIM / "mce", line.encode()
            for data in (corrected[n], uncorrected):
                yield "aer_event", inject.AER_INJECT, data
            pfn = self._page() >> 12
            yield "memory_failure", DEBUGFS / "hwpoison/corrupt-pfn", str(pfn).encode()


def latency(peer: Peer, built: Path, errors: Errors, home: Path) -> dict[str, Any]:
    """One turn. Of each kind: ns to the first sign of it, None where there was none in time."""
    ours, theirs = os.pipe()
    result: dict[str, Any] = {"ns": {kind: [] for kind in peer.marks}, "first": {}, "named": ""}
    patience = IMPATIENCE if peer.wakes is False else PATIENCE
    try:
        with running(peer, theirs, home) as it:
            eye = Eye(built, ours, home / "said", it.database)
            before = cpu_ns(it.pid)
            for kind, path, data in errors.turn():
                if kind not in peer.marks:
                    continue
                eye.said()
                seen = eye.inject(peer.marks[kind], path, data, patience)
                first = min(((ns, what) for what, ns in seen.items() if ns is not None), default=None)
                result["ns"][kind].append(first and first[0])
                if first:
                    result["first"][first[1]] = result["first"].get(first[1], 0) + 1
                if kind == "memory_failure" and first:
                    settled(it.pid, 0.1)
                    result["named"] = words.names(eye.said(), errors.guest.pid, errors.gpa)
            settled(it.pid)
            visible = sum(x is not None for v in result["ns"].values() for x in v)
            if it.database and it.rows() != visible:
                raise SystemExit(f"peers: {peer.title}: {visible} signs of errors, {it.rows()} rows")
            result["cpu_ns"] = (cpu_ns(it.pid) - before) / visible if visible else None
            eye.close()
    finally:
        os.close(ours)
        os.close(theirs)
    return result


def qemu(built: Path, errors: Errors, monitor: Path, home: Path) -> dict[str, Any]:
    """The turn of QEMU's MEMORY_FAILURE, on a QMP monitor that nobody else uses."""
    listen(False)
    home.mkdir(parents=True)
    result: dict[str, Any] = {"ns": {"memory_failure": []}, "first": {}, "named": "", "cpu_ns": None}
    with socket.socket(socket.AF_UNIX) as qmp:
        qmp.connect(str(monitor))
        qmp.recv(65536)
        qmp.sendall(b'{"execute": "qmp_capabilities"}\n')
        qmp.recv(65536)
        eye = Eye(built, qmp.fileno(), home / "said")
        for kind, path, data in errors.turn():
            if kind != "memory_failure":
                continue
            eye.said()
            seen = eye.inject('"MEMORY_FAILURE"', path, data)
            result["ns"][kind].append(seen["line"])
            result["named"] = words.names(eye.said(), errors.guest.pid, errors.gpa)
        eye.close()
    return result


# -- storms --------------------------------------------------------------------------


def _raise(line: str) -> int:
    """CPU ns of a process that has the kernel raise errors, on one CPU."""
    pid = os.fork()
    if pid == 0:
        os.sched_setaffinity(0, {1})
        put(inject.SIM / "bench", line)
        os._exit(0)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit("peers: the storm could not be raised")
    return int((usage.ru_utime + usage.ru_stime) * 1e9)


STORM_LINE = f"n={STORM} ce=1 ue={STORM_UE}"


def _overrun(instance: Path) -> int:
    """Events that a trace instance has overwritten, unread."""
    stats = [p.read_text("ascii") for p in instance.glob("per_cpu/cpu*/stats")]
    return sum(
        int(line.split()[1]) for text in stats for line in text.splitlines() if line.startswith("overrun:")
    )


def storm(peer: Peer, home: Path) -> dict[str, Any]:
    """A storm, then one error more, behind which every loss is told if it is.

    A consumer that does not come to rest in time (rasdaemon) will see what its buffer still holds:
    `seen` is that, too, and `through` what it has come through.
    """
    home.mkdir(parents=True)
    overrun = None
    with (home / "out").open("wb") as out, running(peer, out.fileno(), home / "run") as it:
        start, began = cpu_ns(it.pid), time.monotonic()
        raiser = _raise(STORM_LINE)
        done = settled(it.pid, seconds=SETTLE)
        _raise("n=1 step=1 addr=4096")
        done &= settled(it.pid, seconds=SETTLE if done else 1.0)
        cpu, took = cpu_ns(it.pid) - start, time.monotonic() - began
        text = (home / "out").read_text("utf-8", errors="replace")
        if it.database:
            overrun = _overrun(TRACING / "instances/rasdaemon")
    seen = words.events(text, peer.marks["mc_event"])
    told = words.told_lost(text.splitlines())
    doubt = words.about_loss(text + (home / "run/err").read_text("utf-8", errors="replace"))
    return {
        "seen": len(seen) if overrun is None else STORM + 1 - overrun, "through": len(seen), "seconds": took,
        "told": told, "said": [line[:200] for line in doubt[:3]], "settled": done,
        "uncorrected": sum(_uncorrected(peer, line) for line in seen), "cpu_ns": cpu, "raise_ns": raiser,
        "raised": STORM + 1,
    }  # fmt: skip


def _uncorrected(peer: Peer, line: str) -> bool:
    if peer.name == "perf":
        # struct trace_event_raw_mc_event: error_type after the common head.
        return int.from_bytes(bytes.fromhex(line.rpartition(" ")[2])[8:12], "little") != 0
    if peer.name == "hwerr-poll":
        return line.split()[1] not in ("corrected", "info")
    assert peer.severity is not None
    return peer.severity(line) not in ("corrected", "info", None)


# -- severity ------------------------------------------------------------------------


def _cases() -> Iterator[tuple[str, str, list[str], Callable[[], tuple[Path, bytes]]]]:
    """(case, kind, classes, how to have it injected)."""
    for source in ("mce-inject", "mcelog", "aer-inject"):
        with (CASES / source / "expected.tsv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        for row in rows:
            name = f"{source}/{row['file']}" + (f" {row['rec']}" if row["rec"] != "0" else "")
            wanted = words.expected(row)
            if source == "aer-inject":
                aer = parse_aer_inject((CASES / source / row["file"]).read_text("utf-8"))[int(row["rec"])]
                device = "aer1" if "fatal" in wanted else "aer0"
                record = AerRecord(aer.cor_status, aer.uncor_status, aer.header_log, device)
                yield name, "aer_event", wanted, _aer(record)
                continue
            if source == "mce-inject":
                mce = parse_mce_inject((CASES / source / row["file"]).read_text("utf-8"))[int(row["rec"])]
            elif row["file"] == "xen":  # a log line, see its row
                mce = MceRecord(status=0xD400008000040150, addr=0x182C480179CF0, bank=2, cpu=1)
            else:
                (mce,) = parse_mcelog((CASES / source / "input" / row["file"]).read_text("utf-8"))
            yield name, "mce_record", wanted, _mce(mce, source)


def _aer(record: AerRecord) -> Callable[[], tuple[Path, bytes]]:
    return lambda: (inject.AER_INJECT, inject.aer_data(record))


def _mce(record: MceRecord, source: str) -> Callable[[], tuple[Path, bytes]]:
    # As tests/vm/test_sources.py injects them.
    more = f"inject={8 if record.status >> 61 & 1 else 0}"
    if source == "mcelog":
        more = f"mcgcap={record.mcgcap or SER | CMCI}"
    line = (
        f"status={record.status} mcgstatus={record.mcgstatus} addr={record.addr} misc={record.misc}"
        f" bank={record.bank} cpu={record.cpu or 0} cs={record.cs} vendor={INTEL}"
        f" cpuid={record.cpuid or 0} {more}"
    )
    return lambda: (inject.SIM / "mce", line.encode())


def severities(built: Path, root: Path) -> dict[str, Any]:
    """Every shared case, to every peer that has a word for severity; and to the others, for the count."""
    result: dict[str, Any] = {}
    for peer in peers(built, root):
        if peer.wakes is False or peer.name == "hwerr-poll":
            continue
        say(f"severity: {peer.title}")
        home = RUN / f"severity-{peer.name}"
        ours, theirs = os.pipe()
        with running(peer, theirs, home) as it:
            eye = Eye(built, ours, home / "said", it.database)
            for name, kind, wanted, prepare in _cases():
                path, data = prepare()
                eye.said()
                eye.inject(peer.marks[kind], path, data)
                for _ in wanted[1:]:
                    settled(it.pid, 1.0)
                settled(it.pid, 0.2)
                lines = words.events(eye.said(), peer.marks[kind])
                said = [peer.severity(line) if peer.severity else None for line in lines]
                result.setdefault(name, {"wanted": wanted, "by": {}})["by"][peer.name] = {
                    "said": said, "grade": words.grade(said, wanted), "lines": lines,
                }  # fmt: skip
            eye.close()
        os.close(ours)
        os.close(theirs)
    return result


# -- idle ----------------------------------------------------------------------------


def idle(built: Path, root: Path, seconds: float = 10.0) -> dict[str, int]:
    """Context switches of each while nothing happens."""
    result = {}
    policy = RUN / "guard.toml"
    policy.write_text(
        f'state_dir = "{RUN}/guard-state"\nrun_dir = "{RUN}/guard-run"\n'
        f'[[vm]]\nname = "*"\nqmp = "{RUN}/none-*.qmp"\n',
        encoding="utf-8",
    )
    guard = Peer("hwerr-guard", "hwerr-guard run", ("hwerr-guard", "--policy", str(policy), "run"))
    for peer in (*peers(built, root), guard):
        if peer.wakes is False or peer.name in ("perf", "trace_pipe"):
            continue
        home = RUN / f"idle-{peer.name}"
        with (RUN / "idle-out").open("wb") as out, running(peer, out.fileno(), home) as it:
            before = sum(n for _, n in _threads(it.pid))
            # Nothing ends this wait: that nothing happens is what is measured.
            pause(seconds)
            result[peer.name] = sum(n for _, n in _threads(it.pid)) - before
    return result


# -- all of it -----------------------------------------------------------------------


def rings(root: Path) -> dict[str, int]:
    """KiB that each has for what was not read yet."""
    with hwerr_notify.open() as device:
        info = device.info()
    instance = _instance("size")
    kib = int((instance / "buffer_size_kb").read_text("ascii").split()[0]) * (os.cpu_count() or 1)
    instance.rmdir()
    return {"hwerr": sum(info.ring_bytes) // 1024, "trace": kib, "perf": 512 * (os.cpu_count() or 1)}


def keep(built: Path, result: dict[str, Any]) -> None:
    """What there is so far, for the case that the VM is lost."""
    (built / "so-far.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(built: Path, root: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"latency": [], "storm": [], "nobody_ns": []}
    all_peers = peers(built, root)
    result["titles"] = {p.name: p.title for p in all_peers} | {"qemu": "QEMU's MEMORY_FAILURE"}
    result["rings"] = rings(root)
    monitor = RUN / "events.qmp"
    with ExitStack() as stack:
        config = GuestConfig(name="web1", mem=64 << 20, extra=("-qmp", f"unix:{monitor},server=on,wait=off"))
        errors = Errors(stack.enter_context(Guest.start(config)))
        began = time.monotonic()
        for n in range(ROUNDS):
            if n and time.monotonic() - began > SECONDS:
                break
            turns: dict[str, Any] = {}
            for peer in all_peers:
                if peer.wakes is False and n:
                    continue  # the first showed it
                say(f"latency, round {n + 1} of at most {ROUNDS}: {peer.title}")
                turns[peer.name] = latency(peer, built, errors, RUN / f"latency-{n}-{peer.name}")
            turns["qemu"] = qemu(built, errors, monitor, RUN / f"latency-{n}-qemu")
            result["latency"].append(turns)
            keep(built, result)
    for n in range(STORM_ROUNDS):
        turns = {}
        listen(False)
        result["nobody_ns"].append(_raise(STORM_LINE))
        for peer in all_peers:
            # rasdaemon takes all the time it is given.
            if peer.root and (n or peer.name.endswith("-helped")):
                continue
            say(f"storm of {STORM}, round {n + 1} of {STORM_ROUNDS}: {peer.title}")
            turns[peer.name] = storm(peer, RUN / f"storm-{n}-{peer.name}")
        result["storm"].append(turns)
        keep(built, result)
    return result


def main() -> int:
    what, built, root = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    load_sim()
    ALL_SOURCES.extend(word.strip("+") for word in SOURCES.read_text("ascii").replace(",", " ").split())
    RUN.mkdir(parents=True, exist_ok=True)
    # What the kernel logs of these errors goes to a slow serial port, in the path of some. A
    # splat still taints, and is still found.
    level = Path("/proc/sys/kernel/printk")
    with suppress(OSError):
        level.write_text("1\n", encoding="ascii")
    result: dict[str, Any] = {"kernel": os.uname().release}
    if what == "measure":
        result["measure"] = measure(built, root)
    else:
        result["severity"] = severities(built, root)
        keep(built, result)
        say("idle")
        result["idle"] = idle(built, root)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
