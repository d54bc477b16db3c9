"""What trackers share: chunks, and pages seen for the first time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtier_engine.errors import ConfigError, TrackerUnavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, ProcessId, Spans, Tracker
from memtier_engine.trackers import registry
from memtier_engine.trackers.common import FirstSight, chunks, mark_new
from support.fakes import BASE, PROCESS, FakeTracker, spans


def test_chunks_are_bounded_and_stay_within_their_span() -> None:
    found = list(chunks(spans((0, CHUNK_PAGES + 3), (CHUNK_PAGES + 10, CHUNK_PAGES + 11))))
    pages = [((start - BASE) // PAGE_BYTES, (end - BASE) // PAGE_BYTES) for start, end in found]
    assert pages == [(0, CHUNK_PAGES), (CHUNK_PAGES, CHUNK_PAGES + 3), (CHUNK_PAGES + 10, CHUNK_PAGES + 11)]


@given(st.sets(st.integers(0, 30)), st.integers(0, 20), st.integers(1, 15))
def test_exactly_the_pages_outside_the_known_spans_are_marked(known: set[int], first: int, length: int) -> None:
    known_spans = spans(*[(page, page + 1) for page in sorted(known)]) if known else Spans.empty()
    accessed = np.zeros(length, np.bool_)
    mark_new(accessed, BASE + first * PAGE_BYTES, known_spans)
    assert np.flatnonzero(accessed).tolist() == [i for i in range(length) if first + i not in known]


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
