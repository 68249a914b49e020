# SPDX-License-Identifier: MIT
"""Failover of a FROZEN guest, without fencing, in a cluster of two nodes. `make test-ha`.

Runs on the host; the nodes are VMs (bed.py), made once for all tests here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise

import pytest
from bed import LOG_SECTOR, Bed, Write
from failover import LIMIT, Failover, fail_over

FAILOVERS = int(os.environ.get("HWERR_HA_FAILOVERS", "20"))


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with Bed(os.environ.get("HWERR_HA_KERNEL", "6.12")) as made:
        made.each(lambda node: node.guarded())
        made.nodes["alpha"].configure()
        made.disk.await_write("alpha", 0, LIMIT)
        made.nodes["alpha"].settle()
        yield made


def one_writer_at_a_time(writes: list[Write], order: list[str]) -> None:
    """Writes in the order in which they were asked for: the nodes take turns, as in `order`, and no more."""
    turns = [w.node for n, w in enumerate(writes) if n == 0 or writes[n - 1].node != w.node]
    assert turns == order
    # And none was under way when the next node's first came.
    for before, after in pairwise(writes):
        if before.node != after.node:
            assert before.done_ns, f"{before} did not end, and {after} came"
            assert before.done_ns < after.ns, f"{after} came while {before} was under way"


def only_grows(writes: list[Write]) -> None:
    """No number was written twice, none after a greater one; the head before its number."""
    numbers = [w.number for w in writes if w.number is not None]
    assert numbers, "nothing was written"
    for before, after in pairwise(numbers):
        assert after > before, f"the counter went from {before} to {after}"


def test_failovers(bed: Bed) -> None:
    """There and back again: the counter never goes back, and never has two writers."""
    done: list[Failover] = []
    counts = {name: len(node.incidents()) for name, node in bed.nodes.items()}
    before = len(bed.disk)
    order = [bed.nodes["alpha"].where()]
    bed.await_write(order[0], before, LIMIT)
    for n in range(FAILOVERS):
        source = bed.nodes[order[-1]]
        counts[source.name] += 1
        failover = fail_over(bed, source, counts[source.name])
        order.append(failover.target)
        assert failover.incident["state"] == "frozen", failover.incident
        assert failover.incident["steps"]["stop"]["detail"].endswith("in the event path")
        assert failover.incident["steps"]["seal"]["state"] == "done", failover.incident["steps"]["seal"]
        assert failover.incident["dump"]["stored"] > 0
        # Kept, while its replacement writes.
        assert source.alive(pid=failover.pid)
        assert bed.other(source).where() == failover.target
        still = source.still(pid=failover.pid)
        bed.await_write(failover.target, len(bed.disk), LIMIT)
        assert source.still(pid=failover.pid) == still
        source.clear(incident=failover.incident["id"])
        assert not source.alive(pid=failover.pid)
        done.append(failover)
        print(f"{n + 1}: {failover.source} → {failover.target}: {failover.timeline.at('first write'):.2f} s")
    bed.each(lambda node: node.settle())
    # Cleared everywhere, and nothing has moved it again.
    assert bed.nodes["alpha"].where() == order[-1]
    writes = bed.disk.writes()[before:]
    one_writer_at_a_time(writes, order)
    only_grows(writes)
    identities(bed, writes)


def identities(bed: Bed, writes: list[Write]) -> None:
    """What is on the disk says the same: each number by a QEMU of the node that the server saw writing it."""
    started: dict[str, str] = {}
    for node in bed.nodes.values():
        started |= {line.split()[2]: node.name for line in node.starts() if " started " in line}
    turns: list[str] = []
    for write in writes:
        if write.number is None or not write.done_ns:
            continue
        magic, number, uuid = bed.disk.entry(write.number)
        assert (magic, number) == ("HWERRCNT", write.number)
        assert started[uuid] == write.node
        if not turns or turns[-1] != uuid:
            turns.append(uuid)
    assert len(turns) == len(set(turns)) == FAILOVERS + 1, turns


def test_the_judge_sees_two_writers_and_a_step_back() -> None:
    """What the checks above are worth."""

    def writes(*of: tuple[str, int, int]) -> list[Write]:
        return [Write(ns, node, LOG_SECTOR + number, ns + 1) for node, number, ns in of]

    good = writes(("alpha", 1, 10), ("alpha", 2, 20), ("beta", 3, 30))
    one_writer_at_a_time(good, ["alpha", "beta"])
    only_grows(good)
    with pytest.raises(AssertionError):
        one_writer_at_a_time([*good, *writes(("alpha", 4, 40))], ["alpha", "beta"])
    with pytest.raises(AssertionError):
        one_writer_at_a_time(writes(("alpha", 1, 10), ("beta", 2, 10)), ["alpha", "beta"])
    with pytest.raises(AssertionError):
        only_grows(writes(("alpha", 2, 10), ("beta", 2, 20)))
