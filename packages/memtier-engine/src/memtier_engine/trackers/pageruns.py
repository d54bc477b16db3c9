"""Which pages of a process have certain pagemap bits: spans in, runs of pages out, in bulk."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, PAGE_SHIFT, U64, Bools, Spans
from memtier_engine.pages.ages import true_runs

_CHUNK_BYTES = CHUNK_PAGES * PAGE_BYTES


def runs_where(pagemap: Pagemap, spans: Spans, wanted: Callable[[U64], Bools]) -> Spans:
    """The runs of pages whose pagemap words are `wanted`; none reaches over the end of one of `spans`.

    Args:
        pagemap: of the process.
        spans: where to look.
        wanted: words uint64[n] in, bool[n] out.
    Raises:
        ProcessGone: it exited.
    """
    buffer = np.empty(CHUNK_PAGES, np.uint64)
    parts = [np.zeros((0, 2), np.uint64)]
    for start, end in zip(spans.starts.tolist(), spans.ends.tolist(), strict=True):
        for first in range(start, end, _CHUNK_BYTES):
            runs = true_runs(wanted(pagemap.read(first, min(first + _CHUNK_BYTES, end), buffer)))
            parts.append(np.uint64(first) + (runs.astype(np.uint64) << np.uint64(PAGE_SHIFT)))
    rows = np.concatenate(parts)
    if not len(rows):
        return Spans.empty()
    # Runs that meet within a span were cut where a chunk ends.
    apart = (rows[1:, 0] != rows[:-1, 1]) | np.isin(rows[1:, 0], spans.starts)
    return Spans(rows[np.concatenate(([True], apart)), 0], rows[np.concatenate((apart, [True])), 1])
