"""What went out and came back: the account of decisions, and the gaps between touches."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from memtier_engine.model import PAGE_BYTES, ProcessId, Spans
from memtier_engine.pages.ages import NOT_RESIDENT, PAGED_OUT, AgeClock, ProcessPages
from memtier_engine.pages.gaps import BIN_S
from memtier_engine.pages.governor import HOLD_S, LEAST_PAGES
from memtier_engine.pages.pageset import PageSet, common, page_numbers_of, within
from memtier_engine.pages.refaults import RefaultLedger
from memtier_engine.pages.spaceledger import SwapInsSeen, idle_alike, idle_of
from support.fakes import BASE, PROCESS, chunk, pages_of, spans

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


def seen(*regions: int, others: int = 0) -> SwapInsSeen:
    """Swap-ins in these 2 MiB regions, counted from the first page, and other major faults."""
    return SwapInsSeen(np.array(regions, np.uint64) * np.uint64(2 << 20) + np.uint64(BASE), others)


class Freed(Scene):
    """1024 pages in two regions, of which all went out."""

    def __init__(self) -> None:
        super().__init__()
        self.own.set_spans(spans((0, 1024)))
        self.look()
        self.page_out(0, 1024)
        self.ledger.settle(PROCESS, self.own, seen(), self.now_s)

    def look(self, *, resident: Collection[int] = (), swapped: Collection[int] | None = None) -> None:
        self.now_s += 10
        self.clock.begin_scan(self.now_s)
        here = [page in resident for page in range(1024)]
        found = chunk(0, here, here)
        if swapped is not None:
            found = replace(found, swapped=np.array([page in swapped for page in range(1024)]))
        self.ledger.observe(PROCESS, self.own, found, self.clock.idle_s(), self.now_s)
        self.own.update(found, self.clock.step_table())

    def totals(self) -> tuple[int, int, int]:
        """Pages that were (wanted back early, wanted back late, are out)."""
        stats = self.ledger.stats(self.now_s)
        each = (stats.early_bytes, stats.late_bytes, stats.pending_bytes)
        return each[0] // PAGE_BYTES, each[1] // PAGE_BYTES, each[2] // PAGE_BYTES


def test_what_its_process_freed_is_neither_out_nor_back() -> None:
    """MADV_DONTNEED of the first half: neither in RAM nor in swap."""
    scene = Freed()
    scene.look(swapped=range(512, 1024))
    assert scene.totals() == (0, 0, 512)
    scene.look(resident=range(512), swapped=range(512, 1024))
    assert scene.totals() == (0, 0, 512)


def test_freed_and_filled_anew_between_two_scans_is_not_back() -> None:
    """The kernel counted no swap-in there: the pages were not wanted. In the other region there was one."""
    scene = Freed()
    scene.look(resident=range(1024), swapped=())
    scene.ledger.settle(PROCESS, scene.own, seen(1), scene.now_s)
    assert scene.totals() == (512, 0, 0)


def test_a_fault_may_be_counted_with_the_window_before_and_its_page_seen_only_now() -> None:
    scene = Freed()
    scene.look(swapped=range(1024))
    scene.ledger.settle(PROCESS, scene.own, seen(0), scene.now_s)
    scene.look(resident=range(1024), swapped=())
    scene.ledger.settle(PROCESS, scene.own, seen(), scene.now_s)
    assert scene.totals() == (512, 0, 0)


def test_what_system_calls_brought_back_was_wanted_though_no_access_of_the_program_was_counted() -> None:
    """read(2) into a buffer that is out: its faults are the kernel's, and only the process's sum has them."""
    scene = Freed()
    scene.look(resident=range(1024), swapped=())
    scene.ledger.settle(PROCESS, scene.own, seen(others=1024), scene.now_s)
    assert scene.totals() == (1024, 0, 0)


def test_a_few_faults_of_its_files_do_not_make_all_that_was_filled_anew_wanted() -> None:
    scene = Freed()
    scene.look(resident=range(1024), swapped=())
    scene.ledger.settle(PROCESS, scene.own, seen(others=20), scene.now_s)
    assert scene.totals() == (0, 0, 0)


def test_without_the_kernels_count_all_that_came_back_was_wanted() -> None:
    scene = Freed()
    scene.look(resident=range(1024), swapped=())
    scene.ledger.settle(PROCESS, scene.own, None, scene.now_s)
    assert scene.totals() == (1024, 0, 0)
    scene = Freed()
    scene.ledger.settle(PROCESS, scene.own, None, scene.now_s)  # a window of which it is not known: nor of the next
    scene.look(resident=range(1024), swapped=())
    scene.ledger.settle(PROCESS, scene.own, seen(), scene.now_s)
    assert scene.totals() == (1024, 0, 0)


@pytest.mark.parametrize("after", [spans(), spans((256, 768)), spans((5000, 6000)), spans((0, 256), (512, 1024))])
def test_what_is_not_mapped_any_more_is_not_out(after: Spans) -> None:
    """munmap(2), mremap(2), execve(2): the new mappings may lie where the old ones were."""
    scene = Freed()
    kept = sum(last - first for first, last in pages_of(after) if first < 1024)
    scene.ledger.remapped(PROCESS, scene.own, after)
    assert scene.totals() == (0, 0, kept)


def test_what_went_out_of_the_old_mapping_does_not_come_back_in_the_new_one() -> None:
    """munmap and mmap at the same address, seen unmapped in between."""
    scene = Freed()
    for after in (spans(), spans((0, 1024))):
        scene.ledger.remapped(PROCESS, scene.own, after)
        scene.own.set_spans(after)
    scene.look(resident=range(1024))
    assert scene.totals() == (0, 0, 0)


def test_dead_processes_are_not_kept_however_they_came_in() -> None:
    """Also one whose last page goes out after it was forgotten."""
    ledger = RefaultLedger()
    for pid in range(1, 6):
        ledger.paged_out(ProcessId(pid, 1), spans((0, 10)), NONE, 30, 0)
    ledger.forget(ProcessId(1, 1))
    ledger.paged_out(ProcessId(1, 1), spans((0, 10)), NONE, 30, 1)
    assert len(ledger) == 5
    ledger.keep([ProcessId(2, 1)])
    assert len(ledger) == len(ledger.governors) == 1
    assert ledger.stats(1).pending_bytes == pages(10)


def test_what_came_back_of_a_dead_process_stays_in_the_sums() -> None:
    scene = Scene(gaps=True)
    scene.scan()
    scene.page_out(0, 10)
    scene.come_back(0, 1)
    scene.scan()
    scene.ledger.forget(PROCESS)
    assert scene.ledger.stats(scene.now_s).early_bytes == scene.ledger.wanted_bytes() == pages(2)
    assert sum(scene.gap_counts().values()) == 2


def test_the_idle_time_of_a_batch_is_that_of_its_pages() -> None:
    """Half of it was idle for 20 s, half for 300: the gaps are two, and neither is that of the oldest page."""
    scene = Scene(gaps=True)
    scene.scan()
    scene.own.set_age(spans((0, 20)), PAGED_OUT)
    scene.out |= set(range(20))
    idle_s = np.array([20.0, 300.0] * 10)
    scene.ledger.paged_out(PROCESS, spans((0, 20)), NONE, idle_s, scene.now_s)
    counts = scene.ledger.out_pages(scene.now_s + 100, 20)
    assert {round(float(BIN_S[index])): int(counts[index]) for index in np.flatnonzero(counts)} == {117: 10, 395: 10}
    scene.come_back(*range(20))
    scene.scan()
    counted = scene.gap_counts()
    assert sorted(counted.values()) == [10, 10]
    assert min(counted) <= 30 < 280 <= max(counted)


def test_how_long_the_pages_of_a_batch_were_idle_comes_from_their_ages() -> None:
    """Of what was unmapped since, or was not in RAM, nothing is known."""
    scene = Scene()
    for _ in range(6):
        scene.scan()
    scene.own.ages[:4] = [5, 2, PAGED_OUT, 4]
    found = idle_of(scene.own, spans((0, 4), (99, 101)), scene.clock.idle_s())
    assert found[[0, 1, 3]].tolist() == [50, 20, 40]
    assert np.isnan(found).tolist() == [False, False, True, False, False, True]


@given(
    ages=st.lists(st.sampled_from([2, 5, PAGED_OUT, NOT_RESIDENT]), min_size=6, max_size=6) | st.just([5] * 6),
    shape=st.sampled_from([[(0, 6)], [(2, 4)], [(0, 2), (3, 6)], [(4, 102)], [(200, 202)]]),
)
def test_pages_that_were_idle_alike_are_one_number(ages: list[int], shape: list[tuple[int, int]]) -> None:
    scene = Scene()
    for _ in range(6):
        scene.scan()
    scene.own.ages[:6] = ages
    found = idle_alike(scene.own, spans(*shape), scene.clock.idle_s())
    each = idle_of(scene.own, spans(*shape), scene.clock.idle_s())
    assert np.array_equal(np.broadcast_to(found, each.shape), each, equal_nan=True)
    assert (np.ndim(found) == 0) == (not np.isnan(each).any() and len(set(each.tolist())) == 1)


@pytest.mark.parametrize("stuck", [spans((5, 8)), NONE])
def test_it_does_not_matter_whether_idle_times_are_given_for_each_page_or_for_all(stuck: Spans) -> None:
    ledgers = [Scene(gaps=True), Scene(gaps=True)]
    given_s: list[float | NDArray[np.float64]] = [30.0, np.full(20, 30.0)]
    for scene, idle_s in zip(ledgers, given_s, strict=True):
        scene.scan()
        scene.own.set_age(spans((0, 20)), PAGED_OUT)
        scene.ledger.paged_out(PROCESS, spans((0, 20)), stuck, idle_s, scene.now_s)
        scene.out = set(range(20))
        scene.come_back(*range(10))
        scene.scan()
    assert ledgers[0].gap_counts() == ledgers[1].gap_counts()
    assert ledgers[0].ledger.stats(20.0) == ledgers[1].ledger.stats(20.0)
    assert ledgers[0].ledger.stats(20.0).early_bytes == pages(7 if len(stuck) else 10)


def test_a_trial_that_comes_back_is_no_wrong_decision() -> None:
    """It counts in the sums, and says nothing to the governor."""
    scene = Scene()
    scene.scan()
    for trial in (True, False):
        scene.own.set_age(spans((0, 100)), PAGED_OUT)
        scene.ledger.paged_out(PROCESS, spans((0, 100)), NONE, 30, scene.now_s, trial=trial)
        scene.scan()
        wrong = scene.ledger.settle(PROCESS, scene.own, None, scene.now_s)
        assert wrong != trial
    assert scene.ledger.stats(scene.now_s).early_bytes == pages(200)


def test_what_comes_back_to_a_process_that_was_stopped_is_wrong_when_it_happens_again() -> None:
    """Once in 20 minutes says nothing of its habits; it counts in the sums all the same."""
    scene = Scene()
    scene.scan()
    verdicts = []
    for pause_s in (10, 10, 10, HOLD_S):
        scene.own.set_age(spans((0, 100)), PAGED_OUT)
        scene.ledger.paged_out(PROCESS, spans((0, 100)), NONE, 30, scene.now_s, stopped=True)
        scene.scan()
        verdicts.append(scene.ledger.settle(PROCESS, scene.own, None, scene.now_s))
        scene.scan(seconds=pause_s)
    assert verdicts == [False, True, True, True]
    scene.own.set_age(spans((0, 100)), PAGED_OUT)
    scene.ledger.paged_out(PROCESS, spans((0, 100)), NONE, 30, scene.now_s, stopped=True)
    scene.scan()
    assert not scene.ledger.settle(PROCESS, scene.own, None, scene.now_s)
    assert scene.ledger.stats(scene.now_s).early_bytes == pages(500)


def test_a_few_pages_that_come_back_to_a_stopped_process_do_not_use_up_what_is_excused() -> None:
    scene = Scene()
    scene.scan()
    for count, wrong in ((LEAST_PAGES - 1, False), (100, False), (100, True)):
        scene.own.set_age(spans((0, count)), PAGED_OUT)
        scene.ledger.paged_out(PROCESS, spans((0, count)), NONE, 30, scene.now_s, stopped=True)
        scene.scan()
        assert scene.ledger.settle(PROCESS, scene.own, None, scene.now_s) == wrong


def test_a_page_that_goes_out_twice_in_a_slice_of_time_is_known_by_the_second_time() -> None:
    scene = Scene(gaps=True)
    scene.scan()
    scene.page_out(0, 10, idle_s=20)
    scene.come_back(*range(10))
    scene.scan()
    scene.gap_counts()
    scene.page_out(0, 10, idle_s=200)
    scene.come_back(*range(10))
    scene.scan()
    [(gap_s, count)] = scene.gap_counts().items()
    assert (round(gap_s, -1), count) == (200, 10)


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


@settings(deadline=None, max_examples=60)
@given(added=ranges, removed=ranges, sealed=st.booleans(), in_runs=st.booleans())
def test_a_page_set_is_a_set(
    added: list[tuple[int, int]], removed: list[tuple[int, int]], sealed: bool, in_runs: bool
) -> None:
    model: set[int] = set()
    pages_set = PageSet()
    if in_runs:
        pages_set.add_runs(spans(*_disjoint(added)))
    else:
        pages_set.add(page_numbers_of(spans(*_disjoint(added))))
    pages_set.remove(page_numbers_of(spans(*_disjoint(removed))))
    for first, last in _disjoint(added):
        model |= set(range(first, last))
    for first, last in _disjoint(removed):
        model -= set(range(first, last))
    if sealed:
        pages_set.seal()
    asked = np.arange(0, 210_000, dtype=np.uint64)
    found = pages_set.contains(asked + np.uint64(FIRST_PAGE))
    assert set(asked[found].tolist()) == model
    assert pages_set.count() == len(model)


@settings(deadline=None, max_examples=60)
@given(one=ranges, other=ranges)
def test_what_two_lists_of_spans_have_in_common_is_in_both(
    one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    """Spans of both may touch; what comes out is ascending and not empty."""
    first, second = spans(*_disjoint(one)), spans(*_disjoint(other))
    found = common(first, second)
    both = set(page_numbers_of(first).tolist()) & set(page_numbers_of(second).tolist())
    assert set(page_numbers_of(found).tolist()) == both
    assert bool((found.ends > found.starts).all())
    assert bool((found.starts[1:] >= found.ends[:-1]).all())
    numbers = page_numbers_of(first)
    assert set(numbers[within(numbers, second)].tolist()) == both
