# SPDX-License-Identifier: MIT
"""ocf:hwerr:guest. Its guest is a process that a stand-in for systemctl or a script starts and stops."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hwerr_notify.guard.process import Process
from hwerr_notify.guard.tell import marker

AGENT = Path(__file__).resolve().parents[2] / "packaging/ocf/guest"
TESTER = shutil.which("ocf-tester") or "/usr/sbin/ocf-tester"
LIMIT = 1.0  # seconds; what the agent says of its monitor
SUCCESS, GENERIC, PERM, INSTALLED, CONFIGURED, NOT_RUNNING, DEGRADED = 0, 1, 4, 5, 6, 7, 190

SYSTEMCTL = """\
#!/bin/bash
verb=; for word in "$@"; do case $word in -*) ;; *) verb=${verb:-$word} ;; esac; done
pid=$(cat "$HOME/pid" 2>/dev/null)
running() { [ -n "$pid" ] && [ -e "/proc/$pid" ]; }
case $verb in
start) running || { setsid sleep 1000 >/dev/null 2>&1 & echo $! >"$HOME/pid"; } ;;
stop) running && kill -9 "$pid"; while running; do :; done ;;
is-active)
	[ ! -e "$HOME/hang" ] || exec sleep 1000
	state=inactive; running && state=active; [ ! -e "$HOME/state" ] || state=$(cat "$HOME/state")
	case $verb:$* in *-q*) ;; *) echo "$state" ;; esac
	[ "$state" != "" ] || exit 1
	[ "$state" = active ] || exit 3 ;;
status) [ ! -e "$HOME/hang" ] || exec sleep 1000; running || exit 3 ;;
esac
"""

VIRTUAL_DOMAIN = """\
#!/bin/bash
echo "$1" >>"$HOME/asked"
case $1 in
monitor)
	[ ! -e "$HOME/hang" ] || exec sleep 1000
	[ ! -e "$HOME/answer" ] || exit "$(cat "$HOME/answer")"
	"$HOME/bin/systemctl" is-active x || exit 7 ;;
