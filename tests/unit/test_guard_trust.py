# SPDX-License-Identifier: MIT
"""What hwerr-guard takes from others: names, sockets, files that are in the way."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hwerr_notify.cli import complain
from hwerr_notify.cli.guard import _Formatter, _status_lines
from hwerr_notify.guard.control import Control
from hwerr_notify.guard.daemon import Guard
from hwerr_notify.guard.dump import write_core
from hwerr_notify.guard.errors import Fault, MonitorError
from hwerr_notify.guard.front import Front
from hwerr_notify.guard.layout import Range
from hwerr_notify.guard.policy import Policy, VmPolicy
from hwerr_notify.guard.process import Process
from hwerr_notify.guard.store import create, write_durably
from hwerr_notify.guard.tell import Teller, marker
from hwerr_notify.guard.vm import Vm, identity, safe_name

EVIL = "web1\x1b[2J\nERROR: VM db1 is FROZEN"


class Says:
    """A monitor that answers what it is told to."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.closed = asyncio.Event()
        self.pid = os.getpid()

    async def execute(self, command: str, arguments: Any = None, *, limit: float = 5.0) -> Any:
        return self.answers[command.replace("-", "_")]

    async def aclose(self) -> None:
        self.closed.set()


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("web1", "web1"), ("a b/c", "a b/c"), ("..", None), (".", None), (".web1.part", None), ("", None),
        ("x" * 201, None), ("é" * 50, None), (7, None), (None, None), (["web1"], None), ({}, None),
        ("\ud800", "\\ud800"), ("a\x1b[2Jb\nc", "a\\x1b[2Jb\\nc"),
    ],
)  # fmt: skip
def test_a_name_is_fit_for_files_and_terminals(said: object, name: str | None) -> None:
    assert safe_name(said) == name
    found, _ = asyncio.run(identity(Says(query_name={"name": said}, query_uuid={"UUID": None})))
    assert found == name
    if name is not None:
        path = marker(Path("/run/g"), "frozen", name)
        assert path.parent == Path("/run/g/frozen")
        assert len(os.fsencode(path.name)) < 240


def test_a_uuid_is_fit_for_terminals() -> None:
    _, uuid = asyncio.run(identity(Says(query_name={}, query_uuid={"UUID": "a\x1bb"})))
    assert uuid == "a\\x1bb"


def test_what_qemu_says_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    complain("hwerr-guard", EVIL)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "\x1b" not in err
    record = logging.LogRecord("g", logging.INFO, "", 0, "VM %s: stopped", (EVIL,), None)
    assert _Formatter("%(levelname)s: %(message)s").format(record).isprintable()


