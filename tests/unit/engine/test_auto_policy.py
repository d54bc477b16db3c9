"""Policy `auto` on simulated processes: the goal holds without anybody tuning a threshold."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES
from memtier_engine.pages.ages import AgeClock, ProcessPages
from memtier_engine.pages.refaults import RefaultLedger
from memtier_engine.policies.auto import AutoPolicy, AutoPolicyConfig
from memtier_engine.policies.goals import Goal, parse_goal
from support.autosim import Simulation, periodic
from support.fakes import PROCESS, pages_of, spans

PAGES = 20_000
WINDOW_S = 60.0
NEVER = np.inf
HOT_S = 4.0
INDEX = np.arange(PAGES)


class FakeGauges:
    """What the test says of the machine."""

    def __init__(self, *, stall_percent: float | None = 0.0, available_bytes: int | None = None) -> None:
        self.stall = stall_percent
        self.available = available_bytes

    def stall_percent(self, now_s: float) -> float | None:
        return self.stall

    def available_bytes(self) -> int | None:
        return self.available


def simulation(
    periods_s: NDArray[np.float64], goal: str = "refaults: 0.2%/min", gauges: FakeGauges | None = None
) -> Simulation:
    kind, _, value = goal.partition(": ")
    ledger = RefaultLedger(remember_s=7200, gaps=True)
    simulated = Simulation(len(periods_s), periodic(periods_s), ledger)
    simulated.policy = AutoPolicy(AutoPolicyConfig(goal=parse_goal(kind, value)), ledger, gauges)
    return simulated


def shares(*parts: tuple[float, float]) -> NDArray[np.float64]:
    """Periods of pages from (share, period) pairs; the rest is never touched."""
    periods = np.full(PAGES, NEVER)
    at = 0.0
    for share, period_s in parts:
        periods[(at * PAGES <= INDEX) & ((at + share) * PAGES > INDEX)] = period_s
        at += share
    return periods


def windows(simulated: Simulation, count: int) -> list[float]:
    """Refaults per minute, in percent of the memory in RAM, of the next windows."""
    rates = []
    for _ in range(count):
        begin_s = simulated.now_s
        simulated.run(WINDOW_S)
        rates.append(simulated.refault_percent_per_min(begin_s, simulated.now_s))
    return rates


def test_all_cold_memory_goes_out_after_the_first_window_and_nothing_comes_back() -> None:
    simulated = simulation(shares((0.2, HOT_S)))
    assert windows(simulated, 1) == [0]
    assert simulated.out_share == 0
    assert max(windows(simulated, 10)) == 0
    assert simulated.out_share == pytest.approx(0.8, abs=0.001)


def test_memory_that_is_used_every_few_minutes_is_not_taken_for_cold() -> None:
    """A tenth is used every five minutes: the threshold settles just above, and what is cold is still saved."""
    simulated = simulation(shares((0.2, HOT_S), (0.1, 300.0)))
    assert max(windows(simulated, 30)) <= 0.2
    assert simulated.policy.state.threshold_s is not None
    assert 300 <= simulated.policy.state.threshold_s <= 400
    assert simulated.out_share == pytest.approx(0.7, abs=0.001)


def test_where_every_age_is_touched_again_the_goal_still_holds() -> None:
    """Periods from 5 s to 2 h in equal shares of each doubling: what nobody has seen yet is not taken for cold."""
    periods = np.exp(np.random.default_rng(3).uniform(np.log(5), np.log(7200), 5000))
    simulated = simulation(periods)
    rates = windows(simulated, 120)
    ten = np.convolve(rates, np.full(10, 0.1), "valid")  # a window is ten pages, more or less
    assert ten.max() <= 0.2
    assert np.mean(rates[60:]) <= 0.2
    assert simulated.out_share > 0.02


@pytest.mark.parametrize("seed", [1, 2])
def test_random_requests_for_popular_keys_end_the_wait_once_their_gaps_are_known(seed: int) -> None:
    """A key-value server: a page in 40 is popular, wanted each second to each 140 s; the others are each some weeks.

    Out go a tenth of all at once, all others within half an hour, and what comes back stays under the goal on average.
    """
    source = np.random.default_rng(seed)
    rate_per_s = np.full(PAGES, 2e-7)
    popular = source.choice(PAGES, PAGES // 40, replace=False)
    rate_per_s[popular] = (INDEX[: len(popular)] + 1.0) ** -0.8
    ledger = RefaultLedger(remember_s=7200, gaps=True)
    simulated = Simulation(PAGES, lambda begin_s, end_s: source.random(PAGES) < rate_per_s * (end_s - begin_s), ledger)
    simulated.policy = AutoPolicy(AutoPolicyConfig(), ledger)
    assert max(windows(simulated, 4)) <= 0.2
    assert simulated.out_share > 0.1
    windows(simulated, 26)
    assert simulated.out_share == pytest.approx(0.97, abs=0.01)
    assert np.mean(windows(simulated, 30)) <= 0.2


def test_refaults_are_under_the_goal_also_as_a_share_of_the_memory_that_is_left_in_ram() -> None:
    """Of the memory now in RAM 0.17 % per minute would come back; of what is left without it, far more."""
    simulated = simulation(shares((0.1, HOT_S), (0.5, 18_000.0)))
    rates = windows(simulated, 60)
    ten = np.convolve(rates, np.full(10, 0.1), "valid")
    assert ten.max() <= 0.2
    assert 0.3 < simulated.out_share < 0.9


def test_of_memory_that_is_wanted_now_and_then_as_much_goes_out_as_the_goal_allows() -> None:
    """Each page is wanted at random, from each 3 s to twice a day: whole ages are too dear, parts of them are not."""
    source = np.random.default_rng(5)
    rate_per_s = 1 / np.exp(source.uniform(np.log(3), np.log(50_000), PAGES))
    ledger = RefaultLedger(remember_s=7200, gaps=True)
    simulated = Simulation(
        PAGES, lambda begin_s, end_s: source.random(PAGES) < 1 - np.exp(-rate_per_s * (end_s - begin_s)), ledger
    )
    simulated.policy = AutoPolicy(AutoPolicyConfig(), ledger)
    rates: list[float] = []
    parts = []
    for _ in range(60):
        rates += windows(simulated, 1)
        if simulated.policy.state.share < 1:
            parts.append(simulated.policy.state)
    assert "of it goes" in parts[0].reason
    assert max(rates) <= 0.5
    assert np.mean(rates) <= 0.2
    assert simulated.out_share > 0.15


def test_a_small_working_set_does_not_keep_the_rest_in_ram() -> None:
    """100 pages of 20 000 are in use: 0.2 % of that is less than a page, which no measurement can exclude."""
    simulated = simulation(shares((0.005, HOT_S)))
    assert max(windows(simulated, 10)) == 0
    assert simulated.out_share == pytest.approx(0.995, abs=0.001)


def test_after_a_phase_change_refaults_are_under_the_goal_within_three_windows_and_savings_come_back() -> None:
    """The hot set moves to memory that is out: it has to come back once, and only once."""
    simulated = simulation(shares((0.2, HOT_S)))
    windows(simulated, 20)
    simulated.habit = periodic(np.where((INDEX >= 0.5 * PAGES) & (INDEX < 0.7 * PAGES), HOT_S, NEVER), seed=7)
    rates = windows(simulated, 12)
    assert rates[0] > 10
    assert max(rates[2:]) <= 0.2
    windows(simulated, 20)
    assert simulated.out_share == pytest.approx(0.8, abs=0.001)


def test_when_the_hot_set_moves_again_and_again_less_is_taken() -> None:
    """Every three minutes another fifth: the price of taking memory that will be hot again is learnt."""
    simulated = simulation(shares((0.2, HOT_S)))
    rates: list[float] = []
    for move in range(20):
        first = move % 5 * 0.2
        hot = (first * PAGES <= INDEX) & ((first + 0.2) * PAGES > INDEX)
        simulated.habit = periodic(np.where(hot, HOT_S, NEVER), seed=move)
        rates += windows(simulated, 3)
    assert max(rates[15:]) <= 0.2


def test_a_goal_of_stall_time_stops_at_once_when_it_is_missed() -> None:
    gauges = FakeGauges()
    simulated = simulation(shares((0.2, HOT_S)), "psi: 0.1%", gauges)
    gauges.stall = 5.0
    windows(simulated, 6)
    assert simulated.out_share == 0
    assert "5 %" in simulated.policy.state.reason
    gauges.stall = 0.0
    windows(simulated, 10)  # the limit grows by a quarter per good window
    assert simulated.out_share == pytest.approx(0.8, abs=0.001)


def test_a_goal_of_stall_time_allows_more_refaults_while_nobody_stalls() -> None:
    """And half as much after each window with too much."""
    gauges = FakeGauges(stall_percent=0.0)
    simulated = simulation(shares((0.2, HOT_S)), "psi: 0.1%", gauges)
    limits: list[float] = []
    for stall in (0.0, 0.0, 0.07, 0.2, 0.2):
        gauges.stall = stall
        windows(simulated, 1)
        if not limits:
            windows(simulated, 1)
        limits.append(round(simulated.policy.state.limit_percent_per_min, 4))
    assert limits == [0.25, 0.3125, 0.3125, 0.1562, 0.0781]


def test_without_pressure_information_a_goal_of_stall_time_takes_nothing() -> None:
    simulated = simulation(shares((0.2, HOT_S)), "psi: 0.1%", FakeGauges(stall_percent=None))
    windows(simulated, 5)
    assert simulated.out_share == 0
    assert simulated.policy.state.reason == "psi: 0.1%: the stall time is not known"


def test_a_goal_of_savings_takes_that_share_and_no_more() -> None:
    simulated = simulation(shares((0.2, HOT_S)), "save: 30%")
    windows(simulated, 10)
    assert simulated.out_share == pytest.approx(0.3, abs=0.001)


def test_a_goal_of_savings_that_would_cost_too_much_is_not_met() -> None:
    """Only a fifth is cold; the rest is used every minute or two."""
    simulated = simulation(shares((0.2, HOT_S), (0.6, 90.0)), "save: 70%")
    assert max(windows(simulated, 20)) <= 2.0
    assert simulated.out_share <= 0.21


def test_a_goal_of_free_memory_takes_what_is_missing() -> None:
    gauges = FakeGauges(available_bytes=2 << 30)
    simulated = simulation(shares((0.2, HOT_S)), "free: 2GiB", gauges)
    windows(simulated, 5)
    assert simulated.out_share == 0
    missing = 1000
    gauges.available = (2 << 30) - missing * PAGE_BYTES
    simulated.run(5)
    assert int((~simulated.resident).sum()) == missing
    gauges.available = 2 << 30
    windows(simulated, 2)
    assert int((~simulated.resident).sum()) == missing


def test_the_oldest_pages_go_first_under_a_budget() -> None:
    """Ages 3, 2 and 1: of 6000 pages wanted, all of age 3 and then of age 2."""
    own = ProcessPages(PROCESS)
    own.set_spans(spans((0, 12_000)))
    clock = AgeClock()
    for scan in range(200):
        clock.begin_scan(scan * 100.0)
    policy = AutoPolicy(AutoPolicyConfig(), _NoGaps())
    own.ages[:] = [1] * 4000 + [3] * 4000 + [2] * 4000
    policy.decide({PROCESS: own}, clock, None)
    for _ in range(3):
        clock.begin_scan(clock.now_s + 100)
        tasks = policy.decide({PROCESS: own}, clock, 6000 * PAGE_BYTES)
    assert [pages_of(task.spans) for task in tasks] == [[(4000, 8000)], [(8000, 10_000)]]


def test_a_stopped_engine_proves_no_page_to_be_cold() -> None:
    """An hour between two scans is a window of three intervals: risk that nobody watched is none."""
    own = ProcessPages(PROCESS)
    own.set_spans(spans((0, 1000)))
    own.ages[:] = 1
    clock, policy = AgeClock(), AutoPolicy(AutoPolicyConfig(), _NoGaps())
    for now_s in (0.0, 5.0, 3605.0, 3610.0):
        clock.begin_scan(now_s, interval_s=5.0)
        policy.decide({PROCESS: own}, clock, None)
    assert policy._open.risked_min.sum() == pytest.approx(1000 * (5 + 15 + 5) / 60)
    assert policy.state.refaults_percent_per_min is None, "no window of a minute is complete"


class _NoGaps:
    def take_gaps(self) -> NDArray[np.int64]:
        return RefaultLedger().take_gaps()

    def out_pages(self, now_s: float, total: int) -> NDArray[np.int64]:
        return RefaultLedger().out_pages(now_s, total)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("psi", "0.1%", 0.1),
        ("refaults", "0.2%/min", 0.2),
        ("refaults", "0.2 % / min", 0.2),
        ("refaults", "1%", 1.0),
        ("free", "2GiB", 2 << 30),
        ("save", "30%", 30.0),
    ],
)
def test_goals_are_written_as_people_say_them(kind: str, text: str, value: float) -> None:
    goal = parse_goal(kind, text)
    assert goal == Goal(kind, value)
    assert parse_goal(kind, str(goal).partition(": ")[2]) == goal


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("psi", "0.1"),
        ("psi", "0.1%/min"),
        ("save", "101%"),
        ("save", "0%"),
        ("free", "much"),
        ("refaults", "-1%"),
        ("speed", "1%"),
    ],
)
def test_what_is_no_goal_is_refused_with_an_example(kind: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_goal(kind, text)
    assert caught.value.hint


def test_a_goal_that_needs_gauges_says_so() -> None:
    with pytest.raises(ConfigError, match="gauges"):
        AutoPolicy(AutoPolicyConfig(goal=Goal("psi", 0.1)), RefaultLedger(gaps=True))
