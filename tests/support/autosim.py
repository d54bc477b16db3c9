"""A simulated process for policy `auto`: pages with known habits, real ages and refault accounts, an instant mover."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from memtier_engine.model import PAGE_BYTES, PageChunk, Spans
from memtier_engine.pages.ages import PAGED_OUT, AgeClock, ProcessPages
from memtier_engine.pages.refaults import RefaultLedger
from memtier_engine.policies.auto import AutoPolicy
from support.fakes import BASE, PROCESS, spans

SCAN_S = 5.0
Habit = Callable[[float, float], NDArray[np.bool_]]
"""(from, to) to bool[pages]: touched in that time."""


def periodic(periods_s: NDArray[np.float64], seed: int = 1) -> Habit:
    """Every page is touched each `periods_s`, at a phase of its own; inf: never."""
    phase = np.random.default_rng(seed).random(len(periods_s))

    def touched(begin_s: float, end_s: float) -> NDArray[np.bool_]:
        return np.floor(end_s / periods_s + phase) > np.floor(begin_s / periods_s + phase)

    return touched


class Simulation:
    """Scans every 5 s; what the policy wants out is out at once; a touch brings a page back."""

    def __init__(self, pages: int, habit: Habit, ledger: RefaultLedger) -> None:
        self.pages = pages
        self.habit = habit
        self.ledger = ledger
        self.policy: AutoPolicy
        self.clock = AgeClock()
        self.own = ProcessPages(PROCESS)
        self.own.set_spans(spans((0, pages)))
        self.resident = np.ones(pages, np.bool_)
        self.now_s = 0.0
        self.refaults: list[tuple[float, int]] = []
        """(time, pages that were out and touched) per scan, by the simulation's own count."""

    @property
    def out_share(self) -> float:
        return 1 - float(self.resident.mean())

    def refault_percent_per_min(self, begin_s: float, end_s: float) -> float:
        """Of the memory in RAM at the end."""
        came = sum(count for at_s, count in self.refaults if begin_s < at_s <= end_s)
        return 100 * came / (int(self.resident.sum()) or 1) / ((end_s - begin_s) / 60)

    def run(self, seconds: float, *, budget_bytes: int | None = None) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            began_s, self.now_s = self.now_s, self.now_s + SCAN_S
            touched = self.habit(began_s, self.now_s)
            back = touched & ~self.resident
            self.refaults.append((self.now_s, int(back.sum())))
            self.resident |= back
            self.clock.begin_scan(self.now_s)
            seen = PageChunk(BASE, touched, self.resident.copy())
            self.ledger.observe(PROCESS, self.own, seen, self.clock.idle_s(), self.now_s)
            self.own.update(seen, self.clock.step_table())
            for task in self.policy.decide({PROCESS: self.own}, self.clock, budget_bytes):
                first = int(self.own.ages[self.own.index_of(int(task.spans.starts[0]))])
                idle_s = float(self.clock.idle_s()[first])
                self.ledger.paged_out(PROCESS, task.spans, Spans.empty(), idle_s, self.now_s)
                self.own.set_age(task.spans, PAGED_OUT)
                for start, end in zip(task.spans.starts.tolist(), task.spans.ends.tolist(), strict=True):
                    self.resident[(start - BASE) // PAGE_BYTES : (end - BASE) // PAGE_BYTES] = False
