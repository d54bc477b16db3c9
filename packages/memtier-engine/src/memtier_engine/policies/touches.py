"""How often pages are touched again, by how long they have been idle: what policy `auto` knows of a program. No IO.

Arrays are by `gaps.BIN_S`, bins of idle time that grow with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from memtier_engine.pages.gaps import BIN_S, BINS, BINS_PER_DOUBLING, bins_of

LESS_EVENTS_THAN_THIS = 1.0
"""Added to the touches counted: where little was seen, no touch is no proof."""
ENOUGH_EVENTS = 10.0
"""Touches to expect, at the rate of the doubling before, until a lower rate is believed."""

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(slots=True)
class Window:
    """What one window of time saw, by bin."""

    touched: I64 = field(default_factory=lambda: np.zeros(BINS, np.int64))
    """Pages touched again after so long."""
    risked_min: F64 = field(default_factory=lambda: np.zeros(BINS, np.float64))
    """Minutes that pages spent being idle for so long."""
    minutes: float = 0.0


def by_bin(age_pages: I64, idle_s: F64) -> I64:
    """int64[BINS]: pages by how long they are idle, from pages by age."""
    counts = np.zeros(BINS, np.int64)
    np.add.at(counts, bins_of(idle_s), age_pages)
    return counts


def from_above(values: I64 | F64) -> F64:
    """float64[BINS]: sums of each bin and all above it."""
    sums: F64 = np.cumsum(values[::-1], dtype=np.float64)[::-1]
    return sums


def hazard_of(history: Sequence[Window]) -> F64:
    """float64[BINS]: touches per minute to expect of a page that is idle for so long; inf where nothing is known.

    Per doubling of idleness: the worse of the last window and the whole history. A doubling that has seen too little to
    tell gets at least the rate of the one before.
    """
    touched = np.array([_per_doubling(window.touched) for window in history], np.float64)
    risked = np.array([_per_doubling(window.risked_min) for window in history])
    exposed = risked.sum(axis=0)
    rate = np.fmax(_rate(touched.sum(axis=0), exposed), _rate(touched[-1], risked[-1]))
    known = np.flatnonzero(np.isfinite(rate))
    if not len(known):
        return np.full(BINS, np.inf)
    before = rate[known[0]]
    filled = np.full(len(rate), before)
    for number in range(int(known[0]), len(rate)):
        if np.isnan(rate[number]):
            filled[number] = before
        elif exposed[number] * before >= ENOUGH_EVENTS:
            filled[number] = before = rate[number]
        else:
            filled[number] = max(before, rate[number])
    return np.repeat(filled, BINS_PER_DOUBLING)[:BINS]


def coming_of_age(resident: I64, hazard: F64, window_s: float) -> F64:
    """float64[BINS]: of the pages in RAM that are younger than each bin, those that will get there within `window_s`.

    Pages that were last touched at one time, as those from before the start, come of age together.
    """
    ends_s = np.append(BIN_S[1:], np.inf)
    survived = np.concatenate(([0.0], np.cumsum(hazard[:-1] * np.diff(BIN_S) / 60)))  # minus its logarithm
    chance = np.exp(np.minimum(0.0, survived[:, None] - survived[None, :]))  # of a page in bin i to get to bin j
    near = (BIN_S[None, :] > BIN_S[:, None]) & (BIN_S[None, :] - ends_s[:, None] < window_s)
    reached: F64 = resident.astype(np.float64) @ np.where(near, chance, 0.0)
    return reached


def measured_from(history: Sequence[Window]) -> tuple[F64, F64]:
    """float64[BINS] each: pages touched per minute after at least so long.

    Returns: (the worse of all windows' average and the last window, the worst window).
    """
    rates = np.array([from_above(window.touched) / window.minutes for window in history])
    average = np.average(rates, axis=0, weights=[window.minutes for window in history])
    return np.maximum(average, rates[-1]), rates.max(axis=0)


def _per_doubling(values: I64 | F64) -> F64:
    padded = np.zeros(-(-BINS // BINS_PER_DOUBLING) * BINS_PER_DOUBLING)
    padded[:BINS] = values
    summed: F64 = padded.reshape(-1, BINS_PER_DOUBLING).sum(axis=1)
    return summed


def _rate(touched: F64, risked_min: F64) -> F64:
    """Touches per page and minute; nan where nobody was at risk."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(risked_min > 0, (touched + LESS_EVENTS_THAN_THIS) / risked_min, np.nan)
