"""What trackers share: cutting spans into pieces of bounded size, and knowing which pages are seen for the first time.

A process can have a hundred thousand spans, so all of this is arithmetic on columns: per chunk, never per span.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memtier_engine.hostfs.handles import OpenProcesses, ProcessFiles
from memtier_engine.hostfs.host import Host
from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, PAGE_SHIFT, Bools, ProcessId, Spans

CHUNK_BYTES = CHUNK_PAGES * PAGE_BYTES
BLOCK_SHIFT = 21
"""A page table of the lowest level, or a huge page: 2 MiB on x86_64."""
BLOCK_BYTES = 1 << BLOCK_SHIFT
I64 = NDArray[np.int64]


def cut(spans: Spans, most_pages: int = CHUNK_PAGES, most_blocks: int | None = None) -> Iterator[Spans]:
    """The pieces of `spans` chunk by chunk, in address order; none reaches over the end of a span.

    Args:
        spans: what to cut.
        most_pages: in one chunk.
        most_blocks: distinct 2 MiB blocks in one chunk, and no chunk ends within one if it can be helped. None: any.
    """
    if not len(spans):
        return
    if len(spans) == 1:  # what the mover asks about: small, and in one piece
        start, end = int(spans.starts[0]), int(spans.ends[0])
        blocks_in = (end - 1 >> BLOCK_SHIFT) + 1 - (start >> BLOCK_SHIFT)
        if start < end <= start + (most_pages << PAGE_SHIFT) and (most_blocks is None or blocks_in <= most_blocks):
            yield spans
            return
    offsets = offsets_of(spans)
    blocks = None if most_blocks is None else _Blocks(spans)
    at, total = 0, int(offsets[-1])
    while at < total:
        end = min(at + most_pages, total)
        if blocks is not None and most_blocks is not None:
            end = blocks.end(offsets, at, end, most_blocks)
        first = int(np.searchsorted(offsets, at, side="right")) - 1
        last = int(np.searchsorted(offsets, end, side="left")) - 1
        starts, ends = spans.starts[first : last + 1].copy(), spans.ends[first : last + 1].copy()
        starts[0] = _address(spans, offsets, first, at)
        ends[-1] = _address(spans, offsets, last, end)
        yield Spans(starts, ends)
        at = end


class _Blocks:
    """Numbers the 2 MiB blocks that spans lie in; neighbours in the same block share its number."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans
        first = (spans.starts >> np.uint64(BLOCK_SHIFT)).astype(np.int64)
        self._last = ((spans.ends - np.uint64(1)) >> np.uint64(BLOCK_SHIFT)).astype(np.int64)
        new = self._last - first + 1
        new[1:] -= first[1:] == self._last[:-1]
        self._upto = np.cumsum(new)

    def end(self, offsets: I64, at: int, end: int, most: int) -> int:
        """Where a chunk of the pages from `at` on has to end: at `end`, or before."""
        spans = self._spans
        span = int(np.searchsorted(offsets, at, side="right")) - 1
        begin = _address(spans, offsets, span, at)
        beyond = int(self._upto[span]) - 1 - (int(self._last[span]) - (begin >> BLOCK_SHIFT)) + most
        other = int(np.searchsorted(self._upto, beyond, side="right"))
        if other < len(spans):
            block = int(self._last[other]) - (int(self._upto[other]) - 1 - beyond)
            stop = max(int(spans.starts[other]), block << BLOCK_SHIFT)
            end = min(end, int(offsets[other]) + (stop - int(spans.starts[other]) >> PAGE_SHIFT))
        last = int(np.searchsorted(offsets, end, side="left")) - 1
        over = _address(spans, offsets, last, end) & (BLOCK_BYTES - 1)
        if end < int(offsets[last + 1]) and end - (over >> PAGE_SHIFT) > max(at, int(offsets[last])):
            end -= over >> PAGE_SHIFT
        return end


