# SPDX-License-Identifier: MIT
"""The policy: what is read from a good file, and what is said of a bad one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hwerr_notify import Kind, Severity
from hwerr_notify.guard.policy import Hook, PolicyError, Threshold, load, parse

PATH = Path("/etc/hwerr/guard.toml")
VM = '[[vm]]\nqmp = "/run/qemu/*.qmp"\n'

WHOLE = """\
state_dir = "/srv/state"

[limits]
stop = "500ms"

[dump]
dir = "/srv/dumps"
retain = 2

[pacemaker]
resource = "vm-{name}"

[metrics]
socket = "/run/metrics"

[[hook]]
run = ["/bin/true", "-x"]
on = ["frozen", "failed"]
limit = 3

[[vm]]
name = "web*"
qmp = "/run/qemu/*.qmp"
freeze_severity = "fatal"
freeze_kinds = ["srar"]
freeze_on = ["hardware", "panic"]
front = true
degraded = [{ errors = 10, per = "page", within = "24h" }]

[[vm.degraded]]
errors = 3

[[vm]]
libvirt = "qemu:///system"
freeze_severity = "never"
"""


def test_the_whole() -> None:
    with pytest.raises(PolicyError):
        parse(WHOLE, PATH)
    policy = parse(WHOLE.replace('degraded = [{ errors = 10, per = "page", within = "24h" }]\n', ""), PATH)
    assert policy.limits["stop"] == 0.5
    assert policy.limits["seal"] == 2.0
    assert (policy.dump_dir, policy.dump_retain, policy.dump) == (Path("/srv/dumps"), 2, True)
    assert policy.hooks == (Hook(("/bin/true", "-x"), frozenset({"frozen", "failed"}), 3.0),)
    web, rest = policy.vms
    assert (web.freeze_severity, web.freeze_kinds) == (Severity.FATAL, frozenset({Kind.SRAR}))
    assert web.degraded == (Threshold(3, 86400.0, "vm"),)
    assert (rest.freeze_severity, rest.libvirt) == (None, "qemu:///system")
    assert policy.vm("web1") is web
    assert policy.vm("db1") is rest


def test_defaults() -> None:
    policy = parse(VM, PATH)
    # What may go with the guest from node to node must be asked for.
    assert policy.vms[0].freeze_on == {"hardware", "kvm"}
    assert policy.incidents_retain == 100
    text = "[limits]\ntell = 1\n[[hook]]\nrun = ['/x']\non = ['%s']\n"
    assert parse(text % "frozen" + VM, PATH).hooks[0].limit == 0.5
    assert parse(text % "gone" + VM, PATH).hooks[0].limit == 5.0


def test_the_example_says_what_the_defaults_are() -> None:
    """Also with all that it has as a comment."""
    example = Path(__file__).resolve().parents[2] / "packaging/guard.toml"
    text = example.read_text("utf-8")
    plain = parse(text, example)
    lines = (re.sub(r"^# (?=\[|\w+ = )", "", line) for line in text.splitlines() if "libvirt" not in line)
    every = parse("\n".join(lines), example)
    for name in ("freeze_severity", "freeze_on", "tell_severity", "freeze_process", "front"):
        assert getattr(plain.vms[0], name) == getattr(every.vms[0], name), name
    for name in ("limits", "dump_retain", "dump_reserve", "incidents_retain", "state_dir", "run_dir"):
        assert getattr(plain, name) == getattr(every, name), name
    assert "EVERY NODE IN TURN" in text


def test_an_inline_threshold() -> None:
    policy = parse(VM + 'degraded = [{ errors = 10, per = "page", within = "24h" }]\n', PATH)
    assert policy.vms[0].degraded == (Threshold(10, 86400.0, "page"),)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "guards nothing"),
        (VM + 'freeze_severity = "recoverabel"\n', 3, "vm[1].freeze_severity: 'recoverabel' is no severity"),
        (VM + VM + "front = 1\n", 5, "vm[2].front: must be true or false"),
        (VM + 'freeze_severity = "corrected"\n', 3, "vm[1].freeze_severity: 'corrected' errors do no harm"),
        (VM + 'freeze_severity = "info"\n', 3, "vm[1].freeze_severity: 'info' errors do no harm"),
        (
            "[[hook]]\nrun = ['/x']\non = ['frozen']\nlimit = 10\n" + VM,
            4,
            "hook[1].limit: must be less than limits.tell, 10 s",
        ),
        (
            "[[hook]]\nrun = ['/x']\non = ['gone', 'release']\nlimit = '2s'\n[limits]\nrelease = 2\n" + VM,
            4,
            "hook[1].limit: must be less than limits.release, 2 s",
        ),
        ("[incidents]\nretain = 0\n" + VM, 2, "incidents.retain: must be a whole number from 1"),
        (VM + 'colour = "red"\n', 3, "vm[1].colour: there is no such key here"),
        ("[[vm]]\nname = 'x'\n", 1, "vm[1]: say how to reach its monitor"),
        ("[[vm]]\nqmp = 'run/x'\n", 2, "vm[1].qmp: 'run/x' must be an absolute path"),
        ("[[vm]]\nlibvirt = 'x:///'\nfront = true\n", 3, "vm[1].front: the monitor of a libvirt guest"),
        ("[limits]\n\nstop = '3 weeks'\n" + VM, 3, "limits.stop: must be a time"),
        ("[limits]\nstop = 0\n" + VM, 2, "limits.stop: must be a time above 0"),
        ("[limits]\nstopp = 1\n" + VM, 2, "limits.stopp: there is no such key here"),
        ("limits = 3\n" + VM, 1, "limits: write it as a table"),
        ("[[hook]]\nrun = ['x']\n" + VM, 2, "hook[1].run: 'x' must be an absolute path"),
        ("[[hook]]\nrun = ['/x']\non = ['often']\n" + VM, 3, "hook[1].on: 'often' is no occasion"),
        ("[[hook]]\nrun = ['/x']\n" + VM, 1, "hook[1]: say what and when"),
        (VM + "[[vm.degraded]]\nwithin = 3\n", 3, "vm[1].degraded[1]: say how many"),
        ("dump = {retain = 0}\n" + VM, 1, "dump.retain: must be a whole number from 1"),
        ("vm = 3\n", 1, "vm: write it as tables"),
        ("x = \n", 1, "Invalid value"),
        (VM + "qmp = '/y'\n", 3, "Cannot overwrite a value"),
    ],
)
def test_complaints(text: str, line: int, words: str) -> None:
    with pytest.raises(PolicyError) as found:
        parse(text, PATH)
    message = str(found.value)
    assert message.startswith(f"{PATH}:{line}: "), message
    assert words in message
    assert "\n" not in message


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="No such file"):
        load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(PolicyError, match="no UTF-8"):
        load(tmp_path / "bad.toml")