def test_status_is_one_line_an_incident(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hwerr_notify.cli import guard as cli

    incident = {"id": "i", "vm": "v", "pid": 1, "state": "failed", "message": EVIL, "failed_step": "stop",
                "why": EVIL, "dump": None}  # fmt: skip
    form = {"vms": [], "incidents": [incident], "unreachable": {}, "damaged": []}
    assert len(list(_status_lines(form))) == 1
    monkeypatch.setattr(cli, "ask", lambda *a, **k: ([form], 0))
    policy = tmp_path / "guard.toml"
    policy.write_text('[[vm]]\nname = "*"\nqmp = "/run/none/*.qmp"\n', "utf-8")
    assert cli.main(["--policy", str(policy), "status"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.rstrip("\n").isprintable()


# -- files -------------------------------------------------------------------


@pytest.mark.parametrize("there", ["link", "file", "dangling"])
def test_nothing_of_others_is_filled(tmp_path: Path, there: str) -> None:
    """A name that somebody else was quicker to take: a link elsewhere, a file of his own."""
    theirs = tmp_path / "theirs"
    if there != "dangling":
        theirs.write_text("kept", "ascii")
        theirs.chmod(0o666)
    memory = [Range(0, 0x1000, 4096)]
    for path, write in (
        (tmp_path / "incident.json", lambda p: write_durably(p, b"secret")),
        (tmp_path / "memory.core", lambda p: write_core(p, os.getpid(), memory, [], [], {})),
    ):
        part = path.with_name(f".{path.name}.part")
        if there == "file":
            os.link(theirs, part)
        else:
            part.symlink_to(theirs)
        write(path)
        assert not path.is_symlink()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.stat().st_nlink == 1
        if there == "dangling":
            assert not theirs.exists()
        else:
            assert theirs.read_text("ascii") == "kept"


def test_a_directory_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError, match="x"):
        create(tmp_path / "x")


# -- markers -----------------------------------------------------------------


def test_a_marker_is_that_of_its_process(tmp_path: Path) -> None:
    """A VM of the same name, which any QEMU may give itself, neither takes it nor takes it away."""
    teller = Teller(Policy(Path("/none"), run_dir=tmp_path))
    me = Process.open(os.getpid())
    mine = {"pid": me.pid, "start_ticks": me.start_ticks, "incident": "i1"}
    other = {"pid": me.pid, "start_ticks": me.start_ticks + 1, "incident": "i2"}
    me.close()
    teller.mark("frozen", "web1", mine)
    with pytest.raises(Fault, match=f"another VM is named web1, process {os.getpid()}"):
        teller.mark("frozen", "web1", other)
    teller.unmark("frozen", "web1", other)
    path = marker(tmp_path, "frozen", "web1")
    assert json.loads(path.read_text("utf-8")) == mine
    teller.mark("frozen", "web1", mine | {"incident": "i3"})
    teller.unmark("frozen", "web1", mine)
    assert not path.exists()
    # Of one that has ended it is nobody's any more.
    teller.mark("frozen", "web1", other)
    teller.mark("frozen", "web1", mine)
    path.write_text("[]", "ascii")
    teller.unmark("frozen", "web1", mine)
    assert not path.exists()


# -- sockets -----------------------------------------------------------------


def test_whose_socket_it_is(tmp_path: Path) -> None:
    """SO_PEERCRED names who called listen(): he may have ended, and his number be another's."""
    path = Path("/tmp") / f"hwerr-{os.getpid()}.qmp"
    listening = socket.socket(socket.AF_UNIX)
    me = Process.open(os.getpid())
    try:
        listening.bind(os.fspath(path))
        assert not me.listens_on(path), "bound, but nobody listens"
        listening.listen()
        assert me.listens_on(path)
        assert not me.listens_on("/tmp/other.qmp")
        # A child, whose number stands for one used again: it has closed the socket.
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            listening.close()
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
        child = Process.open(pid)
        os.close(reading)
        while child.listens_on(path) and child.alive():
            pass
        assert child.alive()
        assert not child.listens_on(path)
        os.close(writing)
        os.waitpid(pid, 0)
        assert not child.listens_on(path)
        child.close()
    finally:
        listening.close()
        path.unlink()
        me.close()


def _guard(tmp_path: Path) -> Guard:
    return Guard(Policy(Path("/none"), state_dir=tmp_path / "s", run_dir=tmp_path / "r"), "/nowhere")


def _vm(name: str) -> Vm:
    return Vm(name, None, Process.open(os.getpid()), VmPolicy(front=True), "/q")


def test_the_socket_of_a_process_that_gave_it_away_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connect(path: Path, on_event: Any) -> Says:
        return Says(query_name={"name": "web1"}, query_uuid={})

    monkeypatch.setattr("hwerr_notify.guard.daemon.QmpMonitor.connect", connect)

    async def main() -> None:
        guard = _guard(tmp_path)
        with pytest.raises(MonitorError, match="has it no longer"):
            await guard._connect("/run/not-ours.qmp")
        assert not guard.vms

    asyncio.run(main())


def test_a_front_is_not_taken_over_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        guard = _guard(tmp_path)
        first, second = _vm("web1"), _vm("web1")
        second.process.start_ticks += 1
        await guard._start_front(first)
        path = guard.fronts[first.key].path
        inode = path.stat().st_ino
        await guard._start_front(second)
        assert list(guard.fronts) == [first.key]
        assert path.stat().st_ino == inode
        assert "no front: it is that of process" in caplog.text
        # The one before has ended: its place is free.
        first.process.close()
        await guard._start_front(second)
        assert list(guard.fronts) == [second.key]
        await guard.fronts[second.key].close()
        third = _vm("x" * 190)
        await guard._start_front(third)
        assert third.key not in guard.fronts
        assert "no front" in caplog.records[-1].getMessage()

    asyncio.run(main())


def test_sockets_are_roots_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the moment they are there, not only later."""
    modes = []
    start = asyncio.start_unix_server

    async def look(serve: Any, path: Path, **more: Any) -> asyncio.Server:
        server = await start(serve, path, **more)
        modes.append(stat.S_IMODE(path.stat().st_mode))
        return server

    monkeypatch.setattr(asyncio, "start_unix_server", look)

    async def main() -> None:
        guard = _guard(tmp_path)
        guard.policy.run_dir.mkdir()
        front, control = Front(_vm("web1"), tmp_path / "front", guard), Control(guard, tmp_path / "control")
        for server in (front, control):
            await server.start()
            await server.close()
        assert stat.S_IMODE((tmp_path / "front").stat().st_mode) == 0o700

    before = os.umask(0)
    try:
        asyncio.run(main())
        assert os.umask(0) == 0, "the mask is as it was"
    finally:
        os.umask(before)
    assert modes == [0o600, 0o600]


HOSTILE = [
    b"", b"\n", b"{}\n", b"[]\n", b"null\n", b"7\n", b'"x"\n', b"{\n", b"\xff\xfe\n", b"\0\n",
    b"[" * 60000 + b"\n", b'{"verb":' * 5000 + b"\n", b'{"verb": {}}\n', b'{"verb": "clear"}\n',
    b'{"verb": "clear", "name": "../../x"}\n', b'{"verb": "dump", "name": null}\n', b'{"verb": "freeze"}\n',
    b'{"verb": "status", "name": {"a": []}}\n', b"x" * 200000,
]  # fmt: skip


async def _say(path: Path, data: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path, limit=1 << 22)
    writer.write(data)
    writer.write_eof()
    try:
        return await asyncio.wait_for(reader.read(), 60)
    except ConnectionError:
        return b""
    finally:
        writer.close()


def test_the_control_socket_survives_nonsense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        guard = _guard(tmp_path)
        control = Control(guard, tmp_path / "control")
        await control.start()
        for data in HOSTILE:
            answer = await _say(control.path, data)
            for line in answer.splitlines():
                json.loads(line)
        form = json.loads((await _say(control.path, b'{"verb": "status"}\n')).splitlines()[0])
        assert form["line"]["daemon"] == os.getpid()
        await control.close()

    asyncio.run(main())
    assert not caplog.records, "an exception that nobody caught is logged"


def test_the_front_survives_nonsense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hello = b'{"execute": "qmp_capabilities"}\n'
    requests = [
        b'{"execute": 7}\n', b'{"execute": "query-status", "arguments": 7, "id": {"a": []}}\n',
        b'{"exec-oob": "query-status", "id": 1}\n', b'{"execute": ["stop"]}\n', b'{"id": "\\ud800"}\n',
    ]  # fmt: skip

    async def main() -> None:
        guard = _guard(tmp_path)
        vm = _vm("web1")
        # QEMU's answers are no better.
        vm.monitor = Says(query_status=["nonsense"])
        vm.incident = "i"
        guard.incidents["i"] = SimpleNamespace(id="i", open=True, state="frozen", poison=())  # type: ignore[assignment]
        front = Front(vm, tmp_path / "front", guard)
        await front.start()
        for data in [*HOSTILE, *requests]:
            for lead in (b"", hello):
                for line in (await _say(front.path, lead + data)).splitlines():
                    json.loads(line)
        said = await _say(front.path, hello + b'{"execute": "query-status"}\n')
        assert json.loads(said.splitlines()[-1])["return"]["status"] == "frozen"
        await front.close()

    asyncio.run(main())
    assert not caplog.records, "an exception that nobody caught is logged"
