"""Processes with habits under policy `age`, the ledger and the governors: everything of an engine that decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from memtier_engine.model import PAGE_BYTES, PageChunk, ProcessId, Spans
from memtier_engine.pages.ages import PAGED_OUT, AgeClock, ProcessPages
from memtier_engine.pages.governor import governed, withheld_bytes
from memtier_engine.pages.refaults import RefaultLedger
from memtier_engine.pages.spaceledger import idle_of
from memtier_engine.policies.age import AgePolicy, AgePolicyConfig
from support.fakes import BASE, spans

Habit = Callable[[float, float], NDArray[np.bool_]]
"""(from, to) -> bool[pages]: what is touched then."""


class Program:
    """One process of the simulation."""

    def __init__(self, process: ProcessId, habit: Habit, pages: int) -> None:
        self.own = ProcessPages(process)
        self.own.set_spans(spans((0, pages)))
        self.habit = habit
        self.resident = np.ones(pages, np.bool_)
        self.out: list[tuple[float, int]] = []
        """(time, pages) of what went out."""
        self.back: list[tuple[float, int]] = []

    def wrong_rounds(self, *, least_pages: int = 64) -> list[float]:
        """When memory that had gone out before came back: the first time of each page-out that was wanted back."""
        rounds: list[float] = []
        for at_s, pages in self.back:
            last_out_s = max((out_s for out_s, _ in self.out if out_s < at_s), default=0.0)
            if pages >= least_pages and (not rounds or last_out_s >= rounds[-1]):
                rounds.append(at_s)
        return rounds

    def back_after(self, begin_s: float) -> int:
        """Pages that came back after that."""
        return sum(pages for at_s, pages in self.back if at_s > begin_s)


class SpaceSim:
    """An engine's decisions, at the pace of its scans. Time is simulated."""

    def __init__(
        self, programs: Mapping[ProcessId, Program], *, idle_s: float, scan_s: float = 5.0, governs: bool = True
    ) -> None:
        self.programs = programs
        self.scan_s = scan_s
        self.clock = AgeClock()
        self.ledger = RefaultLedger(share_percent=5.0 if governs else None)
        self.policy = AgePolicy(AgePolicyConfig(interval_ms=int(scan_s * 1000), swap_out_ms=int(idle_s * 1000)))
        self.now_s = 0.0

    def run(self, seconds: float, *, budget_bytes: int | None = None) -> None:
        end_s = self.now_s + seconds
        pages = {process: program.own for process, program in self.programs.items()}
        while self.now_s < end_s:
            began_s, self.now_s = self.now_s, self.now_s + self.scan_s
            self.clock.begin_scan(self.now_s, self.scan_s)
            for process, program in self.programs.items():
                self._scan(process, program, began_s)
            governors = self.ledger.governors
            if budget_bytes is not None:
                allowed = budget_bytes + withheld_bytes(pages, self.clock, governors, self.now_s)
            tasks = self.policy.decide(pages, self.clock, None if budget_bytes is None else allowed)
            left = budget_bytes
            for task in governed(tasks, pages, self.clock, governors, self.now_s):
                part = task.spans if left is None else _first(task.spans, left)
                left = None if left is None else left - part.total_bytes
                self._page_out(task.process, part)

    def _scan(self, process: ProcessId, program: Program, began_s: float) -> None:
        touched = program.habit(began_s, self.now_s)
        back = touched & ~program.resident
        if back.any():
            program.back.append((self.now_s, int(back.sum())))
        program.resident |= back
        seen = PageChunk(BASE, touched, program.resident.copy())
        self.ledger.observe(process, program.own, seen, self.clock.idle_s(), self.now_s)
        program.own.update(seen, self.clock.step_table())
        self.ledger.settle(process, program.own, None, self.now_s)

    def _page_out(self, process: ProcessId, part: Spans) -> None:
        if not len(part):
            return
        program = self.programs[process]
        idle_s = idle_of(program.own, part, self.clock.idle_s())
        self.ledger.paged_out(process, part, Spans.empty(), idle_s, self.now_s)
        program.own.set_age(part, PAGED_OUT)
        program.out.append((self.now_s, int(part.pages.sum())))
        for start, end in zip(part.starts.tolist(), part.ends.tolist(), strict=True):
            program.resident[(start - BASE) // PAGE_BYTES : (end - BASE) // PAGE_BYTES] = False


def _first(part: Spans, limit_bytes: int) -> Spans:
    from memtier_engine.guards.guardset import first_bytes

    return first_bytes(part, limit_bytes)


def every(period_s: float, pages: int, *, share: float = 1.0, phase_s: float = 0.0) -> Habit:
    """The first share of the pages is touched at once every `period_s`, the rest never."""
    some = np.arange(pages) < round(share * pages)

    def touched(begin_s: float, end_s: float) -> NDArray[np.bool_]:
        return some if (begin_s - phase_s) // period_s != (end_s - phase_s) // period_s else ~some & False

    return touched
