"""Governors: wrong decisions about one address space make its pages wait longer, and no other's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveTask, ProcessId
from memtier_engine.pages.ages import AgeClock, ProcessPages
from memtier_engine.pages.governor import (
    HELD_LEAST_PAGES,
    HELD_S,
    HOLD_S,
    LONGEST_S,
    Governor,
    governed,
    withheld_bytes,
)
from support.fakes import PROCESS, pages_of, spans
from support.spacesim import Habit, Program, SpaceSim, every

SMALL, BIG = ProcessId(1, 1), ProcessId(2, 2)
PAGES = 2000
MINUTES_10 = 600.0


def one(habit: Habit, *, idle_s: float, pages: int = PAGES, scan_s: float = 5.0) -> tuple[SpaceSim, Program]:
    program = Program(PROCESS, habit, pages)
    return SpaceSim({PROCESS: program}, idle_s=idle_s, scan_s=scan_s), program


def rounds_within(rounds: list[float], seconds: float) -> int:
    """The most wrong rounds in any stretch of that length."""
    return max((sum(begin <= each < begin + seconds for each in rounds) for begin in rounds), default=0)


@pytest.mark.parametrize("idle_s", [10, 20, 60])
@pytest.mark.parametrize("period_s", [30, 45, 100, 180, 300, 420, 590])
def test_memory_that_is_used_now_and_then_goes_out_twice_at_most(period_s: float, idle_s: float) -> None:
    """The second wrong round is the last within ten minutes, whatever the period."""
    sim, program = one(every(period_s, PAGES), idle_s=idle_s)
    sim.run(period_s + MINUTES_10)
    assert rounds_within(program.wrong_rounds(), MINUTES_10) <= 2
    assert len(program.wrong_rounds()) >= (period_s > idle_s + 5) * 1


def test_without_a_governor_it_goes_out_for_ever() -> None:
    program = Program(PROCESS, every(100, PAGES), PAGES)
    SpaceSim({PROCESS: program}, idle_s=20, governs=False).run(520)
    assert len(program.wrong_rounds()) == 5


def test_what_comes_back_after_the_time_of_judgement_was_worth_it() -> None:
    """Out for 14 of 15 minutes, each time."""
    sim, program = one(every(900, PAGES), idle_s=20)
    sim.run(3700)
    assert len(program.wrong_rounds()) == 4
    assert sim.ledger.governors[PROCESS].rounds == 0


def test_a_small_process_is_judged_by_itself_beside_a_big_one() -> None:
    """The small one stops after two wrong rounds at most, and the big one goes on, also with what turns cold later."""
    late = np.arange(20 * PAGES) >= 10 * PAGES

    def cools_down(begin_s: float, end_s: float) -> NDArray[np.bool_]:
        return late & (begin_s < 300)

    small, big = Program(SMALL, every(60, 500), 500), Program(BIG, cools_down, 20 * PAGES)
    sim = SpaceSim({SMALL: small, BIG: big}, idle_s=20)
    sim.run(MINUTES_10)
    assert 1 <= len(small.wrong_rounds()) <= 2
    assert not big.resident.any()
    assert sim.ledger.governors[BIG].min_idle_s(sim.now_s) == 0


@pytest.mark.parametrize("period_s", [30, 100, 300])
def test_a_tenth_that_comes_back_does_not_cost_the_saving_of_the_others(period_s: float) -> None:
    """What was cold stays out; the tenth stays in RAM."""
    sim, program = one(every(period_s, PAGES, share=0.1), idle_s=20)
    sim.run(MINUTES_10 + period_s)
    assert 1 <= len(program.wrong_rounds()) <= 2
    cold = program.resident[PAGES // 10 :]
    assert not cold.any()


def test_memory_that_turns_cold_later_goes_out_too_only_later() -> None:
    """A tenth every 100 s from the start; half of the rest is used until 300 s and then never."""
    tenth = every(100, PAGES, share=0.1)
    late = np.arange(PAGES) >= PAGES // 2
    sim, program = one(lambda begin_s, end_s: tenth(begin_s, end_s) | (late & (begin_s < 300)), idle_s=20)
    sim.run(900)
    assert not program.resident[PAGES // 10 :].any()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.03])
def test_a_few_that_come_back_change_nothing(share: float) -> None:
    sim, _ = one(every(100, 10_000, share=share), idle_s=20, pages=10_000)
    sim.run(190)
    assert sim.ledger.governors[PROCESS].min_idle_s(sim.now_s) == 0


def test_a_share_too_small_of_what_went_out_can_still_be_most_of_what_is_in_use() -> None:
    """2 % of what went out, 11 MiB, comes back every minute: it is all that the process uses."""
    pages = 140_000
    sim, program = one(every(60, pages, share=0.02), idle_s=20, pages=pages)
    sim.run(400)
    assert len(program.wrong_rounds()) <= 2


def test_what_is_touched_blindly_is_held_back_wholly() -> None:
    """All of it is in use, and the tracker does not see it: it comes back the moment that it goes out."""
    sim, program = one(lambda begin_s, end_s: np.zeros(PAGES, np.bool_), idle_s=20)

    def only_what_is_out(begin_s: float, end_s: float) -> NDArray[np.bool_]:
        return ~program.resident

    program.habit = only_what_is_out
    sim.run(3600)
    rounds = program.wrong_rounds()
    assert rounds_within(rounds, MINUTES_10) <= 2
    assert len(rounds) <= 4  # each time for twice as long


def test_what_runs_away_from_the_threshold_is_held_back_too() -> None:
    """Touched again just after each page-out, however long that took."""
    touched_s = [0.0]

    def late(begin_s: float, end_s: float) -> NDArray[np.bool_]:
        if not program.resident.all() and begin_s - program.out[-1][0] >= 10:
            touched_s.append(begin_s)
            return np.ones(PAGES, np.bool_)
        return np.zeros(PAGES, np.bool_)

    sim, program = one(late, idle_s=20)
    sim.run(3600)
    assert rounds_within(program.wrong_rounds(), MINUTES_10) <= 2


def test_what_was_learned_is_forgotten_slowly_and_learned_again_for_longer() -> None:
    governor = Governor()
    governor.went_out(1000, 0)
    governor.came_back(1000, 100.0, 0, 80)
    assert governor.judge(0, 80)
    least_s = governor.min_idle_s(80)
    assert 130 <= least_s <= 200
    assert governor.min_idle_s(80 + HOLD_S) == least_s
    assert governor.min_idle_s(80 + 2 * HOLD_S) == pytest.approx(least_s / 2)
    again_s = 80 + 2 * HOLD_S
    governor.went_out(1000, again_s)
    governor.came_back(1000, 100.0, again_s, again_s + 20)
    assert governor.judge(0, again_s + 20)
    assert governor.min_idle_s(again_s + 20 + 2 * HOLD_S) == governor.min_idle_s(again_s + 20)
    assert governor.min_idle_s(again_s + 1000 * HOLD_S) == 0


def test_the_rest_of_a_wrong_decision_is_no_second_one() -> None:
    """It comes back over several scans; what is known of the gap grows."""
    governor = Governor()
    governor.went_out(1000, 0)
    governor.came_back(100, 50.0, 0, 30)
    assert governor.judge(0, 30)
    first_s = governor.min_idle_s(30)
    governor.came_back(900, 200.0, 0, 180)
    assert not governor.judge(0, 180)
    assert governor.min_idle_s(180) > first_s
    assert governor.strikes == 1
    assert not governor.held(180)


def test_all_wrong_twice_is_held_back_wholly_for_a_time_and_says_so() -> None:
    governor = Governor()
    for at_s in (0, 200):
        governor.went_out(1000, at_s)
        governor.came_back(1000, 30.0, at_s, at_s + 5)
        assert governor.judge(0, at_s + 5)
    assert governor.held(205)
    assert "nothing goes out" in governor.why(205)
    assert not governor.held(206 + HELD_S)
    assert "only what is idle for" in governor.why(206 + HELD_S)


def test_a_few_pages_raise_the_threshold_and_leave_the_rest_of_the_process_alone() -> None:
    """Keys of a store that are read at random: what is idle for longer than most comes back all the same."""
    governor, levels = Governor(), []
    for at_s, out, back in ((0, 20_000, 1_100), (100, 120, 70), (300, 100, 66)):
        governor.went_out(out, at_s)
        governor.came_back(back, 10.0, at_s, at_s + 5)
        assert governor.judge(5_000, at_s + 5)
        assert not governor.held(at_s + 5), governor.why(at_s + 5)
        levels.append(governor.min_idle_s(at_s + 5))
    assert levels[2] >= 2 * levels[1] >= 4 * levels[0]
    governor.went_out(300, 600)
    governor.came_back(HELD_LEAST_PAGES, 10.0, 600, 605)
    assert governor.judge(5_000, 605)
    assert governor.held(605)


def test_pages_that_were_freed_are_no_reason() -> None:
    governor = Governor()
    governor.went_out(2000, 0)
    governor.withdraw(1000, 0)
    governor.came_back(100, 50.0, 0, 30)
    assert governor.judge(0, 30)  # a tenth of what is left
    assert governor.why(30).startswith("0.391 of 3.91 MiB")


def test_what_is_freed_of_a_round_that_was_judged_is_not_taken_off_the_next_one() -> None:
    """A garbage collector touches some of what is out, which is wrong, and then frees all of it."""
    governor = Governor()
    governor.went_out(50_000, 0)
    governor.came_back(3_000, 30.0, 0, 10)
    assert governor.judge(0, 10)
    governor.went_out(5_000, 60)
    governor.withdraw(45_000, 0)
    governor.came_back(70, 100.0, 60, 120)
    assert not governor.judge(0, 120), governor.why(120)
    governor.withdraw(4_500, 60)  # of this round they are
    assert governor.judge(0, 120)


def test_a_clock_set_back_does_not_hold_for_ever() -> None:
    governor = Governor()
    for at_s in (1e7, 1e7 + 200):
        governor.went_out(1000, at_s)
        governor.came_back(1000, 30.0, at_s, at_s + 5)
        governor.judge(0, at_s + 5)
    assert not governor.held(10.0)
    assert governor.min_idle_s(10.0) <= LONGEST_S


@settings(deadline=None, max_examples=25)
@given(
    period_s=st.integers(30, 900),
    idle_s=st.integers(10, 300),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    scan_s=st.sampled_from([2.0, 5.0, 20.0]),
    phase_s=st.integers(0, 100),
)
def test_any_period_at_any_threshold_is_wrong_twice_at_most(
    period_s: int, idle_s: int, share: float, scan_s: float, phase_s: int
) -> None:
    """And what is cold goes out, if later."""
    habit = every(period_s, PAGES, share=share, phase_s=phase_s)
    sim, program = one(habit, idle_s=idle_s, scan_s=scan_s)
    sim.run(2 * period_s + MINUTES_10)
    early = [at_s for at_s in program.wrong_rounds() if at_s > period_s]
    if period_s - idle_s < MINUTES_10:
        assert rounds_within(early, MINUTES_10) <= 2
    sim.run(2 * HOLD_S)
    assert not program.resident[round(share * PAGES) :].any()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), mean_s=st.integers(20, 400), idle_s=st.integers(10, 60))
def test_bursts_at_random_times_are_wrong_ever_more_rarely(seed: int, mean_s: int, idle_s: int) -> None:
    """All of it at once, at exponentially distributed times: two hours have at most a dozen wrong rounds."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(mean_s, 4000))

    def bursts(begin_s: float, end_s: float) -> NDArray[np.bool_]:
        first, last = np.searchsorted(times, (begin_s, end_s))
        return np.full(PAGES, first != last)

    sim, program = one(bursts, idle_s=idle_s)
    sim.run(7200)
    wrong = sim.ledger.governors[PROCESS].rounds
    assert wrong <= 12
    assert rounds_within(program.wrong_rounds(), MINUTES_10) <= 4


