"""Pieces of spans in the 2 MiB blocks that the walk reads: which, and where in their words each page is. No IO."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from memtier_engine.model import PAGE_SHIFT, U64, Bools, Spans
from memtier_engine.pages.ages import true_runs
from memtier_engine.trackers.bpf import paging
from memtier_engine.trackers.common import I64, offsets_of

_BLOCK_SHIFT = np.uint64(paging.BLOCK_BYTES.bit_length() - 1)
_WORD_SHIFT = paging.BLOCK_PAGES.bit_length() - 1


class Layout(NamedTuple):
    """Where the pages of some pieces are."""

    pieces: Spans
    addresses: U64  # uint64[b]: of the distinct 2 MiB blocks, ascending
    places: slice | I64
    """Of the pages, in order, among the 512 * b words of the blocks."""

    def of_blocks(self, rows: Bools) -> Bools:
        """A value per block as one per page."""
        values: Bools = np.repeat(rows, paging.BLOCK_PAGES)[self.places]
        return values

    def numbers(self, pages: I64) -> U64:
        """uint64[n]: page numbers (address / 4 KiB) of the pages at these indices."""
        places = pages + self.places.start if isinstance(self.places, slice) else self.places[pages]
        blocks = self.addresses[places >> _WORD_SHIFT] >> np.uint64(PAGE_SHIFT)
        numbers: U64 = blocks + (places & (paging.BLOCK_PAGES - 1)).astype(np.uint64)
        return numbers


def laid_out(pieces: Spans) -> Layout:
    """The blocks of `pieces` (at least one), each once however many pieces lie in it."""
    if len(pieces) == 1:
        start, end = int(pieces.starts[0]), int(pieces.ends[0])
        begin = start & -paging.BLOCK_BYTES
        within = start - begin >> PAGE_SHIFT
        addresses = np.arange(begin, end, paging.BLOCK_BYTES, dtype=np.uint64)
        return Layout(pieces, addresses, slice(within, within + (end - start >> PAGE_SHIFT)))
    first = pieces.starts >> _BLOCK_SHIFT
    counts = (((pieces.ends - np.uint64(1)) >> _BLOCK_SHIFT) - first).astype(np.int64) + 1
    before = np.cumsum(counts) - counts
    blocks = np.repeat(first, counts) + (np.arange(int(counts.sum())) - np.repeat(before, counts)).astype(np.uint64)
    fresh = np.concatenate(([True], blocks[1:] != blocks[:-1]))
    rows = np.cumsum(fresh) - 1
    inside = ((pieces.starts & np.uint64(paging.BLOCK_BYTES - 1)) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    places = rows[before] * paging.BLOCK_PAGES + inside
    offsets = offsets_of(pieces)
    shifts = places - offsets[:-1]
    total = int(offsets[-1])
    if (shifts == shifts[0]).all():
        return Layout(pieces, blocks[fresh] << _BLOCK_SHIFT, slice(int(places[0]), int(places[0]) + total))
    return Layout(pieces, blocks[fresh] << _BLOCK_SHIFT, np.repeat(shifts, np.diff(offsets)) + np.arange(total))


def runs_of(layout: Layout, wanted: Bools, huge: Bools | None = None) -> tuple[Spans, Bools | None]:
    """Runs of wanted pages that are neighbours in memory, and which of these belong to huge pages.

    Args:
        layout: of the pages.
        wanted: bool[n].
        huge: bool[n]: of pages that lie in huge pages; None: none does. Their runs end where the page does.
    """
    if huge is None:
        # Neighbours in the order of pages need not be neighbours in memory: a run ends where a piece does.
        runs = true_runs(wanted, offsets_of(layout.pieces)[1:-1])
        begins, ends = runs[:, 0], runs[:, 1]
    else:
        pages = np.flatnonzero(wanted)
        numbers = layout.numbers(pages)
        blocks = numbers >> np.uint64(_WORD_SHIFT)
        of_huge = huge[pages]
        apart = (np.diff(numbers) != 1) | ((of_huge[1:] | of_huge[:-1]) & (blocks[1:] != blocks[:-1]))
        begins, ends = pages[np.concatenate(([True], apart))], pages[np.concatenate((apart, [True]))] + 1
    first, last = layout.numbers(begins), layout.numbers(ends - 1)
    shift = np.uint64(PAGE_SHIFT)
    return Spans(first << shift, (last + np.uint64(1)) << shift), None if huge is None else huge[begins]
