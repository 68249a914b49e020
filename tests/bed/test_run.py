# SPDX-License-Identifier: MIT
"""tests/vm/run: what came of the command, of the kernel and of the VM are told apart.

Each test boots a VM, about ten seconds.
"""

import os
import subprocess
import time
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
KERNEL = os.environ.get("HWERR_KERNEL", "6.1")
USAGE, SETUP, SPLAT, LOST = 64, 69, 70, 71


def run(*args: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    argv = [str(TOP / "tests/vm/run"), "--kernel", KERNEL, "--no-module", *options, "--", *args]
    return subprocess.run(argv, cwd=TOP, capture_output=True, text=True, timeout=500, check=False)


def test_status_output_and_place() -> None:
    script = (
        "echo out; echo err >&2; echo again >/dev/stderr; pwd; id -u; command -v hwerr-inject; uname -r;"
        " echo $X; touch build/vm-wrote-this; seq 100000 | tail -n 1; exit 7"
    )
    mark = TOP / "build/vm-wrote-this"
    mark.unlink(missing_ok=True)
    done = run("bash", "-c", script, options=("--env", "X=a b"))
    assert done.returncode == 7, done.stderr
    out = done.stdout.splitlines()
    assert out[:3] == ["out", str(TOP), "0"]
    assert out[3] == str(TOP / "tests/vm/bin/hwerr-inject")
    assert out[4].startswith(KERNEL)
    assert out[5:] == ["a b", "100000"]
    assert "err\nagain\n" in done.stderr
    assert mark.exists()
    mark.unlink()


def test_a_daemon_left_behind_does_not_hold_the_run() -> None:
    start = time.monotonic()
    done = run("bash", "-c", "sleep 3000 & echo left; exit 4")
    assert done.returncode == 4, done.stderr
    assert done.stdout == "left\n"
    assert time.monotonic() - start < 200


def test_a_splat_is_told_from_a_failure_and_shown() -> None:
    done = run("bash", "-c", "echo this is a test > /sys/kernel/debug/hwerr_sim/splat", options=("--sim",))
    assert done.returncode == SPLAT, done.stderr
    assert "this is a test" in done.stderr
    assert "sim_splat" in done.stderr
    assert "status was 0" in done.stderr


def test_a_splat_kept_from_the_console_is_seen_by_its_taint() -> None:
    done = run(
        "bash", "-c", "dmesg -n 1; echo hidden > /sys/kernel/debug/hwerr_sim/splat", options=("--sim",)
    )
    assert done.returncode == SPLAT, done.stderr
    assert "tainted by: warning" in done.stderr


def test_a_splat_that_is_expected() -> None:
    script = "echo wanted > /sys/kernel/debug/hwerr_sim/splat; exit 3"
    done = run("bash", "-c", script, options=("--sim", "--allow-splat", "^.*wanted"))
    assert done.returncode == 3, done.stderr


def test_a_panic_is_a_lost_vm() -> None:
    done = run("bash", "-c", "echo c > /proc/sysrq-trigger; sleep 60")
    assert done.returncode == LOST, done.stderr
    assert "lost VM: Kernel panic - not syncing: sysrq triggered crash" in done.stderr


def test_a_qemu_that_goes_away_is_a_lost_vm() -> None:
    done = run("bash", "-c", "hwerr-inject monitor quit; sleep 60")
    assert done.returncode == LOST, done.stderr
    assert "lost VM: QEMU ended (0)" in done.stderr


def test_a_command_without_end_is_a_lost_vm() -> None:
    done = run("sleep", "3000", options=("--timeout", "2"))
    assert done.returncode == LOST, done.stderr
    assert "did not end within 2 s" in done.stderr


def test_a_command_that_says_nothing_any_more_is_a_lost_vm() -> None:
    talk = "for i in 1 2 3 4 5 6 7 8; do echo $i; sleep 1; done; sleep 3000"
    done = run("bash", "-c", talk, options=("--silence", "6"))
    assert done.returncode == LOST, done.stderr
    assert "the command wrote nothing for 6 s" in done.stderr
    assert done.stdout.split() == list("12345678")


def test_a_cpu_that_takes_no_nmi_is_a_lost_vm() -> None:
    says = "echo 'Sending NMI from CPU 1 to CPUs 0:' > /dev/kmsg; "
    done = run("bash", "-c", says + "sleep 3000", options=("--looks-every", "2"))
    assert done.returncode == LOST, done.stderr
    assert "lost VM: CPU 0 takes no interrupts" in done.stderr
    # It was told a moment later.
    answer = "echo 'NMI backtrace for cpu 0' > /dev/kmsg; sleep 6; exit 5"
    assert run("bash", "-c", says + answer, options=("--looks-every", "2")).returncode == 5


def test_a_module_that_does_not_load_is_no_failed_command() -> None:
    done = run("true", options=("--sim", "--append", "module_blacklist=hwerr_sim"))
    assert done.returncode == SETUP, done.stderr
    assert "insmod hwerr_sim.ko" in done.stderr


def test_a_kernel_that_is_not_there() -> None:
    done = run("true", options=("--kernel", "4.2"))
    assert done.returncode == SETUP
    assert "scripts/kernel add 4.2" in done.stderr


@pytest.mark.parametrize(
    "argv", [[], ["--"], ["uname"], ["--cpu", "arm", "--", "true"], ["--env", "X", "--", "true"]]
)
def test_wrong_usage(argv: list[str]) -> None:
    done = subprocess.run([str(TOP / "tests/vm/run"), *argv], capture_output=True, text=True, check=False)
    assert done.returncode == USAGE
    assert "usage:" in done.stderr
