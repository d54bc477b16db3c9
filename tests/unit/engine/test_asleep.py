"""Processes that did not run touched nothing: their scans are left out, and their pages age all the same."""

from __future__ import annotations

import numpy as np
import pytest

from memtier_engine.engine.asleep import SCANS_SKIPPED_MOST, AsleepWatch
from memtier_engine.pages.ages import NOT_RESIDENT, PAGED_OUT, AgeClock, ProcessPages
from support.fakes import PROCESS, FakeTarget, spans


class TimedFake(FakeTarget):
    used_us: int | None = 100

    def run_time_us(self) -> int | None:
        return self.used_us


class Own:
    own_accesses_only = True


def test_the_first_scan_and_every_scan_after_running_is_a_real_one() -> None:
    target, watch = TimedFake(), AsleepWatch(Own())
    assert not watch.asleep(target)
    assert watch.asleep(target)
    target.used_us = 101
    assert not watch.asleep(target)
    assert watch.asleep(target)


def test_a_real_scan_comes_after_some_skipped_ones_at_the_latest() -> None:
    target, watch = TimedFake(), AsleepWatch(Own())
    seen = [watch.asleep(target) for _ in range(2 * SCANS_SKIPPED_MOST + 3)]
    assert seen == ([False] + [True] * SCANS_SKIPPED_MOST) * 2 + [False]


def test_nothing_is_skipped_when_the_time_is_not_known() -> None:
    target, watch = TimedFake(), AsleepWatch(Own())
    target.used_us = None
    assert [watch.asleep(target) for _ in range(3)] == [False] * 3


@pytest.mark.parametrize(("target", "tracker"), [(FakeTarget(), Own()), (TimedFake(), object())])
def test_target_and_tracker_must_both_allow_it(target: object, tracker: object) -> None:
    """A sampling tracker, or one that sees the accesses of others, has something to say of a sleeping process."""
    watch = AsleepWatch(tracker)
    assert [watch.asleep(target) for _ in range(3)] == [False] * 3


def test_resting_pages_age_as_untouched_ones_and_none_comes_back() -> None:
    pages, clock = ProcessPages(PROCESS, streaks=True), AgeClock()
    pages.set_spans(spans((0, 4)))
    pages.ages[:] = [0, 7, PAGED_OUT, NOT_RESIDENT]
    assert pages.streaks is not None
    pages.streaks[:] = 3
    clock.begin_scan(1.0)
    pages.rest(clock.step_table())
    assert pages.ages.tolist() == [1, 8, PAGED_OUT, NOT_RESIDENT]
    assert pages.streaks.tolist() == [0, 0, 0, 0]
    assert np.array_equal(pages.spans.starts, spans((0, 4)).starts)