*) "$HOME/bin/systemctl" "$1" x ;;
esac
"""


class Agent:
    """The agent with its surroundings in one directory."""

    def __init__(self, home: Path, name: str = "web1", by: str = "unit") -> None:
        self.home = home
        self.name = name
        self.by = by
        (home / "bin").mkdir()
        # An OCF_ROOT with a VirtualDomain of its own.
        domain = home / "ocf/resource.d/heartbeat/VirtualDomain"
        domain.parent.mkdir(parents=True)
        for path, text in ((home / "bin/systemctl", SYSTEMCTL), (domain, VIRTUAL_DOMAIN)):
            path.write_text(text, "utf-8")
            path.chmod(0o755)
        value = {
            "unit": "web1.service",
            "script": str(home / "bin/systemctl"),
            "config": str(home / "web1.xml"),
        }[by]
        self.environment = {
            "PATH": f"{home}/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(home),
            "OCF_ROOT": str(home / "ocf"),
            "OCF_FUNCTIONS_DIR": "/usr/lib/ocf/lib/heartbeat",
            "OCF_RESOURCE_INSTANCE": "vm",
            "OCF_RESKEY_CRM_meta_interval": "10000",
            "OCF_RESKEY_name": name,
            f"OCF_RESKEY_{by}": value,
            "OCF_RESKEY_run_dir": str(home / "run"),
            "__OCF_ACTION": "monitor",
            "HA_RSCTMP": str(home),
        }

    def __call__(self, action: str, **more: str) -> tuple[int, str]:
        done = subprocess.run(
            [str(AGENT), action],
            env={**self.environment, "__OCF_ACTION": action, **more},
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def pid(self) -> int:
        return int((self.home / "pid").read_text("ascii"))

    def mark(self, what: str, *, ticks: int = 0) -> None:
        process = Process.open(self.pid())
        path = marker(self.home / "run", what, self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"pid": process.pid, "start_ticks": process.start_ticks + ticks, "incident": "20260102-x"}
        path.write_text(json.dumps(facts) + "\n", "utf-8")
        process.close()


@pytest.fixture(params=["unit", "script", "config"])
def agent(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Agent]:
    made = Agent(tmp_path, by=request.param)
    yield made
    for odd in ("hang", "state", "answer"):
        (tmp_path / odd).unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    made("stop")
    if (tmp_path / "pid").exists():
        subprocess.run(["kill", "-9", str(made.pid())], check=False, capture_output=True)


def test_ocf_tester(agent: Agent) -> None:
    with tempfile.TemporaryDirectory() as root:
        # It is for nobody, too, who may not enter the tests' directories.
        Path(root).chmod(0o755)
        shutil.copytree(agent.home / "ocf", Path(root, "ocf"))
        agent.environment["OCF_ROOT"] = f"{root}/ocf"
        _ocf_tester(agent)


def _ocf_tester(agent: Agent) -> None:
    options = []
    for key in ("name", agent.by, "run_dir"):
        options += ["-o", f"{key}={agent.environment[f'OCF_RESKEY_{key}']}"]
    done = subprocess.run(
        [TESTER, "-n", "vm", *options, str(AGENT)],
        env=agent.environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed all tests" in done.stdout


def test_a_healthy_guest(agent: Agent) -> None:
    assert agent("monitor")[0] == NOT_RUNNING
    assert agent("start")[0] == SUCCESS
    assert agent("monitor")[0] == SUCCESS
    assert agent("stop")[0] == SUCCESS
    assert agent("monitor")[0] == NOT_RUNNING


def test_a_frozen_guest(agent: Agent) -> None:
    assert agent("start")[0] == SUCCESS
    agent.mark("frozen")
    assert agent("monitor")[0] == NOT_RUNNING
    assert agent("stop")[0] == SUCCESS
    assert Path(f"/proc/{agent.pid()}").exists(), "stop ended the process that was to be kept"
    status, said = agent("start")
    assert status == PERM
    assert "hwerr-guard clear 20260102-x" in said
    # Without that the cluster would not try this node again.
    assert "crm_resource --cleanup --resource vm" in said


def test_a_failover_waits_for_no_program(agent: Agent) -> None:
    """That a guest is FROZEN is answered without a program, or the cluster's library: it starts some."""
    assert agent("start")[0] == SUCCESS
    nothing = {"PATH": str(agent.home / "none"), "OCF_FUNCTIONS_DIR": str(agent.home / "none")}
    # What it needs when it is not so.
    assert agent("monitor", **nothing)[0] not in (SUCCESS, NOT_RUNNING)
    agent.mark("frozen")
    status, said = agent("monitor", **nothing)
    assert (status, said.count("\n")) == (NOT_RUNNING, 1)
    # Pacemaker shows this beside the status.
    assert said.startswith("ocf-exit-reason:web1 is FROZEN (process ")
    assert "incident 20260102-x" in said
    status, said = agent("stop", **nothing)
    assert (status, said.count("\n")) == (SUCCESS, 1)
    assert Path(f"/proc/{agent.pid()}").exists()


def test_a_marker_of_another_process_counts_for_nothing(agent: Agent) -> None:
    assert agent("start")[0] == SUCCESS
    agent.mark("frozen", ticks=1)
    assert agent("monitor")[0] == SUCCESS
    agent.mark("frozen")
    subprocess.run(["kill", "-9", str(agent.pid())], check=True)
    while Path(f"/proc/{agent.pid()}").exists():
        time.sleep(0.01)
    assert agent("start")[0] == SUCCESS


def test_degraded(agent: Agent) -> None:
    assert agent("start")[0] == SUCCESS
    agent.mark("degraded")
    assert agent("monitor")[0] == DEGRADED
    # A probe asks whether it runs.
    assert agent("monitor", OCF_RESKEY_CRM_meta_interval="0")[0] == SUCCESS


def test_an_odd_name(tmp_path: Path) -> None:
    agent = Agent(tmp_path, "wéb 1/x")
    try:
        assert agent("start")[0] == SUCCESS
        agent.mark("frozen")
        assert agent("monitor")[0] == NOT_RUNNING
    finally:
        subprocess.run(["kill", "-9", str(agent.pid())], check=True)


