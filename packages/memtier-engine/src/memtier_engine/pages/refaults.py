"""What we paged out and what came back: how right the decisions were, and after how long pages are wanted again.

No IO. Pages are remembered as compressed bitmaps, one generation per slice of time: 8 KiB per 256 MiB of address
space before compression, some tens of bytes after it where pages go out in runs.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from memtier_engine.model import PAGE_BYTES, PAGE_SHIFT, U64, Bools, PageChunk, ProcessId, Spans
from memtier_engine.pages.ages import AGE_MAX, PAGED_OUT, ProcessPages

JUDGE_S = 600.0
"""What comes back within this time counts against the decision."""
GENERATIONS = 10
"""Into which the time of judgement is cut."""
_BLOCK_SHIFT = 16
_BLOCK_PAGES = 1 << _BLOCK_SHIFT
_BLOCK_BYTES = _BLOCK_PAGES // 8

BINS_PER_DOUBLING = 8
BINS = 20 * BINS_PER_DOUBLING + 1
BIN_S: NDArray[np.float64] = np.concatenate(([0.0], 2.0 ** (np.arange(1, BINS) / BINS_PER_DOUBLING)))
"""float64[BINS]: the least gap of each bin in seconds, from 0 to 12 days."""


def bins_of(seconds: NDArray[np.float64]) -> NDArray[np.intp]:
    """The bin of each gap."""
    return np.searchsorted(BIN_S, seconds, side="right") - 1


class PageSet:
    """A set of pages of one address space, compressible."""

    def __init__(self) -> None:
        self._blocks: dict[int, bytearray | bytes] = {}
        self._sealed = False

    @property
    def stored_bytes(self) -> int:
        """What the bitmaps take."""
        return sum(map(len, self._blocks.values()))

    def add(self, spans: Spans) -> None:
        """Put in all pages of `spans`."""
        self._change(spans, add=True)

    def remove(self, spans: Spans) -> None:
        """Take out all pages of `spans`."""
        self._change(spans, add=False)

    def contains(self, pages: U64) -> Bools:
        """bool[n] for page numbers uint64[n] (address / page size), ascending."""
        found = np.zeros(len(pages), np.bool_)
        for block, first, last in _by_block(pages):
            stored = self._blocks.get(block)
            if stored is not None:
                bits = self._bits(stored)
                low = (pages[first:last] & np.uint64(_BLOCK_PAGES - 1)).astype(np.int64)
                found[first:last] = (bits[low >> 3] >> (low & 7).astype(np.uint8)) & 1
        return found

    def count(self) -> int:
        """Pages in the set."""
        return sum(int(np.unpackbits(self._bits(stored)).sum(dtype=np.int64)) for stored in self._blocks.values())

    def seal(self) -> None:
        """Compress: from now on it is only read."""
        if not self._sealed:
            self._sealed = True
            self._blocks = {block: zlib.compress(stored, 1) for block, stored in self._blocks.items()}

    def _bits(self, stored: bytearray | bytes) -> NDArray[np.uint8]:
        return np.frombuffer(zlib.decompress(stored) if self._sealed else stored, np.uint8)

    def _change(self, spans: Spans, *, add: bool) -> None:
        assert not self._sealed
        for block, first, last in _by_block(pages := _pages_of(spans)):
            stored = self._blocks.get(block)
            if stored is None:
                if not add:
                    continue
                stored = self._blocks[block] = bytearray(_BLOCK_BYTES)
            bits = np.frombuffer(stored, np.uint8)  # shares the bytearray's memory, which is writable
            mask = np.zeros(_BLOCK_PAGES, np.bool_)
            mask[(pages[first:last] & np.uint64(_BLOCK_PAGES - 1)).astype(np.int64)] = True
            packed = np.packbits(mask, bitorder="little")
            np.copyto(bits, bits | packed if add else bits & ~packed)


def _pages_of(spans: Spans) -> U64:
    """uint64[pages]: the number of every page of `spans`, ascending."""
    lengths = spans.pages
    before = np.cumsum(lengths) - lengths
    index = np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(before, lengths)
    pages: U64 = np.repeat(spans.starts >> np.uint64(PAGE_SHIFT), lengths) + index.astype(np.uint64)
    return pages


def _by_block(pages: U64) -> list[tuple[int, int, int]]:
    """(block, first index, end index) of each run of ascending page numbers in the same block."""
    if not len(pages):
        return []
    blocks = pages >> np.uint64(_BLOCK_SHIFT)
    cuts = np.flatnonzero(blocks[1:] != blocks[:-1]) + 1
    firsts = np.concatenate(([0], cuts))
    lasts = np.concatenate((cuts, [len(pages)]))
    return list(zip(blocks[firsts].tolist(), firsts.tolist(), lasts.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class RefaultStats:
    """How right the decisions to page out were. Bytes since the start."""

    early_bytes: int = 0
    """Came back within the time of judgement (`JUDGE_S`): wrong decisions."""
    late_bytes: int = 0
    """Came back after that."""
    kept_bytes: int = 0
    """Stayed out for longer than that: right decisions."""
    pending_bytes: int = 0
    """Out for less than that, so far right."""
    recent_precision: float | None = None
    """Share of what went out within that time that has not come back. None: nothing went out."""
    stored_bytes: int = 0
    """Memory that remembering takes."""
    swap_ins: int | None = None
    """Faults of its processes on pages in swap, counted by the kernel as they happen. None: not counted here.
    Pages that came along with such a page are in `early_bytes` and `late_bytes`, but not here."""
    swap_in_waits: int | None = None
    """Of them, those that waited for the swap device."""
    swap_in_wait_s: float | None = None
    """Time that these took in all."""

    @property
    def mean_swap_in_wait_s(self) -> float | None:
        """What a process waits, on average, for a page that is not in memory. None: not known."""
        if not self.swap_in_waits or self.swap_in_wait_s is None:
            return None
        return self.swap_in_wait_s / self.swap_in_waits

    @property
    def precision(self) -> float | None:
        """Share of right decisions since the start, those still pending among them. None: there were none."""
        total = self.early_bytes + self.kept_bytes + self.pending_bytes
        return 1 - self.early_bytes / total if total else None


@dataclass(slots=True)
class _Part:
    """What went out of one process in one generation."""

    pages: PageSet = field(default_factory=PageSet)
    moved: int = 0
    back: int = 0
    early: int = 0
    idle_page_s: float = 0.0
    """Sum over its pages of how long each had been idle when it went."""

    @property
    def idle_s(self) -> float:
        return self.idle_page_s / self.moved if self.moved else 0.0


@dataclass(slots=True)
class _Generation:
    begin_s: float
    parts: dict[ProcessId, _Part] = field(default_factory=dict)


class RefaultLedger:
    """Keeps account of one engine's decisions."""

    def __init__(self, *, judge_s: float = JUDGE_S, remember_s: float | None = None, gaps: bool = False) -> None:
        """Set up empty.

        Args:
            judge_s: what comes back within this time counts against the decision.
            remember_s: how long to know when each page went out, if longer than `judge_s`.
            gaps: also count after how long pages are touched again, for policies that ask.
        """
        self.judge_s = judge_s
        self.remember_s = max(judge_s, remember_s or 0.0)
        self.gaps: NDArray[np.int64] | None = np.zeros(BINS, np.int64) if gaps else None
        """int64[BINS]: pages touched again, by the time since the touch before, whether paged out in between or
        not; see `BIN_S`. Grows until `take_gaps`."""
        self._slice_s = judge_s / GENERATIONS
        self._generations: deque[_Generation] = deque()
        self._early = self._late = self._kept = 0
        self._swap_ins: tuple[int, int, float] | None = None
        self._swap_bytes: int | None = None
        self.swap_shrank = False
        """Whether swap was taken away since the scan before: what comes back now was not asked for."""

    def begin_scan(self, swap_bytes: int | None) -> None:
        """A scan begins, of a node with so much swap in all (None: not known).

        swapoff(2) takes what it has brought back off the total as it goes on (si_swapinfo() in mm/swapfile.c).
        """
        before, self._swap_bytes = self._swap_bytes, swap_bytes
        self.swap_shrank = before is not None and swap_bytes is not None and swap_bytes < before

    def paged_out(self, process: ProcessId, moved: Spans, stuck: Spans, idle_s: float, now_s: float) -> None:
        """`moved` without `stuck` went out at `now_s`, after having been idle for `idle_s`."""
        self._expire(now_s)
        generation = self._generations[-1] if self._generations else None
        if generation is None or not 0 <= now_s - generation.begin_s < self._slice_s:
            if generation is not None:
                for part in generation.parts.values():
                    part.pages.seal()
            generation = _Generation(now_s)
            self._generations.append(generation)
        part = generation.parts.setdefault(process, _Part())
        part.pages.add(moved)
        part.pages.remove(stuck)
        pages = max(0, (moved.total_bytes - stuck.total_bytes) // PAGE_BYTES)
        part.moved += pages
        part.idle_page_s += pages * idle_s

    def observe(
        self, process: ProcessId, own: ProcessPages, chunk: PageChunk, idle_s: NDArray[np.float64], now_s: float
    ) -> None:
        """See a chunk before `own` takes it over.

        Args:
            process: whose.
            own: its pages, as of the scan before.
            chunk: what this scan saw.
            idle_s: float64[AGE_MAX + 1], see `AgeClock.idle_s`.
            now_s: time of this scan.
        """
        first = own.index_of(chunk.start)
        ages = own.ages[first : first + len(chunk.accessed)]
        back = np.flatnonzero((ages == PAGED_OUT) & chunk.resident)
        if len(back) and self.swap_shrank:
            self._brought_back(process, own.page_numbers(first + back))
        elif len(back):
            self._came_back(process, own.page_numbers(first + back), now_s)
        if self.gaps is not None:
            touched = np.bincount(ages[chunk.accessed], minlength=256)[1 : AGE_MAX + 1]
            self._count_gaps(idle_s[1:], touched)

    def swapped_in(self, count: int, waits: int, wait_s: float) -> None:
        """The kernel counted `count` faults on pages in swap, of which `waits` took `wait_s` in all."""
        before = self._swap_ins or (0, 0, 0.0)
        self._swap_ins = (before[0] + count, before[1] + waits, before[2] + wait_s)

    def forget(self, process: ProcessId) -> None:
        """The process is no longer ours: what went out of it is neither right nor wrong."""
        for generation in self._generations:
            generation.parts.pop(process, None)

    def take_gaps(self) -> NDArray[np.int64]:
        """`gaps` since the last call; all zero without them."""
        if self.gaps is None:
            return np.zeros(BINS, np.int64)
        taken, self.gaps = self.gaps, np.zeros(BINS, np.int64)
        return taken

    def stats(self, now_s: float) -> RefaultStats:
        """The account at `now_s`."""
        self._expire(now_s)
        moved = early = stored = 0
        kept = self._kept
        for generation in self._generations:
            judged = self._is_judged(generation, now_s)
            for part in generation.parts.values():
                stored += part.pages.stored_bytes
                if judged:
                    kept += max(0, part.moved - part.early)
                else:
                    moved += part.moved
                    early += part.early
        swap_ins, waits, wait_s = self._swap_ins or (None, None, None)
        return RefaultStats(
            early_bytes=self._early * PAGE_BYTES,
            late_bytes=self._late * PAGE_BYTES,
            kept_bytes=kept * PAGE_BYTES,
            pending_bytes=max(0, moved - early) * PAGE_BYTES,
            recent_precision=1 - early / moved if moved else None,
            stored_bytes=stored,
            swap_ins=swap_ins,
            swap_in_waits=waits,
            swap_in_wait_s=wait_s,
        )

    def out_pages(self, now_s: float, total: int) -> NDArray[np.int64]:
        """int64[BINS]: pages that are out, by how long they have been idle.

        `total`: all that are out; those not remembered any more count as idle for as long as is remembered.
        """
        counts = np.zeros(BINS, np.int64)
        for generation in self._generations:
            for part in generation.parts.values():
                idle_s = part.idle_s + max(0.0, now_s - generation.begin_s)
                counts[int(bins_of(np.array([idle_s]))[0])] += max(0, part.moved - part.back)
        counts[int(bins_of(np.array([self.remember_s]))[0])] += max(0, total - int(counts.sum()))
        return counts

    def _brought_back(self, process: ProcessId, pages: U64) -> None:
        """Neither right nor wrong: as if they had not gone out."""
        for generation in reversed(self._generations):
            part = generation.parts.get(process)
            if part is not None and len(pages):
                here = part.pages.contains(pages)
                part.moved -= int(np.count_nonzero(here))
                pages = pages[~here]

    def _came_back(self, process: ProcessId, pages: U64, now_s: float) -> None:
        self._expire(now_s)
        for generation in reversed(self._generations):  # the newest first: a page may have gone out twice
            part = generation.parts.get(process)
            if part is None or not len(pages):
                continue
            here = part.pages.contains(pages)
            found = int(np.count_nonzero(here))
            if found:
                pages = pages[~here]
                part.back += found
                if self._is_judged(generation, now_s):
                    self._late += found
                else:
                    part.early += found
                    self._early += found
                away_s = max(0.0, now_s - generation.begin_s)
                self._count_gaps(np.array([part.idle_s + away_s]), np.array([found]))
        self._late += len(pages)
        self._count_gaps(np.array([self.remember_s]), np.array([len(pages)]))

    def _count_gaps(self, gap_s: NDArray[np.float64], pages: NDArray[np.int64]) -> None:
        if self.gaps is not None:
            np.add.at(self.gaps, bins_of(gap_s), pages)

    def _is_judged(self, generation: _Generation, now_s: float) -> bool:
        return now_s - generation.begin_s >= self.judge_s + self._slice_s

    def _expire(self, now_s: float) -> None:
        while self._generations and now_s - self._generations[0].begin_s >= self.remember_s + self._slice_s:
            for part in self._generations.popleft().parts.values():
                self._kept += max(0, part.moved - part.early)