@settings(deadline=None, max_examples=100)
@given(
    events=st.lists(
        st.tuples(st.integers(0, 2000), st.integers(0, 2000), st.floats(0, 5000), st.floats(0, 5000)), max_size=40
    )
)
def test_whatever_happens_the_threshold_is_sane_and_falls_between_events(
    events: list[tuple[int, int, float, float]],
) -> None:
    governor, now_s = Governor(), 0.0
    for out, back, gap_s, passed_s in events:
        governor.went_out(out, now_s)
        out_s, now_s = now_s, now_s + passed_s
        if passed_s < MINUTES_10:
            governor.came_back(min(out, back), gap_s, out_s, now_s)
        governor.judge(1000, now_s)
        levels = [governor.min_idle_s(now_s + later_s) for later_s in (0, 10, 1000, 100_000)]
        assert levels == sorted(levels, reverse=True)
        assert 0 <= levels[0] <= LONGEST_S
        assert bool(governor.why(now_s)) == (governor.held(now_s) or levels[0] > 0)


def aged(process: ProcessId, ages: list[int]) -> ProcessPages:
    own = ProcessPages(process)
    own.set_spans(spans((0, len(ages))))
    own.ages[:] = ages
    return own


def raised(gap_s: float) -> Governor:
    governor = Governor()
    governor.went_out(1000, 0)
    governor.came_back(1000, gap_s, 0, 10)
    governor.judge(0, 10)
    return governor