@contextlib.contextmanager
def process(home: Path, *argv: str, program: str = "qemu-system-x86_64") -> Iterator[int]:
    """A process with these arguments, its PID; it is a QEMU to whoever asks the kernel what it runs."""
    path = home / program
    if not path.exists():
        shutil.copy("/bin/bash", path)
    with subprocess.Popen([path, "-c", "read", *argv], stdin=subprocess.PIPE) as running:
        try:
            yield running.pid
        finally:
            assert running.stdin
            running.stdin.close()


@pytest.mark.parametrize("program", ["a) Z 1 (", "a\nb) X 1"])
def test_a_name_of_a_process_is_no_field(tmp_path: Path, program: str) -> None:
    """proc(5): a program's name may have in it what separates and ends fields, and line ends."""
    agent = Agent(tmp_path, by="script")
    with process(tmp_path, program=program) as pid:
        (tmp_path / "pid").write_text(str(pid), "ascii")
        agent.mark("frozen")
        assert agent("monitor")[0] == NOT_RUNNING
        agent.mark("frozen", ticks=1)
        assert agent("monitor")[0] == SUCCESS


def test_it_answers_though_systemd_hangs(agent: Agent) -> None:
    (agent.home / "hang").touch()
    assert agent("monitor")[0] == NOT_RUNNING
    with process(agent.home, "-name", "web1", program="find"):
        assert agent("monitor")[0] == NOT_RUNNING
    with process(agent.home, "-name", "guest=web1,debug-threads=on", "-accel", "kvm", program="emulator"):
        assert agent("monitor")[0] == SUCCESS
        # A name is no pattern, nor a part of one.
        for other in ("web.", "web", "guest=web1"):
            assert agent("monitor", OCF_RESKEY_name=other)[0] == NOT_RUNNING
    for name in ("web1", "web1,process=vm", "debug-threads=on,guest=web1"):
        with process(agent.home, "-name", name):
            assert agent("monitor")[0] == SUCCESS
    with process(agent.home, "-name", "guest=a,,b"):
        assert agent("monitor", OCF_RESKEY_name="a,b")[0] == SUCCESS
        assert agent("monitor", OCF_RESKEY_name="a")[0] == NOT_RUNNING


def test_a_qemu_without_a_name(agent: Agent) -> None:
    """hwerr-guard has it from the monitor's socket. Without one it may be any: never taken for stopped."""
    (agent.home / "hang").touch()
    for words in (
        ("-qmp", "unix:/run/qemu/web1.qmp,server=on,wait=off"),
        ("-chardev", "socket,id=m,path=/run/qemu/web1.qmp,server=on"),
        # What hwerr-guard takes for no name.
        ("-name", ".web1", "-qmp", "unix:/run/qemu/web1.qmp,server=on"),
    ):
        with process(agent.home, *words):
            # libvirt gives each guest a name.
            wanted = NOT_RUNNING if agent.by == "config" and words[0] != "-name" else SUCCESS
            assert agent("monitor")[0] in (wanted, SUCCESS)
            assert agent("monitor", OCF_RESKEY_name="web")[0] == NOT_RUNNING
    for words in (("-m", "16M"), ("-readconfig", "x", "-qmp", "unix:/run/qemu/db1.qmp")):
        with process(agent.home, *words):
            assert agent("monitor")[0] == (NOT_RUNNING if agent.by == "config" else GENERIC)
    # It is no VM.
    with process(agent.home, "create", program="qemu-img"):
        assert agent("monitor")[0] == NOT_RUNNING


def test_a_monitor_takes_no_second_more(agent: Agent) -> None:
    """The bound is for what the agent waits for; its own programs take what they take on this machine.

    Of each the shortest counts: a call that others kept waiting tells nothing of the agent.
    """
    hang = agent.home / "hang"

    def took() -> float:
        began = time.monotonic()
        assert agent("monitor")[0] == NOT_RUNNING
        return time.monotonic() - began

    healthy, hung = [], []
    for n in range(10):
        hang.unlink(missing_ok=True)
        healthy.append(took())
        hang.touch()
        hung.append(took())
        if n >= 2 and min(hung) - min(healthy) < LIMIT:
            return
    pytest.fail(f"healthy {min(healthy):.2f} s, hung {min(hung):.2f} s")


