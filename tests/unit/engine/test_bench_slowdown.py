"""How the benchmark tells what a scan costs the process that is scanned."""

from __future__ import annotations

import numpy as np
import pytest

from bench.slowdown import AFTER_S, Loss, excess_s

UNIT_S = 0.01


def units(*, slow: range = range(0), by_s: float = 0.0, drift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """300 units of work of 10 ms; those numbered in `slow` take longer, all get slower by `drift` in all."""
    costs = UNIT_S * (1 + drift * np.arange(300) / 300)
    costs[slow.start : slow.stop] += by_s
    return np.cumsum(costs), costs


def test_only_what_the_units_from_the_scan_on_took_longer_counts() -> None:
    """The scan from 1.0 to 1.02 s: two units of 5 ms more; the slow ones long before it are not its doing."""
    ends, costs = units(slow=range(100, 102), by_s=0.005)
    costs[:20] += 1.0
    assert excess_s(ends, costs, 1.0, 1.02) == pytest.approx(0.01)


def test_a_machine_that_gets_slower_all_the_time_is_not_taken_for_the_scan() -> None:
    """A tenth over the whole run."""
    ends, costs = units(drift=0.1)
    assert abs(excess_s(ends, costs, 1.5, 1.52)) < 0.05 * AFTER_S


def test_a_scan_that_costs_nothing_shows_as_nothing() -> None:
    ends, costs = units()
    assert excess_s(ends, costs, 1.0, 1.02) == pytest.approx(0.0)


def test_the_ratio_is_the_loss_over_the_interval() -> None:
    assert Loss(interval_s=10.0, per_scan_s=0.05).ratio == pytest.approx(1.005)