def clock_of(scans: int) -> AgeClock:
    clock = AgeClock()
    for number in range(scans):
        clock.begin_scan(10.0 + number)
    return clock


def test_a_decision_loses_the_pages_that_are_not_idle_for_long_enough() -> None:
    """Threshold 31 s of pages idle for 20 and 40 s; other processes and other moves stay as they are."""
    clock = clock_of(100)
    pages = {SMALL: aged(SMALL, [40, 40, 20, 40, 20, 20]), BIG: aged(BIG, [20] * 6)}
    governors = {SMALL: raised(20.0), BIG: Governor()}
    tasks = [
        MoveTask(SMALL, spans((0, 2), (2, 4), (5, 6)), SWAP_NODE, "swap out"),
        MoveTask(SMALL, spans((0, 6)), 1, "idle"),
        MoveTask(BIG, spans((0, 6)), SWAP_NODE, "swap out"),
    ]
    left = governed(tasks, pages, clock, governors, 20)
    assert [(task.process, task.to_node, pages_of(task.spans)) for task in left] == [
        (SMALL, SWAP_NODE, [(0, 2), (3, 4)]),
        (SMALL, 1, [(0, 6)]),
        (BIG, SWAP_NODE, [(0, 6)]),
    ]
    assert withheld_bytes(pages, clock, governors, 20) == 3 * PAGE_BYTES


def test_a_threshold_that_no_page_can_have_reached_stops_all() -> None:
    clock = clock_of(5)
    pages = {SMALL: aged(SMALL, [3] * 4)}
    governors = {SMALL: raised(100.0)}
    assert governed([MoveTask(SMALL, spans((0, 4)))], pages, clock, governors, 20) == []
    assert withheld_bytes(pages, clock, governors, 20) == 4 * PAGE_BYTES


def test_what_is_held_back_of_one_does_not_use_up_the_budget_of_another() -> None:
    """The one that is held back comes first in the decision, and is larger than what can be moved in time."""
    small, big = Program(SMALL, every(60, PAGES), PAGES), Program(BIG, every(1e9, PAGES), PAGES)
    sim = SpaceSim({SMALL: small, BIG: big}, idle_s=20)
    sim.run(70)
    big.resident[:] = True
    big.own.ages[:] = 1
    sim.run(45, budget_bytes=PAGES // 4 * PAGE_BYTES)
    assert small.resident.all()
    assert not big.resident.any()
