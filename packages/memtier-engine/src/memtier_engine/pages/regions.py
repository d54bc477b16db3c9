"""Page chunks in, counters per region out: the view of memory that region-based policies have. No IO.

A region is `pages_in_region` pages cut from the start of a mapping; the last one of a mapping may be shorter.
Counters belong to a region's exact address and length: a region that is unmapped or re-cut takes its counters
with it, so the table holds what is mapped now and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memtier_engine.distinct import distinct
from memtier_engine.model import PAGE_BYTES, PAGE_SHIFT, U64, Bools, PageChunk, ProcessId, Spans

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Counters:
    """Regions of one process [n], ascending and disjoint, and what was seen of each."""

    starts: U64
    ends: U64  # exclusive
    accesses: I64  # pages seen accessed, summed over scans
    writes: I64  # pages seen written, summed over scans

    @property
    def pages(self) -> I64:
        """Length of each in pages."""
        return ((self.ends - self.starts) >> np.uint64(PAGE_SHIFT)).astype(np.int64)

    def __len__(self) -> int:
        return len(self.starts)


class RegionCounters:
    """Counts accessed and written pages per region of any number of processes."""

    def __init__(self, pages_in_region: int = 512, max_count_per_region: int = 0, *, writes_only: bool = False) -> None:
        """Set up an empty table.

        Args:
            pages_in_region: where mappings are cut.
            max_count_per_region: the most that one scan adds to a region; 0: no limit.
            writes_only: the tracker's `accessed` says no more than its `written`: count it once.
        """
        if pages_in_region < 1 or max_count_per_region < 0:
            raise ValueError("pages_in_region must be 1 or more, max_count_per_region 0 or more")
        self.pages_in_region = pages_in_region
        self.max_count_per_region = max_count_per_region
        self.writes_only = writes_only
        self._tables: dict[ProcessId, _Table] = {}

    def begin(self, process: ProcessId, spans: Spans) -> None:
        """A scan of `spans` begins: what is counted from now on is capped as one scan."""
        table = self._tables.get(process)
        if table is None:
            self._tables[process] = _Table(spans, self.pages_in_region)
            return
        table.commit(self.max_count_per_region)
        if not spans.same_as(table.spans):
            self._tables[process] = _Table(spans, self.pages_in_region, table)

    def add(self, process: ProcessId, chunk: PageChunk) -> None:
        """Count a chunk of the scan that began last."""
        table = self._tables[process]
        if not self.writes_only:
            if chunk.rates is not None:
                table.add_rates(chunk.start, chunk.rates)
            else:
                table.add_flags(table.new_accesses, chunk.start, _counted(chunk.accessed, chunk.movable))
        if chunk.written is not None:
            table.add_flags(table.new_writes, chunk.start, _counted(chunk.written, chunk.movable))

    def of(self, process: ProcessId) -> Counters:
        """The counters of one process since the last reset.

        Raises:
            KeyError: it was never scanned.
        """
        table = self._tables[process]
        table.commit(self.max_count_per_region)
        return Counters(table.starts, table.ends, table.accesses.copy(), table.writes.copy())

    def processes(self) -> frozenset[ProcessId]:
        """Those that have counters."""
        return frozenset(self._tables)

    def keep(self, processes: Iterable[ProcessId]) -> None:
        """Forget all other processes."""
        for process in self._tables.keys() - set(processes):
            del self._tables[process]

    def reset(self) -> None:
        """Set all counters to 0."""
        for table in self._tables.values():
            for column in (table.accesses, table.writes, table.new_accesses, table.new_writes):
                column[:] = 0


def _counted(flags: Bools, movable: Bools | None) -> Bools:
    return flags if movable is None else flags & movable  # shared pages are nobody's


class _Table:
    """The regions of one process as columns."""

    def __init__(self, spans: Spans, pages_in_region: int, before: _Table | None = None) -> None:
        self.spans = spans
        self.starts, self.ends = cut(spans, pages_in_region)
        self.offsets = np.concatenate(([0], np.cumsum((self.ends - self.starts) >> np.uint64(PAGE_SHIFT)))).astype(
            np.int64
        )
        self.accesses = np.zeros(len(self.starts), np.int64)
        self.writes = np.zeros(len(self.starts), np.int64)
        self.new_accesses = np.zeros(len(self.starts), np.float64)
        self.new_writes = np.zeros(len(self.starts), np.float64)
        if before is not None and len(before.starts):
            at = np.minimum(np.searchsorted(before.starts, self.starts), len(before.starts) - 1)
            same = (before.starts[at] == self.starts) & (before.ends[at] == self.ends)
            self.accesses[same] = before.accesses[at[same]]
            self.writes[same] = before.writes[at[same]]

    def add_flags(self, column: F64, start: int, flags: Bools) -> None:
        """Add the pages of a chunk whose flag is set."""
        regions, cuts = self._regions(start, len(flags))
        if len(cuts):
            column[regions] += np.add.reduceat(flags.view(np.uint8), cuts, dtype=np.int64)

    def add_rates(self, start: int, rates: NDArray[np.float32]) -> None:
        """Add accesses given per page."""
        regions, cuts = self._regions(start, len(rates))
        if len(cuts):
            self.new_accesses[regions] += np.add.reduceat(rates, cuts, dtype=np.float64)

    def _regions(self, start: int, pages: int) -> tuple[slice, I64]:
        """(the regions that a chunk touches, the chunk's first page in each)."""
        first = int(np.searchsorted(self.starts, np.uint64(start), side="right")) - 1
        if first < 0 or not pages:
            return slice(0, 0), np.zeros(0, np.int64)
        # By row: a chunk's pages are consecutive among those of the scanned spans, whatever lies between these.
        row = int(self.offsets[first]) + (start - int(self.starts[first]) >> PAGE_SHIFT)
        last = int(np.searchsorted(self.offsets, row + pages, side="left"))
        return slice(first, last), np.maximum(self.offsets[first:last] - row, 0)

    def commit(self, cap: int) -> None:
        """Take over what the last scan counted."""
        for total, new in ((self.accesses, self.new_accesses), (self.writes, self.new_writes)):
            counted = np.rint(new).astype(np.int64)
            total += np.minimum(counted, cap) if cap else counted
            new[:] = 0.0


def cut(spans: Spans, pages_in_region: int) -> tuple[U64, U64]:
    """(starts[r], ends[r]) of the pieces of at most `pages_in_region` pages, counted from each span's start."""
    per_span = -(-spans.pages // pages_in_region)
    total = int(per_span.sum())
    before = np.cumsum(per_span) - per_span
    index = (np.arange(total, dtype=np.int64) - np.repeat(before, per_span)).astype(np.uint64)
    starts = np.repeat(spans.starts, per_span) + index * np.uint64(pages_in_region * PAGE_BYTES)
    ends = np.minimum(starts + np.uint64(pages_in_region * PAGE_BYTES), np.repeat(spans.ends, per_span))
    return starts, ends


def pieces(starts: U64, ends: U64, weights: tuple[F64, ...]) -> tuple[U64, U64, tuple[F64, ...]]:
    """Ranges that may overlap into disjoint pieces, each with the sum of the weights of the ranges over it.

    A piece cut from a longer range keeps that range's full weight. Ranges that merely touch do not overlap;
    empty ones are dropped.

    Returns: (starts[k], ends[k], one float64[k] per weight), ascending.
    """
    full = ends > starts
    starts, ends = starts[full], ends[full]
    weights = tuple(weight[full] for weight in weights)
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], ends[order]
    weights = tuple(weight[order] for weight in weights)
    if not len(starts) or bool((ends[:-1] <= starts[1:]).all()):
        return starts, ends, weights
    points = distinct(np.concatenate((starts, ends)))
    first = np.searchsorted(points, starts)
    count = np.searchsorted(points, ends) - first
    # Each range's weight goes to each of its pieces: sums of the weights themselves, nothing is subtracted.
    before = np.cumsum(count) - count
    piece = np.arange(int(count.sum())) - np.repeat(before, count) + np.repeat(first, count)
    covered = np.bincount(piece, minlength=len(points) - 1) > 0
    sums = tuple(
        np.bincount(piece, np.repeat(weight, count), minlength=len(points) - 1)[covered].astype(np.float64)
        for weight in weights
    )
    return points[:-1][covered], points[1:][covered], sums


def flatten(parts: Iterable[Counters]) -> Counters:
    """Counters of several trackers over the same process as one table without overlaps, summed."""
    tables = list(parts)
    if not tables:
        none = np.zeros(0, np.uint64)
        return Counters(none, none, np.zeros(0, np.int64), np.zeros(0, np.int64))
    starts, ends, (accesses, writes) = pieces(
        np.concatenate([table.starts for table in tables]),
        np.concatenate([table.ends for table in tables]),
        (
            np.concatenate([table.accesses for table in tables]).astype(np.float64),
            np.concatenate([table.writes for table in tables]).astype(np.float64),
        ),
    )
    return Counters(starts, ends, accesses.astype(np.int64), writes.astype(np.int64))
