"""What trackers share: chunks, and pages seen for the first time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtier_engine.errors import ConfigError, TrackerUnavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, ProcessId, Spans, Tracker
from memtier_engine.trackers import registry
from memtier_engine.trackers.common import FirstSight, cut, mark_new
from memtier_engine.trackers.words import page_numbers, read_words
from support.fakes import BASE, PROCESS, FakeTracker, pages_of, spans

LAYOUT = st.lists(st.tuples(st.integers(0, 1500), st.integers(1, 3000)), min_size=1, max_size=30)


def laid_out(gaps_and_lengths: list[tuple[int, int]]) -> Spans:
    ranges, at = [], 0
    for gap, length in gaps_and_lengths:
        ranges.append((at + gap, at + gap + length))
        at += gap + length
    return spans(*ranges)


def test_chunks_are_bounded_and_stay_within_their_span() -> None:
    found = list(cut(spans((0, CHUNK_PAGES + 3), (CHUNK_PAGES + 10, CHUNK_PAGES + 11))))
    assert [pages_of(pieces) for pieces in found] == [
        [(0, CHUNK_PAGES)],
        [(CHUNK_PAGES, CHUNK_PAGES + 3), (CHUNK_PAGES + 10, CHUNK_PAGES + 11)],
    ]


@settings(deadline=None)
@given(LAYOUT, st.integers(1, 4000), st.none() | st.integers(1, 9))
def test_chunks_cover_everything_in_order_within_both_limits(
    layout: list[tuple[int, int]], most_pages: int, most_blocks: int | None
) -> None:
    """Pages, and distinct blocks of 2 MiB, in which several spans may lie."""
    whole = laid_out(layout)
    numbers = []
    for pieces in cut(whole, most_pages, most_blocks):
        own = page_numbers(pieces)
        numbers.append(own)
        assert 0 < len(own) <= most_pages
        if most_blocks is not None:
            assert len(np.unique(own // 512)) <= most_blocks
        borders = np.concatenate((whole.starts[1:], whole.ends[:-1]))
        assert not ((borders[:, None] > pieces.starts) & (borders[:, None] < pieces.ends)).any()
    assert np.concatenate(numbers).tolist() == page_numbers(whole).tolist()


def test_a_chunk_ends_between_blocks_where_it_can() -> None:
    """A huge page that is cut could not be cleared as a whole."""
    found = [pages_of(pieces) for pieces in cut(spans((100, 5000)), 1000, 9)]
    assert [last for pieces in found for _, last in pieces] == [1024, 1536, 2048, 2560, 3072, 3584, 4096, 5000]


def test_one_small_span_is_cut_too_where_it_lies_in_more_blocks_than_are_allowed() -> None:
    assert [pages_of(pieces) for pieces in cut(spans((500, 1500)), 1000, 3)] == [[(500, 1500)]]
    found = [pages_of(pieces) for pieces in cut(spans((500, 1500)), 1000, 2)]
    assert found == [[(500, 1024)], [(1024, 1500)]]


def test_a_hundred_thousand_spans_are_cut_in_steps_that_do_not_grow_with_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Per chunk, not per span: 200 000 pages are 4 chunks, and numpy is asked as often as for 4 spans."""
    calls = 0
    search = np.searchsorted

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return search(*args, **kwargs)

    counts = []
    for each in (50_000, 1):
        calls = 0
        starts = np.uint64(BASE) + np.arange(0, 200_000 * 2, 2 * each, dtype=np.uint64) * np.uint64(PAGE_BYTES)
        many = Spans(starts, starts + np.uint64(each * PAGE_BYTES))
        known = Spans(many.starts[:-1], many.ends[:-1])
        monkeypatch.setattr(np, "searchsorted", counting)
        for pieces in cut(many):
            mark_new(np.zeros(int(pieces.pages.sum()), np.bool_), pieces, known)
        monkeypatch.undo()
        counts.append(calls)
    assert counts[1] <= 2 * counts[0]


@settings(deadline=None)
@given(LAYOUT, st.sets(st.integers(0, 60)))
def test_exactly_the_pages_outside_the_known_spans_are_marked(layout: list[tuple[int, int]], blocks: set[int]) -> None:
    whole = laid_out(layout)
    known = spans(*[(first * 700, first * 700 + 300) for first in sorted(blocks)]) if blocks else Spans.empty()
    accessed = np.zeros(int(whole.pages.sum()), np.bool_)
    mark_new(accessed, whole, known)
    within = np.isin(page_numbers(whole), page_numbers(known)) if blocks else np.zeros(len(accessed), np.bool_)
    assert (accessed == ~within).all()


def test_what_the_last_scan_covered_is_not_new() -> None:
    """And costs nothing: there is nothing to mark."""
    seen = FirstSight()
    assert seen.known(PROCESS, spans((0, 4))) is not None
    seen.completed(PROCESS, spans((0, 4)))
    assert seen.known(PROCESS, spans((0, 4))) is None
    seen.forget(PROCESS)
    assert seen.known(PROCESS, spans((0, 4))) is not None


@settings(deadline=None)
@given(LAYOUT)
def test_words_of_many_pieces_come_in_order_whatever_lies_between(layout: list[tuple[int, int]]) -> None:
    """Pieces close to each other are read at once."""

    class Numbers:
        reads = 0

        def read(self, start: int, end: int, out: Any = None) -> Any:
            return np.arange(start // PAGE_BYTES, end // PAGE_BYTES, dtype=np.uint64)

        def read_all(self, pieces: list[tuple[int, int]]) -> Any:
            return np.concatenate([self.read(*piece) for piece in pieces])

    whole = laid_out(layout)
    source: Any = Numbers()
    assert read_words(source, whole).tolist() == page_numbers(whole).tolist()


def test_a_process_that_leaves_is_new_when_it_returns() -> None:
    seen, other = FirstSight(), ProcessId(1, 1)
    seen.completed(PROCESS, spans((0, 4)))
    seen.completed(other, spans((0, 2)))
    seen.keep(frozenset({other}))
    assert len(seen.previous(PROCESS)) == 0
    assert len(seen.previous(other)) == 1


def test_auto_takes_the_first_that_works_and_tells_why_the_others_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(host: Host) -> Tracker:
        raise TrackerUnavailable("no bitmap", hint="boot another kernel")

    monkeypatch.setattr(registry, "TRACKERS", {"one": refuse, "two": lambda host: FakeTracker()})
    monkeypatch.setattr(registry, "AUTO_ORDER", ("one", "two"))
    choice = registry.create_tracker("auto", Host())
    assert isinstance(choice.tracker, FakeTracker)
    assert choice.rejected == (("one", "no bitmap (boot another kernel)"),)


def test_auto_without_any_tracker_lists_all_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(host: Host) -> Tracker:
        raise TrackerUnavailable("no bitmap")

    monkeypatch.setattr(registry, "TRACKERS", {"one": refuse, "two": refuse})
    monkeypatch.setattr(registry, "AUTO_ORDER", ("one", "two"))
    with pytest.raises(TrackerUnavailable, match="one: no bitmap; two: no bitmap"):
        registry.create_tracker("auto", Host())


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"use one of: auto, .*idlepage.*refs.*softdirty"):
        registry.create_tracker("idelpage", Host())
