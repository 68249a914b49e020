# SPDX-License-Identifier: MIT
"""Is this host able? One line a capability, without changing anything."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Literal

from .. import bpf
from .. import device as hwerr
from . import net
from .kernel import KernelGuard
from .policy import Policy
from .seal import Freezer
from .tell import CLUSTER_TOOLS

__all__ = ["Capability", "check", "guest_memory", "passthrough", "room"]

_QEMU = re.compile(r"qemu-system-\w+|qemu-kvm|kvm")
# Of QEMU's sizes; without a letter -m is in MiB.
_POWERS = {"K": 1 << 10, "M": 1 << 20, "": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True)
class Capability:
    """`state`: "ok"; "weaker", it works by lesser means; "missing", a guest cannot be FROZEN without."""

    name: str
    state: Literal["ok", "weaker", "missing"]
    text: str


def check(policy: Policy, device: str) -> Iterator[Capability]:
    """Looks at the host as the policy needs it."""
    yield _device(device)
    yield _stop(device)
    yield from _seal()
    yield from passthrough()
    yield _root()
    yield _writable(policy)
    yield from room(policy)
    yield from _packages(policy)


def _root() -> Capability:
    if os.geteuid() == 0:
        return Capability("privilege", "ok", "root")
    return Capability("privilege", "missing", "run as root: memory of QEMU is read, network links are set")


def _device(path: str) -> Capability:
    try:
        with hwerr.open(path, module=True, names=False) as device:
            info = device.info()
    except OSError as error:
        return Capability("events", "missing", f"{path}: {error.strerror}: modprobe hwerr")
    if info.scope != "all":
        return Capability("events", "missing", f"{path} shows this process's own errors only: run as root")
    return Capability("events", "ok", ", ".join(sorted(s.label for s in info.sources)))


def _stop(path: str) -> Capability:
    try:
        with hwerr.open(path, module=True, names=False) as device:
            why = KernelGuard(device).missing()
    except OSError as error:
        why = f"{path}: {error.strerror}"
    if why is None:
        return Capability("stop", "ok", "by the kernel, in the event path")
    return Capability("stop", "weaker", f"by QEMU, after the event was read: {why}")


def _seal() -> Iterator[Capability]:
    freezer = Freezer().missing()
    why = bpf.Seal.available()
    if why is None:
        yield Capability("seal", "ok", "KVM_RUN is refused by a BPF LSM program")
    elif freezer is None:
        yield Capability("seal", "weaker", f"by the cgroup freezer, which root can thaw: {why}")
    else:
        yield Capability("seal", "missing", f"{why}; {freezer}")
    if why is None and freezer is not None:
        yield Capability("freezer", "weaker", f"guests without KVM cannot be frozen: {freezer}")


def passthrough(lockdown: Path = bpf.LOCKDOWN) -> Iterator[Capability]:
    """Whether bus mastering can be taken from a device, where it cannot."""
    try:
        level = re.search(r"\[(\w+)\]", lockdown.read_text("ascii"))
    except OSError:
        return
    # LOCKDOWN_PCI_ACCESS is of integrity, which is the least of it.
    if level and level[1] != "none":
        yield Capability(
            "passthrough",
            "weaker",
            "guests with passed-through devices (VFIO) cannot be FROZEN: "
            f"lockdown={level[1]} refuses writing to a device's configuration space",
        )


def _there(path: Path) -> Path:
    """The directory, or the nearest above it that there is."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _writable(policy: Policy) -> Capability:
    path = _there(policy.state_dir)
    if not os.access(path, os.W_OK):
        return Capability("state", "missing", f"{path} is not writable: name another state_dir")
    status = os.statvfs(path)
    free = status.f_bavail * status.f_frsize
    text = f"{policy.state_dir}: {free >> 20} MiB free"
    if free < 64 << 20:
        return Capability("state", "missing", f"{text}: too little to keep an incident's record")
    return Capability("state", "ok", text)


def room(policy: Policy) -> Iterator[Capability]:
    """Whether the memory of the largest guest that runs could be dumped. Pages of zeros take no room."""
    if not policy.dump:
        return
    home = policy.dump_dir or policy.state_dir
    status = os.statvfs(_there(home))
    free = status.f_bavail * status.f_frsize
    largest = max(_guests(), default=0)
    text = f"{home}: {free >> 20} MiB free, {policy.dump_reserve >> 20} MiB of it kept free"
    if not largest:
        yield Capability("dump", "ok", text)
    elif free < largest + policy.dump_reserve:
        yield Capability("dump", "weaker", f"{text}: the largest guest has {largest >> 20} MiB")
    else:
        yield Capability("dump", "ok", f"{text}; the largest guest has {largest >> 20} MiB")


def _guests() -> list[int]:
    """Memory of the guests that run, as their command lines say. Bytes."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            argv = os.fsdecode((entry / "cmdline").read_bytes()).split("\0")[:-1]
        except OSError:
            continue
        if argv and _QEMU.fullmatch(os.path.basename(argv[0])):
            found.append(guest_memory(argv) or 0)
    return found


def guest_memory(argv: list[str]) -> int | None:
    """What `-m` says, in bytes; None if it cannot be read."""
    size = "128M"
    for option, value in pairwise(argv):
        if option in ("-m", "--m"):
            parts = value.split(",")
            size = next((p.removeprefix("size=") for p in parts if p.startswith("size=")), parts[0])
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", size, re.IGNORECASE)
    return int(float(match[1]) * _POWERS[match[2].upper()]) if match else None


def _packages(policy: Policy) -> Iterator[Capability]:
    if reason := net.missing():
        yield Capability("network", "missing", reason)
    else:
        yield Capability("network", "ok", "taps are taken off their bridge")
    if any(vm.libvirt for vm in policy.vms):
        if find_spec("libvirt") is None:
            yield Capability("libvirt", "missing", "apt-get install python3-libvirt")
        else:
            yield Capability("libvirt", "ok", "the Python package is there")
    if policy.pacemaker_resource:
        gone = [t for t in CLUSTER_TOOLS if shutil.which(t) is None]
        if gone:
            yield Capability("pacemaker", "weaker", f"{', '.join(gone)} missing: the cluster is not told")
        else:
            yield Capability("pacemaker", "ok", f"tells resource {policy.pacemaker_resource}")
    for hook in policy.hooks:
        if not os.access(hook.run[0], os.X_OK):
            state: Literal["missing", "weaker"] = "missing" if "release" in hook.on else "weaker"
            yield Capability("hook", state, f"{hook.run[0]} cannot be run")
    yield from _metrics(policy)


def _metrics(policy: Policy) -> Iterator[Capability]:
    """Without them a guest is guarded all the same."""
    paths = [path for path in (policy.metrics_file, policy.metrics_socket) if path is not None]
    if not paths:
        return
    if find_spec("prometheus_client") is None:
        yield Capability("metrics", "weaker", "none: install the Python package prometheus-client")
        return
    for path in paths:
        # The daemon makes what is in its own directory.
        home = path.parent if path.parent != policy.run_dir else _there(path.parent)
        if not home.is_dir():
            yield Capability("metrics", "weaker", f"none: {home} is not there")
        elif not os.access(home, os.W_OK):
            yield Capability("metrics", "weaker", f"none: {home} is not writable")
        else:
            yield Capability("metrics", "ok", f"{path}; the service needs {home} in its ReadWritePaths")
