"""Policy `auto`: a goal in, and the age threshold follows from what was measured. No IO.

How often pages of each age are touched again is measured all the time, on pages in RAM (their age when they
are touched) and on pages that came back. From that follows, for any threshold, how many pages per minute would
be wanted back if all older ones were out; the smallest threshold whose price is within the limit is used.

What makes this hold on real programs:

- Pages older than anything measured so far are expected to be touched as often as the oldest measured ones:
  programs touch pages less often the longer they were idle, so this errs on the careful side, and the threshold
  cannot fall below what was seen.
- A bad window (a phase change) counts in full for the next window, and with its share of the history after
  that. Where more came back than the goal allows, nothing is paged out during the next window.

The idea of taking the price of a threshold from an age histogram is from "Software-Defined Far Memory in
Warehouse-Scale Computers" (ASPLOS 2019); there, ages beyond the measured ones have no price.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from memtier_engine.ages import AGE_MAX, PAGED_OUT, AgeClock, ProcessPages
from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveTask, ProcessId
from memtier_engine.policies.base import BasePolicy
from memtier_engine.policies.goals import Goal
from memtier_engine.refaults import BIN_S, BINS, BINS_PER_DOUBLING, bins_of

HISTORY_WINDOWS = 20
SAFE_REFAULTS_PERCENT = 2.0
"""Per minute: the limit where the goal is another one."""
PSI_REFAULTS_PERCENT = (0.01, 5.0)
"""With goal `psi` the limit moves between these."""
PSI_START_PERCENT = 0.2
RAM_LEAST_PAGES = (4 << 20) // PAGE_BYTES
"""Refaults are taken as a share of at least this: a handful of pages is no rate."""
LESS_EVENTS_THAN_THIS = 1.0
"""Added to the touches counted: where little was seen, no touch is no proof."""

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class GapSource(Protocol):
    """Knows after how long pages are touched again: `refaults.RefaultLedger`."""

    def take_gaps(self) -> I64:
        """int64[BINS]: pages touched again since the last call, by the time since the touch before."""

    def out_pages(self, now_s: float, total: int) -> I64:
        """int64[BINS]: the `total` pages that are out, by how long they have been idle."""


class Gauges(Protocol):
    """What some goals need to know of the machine."""

    def stall_percent(self, now_s: float) -> float | None:
        """Share of the time since the last call in which some task waited for memory; None: not known."""

    def available_bytes(self) -> int | None:
        """MemAvailable of the node; None: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoPolicyConfig:
    """A goal, and how to work for it."""

    goal: Goal = field(default_factory=lambda: Goal("refaults", 0.2))
    interval_ms: int = 5000
    """Time between decisions."""
    window_ms: int = 60_000
    """Time between new thresholds."""
    idle_least_s: float = 30.0
    """Nothing younger goes out, whatever the goal."""

    def __post_init__(self) -> None:
        if self.interval_ms <= 0:
            raise ConfigError(f"value {self.interval_ms}", key_path="intervalms", hint="use 1 or more; default 5000")
        if self.window_ms < self.interval_ms:
            raise ConfigError(
                f"value {self.window_ms}", key_path="windowms", hint=f"use intervalms ({self.interval_ms}) or more"
            )
        if self.idle_least_s <= 0:
            raise ConfigError(f"value {self.idle_least_s}", key_path="idleleast", hint="use more than 0 s")


@dataclass(frozen=True, slots=True)
class AutoState:
    """What it does now and why."""

    threshold_s: float | None = None
    """Pages idle for at least so long go out. None: none do."""
    limit_percent_per_min: float = 0.0
    """Refaults it allows itself, as a share of the memory in RAM."""
    refaults_percent_per_min: float | None = None
    """Refaults of the last window. None: no window is complete yet."""
    reason: str = "nothing is measured yet"


@dataclass(slots=True)
class _Window:
    """What one window saw, by bin."""

    touched: I64
    """Pages touched again after so long."""
    risked_min: F64
    """Minutes that pages spent being idle for so long."""
    minutes: float = 0.0