@pytest.mark.parametrize(
    ("state", "runs"),
    [
        ("active", True), ("reloading", True), ("activating", True), ("deactivating", True),
        ("inactive", False), ("failed", False),
    ],
)  # fmt: skip
def test_what_systemd_says(tmp_path: Path, state: str, runs: bool) -> None:
    agent = Agent(tmp_path)
    (tmp_path / "state").write_text(state, "ascii")
    assert agent("monitor")[0] == (SUCCESS if runs else NOT_RUNNING)
    # Nothing but an answer that it does not run makes it stopped.
    assert agent("stop")[0] == (GENERIC if runs else SUCCESS)


def test_a_unit_that_is_not_there_is_stopped(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    for status, wanted in ((5, SUCCESS), (1, GENERIC)):
        systemctl = f"#!/bin/sh\n[ $1 = is-active ] || exit {status}\necho inactive\nexit 3\n"
        (tmp_path / "bin/systemctl").write_text(systemctl, "utf-8")
        assert agent("stop")[0] == wanted


def test_systemd_that_cannot_say(tmp_path: Path) -> None:
    """Its bus is down, or it says what is not known here: the processes tell."""
    agent = Agent(tmp_path)
    for state in ("", "unknown"):
        (tmp_path / "state").write_text(state, "ascii")
        with process(tmp_path, "-name", "guest=web1"):
            assert agent("monitor")[0] == SUCCESS
            assert agent("stop")[0] == GENERIC
        assert agent("monitor")[0] == NOT_RUNNING


def test_stop_asks_nobody_whether_it_must(agent: Agent) -> None:
    """A unit that is being stopped, or started, is stopped all the same."""
    assert agent("start")[0] == SUCCESS
    pid = agent.pid()
    if agent.by == "unit":
        wrapper = """\
#!/bin/sh
case $* in
*is-active*) [ -e "/proc/$(cat "$HOME/pid")" ] && echo deactivating || echo inactive; exit 3 ;;
esac
exec "$HOME/bin/true-one" "$@"
"""
        (agent.home / "bin/systemctl").rename(agent.home / "bin/true-one")
        (agent.home / "bin/systemctl").write_text(wrapper, "utf-8")
        (agent.home / "bin/systemctl").chmod(0o755)
    assert agent("stop")[0] == SUCCESS
    assert not Path(f"/proc/{pid}").exists()
    # Again, for one that does not run.
    assert agent("stop")[0] == SUCCESS


@pytest.mark.parametrize(("says", "status"), [(0, SUCCESS), (1, GENERIC), (7, NOT_RUNNING)])
def test_what_virtualdomain_says_is_said(tmp_path: Path, says: int, status: int) -> None:
    agent = Agent(tmp_path, by="config")
    (tmp_path / "answer").write_text(str(says), "ascii")
    assert agent("monitor")[0] == status
    assert (tmp_path / "asked").read_text("ascii") == "monitor\n"


def test_virtualdomain_starts_and_stops_it(tmp_path: Path) -> None:
    agent = Agent(tmp_path, by="config")
    assert agent("start")[0] == SUCCESS
    assert agent("stop")[0] == SUCCESS
    asked = (tmp_path / "asked").read_text("ascii").split()
    assert [verb for verb in asked if verb != "monitor"] == ["start", "stop"]


def test_a_guest_that_could_not_be_frozen(agent: Agent) -> None:
    """It is stopped and sealed, and its disks may be in use: it has failed, until the process has ended."""
    assert agent("start")[0] == SUCCESS
    agent.mark("failed")
    pid = agent.pid()
    status, said = agent("monitor")
    assert (status, "could not be frozen" in said) == (GENERIC, True)
    assert agent("monitor", OCF_RESKEY_CRM_meta_interval="0")[0] == GENERIC
    status, said = agent("start")
    assert (status, str(pid) in said) == (PERM, True)
    assert agent("stop")[0] == SUCCESS
    assert not Path(f"/proc/{pid}").exists()
    assert agent("monitor")[0] == NOT_RUNNING
    assert agent("start")[0] == SUCCESS
    # It was FROZEN after all: once more, with success.
    agent.mark("failed")
    agent.mark("frozen")
    assert agent("monitor")[0] == NOT_RUNNING


def test_a_failed_guest_that_does_not_stop(agent: Agent) -> None:
    """Whatever those say that should have stopped it: while the process lives the cluster must fence."""
    assert agent("start")[0] == SUCCESS
    agent.mark("failed")
    pid = agent.pid()
    (agent.home / "pid").unlink()
    try:
        status, said = agent("stop")
        assert (status, str(pid) in said) == (GENERIC, True)
        assert Path(f"/proc/{pid}").exists()
    finally:
        (agent.home / "pid").write_text(f"{pid}\n", "ascii")


def test_a_script_that_is_not_there_or_fails(tmp_path: Path) -> None:
    agent = Agent(tmp_path, by="script")
    status, said = agent("monitor", OCF_RESKEY_script=str(tmp_path / "none"))
    assert status == INSTALLED
    assert "none" in said
    script = tmp_path / "odd"
    script.write_text('#!/bin/sh\n[ "$1" != status ] || exit 4\nexit 1\n', "utf-8")
    script.chmod(0o755)
    # Not known whether it runs: never taken for stopped.
    assert agent("monitor", OCF_RESKEY_script=str(script))[0] == GENERIC
    assert agent("stop", OCF_RESKEY_script=str(script))[0] == GENERIC
    assert agent("start", OCF_RESKEY_script=str(script))[0] == GENERIC


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("<domain>\n  <name>web1</name></domain>", True),
        ("<domain><name>db1</name></domain>", False),
        ("<!-- <name>db1</name>\n<name>db2</name> --><domain><name>web1</name></domain>", True),
        ("<domain><name>web1</name><metadata><name>db1</name></metadata></domain>", True),
        ("<domain/>", True),
        (None, True),
    ],
)
def test_the_name_is_that_of_the_domain(tmp_path: Path, text: str | None, fits: bool) -> None:
    """A freeze is marked under the domain's name: under another it would not be seen."""
    agent = Agent(tmp_path, by="config")
    if text is not None:
        (tmp_path / "web1.xml").write_text(text, "utf-8")
    status, said = agent("validate-all")
    assert status == (SUCCESS if fits else CONFIGURED)
    assert ("db1" in said) is not fits
    status, _ = agent("start")
    assert status == (SUCCESS if fits else CONFIGURED)
    # A stop does not fail for it, nor is what runs taken for something else.
    assert agent("stop")[0] == SUCCESS
    assert agent("monitor")[0] == NOT_RUNNING


