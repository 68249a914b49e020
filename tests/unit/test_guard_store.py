# SPDX-License-Identifier: MIT
"""Incidents on disk when a disk is slow: several saves of one at the same time."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from hwerr_notify.guard.store import Incident, Store

INCIDENT = Incident("20260102T030405.006-web1", "boot", "web1", None, 7, 5, "/run/q", {"message": "m"}, 1, 2)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    store.prepare()
    return store


def test_a_save_that_the_disk_held_up_does_not_undo_a_newer_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever gave it up after its time has saved the next since; the thread comes back all the same."""
    frozen = replace(INCIDENT, state="frozen")
    store.save(INCIDENT)
    turns = store.turn(INCIDENT.id), store.turn(INCIDENT.id)
    held, go, newer_made, looked = (threading.Event() for _ in range(4))
    real_fsync, real_write = os.fsync, os.write

    def fsync(fd: int) -> None:
        if threading.current_thread() is older and not held.is_set():
            held.set()
            assert go.wait(60)
        real_fsync(fd)

    def write(fd: int, data: bytes) -> int:
        if threading.current_thread() is newer:
            # Its file is made, and empty, while the older comes to its end.
            newer_made.set()
            assert looked.wait(60)
        return real_write(fd, data)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "write", write)
    older = threading.Thread(target=store.save, args=(INCIDENT, turns[0]))
    newer = threading.Thread(target=store.save, args=(frozen, turns[1]))
    older.start()
    assert held.wait(60)
    newer.start()
    # It comes to this only where two are let in at the same time.
    newer_made.wait(0.2)
    go.set()
    older.join(60)
    assert store.load(INCIDENT.id) == INCIDENT
    looked.set()
    newer.join(60)
    assert store.load(INCIDENT.id) == frozen


def test_a_stale_turn_writes_nothing(store: Store) -> None:
    older, newer = store.turn(INCIDENT.id), store.turn(INCIDENT.id)
    other = replace(INCIDENT, id="20260102T030405.006-db1")
    store.save(replace(INCIDENT, state="frozen"), newer)
    store.save(INCIDENT, older)
    store.save(other)
    assert [i.state for i in store.all() if isinstance(i, Incident)] == ["freezing", "frozen"]
    # Later than both.
    store.save(replace(INCIDENT, state="gone"))
    assert store.load(INCIDENT.id).state == "gone"


def test_a_newer_one_that_failed_does_not_stand_for_an_older(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `save` returned from is on disk."""
    older, newer = store.turn(INCIDENT.id), store.turn(INCIDENT.id)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        store.save(replace(INCIDENT, state="frozen"), newer)
    monkeypatch.undo()
    store.save(INCIDENT, older)
    assert store.load(INCIDENT.id) == INCIDENT


def test_two_of_one_millisecond(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """VMs whose names differ only where an identifier cannot show it."""
    monkeypatch.setattr("time.time_ns", lambda: 1_767_323_045_006_000_000)
    ids = [store.new_id("x" * 64 + "1", 70), store.new_id("x" * 64 + "2", 71), store.new_id("ü/1", 70)]
    assert len({*ids}) == 3
    assert ids[2] == "20260102T030405.006-__1-70"
    for name in ids:
        assert store.path(name).name == name
