"""Pagemap words of many pieces of mappings, by few reads."""

from __future__ import annotations

import numpy as np

from memtier_engine.abi.constants import PM_PFRAME_MASK
from memtier_engine.hostfs.pagemap import Pagemap, high_bytes, pfns, present
from memtier_engine.model import PAGE_SHIFT, TAG_FACTOR, U8, U64, Bools, Spans, frame_tags
from memtier_engine.trackers.common import joined, offsets_of

GAP_PAGES = 64
"""Pieces with fewer pages between them are read at once: 64 words take the kernel a microsecond, a read(2) as much."""
_FEW_PIECES = 256
"""So many are copied one by one; of more, an index of all their pages costs less."""


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
    between = int(runs.pages.sum())
    rows = list(zip(runs.starts.tolist(), runs.ends.tolist(), strict=True))
    words = pagemap.read_all(rows) if out is None or len(out) < between else pagemap.read_all(rows, out)
    if len(words) == int(pieces.pages.sum()):
        return words
    if len(pieces) > _FEW_PIECES:
        return words[_places(pieces, runs)]
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(runs.pages)))
    run = np.searchsorted(runs.starts, pieces.starts, side="right") - 1
    firsts = offsets[run] + ((pieces.starts - runs.starts[run]) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    return np.concatenate(
        [words[first : first + pages] for first, pages in zip(firsts.tolist(), pieces.pages.tolist(), strict=True)]
    )


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
    return frame_tags(frames) if np.logical_and(frames, present(words)).any() else None


def tags_out_of(words: U64, resident: Bools) -> U8 | None:
    """As `tags_of`, in place: of `words` nothing is left. `resident`: which are `present`."""
    words &= np.uint64(PM_PFRAME_MASK)
    if not np.logical_and(words, resident).any():
        return None
    words *= TAG_FACTOR
    return high_bytes(words)
