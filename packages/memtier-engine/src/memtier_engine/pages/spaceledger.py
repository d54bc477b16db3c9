"""The account of one address space: what went out, what came back, after how long, and whether it was wanted. No IO.

Pages are remembered as compressed bitmaps (`PageSet`), one per slice of time and doubling of idle time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from memtier_engine.distinct import among, distinct
from memtier_engine.model import PAGE_SHIFT, U64, Bools, PageChunk, Spans
from memtier_engine.pages.ages import AGE_MAX, PAGED_OUT, ProcessPages
from memtier_engine.pages.gaps import BINS, bin_of, bins_of
from memtier_engine.pages.governor import Governor
from memtier_engine.pages.pageset import PageSet, page_numbers_of, within

JUDGE_S = 600.0
"""What comes back within this time counts against the decision."""
GENERATIONS = 10
"""Into which the time of judgement is cut."""
REGION_SHIFT = 21
"""Swap-ins are counted per 2 MiB."""
PAGES_PER_FAULT = 16
"""That a fault of a system call is taken to bring in: of a swap device 8 are read ahead (vm.page-cluster), and 64 KiB
are the folios that machines with mTHP use most. Source: mm/swap_state.c; mm/memory.c, alloc_swap_folio()."""
_FEW_RUNS = 16
"""So many are put into a set one by one; of more, the array of all their pages costs less."""

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SwapInsSeen:
    """What the kernel counted of one address space since the scan before, all of that time."""

    regions: U64
    """Addresses of the 2 MiB regions where a program's own access found a page in swap."""
    other_waits: int
    """Major faults besides those: of system calls on its memory, and of its files."""


class _Kind(Enum):
    """Why pages went out."""

    DECIDED = 1
    """They were idle: wrong if they are wanted soon."""
    TRIAL = 2
    """To find out whether they are idle: no decision that could be wrong."""
    STOPPED = 3
    """Their process was stopped, and nothing it has was in use: that it goes on says nothing about its pages."""


@dataclass(slots=True)
class _Part:
    """What went out in one slice of time after having been idle for about the same time."""

    kind: _Kind
    pages: PageSet = field(default_factory=PageSet)
    moved: int = 0
    back: int = 0
    early: int = 0
    idle_page_s: float = 0.0
    """Sum over its pages of how long each had been idle when it went."""
    out_page_s: float = 0.0
    """Sum over its pages of when each went."""

    @property
    def idle_s(self) -> float:
        return self.idle_page_s / self.moved if self.moved > 0 else 0.0

    @property
    def out_s(self) -> float:
        return self.out_page_s / self.moved if self.moved > 0 else 0.0

    def went_out(self, pages: int, idle_page_s: float, now_s: float) -> None:
        """So many more, at `now_s`; `idle_page_s`: the sum of how long each had been idle."""
        self.moved += pages
        self.idle_page_s += idle_page_s
        self.out_page_s += pages * now_s

    def withdraw(self, pages: int) -> None:
        """So many of it count as if they had not gone out."""
        self.idle_page_s -= pages * self.idle_s
        self.out_page_s -= pages * self.out_s
        self.moved -= pages


@dataclass(slots=True)
class _Generation:
    begin_s: float
    parts: dict[tuple[int, _Kind], _Part] = field(default_factory=dict)  # by doublings of idle time, and why

    def part(self, doubling: int, kind: _Kind) -> _Part:
        """The one for what was idle for so long, made if need be."""
        return self.parts.setdefault((doubling, kind), _Part(kind))


