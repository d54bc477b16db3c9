"""Address spaces: who is one, what is known of it, and that nothing of it is left when it is gone."""

from __future__ import annotations

import pytest

from memtier_engine.model import PAGE_BYTES, Kept, PageChunk, ProcessId, Why
from memtier_engine.pages.ages import NOT_RESIDENT, AgeClock, ProcessPages
from memtier_engine.pages.space import KEPT_S, AddressSpace, Spaces
from support.fakes import PROCESS, chunk, pages_of, spans

A, B, C = ProcessId(10, 5), ProcessId(11, 6), ProcessId(12, 7)


def spaces() -> Spaces:
    return Spaces(ProcessPages)


def space(pages: int = 10) -> AddressSpace:
    found = AddressSpace(PROCESS, frozenset((PROCESS,)), ProcessPages(PROCESS))
    found.pages.set_spans(spans((0, pages)))
    clock = AgeClock()
    clock.begin_scan(0.0)
    found.pages.update(chunk(0, [0] * pages), clock.step_table())
    return found


def test_processes_of_one_mm_are_one_space_reached_by_the_oldest() -> None:
    known = spaces()
    (one,), gone = known.follow([(B, A)])
    assert (one.process, one.members, gone) == (A, frozenset((A, B)), [])
    assert known.get(B) is one
    assert B in known
    assert known.processes == {A}


def test_a_space_outlives_the_process_it_was_reached_by() -> None:
    known = spaces()
    (before,), _ = known.follow([(A, B)])
    (after,), gone = known.follow([(B,)])
    assert after is before
    assert (after.process, after.pages.process, gone) == (B, B, [])
    assert known.get(A) is None


def test_one_that_has_no_process_left_is_gone() -> None:
    known = spaces()
    known.follow([(A,), (B,)])
    (left,), gone = known.follow([(B,)])
    assert left.process == B
    assert [space.process for space in gone] == [A]
    assert A not in known


def test_two_that_part_are_two_spaces_and_one_of_them_begins_anew() -> None:
    """After an exec the child of a vfork has memory of its own."""
    known = spaces()
    (shared,), _ = known.follow([(A, B)])
    found, gone = known.follow([(A,), (B,)])
    assert {space.process for space in found} == {A, B}
    assert shared in found
    assert gone == []
    assert known.get(A) is not known.get(B)


def test_pages_are_offered_once_they_were_looked_at() -> None:
    known = spaces()
    (one,), _ = known.follow([(A,)])
    assert known.pages == {}
    one.seen = True
    assert known.pages == {A: one.pages}


def test_forgetting_leaves_nothing() -> None:
    known = spaces()
    (one, _), _ = known.follow([(A, B), (C,)])
    known.forget(one)
    assert (known.get(A), known.get(B), len(known)) == (None, None, 1)


def test_what_cannot_go_is_left_out_until_it_is_time_to_try_again() -> None:
    one = space()
    one.keep(Kept(Why.LOCKED, spans((0, 4))), 100.0)
    assert pages_of(one.pages.select(leave_kept=True)) == [(4, 10)]
    assert pages_of(one.pages.select()) == [(0, 10)]
    assert one.kept_bytes() == {Why.LOCKED: 4 * PAGE_BYTES}
    one.retry(100.0 + KEPT_S[Why.LOCKED] - 1)
    assert one.kept_bytes() == {Why.LOCKED: 4 * PAGE_BYTES}
    one.retry(100.0 + KEPT_S[Why.LOCKED])
    assert pages_of(one.pages.select(leave_kept=True)) == [(0, 10)]


def test_each_try_in_vain_doubles_the_wait_and_a_success_forgets_it() -> None:
    one, wait_s = space(), KEPT_S[Why.LOCKED]
    now_s, waits = 0.0, []
    for _ in range(3):
        one.keep(Kept(Why.LOCKED, spans((0, 1))), now_s)
        began_s = now_s
        while one.kept_bytes():
            now_s += 1
            one.retry(now_s)
        waits.append(now_s - began_s)
    assert waits == [wait_s, 2 * wait_s, 4 * wait_s]
    for _ in range(10_000):  # nothing is kept any more
        now_s += 1
        one.retry(now_s)
    one.keep(Kept(Why.LOCKED, spans((0, 1))), now_s)
    one.retry(now_s + wait_s)
    assert one.kept_bytes() == {}


