# SPDX-License-Identifier: MIT
"""Taps are known and taken down where they are: real ones, in network namespaces of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hwerr_notify.guard import net, netns
from hwerr_notify.guard.errors import Fault
from hwerr_notify.guard.process import Process, Tap
from hwerr_notify.guard.steps import Steps

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/net/tun").exists(), reason="makes network interfaces: needs root"
)

# A process that holds taps, persistent ones, which its end does not take away.
HOLDER = """
    import fcntl, os, struct, subprocess, sys
    held = []
    for name in sys.argv[1:]:
        held.append(os.open("/dev/net/tun", os.O_RDWR))
        fcntl.ioctl(held[-1], 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002))
        fcntl.ioctl(held[-1], 0x400454CB, 1)
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "close\\n":
            while held:
                os.close(held.pop())
        print(subprocess.run(["ip", "-j", "link"], check=True, capture_output=True, text=True).stdout.replace(
            "\\n", ""), flush=True)
"""


class Holder:
    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child
        self.process = Process.open(child.pid)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        self.namespace = os.readlink(f"/proc/{child.pid}/ns/net")

    def links(self, command: str = "look") -> dict[str, list[str]]:
        """Its namespace's interfaces and their flags."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{command}\n")
        found: list[dict[str, Any]] = json.loads(self._child.stdout.readline())
        return {link["ifname"]: link["flags"] for link in found}


@contextmanager
def holding(*names: str) -> Iterator[Holder]:
    """A process in a network namespace of its own, with taps of these names, which are up."""
    argv = ["unshare", "--net", sys.executable, "-c", textwrap.dedent(HOLDER), *names]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as child:
        try:
            yield Holder(child)
        finally:
            child.kill()


def test_a_tap_is_known_by_its_namespace_too() -> None:
    with holding("eth0") as other:
        assert other.namespace != os.readlink(netns.OWN)
        assert other.process.taps() == [f"eth0 in {other.namespace}"]
        (tap,) = map(Tap.parse, other.process.taps())
        assert tap == Tap("eth0", other.namespace)
        assert Tap.parse(str(Tap("tap0"))) == Tap("tap0")


def test_it_is_taken_down_there_and_the_namesake_here_is_not() -> None:
    before = subprocess.run(["ip", "-j", "link"], check=True, capture_output=True).stdout
    # Of the names of this host's own interfaces, which are in the way.
    names = [link["ifname"] for link in json.loads(before) if link["ifname"] != "lo"][:2] or ["eth0"]
    with holding(*names) as other:
        pid = other.process.pid
        taps = other.process.taps()
        states = net.tap_states(taps, pid)
        index = {tap: state.pop("index") for tap, state in states.items()}
        assert states == {tap: {"up": True, "bridged": False} for tap in taps}
        assert "UP" in other.links()[names[0]]
        assert net.release_taps(taps, pid) == index
        assert net.tap_states(taps, pid) == {
            tap: {"up": False, "bridged": False, "index": index[tap]} for tap in taps
        }
        for name in names:
            assert "UP" not in other.links("close")[name]
        # Again, when it does not hold them any more.
        assert other.process.taps() == []
        assert net.release_taps(taps, pid) == index
    assert subprocess.run(["ip", "-j", "link"], check=True, capture_output=True).stdout == before


def test_a_namespace_that_is_not_found_is_not_taken_for_empty() -> None:
    with holding("tap0") as other:
        taps = other.process.taps()
    for act in (net.release_taps, net.tap_states):
        with pytest.raises(Fault, match=r"no process and no name has its network namespace \(net:"):
            act(taps, os.getpid())


def test_one_that_fails_does_not_spare_the_others() -> None:
    with holding("tap0") as other:
        taps = [str(Tap("tap9", "net:[1]")), *other.process.taps()]
        with pytest.raises(Fault, match=r"^tap tap9: no process"):
            net.release_taps(taps, other.process.pid)
        assert "UP" not in other.links()["tap0"]


def test_another_ones_of_the_same_name_is_left_alone() -> None:
    """A tap that is not persistent goes with its last user, and its name is free."""
    with holding("tap0") as other:
        (tap,) = other.process.taps()
        (state,) = net.tap_states([tap], other.process.pid).values()
        vm: Any = SimpleNamespace(machine=SimpleNamespace(taps=(tap,)), process=other.process)
        seen: Any = SimpleNamespace(taps=())
        Steps._network_is_gone(vm, seen, {})
        Steps._network_is_gone(vm, seen, {tap: state["index"] + 1})
        for links in (None, {tap: state["index"]}):
            with pytest.raises(Fault, match=r"^tap0 in net:.* is up again"):
                Steps._network_is_gone(vm, seen, links)