class SpaceLedger:
    """Keeps account of the decisions about one address space."""

    def __init__(
        self,
        *,
        judge_s: float = JUDGE_S,
        remember_s: float | None = None,
        gaps: bool = False,
        governor: Governor | None = None,
    ) -> None:
        """Set up empty.

        Args:
            judge_s: what comes back within this time counts against the decision.
            remember_s: how long to know when each page went out, if longer than `judge_s`.
            gaps: also count after how long pages are touched again, for policies that ask.
            governor: is told of what goes out and comes back; None: nobody is.
        """
        self.judge_s = judge_s
        self.remember_s = max(judge_s, remember_s or 0.0)
        self.governor = governor
        self._gaps: I64 | None = np.zeros(BINS, np.int64) if gaps else None
        self.early = self.late = 0
        """Pages that were wanted back, within the time of judgement and after it."""
        self.kept = 0
        """Pages that stayed out for longer than is remembered."""
        self._slice_s = judge_s / GENERATIONS
        self._generations: deque[_Generation] = deque()
        self._returned: list[U64] = []
        self._returned_s = 0.0
        self._seen: SwapInsSeen | None = None  # of the window before

    @property
    def stored_bytes(self) -> int:
        """Memory that remembering takes."""
        return sum(part.pages.stored_bytes for _, part in self._parts())

    @property
    def returned(self) -> bool:
        """Whether pages came back in this scan of which it is not settled yet whether they were wanted."""
        return bool(self._returned)

    def paged_out(
        self,
        moved: Spans,
        stuck: Spans,
        idle_s: float | F64,
        now_s: float,
        *,
        trial: bool = False,
        stopped: bool = False,
    ) -> None:
        """`moved` without `stuck` went out at `now_s`.

        Args:
            moved: asked for.
            stuck: of it, still where it was.
            idle_s: how long they had been idle, of all or float64[pages of `moved`]; nan where it is not known.
            now_s: when.
            trial: a few pages, to find out whether they are idle: no decision that could be wrong.
            stopped: the process was stopped (SIGSTOP); see `Governor.excuses`.
        """
        kind = _Kind.TRIAL if trial else _Kind.DECIDED
        if stopped and not trial and self.governor is not None and self.governor.excuses(now_s):
            kind = _Kind.STOPPED
        self._settle_rest()
        self._expire(now_s)
        generation = self._generations[-1] if self._generations else None
        judged_s = -np.inf if self.governor is None else self.governor.raised_s
        if generation is None or not (
            # What went out before the governor learned something is not mixed with what went out after it.
            judged_s <= generation.begin_s <= now_s < generation.begin_s + self._slice_s
        ):
            if generation is not None:
                for part in generation.parts.values():
                    part.pages.seal()
            generation = _Generation(now_s)
            self._generations.append(generation)
        if not isinstance(idle_s, np.ndarray) and not len(stuck) and len(moved) <= _FEW_RUNS:
            count = moved.total_bytes >> PAGE_SHIFT
            same_s = 0.0 if math.isnan(idle_s) else float(idle_s)
            part = generation.part(int(math.log2(max(same_s, 1.0))), kind)
            part.pages.add_runs(moved)
            part.went_out(count, same_s * count, now_s)
        else:
            pages = page_numbers_of(moved)
            idle = np.broadcast_to(np.nan_to_num(np.asarray(idle_s, np.float64)), pages.shape)
            if len(stuck):
                went = ~within(pages, stuck)
                pages, idle = pages[went], idle[went]
            count = len(pages)
            doublings = np.log2(np.maximum(idle, 1.0)).astype(np.int64)
            for doubling in distinct(doublings).tolist():
                of_part = doublings == doubling
                part = generation.part(doubling, kind)
                part.pages.add(pages[of_part])
                part.went_out(int(np.count_nonzero(of_part)), float(idle[of_part].sum()), now_s)
        if self.governor is not None and count and kind is _Kind.DECIDED:
            self.governor.went_out(count, now_s)

    def remapped(self, own: ProcessPages, spans: Spans) -> None:
        """The process's mappings will be `spans`: what is not in them any more was freed, by munmap(2) or execve(2)."""
        if spans.same_as(own.spans):
            return
        out = own.page_numbers(np.flatnonzero(own.ages == PAGED_OUT))
        self._withdraw(out[~within(out, spans)])

    def observe(self, own: ProcessPages, chunk: PageChunk, idle_s: F64, now_s: float, *, unasked: bool = False) -> None:
        """See a chunk before `own` takes it over. After the last one, `settle`.

        Args:
            own: its pages, as of the scan before.
            chunk: what this scan saw.
            idle_s: float64[AGE_MAX + 1], see `AgeClock.idle_s`.
            now_s: time of this scan.
            unasked: swap was taken away, which brings pages back that nobody wanted.
        """
        first = own.index_of(chunk.start)
        ages = own.ages[first : first + len(chunk.accessed)]
        out = ages == PAGED_OUT
        back = np.flatnonzero(out & chunk.resident)
        if len(back) and unasked:
            self._withdraw(own.page_numbers(first + back))
        elif len(back):
            self._returned.append(own.page_numbers(first + back))
            self._returned_s = now_s
        if chunk.swapped is not None:
            gone = np.flatnonzero(out & ~chunk.resident & ~chunk.swapped)
            self._withdraw(own.page_numbers(first + gone))
        if self._gaps is not None:
            touched = np.bincount(ages[chunk.accessed], minlength=256)[1 : AGE_MAX + 1]
            self._count_gaps(idle_s[1:], touched)

    def settle(self, seen: SwapInsSeen | None) -> int:
        """Decide of what this scan saw come back whether it was wanted. Returns the pages that were.

        `seen`: what the kernel counted; None: not known, then all was wanted.
        """
        before, self._seen = self._seen, seen
        if not self._returned:
            return 0
        pages = np.concatenate(self._returned)
        self._returned.clear()
        if seen is not None and before is not None:
            # Scans take time: a fault may have been counted with the window before and its page seen only now.
            regions = np.concatenate((seen.regions, before.regions))
            wanted = _wanted(pages, regions, seen.other_waits + before.other_waits)
            self._withdraw(pages[~wanted])
            pages = pages[wanted]
        self._came_back(pages, self._returned_s)
        return len(pages)

    def take_gaps(self) -> I64:
        """int64[BINS]: pages touched again since the last call, by the time since the touch before, whether paged out
        in between or not; see `gaps.BIN_S`. All zero without them."""
        self._settle_rest()
        taken = np.zeros(BINS, np.int64)
        if self._gaps is not None:
            taken, self._gaps = self._gaps, taken
        return taken

    def counts(self, now_s: float) -> tuple[int, int, int]:
        """Pages (kept for longer than the time of judgement, still judged and not back, still judged)."""
        self._settle_rest()
        self._expire(now_s)
        kept, moved, early = self.kept, 0, 0
        for generation, part in self._parts():
            if self._is_judged(generation, now_s):
                kept += max(0, part.moved - part.early)
            else:
                moved += part.moved
                early += part.early
        return kept, max(0, moved - early), moved

    def out_pages(self, now_s: float) -> I64:
        """int64[BINS]: pages that are out and remembered, by how long they have been idle."""
        self._settle_rest()
        counts = np.zeros(BINS, np.int64)
        for _, part in self._parts():
            counts[bin_of(part.idle_s + max(0.0, now_s - part.out_s))] += max(0, part.moved - part.back)
        return counts

    def _settle_rest(self) -> None:
        """For those who do not ask whether what came back was wanted."""
        if self._returned:
            seen = self._seen
            self.settle(None)
            self._seen = seen

    def _parts(self) -> Iterator[tuple[_Generation, _Part]]:
        """The newest first: a page may have gone out twice."""
        for generation in reversed(self._generations):
            for part in generation.parts.values():
                yield generation, part

    def _withdraw(self, pages: U64) -> None:
        """Neither right nor wrong: as if they had not gone out."""
        for _, part in self._parts():
            if not len(pages):
                return
            here = part.pages.contains(pages)
            found = int(np.count_nonzero(here))
            if found:
                out_s = part.out_s
                part.withdraw(found)
                if not part.pages.sealed:
                    part.pages.remove(pages[here])
                if self.governor is not None and part.kind is _Kind.DECIDED:
                    self.governor.withdraw(found, out_s)
                pages = pages[~here]

    def _came_back(self, pages: U64, now_s: float) -> None:
        self._expire(now_s)
        for generation, part in self._parts():
            if not len(pages):
                return
            here = part.pages.contains(pages)
            found = int(np.count_nonzero(here))
            if not found:
                continue
            if not part.pages.sealed:
                part.pages.remove(pages[here])  # it may go out again in the same slice of time
            pages = pages[~here]
            part.back += found
            gap_s = part.idle_s + max(0.0, now_s - part.out_s)
            if self._is_judged(generation, now_s):
                self.late += found
            else:
                part.early += found
                self.early += found
                if self.governor is not None and part.kind is _Kind.DECIDED:
                    self.governor.came_back(found, gap_s, part.out_s, now_s)
                elif self.governor is not None and part.kind is _Kind.STOPPED:
                    self.governor.excused(found, now_s)
            self._count_gaps(np.array([gap_s]), np.array([found]))
        self.late += len(pages)
        self._count_gaps(np.array([self.remember_s]), np.array([len(pages)]))

    def _count_gaps(self, gap_s: F64, pages: I64) -> None:
        if self._gaps is not None:
            np.add.at(self._gaps, bins_of(gap_s), pages)

    def _is_judged(self, generation: _Generation, now_s: float) -> bool:
        return now_s - generation.begin_s >= self.judge_s + self._slice_s

    def _expire(self, now_s: float) -> None:
        while self._generations and now_s - self._generations[0].begin_s >= self.remember_s + self._slice_s:
            for part in self._generations.popleft().parts.values():
                self.kept += max(0, part.moved - part.early)