@pytest.mark.parametrize("why", [Why.NO_ROOM, Why.SHARED, Why.LOCKED])
def test_no_wait_grows_without_end(why: Why) -> None:
    """Swap turned on, and a child that saved its parent's data, show within minutes however long it was in vain."""
    one, now_s, most_s = space(), 0.0, 0.0
    for _ in range(12):
        one.keep(Kept(why, spans((0, 1))), now_s)
        began_s = now_s
        while one.kept_bytes():
            now_s += 1
            one.retry(now_s)
        most_s = now_s - began_s
    assert most_s == {Why.NO_ROOM: 60.0, Why.SHARED: 300.0}.get(why, 3600.0)


def test_reasons_do_not_wait_for_each_other() -> None:
    one = space()
    one.keep(Kept(Why.LOCKED, spans((0, 2))), 0.0)
    one.keep(Kept(Why.BUSY, spans((2, 5))), 0.0)
    one.retry(KEPT_S[Why.BUSY])
    assert one.kept_bytes() == {Why.LOCKED: 2 * PAGE_BYTES}


def test_what_was_touched_is_young_and_what_is_absent_is_no_candidate() -> None:
    one, clock = space(), AgeClock()
    for second in range(4):
        clock.begin_scan(second)
        one.pages.update(chunk(0, [0] * 10), clock.step_table())
    one.keep(Kept(Why.TOUCHED, spans((0, 3))), 0.0)
    one.keep(Kept(Why.ABSENT, spans((8, 10))), 0.0)
    idle = one.pages.ages[4:6].tolist()
    one.keep(Kept(Why.HUGE, spans((4, 6))), 0.0)
    assert one.pages.ages[4:6].tolist() == idle, "asked for again, with the rest of its huge page"
    assert one.pages.ages[:3].tolist() == [0, 0, 0]
    assert one.pages.ages[8:].tolist() == [NOT_RESIDENT, NOT_RESIDENT]
    assert one.kept_bytes() == {}


def test_a_page_that_is_gone_is_not_kept_any_more() -> None:
    one, clock = space(), AgeClock()
    one.keep(Kept(Why.LOCKED, spans((0, 4))), 0.0)
    clock.begin_scan(1.0)
    one.pages.update(chunk(0, [0] * 10, [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]), clock.step_table())
    assert one.kept_bytes() == {Why.LOCKED: 2 * PAGE_BYTES}


def tagged(tags: list[int], resident: list[int] | None = None) -> PageChunk:
    import numpy as np

    seen = chunk(0, [0] * len(tags), resident)
    return PageChunk(seen.start, seen.accessed, seen.resident, tags=np.array(tags, np.uint8))


def test_an_age_belongs_to_the_page_not_to_the_address() -> None:
    """mremap(2) puts pages in use where idle ones were; munmap and mmap put new ones there."""
    own, clock = ProcessPages(PROCESS), AgeClock()
    own.set_spans(spans((0, 3)))
    for second in range(5):
        clock.begin_scan(second)
        own.update(tagged([7, 8, 9]), clock.step_table())
    before = own.ages.tolist()
    assert min(before) > 0
    clock.begin_scan(5)
    own.update(tagged([7, 200, 9]), clock.step_table())
    assert own.ages.tolist() == [before[0] + 1, 0, before[2] + 1]


def test_what_we_paged_out_and_was_freed_is_not_out_any_more() -> None:
    import numpy as np

    from memtier_engine.pages.ages import PAGED_OUT

    own, clock = ProcessPages(PROCESS), AgeClock()
    own.set_spans(spans((0, 3)))
    own.ages[:] = PAGED_OUT
    clock.begin_scan(1)
    absent = np.zeros(3, np.bool_)
    swapped = np.array([True, False, True])
    own.update(PageChunk(int(own.spans.starts[0]), absent, absent, swapped=swapped), clock.step_table())
    assert own.ages.tolist() == [PAGED_OUT, NOT_RESIDENT, PAGED_OUT]
