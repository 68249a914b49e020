# SPDX-License-Identifier: MIT
"""Least privilege: what the commands need, and what they are refused without it. See docs/security.md."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from probed import Service, fails
from testbed.kernel import put
from testbed.victim import Victim
from testbed.wait import until, wait_event

import hwerr_notify as h
from hwerr_notify import probe

TOP = Path(__file__).resolve().parents[2]
CGROUP = Path("/sys/fs/cgroup")
LIMIT = 120.0
NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--no-new-privs"]
NOTHING = [*NOBODY, "--bounding-set", "-all", "--inh-caps", "-all"]
# All that hwerr-watch needs to see every error.
ADMIN = [*NOBODY, "--inh-caps", "-all,+sys_admin", "--ambient-caps", "-all,+sys_admin",
         "--bounding-set", "-all,+sys_admin"]  # fmt: skip


@pytest.fixture
def publisher() -> Iterator[h.Device]:
    with h.open(publish=True) as device:
        yield device


def run(*argv: str) -> tuple[int, str, str]:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def stats(*prefix: str) -> dict[str, Any]:
    status, out, err = run(*prefix, "hwerr-watch", "--stats", "--json")
    assert status == 0, err
    form: dict[str, Any] = json.loads(out)
    return form


def test_the_device_is_open_to_all_and_only_a_device() -> None:
    status = os.stat("/dev/hwerr")
    assert stat.S_ISCHR(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o666


def test_watch_without_any_right_sees_nothing_of_others(publisher: h.Device) -> None:
    seq = publisher.info().next_seq
    publisher.publish(h.build(h.Task(1, comm="secret"), severity=h.Severity.FATAL, text="secret"))
    status, out, err = run(*NOTHING, "hwerr-watch", "--since", "oldest", "--timeout", "0", "-v")
    assert (status, out) == (3, "")
    assert "only events that hit this process are seen" in err
    form = stats(*NOTHING)
    assert (form["records"], form["next_seq"], form["readers"]) == (0, 0, 0)
    assert form["probes"] == {}
    assert publisher.info().next_seq == seq + 1


def test_watch_with_that_one_right_sees_all(publisher: h.Device) -> None:
    seq = publisher.info().next_seq
    with Victim() as victim:
        victim.poison()
        argv = ["hwerr-watch", "--since", str(seq), "--count", "1", "--timeout", str(LIMIT), "--json"]
        status, out, err = run(*ADMIN, *argv)
    assert (status, err) == (0, "")
    (line,) = out.splitlines()
    form = json.loads(line)
    assert form["source"] == "memory_failure"
    assert form["phys_addr"] == hex(victim.memory.pfn * 4096)
    assert stats(*ADMIN)["records"] >= 1


@pytest.mark.anywhere
@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["hwerr-watch", "--pid", "1", "--timeout", "0"], 5, "run as root"),
        (["hwerr-probe", "run"], 5, "run as root"),
        (["hwerr-probe", "unload"], 5, "run as root"),
        (["hwerr-trace"], 5, "run as root"),
    ],
)
def test_what_takes_more_is_refused_in_words(argv: list[str], status: int, said: str) -> None:
    before = stats()
    done, out, err = run(*NOTHING, *argv)
    assert (done, out) == (status, "")
    assert said in err
    assert stats()["probes"] == before["probes"]


@pytest.mark.amd
def test_the_probe_needs_no_more_than_its_unit_gives() -> None:
    """With the capabilities of packaging/systemd/hwerr-probe.service it says whose guest panicked."""
    unit = (TOP / "packaging/systemd/hwerr-probe.service").read_text("utf-8")
    (bounded,) = re.findall(r"(?m)^CapabilityBoundingSet=(.*)$", unit)
    kept = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in bounded.split())
    service = Service("setpriv", "--no-new-privs", "--bounding-set", f"-all,{kept}")
    try:
        status = Path(f"/proc/{service.process.pid}/status").read_text("ascii")
        assert bin(int(re.findall(r"(?m)^CapEff:\s*(\w+)$", status)[0], 16)).count("1") == len(
            bounded.split()
        )
        with h.open() as device, fails("panic") as guest:
            event = wait_event(device, lambda e: bool(e.guests) and e.vcpu is not None)
            assert [(g.pid, g.name) for g in event.guests] == [(guest.pid, "bad")]
    finally:
        ended, said = service.stop()
        probe.unload()
    assert ended == 0, said


OPENED = 2000
OPENER = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (5000, 5000))
kept = []
for path in ("/dev/null", "/dev/hwerr"):
    kept += [os.open(path, os.O_RDONLY) for _ in range(OPENED)]
    print(path, flush=True)
    sys.stdin.readline()
try:
    while True:
        kept.append(os.open(path, os.O_RDONLY))
except OSError as error:
    print(error.errno, len(kept), flush=True)
"""


def test_open_files_are_charged_to_their_opener() -> None:
    """To its cgroup, as everything else that it has the kernel allocate, and there is an end to them."""
    put(CGROUP / "cgroup.subtree_control", "+memory")
    group = CGROUP / "opener"
    group.mkdir()

    def slab() -> int:
        return int(re.findall(r"(?m)^slab (\d+)$", (group / "memory.stat").read_text("ascii"))[0])

    code = OPENER.replace("OPENED", str(OPENED))
    argv = [
        "sh",
        "-c",
        'echo 0 >"$0" && exec "$@"',
        str(group / "cgroup.procs"),
        *NOTHING,
        "python",
        "-c",
        code,
    ]
    try:
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin
            assert process.stdout
            used = [slab()]
            for path in ("/dev/null", "/dev/hwerr"):
                assert process.stdout.readline() == f"{path}\n"
                used.append(slab())
                process.stdin.write("\n")
                process.stdin.flush()
            said = process.stdout.readline().split()
    finally:
        put(group / "cgroup.kill", "1")
        until(lambda: "populated 0" in (group / "cgroup.events").read_text("ascii"), LIMIT)
        group.rmdir()
    null, ours = used[1] - used[0], used[2] - used[1]
    print(f"{OPENED} files: {null} bytes of slab, of /dev/hwerr {ours}")
    # A reader has a filter, a cursor, counts: more than this.
    assert ours - null > OPENED * 100
    assert said[0] == str(errno.EMFILE)
    assert int(said[1]) < 5000


