"""Which pages of a process have certain pagemap bits: spans in, runs of pages out, in bulk."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from memtier_engine.distinct import among
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.model import CHUNK_PAGES, PAGE_SHIFT, U64, Bools, Spans
from memtier_engine.trackers.common import cut
from memtier_engine.trackers.words import page_numbers, read_words


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
    for pieces in cut(spans):
        numbers = page_numbers(pieces)[wanted(read_words(pagemap, pieces, buffer))]
        if len(numbers):
            apart = _apart(numbers[:-1] + np.uint64(1), numbers[1:], pieces)
            heads, tails = numbers[np.concatenate(([True], apart))], numbers[np.concatenate((apart, [True]))]
            parts.append(np.column_stack((heads, tails + np.uint64(1))) << np.uint64(PAGE_SHIFT))
    rows = np.concatenate(parts)
    if not len(rows):
        return Spans.empty()
    # Runs that meet within a span were cut where a chunk ends.
    apart = (rows[1:, 0] != rows[:-1, 1]) | among(rows[1:, 0], spans.starts)
    return Spans(rows[np.concatenate(([True], apart)), 0], rows[np.concatenate((apart, [True])), 1])


def _apart(expected: U64, numbers: U64, pieces: Spans) -> Bools:
    borders = pieces.starts[1:] >> np.uint64(PAGE_SHIFT)
    found: Bools = (numbers != expected) | among(numbers, borders)
    return found
