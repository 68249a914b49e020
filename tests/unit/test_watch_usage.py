# SPDX-License-Identifier: MIT
"""The command line of hwerr-watch, as far as it needs no device."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from hwerr_notify.cli import hwerr_watch


@pytest.mark.parametrize(
    "options",
    [
        ["--severity", "bad"], ["--source", "mce,bad"], ["--source", ""], ["--since", "yesterday"],
        ["--since", "0"], ["--since", "-1"], ["--since", str(1 << 64)], ["--since", "\u0663"],
        ["--count", "0"],
        ["--count", "x"], ["--timeout", "-1"], ["--timeout", "nan"], ["--timeout", "inf"], ["--pid", "0"],
        ["--pid", "x"], ["--no-such-option"], ["word"], ["--since"], ["--json=1"], ["--sev", "fatal"],
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from hwerr_notify.cli.watch import main

    with pytest.raises(SystemExit) as end:
        main(options)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"hwerr-watch: .*\(see hwerr-watch --help\)\n", err)


def test_help_says_how_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    from hwerr_notify.cli.watch import main

    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for status in (0, 1, 2, 3, 4, 5, 130, 141):
        assert re.search(rf"^  {status} ", out, re.MULTILINE)


def test_it_loads_little() -> None:
    """What takes long to load is loaded where it is needed."""
    code = "import sys, hwerr_notify.cli.watch; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    modules = set(out.split())
    assert "hwerr_notify.cli.watch" in modules
    # site-packages may load some of them before us.
    site = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sys.modules)"], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not (modules - set(site)) & {
        "asyncio",
        "rich",
        "xml",
        "xml.etree",
        "argcomplete",
        "ssl",
        "logging",
    }


def test_the_entry_point_itself_loads_nothing() -> None:
    assert hwerr_watch.__module__ == "hwerr_notify.cli"
    code = "import sys, hwerr_notify.cli; print(*(m for m in sys.modules if m.startswith('hwerr_notify')))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.split() == ["hwerr_notify", "hwerr_notify.cli"]


def test_columns_hold_whatever_is_in_them() -> None:
    from datetime import datetime

    from hwerr_notify import Edac, Guest, Severity, Source, build
    from hwerr_notify.cli.watch import line

    def starts(label: str, name: str) -> list[int]:
        guest = Guest(123456, gpa=0x1C0000000, len=64, comm=name)
        event = build(Edac(0, label=label), guest, severity=Severity.RECOVERABLE, source=Source.EDAC)
        at, found = 0, []
        for text, _ in line(event, datetime.now()):
            found.append(at)
            at += len(text)
        return found

    assert starts("DIMM_A1", "web1") == starts("CPU_SrcID#0_MC#0_Chan#0_DIMM#0", "instance-0000a")