def _wanted(pages: U64, regions: U64, other_waits: int) -> Bools:
    """bool[n]: which of the pages that came back were wanted: those of regions where something was swapped in.

    The others were freed and filled anew between two scans, or a system call touched them. The latter waits for swap,
    and the kernel says of a process how often it waited, though not where.
    """
    known = among(pages >> np.uint64(REGION_SHIFT - PAGE_SHIFT), regions >> np.uint64(REGION_SHIFT))
    others = len(pages) - int(np.count_nonzero(known))
    if others and other_waits * PAGES_PER_FAULT >= others:
        return np.ones(len(pages), np.bool_)
    return known


def idle_alike(own: ProcessPages, spans: Spans, idle_s: F64) -> float | F64:
    """As `idle_of`; one number where all pages have been idle for as long, as those that go out together mostly have.

    `idle_s`: see `AgeClock.idle_s`.
    """
    age = own.age_alike(spans)
    alike_s = np.nan if age is None or age > AGE_MAX else float(idle_s[age])
    return alike_s if np.isfinite(alike_s) else idle_of(own, spans, idle_s)


def idle_of(own: ProcessPages, spans: Spans, idle_s: F64) -> F64:
    """float64[pages of `spans`]: how long each had been idle at the last scan; nan: not mapped or not in RAM then.

    `idle_s`: see `AgeClock.idle_s`.
    """
    pages = page_numbers_of(spans)
    found = np.full(len(pages), np.nan)
    mapped = within(pages, own.spans)
    at = pages[mapped] << np.uint64(PAGE_SHIFT)
    span = np.searchsorted(own.spans.starts, at, side="right") - 1
    ages = own.ages[own.offsets[span] + ((at - own.spans.starts[span]) >> np.uint64(PAGE_SHIFT)).astype(np.int64)]
    known = ages <= AGE_MAX
    seconds = np.full(len(ages), np.nan)
    seconds[known] = idle_s[ages[known]]
    found[mapped] = np.where(np.isfinite(seconds), seconds, np.nan)
    return found
