"""What went out and came back: the account of decisions, and the gaps between touches."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from memtier_engine.model import PAGE_BYTES, ProcessId, Spans
from memtier_engine.pages.ages import PAGED_OUT, AgeClock, ProcessPages
from memtier_engine.pages.refaults import BIN_S, PageSet, RefaultLedger
from support.fakes import BASE, PROCESS, chunk, spans

FIRST_PAGE = BASE // PAGE_BYTES
NONE = Spans.empty()


class Scene:
    """100 pages of one process, looked at every 10 s."""

    def __init__(self, *, gaps: bool = False) -> None:
        self.ledger = RefaultLedger(judge_s=600, gaps=gaps)
        self.clock = AgeClock()
        self.own = ProcessPages(PROCESS)
        self.own.set_spans(spans((0, 100)))
        self.out: set[int] = set()
        self.now_s = -10.0

    def scan(self, touched: set[int] | frozenset[int] = frozenset(), *, seconds: float = 10) -> None:
        self.now_s += seconds
        self.clock.begin_scan(self.now_s)
        seen = chunk(0, [page in touched for page in range(100)], [page not in self.out for page in range(100)])
        self.ledger.observe(PROCESS, self.own, seen, self.clock.idle_s(), self.now_s)
        self.own.update(seen, self.clock.step_table())

    def page_out(self, first: int, last: int, *, idle_s: float = 30) -> None:
        self.own.set_age(spans((first, last)), PAGED_OUT)
        self.out |= set(range(first, last))
        self.ledger.paged_out(PROCESS, spans((first, last)), NONE, idle_s, self.now_s)

    def come_back(self, *pages: int) -> None:
        self.out -= set(pages)

    def gap_counts(self) -> dict[float, int]:
        gaps = self.ledger.take_gaps()
        return {round(float(BIN_S[index]), 1): int(gaps[index]) for index in np.flatnonzero(gaps)}


def pages(count: int) -> int:
    return count * PAGE_BYTES


def test_what_comes_back_within_the_time_counts_against_the_decision() -> None:
    scene = Scene()
    scene.scan()
    scene.page_out(0, 40)
    scene.come_back(0, 1, 2, 3)
    scene.scan()
    stats = scene.ledger.stats(scene.now_s)
    assert stats.early_bytes == pages(4)
    assert stats.pending_bytes == pages(36)
    assert stats.precision == stats.recent_precision == 0.9


def test_what_comes_back_as_swap_is_taken_away_is_neither_right_nor_wrong() -> None:
    scene = Scene()
    scene.ledger.begin_scan(swap_bytes=2 << 30)
    scene.scan()
    scene.page_out(0, 40)
    scene.come_back(*range(30))
    scene.ledger.begin_scan(swap_bytes=1 << 30)
    scene.scan()
    stats = scene.ledger.stats(scene.now_s)
    assert (stats.early_bytes, stats.pending_bytes, stats.precision) == (0, pages(10), 1.0)
    scene.come_back(30)
    scene.ledger.begin_scan(swap_bytes=1 << 30)
    scene.scan()
    assert scene.ledger.stats(scene.now_s).early_bytes == pages(1)


def test_what_comes_back_later_was_a_right_decision() -> None:
    scene = Scene()
    scene.scan()
    scene.page_out(0, 40)
    scene.scan(seconds=700)
    scene.come_back(0, 1)
    scene.scan()
    stats = scene.ledger.stats(scene.now_s)
    assert (stats.early_bytes, stats.late_bytes, stats.kept_bytes, stats.pending_bytes) == (0, pages(2), pages(40), 0)
    assert stats.precision == 1.0
    assert stats.recent_precision is None


def test_without_a_decision_there_is_no_precision() -> None:
    assert RefaultLedger().stats(0).precision is None


def test_a_page_that_goes_out_twice_is_judged_twice() -> None:
    scene = Scene()
    scene.scan()
    for _ in range(2):
        scene.page_out(5, 6)
        scene.scan(seconds=100)
        scene.come_back(5)
        scene.scan()
    stats = scene.ledger.stats(scene.now_s)
    assert stats.early_bytes == pages(2)
    assert stats.pending_bytes == 0


def test_what_the_kernel_kept_did_not_go_out() -> None:
    ledger = RefaultLedger()
    ledger.paged_out(PROCESS, spans((0, 10)), spans((2, 5)), 30, 0)
    assert ledger.stats(0).pending_bytes == pages(7)


def test_a_process_that_exits_leaves_no_judgement() -> None:
    scene = Scene()
    scene.scan()
    scene.page_out(0, 10)
    scene.ledger.forget(PROCESS)
    stats = scene.ledger.stats(scene.now_s + 10_000)
    assert (stats.kept_bytes, stats.pending_bytes, stats.precision) == (0, 0, None)


def test_pages_of_another_process_at_the_same_address_are_not_mixed_up() -> None:
    ledger = RefaultLedger()
    ledger.paged_out(ProcessId(1, 1), spans((0, 10)), NONE, 30, 0)
    scene = Scene()
    scene.ledger = ledger
    scene.own.set_age(spans((0, 10)), PAGED_OUT)
    scene.scan()
    assert ledger.stats(0).early_bytes == 0
    assert ledger.stats(0).late_bytes == pages(10)


def test_gaps_of_pages_in_ram_are_their_ages_when_touched_again() -> None:
    """Touched at 0 s and again in the window up to 40 s: idle for 30 s at the scan before."""
    scene = Scene(gaps=True)
    scene.scan(set(range(100)))
    for _ in range(3):
        scene.scan(set(range(50, 100)))
    scene.gap_counts()
    scene.scan({1, 2, 3})
    [(gap_s, count)] = scene.gap_counts().items()
    assert 27 <= gap_s <= 30
    assert count == 3


def test_gaps_of_pages_that_were_out_go_on_from_their_age_when_they_went() -> None:
    """Idle for 30 s, then out for 100 s."""
    scene = Scene(gaps=True)
    scene.scan()
    scene.page_out(0, 10, idle_s=30)
    scene.scan(seconds=90)
    scene.come_back(0, 1)
    scene.scan()
    [(gap_s, count)] = scene.gap_counts().items()
    assert 119 <= gap_s <= 130
    assert count == 2


def test_pages_that_are_out_are_known_by_how_long_they_are_idle() -> None:
    """30 s when they went and 100 s since; of others only that they went before anything is remembered."""
    scene = Scene(gaps=True)
    scene.scan()
    scene.page_out(0, 10, idle_s=30)
    counts = scene.ledger.out_pages(scene.now_s + 100, 25)
    found = {round(float(BIN_S[index])): int(counts[index]) for index in np.flatnonzero(counts)}
    assert found == {128: 10, 558: 15}


def test_what_is_remembered_for_longer_is_still_judged_by_the_shorter_time() -> None:
    """Back after 700 s: no wrong decision, but the gap is known."""
    scene = Scene(gaps=True)
    scene.ledger = RefaultLedger(judge_s=600, remember_s=3600, gaps=True)
    scene.scan()
    scene.page_out(0, 10)
    scene.scan(seconds=690)
    scene.come_back(0)
    scene.scan()
    stats = scene.ledger.stats(scene.now_s)
    assert (stats.early_bytes, stats.late_bytes, stats.kept_bytes) == (0, pages(1), pages(10))
    [(gap_s, count)] = scene.gap_counts().items()
    assert 660 <= gap_s <= 730
    assert count == 1


def test_remembering_a_gigabyte_of_runs_takes_some_kilobytes() -> None:
    ledger = RefaultLedger(judge_s=600)
    gigabyte = 1 << 18
    ledger.paged_out(PROCESS, spans((0, gigabyte)), NONE, 30, 0)
    ledger.paged_out(PROCESS, spans((gigabyte, gigabyte + 1)), NONE, 30, 100)  # seals the one before
    assert ledger.stats(100).stored_bytes < 20_000


ranges = st.lists(st.tuples(st.integers(0, 200_000), st.integers(1, 5_000)), max_size=20).map(
    lambda items: sorted(set(items))
)


def _disjoint(items: list[tuple[int, int]]) -> list[tuple[int, int]]:
    at, kept = 0, []
    for first, length in items:
        if first >= at:
            kept.append((first, first + length))
            at = first + length
    return kept


@settings(deadline=None, max_examples=30)
@given(added=ranges, removed=ranges, sealed=st.booleans())
def test_a_page_set_is_a_set(added: list[tuple[int, int]], removed: list[tuple[int, int]], sealed: bool) -> None:
    model: set[int] = set()
    pages_set = PageSet()
    pages_set.add(spans(*_disjoint(added)))
    pages_set.remove(spans(*_disjoint(removed)))
    for first, last in _disjoint(added):
        model |= set(range(first, last))
    for first, last in _disjoint(removed):
        model -= set(range(first, last))
    if sealed:
        pages_set.seal()
    asked = np.arange(0, 210_000, 7, dtype=np.uint64)
    found = pages_set.contains(asked + np.uint64(FIRST_PAGE))
    assert set(asked[found].tolist()) == {page for page in model if page % 7 == 0}
    assert pages_set.count() == len(model)
