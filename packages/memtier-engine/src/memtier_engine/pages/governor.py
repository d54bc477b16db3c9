"""What went out and came back of one address space in, how long its pages must be idle to go out, out. No IO.

Wrong decisions cost us, not the program. Each address space is judged by itself: where too much of what went out is
wanted back early, its pages must from then on be idle for longer than what came back would have been, and half as
long again; where that too is wrong, for twice as long. So the threshold follows from the measured gaps between
touches, and memory that nobody wants goes out all the same, only later. Where nearly all that went out under a raised
threshold comes back, nothing of that space goes out for a while: its tracker is blind to its accesses, or its habit
cannot be learned. What was learned is kept for 20 minutes, twice as long each time that it had to be learned again.

What went out of a process while it was stopped comes back when it goes on, whatever its habits are: once in 20 minutes
that is no wrong decision. A process that is stopped and goes on all the time is judged like any other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveTask, ProcessId
from memtier_engine.pages.ages import AGE_MAX, AgeClock, ProcessPages
from memtier_engine.pages.gaps import BIN_S, BINS, bin_of
from memtier_engine.pages.pageset import common

SHARE_PERCENT = 5.0
"""Of what went out may come back early; of the memory in RAM, within a minute."""
LEAST_PAGES = (256 << 10) // PAGE_BYTES
"""Fewer that came back say nothing."""
WORKING_SET_LEAST_PAGES = (64 << 20) // PAGE_BYTES
"""The minute's share is taken of at least this: 3 MiB in a minute are 14 faults per second, which nobody feels."""
WINDOW_S = 660.0
"""Came back within that time after going out: early. The ledger's time of judgement, and the width of a slice of it."""
SLOT_S = 60.0
HOLD_S = 1200.0
"""For so long a raised threshold stays as it is, then it halves once in the same time."""
HELD_S = 600.0
"""For so long nothing goes out where all that went out under a raised threshold came back."""
HELD_SHARE = 0.5
HELD_LEAST_PAGES = (1 << 20) // PAGE_BYTES
"""Less that came back raises the threshold, but is no reason to leave the rest of a process alone: of memory that is
used at random, what is seldom used comes back whatever the threshold, and each time there is less of it."""
MARGIN = 1.5
"""A page is idle for a little longer now and then."""
CALM_HOLDS = 4.0
"""Times of holding without a wrong decision after which the next one counts a degree less."""
LONGEST_S = 24 * 3600.0


@dataclass(slots=True)
class _Slot:
    """What happened in a minute."""

    begin_s: float
    out: int = 0
    back: int = 0
    gaps: dict[int, int] = field(default_factory=dict)  # by bin


@dataclass(slots=True)
class _Round:
    """The last wrong decision: all that went out before it was noticed, and what came back of it."""

    out: int = 0
    back: int = 0
    allowed: float = 0.0
    gaps: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))


