# SPDX-License-Identifier: MIT
"""ocf:hwerr:guest. Its guest is a process that a stand-in for systemctl or a script starts and stops."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hwerr_notify.guard.process import Process
from hwerr_notify.guard.tell import marker

AGENT = Path(__file__).resolve().parents[2] / "packaging/ocf/guest"
TESTER = shutil.which("ocf-tester") or "/usr/sbin/ocf-tester"
SUCCESS, GENERIC, PERM, INSTALLED, CONFIGURED, NOT_RUNNING, DEGRADED = 0, 1, 4, 5, 6, 7, 190

SYSTEMCTL = """\
#!/bin/bash
verb=; for word in "$@"; do case $word in -*) ;; *) verb=${verb:-$word} ;; esac; done
pid=$(cat "$HOME/pid" 2>/dev/null)
running() { [ -n "$pid" ] && [ -e "/proc/$pid" ]; }
case $verb in
start) running || { setsid sleep 1000 >/dev/null 2>&1 & echo $! >"$HOME/pid"; } ;;
stop) running && kill -9 "$pid"; while running; do :; done ;;
is-active) [ ! -e "$HOME/hang" ] || exec sleep 1000; running ;;
status) [ ! -e "$HOME/hang" ] || exec sleep 1000; running || exit 3 ;;
esac
"""


class Agent:
    """The agent with its surroundings in one directory."""

    def __init__(self, home: Path, name: str = "web1", by: str = "unit") -> None:
        self.home = home
        self.name = name
        self.by = by
        (home / "bin").mkdir()
        (home / "bin/systemctl").write_text(SYSTEMCTL, "utf-8")
        (home / "bin/systemctl").chmod(0o755)
        self.environment = {
            "PATH": f"{home}/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(home),
            "OCF_ROOT": "/usr/lib/ocf",
            "OCF_RESOURCE_INSTANCE": "vm",
            "OCF_RESKEY_CRM_meta_interval": "10000",
            "OCF_RESKEY_name": name,
            f"OCF_RESKEY_{by}": {"unit": "web1.service", "script": str(home / "bin/systemctl")}[by],
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


@pytest.fixture(params=["unit", "script"])
def agent(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Agent]:
    made = Agent(tmp_path, by=request.param)
    yield made
    made("stop")
    if (tmp_path / "pid").exists():
        subprocess.run(["kill", "-9", str(made.pid())], check=False, capture_output=True)


def test_ocf_tester(agent: Agent) -> None:
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


def test_it_answers_though_systemd_hangs(agent: Agent) -> None:
    (agent.home / "hang").touch()
    began = time.monotonic()
    assert agent("monitor")[0] == NOT_RUNNING
    # The guest is a process named as QEMU names it.
    argv = [sys.executable, "-c", "import sys; sys.stdin.read()", "-name", "guest=web1,debug-threads=on"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as process:
        assert agent("monitor")[0] == SUCCESS
        # A name is no pattern, nor a part of one.
        for other in ("web.", "web", "guest=web1"):
            assert agent("monitor", OCF_RESKEY_name=other)[0] == NOT_RUNNING
        assert process.stdin
        process.stdin.close()
    assert time.monotonic() - began < 30


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


def test_parameters(agent: Agent) -> None:
    for wrong in (
        {"OCF_RESKEY_name": ""},
        {f"OCF_RESKEY_{agent.by}": ""},
        {"OCF_RESKEY_config": "/x.xml"},
        {"OCF_RESKEY_unit": "web1.service", "OCF_RESKEY_script": str(agent.home / "bin/systemctl")},
    ):
        assert agent("validate-all", **wrong)[0] == CONFIGURED
    assert agent("validate-all")[0] == SUCCESS
    status, text = agent("meta-data")
    assert status == SUCCESS
    names = {p.get("name") for p in ElementTree.fromstring(text).iter("parameter")}
    assert names == {"name", "config", "unit", "script", "hypervisor", "run_dir"}
    assert os.access(AGENT, os.X_OK)
