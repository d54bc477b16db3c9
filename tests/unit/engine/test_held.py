"""What of a process's mappings is looked at: what is there, not what is mapped."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtier_engine.abi.constants import PAGE_IS_PRESENT, PAGE_IS_SWAPPED
from memtier_engine.errors import Unavailable
from memtier_engine.hostfs.held import BLOCK_BYTES, CALLS_MOST, WHOLE_BYTES, by_smaps, held, overlap
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.hostfs.proc import parse_smaps
from memtier_engine.model import PAGE_BYTES, U64, Spans

BASE = 0x7000_0000_0000
TIB = 1 << 40
BLOCK = BLOCK_BYTES


def spans(*pairs: tuple[int, int]) -> Spans:
    table = np.array(pairs, np.uint64).reshape(-1, 2)
    return Spans(table[:, 0].copy(), table[:, 1].copy())


def pairs(found: Spans) -> list[tuple[int, int]]:
    return list(zip(found.starts.tolist(), found.ends.tolist(), strict=True))


class FakePagemap:
    """Says which runs of pages are there, and counts what it is asked."""

    def __init__(self, *there: tuple[int, int]) -> None:
        self.there = spans(*there)
        self.asked: list[tuple[int, int]] = []
        self.categories: list[int] = []

    def scan_runs(self, start: int, end: int, **options: int) -> U64:
        self.asked.append((start, end))
        self.categories.append(options.get("anyof", 0))
        found = overlap(spans((start, end)), self.there)
        return np.column_stack((found.starts, found.ends, np.zeros(len(found), np.uint64)))


def look(pagemap: FakePagemap, mapped: Spans, known_bytes: int = 0) -> Spans:
    return held(cast(Pagemap, pagemap), mapped, known_bytes).spans


def test_what_is_little_in_all_is_taken_whole_and_nobody_is_asked() -> None:
    pagemap = FakePagemap()
    mapped = spans((BASE, BASE + WHOLE_BYTES - PAGE_BYTES), (BASE + TIB, BASE + TIB + PAGE_BYTES))
    assert look(pagemap, mapped) is mapped
    assert pagemap.asked == []


def test_of_a_huge_mapping_the_blocks_that_hold_something_are_left() -> None:
    pages = [(BASE + 5 * BLOCK + PAGE_BYTES, BASE + 5 * BLOCK + 2 * PAGE_BYTES), (BASE + TIB, BASE + TIB + 3 * BLOCK)]
    found = look(FakePagemap(*pages), spans((BASE, BASE + 60 * TIB)))
    assert pairs(found) == [(BASE + 5 * BLOCK, BASE + 6 * BLOCK), (BASE + TIB, BASE + TIB + 3 * BLOCK)]


def test_what_is_in_swap_is_there_as_what_is_in_ram_is() -> None:
    """A block that is all out would be forgotten else, and what comes back of it count for nothing."""
    pagemap = FakePagemap((BASE, BASE + PAGE_BYTES))
    look(pagemap, spans((BASE, BASE + TIB)))
    assert pagemap.categories == [PAGE_IS_PRESENT | PAGE_IS_SWAPPED]


def test_blocks_are_cut_to_their_mapping() -> None:
    start, end = BASE + 3 * PAGE_BYTES, BASE + TIB - 5 * PAGE_BYTES
    there = [(start, start + PAGE_BYTES), (end - PAGE_BYTES, end)]
    found = look(FakePagemap(*there), spans((start, end)))
    assert pairs(found) == [(start, BASE + BLOCK), (BASE + TIB - BLOCK, end)]


def test_small_mappings_beside_a_huge_one_are_taken_whole() -> None:
    small = [(BASE - 10 * BLOCK, BASE - 10 * BLOCK + PAGE_BYTES), (BASE + 2 * TIB, BASE + 2 * TIB + BLOCK)]
    pagemap = FakePagemap((BASE + BLOCK, BASE + BLOCK + PAGE_BYTES))
    found = look(pagemap, spans(small[0], (BASE, BASE + TIB), small[1]))
    assert pairs(found) == [small[0], (BASE + BLOCK, BASE + 2 * BLOCK), small[1]]
    assert pagemap.asked == [(BASE, BASE + TIB)]


def test_a_process_that_uses_what_it_maps_is_not_asked_at_each_scan() -> None:
    mapped = spans((BASE, BASE + (12 << 30)))
    pagemap = FakePagemap((BASE, BASE + (12 << 30)))
    assert look(pagemap, mapped, known_bytes=8 << 30) is mapped
    assert pagemap.asked == []


def test_many_mappings_apart_are_asked_in_one_call() -> None:
    """Or a tenant with 65 530 of them would cost us as many system calls."""
    many = [(BASE + i * 4 * BLOCK, BASE + i * 4 * BLOCK + BLOCK) for i in range(CALLS_MOST + 100)]
    pagemap = FakePagemap(many[7])
    found = look(pagemap, spans(*many))
    assert len(pagemap.asked) == 1
    assert many[7] in pairs(found)


def test_a_mapping_with_nothing_in_it_is_not_looked_at() -> None:
    assert len(look(FakePagemap(), spans((BASE, BASE + 128 * TIB)))) == 0


def test_without_pagemap_scan_smaps_decides_and_says_what_is_left_out() -> None:
    class Old:
        def scan_runs(self, start: int, end: int, **options: int) -> U64:
            raise Unavailable("PAGEMAP_SCAN")

    mapped = spans((BASE, BASE + TIB), (BASE + 2 * TIB, BASE + 2 * TIB + (2 << 30)), (BASE + 3 * TIB, BASE + 4 * TIB))
    with pytest.raises(Unavailable):
        held(cast(Pagemap, Old()), mapped, 0)
    text = "".join(
        f"{start:x}-{end:x} rw-p 00000000 00:00 0 \nRss:   {rss} kB\nSwap:   0 kB\n"
        for (start, end), rss in zip(pairs(mapped), (8192, 1 << 20, 0), strict=True)
    )
    found = held(cast(Pagemap, Old()), mapped, 0, parse_smaps(text.encode()))
    assert pairs(found.spans) == [(BASE + 2 * TIB, BASE + 2 * TIB + (2 << 30))]
    assert pairs(found.left_out) == [(BASE, BASE + TIB)], "8 MiB of 1 TiB; the empty one needs no word"


def test_a_mapping_that_smaps_does_not_know_is_looked_at() -> None:
    kept, left = by_smaps(spans((BASE, BASE + (4 << 30))), parse_smaps(b""))
    assert len(kept) == 1
    assert len(left) == 0


runs = st.lists(st.integers(0, 200), max_size=12, unique=True).map(sorted)


@given(runs, runs)
def test_overlap_is_what_both_have(first: list[int], second: list[int]) -> None:
    def made(edges: list[int]) -> tuple[Spans, set[int]]:
        cut = list(zip(edges[::2], edges[1::2], strict=False))
        return spans(*cut), {page for start, end in cut for page in range(start, end)}

    (own, own_pages), (other, other_pages) = made(first), made(second)
    found = {page for start, end in pairs(overlap(own, other)) for page in range(start, end)}
    assert found == own_pages & other_pages
