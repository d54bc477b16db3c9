"""A chunk may hold several small mappings: to all that take it, it is the same as its parts one by one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from memtier_engine.model import PAGE_BYTES, PageChunk, Spans
from memtier_engine.pages.ages import AGE_MAX, NOT_RESIDENT, PAGED_OUT, AgeClock, ProcessPages, true_runs
from memtier_engine.pages.regions import RegionCounters
from support.fakes import BASE, PROCESS, pages_of, spans

MAPPINGS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=6)


def laid_out(gaps_and_lengths: list[tuple[int, int]]) -> Spans:
    ranges, at = [], 0
    for gap, length in gaps_and_lengths:
        ranges.append((at + gap, at + gap + length))
        at += gap + length
    return spans(*ranges)


def whole(mappings: Spans, seed: int) -> PageChunk:
    """All pages in one chunk, with random bits."""
    chance, pages = np.random.default_rng(seed), int(mappings.pages.sum())
    accessed, resident, written, movable = (chance.random(pages) < share for share in (0.5, 0.8, 0.3, 0.9))
    return PageChunk(int(mappings.starts[0]), accessed & resident, resident, written, movable, spans=mappings)


@given(MAPPINGS, st.integers(0, 1000))
def test_the_parts_are_consecutive_and_carry_all_columns(layout: list[tuple[int, int]], seed: int) -> None:
    mappings = laid_out(layout)
    chunk = whole(mappings, seed)
    parts = list(chunk.parts())
    assert [part.start for part in parts] == mappings.starts.tolist()
    assert [len(part.accessed) for part in parts] == mappings.pages.tolist()
    for name in ("accessed", "resident", "written", "movable"):
        assert np.concatenate([getattr(part, name) for part in parts]).tolist() == getattr(chunk, name).tolist()


@given(MAPPINGS, st.integers(0, 1000))
def test_ages_and_regions_take_it_as_they_take_its_parts(layout: list[tuple[int, int]], seed: int) -> None:
    mappings = laid_out(layout)
    clock = AgeClock()
    clock.begin_scan(1.0)
    together, apart = (ProcessPages(PROCESS, streaks=True, places=True) for _ in range(2))
    sums = []
    for pages, counters in ((together, RegionCounters(4)), (apart, RegionCounters(4))):
        pages.set_spans(mappings)
        pages.ages[:] = np.random.default_rng(seed).integers(0, 256, len(pages.ages), np.uint8)
        chunk = whole(mappings, seed)
        counters.begin(PROCESS, mappings)
        back = 0
        for part in [chunk] if pages is together else chunk.parts():
            back += pages.update(part, clock.step_table())
            counters.add(PROCESS, part)
        found = counters.of(PROCESS)
        sums.append((back, found.accesses.tolist(), found.writes.tolist()))
    assert together.ages.tolist() == apart.ages.tolist()
    assert sums[0] == sums[1]


@given(MAPPINGS, st.integers(0, 1000), st.none() | st.integers(1, 30))
def test_selected_runs_never_reach_over_a_gap(layout: list[tuple[int, int]], seed: int, limit: int | None) -> None:
    """Selecting gives exactly the first wanted pages by address."""
    pages = ProcessPages(PROCESS)
    pages.set_spans(laid_out(layout))
    pages.ages[:] = np.random.default_rng(seed).choice([0, 1, 5, AGE_MAX, PAGED_OUT, NOT_RESIDENT], len(pages.ages))
    found = pages.select(age_from=5, limit_pages=limit)
    wanted = np.flatnonzero((pages.ages >= 5) & (pages.ages <= AGE_MAX))[:limit]
    addresses = (pages.page_numbers(wanted) * np.uint64(PAGE_BYTES) - np.uint64(BASE)) // np.uint64(PAGE_BYTES)
    assert [page for first, last in pages_of(found) for page in range(first, last)] == addresses.tolist()


def test_runs_end_at_borders() -> None:
    mask = np.array([1, 1, 1, 0, 1, 1], np.bool_)
    assert true_runs(mask, np.array([0, 2, 3, 4, 5, 6])).tolist() == [[0, 2], [2, 3], [4, 5], [5, 6]]
    assert true_runs(mask, np.array([], np.int64)).tolist() == [[0, 3], [4, 6]]
