# SPDX-License-Identifier: MIT
"""hwerr-guard as a service under test, and guests for it to guard."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from testbed.guest import GuestConfig, vcpus_of

AGENT = Path(__file__).resolve().parents[2] / "packaging/ocf/guest"
LIMIT = 300.0
LIMITED = ("stop", "record", "release", "seal", "tell")


def few(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Parameters of which only `quick` are tried by `make test`; the others by `make test-long`."""
    import pytest

    values = list(values)
    assert set(map(str, quick)) <= set(map(str, values))
    return [v if v in quick else pytest.param(v, marks=pytest.mark.long) for v in values]


def guest_config(name: str, home: Path, *extra: str, **more: Any) -> GuestConfig:
    """A guest with a second monitor, for the guard: HOME/qmp/NAME.qmp. The first is anybody's."""
    (home / "qmp").mkdir(exist_ok=True)
    monitor = ("-qmp", f"unix:{home}/qmp/{name}.qmp,server=on,wait=off")
    return GuestConfig(name=name, extra=(*monitor, *extra), **{"code": "count", **more})


def agent(home: Path, action: str, **parameters: str) -> int:
    """What ocf:hwerr:guest says of web1; of its own, an init script that always says that it runs."""
    given = {"name": "web1", "run_dir": str(home / "run"), **(parameters or {"script": "/bin/true"})}
    done = subprocess.run(
        [str(AGENT), action],
        env={
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(home),
            "HA_RSCTMP": str(home),
            "OCF_ROOT": "/usr/lib/ocf",
            "OCF_RESOURCE_INSTANCE": "vm",
            "OCF_RESKEY_CRM_meta_interval": "10000",
            "__OCF_ACTION": action,
            **{f"OCF_RESKEY_{name}": value for name, value in given.items()},
        },
        capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    return done.returncode


class Daemon:
    """One `hwerr-guard run`, with its own state and run directories below `home`."""

    def __init__(self, home: Path, policy: str = "", vm: str = "") -> None:
        self.home = home
        (home / "qmp").mkdir(exist_ok=True)
        self.policy = home / "guard.toml"
        # An emulated machine that is busy takes its time; what must be bounded says so itself.
        if "[limits]" not in policy:
            policy += "\n[limits]\n" + "".join(f"{step} = 30\n" for step in LIMITED)
        self.policy.write_text(
            f'state_dir = "{home}/state"\nrun_dir = "{home}/run"\n{policy}\n'
            f'[[vm]]\nqmp = "{home}/qmp/*.qmp"\n{vm}\n',
            encoding="utf-8",
        )
        self.log = home / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(
        self,
        *,
        fault: str | None = None,
        ready: bool = True,
        path: Path | None = None,
        watchdog: float | None = None,
    ) -> Self:
        """Returns when it says READY; with `fault`, or without `ready`, at once.

        `path`: its PATH. `watchdog`: seconds within which it must say that it lives.
        """
        address = self.home / "notify"
        address.unlink(missing_ok=True)
        environment = {k: v for k, v in os.environ.items() if k != "HWERR_GUARD_FAULT"}
        environment["NOTIFY_SOCKET"] = str(address)
        if fault:
            environment["HWERR_GUARD_FAULT"] = fault
        command = shutil.which("hwerr-guard") or "hwerr-guard"
        if path:
            environment["PATH"] = str(path)
        if watchdog:
            environment["WATCHDOG_USEC"] = str(int(watchdog * 1e6))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener, self.log.open("ab") as log:
            listener.bind(str(address))
            self.process = subprocess.Popen(
                [command, "--policy", str(self.policy), "run"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
            )  # fmt: skip
            pidfd = os.pidfd_open(self.process.pid)
            try:
                deadline = time.monotonic() + LIMIT
                wanted = [listener.fileno(), pidfd]
                while ready:
                    found, _, _ = select.select(wanted, [], [], deadline - time.monotonic())
                    if listener.fileno() in found:
                        if b"READY=1" in listener.recv(4096):
                            break
                    elif pidfd in found and fault:
                        break
                    else:
                        raise AssertionError(f"the daemon is not ready: {self.said()}")
            finally:
                os.close(pidfd)
        return self

    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(LIMIT)

    def wait_killed(self) -> None:
        """Until its fault point has killed it."""
        assert self.process is not None
        assert self.process.wait(LIMIT) == -signal.SIGKILL, self.said()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(LIMIT)

    def __enter__(self) -> Self:
        return self.start() if self.process is None else self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        if kind is not None:
            print(self.said())

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """A control verb to its end."""
        done = subprocess.run(
            ["hwerr-guard", "--policy", str(self.policy), *argv],
            capture_output=True, text=True, check=False, timeout=LIMIT,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def ask(self, verb: str, **more: Any) -> tuple[list[Any], int, str | None]:
        """A verb over the control socket: lines, exit status, error."""
        lines: list[Any] = []
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(LIMIT)
            sock.connect(str(self.home / "run/control"))
            sock.sendall(json.dumps({"verb": verb, **more}).encode() + b"\n")
            with sock.makefile("rb") as answers:
                for answer in answers:
                    message = json.loads(answer)
                    if "end" in message:
                        return lines, message["end"]["status"], message["end"]["error"]
                    lines.append(message["line"])
        raise AssertionError(f"the daemon hung up: {self.said()}")

    def status(self) -> dict[str, Any]:
        (form,), _, _ = self.ask("status")
        return dict(form)

    def vm(self, name: str) -> dict[str, Any]:
        (found,) = [v for v in self.status()["vms"] if v["name"] == name]
        return dict(found)

    def incidents(self) -> list[dict[str, Any]]:
        """From disk."""
        paths = sorted((self.home / "state/incidents").glob("*/incident.json"))
        return [json.loads(p.read_text("utf-8")) for p in paths]

    def follow(self) -> Follower:
        return Follower(self.home / "run/control")

    def await_state(self, states: Sequence[str], vm: str) -> dict[str, Any]:
        """Until an incident of that VM is in one of these states; the incident."""
        with self.follow() as events:
            while True:
                found = [i for i in self.incidents() if i["vm"] == vm and i["state"] in states]
                if found:
                    return found[-1]
                events.next()


class Follower:
    """`events` of a daemon."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(LIMIT)
        self._socket.connect(str(path))
        self._socket.sendall(b'{"verb": "events"}\n')
        self._lines = self._socket.makefile("rb")
        self.next("FOLLOWING")

    def next(self, *wanted: str) -> dict[str, Any]:
        """The next event, of one of these names if any is given."""
        while line := self._lines.readline():
            message = json.loads(line)
            if "line" not in message:
                raise AssertionError(message)
            if not wanted or message["line"]["event"] in wanted:
                return dict(message["line"])
        raise AssertionError("the daemon hung up")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        self._socket.close()


class HasPid(Protocol):
    """A guest, however it was started."""

    pid: int


def vcpu_time(guest: HasPid) -> list[tuple[int, int]]:
    """(guest time in ticks, ns on CPU) of each vCPU thread. Both stand still when the guest does."""
    found = []
    for task in vcpus_of(guest.pid):
        fields = (task / "stat").read_text("ascii").rpartition(")")[2].split()
        # proc(5), field 43: guest_time.
        found.append((int(fields[40]), int((task / "schedstat").read_text("ascii").split()[0])))
    return found


def counter(guest: HasPid, hva: int) -> int:
    """The guest's own counter, read from outside QEMU."""
    fd = os.open(f"/proc/{guest.pid}/mem", os.O_RDONLY)
    try:
        return int.from_bytes(os.pread(fd, 4, hva), "little")
    finally:
        os.close(fd)
