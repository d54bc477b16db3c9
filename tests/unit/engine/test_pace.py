"""Scans of many engines: spread over the interval, within a budget of CPU time, and said when it is reached."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from loguru import logger

from memtier_engine.engine.pace import LOOKS_AHEAD_S, Looks, ScanBudget
from memtier_engine.errors import ConfigError


@pytest.fixture
def messages() -> Iterator[list[str]]:
    found: list[str] = []
    logger.enable("memtier_engine")
    handle = logger.add(lambda message: found.append(str(message).strip()), format="{level} {message}")
    yield found
    logger.remove(handle)
    logger.disable("memtier_engine")


@pytest.mark.parametrize("engines", [10, 30, 100])
def test_scans_of_many_engines_are_spread_over_the_interval(engines: int) -> None:
    """No tenth of the interval has more than twice its part."""
    budget = ScanBudget()
    offsets = [budget.join(5.0).offset_s for _ in range(engines)]
    tenths = [sum(number * 0.5 <= offset < (number + 1) * 0.5 for offset in offsets) for number in range(10)]
    assert sum(tenths) == engines
    assert max(tenths) <= max(2, 2 * engines / 10)


def test_within_the_budget_intervals_are_as_configured() -> None:
    budget = ScanBudget(0.05)
    paces = [budget.join(5.0) for _ in range(10)]
    for pace in paces:
        pace.scanned(0.02)  # together 4 % of a core
    assert [pace.interval_s for pace in paces] == [5.0] * 10


def test_who_is_cheap_is_not_slowed_by_who_is_costly() -> None:
    """A container can make looking at it costly at will, by a page here and there over terabytes."""
    budget = ScanBudget(0.05)
    cheap, large, hostile = (budget.join(5.0) for _ in range(3))
    cheap.scanned(0.01)
    large.scanned(0.1)
    hostile.scanned(16.0)
    assert cheap.interval_s == large.interval_s == 5.0
    assert hostile.interval_s == pytest.approx(16.0 / (0.05 - 0.002 - 0.02))
    assert budget.factor == hostile.interval_s / 5.0
    used = sum((pace.cpu_s or 0) / pace.interval_s for pace in (cheap, large, hostile))
    assert used == pytest.approx(0.05)


def test_beyond_the_budget_all_that_cost_the_same_are_slowed_by_the_same_factor() -> None:
    """20 % of a core wanted, 5 % allowed; what then really is used is the budget."""
    budget = ScanBudget(0.05)
    paces = [budget.join(interval_s) for interval_s in (1.0, 2.0, 4.0, 10.0)]
    for pace, cpu_s in zip(paces, (0.05, 0.1, 0.2, 0.5), strict=True):
        pace.scanned(cpu_s)
    assert [pace.interval_s for pace in paces] == pytest.approx([4.0, 8.0, 16.0, 40.0])
    used = sum((pace.cpu_s or 0) / pace.interval_s for pace in paces)
    assert used == pytest.approx(0.05)


def test_one_slow_scan_does_not_decide_alone() -> None:
    budget = ScanBudget(0.05)
    pace = budget.join(1.0)
    for _ in range(10):
        pace.scanned(0.05)
    pace.scanned(0.25)
    assert pace.interval_s == pytest.approx(1.0 + 4 * 0.3)


def test_an_engine_that_ends_makes_room() -> None:
    budget = ScanBudget(0.05)
    first, second = budget.join(1.0), budget.join(1.0)
    first.scanned(0.05)
    second.scanned(0.15)
    assert first.interval_s == pytest.approx(2.0)
    assert second.interval_s == pytest.approx(6.0)
    second.close()
    second.close()
    assert first.interval_s == 1.0


def test_it_says_when_intervals_grow_and_when_they_are_back_and_not_at_every_scan(messages: list[str]) -> None:
    budget = ScanBudget(0.05)
    pace = budget.join(1.0)
    for _ in range(20):
        pace.scanned(0.2)
    for _ in range(50):
        pace.scanned(0.01)
    assert (
        messages[0] == "WARNING scans would take 20.0% of a core, 5.0% are allowed: intervals are up to 4 times as long"
    )
    assert messages[-1] == "INFO scans are back at their configured intervals"
    assert len(messages) <= 6


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="above 0"):
        ScanBudget(0)


def test_a_few_looks_are_at_once_and_many_take_half_the_share() -> None:
    looks = Looks(0.0)
    now_s, cpu_s = 0.0, 0.0
    while now_s < 100.0:
        assert looks.due_s <= now_s or cpu_s > LOOKS_AHEAD_S
        now_s = max(now_s, looks.due_s)
        cpu_s += 0.05
        looks.looked(0.05, now_s, 0.1)
    assert looks.taken_s == pytest.approx(cpu_s)
    assert cpu_s == pytest.approx(LOOKS_AHEAD_S + 100.0 * 0.1 / 2, abs=0.06)
    looks.looked(0.0, now_s + 1000.0, 0.1)
    assert looks.due_s == now_s + 1000.0, "a quiet while saves up no more than that"
    looks.looked(2 * LOOKS_AHEAD_S, now_s + 1000.0, 0.1)
    assert looks.due_s == pytest.approx(now_s + 1000.0 + LOOKS_AHEAD_S / 0.05)


def test_looks_count_against_the_budget_of_scans() -> None:
    """So that those of many engines take no more together than they may."""
    budget = ScanBudget(0.05)
    storm, calm = budget.join(1.0), budget.join(1.0)
    assert storm.cpu_share == 0.05
    for _ in range(50):
        calm.scanned(0.001)
        storm.scanned(0.2)
    assert storm.cpu_share == pytest.approx(0.049)
    assert calm.interval_s == 1.0
