# SPDX-License-Identifier: MIT
"""scripts/test and tests/conftest.py: what is run once more, what never is, and what is run last."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

TOP = Path(__file__).resolve().parents[2]
PLUGIN = "-p tests.conftest"


def load(path: Path) -> Any:
    """A Python file, whatever its name."""
    loader = SourceFileLoader(f"loaded_{path.stem}", str(path))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module


# Fails, and passes when it is run again.
FLAKY = """\
from pathlib import Path
import pytest
{more}
def test_flaky{arguments}:
    ran = Path(__file__).with_suffix(".ran")
    first = not ran.exists()
    ran.touch()
    assert not first

def test_fine():
    pass
"""
GIVEN = "from hypothesis import given, strategies\n@given(strategies.just(1))"


@pytest.fixture
def inside() -> Iterator[Path]:
    """A directory of this tree, as that of each test is."""
    (TOP / "build").mkdir(exist_ok=True)
    with TemporaryDirectory(dir=TOP / "build") as home:
        yield Path(home)


@pytest.mark.parametrize(
    ("more", "arguments", "passed"),
    [
        ("", "()", (2, 0)),
        ("@pytest.mark.once", "()", (1, 1)),
        ("pytestmark = pytest.mark.once", "()", (1, 1)),
        (GIVEN, "(x)", (1, 1)),
    ],
    ids=["once more", "marked", "module", "hypothesis"],
)
def test_a_second_run(
    tmp_path: Path,
    inside: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: str,
    arguments: str,
    passed: tuple[int, int],
) -> None:
    script = load(TOP / "scripts/test")
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.delenv("HWERR_VM_CPU", raising=False)
    file = inside / "test_it.py"
    file.write_text(FLAKY.format(more=more, arguments=arguments), encoding="utf-8")
    *counts, mended = script.stage("it", [], [str(file)], {"PYTEST_ADDOPTS": PLUGIN}, True)
    assert tuple(counts) == passed
    assert bool(mended) == (passed == (2, 0))
    said = (tmp_path / "it.log").read_text("utf-8")
    assert ("test: not once more: test_flaky" in said) == (passed != (2, 0))
    # What is not tried twice fails without --twice as well.
    file.with_suffix(".ran").unlink()
    assert script.stage("it", [], [str(file)], {"PYTEST_ADDOPTS": PLUGIN}, False)[:2] == (1, 1)


def test_each_test_is_in_one_part() -> None:
    parts = load(TOP / "scripts/test").parts()
    assert sorted(f for files in parts.values() for f in files) == sorted(
        str(p.relative_to(TOP)) for p in (TOP / "tests/vm").glob("test_*.py")
    )
    assert all(parts.values())


INT3 = "Oops: int3: 0000 [#1] PREEMPT SMP\nRIP: 0010:hrtimer+0x1/0x2\n ? ring_put+0x1/0x2 [hwerr]"
FATAL = "---[ end trace 0000000000000000 ]---\nKernel panic - not syncing: Fatal exception in interrupt"
ASKED = "Kernel panic - not syncing: NMI: Not continuing\n delay_tsc+0x1/0x2"
KASAN = "BUG: KASAN: use-after-free in f+0x1/0x2 [hwerr]\n </TASK>"
# Of the kernel, then of the task that it was in.
TRAP = (
    "WARNING: CPU: 0 PID: 217 at arch/x86/kernel/traps.c:1120 exc_debug_kernel+0xca/0x160\n"
    "RIP: 0010:exc_debug_kernel+0xca/0x160\nRSP: 0000:fffffe0000010f28 EFLAGS: {}\n"
    "RIP: 0033:0x7fd2c694c38f\nRSP: 002b:00007fff7a107f70 EFLAGS: {}\n </TASK>"
)
KTHREAD = TRAP.format("00000293", "0").replace("RIP: 0033:", "RIP: 0000:")
LOST = "vm: lost VM: Kernel panic while the command ran; console: {}\n"
SILENT = "vm: lost VM: the command wrote nothing for 600 s; console: {}\n"
DEAF = "vm: it does not answer\nvm: nor does the emulator\n" + SILENT
SPLAT = "vm: 1 kernel splat(s); the command's status was 0; console: {}\n"
STALL = (
    "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:\nrcu: \t0-...0: (0 ticks this GP)\n"
    "Sending NMI from CPU 1 to CPUs 0:"
)
DEAF_CPU = "vm: lost VM: CPU 0 takes no interrupts; console: {}\n"
HUNG = "INFO: task python:733 blocked for more than 120 seconds.\n __schedule+0x1/0x2"
NO_INTERRUPTS = "had a CPU that takes no interrupts"
GONE, FLAGS, QUIET = "ran a breakpoint that was gone", "had flags that no CPU has", "went silent"


@pytest.mark.parametrize(
    ("console", "said", "how"),
    [
        (INT3, LOST, (GONE, GONE)),
        (f"{INT3}\n{FATAL}", LOST, (GONE, GONE)),
        (f"{INT3}\n{FATAL}\n{KASAN}", LOST, (None, None)),
        (f"{KASAN}\n{INT3}", SPLAT, (None, None)),
        (FATAL, LOST, (None, None)),
        (ASKED, SILENT, (None, QUIET)),
        (ASKED, SILENT.replace("the command wrote nothing for", "did not come up within"), (None, QUIET)),
        ("", SILENT, (None, None)),
        ("", DEAF, (None, QUIET)),
        (KASAN, DEAF, (None, None)),
        (f"{ASKED}\n ring_put+0x1/0x2 [hwerr]", SILENT, (None, None)),
        (ASKED, "vm: lost VM: the command did not end within 3000 s; console: {}\n", (None, None)),
        (ASKED, LOST, (None, None)),
        (TRAP.format("02d4efe2", "00000293"), SPLAT, (FLAGS, FLAGS)),
        (TRAP.format("00000290", "00000293"), SPLAT, (FLAGS, FLAGS)),
        (TRAP.format("00000293", "00000293"), SPLAT, (None, None)),
        # What the kernel saved of a task can be overwritten.
        (TRAP.format("00000293", "02d4efe2"), SPLAT, (None, None)),
        (KTHREAD, SPLAT, (None, None)),
        (TRAP.format("02d4efe2", "2").replace("exc_debug_kernel+0xca/0x160\nRSP", "f+1/2 [hwerr]\nRSP"),
         SPLAT, (None, None)),
        (TRAP.format("02d4efe2", "2") + "\n" + KASAN, SPLAT, (None, None)),
        (f"{STALL}\n{STALL}", DEAF_CPU, (NO_INTERRUPTS, NO_INTERRUPTS)),
        (f"{STALL}\n{HUNG}", DEAF_CPU, (NO_INTERRUPTS, NO_INTERRUPTS)),
        (f"{HUNG}\n{STALL}", DEAF_CPU, (NO_INTERRUPTS, NO_INTERRUPTS)),
        (STALL, SPLAT, (None, None)),
        (HUNG, SPLAT, (None, None)),
        (f"{STALL}\nNMI backtrace for cpu 0\n ring_put+0x1/0x2 [hwerr]", DEAF_CPU, (None, None)),
        (f"{STALL}\nNMI backtrace for cpu 0\n delay_tsc+0x1/0x2", DEAF_CPU, (None, None)),
        (f"{STALL}\n{HUNG}\n ring_put+0x1/0x2 [hwerr]", DEAF_CPU, (None, None)),
        (f"{STALL}\n{KASAN}", DEAF_CPU, (None, None)),
    ],
)  # fmt: skip
def test_what_is_the_emulators_fault(
    tmp_path: Path, console: str, said: str, how: tuple[str | None, str | None]
) -> None:
    file = tmp_path / "console.log"
    file.write_text(console, encoding="utf-8")
    failed = load(TOP / "scripts/test").emulator_failed
    said = said.replace("{}", str(file))
    assert (failed(said), failed(said, silence=True)) == how


def test_exceptions_come_last(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"test_{name}.py").write_text(
            "import pytest\n@pytest.mark.exception\ndef test_mc(): pass\ndef test_x(): pass\n",
            encoding="utf-8",
        )
    argv = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(
        argv, cwd=TOP, capture_output=True, text=True, check=True, env=os.environ | {"PYTEST_ADDOPTS": PLUGIN}
    )
    found = [line.rpartition("/")[2] for line in done.stdout.splitlines() if "::" in line]
    assert found == ["test_a.py::test_x", "test_b.py::test_x", "test_a.py::test_mc", "test_b.py::test_mc"]


@pytest.mark.parametrize(
    ("text", "ended"),
    [
        (" debug_locks:                             1\n", False),
        (" debug_locks:                             0\n", True),
        (" lock-classes:                         1843 [max: 8192]\n", True),
        (None, False),
    ],
)
def test_whether_lockdep_watches(tmp_path: Path, text: str | None, ended: bool) -> None:
    stats = tmp_path / "lockdep_stats"
    if text is not None:
        stats.write_text(" direct dependencies:       1 [max: 32768]\n" + text, encoding="ascii")
    assert load(TOP / "tests/conftest.py").lockdep_ended(stats) == ended


def test_who_raises_an_exception_is_marked() -> None:
    """A machine check with an MCG_STATUS is one that the CPU raises #MC for."""
    raising, marked = set(), set()
    for path in (TOP / "tests/vm").glob("test_*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                text = ast.unparse(node)
                if "mce_real(" in text and "mcgstatus=" in text:
                    raising.add(f"{path.name}::{node.name}")
                if any("mark.exception" in ast.unparse(d) for d in node.decorator_list):
                    marked.add(f"{path.name}::{node.name}")
    assert raising == marked
    assert len(raising) > 3
