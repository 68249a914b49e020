# SPDX-License-Identifier: MIT
"""Who is hit: every kind of memory, and real guests, against what the kernel and QEMU say."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hit import UNSURE, Injector, hit_random_pages, start
from holder import (
    ANON,
    HUGE,
    MADV_HUGEPAGE,
    MADV_PAGEOUT,
    MAP_HUGETLB,
    PAGE,
    PRIVATE,
    SHARED,
    Holder,
    hugetlb,
    merged,
    touched,
)
from testbed import pagemap
from testbed.errors import TestbedError
from testbed.kernel import put, zram_swap

from hwerr_notify import Event, Flags

Hit = Callable[..., Event]


@pytest.fixture(scope="module")
def injector() -> Iterator[Injector]:
    with Injector() as injector:
        yield injector


@pytest.fixture
def hit(injector: Injector) -> Hit:
    return injector.hit


@pytest.fixture
def holder() -> Iterator[Holder]:
    with Holder() as holder:
        yield holder


def tasks(event: Event) -> set[tuple[int, int, int]]:
    """(process, address, length) of every task; there is no guest and nothing is in doubt."""
    assert not event.guests
    assert not event.flags & UNSURE, event.flags
    listed = [(t.pid, t.va, t.len) for t in event.tasks]
    assert len(listed) == len(set(listed)), "a task is listed twice"
    return set(listed)


# -- one process -------------------------------------------------------------


def test_anonymous(hit: Hit, holder: Holder) -> None:
    va = touched(holder, 3) + PAGE
    event = hit(holder.phys(va))
    assert tasks(event) == {(holder.pid, va, PAGE)}
    task = event.tasks[0]
    stat = Path(f"/proc/{holder.pid}/stat").read_text("ascii").rpartition(")")[2].split()
    ticks = int(stat[19])
    assert task.start_ns * os.sysconf("SC_CLK_TCK") // 10**9 == ticks
    assert task.comm == Path(f"/proc/{holder.pid}/comm").read_text("utf-8").strip()
    assert event.memory is not None
    assert event.memory.resolve_ns > 0


def test_bytes_of_a_page(hit: Hit, holder: Holder) -> None:
    va = touched(holder) + 0x340
    assert tasks(hit(holder.phys(va), 64)) == {(holder.pid, va, 64)}


def test_moved_by_mremap(hit: Hit, holder: Holder) -> None:
    old = touched(holder, 4)
    new = holder.mremap(old, 4 * PAGE) + 2 * PAGE
    assert tasks(hit(holder.phys(new))) == {(holder.pid, new, PAGE)}


def test_mapped_twice(hit: Hit, holder: Holder) -> None:
    path = holder.memfd(4 * PAGE)
    one = holder.mmap(4 * PAGE, SHARED, path=path)
    two = holder.mmap(2 * PAGE, SHARED, path=path, offset=2 * PAGE)
    holder.write(one, 4 * PAGE)
    holder.read(two, 2 * PAGE)
    va = one + 3 * PAGE
    assert tasks(hit(holder.phys(va))) == {(holder.pid, va, PAGE), (holder.pid, two + PAGE, PAGE)}


def test_thread_whose_leader_has_ended(hit: Hit, holder: Holder) -> None:
    va = touched(holder)
    phys = holder.phys(va)
    holder.lose_leader()
    while "Z" not in Path(f"/proc/{holder.pid}/task/{holder.pid}/stat").read_text("ascii").rpartition(")")[2]:
        os.sched_yield()
    assert tasks(hit(phys)) == {(holder.pid, va, PAGE)}


# -- huge pages --------------------------------------------------------------


def huge(holder: Holder, flags: int = PRIVATE | ANON, *, path: str = "") -> int:
    """A huge page of the holder, touched; fails if it is not one."""
    va: int = holder.mmap(HUGE, flags, align=HUGE, path=path)
    if not flags & MAP_HUGETLB and not path:
        put(Path("/sys/kernel/mm/transparent_hugepage/enabled"), "always")
        holder.madvise(va, HUGE, MADV_HUGEPAGE)
    holder.write(va, HUGE)
    assert holder.pfn(va + 511 * PAGE) == holder.pfn(va) + 511
    return va


def test_thp(hit: Hit, holder: Holder) -> None:
    va = huge(holder) + 137 * PAGE
    assert tasks(hit(holder.phys(va))) == {(holder.pid, va, PAGE)}


def test_thp_of_a_file(hit: Hit, holder: Holder) -> None:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    with ExitStack() as stack:
        # What anonymous shared memory does is told by the kernel's own mount.
        stack.callback(put, enabled, "never")
        put(enabled, "force")
        path = holder.memfd(HUGE)
        va = huge(holder, SHARED, path=path) + 211 * PAGE
        child = stack.enter_context(holder.fork())
        child.read(va, PAGE)
        # By small pages.
        other = stack.enter_context(Holder())
        vb = other.mmap(64 * PAGE, SHARED, path=path, offset=200 * PAGE)
        other.read(vb, 64 * PAGE)
        assert tasks(hit(holder.phys(va))) == {
            (holder.pid, va, PAGE), (child.pid, va, PAGE), (other.pid, vb + 11 * PAGE, PAGE)
        }  # fmt: skip


def test_thp_mapped_by_ptes(hit: Hit, holder: Holder) -> None:
    va = huge(holder)
    holder.mprotect(va + 4 * PAGE, PAGE, mmap.PROT_READ)
    holder.munmap(va + 8 * PAGE, PAGE)
    at = va + 300 * PAGE
    assert tasks(hit(holder.phys(at))) == {(holder.pid, at, PAGE)}


def test_thp_page_unmapped_from_it(hit: Hit, holder: Holder) -> None:
    va = huge(holder)
    phys = holder.phys(va + 8 * PAGE)
    holder.munmap(va + 8 * PAGE, PAGE)
    assert tasks(hit(phys)) == set()


def test_thp_after_fork(hit: Hit, holder: Holder) -> None:
    va = huge(holder) + 77 * PAGE
    with holder.fork() as child:
        assert tasks(hit(holder.phys(va))) == {(holder.pid, va, PAGE), (child.pid, va, PAGE)}
        child.write(va)
        assert child.phys(va) != holder.phys(va)
        assert tasks(hit(child.phys(va))) == {(child.pid, va, PAGE)}
        assert tasks(hit(holder.phys(va))) == {(holder.pid, va, PAGE)}


@pytest.mark.parametrize("flags", [PRIVATE, SHARED], ids=["private", "shared"])
def test_hugetlb(hit: Hit, holder: Holder, flags: int) -> None:
    # Not the first of the file: there the units of the index do not matter.
    base = hugetlb(holder, 4, flags)
    va = base + 3 * HUGE + 401 * PAGE
    assert tasks(hit(holder.phys(va))) == {(holder.pid, va, PAGE)}
    with holder.fork() as child:
        child.read(base, 4 * HUGE)
        assert tasks(hit(holder.phys(va))) == {(holder.pid, va, PAGE), (child.pid, va, PAGE)}


# -- several processes -------------------------------------------------------


def test_fork_and_copy_on_write(hit: Hit, holder: Holder) -> None:
    va = touched(holder)
    with holder.fork() as child:
        assert tasks(hit(holder.phys(va))) == {(holder.pid, va, PAGE), (child.pid, va, PAGE)}
        child.write(va)
        assert tasks(hit(holder.phys(va))) == {(holder.pid, va, PAGE)}
        assert tasks(hit(child.phys(va))) == {(child.pid, va, PAGE)}


def test_page_that_another_has_swapped_out_is_in_doubt(hit: Hit, holder: Holder) -> None:
    with zram_swap():
        va = touched(holder)
        deadline = time.monotonic() + 60
        with contextlib.suppress(TestbedError):
            # A page on its way to the LRU list is left alone; what is out has no frame.
            while holder.phys(va):
                assert time.monotonic() < deadline, "the page is not swapped out"
                holder.madvise(va, PAGE, MADV_PAGEOUT)
        with holder.fork() as child:
            holder.read(va, PAGE)
            event = hit(holder.phys(va))
            assert {(t.pid, t.va, t.len) for t in event.tasks} == {(holder.pid, va, PAGE)}
            assert event.flags & UNSURE == Flags.OWNERS_UNKNOWN
            child.write(va)
            holder.write(va)
            assert tasks(hit(holder.phys(va))) == {(holder.pid, va, PAGE)}


def test_grandchild_after_parent_has_ended(hit: Hit, holder: Holder) -> None:
    va = touched(holder)
    with ExitStack() as stack:
        child = holder.fork()
        grandchild = stack.enter_context(child.fork())
        child.kill()
        assert tasks(hit(holder.phys(va))) == {(holder.pid, va, PAGE), (grandchild.pid, va, PAGE)}


def test_memfd_of_two(hit: Hit, holder: Holder) -> None:
    path = holder.memfd(16 * PAGE)
    va = holder.mmap(16 * PAGE, SHARED, path=path)
    holder.write(va, 16 * PAGE)
    with Holder() as other:
        vb = other.mmap(8 * PAGE, SHARED, path=path, offset=4 * PAGE)
        other.read(vb, 8 * PAGE)
        phys = holder.phys(va + 6 * PAGE)
        assert tasks(hit(phys)) == {(holder.pid, va + 6 * PAGE, PAGE), (other.pid, vb + 2 * PAGE, PAGE)}
        # Only one of them has it mapped.
        assert tasks(hit(holder.phys(va + 15 * PAGE))) == {(holder.pid, va + 15 * PAGE, PAGE)}


# On the VM's root file system, and at least four pages long.
PAGE_CACHE = "/usr/share/common-licenses/GPL-3"


@pytest.mark.parametrize("where", ["memfd", "tmpfs", "page cache"])
def test_private_mapping_of_a_file(hit: Hit, holder: Holder, tmp_path: Path, where: str) -> None:
    if where == "tmpfs":
        path = str(tmp_path / "file")
        Path(path).write_bytes(bytes(4 * PAGE))
    elif where == "page cache":
        path = PAGE_CACHE
    else:
        path = holder.memfd(4 * PAGE)
    with Holder() as reader:
        va = holder.mmap(4 * PAGE, PRIVATE, path=path)
        vb = reader.mmap(4 * PAGE, PRIVATE, path=path)
        holder.read(va, 4 * PAGE)
        reader.read(vb, 4 * PAGE)
        phys = reader.phys(vb + PAGE)
        assert tasks(hit(phys)) == {(holder.pid, va + PAGE, PAGE), (reader.pid, vb + PAGE, PAGE)}
        holder.write(va + PAGE)
        assert tasks(hit(phys)) == {(reader.pid, vb + PAGE, PAGE)}
        assert tasks(hit(holder.phys(va + PAGE))) == {(holder.pid, va + PAGE, PAGE)}


def test_ksm(hit: Hit, holder: Holder) -> None:
    with ExitStack() as stack:
        other = stack.enter_context(Holder())
        at = merged(stack, {holder: 2, other: 2})
        phys = holder.phys(at[holder])
        four = {(h.pid, va + n * PAGE, PAGE) for h, va in at.items() for n in (0, 1)}
        assert tasks(hit(phys)) == four
        # Forked since KSM saw it: no item of its own.
        child = stack.enter_context(other.fork())
        child_two = {(child.pid, at[other] + n * PAGE, PAGE) for n in (0, 1)}
        assert tasks(hit(phys)) == four | child_two
        other.write(at[other])
        assert tasks(hit(phys)) == (four | child_two) - {(other.pid, at[other], PAGE)}


@pytest.mark.amd
def test_a_guest_that_has_a_page_many_times_hides_no_other(hit: Hit) -> None:
    with ExitStack() as stack:
        many, one, others = (stack.enter_context(Holder()) for _ in range(3))
        pages = {many: 30, one: 1, others: 30}
        at = merged(stack, pages)
        for h, va in at.items():
            h.vm_slot(h.vm(), 0, 0x100000, pages[h] * PAGE, va)
        event = hit(one.phys(at[one]))
        assert event.flags & UNSURE == Flags.OWNERS_TRUNCATED
        assert {g.pid for g in event.guests} == {h.pid for h in at}
        assert [(g.gpa, g.hva) for g in event.guests if g.pid == one.pid] == [(0x100000, at[one])]


# -- nobody, everybody, doubt --------------------------------------------------


def test_memory_of_a_device_is_in_doubt(hit: Hit) -> None:
    """It may be mapped by a process, or passed on to a guest; the kernel keeps no way back."""
    bar = next(
        int(line.split("-")[0], 16)
        for line in Path("/proc/iomem").read_text("ascii").splitlines()
        if re.match(r" +[0-9a-f]+-[0-9a-f]+ : 0000:[0-9a-f:.]+$", line)
    )
    event = hit(bar)
    assert event.flags & UNSURE == Flags.OWNERS_UNKNOWN
    assert not event.tasks


def test_kernel_memory_has_no_owner(hit: Hit) -> None:
    for line in Path("/proc/iomem").read_text("ascii").splitlines():
        if "Kernel code" in line:
            start = int(line.split("-")[0], 16)
            break
    assert tasks(hit(start + 5 * PAGE)) == set()


def test_freed_page_has_not_its_old_owner(hit: Hit, holder: Holder) -> None:
    va = touched(holder)
    phys = holder.phys(va)
    holder.munmap(va, PAGE)
    # Whoever has it now has it elsewhere.
    assert (holder.pid, va) not in {(t.pid, t.va) for t in hit(phys).tasks}


def test_page_cache_that_nobody_maps(hit: Hit, holder: Holder) -> None:
    path = holder.memfd(2 * PAGE)
    va = holder.mmap(2 * PAGE, SHARED, path=path)
    holder.write(va, 2 * PAGE)
    phys = holder.phys(va)
    holder.munmap(va, 2 * PAGE)
    assert tasks(hit(phys)) == set()


def test_range_of_pages_is_one_stretch(hit: Hit, holder: Holder) -> None:
    va = huge(holder)
    event = hit(holder.phys(va), 64 * 1024)
    assert tasks(event) == {(holder.pid, va, 64 * 1024)}


def test_long_range_is_cut_and_says_so(hit: Hit, holder: Holder) -> None:
    va = huge(holder)
    event = hit(holder.phys(va), HUGE)
    assert event.flags & UNSURE == Flags.OWNERS_TRUNCATED
    assert {(t.pid, t.va, t.len) for t in event.tasks} == {(holder.pid, va, 64 * PAGE)}


def test_more_owners_than_fit(hit: Hit, holder: Holder) -> None:
    va = touched(holder)
    with ExitStack() as stack:
        everyone = {holder.pid} | {stack.enter_context(holder.fork()).pid for _ in range(40)}
        event = hit(holder.phys(va))
        assert event.flags & UNSURE == Flags.OWNERS_TRUNCATED
        named = [t.pid for t in event.tasks]
        assert len(named) == len(set(named)) == 24
        assert set(named) <= everyone


# -- memory_failure(): looked up with preemption off, before it unmaps -----------


def test_memory_failure_of_an_anonymous_page(injector: Injector, holder: Holder) -> None:
    va = touched(holder, 2)
    with holder.fork() as child:
        event = injector.poison(holder.pfn(va))
        assert tasks(event) == {(holder.pid, va, PAGE), (child.pid, va, PAGE)}


def test_memory_failure_of_a_thp(injector: Injector, holder: Holder) -> None:
    va = huge(holder) + 99 * PAGE
    assert tasks(injector.poison(holder.pfn(va))) == {(holder.pid, va, PAGE)}


@pytest.mark.parametrize("flags", [PRIVATE, SHARED], ids=["private", "shared"])
def test_memory_failure_of_a_hugetlb_page_takes_all_of_it(
    injector: Injector, holder: Holder, flags: int
) -> None:
    base = hugetlb(holder, 2, flags)
    assert tasks(injector.poison(holder.pfn(base + HUGE + 3 * PAGE))) == {(holder.pid, base + HUGE, HUGE)}


@pytest.mark.amd
def test_memory_failure_of_a_hugetlb_guest_takes_two_megabytes(injector: Injector) -> None:
    with ExitStack() as stack:
        guest = start(stack, "huge", "hugetlb")
        gpa = 0x1200000
        pid, hva = guest.pid, guest.gpa2hva(gpa)
        event = injector.poison(guest.gpa2hpa(gpa + 0x5000) // PAGE)
        assert not event.flags & UNSURE
        assert [(g.pid, g.gpa, g.hva, g.len) for g in event.guests] == [(pid, gpa, hva, HUGE)]


@pytest.mark.amd
def test_memory_failure_of_a_guest_page(injector: Injector) -> None:
    with ExitStack() as stack:
        guest = start(stack, "poison", "memfd")
        gpa = 0x500000
        pid, hva = guest.pid, guest.gpa2hva(gpa)
        event = injector.poison(guest.gpa2hpa(gpa) // PAGE)
        assert not event.tasks
        assert not event.flags & UNSURE
        assert [(g.pid, g.gpa, g.hva) for g in event.guests] == [(pid, gpa, hva)]


def test_poisoned_page_of_a_file_is_still_known(injector: Injector, holder: Holder) -> None:
    path = holder.memfd(4 * PAGE)
    va = holder.mmap(4 * PAGE, SHARED, path=path)
    holder.write(va, 4 * PAGE)
    phys = holder.phys(va + PAGE)
    with Holder() as other:
        vb = other.mmap(4 * PAGE, SHARED, path=path)
        other.read(vb, 4 * PAGE)
        both = {(holder.pid, va + PAGE, PAGE), (other.pid, vb + PAGE, PAGE)}
        assert tasks(injector.poison(holder.pfn(va + PAGE))) == both
        assert tasks(injector.hit(phys)) == both


def test_poisoned_anonymous_page_is_in_doubt(injector: Injector, holder: Holder) -> None:
    va = touched(holder)
    phys = holder.phys(va)
    assert tasks(injector.poison(holder.pfn(va))) == {(holder.pid, va, PAGE)}
    event = injector.hit(phys)
    assert event.flags & UNSURE == Flags.OWNERS_UNKNOWN
    assert not event.tasks
    assert not event.guests


# -- in motion -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["anon", "memfd"])
def test_under_contention_never_silently_nobody(hit: Hit, holder: Holder, kind: str) -> None:
    if kind == "anon":
        va = touched(holder, 4)
    else:
        va = holder.mmap(4 * PAGE, SHARED, path=holder.memfd(4 * PAGE))
        holder.write(va, 4 * PAGE)
    holder.start("churn", va, 4 * PAGE, 8.0)
    end = time.monotonic() + 7.0
    tries = unsure = 0
    while time.monotonic() < end:
        phys = pagemap.physical(holder.pid, va + PAGE)
        event = hit(phys)
        known = (holder.pid, va + PAGE, PAGE) in {(t.pid, t.va, t.len) for t in event.tasks}
        # The kernel may move the page at any time (kcompactd): then it was another's, or nobody's.
        if not known and pagemap.physical(holder.pid, va + PAGE) != phys:
            continue
        tries += 1
        unsure += not known
        assert known or event.flags & Flags.OWNERS_UNKNOWN
    holder.finish()
    # The doubt is the exception.
    assert tries >= 5
    assert unsure <= tries // 10, f"{unsure} of {tries} in doubt"


def test_page_in_migration(hit: Hit, holder: Holder) -> None:
    """Compaction moves the pages: a hit names the holder, or nobody if the page has left."""
    va = touched(holder, 512)
    for _ in range(30):
        page = va + random.randrange(512) * PAGE
        mover = threading.Thread(target=put, args=(Path("/proc/sys/vm/compact_memory"), "1"))
        before = holder.phys(page)
        mover.start()
        event = hit(before)
        mover.join()
        named = (holder.pid, page, PAGE) in {(t.pid, t.va, t.len) for t in event.tasks}
        assert named or event.flags & Flags.OWNERS_UNKNOWN or holder.phys(page) != before


# -- guests --------------------------------------------------------------------


@pytest.mark.amd
@pytest.mark.parametrize("backing", ["anon", "thp", "hugetlb", "memfd"])
def test_fifty_random_pages_of_a_guest(hit: Hit, backing: str) -> None:
    random.seed(backing)
    with ExitStack() as stack:
        guest = start(stack, "fifty", backing)
        for g in hit_random_pages(guest, hit):
            assert not g.by_device
            assert g.comm == "qemu-system-x86"


@pytest.mark.amd
def test_byte_in_a_guest_page(hit: Hit) -> None:
    with ExitStack() as stack:
        guest = start(stack, "byte")
        gpa = 0x123000 + 0x480
        (g,) = hit(guest.gpa2hpa(gpa & ~0xFFF) + 0x480, 64).guests
        assert (g.gpa, g.hva, g.len) == (gpa, guest.gpa2hva(gpa), 64)


@pytest.mark.amd
def test_two_guests_that_share_a_memfd(hit: Hit, holder: Holder) -> None:
    path = holder.memfd(64 << 20)
    with ExitStack() as stack:
        two = [start(stack, f"share{n}", "file", path=path) for n in (1, 2)]
        gpa = 0x400000
        assert two[0].gpa2hpa(gpa) == two[1].gpa2hpa(gpa)
        va = holder.mmap(64 << 20, SHARED, path=path)
        holder.read(va + gpa, PAGE)
        event = hit(two[0].gpa2hpa(gpa))
        assert not event.flags & UNSURE
        assert {(g.pid, g.gpa, g.hva) for g in event.guests} == {(q.pid, gpa, q.gpa2hva(gpa)) for q in two}
        assert len({g.vm_id for g in event.guests}) == 2
        assert {(t.pid, t.va) for t in event.tasks} == {(holder.pid, va + gpa)}


@pytest.mark.amd
def test_guest_comes_before_many_tasks(hit: Hit, holder: Holder) -> None:
    path = holder.memfd(64 << 20)
    va = holder.mmap(64 << 20, SHARED, path=path)
    gpa = 0x200000
    holder.write(va + gpa)
    with ExitStack() as stack:
        for child in [stack.enter_context(holder.fork()) for _ in range(40)]:
            child.read(va + gpa, PAGE)
        guest = start(stack, "crowd", "file", path=path)
        event = hit(guest.gpa2hpa(gpa))
        assert [(g.pid, g.gpa) for g in event.guests] == [(guest.pid, gpa)]
        assert event.flags & UNSURE == Flags.OWNERS_TRUNCATED
        assert len(event.tasks) == 23


@pytest.mark.amd
def test_memory_of_qemu_that_no_guest_sees(hit: Hit) -> None:
    with ExitStack() as stack:
        guest = start(stack, "heap")
        heap = next(
            int(line.split("-")[0], 16)
            for line in Path(f"/proc/{guest.pid}/maps").read_text("utf-8").splitlines()
            if line.endswith("[heap]")
        )
        event = hit(pagemap.physical(guest.pid, heap))
        (g,) = event.guests
        assert (g.pid, g.gpa, g.hva, g.len, g.kvm) == (guest.pid, None, heap, PAGE, True)
        assert g.vm_id


@pytest.mark.amd
def test_qemu_without_kvm(hit: Hit) -> None:
    with ExitStack() as stack:
        guest = start(stack, "tcg", accel="tcg")
        gpa = 0x300000
        hva = guest.gpa2hva(gpa)
        event = hit(pagemap.physical(guest.pid, hva))
        assert not event.tasks
        assert not event.flags & UNSURE
        (g,) = event.guests
        assert (g.pid, g.gpa, g.hva, g.len, g.kvm, g.vm_id) == (guest.pid, None, hva, PAGE, False, 0)


@pytest.mark.amd
def test_guest_that_ends_is_no_harm(injector: Injector) -> None:
    """Hits without pause while guests come and go; the kernel's log is checked by the runner."""
    right = 0
    for n in range(6):
        with ExitStack() as stack:
            guest = start(stack, f"end{n}", mem=32 << 20)
            gpa = 0x100000 + n * PAGE
            phys, pid = guest.gpa2hpa(gpa), guest.pid
            ender = threading.Timer(0.2 + 0.1 * n, guest.kill)
            ender.start()
            while ender.is_alive():
                event = injector.hit(phys)
                right += [(g.pid, g.gpa) for g in event.guests] == [(pid, gpa)]
            assert pid not in {g.pid for g in injector.hit(phys).guests}
    assert right >= 6


