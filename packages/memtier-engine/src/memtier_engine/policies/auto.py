"""Policy `auto`: a goal in, and the age threshold follows from what was measured. No IO.

How often pages of each age are touched again is measured all the time, on pages in RAM (their age when they
are touched) and on pages that came back. From that follows, for any threshold, how many pages per minute would
be wanted back if all older ones were out; the smallest threshold whose price is within the limit is used. Where the
price of each is too high, as of memory of which a little is wanted now and then, a part of it goes out: pieces of
128 KiB from all over it, which cost their share of the price.

What makes this hold on real programs:

- Pages older than anything measured so far are expected to be touched as often as the oldest measured ones:
  programs touch pages less often the longer they were idle, so this errs on the careful side, and the threshold
  cannot fall below what was seen. Nor is a lower rate believed before enough was seen to tell.
- Memory that was last touched at one time reaches a threshold at one time: what will get there before the next
  window ends is in the price.
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

from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveTask, ProcessId, Why
from memtier_engine.pages.ages import AGE_MAX, PAGED_OUT, AgeClock, ProcessPages
from memtier_engine.pages.gaps import BIN_S
from memtier_engine.policies.base import BasePolicy
from memtier_engine.policies.goals import Goal, GoalConfig
from memtier_engine.policies.touches import I64, Window, by_bin, coming_of_age, from_above, hazard_of, measured_from

HISTORY_WINDOWS = 20
SAFE_REFAULTS_PERCENT = 2.0
"""Per minute: the limit where the goal is another one."""
PSI_REFAULTS_PERCENT = (0.01, 5.0)
"""With goal `psi` the limit moves between these."""
PSI_START_PERCENT = 0.2
RAM_LEAST_PAGES = (4 << 20) // PAGE_BYTES
"""Refaults are taken as a share of at least this: a handful of pages is no rate."""
PART_OF_LIMIT = 0.5
"""Of the limit, used where only a part of the pages of an age goes."""
LEAST_SHARE = 0.02
"""Less of a group than this is not worth a move."""


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
class AutoPolicyConfig(GoalConfig):
    """`window_ms`: between new thresholds."""

    goal: Goal = field(default_factory=lambda: Goal("refaults", 0.2))


@dataclass(frozen=True, slots=True)
class AutoState:
    """What it does now and why."""

    threshold_s: float | None = None
    """Pages idle for at least so long go out. None: none do."""
    share: float = 1.0
    """Of them, this share goes out."""
    limit_percent_per_min: float = 0.0
    """Refaults it allows itself, as a share of the memory in RAM."""
    refaults_percent_per_min: float | None = None
    """Refaults of the last window. None: no window is complete yet."""
    reason: str = "nothing is measured yet"


@dataclass(frozen=True, slots=True)
class _Choice:
    threshold_s: float | None
    share: float
    price_per_min: float
    """Of all pages so old, as a share of the memory in RAM."""


class AutoPolicy(BasePolicy):
    """Pages out what the goal allows or asks for, the oldest first."""

    name = "auto"

    def __init__(self, config: AutoPolicyConfig, gaps: GapSource, gauges: Gauges | None = None) -> None:
        """`gauges` are needed for the goals `psi` and `free`."""
        if gauges is None and config.goal.kind in ("psi", "free"):
            raise ConfigError(f"goal {config.goal.kind} without gauges", hint="give the policy `gauges`")
        self.config = config
        self._interval_ms = config.interval_ms
        self.state = AutoState()
        self._gaps = gaps
        self._gauges = gauges
        self._history: deque[Window] = deque(maxlen=HISTORY_WINDOWS)
        self._open = Window()
        self._window_begin_s: float | None = None
        self._last_s: float | None = None
        self._psi_limit_percent = PSI_START_PERCENT

    def decide(
        self, pages: Mapping[ProcessId, ProcessPages], clock: AgeClock, budget_bytes: int | None
    ) -> list[MoveTask]:
        """See `Policy.decide`."""
        now_s = clock.now_s
        ages: I64 = sum((own.histogram() for own in pages.values()), np.zeros(256, np.int64))
        idle_s = clock.idle_s()
        out_total = int(ages[PAGED_OUT])
        resident = by_bin(ages[: AGE_MAX + 1], idle_s)
        out = self._gaps.out_pages(now_s, out_total)
        # Nobody was watched while the engine was stopped: that time proves no page to be cold.
        counted_s = clock.counted_s
        self._measure(resident + out, counted_s)
        if self._window_begin_s is None:
            self._window_begin_s = counted_s
        elif counted_s - self._window_begin_s >= self.config.window_ms / 1000:
            self._close_window(resident, out, counted_s, now_s)
        if self.state.threshold_s is None:
            return []
        least = clock.least_age(self.state.threshold_s)
        if least is None:
            return []
        wanted = self._wanted_pages(int(resident.sum()), out_total)
        if budget_bytes is not None:
            budget = max(1, budget_bytes // PAGE_BYTES)
            wanted = budget if wanted is None else min(wanted, budget)
        movable: I64 = sum((own.histogram(leave=tuple(Why)) for own in pages.values()), np.zeros(256, np.int64))
        return _oldest(pages, movable, max(1, least), wanted, self.state.share)

    def _measure(self, at_risk: I64, counted_s: float) -> None:
        """Take over what was touched since the last decision, and who could have been."""
        passed_s = 0.0 if self._last_s is None else max(0.0, counted_s - self._last_s)
        self._last_s = counted_s
        self._open.touched += self._gaps.take_gaps()
        self._open.risked_min += at_risk * (passed_s / 60)

    def _close_window(self, resident: I64, out: I64, counted_s: float, now_s: float) -> None:
        assert self._window_begin_s is not None
        minutes = (counted_s - self._window_begin_s) / 60
        window, self._open = self._open, Window()
        window.minutes = minutes
        self._window_begin_s = counted_s
        self._history.append(window)
        in_ram = max(RAM_LEAST_PAGES, int(resident.sum()))
        before_s = self.state.threshold_s or np.inf
        # Of pages so old, a share was out; the others were touched in RAM.
        came_back = self.state.share * int(window.touched[before_s <= BIN_S].sum()) if np.isfinite(before_s) else 0
        refaults = 100 * came_back / minutes / in_ram
        limit, pause = self._limit(refaults, now_s)
        choice = self._choose(resident, out, limit / 100)
        expected = f"{100 * choice.price_per_min:.2g} % of the memory in RAM"
        threshold_s, share = choice.threshold_s, choice.share
        if pause is not None:
            threshold_s, share, reason = None, 1.0, pause
        elif threshold_s is None:
            reason = (
                f"{self.config.goal}: whatever the threshold, {expected} are expected back per minute, "
                f"{limit:.2g} % are allowed"
            )
        elif share < 1:
            reason = (
                f"{self.config.goal}: {expected} would come back per minute if all went out that is so old, "
                f"{limit:.2g} % are allowed: {100 * share:.2g} % of it goes"
            )
        else:
            reason = f"{self.config.goal}: about {expected} would come back per minute"
        self.state = AutoState(threshold_s, share, limit, refaults, reason)

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

    def _choose(self, resident: I64, out: I64, allowed_per_min: float) -> _Choice:
        """What should be out, that what comes back is at most `allowed_per_min` of the memory in RAM.

        All pages from the smallest age on that is within that price. Where no age is, a part of the pages of the age
        that saves the most, at half the price and that of the worst window: it is drawn, and draws differ.
        """
        hazard = hazard_of(self._history)
        risked = np.flatnonzero(np.any([window.risked_min > 0 for window in self._history], axis=0))
        if not len(risked):
            return _Choice(None, 1.0, 0.0)
        oldest_s = float(BIN_S[risked[-1]])  # beyond that, nothing has been measured
        usable = (np.float64(self.config.idle_least_s) <= BIN_S) & (np.float64(oldest_s) >= BIN_S)
        coming = coming_of_age(resident, hazard, self.config.window_ms / 1000)
        measured, worst = measured_from(self._history)
        in_ram = int(resident.sum())
        # price[b]: of having all pages out that are idle for at least BIN_S[b]. Two ways to tell, and the dearer
        # counts: what all pages of that age are expected to do, and what pages did that were idle for so long.
        in_ram_cost, out_cost = from_above(resident * hazard) + coming * hazard, from_above(out * hazard)
        pages = np.maximum(out_cost[0] + in_ram_cost, measured)
        # What goes out is not in RAM any more when the price is due.
        going = from_above(resident) + coming
        wanted = self._wanted_pages(in_ram, int(out.sum()))
        left = in_ram - (going if wanted is None else np.minimum(going, wanted))
        price = pages / np.maximum(left, RAM_LEAST_PAGES)
        fits = np.flatnonzero((price <= allowed_per_min) & usable)
        if len(fits):
            return _Choice(float(BIN_S[fits[0]]), 1.0, float(price[fits[0]]))
        # share * cost + younger <= allowed * (in RAM now + out_of_age - share * of_age), which is in RAM then.
        allowed = PART_OF_LIMIT * allowed_per_min
        out_of_age = from_above(out)
        of_age = going + out_of_age
        cost, younger = np.maximum(in_ram_cost + out_cost, worst), out_cost[0] - out_cost
        room = allowed * (in_ram + out_of_age) - younger
        shares = np.clip(room / np.maximum(cost + allowed * of_age, 1e-9), 0.0, 1.0)  # 0 / 0 where there are no pages
        gain = np.where(usable & (shares >= LEAST_SHARE), shares * of_age - out_of_age, 0.0)
        best = int(np.argmax(gain))
        if gain[best] < 1:
            return _Choice(None, 1.0, float(price[risked[-1]]))
        return _Choice(float(BIN_S[best]), float(shares[best]), float(price[best]))

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


def _oldest(
    pages: Mapping[ProcessId, ProcessPages], ages: I64, least: int, wanted: int | None, share: float
) -> list[MoveTask]:
    """Tasks for a share of the pages of at least age `least`, or for the `wanted` oldest of these."""
    # Pages of at least each age; with a share about so many, the draw decides.
    older = share * np.cumsum(ages[: AGE_MAX + 1][::-1])[::-1]
    cut, rest = least, None
    if wanted is not None and older[least] > wanted:
        # All pages older than the cut, and of the cut's age as many as are still wanted.
        cut = least + int(np.flatnonzero(older[least:] > wanted)[-1])
        rest = wanted - (int(older[cut + 1]) if cut < AGE_MAX else 0)
    tasks = []
    if rest is None or cut < AGE_MAX:
        first = cut if rest is None else cut + 1
        for process, own in pages.items():
            spans = own.select(age_from=first, share=share, leave_kept=True)
            if len(spans):
                tasks.append(MoveTask(process, spans, SWAP_NODE, "auto"))
    for process, own in pages.items():
        if not rest:
            break
        spans = own.select(age_from=cut, age_to=cut, limit_pages=rest, share=share, leave_kept=True)
        if len(spans):
            rest -= int(spans.pages.sum())
            tasks.append(MoveTask(process, spans, SWAP_NODE, "auto"))
    return tasks
