# SPDX-License-Identifier: MIT
"""hwerr-watch on the real device: what it prints, how it ends."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
from testbed.guest import Guest as Vm
from testbed.guest import GuestConfig

import hwerr_notify as h
from hwerr_notify import cli

pytestmark = pytest.mark.anywhere

S = h.Severity
TICK = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
LIMIT = 120.0
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def publisher() -> Iterator[h.Device]:
    with h.open(publish=True) as device:
        yield device


def record(n: int = 0, severity: h.Severity = S.RECOVERABLE, *infos: h.Info, **more: Any) -> h.Event:
    return h.build(*infos, severity=severity, raw_severity=n, **{"text": f"record {n}"} | more)


@dataclass
class Done:
    """What came of a run."""

    returncode: int
    stdout: str
    stderr: str


class Here(Protocol):
    """Runs the command in this process, which is much faster; on the real device all the same."""

    def __call__(self, *argv: object) -> Done: ...


@pytest.fixture
def watch(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def run(*argv: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["hwerr-watch", *map(str, argv)])
        capfd.readouterr()
        try:
            status = cli.hwerr_watch()
        except SystemExit as end:
            status = int(end.code or 0)
        return Done(status, *capfd.readouterr())

    return run


def spawn(*argv: object, **more: Any) -> Done:
    """Runs it as a process to its end. No traceback, whatever happens."""
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    given: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "timeout": LIMIT,
        "env": environment,
    }
    done = subprocess.run(["hwerr-watch", *map(str, argv)], check=False, **given | more)
    assert "Traceback" not in done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def events(done: Done) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def complaint(done: Done) -> str:
    """The one line on stderr."""
    (line,) = done.stderr.splitlines()
    assert line.startswith("hwerr-watch: ")
    return line


def published(publisher: h.Device, *records: h.Event) -> int:
    """Publishes; the number of the first."""
    seq = publisher.info().next_seq
    publisher.publish(*records)
    return seq


# -- what it shows -----------------------------------------------------------


def test_json_is_what_the_package_gives(watch: Here, publisher: h.Device) -> None:
    seq = published(publisher, record(1, S.FATAL, h.Task(1, comm="x")), record(2))
    done = watch("--since", seq, "--count", 2, "--timeout", LIMIT, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    with h.open(since=seq) as reader:
        assert events(done) == [e.to_json() for e in reader.drain()]


def test_it_follows(publisher: h.Device) -> None:
    seq = publisher.info().next_seq
    argv = ["hwerr-watch", "--json", "--since", str(seq), "--count", "2", "--timeout", str(LIMIT)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        publisher.publish(record(1))
        assert json.loads(process.stdout.readline())["raw_severity"] == 1
        publisher.publish(record(2), record(3))
        assert json.loads(process.stdout.readline())["raw_severity"] == 2
        assert process.stdout.read() == ""
        assert process.wait(LIMIT) == 0


def test_now_is_the_default(publisher: h.Device) -> None:
    publisher.publish(record(1))
    readers = publisher.stats().readers
    with subprocess.Popen(
        ["hwerr-watch", "--json", "--count", "1"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        # It is there when it has opened the file. Nothing else tells, so the number is asked for again.
        while publisher.stats().readers == readers and process.poll() is None:
            select.select([process.stdout], [], [], 0.05)
        publisher.publish(record(2))
        assert json.loads(process.stdout.readline())["raw_severity"] == 2
        assert process.wait(LIMIT) == 0


def test_history_then_the_end(watch: Here, publisher: h.Device) -> None:
    seq = published(publisher, record(1), record(2))
    for since in ("oldest", "boot", seq):
        done = watch("--since", since, "--timeout", 0, "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert [e["raw_severity"] for e in events(done)][-2:] == [1, 2]


def test_nothing_came(watch: Here) -> None:
    for timeout in (0, 0.3):
        done = watch("--timeout", timeout)
        assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_something_came_before_the_time_was_over(watch: Here, publisher: h.Device) -> None:
    seq = published(publisher, record(1))
    done = watch("--since", seq, "--count", 2, "--timeout", 0.3, "--json")
    assert done.returncode == 0
    assert len(events(done)) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--severity", "recoverable"], [3, 4]),
        (["--severity", "FATAL"], [4]),
        (["--source", "kvm"], [1, 3]),
        (["--source", "kvm,block"], [1, 2, 3]),
        (["--source", "kvm", "--source", "memory-failure"], [1, 3, 4]),
        (["--source", "memfail"], [4]),
        (["--pid", "4242"], [2]),
        (["--pid", "4242", "--severity", "fatal"], []),
        (["--vm", "no-such-vm"], []),
    ],
)
def test_filters(watch: Here, publisher: h.Device, options: list[str], expected: list[int]) -> None:
    sources = [h.Source.USER, h.Source.KVM, h.Source.BLOCK, h.Source.KVM, h.Source.MEMORY_FAILURE]
    unique = str(uuid.uuid4())
    seq = published(
        publisher,
        *(
            record(n, severity, *([h.Task(4242)] if n == 2 else []), source=sources[n], text=unique)
            for n, severity in enumerate(S)
        ),
    )
    done = watch("--since", seq, "--timeout", 0, "--json", *options)
    assert done.returncode == (0 if expected else 3)
    assert [e["raw_severity"] for e in events(done)] == expected


@pytest.mark.amd
def test_a_vm_by_name_and_by_uuid(watch: Here, publisher: h.Device) -> None:
    with (
        Vm.start(GuestConfig(name="web1")) as guest,
        Vm.start(GuestConfig(name="db1")) as other,
    ):

        def hit(n: int, of: Vm) -> h.Event:
            stat = Path(f"/proc/{of.pid}/stat").read_text().rpartition(")")[2].split()
            flags = h.GuestFlags.KVM
            return record(
                n, S.FATAL, h.Guest(of.pid, flags, start_ns=int(stat[19]) * TICK, gpa=0x5000, len=4096)
            )

        seq = published(publisher, hit(1, guest), hit(2, other), record(3), hit(4, guest))
        for vm in ("web1", guest.uuid, guest.uuid.upper()):
            done = watch("--since", seq, "--timeout", 0, "--json", "--vm", vm)
            assert [e["raw_severity"] for e in events(done)] == [1, 4]
            assert events(done)[0]["guests"][0]["uuid"] == guest.uuid
        text = watch("--since", seq, "--timeout", 0).stdout.splitlines()
        assert f"web1({guest.pid}) 0x5000" in text[0]
        assert f"db1({other.pid}) 0x5000" in text[1]


def test_loss_is_a_line_of_its_own(watch: Here, publisher: h.Device) -> None:
    seq = publisher.info().next_seq
    for n in range(400):
        publisher.publish(record(n, S.FATAL, text="x" * 3000))
    lines = watch("--since", seq, "--timeout", 0, "--source", "user").stdout.splitlines()
    lost = re.fullmatch(r"-- (\d+) records lost here.*", lines[0])
    assert lost
    assert int(lost[1]) + len(lines) - 1 == 400


def test_loss_before_events_that_are_not_shown_is_told(watch: Here, publisher: h.Device) -> None:
    seq = publisher.info().next_seq
    for n in range(400):
        publisher.publish(record(n, S.FATAL, text="x" * 3000))
    with h.open(since=seq) as reader:
        lost = reader.read(timeout=0)[0].lost
    assert lost
    child = subprocess.Popen(
        ["qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-machine", "none", "-name", "shown"]
    )
    try:
        stat = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        publisher.publish(record(7, S.INFO, h.Guest(child.pid, start_ns=int(stat[19]) * TICK)))
        done = watch("--since", seq, "--timeout", 0, "--vm", "shown", "--json")
    finally:
        child.kill()
        child.wait()
    (event,) = events(done)
    assert (event["raw_severity"], event["lost"]) == (7, lost)


# -- the terminal form -------------------------------------------------------


def test_columns_are_aligned_and_plain_without_a_terminal(watch: Here, publisher: h.Device) -> None:
    edac = h.Edac(0, 0, 1, label="DIMM_A1")
    seq = published(
        publisher,
        record(1, S.CORRECTED, edac, source=h.Source.EDAC, text=str(uuid.uuid4())),
        record(2, S.FATAL, source=h.Source.MEMORY_FAILURE),
        record(3, S.RECOVERABLE, h.Pci(0, 1, 0, status=0x1000), source=h.Source.AER),
    )
    lines = watch("--since", seq, "--timeout", 0).stdout.splitlines()
    assert len(lines) == 3
    for line, severity, source, where in zip(
        lines, ["corrected", "fatal", "recoverable"], ["edac", "memfail", "aer"],
        ["DIMM_A1", "-", "0000:01:00.0"], strict=True,
    ):  # fmt: skip
        assert re.match(r"\d\d:\d\d:\d\d\.\d{3} ", line)
        assert line[13:24].rstrip() == severity
        assert line[25:32].rstrip() == source
        assert line[33:45].rstrip() == where
        assert line.isprintable()


def test_v_shows_everything(watch: Here, publisher: h.Device) -> None:
    mce = h.Mce(status=0xBD000000000000C0, addr=0xAE00000, bank=9)
    seq = published(publisher, record(1, S.FATAL, mce, h.Task(4242, va=0x7000, len=4096, comm="postgres")))
    out = watch("--since", seq, "--timeout", 0, "-v").stdout
    for part in (
        "status=0xbd000000000000c0",
        "bank=9",
        "pid=4242",
        "va=0x7000",
        f"seq={seq}",
        "text     record 1",
    ):
        assert part in out, part


def on_a_terminal(*argv: object, columns: int = 100, **environment: str) -> str:
    """What it writes to a terminal."""
    master, slave = pty.openpty()
    base = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    env = base | {"TERM": "xterm-256color", "COLUMNS": str(columns)} | environment
    process = subprocess.Popen(["hwerr-watch", *map(str, argv)], stdout=slave, stderr=slave, env=env)
    os.close(slave)
    data = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:
            break
        if not piece:
            break
        data += piece
    os.close(master)
    assert process.wait(LIMIT) == 0, data
    return data.decode()


def test_a_terminal_has_colour_and_one_line_an_event(publisher: h.Device) -> None:
    seq = published(publisher, record(1, S.FATAL, text="a long text " * 40), record(2, S.CORRECTED))
    options = ("--since", seq, "--timeout", 0)
    out = on_a_terminal(*options)
    assert "\x1b[" in out
    lines = ESCAPE.sub("", out).splitlines()
    assert len(lines) == 2
    assert all(len(line) <= 100 for line in lines)
    assert lines[0].endswith("…")
    assert "a long text " * 39 in ESCAPE.sub("", on_a_terminal(*options, "-v")).replace("\r\n", "")
    assert "\x1b[" not in on_a_terminal(*options, NO_COLOR="1")
    assert "\x1b[" in spawn(*options, env=os.environ | {"FORCE_COLOR": "1", "TERM": "xterm"}).stdout


def test_what_others_write_cannot_move_the_cursor(watch: Here, publisher: h.Device) -> None:
    evil = "\x1b[2J\x07\r\n\u202efatal"
    seq = published(
        publisher,
        record(1, S.FATAL, h.Task(4242, va=1, len=1, comm=evil[:7]), h.Edac(0, label=evil), text=evil),
    )
    for options in ([], ["-v"]):
        out = watch("--since", seq, "--timeout", 0, *options).stdout
        assert all(line.isprintable() for line in out.splitlines())
        out = ESCAPE.sub("", on_a_terminal("--since", seq, "--timeout", 0, *options))
        assert all(line.isprintable() for line in out.split("\r\n"))
    assert watch("--since", seq, "--timeout", 0, "--json").stdout.isascii()


def test_stats(watch: Here, publisher: h.Device) -> None:
    publisher.publish(record(1))
    done = watch("--stats", "--json")
    assert done.returncode == 0
    (form,) = events(done)
    assert form["records"] == publisher.stats().records
    assert form["by_source"] == {k.label: n for k, n in publisher.stats().by_source.items()}
    assert form["scope"] == "all"
    out = watch("--stats").stdout
    assert re.search(rf"^records +{form['records']} published", out, re.MULTILINE)
    assert re.search(rf"^  recoverable +{form['by_severity']['recoverable']}$", out, re.MULTILINE)


# -- how it ends -------------------------------------------------------------


def test_a_number_that_is_not_yet_is_wrong_usage(watch: Here) -> None:
    done = watch("--since", 99999999999)
    assert done.returncode == 2
    assert "no record 99999999999 yet" in complaint(done)


def test_no_device(watch: Here) -> None:
    done = watch("--device", "/dev/hwerr-is-not-here")
    assert done.returncode == 4
    assert "modprobe hwerr" in complaint(done)


def test_another_device(watch: Here) -> None:
    for path in ("/dev/null", "/"):
        done = watch("--device", path)
        assert done.returncode == 1
        assert "is not a hwerr device" in complaint(done)


def test_no_permission(tmp_path: Path) -> None:
    node = Path("/dev/hwerr-test")
    os.mknod(node, 0o600 | 0o020000, os.stat("/dev/hwerr").st_rdev)
    try:
        done = spawn("--device", node, "--timeout", 0, user=65534, group=65534, extra_groups=[])
    finally:
        node.unlink()
    assert done.returncode == 5
    assert "root" in complaint(done)


def test_own_events_only_is_said_once() -> None:
    unprivileged = {"user": 65534, "group": 65534, "extra_groups": []}
    done = spawn("--since", "oldest", "--timeout", 0, **unprivileged)
    assert (done.returncode, done.stdout) == (3, "")
    assert "CAP_SYS_ADMIN" in complaint(done)
    done = spawn("--pid", 1, **unprivileged)
    assert done.returncode == 5
    assert "--pid" in complaint(done)


def test_the_module_is_not_loaded(watch: Here) -> None:
    subprocess.run(["rmmod", "hwerr"], check=True)
    try:
        # Root goes without the module: test_moduleless.py.
        done = spawn(user=65534, group=65534, extra_groups=[])
    finally:
        subprocess.run(["insmod", os.environ["HWERR_KO"]], check=True)
    assert done.returncode == 4
    assert "modprobe hwerr" in complaint(done)
    assert "without it: not permitted" in complaint(done)
    # It works again; pages poisoned by other tests are told anew, so ask for what none published.
    assert watch("--source", "user", "--timeout", 0).returncode == 3


def running(*argv: str, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(["hwerr-watch", *argv], text=True, stderr=subprocess.PIPE, **more)


def one_line(process: subprocess.Popen[str]) -> str:
    assert process.stderr
    (line,) = process.stderr.read().splitlines()
    return line


@pytest.mark.parametrize("form", ["--json", "-v"])
def test_ctrl_c(publisher: h.Device, form: str) -> None:
    seq = published(publisher, record(1))
    with running("--since", str(seq), form, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == 130
        assert one_line(process) == "hwerr-watch: interrupted"


@pytest.mark.parametrize("form", ["--json", "-v"])
def test_a_reader_that_goes_away(publisher: h.Device, form: str) -> None:
    seq = published(publisher, record(1))
    # While it waits ...
    with running("--since", str(seq), form, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(LIMIT) == 141
        assert "closed by its reader" in one_line(process)
    # ... and while it writes more than a pipe holds.
    for n in range(60):
        publisher.publish(record(n, text="x" * 3500))
    with running("--since", str(seq), form, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(LIMIT) == 141
        assert "closed by its reader" in one_line(process)


def test_output_that_cannot_be_written(publisher: h.Device) -> None:
    seq = published(publisher, record(1))
    with open("/dev/full", "w") as full:
        for form in ("--json", "-v", "--stats"):
            done = spawn("--since", seq, "--timeout", 0, form, stdout=full)
            assert done.returncode == 1
            assert "No space left on device" in complaint(done)
    done = spawn("-c", "exec hwerr-watch --timeout 0 >&-", executable="/bin/sh")
    assert done.returncode == 1
    assert "output: it is closed" in complaint(done)