def test_a_name_with_what_xml_writes_otherwise(tmp_path: Path) -> None:
    agent = Agent(tmp_path, "a&b<'\">", by="config")
    (tmp_path / "web1.xml").write_text("<name>a&amp;b&lt;&apos;&quot;&gt;</name>", "utf-8")
    assert agent("validate-all")[0] == SUCCESS
    (tmp_path / "web1.xml").write_text("<name>a&amp;lt;</name>", "utf-8")
    assert agent("validate-all", OCF_RESKEY_name="a&lt;")[0] == SUCCESS


def test_parameters(agent: Agent) -> None:
    for wrong in (
        {"OCF_RESKEY_name": ""},
        {f"OCF_RESKEY_{agent.by}": ""},
        {"OCF_RESKEY_config": "/x.xml", "OCF_RESKEY_unit": "web1.service"},
        {"OCF_RESKEY_unit": "web1.service", "OCF_RESKEY_script": str(agent.home / "bin/systemctl")},
    ):
        assert agent("validate-all", **wrong)[0] == CONFIGURED
    assert agent("validate-all")[0] == SUCCESS
    status, text = agent("meta-data")
    assert status == SUCCESS
    names = {p.get("name") for p in ElementTree.fromstring(text).iter("parameter")}
    assert names == {"name", "config", "unit", "script", "hypervisor", "run_dir"}
    assert os.access(AGENT, os.X_OK)
