# SPDX-License-Identifier: MIT
"""The judge of the races finds each kind of wrong name, and lets no right one pass for wrong."""

from __future__ import annotations

import pytest
from verdict import MIB, Claim, Hit, Name, Verdict, judge

from hwerr_notify import Source

AT = 0x7F0000000000
HELD, GONE, SISTER, STRANGER, MERGED, ALIKE, GUEST, WHOLE, LATER = range(9)
# pid, family, va, len, may_begin, must_begin, must_end, may_end
CLAIMS = {
    HELD: Claim(10, 1, AT, 0x8000, 1, 2, 0, 0),
    GONE: Claim(11, 1, AT, 0x8000, 1, 2, 50, 0),
    SISTER: Claim(12, 1, AT, 0x8000, 1, 2, 0, 0),
    STRANGER: Claim(20, 2, AT, 0x8000, 1, 2, 0, 0),
    MERGED: Claim(30, 6, AT, 0x8000, 1, 2, 0, 0, merges=True),
    ALIKE: Claim(31, 7, AT, 0x8000, 1, 2, 0, 0, merges=True),
    GUEST: Claim(40, 1000, AT, 8 * MIB, 1, 2, 0, 0, merges=True, ram=True),
    WHOLE: Claim(40, 1001, 0, 1 << 47, 1, 0, 0, 0, merges=True),
    LATER: Claim(13, 1, AT, 0x8000, 300, 301, 0, 0),
}
FRAME, OTHER = 77, 78


def told(target: int, *named: Name, va: int = AT, unsure: bool = False, after: int = FRAME) -> Verdict:
    """The verdict on one error."""
    return judge([Hit(100, 200, target, va, FRAME, after, Source.MCE, named, unsure)], CLAIMS)


def owner(pid: int, va: int = AT, pfn: int | None = FRAME) -> Name:
    return Name(pid, va, pfn)


def of_guest(gpa: int | None, va: int) -> Name:
    return Name(40, va, FRAME, True, gpa)


def clean(verdict: Verdict) -> bool:
    return not (verdict.wrong or verdict.silent or verdict.unproven)


def test_who_had_it_may_be_named() -> None:
    assert clean(told(HELD, owner(10), owner(11), owner(12)))
    assert clean(told(HELD, unsure=True))
    # KSM: another family's, and a guest's, at any place of its process.
    assert clean(told(MERGED, owner(30), owner(31), of_guest(2 * MIB, AT + 2 * MIB), of_guest(None, 0x1000)))
    # And whose frame nobody can ask for any more, as it has ended.
    assert clean(told(MERGED, owner(30), owner(31, pfn=None)))
    # Gone meanwhile: a sister that had the place, and whoever has the frame now.
    assert clean(told(GONE, owner(12, pfn=OTHER), owner(20), owner(99), after=OTHER))


@pytest.mark.parametrize(
    "name", [owner(20), owner(99), owner(10, AT + 0x8000), owner(13), of_guest(None, AT)], ids=str
)
def test_a_wrong_name_of_a_page_that_was_held(name: Name) -> None:
    """A stranger, nobody, a place that it does not have, one that was not yet, a guest."""
    assert len(told(HELD, owner(10), name).wrong) == 1


@pytest.mark.parametrize("name", [owner(20, pfn=OTHER), owner(99, pfn=None), owner(13, pfn=None)], ids=str)
def test_a_wrong_name_of_a_page_that_was_not_held(name: Name) -> None:
    """One that has an address like it, but is no relative, and has another frame there."""
    assert len(told(GONE, owner(12), name, after=OTHER).unproven) == 1


def test_who_had_it_and_is_not_named() -> None:
    assert len(told(HELD).silent) == 1
    assert len(told(HELD, owner(12)).silent) == 1
    assert len(told(HELD, owner(10, AT + 0x1000)).silent) == 1


def test_a_guest_is_named_as_one_with_its_address() -> None:
    va = AT + 3 * MIB
    fine = told(GUEST, of_guest(3 * MIB, va), va=va)
    assert clean(fine)
    assert (fine.guests, fine.placed) == (1, 1)
    assert len(told(GUEST, of_guest(3 * MIB + 0x1000, va), va=va).wrong) == 1
    assert len(told(GUEST, owner(40, va), va=va).silent) == 1
    assert len(told(GUEST, of_guest(None, va), va=va).silent) == 1
    # Where ROM may lie over memory, its address does not tell.
    assert not told(GUEST, of_guest(5, AT + 0xC0000), va=AT).wrong


def test_the_address_is_judged_whoever_was_hit() -> None:
    va = AT + 3 * MIB
    assert len(told(GONE, of_guest(4 * MIB, va), after=OTHER).wrong) == 1
