"""Between ranges of addresses and the table of pages they are in: indexes, sums and spans of flagged pages. No IO."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memtier_engine.model import PAGE_SHIFT, U64, Bools, Spans
from memtier_engine.pages.ages import true_runs

I64 = NDArray[np.int64]
_SHIFT = np.uint64(PAGE_SHIFT)


def page_indexes(spans: Spans, offsets: I64, starts: U64, ends: U64) -> tuple[I64, I64]:
    """(first[n], last[n]): half-open index ranges of address ranges, each of which lies in one span.

    `offsets` int64[spans + 1] is the index of each span's first page.
    """
    span = np.maximum(np.searchsorted(spans.starts, starts, side="right") - 1, 0)
    firsts = offsets[span] + ((starts - spans.starts[span]) >> _SHIFT).astype(np.int64)
    return firsts, firsts + ((ends - starts) >> _SHIFT).astype(np.int64)


def flagged_in(flags: Bools, firsts: I64, lasts: I64) -> I64:
    """int64[n]: flagged pages in each index range; the ranges are disjoint, ascending and not empty."""
    if not len(firsts):
        return np.zeros(0, np.int64)
    edges = np.stack((firsts, lasts), axis=1).reshape(-1)
    padded = np.append(flags.view(np.uint8), np.uint8(0))  # an edge may be the very end
    sums: I64 = np.add.reduceat(padded, edges, dtype=np.int64)[::2]
    return sums


def inside(count: int, firsts: I64, lasts: I64) -> Bools:
    """bool[count]: which pages lie in the index ranges; the ranges are disjoint and not empty."""
    edges = np.zeros(count + 1, np.int8)
    edges[firsts] += 1
    edges[lasts] -= 1  # ranges are disjoint: no index stands twice
    return np.cumsum(edges[:-1], dtype=np.int8) > 0


def flagged_spans(spans: Spans, offsets: I64, flags: Bools) -> Spans:
    """The flagged pages as address spans, ascending; none reaches over the end of a mapping."""
    edges = true_runs(flags).reshape(-1)
    borders = offsets[1:-1]
    if len(borders):
        # Neighbours in the table of pages need not be neighbours in addresses.
        crossing = borders[flags[borders] & flags[borders - 1]]
        edges = np.sort(np.concatenate((edges, crossing, crossing)))
    runs = edges.reshape(-1, 2)
    span = np.searchsorted(offsets, runs[:, 0], side="right") - 1
    base = spans.starts[span]
    first = (runs[:, 0] - offsets[span]).astype(np.uint64)
    last = (runs[:, 1] - offsets[span]).astype(np.uint64)
    return Spans(base + (first << _SHIFT), base + (last << _SHIFT))
