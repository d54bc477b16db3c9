"""Regions: how mappings are cut, what is counted in each, and ranges that overlap."""

from __future__ import annotations

import numpy as np
import pytest

from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, PageChunk, Spans
from memtier_engine.pages.regions import Counters, RegionCounters, flatten
from support.fakes import BASE, PROCESS, chunk, pages_of, spans


def regions_of(counters: Counters) -> list[tuple[int, int]]:
    return pages_of(Spans(counters.starts, counters.ends))


def table(*rows: tuple[int, int, int, int]) -> Counters:
    """Rows of (first page, last page + 1, accesses, writes)."""
    columns = np.array(rows, np.int64).reshape(-1, 4)
    where = [(int(row[0]), int(row[1])) for row in rows]
    found = np.array(where, np.uint64).reshape(-1, 2) * np.uint64(PAGE_BYTES) + np.uint64(BASE)
    return Counters(found[:, 0].copy(), found[:, 1].copy(), columns[:, 2].copy(), columns[:, 3].copy())


def rows_of(counters: Counters) -> list[tuple[int, int, int, int]]:
    pairs = regions_of(counters)
    return [
        (*pair, accesses, writes)
        for pair, accesses, writes in zip(pairs, counters.accesses.tolist(), counters.writes.tolist(), strict=True)
    ]


def test_regions_are_cut_from_the_start_of_each_mapping() -> None:
    """The last piece of a mapping is shorter; mappings that touch are still two."""
    counters = RegionCounters(4)
    counters.begin(PROCESS, spans((0, 10), (10, 12), (20, 24)))
    assert regions_of(counters.of(PROCESS)) == [(0, 4), (4, 8), (8, 10), (10, 12), (20, 24)]


def test_pages_seen_accessed_add_up_over_scans_until_reset() -> None:
    counters = RegionCounters(4)
    for _ in range(2):
        counters.begin(PROCESS, spans((0, 6)))
        counters.add(PROCESS, chunk(0, [1, 1, 0, 0, 0, 1]))
    assert counters.of(PROCESS).accesses.tolist() == [4, 2]
    counters.reset()
    assert counters.of(PROCESS).accesses.tolist() == [0, 0]


def test_one_scan_adds_no_more_than_the_cap_even_over_chunk_borders() -> None:
    """maxcountperregion counts per scan, not per chunk: a chunk border may lie inside a region."""
    counters = RegionCounters(4, max_count_per_region=2)
    for _ in range(2):
        counters.begin(PROCESS, spans((0, 8)))
        counters.add(PROCESS, chunk(0, [1, 1]))
        counters.add(PROCESS, chunk(2, [1, 1, 1, 0, 0, 0]))
    assert counters.of(PROCESS).accesses.tolist() == [4, 2]


def test_shared_pages_are_not_counted() -> None:
    counters = RegionCounters(4)
    counters.begin(PROCESS, spans((0, 4)))
    counters.add(PROCESS, chunk(0, [1, 1, 1, 0], movable=[1, 0, 1, 1]))
    assert counters.of(PROCESS).accesses.tolist() == [2]


def test_writes_are_counted_apart_and_once_where_the_tracker_sees_nothing_else() -> None:
    seen = np.array([1, 0, 1, 0], np.bool_)
    both = PageChunk(BASE, np.ones(4, np.bool_), np.ones(4, np.bool_), written=seen)
    for writes_only, accesses in ((False, 4), (True, 0)):
        counters = RegionCounters(4, writes_only=writes_only)
        counters.begin(PROCESS, spans((0, 4)))
        counters.add(PROCESS, both)
        found = counters.of(PROCESS)
        assert (found.accesses.tolist(), found.writes.tolist()) == ([accesses], [2])


def test_rates_count_for_what_they_are() -> None:
    """A tracker that samples regions spreads its count over the pages; the region gets it back whole."""
    counters = RegionCounters(512)
    counters.begin(PROCESS, spans((0, 1024)))
    rates = np.full(1024, 7 / 512, np.float32)
    counters.add(PROCESS, PageChunk(BASE, rates > 0, rates > 0, rates=rates))
    assert counters.of(PROCESS).accesses.tolist() == [7, 7]


