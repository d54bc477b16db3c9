"""Trackers `multi`, `finder` and `stub`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from memtier_engine.errors import ConfigError, ProcessGone
from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, PageChunk, ProcessId, Spans
from memtier_engine.trackers.finder import FinderConfig, FinderTracker
from memtier_engine.trackers.multi import MultiTracker
from memtier_engine.trackers.stub import StubTracker
from support.fakes import BASE, PROCESS, FakeTracker, chunk, spans
from support.hostfolder import HostFolder

PRESENT, EXCLUSIVE, SOFT_DIRTY = 1 << 63, 1 << 56, 1 << 55


class Scripted(FakeTracker):
    """Yields the chunks the test made, and remembers whether it was read to the end."""

    def __init__(self, *chunks: PageChunk, name: str = "scripted", exact: bool = True) -> None:
        super().__init__()
        self.chunks = chunks
        self.name = name
        self.page_exact = exact
        self.completed = False

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        yield from self.chunks
        self.completed = True


def only(tracker: MultiTracker, mappings: Spans) -> PageChunk:
    [found] = tracker.scan(PROCESS, mappings)
    return found


def test_a_page_is_touched_if_any_part_saw_it() -> None:
    one, two = FakeTracker(), FakeTracker()
    one.touched, two.touched = {0, 1}, {1, 3}
    found = only(MultiTracker([one, two]), spans((0, 5)))
    assert found.accessed.tolist() == [True, True, False, True, False]


def test_writes_come_from_those_that_see_them_and_a_page_is_movable_if_all_agree() -> None:
    reads = Scripted(chunk(0, [1, 0, 0], movable=[1, 1, 0]))
    writes = Scripted(replace(chunk(0, [0, 1, 0], movable=[0, 1, 1]), written=np.array([0, 1, 0], np.bool_)))
    found = only(MultiTracker([reads, writes]), spans((0, 3)))
    assert found.accessed.tolist() == [True, True, False]
    assert found.written is not None
    assert found.movable is not None
    assert found.written.tolist() == [False, True, False]
    assert found.movable.tolist() == [False, True, False]


def test_parts_may_cut_their_chunks_as_they_like() -> None:
    small = Scripted(chunk(0, [1, 0]), chunk(2, [0, 1, 1]), chunk(5, [0]), chunk(10, [1, 1]))
    other = FakeTracker()
    other.touched = {1}
    whole = list(MultiTracker([small, other]).scan(PROCESS, spans((0, 6), (10, 12))))
    found = [part for each in whole for part in each.parts()]
    assert [each.accessed.tolist() for each in found] == [[True, True, False, True, True, False], [True, True]]
    assert [each.start for each in found] == [BASE, BASE + 10 * PAGE_BYTES]


def test_pages_that_one_part_says_nothing_about_are_left_to_the_others() -> None:
    part = Scripted(chunk(2, [1]))
    other = FakeTracker()
    other.touched = {0}
    assert only(MultiTracker([part, other]), spans((0, 4))).accessed.tolist() == [True, False, True, False]


def test_chunks_stay_within_the_size_limit() -> None:
    parts = [FakeTracker(), FakeTracker()]
    found = [len(each.accessed) for each in MultiTracker(parts).scan(PROCESS, spans((0, CHUNK_PAGES + 7)))]
    assert found == [CHUNK_PAGES, 7]


def test_every_part_is_read_to_its_end() -> None:
    """softdirty begins its next window only there."""
    parts = [Scripted(chunk(0, [1])), Scripted(chunk(0, [1]), chunk(9, [1]))]
    only(MultiTracker(parts), spans((0, 1)))
    assert all(part.completed for part in parts)


def test_rates_add_up_and_a_plain_touch_counts_one() -> None:
    sampled = Scripted(replace(chunk(0, [1, 1]), rates=np.array([0.5, 0.25], np.float32)))
    found = only(MultiTracker([sampled, Scripted(chunk(0, [1, 0]))]), spans((0, 2)))
    assert found.rates is not None
    assert found.rates.tolist() == [1.5, 0.25]


def test_watching_closing_and_exactness_go_to_all_parts() -> None:
    one, two = FakeTracker(), Scripted(exact=False)
    tracker = MultiTracker([one, two])
    tracker.watch(frozenset({PROCESS}))
    assert one.watched == two.watched == {PROCESS}
    assert not tracker.page_exact
    tracker.close()
    assert one.closed
    assert two.closed


def test_a_process_that_exits_is_reported_as_by_any_tracker() -> None:
    gone = FakeTracker()
    gone.failure = ProcessGone("exited", 3)
    with pytest.raises(ProcessGone):
        list(MultiTracker([FakeTracker(), gone]).scan(PROCESS, spans((0, 2))))


def test_parts_that_would_blind_each_other_are_refused() -> None:
    for one, two in (("softdirty", "softdirty"), ("idlepage", "damon"), ("refs", "idlepage")):
        with pytest.raises(ConfigError, match=f"{one} and {two} disturb each other"):
            MultiTracker([Scripted(name=one), Scripted(name=two)])
    MultiTracker([Scripted(name="softdirty"), Scripted(name="idlepage"), Scripted(name="finder")])
    with pytest.raises(ConfigError, match="is empty"):
        MultiTracker([])


class TestFinder:
    """A process with four pages: plain, shared, dirty, absent."""

    @pytest.fixture(autouse=True)
    def _process(self, tmp_path: Path) -> None:
        self.folder = HostFolder(tmp_path)
        self.folder.process(PROCESS.pid)
        words = [PRESENT | EXCLUSIVE, PRESENT, PRESENT | EXCLUSIVE | SOFT_DIRTY, 0]
        self.folder.pagemap(PROCESS.pid, {BASE + index * PAGE_BYTES: word for index, word in enumerate(words)})

    def scan(self, **config: object) -> PageChunk:
        tracker = FinderTracker(self.folder.host, FinderConfig(**config))  # type: ignore[arg-type]
        [found] = tracker.scan(PROCESS, spans((0, 4)))
        return found

    def test_all_memory_is_reported_as_untouched(self) -> None:
        found = self.scan()
        assert found.accessed.tolist() == [False] * 4
        assert found.resident.tolist() == [True, True, True, False]

    def test_the_configured_number_of_accesses_is_that_of_a_whole_mapping(self) -> None:
        found = self.scan(report_accesses=8)
        assert found.accessed.tolist() == [True, True, True, False]
        assert found.rates is not None
        assert found.rates.sum() == 8

    @pytest.mark.parametrize(
        ("bits", "movable"),
        [
            ({"exclusive": True}, [True, False, True, False]),
            ({"soft_dirty": False}, [True, False, False, True]),
            ({"present": True, "soft_dirty": True}, [False, False, True, False]),
            ({"present": False}, [False, False, False, True]),
        ],
    )
    def test_pages_that_do_not_match_the_bits_are_not_movable(self, bits: dict[str, bool], movable: list[bool]) -> None:
        found = self.scan(**bits)
        assert found.movable is not None
        assert found.movable.tolist() == movable


def test_the_stub_sees_nothing(tmp_path: Path) -> None:
    assert list(StubTracker(HostFolder(tmp_path).host).scan(PROCESS, spans((0, 4)))) == []