class AutoPolicy(BasePolicy):
    """Pages out what the goal allows or asks for, the oldest first."""

    name = "auto"

    def __init__(self, config: AutoPolicyConfig, gaps: GapSource, gauges: Gauges | None = None) -> None:
        """`gauges` are needed for the goals `psi` and `free`."""
        if gauges is None and config.goal.kind in ("psi", "free"):
            raise ConfigError(f"goal {config.goal.kind} without gauges", hint="give the policy `gauges`")
        self.config = config
        self.state = AutoState()
        self._gaps = gaps
        self._gauges = gauges
        self._history: deque[_Window] = deque(maxlen=HISTORY_WINDOWS)
        self._open = _empty_window()
        self._window_begin_s: float | None = None
        self._last_s: float | None = None
        self._psi_limit_percent = PSI_START_PERCENT

    @property
    def interval_ms(self) -> int | None:
        """As configured."""
        return self.config.interval_ms

    def decide(
        self, pages: Mapping[ProcessId, ProcessPages], clock: AgeClock, budget_bytes: int | None
    ) -> list[MoveTask]:
        """See `Policy.decide`."""
        now_s = clock.now_s
        ages: I64 = sum((own.histogram() for own in pages.values()), np.zeros(256, np.int64))
        idle_s = clock.idle_s()
        out_total = int(ages[PAGED_OUT])
        resident = _by_bin(ages[: AGE_MAX + 1], idle_s)
        out = self._gaps.out_pages(now_s, out_total)
        self._measure(resident + out, now_s)
        if self._window_begin_s is None:
            self._window_begin_s = now_s
        elif now_s - self._window_begin_s >= self.config.window_ms / 1000:
            self._close_window(resident, out, now_s)
        if self.state.threshold_s is None:
            return []
        least = clock.least_age(self.state.threshold_s)
        if least is None:
            return []
        wanted = self._wanted_pages(int(resident.sum()), out_total)
        if budget_bytes is not None:
            budget = max(1, budget_bytes // PAGE_BYTES)
            wanted = budget if wanted is None else min(wanted, budget)
        return _oldest(pages, ages, max(1, least), wanted)

    def _measure(self, at_risk: I64, now_s: float) -> None:
        """Take over what was touched since the last decision, and who could have been."""
        passed_s = 0.0 if self._last_s is None else max(0.0, now_s - self._last_s)
        self._last_s = now_s
        self._open.touched += self._gaps.take_gaps()
        self._open.risked_min += at_risk * (passed_s / 60)

    def _close_window(self, resident: I64, out: I64, now_s: float) -> None:
        assert self._window_begin_s is not None
        minutes = (now_s - self._window_begin_s) / 60
        window, self._open = self._open, _empty_window()
        window.minutes = minutes
        self._window_begin_s = now_s
        self._history.append(window)
        in_ram = max(RAM_LEAST_PAGES, int(resident.sum()))
        before_s = self.state.threshold_s or np.inf
        came_back = int(window.touched[before_s <= BIN_S].sum()) if np.isfinite(before_s) else 0
        refaults = 100 * came_back / minutes / in_ram
        limit, pause = self._limit(refaults, now_s)
        threshold_s, share = self._threshold(resident, out, limit / 100)
        reason = f"{self.config.goal}: about {100 * share:.2g} % of the memory in RAM would come back per minute"
        if pause is not None:
            threshold_s, reason = None, pause
        elif threshold_s is None:
            reason = (
                f"{self.config.goal}: whatever the threshold, {100 * share:.2g} % of the memory in RAM are "
                f"expected back per minute, {limit:.2g} % are allowed"
            )
        self.state = AutoState(threshold_s, limit, refaults, reason)

    def _limit(self, refaults_percent: float, now_s: float) -> tuple[float, str | None]:
        """(refaults to allow in percent per minute, why nothing may go out in the next window)."""
        goal = self.config.goal
        limit, pause = SAFE_REFAULTS_PERCENT, None
        if goal.kind == "refaults":
            limit = goal.value
        elif goal.kind == "psi":
            assert self._gauges is not None
            stall = self._gauges.stall_percent(now_s)
            low, high = PSI_REFAULTS_PERCENT
            if stall is None:
                return self._psi_limit_percent, f"{goal}: the stall time is not known"
            if stall > goal.value:
                self._psi_limit_percent = max(low, self._psi_limit_percent / 2)
                pause = f"{goal}: the last window had {stall:.2g} %"
            elif stall <= goal.value / 2:
                self._psi_limit_percent = min(high, self._psi_limit_percent * 1.25)
            limit = self._psi_limit_percent
        if pause is None and refaults_percent > limit:
            pause = (
                f"{goal}: {refaults_percent:.2g} % per minute came back in the last window, {limit:.2g} % are allowed"
            )
        return limit, pause

    def _threshold(self, resident: I64, out: I64, allowed_per_min: float) -> tuple[float | None, float]:
        """(the smallest threshold within the price, that price per minute), both as shares of the memory in RAM."""
        hazard = _hazard(self._history)
        already = float((out * hazard).sum())
        # price[b]: of having all pages out that are idle for at least BIN_S[b]. Two ways to tell, and the dearer
        # counts: what all pages of that age are expected to do, and what pages did that were idle for so long.
        pages = np.maximum(already + _from_above(resident * hazard), _measured(self._history))
        # What goes out is not in RAM any more when the price is due.
        going = _from_above(resident)
        wanted = self._wanted_pages(int(resident.sum()), int(out.sum()))
        left = resident.sum() - (going if wanted is None else np.minimum(going, wanted))
        price = pages / np.maximum(left, RAM_LEAST_PAGES)
        risked = np.flatnonzero(np.any([window.risked_min > 0 for window in self._history], axis=0))
        if not len(risked):
            return None, 0.0
        oldest_s = float(BIN_S[risked[-1]])  # beyond that, nothing has been measured
        usable = (np.float64(self.config.idle_least_s) <= BIN_S) & (np.float64(oldest_s) >= BIN_S)
        fits = np.flatnonzero((price <= allowed_per_min) & usable)
        if not len(fits):
            return None, float(price[risked[-1]])
        return float(BIN_S[fits[0]]), float(price[fits[0]])

    def _wanted_pages(self, resident: int, out: int) -> int | None:
        """How many more pages the goal asks for; None: as many as the threshold gives."""
        goal = self.config.goal
        if goal.kind == "save":
            return max(0, int(goal.value / 100 * (resident + out)) - out)
        if goal.kind == "free":
            assert self._gauges is not None
            available = self._gauges.available_bytes()
            return 0 if available is None else max(0, int(goal.value) - available) // PAGE_BYTES
        return None


def _empty_window() -> _Window:
    return _Window(np.zeros(BINS, np.int64), np.zeros(BINS, np.float64))


def _by_bin(age_pages: I64, idle_s: F64) -> I64:
    """int64[BINS]: pages by how long they are idle, from pages by age."""
    counts = np.zeros(BINS, np.int64)
    np.add.at(counts, bins_of(idle_s), age_pages)
    return counts


def _hazard(history: deque[_Window]) -> F64:
    """float64[BINS]: touches per minute to expect of a page that is idle for so long.

    Per doubling of idleness: the worse of the last window and the whole history. Doublings in which nothing has
    been yet get what the one before has.
    """
    touched = np.array([_per_doubling(window.touched) for window in history], np.float64)
    risked = np.array([_per_doubling(window.risked_min) for window in history])
    pooled = _rate(touched.sum(axis=0), risked.sum(axis=0))
    last = _rate(touched[-1], risked[-1])
    rate = np.fmax(pooled, last)
    known = np.flatnonzero(np.isfinite(rate))
    if not len(known):
        return np.full(BINS, np.inf)
    filled = rate[known[np.maximum(np.searchsorted(known, np.arange(len(rate)), side="right") - 1, 0)]]
    return np.repeat(filled, BINS_PER_DOUBLING)[:BINS]


def _measured(history: deque[_Window]) -> F64:
    """float64[BINS]: pages touched per minute after at least so long: on average, or in the last window."""
    total = np.sum([window.touched for window in history], axis=0) / sum(window.minutes for window in history)
    last = history[-1].touched / history[-1].minutes
    return np.maximum(_from_above(total), _from_above(last))


def _from_above(by_bin: NDArray[np.int64] | F64) -> F64:
    """Sums of each bin and all above it."""
    return np.cumsum(by_bin[::-1], dtype=np.float64)[::-1]


def _per_doubling(by_bin: NDArray[np.int64] | F64) -> F64:
    padded = np.zeros(-(-BINS // BINS_PER_DOUBLING) * BINS_PER_DOUBLING)
    padded[:BINS] = by_bin
    summed: F64 = padded.reshape(-1, BINS_PER_DOUBLING).sum(axis=1)
    return summed


def _rate(touched: F64, risked_min: F64) -> F64:
    """Touches per page and minute; nan where nobody was at risk."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(risked_min > 0, (touched + LESS_EVENTS_THAN_THIS) / risked_min, np.nan)


def _oldest(pages: Mapping[ProcessId, ProcessPages], ages: I64, least: int, wanted: int | None) -> list[MoveTask]:
    """Tasks for all pages of at least age `least`, or for the `wanted` oldest of them."""
    older = np.cumsum(ages[: AGE_MAX + 1][::-1])[::-1]  # pages of at least each age
    cut, rest = least, None
    if wanted is not None and older[least] > wanted:
        # All pages older than the cut, and of the cut's age as many as are still wanted.
        cut = least + int(np.flatnonzero(older[least:] > wanted)[-1])
        rest = wanted - (int(older[cut + 1]) if cut < AGE_MAX else 0)
    tasks = []
    if rest is None or cut < AGE_MAX:
        first = cut if rest is None else cut + 1
        for process, own in pages.items():
            spans = own.select(age_from=first)
            if len(spans):
                tasks.append(MoveTask(process, spans, SWAP_NODE, "auto"))
    for process, own in pages.items():
        if not rest:
            break
        spans = own.select(age_from=cut, age_to=cut, limit_pages=rest)
        if len(spans):
            rest -= int(spans.pages.sum())
            tasks.append(MoveTask(process, spans, SWAP_NODE, "auto"))
    return tasks
