# SPDX-License-Identifier: MIT
"""Is this host able? One line a capability, without changing anything."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from .. import bpf
from .. import device as hwerr
from .kernel import KernelGuard
from .policy import Policy
from .seal import Freezer

__all__ = ["Capability", "check"]


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
    yield _root()
    yield _writable(policy)
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


def _writable(policy: Policy) -> Capability:
    path = policy.state_dir
    while not path.exists() and path != path.parent:
        path = path.parent
    if not os.access(path, os.W_OK):
        return Capability("state", "missing", f"{path} is not writable: name another state_dir")
    status = os.statvfs(path)
    free = status.f_bavail * status.f_frsize
    text = f"{policy.state_dir}: {free >> 20} MiB free"
    if free < 64 << 20:
        return Capability("state", "missing", f"{text}: too little to keep an incident's record")
    return Capability("state", "ok", text)


def _packages(policy: Policy) -> Iterator[Capability]:
    if find_spec("pyroute2") is None:
        yield Capability(
            "network", "missing", "taps cannot be taken down: install the Python package pyroute2"
        )
    else:
        yield Capability("network", "ok", "taps are taken off their bridge")
    if any(vm.libvirt for vm in policy.vms):
        if find_spec("libvirt") is None:
            yield Capability("libvirt", "missing", "apt-get install python3-libvirt")
        else:
            yield Capability("libvirt", "ok", "the Python package is there")
    if policy.pacemaker_resource:
        gone = [t for t in ("crm_node", "attrd_updater", "crm_resource") if shutil.which(t) is None]
        if gone:
            yield Capability("pacemaker", "weaker", f"{', '.join(gone)} missing: the cluster is not told")
        else:
            yield Capability("pacemaker", "ok", f"tells resource {policy.pacemaker_resource}")
    for hook in policy.hooks:
        if not os.access(hook.run[0], os.X_OK):
            state: Literal["missing", "weaker"] = "missing" if "release" in hook.on else "weaker"
            yield Capability("hook", state, f"{hook.run[0]} cannot be run")
    if (policy.metrics_file or policy.metrics_socket) and find_spec("prometheus_client") is None:
        yield Capability("metrics", "missing", "install the Python package prometheus-client")