def offsets_of(spans: Spans) -> I64:
    """int64[n + 1]: number of pages before each span, and of all."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(spans.pages)))


def _address(spans: Spans, offsets: I64, span: int, page: int) -> int:
    return int(spans.starts[span]) + (page - int(offsets[span]) << PAGE_SHIFT)


def spans_of(pieces: Spans) -> Spans | None:
    """The `PageChunk.spans` of some pieces: None for a single one."""
    return None if len(pieces) == 1 else pieces


class Overlaps(NamedTuple):
    """What two sets of spans have in common, one row each."""

    rows: I64  # int64[k]: which of the first
    spans: Spans


def overlaps(first: Spans, second: Spans) -> Overlaps:
    """Each stretch of addresses that lies in one of `first` and one of `second`, ascending."""
    low = np.searchsorted(second.ends, first.starts, side="right")
    counts = np.searchsorted(second.starts, first.ends, side="left") - low
    rows = np.repeat(np.arange(len(first)), counts)
    which = np.arange(len(rows)) + np.repeat(low - (np.cumsum(counts) - counts), counts)
    starts = np.maximum(first.starts[rows], second.starts[which])
    return Overlaps(rows, Spans(starts, np.minimum(first.ends[rows], second.ends[which])))


def joined(spans: Spans) -> Spans:
    """The same addresses, neighbours that touch as one."""
    apart = spans.starts[1:] != spans.ends[:-1]
    if apart.all():
        return spans
    return Spans(spans.starts[np.concatenate(([True], apart))], spans.ends[np.concatenate((apart, [True]))])


def merged(first: Spans, second: Spans) -> Spans:
    """Both together; no address is in both."""
    if not len(first) or not len(second):
        return second if not len(first) else first
    starts, ends = np.concatenate((first.starts, second.starts)), np.concatenate((first.ends, second.ends))
    order = np.argsort(starts, kind="stable")
    return joined(Spans(starts[order], ends[order]))


class TrackerFiles:
    """The open files of processes that a tracker uses: its own, or those of its engine."""

    def __init__(self, host: Host, files: OpenProcesses | None) -> None:
        """`files`: None: its own."""
        self._files = OpenProcesses(host) if files is None else files  # an empty one is false
        self._own = files is None

    def use(self, files: OpenProcesses) -> None:
        """Those from now on."""
        self.close()
        self._files, self._own = files, False

    def of(self, process: ProcessId) -> AbstractContextManager[ProcessFiles]:
        """See `OpenProcesses.of`."""
        return self._files.of(process)

    def keep(self, processes: frozenset[ProcessId]) -> None:
        """Close those of all others, if they are its own."""
        if self._own:
            self._files.keep(processes)

    def close(self) -> None:
        """Close all, if they are its own. Safe to call twice."""
        if self._own:
            self._files.close()


class FirstSight:
    """Remembers which spans were scanned before: of others nothing is known, so they count as touched."""

    def __init__(self) -> None:
        self._known: dict[ProcessId, Spans] = {}

    def keep(self, processes: frozenset[ProcessId]) -> None:
        """Forget all other processes."""
        for process in self._known.keys() - processes:
            del self._known[process]

    def previous(self, process: ProcessId) -> Spans:
        """The spans of the last completed scan of `process`."""
        return self._known.get(process, Spans.empty())

    def known(self, process: ProcessId, spans: Spans) -> Spans | None:
        """What the last completed scan covered. None: just `spans`, the usual case, so that nothing need be marked."""
        known = self.previous(process)
        return None if spans.same_as(known) else known

    def forget(self, process: ProcessId) -> None:
        """What was touched is about to be cleared, before it is told: should that never happen, all counts as new."""
        self._known.pop(process, None)

    def completed(self, process: ProcessId, spans: Spans) -> None:
        """A scan of `spans` went through."""
        self._known[process] = spans


def mark_new(accessed: Bools, pieces: Spans, known: Spans | None) -> None:
    """Set `accessed` for all pages of `pieces` that lie outside `known`; None: none does."""
    if known is None:
        return
    both = overlaps(pieces, known)
    if not len(both.rows):
        accessed[:] = True
        return
    shift = np.uint64(PAGE_SHIFT)
    before = offsets_of(pieces)[both.rows]
    begin = pieces.starts[both.rows]
    lows = before + ((both.spans.starts - begin) >> shift).astype(np.int64)
    highs = before + ((both.spans.ends - begin) >> shift).astype(np.int64)
    size = len(accessed) + 1
    depth = np.cumsum(np.bincount(lows, minlength=size) - np.bincount(highs, minlength=size))
    accessed[depth[:-1] == 0] = True