# -- any VMM -------------------------------------------------------------------


@pytest.mark.amd
def test_vmm_that_is_not_qemu(hit: Hit, holder: Holder) -> None:
    va = touched(holder, 16)
    holder.vm_slot(holder.vm(), 3, 0x1_0000_0000, 8 * PAGE, va)
    event = hit(holder.phys(va + 5 * PAGE))
    assert not event.tasks
    assert not event.flags & UNSURE
    (g,) = event.guests
    assert (g.pid, g.kvm, g.gpa, g.slot) == (holder.pid, True, 0x1_0000_5000, 3)
    # Beyond the slot.
    (g,) = hit(holder.phys(va + 9 * PAGE)).guests
    assert (g.pid, g.kvm, g.gpa, g.hva) == (holder.pid, True, None, va + 9 * PAGE)


@pytest.mark.amd
def test_both_address_spaces_and_aliases(hit: Hit, holder: Holder) -> None:
    va = touched(holder, 16)
    vm = holder.vm()
    holder.vm_slot(vm, 1, 0x10_0000, 16 * PAGE, va)
    holder.vm_slot(vm, 2, 0x8000_0000, 4 * PAGE, va + 4 * PAGE)
    holder.vm_slot(vm, 1 << 16 | 1, 0x10_0000, 16 * PAGE, va)
    holder.vm_slot(vm, 1 << 16 | 2, 0xA_0000, 2 * PAGE, va + 4 * PAGE)
    event = hit(holder.phys(va + 5 * PAGE))
    assert {(g.gpa, g.slot) for g in event.guests} == {
        (0x10_5000, 1), (0x8000_1000, 2), (0xA_1000, 1 << 16 | 2)
    }  # fmt: skip
    assert len({g.vm_id for g in event.guests}) == 1


