"""Pagemap words of many pieces of mappings, by few reads."""

from __future__ import annotations

import numpy as np

from memtier_engine.hostfs.pagemap import Pagemap, pfns, present
from memtier_engine.model import PAGE_SHIFT, U8, U64, Spans, frame_tags
from memtier_engine.trackers.common import joined, offsets_of

GAP_PAGES = 64
"""Pieces with fewer pages between them are read at once: 64 words take the kernel a microsecond, a read(2) as much."""


def read_words(pagemap: Pagemap, pieces: Spans, out: U64 | None = None) -> U64:
    """uint64[pages of `pieces`], in order.

    Args:
        pagemap: of the process.
        pieces: ascending, disjoint.
        out: uint64[>= pages] to read into, if that can be done without a copy. None: new memory.
    Raises:
        ProcessGone: it exited.
    """
    if len(pieces) == 1:
        return pagemap.read(int(pieces.starts[0]), int(pieces.ends[0]), out)
    whole = joined(pieces)
    far = (whole.starts[1:] - whole.ends[:-1]) >> np.uint64(PAGE_SHIFT) > np.uint64(GAP_PAGES)
    runs = Spans(whole.starts[np.concatenate(([True], far))], whole.ends[np.concatenate((far, [True]))])
    words = pagemap.read_all(list(zip(runs.starts.tolist(), runs.ends.tolist(), strict=True)))
    if len(words) == int(pieces.pages.sum()):
        return words
    return words[_places(pieces, runs)]


def _places(pieces: Spans, runs: Spans) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    run = np.searchsorted(runs.starts, pieces.starts, side="right") - 1
    within = ((pieces.starts - runs.starts[run]) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    offsets = offsets_of(pieces)
    shifts = offsets_of(runs)[run] + within - offsets[:-1]
    return np.repeat(shifts, np.diff(offsets)) + np.arange(int(offsets[-1]))


def page_numbers(pieces: Spans) -> U64:
    """uint64[pages of `pieces`]: address / 4 KiB of each."""
    offsets = offsets_of(pieces)
    shifts = (pieces.starts >> np.uint64(PAGE_SHIFT)).astype(np.int64) - offsets[:-1]
    return (np.repeat(shifts, np.diff(offsets)) + np.arange(int(offsets[-1]))).astype(np.uint64)


def tags_of(words: U64) -> U8 | None:
    """`PageChunk.tags` of pagemap words; None where this process may not see frame numbers."""
    frames = pfns(words)
    return frame_tags(frames) if frames[present(words)].any() else None
