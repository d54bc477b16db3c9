"""Page ages: what the byte stands for, and that it follows mappings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtier_engine.model import CHUNK_PAGES, NOWHERE, PAGE_BYTES, Spans
from memtier_engine.pages.ages import (
    AGE_MAX,
    LINEAR_SCANS,
    MIN_SCANS,
    NOT_RESIDENT,
    PAGED_OUT,
    AgeClock,
    ProcessPages,
    true_runs,
)
from support.fakes import BASE, PROCESS, chunk, pages_of, spans


def aged(*page_ranges: tuple[int, int]) -> tuple[ProcessPages, AgeClock]:
    pages = ProcessPages(PROCESS)
    pages.set_spans(spans(*page_ranges))
    return pages, AgeClock()


def scan(pages: ProcessPages, clock: AgeClock, now_s: float, accessed: list[int], **columns: list[int]) -> int:
    clock.begin_scan(now_s)
    return pages.update(chunk(0, accessed, **columns), clock.step_table())


def test_a_page_ages_by_one_scan_at_a_time_and_is_young_again_when_touched() -> None:
    pages, clock = aged((0, 3))
    for second in range(5):
        scan(pages, clock, second, [1, 0, second == 3])
    # Page 1 was new at the first scan: new means touched.
    assert pages.ages.tolist() == [0, 4, 1]


@given(st.integers(0, 3000), st.integers(1, 9000))
def test_an_age_never_stands_for_more_scans_than_passed(first_touch: int, silent: int) -> None:
    """Too early would page out hot memory; too late, by at most a sixth, only costs time."""
    clock = AgeClock()
    age = np.zeros(1, np.uint8)
    clock.scans = first_touch
    for _ in range(silent):
        clock.begin_scan(0.0)
        age = clock.step_table()[age]
    stands_for = int(MIN_SCANS[age[0]])
    assert stands_for <= silent
    if silent <= LINEAR_SCANS:
        assert stands_for == silent
    elif silent < MIN_SCANS[AGE_MAX]:
        assert stands_for >= silent * 5 // 6


def test_the_least_age_for_a_duration_follows_the_real_scan_times() -> None:
    """Scans may be late: age 2 means 30 s here, not two intervals."""
    clock = AgeClock()
    for now_s in (0.0, 10.0, 30.0, 40.0):
        clock.begin_scan(now_s)
    assert clock.least_age(0.0) == 0
    assert clock.least_age(10.0) == 1
    assert clock.least_age(10.5) == 2
    assert clock.least_age(40.0) == 3
    assert clock.least_age(40.5) is None


def test_a_pause_between_two_scans_counts_for_three_intervals() -> None:
    """Nobody knows what a stopped engine did not see. Longer windows up to that count as they are."""
    clock = AgeClock()
    for now_s in (0.0, 5.0, 3605.0, 3617.0):
        clock.begin_scan(now_s, interval_s=5.0)
    assert clock.idle_s()[:4].tolist() == [0.0, 12.0, 27.0, 32.0]
    assert clock.now_s == 3617.0
    assert clock.least_age(33.0) is None


def test_a_clock_set_back_makes_no_page_younger_or_older() -> None:
    clock = AgeClock()
    for now_s in (1000.0, 1005.0, 10.0, 15.0):
        clock.begin_scan(now_s, interval_s=5.0)
    assert clock.idle_s()[:4].tolist() == [0.0, 5.0, 5.0, 10.0]


def test_what_we_paged_out_and_the_process_freed_is_no_longer_out() -> None:
    """MADV_DONTNEED drops the swap slot: neither in RAM nor in swap. Where swap is not known it stays out."""
    pages, clock = aged((0, 4))
    scan(pages, clock, 0, [0] * 4)
    pages.ages[:3] = PAGED_OUT
    seen = replace(chunk(0, [0] * 4, [0, 0, 1, 0]), swapped=np.array([True, False, False, False]))
    clock.begin_scan(1)
    assert pages.update(seen, clock.step_table()) == 1
    assert pages.ages.tolist() == [PAGED_OUT, NOT_RESIDENT, 0, NOT_RESIDENT]
    pages.ages[:] = PAGED_OUT
    pages.update(replace(seen, swapped=None), clock.step_table())
    assert pages.ages.tolist() == [PAGED_OUT, PAGED_OUT, 0, PAGED_OUT]


def test_absent_pages_have_no_age_and_begin_at_zero_when_they_come() -> None:
    pages, clock = aged((0, 2))
    scan(pages, clock, 0, [0, 0], resident=[1, 0])
    scan(pages, clock, 1, [0, 0], resident=[1, 0])
    assert pages.ages.tolist() == [1, NOT_RESIDENT]
    scan(pages, clock, 2, [0, 0])
    assert pages.ages.tolist() == [2, 0]


def test_a_page_we_put_out_stays_marked_until_it_returns_and_then_counts_as_refault() -> None:
    pages, clock = aged((0, 3))
    scan(pages, clock, 0, [0, 0, 0])
    pages.set_age(spans((0, 2)), PAGED_OUT)
    assert scan(pages, clock, 1, [0, 0, 0], resident=[0, 0, 1]) == 0
    assert pages.ages.tolist() == [PAGED_OUT, PAGED_OUT, 1]
    assert scan(pages, clock, 2, [0, 0, 0], resident=[1, 0, 1]) == 1
    assert pages.ages.tolist() == [0, PAGED_OUT, 2]


def test_shared_pages_never_become_candidates() -> None:
    pages, clock = aged((0, 2))
    for second in range(3):
        scan(pages, clock, second, [0, 0], movable=[1, 0])
    assert pages_of(pages.select(age_from=1)) == [(0, 1)]


def test_ages_follow_mappings_that_grow_shrink_split_and_move_in_the_table() -> None:
    pages, clock = aged((0, 8), (100, 104))
    clock.begin_scan(0)
    pages.ages[:] = np.arange(12)
    pages.set_spans(spans((2, 4), (6, 10), (50, 51), (100, 104)))
    gone = NOT_RESIDENT
    assert pages.ages.tolist() == [2, 3, 6, 7, gone, gone, gone, 8, 9, 10, 11]


@given(st.data())
def test_every_address_mapped_before_and_after_keeps_its_age(data: st.DataObject) -> None:
    def random_spans() -> list[tuple[int, int]]:
        cuts = sorted(data.draw(st.sets(st.integers(0, 60), max_size=12)))
        return [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]

    before, after = random_spans(), random_spans()
    pages = ProcessPages(PROCESS)
    pages.set_spans(spans(*before) if before else Spans.empty())
    old = [page for a, b in before for page in range(a, b)]
    pages.ages[:] = np.array(old, np.uint8)
    pages.set_spans(spans(*after) if after else Spans.empty())
    new = [page for a, b in after for page in range(a, b)]
    assert pages.ages.tolist() == [page if page in old else NOT_RESIDENT for page in new]


def test_selection_joins_runs_over_chunk_borders_and_obeys_its_limit() -> None:
    pages, _ = aged((0, CHUNK_PAGES + 10))
    pages.ages[:] = 0
    pages.ages[CHUNK_PAGES - 5 : CHUNK_PAGES + 5] = 9
    pages.ages[3:5] = 9
    assert pages_of(pages.select(age_from=9)) == [(3, 5), (CHUNK_PAGES - 5, CHUNK_PAGES + 5)]
    assert pages_of(pages.select(age_from=9, limit_pages=4)) == [(3, 5), (CHUNK_PAGES - 5, CHUNK_PAGES - 3)]
    assert pages_of(pages.select(age_from=9, limit_pages=0)) == []


@given(st.lists(st.booleans(), max_size=70), st.integers(0, 80))
def test_selection_finds_exactly_the_first_matching_pages(mask: list[bool], limit: int) -> None:
    pages, _ = aged((0, max(1, len(mask))))
    pages.ages[:] = 0
    pages.ages[: len(mask)] = np.array(mask, np.uint8) * 7
    wanted = [page for page, is_set in enumerate(mask) if is_set][:limit]
    found = [page for a, b in pages_of(pages.select(age_from=7, limit_pages=limit)) for page in range(a, b)]
    assert found == wanted


def test_region_counts_cut_each_mapping_from_its_start() -> None:
    pages, _ = aged((0, 5), (10, 12))
    pages.ages[:] = [0, 9, 0, 0, 9, 0, 9]
    assert pages.region_counts(1, pages_in_region=2).tolist() == [1, 2, 0, 1]


def test_an_address_outside_all_mappings_is_refused() -> None:
    pages, _ = aged((0, 2), (5, 6))
    assert pages.index_of(BASE + 5 * PAGE_BYTES) == 2
    with pytest.raises(KeyError, match="no tracked mapping"):
        pages.index_of(BASE + 3 * PAGE_BYTES)


def test_streaks_count_scans_in_a_row() -> None:
    pages = ProcessPages(PROCESS, streaks=True)
    pages.set_spans(spans((0, 2)))
    clock = AgeClock()
    for touched in ([1, 1], [1, 0], [1, 1]):
        scan(pages, clock, 0, touched)
    assert pages.streaks is not None
    assert pages.streaks.tolist() == [3, 1]


@given(st.lists(st.booleans(), max_size=50))
def test_true_runs_are_maximal_and_complete(mask: list[bool]) -> None:
    runs = true_runs(np.array(mask, np.bool_))
    rebuilt = [False] * len(mask)
    for first, last in runs.tolist():
        assert first < last
        assert first == 0 or not mask[first - 1]
        assert last == len(mask) or not mask[last]
        rebuilt[first:last] = [True] * (last - first)
    assert rebuilt == mask


def test_a_page_that_a_move_left_behind_is_asked_for_again() -> None:
    """What is known to be on the node is not; where the node was full, or a page busy, nothing is known."""
    pages = ProcessPages(PROCESS, places=True)
    pages.set_spans(spans((0, 10)))
    clock = AgeClock()
    for second in range(3):
        scan(pages, clock, second, [0] * 10)
    pages.set_place(spans((0, 8)), 2)
    assert pages_of(pages.select(age_from=1, not_on_node=2)) == [(8, 10)]
    pages.set_place(spans((3, 5)), NOWHERE)
    assert pages_of(pages.select(age_from=1, not_on_node=2)) == [(3, 5), (8, 10)]


def test_a_share_of_the_pages_is_drawn_from_all_over_them_and_always_the_same() -> None:
    """In pieces of 32 pages; a larger share holds all of a smaller one."""
    pages = ProcessPages(PROCESS)
    pages.set_spans(spans((0, 200_000), (300_000, 400_000)))
    pages.ages[:] = 9
    drawn: list[set[int]] = []
    for share in (0.1, 0.3, 0.3, 1.0):
        found = pages.select(age_from=5, share=share)
        drawn.append({page for first, last in pages_of(found) for page in range(first, last)})
        assert len(drawn[-1]) == pytest.approx(share * 300_000, rel=0.1)
    assert drawn[0] < drawn[1] == drawn[2] < drawn[3]
    for first in range(0, 200_000, 20_000):
        assert len([page for page in drawn[1] if first <= page < first + 20_000]) == pytest.approx(6000, rel=0.2)


def test_of_a_share_as_many_pages_are_taken_as_are_wanted() -> None:
    pages = ProcessPages(PROCESS)
    pages.set_spans(spans((0, 10_000)))
    pages.ages[:5000] = 9
    assert int(pages.select(age_from=5, share=0.5, limit_pages=100).pages.sum()) == 100