class Governor:
    """One per address space."""

    def __init__(self, share_percent: float = SHARE_PERCENT) -> None:
        """`share_percent`: see `SHARE_PERCENT`."""
        self._share = share_percent / 100
        self._slots: deque[_Slot] = deque()
        self._round = _Round()
        self._level_s = 0.0
        self.raised_s = -np.inf
        """When a decision last turned out wrong; -inf: never."""
        self._held_until_s = -np.inf
        self.strikes = 0
        """Wrong decisions that are not forgotten."""
        self.rounds = 0
        """Wrong decisions ever."""
        self._excused_s = -np.inf
        self._excused_pages = 0

    def went_out(self, pages: int, now_s: float) -> None:
        """So many pages went out."""
        self._slot(now_s).out += pages

    def withdraw(self, pages: int, out_s: float) -> None:
        """So many of the pages that went out at `out_s` were freed by their process: neither right nor wrong.

        Those of a round that was judged already are no longer counted: they must not be taken off what went out since.
        """
        if out_s < self.raised_s - 1e-3:  # a mean of equal times is off by a rounding
            return
        for slot in reversed(self._slots):
            taken = min(pages, slot.out)
            slot.out -= taken
            pages -= taken

    def came_back(self, pages: int, gap_s: float, out_s: float, now_s: float) -> None:
        """So many pages that went out at `out_s` were wanted early, `gap_s` after the touch before."""
        if out_s < self.raised_s - 1e-3:  # a mean of equal times is off by a rounding
            # Still the old mistake: nothing new, but what is known of it grows.
            self._round.back += pages
            self._round.gaps[bin_of(gap_s)] += pages
            self._level_s = max(self._level_s, self._needed_s(self._round))
            self._hold(now_s)
            return
        slot = self._slot(now_s)
        slot.back += pages
        index = bin_of(gap_s)
        slot.gaps[index] = slot.gaps.get(index, 0) + pages

    def excuses(self, now_s: float) -> bool:
        """Whether what goes out now of a process that is stopped may come back without having been a wrong decision."""
        return not 0 <= now_s - self._excused_s < HOLD_S

    def excused(self, pages: int, now_s: float) -> None:
        """So many pages came back that `excuses` was asked about when they went out."""
        self._excused_pages += pages
        if self._excused_pages >= LEAST_PAGES:
            self._excused_pages, self._excused_s = 0, now_s

    def judge(self, resident_pages: int, now_s: float) -> bool:
        """To be asked after each scan. Whether it was a wrong decision: then the threshold is higher from now on."""
        self._expire(now_s)
        back = sum(slot.back for slot in self._slots)
        if back < LEAST_PAGES:
            return False
        out = sum(slot.out for slot in self._slots)
        minute = sum(slot.back for slot in self._slots if now_s - slot.begin_s <= SLOT_S)
        of_ram = self._share * max(resident_pages, WORKING_SET_LEAST_PAGES)
        if back <= self._share * out and minute <= of_ram:
            return False
        gaps = np.zeros(BINS, np.int64)
        for slot in self._slots:
            for index, pages in slot.gaps.items():
                gaps[index] += pages
        level_s = self.min_idle_s(now_s)
        calm_s = max(0.0, now_s - self.raised_s)
        self.strikes = max(0, self.strikes - int(min(calm_s / (CALM_HOLDS * self._hold_s), 1e9))) + 1
        self.rounds += 1
        self._round = _Round(out, back, min(self._share * out, of_ram), gaps)
        self._level_s = min(LONGEST_S, max(self._needed_s(self._round), 2 * level_s))
        self.raised_s = now_s
        self._slots.clear()
        self._hold(now_s)
        return True

    def min_idle_s(self, now_s: float) -> float:
        """The least time that a page must have been idle to go out; 0: any."""
        if not self._level_s:
            return 0.0
        over_s = max(0.0, now_s - self.raised_s - self._hold_s)
        level_s = self._level_s * 0.5 ** min(64.0, over_s / self._hold_s)
        return level_s if level_s >= 1.0 else 0.0

    def held(self, now_s: float) -> bool:
        """Whether nothing at all may go out."""
        return now_s < self._held_until_s <= now_s + LONGEST_S

    def why(self, now_s: float) -> str:
        """Why less goes out than its policy wants; empty: nothing is held back."""
        if self.held(now_s):
            return f"{self._said()}: nothing goes out for {self._held_until_s - now_s:.0f} s"
        least_s = self.min_idle_s(now_s)
        return f"{self._said()}: only what is idle for {least_s:.0f} s goes out" if least_s else ""

    def _said(self) -> str:
        back, out = (pages * PAGE_BYTES / (1 << 20) for pages in (self._round.back, self._round.out))
        return f"{back:.3g} of {out:.3g} MiB paged out came back early"

    @property
    def _hold_s(self) -> float:
        return min(LONGEST_S, HOLD_S * 2.0 ** min(32, max(0, self.strikes - 1)))

    def _hold(self, now_s: float) -> None:
        if self.strikes > 1 and self._round.back >= max(HELD_LEAST_PAGES, HELD_SHARE * self._round.out):
            for_s = min(LONGEST_S, HELD_S * 2.0 ** min(32, self.strikes - 2))
            self._held_until_s = max(self._held_until_s, self.raised_s + for_s)

    def _needed_s(self, wrong: _Round) -> float:
        """Idle for at least so long, no more than what is allowed would have gone out and come back."""
        above = np.append(np.cumsum(wrong.gaps[::-1])[::-1], 0)
        first = int(np.argmax(above <= wrong.allowed))
        return min(LONGEST_S, MARGIN * float(BIN_S[min(first, BINS - 1)]))

    def _slot(self, now_s: float) -> _Slot:
        self._expire(now_s)
        if not self._slots or not 0 <= now_s - self._slots[-1].begin_s < SLOT_S:
            self._slots.append(_Slot(now_s))
        return self._slots[-1]

    def _expire(self, now_s: float) -> None:
        while self._slots and now_s - self._slots[0].begin_s >= WINDOW_S + SLOT_S:
            self._slots.popleft()


def governed(
    tasks: Sequence[MoveTask],
    pages: Mapping[ProcessId, ProcessPages],
    clock: AgeClock,
    governors: Mapping[ProcessId, Governor],
    now_s: float,
) -> list[MoveTask]:
    """A decision's tasks, those to swap without the pages that are not idle for long enough in their space."""
    left = []
    for task in tasks:
        governor = governors.get(task.process)
        if task.to_node == SWAP_NODE and governor is not None:
            least = _least_age(governor, clock, now_s)
            own = pages.get(task.process)
            if least > AGE_MAX or own is None:
                continue
            if least:
                task = replace(task, spans=common(task.spans, own.select(age_from=least)))
        if len(task.spans):
            left.append(task)
    return left


def withheld_bytes(
    pages: Mapping[ProcessId, ProcessPages], clock: AgeClock, governors: Mapping[ProcessId, Governor], now_s: float
) -> int:
    """The most that `governed` can cut: for decisions under a budget, that others do not get less for it."""
    total = 0
    for process, governor in governors.items():
        own = pages.get(process)
        least = _least_age(governor, clock, now_s)
        if own is not None and least:
            total += int(own.histogram()[: min(least, AGE_MAX + 1)].sum())
    return total * PAGE_BYTES


def _least_age(governor: Governor, clock: AgeClock, now_s: float) -> int:
    """The smallest age that may go out; above `AGE_MAX`: none."""
    if governor.held(now_s):
        return AGE_MAX + 1
    least_s = governor.min_idle_s(now_s)
    if not least_s:
        return 0
    least = clock.least_age(least_s)
    return AGE_MAX + 1 if least is None else least