def test_counters_follow_their_region_and_die_with_it() -> None:
    """A mapping that grew keeps whole regions; one that went away leaves nothing behind."""
    counters = RegionCounters(4)
    counters.begin(PROCESS, spans((0, 8), (20, 24)))
    counters.add(PROCESS, chunk(0, [1] * 8))
    counters.add(PROCESS, chunk(20, [1] * 4))
    counters.begin(PROCESS, spans((0, 14)))
    assert rows_of(counters.of(PROCESS)) == [(0, 4, 4, 0), (4, 8, 4, 0), (8, 12, 0, 0), (12, 14, 0, 0)]
    counters.keep([])
    assert counters.processes() == frozenset()


def test_large_mappings_in_many_chunks_count_every_page_once() -> None:
    pages = CHUNK_PAGES + 1000
    rng = np.random.default_rng(1)
    touched = rng.random(pages) < 0.3
    counters = RegionCounters(1000)  # does not divide a chunk
    counters.begin(PROCESS, spans((0, pages)))
    for first in range(0, pages, CHUNK_PAGES):
        part = touched[first : first + CHUNK_PAGES]
        counters.add(PROCESS, PageChunk(BASE + first * PAGE_BYTES, part, np.ones(len(part), np.bool_)))
    expected = [int(touched[first : first + 1000].sum()) for first in range(0, pages, 1000)]
    assert counters.of(PROCESS).accesses.tolist() == expected


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ([(0, 10, 1, 0), (0, 10, 0, 1)], [(0, 10, 1, 1)]),
        ([(0, 30, 1, 0), (10, 20, 2, 0)], [(0, 10, 1, 0), (10, 20, 3, 0), (20, 30, 1, 0)]),
        ([(0, 20, 1, 0), (10, 30, 2, 0)], [(0, 10, 1, 0), (10, 20, 3, 0), (20, 30, 2, 0)]),
        (
            [(0, 5, 1, 0), (10, 15, 2, 0), (0, 20, 4, 0)],
            [(0, 5, 5, 0), (5, 10, 4, 0), (10, 15, 6, 0), (15, 20, 4, 0)],
        ),
        (
            [(0, 5, 1, 0), (3, 15, 2, 0), (4, 24, 4, 0)],
            [(0, 3, 1, 0), (3, 4, 3, 0), (4, 5, 7, 0), (5, 15, 6, 0), (15, 24, 4, 0)],
        ),
        # Neighbours that only touch do not overlap: no piece of length 0 with everybody's counts.
        (
            [(0, 10, 1, 0), (10, 20, 2, 0), (0, 10, 0, 1), (10, 20, 0, 2)],
            [(0, 10, 1, 1), (10, 20, 2, 2)],
        ),
        (
            [(0, 10, 1, 0), (10, 20, 2, 0), (20, 30, 4, 0), (0, 10, 0, 1), (10, 20, 0, 2), (20, 30, 0, 4)],
            [(0, 10, 1, 1), (10, 20, 2, 2), (20, 30, 4, 4)],
        ),
        ([(3, 3, 9, 9), (0, 2, 1, 0), (5, 6, 1, 0)], [(0, 2, 1, 0), (5, 6, 1, 0)]),
        ([], []),
    ],
)
def test_overlapping_ranges_become_pieces_with_summed_counts(
    inputs: list[tuple[int, int, int, int]], expected: list[tuple[int, int, int, int]]
) -> None:
    assert rows_of(flatten([table(*inputs)])) == expected


def test_flattening_random_ranges_equals_counting_page_by_page() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        first = rng.integers(0, 60, 12)
        rows = [(int(a), int(a + n), int(x), int(y)) for a, n, x, y in zip(first, *rng.integers(0, 9, (3, 12)))]  # noqa: B905
        found = flatten([table(*rows)])
        per_page = np.zeros((2, 100), int)
        for start, end, accesses, writes in rows:
            per_page[0, start:end] += accesses
            per_page[1, start:end] += writes
        seen = np.zeros((2, 100), int)
        for start, end, accesses, writes in rows_of(found):
            assert end > start
            seen[0, start:end] += accesses
            seen[1, start:end] += writes
        assert np.array_equal(per_page, seen)