@pytest.mark.amd
def test_two_vms_in_one_process(hit: Hit, holder: Holder) -> None:
    va = touched(holder, 16)
    holder.vm_slot(holder.vm(), 0, 0, 8 * PAGE, va)
    holder.vm_slot(holder.vm(), 0, 0x5000_0000, 16 * PAGE, va)
    event = hit(holder.phys(va + PAGE))
    assert {g.gpa for g in event.guests} == {PAGE, 0x5000_1000}
    assert len({g.vm_id for g in event.guests}) == 2
    (g,) = hit(holder.phys(va + 9 * PAGE)).guests
    assert g.gpa == 0x5000_9000


@pytest.mark.amd
def test_vm_of_a_thread_with_files_of_its_own(hit: Hit, holder: Holder) -> None:
    va = touched(holder, 4)
    holder.vm_of_thread(0, 0x7000, 4 * PAGE, va)
    (g,) = hit(holder.phys(va + PAGE)).guests
    assert (g.pid, g.gpa) == (holder.pid, 0x8000)


@pytest.mark.amd
def test_vm_file_of_another_process(hit: Hit, holder: Holder) -> None:
    """A child that inherited the file is not the VM's process: KVM maps its parent's memory."""
    va = touched(holder, 4)
    holder.vm_slot(holder.vm(), 0, 0, 4 * PAGE, va)
    with holder.fork() as child:
        event = hit(holder.phys(va))
        assert [(g.pid, g.gpa) for g in event.guests] == [(holder.pid, 0)]
        assert [t.pid for t in event.tasks] == [child.pid]


@pytest.mark.amd
def test_range_across_two_slots(hit: Hit, holder: Holder) -> None:
    va = huge(holder)
    vm = holder.vm()
    holder.vm_slot(vm, 0, 0x0, 12 * PAGE, va)
    holder.vm_slot(vm, 1, 0x100_0000, 8 * PAGE, va + 12 * PAGE)
    event = hit(holder.phys(va + 8 * PAGE), 8 * PAGE)
    assert {(g.hva, g.gpa, g.len) for g in event.guests} == {
        (va + 8 * PAGE, 8 * PAGE, 4 * PAGE),
        (va + 12 * PAGE, 0x100_0000, 4 * PAGE),
    }