def test_a_user_namespace_gives_no_right(publisher: h.Device) -> None:
    """Root of a namespace of one's own, with every capability in it."""
    publisher.publish(h.build(h.Task(1, comm="secret"), severity=h.Severity.FATAL, text="secret"))
    inside = [*NOBODY, "unshare", "--user", "--map-root-user"]
    assert stats(*inside)["records"] == 0
    status, out, _ = run(*inside, "hwerr-watch", "--since", "oldest", "--timeout", "0", "--json")
    assert (status, out) == (3, "")
    code = "import hwerr_notify as h; h.open(publish=True).publish(h.build(severity=h.Severity.INFO))"
    status, _, err = run(*inside, "sh", "-c", f'exec python -c "{code}" 2>&1 | grep PermissionError >&2')
    assert "PermissionError" in err


# A process that opens the device and becomes another program; its child keeps the file, and acts
# as soon as that program has its name: which is when it has its memory, and not yet its rights.
BECOMES = """
import os, sys
import hwerr_notify as h
os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
device = h.open()
device.read_nonblocking()
parent = os.getpid()
if os.fork():
    os.execv(sys.argv[1], [sys.argv[1], "1000"])
fd = os.pidfd_open(parent)
comm = os.open(f"/proc/{parent}/comm", os.O_RDONLY)
while os.pread(comm, 16, 0).strip() != b"sleep":
    pass
arm = lambda: device.guard(fd, h.Severity.FATAL, keep=True)
for act in (device.read_nonblocking, arm, lambda: device.stop(fd)):
    try:
        act()
        print("done", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(
    ("mode", "said"), [(0o755, ["done", "done", "OSError"]), (0o4755, ["PermissionError"] * 3)]
)
def test_a_set_uid_program_is_not_its_callers(mode: int, said: list[str]) -> None:
    """Who kept the file of a process that is now more than he learns nothing of it, and cannot stop it."""
    home = Path("/run/hwerr-suid")  # where everybody comes
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "none", home], check=True)
    try:
        program = home / "sleep"
        shutil.copy("/bin/sleep", program)
        program.chmod(mode)
        process = subprocess.Popen(
            [sys.executable, "-c", BECOMES, program], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in said] == said
        with h.open() as device:
            assert [g.pid for g in device.guards()] == ([] if mode & 0o4000 else [process.pid])
        process.kill()
        process.communicate()
    finally:
        subprocess.run(["umount", "-l", home], check=True)
        home.rmdir()


# A process that opens the device and ends when it is told to; its child keeps the file.
ENDS = """
import os, sys
import hwerr_notify as h
os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
device = h.open()
fd = os.pidfd_open(os.getpid())
device.guard(fd, h.Severity.FATAL)
if os.fork():
    print(device.guards()[0].start_ns, flush=True)
    sys.stdin.readline()
    os._exit(0)
print(len(device.read(60)), flush=True)
sys.stdin.readline()
for act in (device.read_nonblocking, lambda: device.guard(fd, h.Severity.FATAL), lambda: device.stop(fd)):
    try:
        act()
        print("done", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""


def test_who_is_left_with_a_file_learns_nothing(publisher: h.Device) -> None:
    """What hit a process that has ended may have hit it when it was more than its opener."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    said = iter(process.stdout.readline, "")
    task = h.Task(process.pid, start_ns=int(next(said)), comm="python")
    record = h.build(task, severity=h.Severity.FATAL)
    publisher.publish(record)
    assert next(said) == "1\n"
    publisher.publish(record)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.wait(LIMIT) == 0
    process.stdin.close()
    assert list(said) == ["PermissionError\n"] * 3
    process.stdout.close()


def test_hwerr_guard_is_roots(tmp_path: Path) -> None:
    """Neither its socket nor its files are anybody's else, with the umask that lets most."""
    policy = tmp_path / "guard.toml"
    home = tmp_path.resolve()
    policy.write_text(
        f'state_dir = "{home}/state"\nrun_dir = "{home}/run"\n'
        f'[[vm]]\nname = "*"\nqmp = "{home}/none/*.qmp"\n',
        "utf-8",
    )
    for path in (tmp_path, *tmp_path.parents):
        if path.is_relative_to("/tmp"):
            path.chmod(0o755)
    with subprocess.Popen(
        ["sh", "-c", f"umask 0; exec hwerr-guard --policy {policy} run"], stderr=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stderr
        for line in daemon.stderr:
            if "guarding" in line:
                break
        try:
            assert run("hwerr-guard", "--policy", str(policy), "status")[0] == 0
            assert stat.S_IMODE((tmp_path / "run/control").stat().st_mode) == 0o600
            assert stat.S_IMODE((tmp_path / "state/incidents").stat().st_mode) == 0o700
            status, out, err = run(*NOTHING, "hwerr-guard", "--policy", str(policy), "freeze", "web1")
            assert (status, out) == (1, "")
            assert "not permitted: run as root" in err
        finally:
            daemon.terminate()
            daemon.wait(LIMIT)
