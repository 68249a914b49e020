# SPDX-License-Identifier: MIT
"""Markers for what a test needs of the VM it runs in, and what it does to it.

A test that the VM at hand cannot run is deselected, not skipped: another boot
of `scripts/test` runs it. So every skip that is left is a fault.
"""

import os
import re
from pathlib import Path

import pytest

LOCKDEP = Path("/proc/lockdep_stats")
# What scripts/test finds in a report of a test whose failure counts at once.
ONCE = "once"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "intel: needs a CPU that takes Intel machine checks")
    config.addinivalue_line("markers", "amd: needs nested KVM or AMD machine checks")
    config.addinivalue_line("markers", "debug: needs the debug kernel")
    config.addinivalue_line("markers", "kcsan: needs the kernel that finds data races")
    config.addinivalue_line("markers", "anywhere: asks a kernel for nothing that another answers otherwise")
    config.addinivalue_line("markers", "long: not in `make test`, see `make test-long`")
    config.addinivalue_line("markers", "once: tries something new each time, so that no second run mends it")
    config.addinivalue_line("markers", "exception: raises a real #MC, whose taint ends lockdep: runs last")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cpu = os.environ.get("HWERR_VM_CPU")
    drop = []
    if cpu is not None:
        other = "intel" if cpu == "amd" else "amd"
        # What needs no particular CPU runs once, on the one with nested KVM.
        drop = [
            i
            for i in items
            if i.get_closest_marker(other) or (cpu == "intel" and not i.get_closest_marker(cpu))
        ]
    if not os.environ.get("HWERR_LONG"):
        drop += [i for i in items if i.get_closest_marker("long") and i not in drop]
        # Once, too: on the newest of the kernels that scripts/test was told.
        if os.environ.get("HWERR_ELSEWHERE") and not os.environ.get("HWERR_LONG"):
            drop += [i for i in items if i.get_closest_marker("anywhere") and i not in drop]
    for built in ("debug", "kcsan"):
        if cpu is not None and os.environ.get("HWERR_KERNEL") != built:
            drop += [i for i in items if i.get_closest_marker(built) and i not in drop]
    config.hook.pytest_deselected(items=drop)
    items[:] = [i for i in items if i not in drop]
    items.sort(key=lambda i: i.get_closest_marker("exception") is not None)
    for item in items:
        # hypothesis marks its own.
        if item.get_closest_marker("once") or item.get_closest_marker("hypothesis"):
            item.user_properties.append((ONCE, "yes"))


def lockdep_ended(stats: Path = LOCKDEP) -> bool:
    """Whether this kernel has lockdep and it watches no more."""
    if not stats.exists():
        return False
    found = re.search(r"^ debug_locks: +(\d+)$", stats.read_text("ascii"), re.MULTILINE)
    return found is None or found[1] != "1"


@pytest.fixture(scope="session")
def _lockdep_watched_the_others() -> None:
    assert not lockdep_ended(), f"lockdep ended before the first real #MC: see {LOCKDEP} and the console"


@pytest.fixture(autouse=True)
def _lockdep(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("exception"):
        request.getfixturevalue("_lockdep_watched_the_others")
