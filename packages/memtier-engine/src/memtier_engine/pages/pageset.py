"""Sets of pages of one address space, and the page numbers of spans. No IO.

A set is kept as bitmaps, 8 KiB per 256 MiB of address space; sealed, they are compressed to some tens of bytes where
pages lie in runs.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from memtier_engine.model import PAGE_SHIFT, U64, Bools, Spans

_BLOCK_SHIFT = 16
_BLOCK_PAGES = 1 << _BLOCK_SHIFT
_BLOCK_BYTES = _BLOCK_PAGES // 8


class PageSet:
    """A set of pages of one address space, compressible."""

    def __init__(self) -> None:
        self._blocks: dict[int, bytearray | bytes] = {}
        self.sealed = False
        """Compressed, and only read from now on."""

    @property
    def stored_bytes(self) -> int:
        """What the bitmaps take."""
        return sum(map(len, self._blocks.values()))

    def add(self, pages: U64) -> None:
        """Put in page numbers uint64[n] (address / page size), ascending."""
        self._change(pages, add=True)

    def add_runs(self, spans: Spans) -> None:
        """Put in all pages of `spans`: byte by byte where they are many, without an array of their numbers."""
        assert not self.sealed
        for start, end in zip(spans.starts.tolist(), spans.ends.tolist(), strict=True):
            first, end = start >> PAGE_SHIFT, end >> PAGE_SHIFT
            while first < end:
                block = first >> _BLOCK_SHIFT
                stop = min(end, (block + 1) << _BLOCK_SHIFT)
                stored = self._blocks.get(block)
                if stored is None:
                    stored = self._blocks[block] = bytearray(_BLOCK_BYTES)
                assert isinstance(stored, bytearray)
                low, high = first & (_BLOCK_PAGES - 1), (stop - 1) & (_BLOCK_PAGES - 1)
                from_low, to_high = 0xFF << (low & 7) & 0xFF, 0xFF >> (7 - (high & 7))
                if low >> 3 == high >> 3:
                    stored[low >> 3] |= from_low & to_high
                else:
                    stored[low >> 3] |= from_low
                    stored[high >> 3] |= to_high
                    stored[(low >> 3) + 1 : high >> 3] = b"\xff" * ((high >> 3) - (low >> 3) - 1)
                first = stop

    def remove(self, pages: U64) -> None:
        """Take out page numbers uint64[n], ascending."""
        self._change(pages, add=False)

    def contains(self, pages: U64) -> Bools:
        """bool[n] for page numbers uint64[n], ascending."""
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
        """See `sealed`."""
        if not self.sealed:
            self.sealed = True
            self._blocks = {block: zlib.compress(stored, 1) for block, stored in self._blocks.items()}

    def _bits(self, stored: bytearray | bytes) -> NDArray[np.uint8]:
        return np.frombuffer(zlib.decompress(stored) if self.sealed else stored, np.uint8)

    def _change(self, pages: U64, *, add: bool) -> None:
        assert not self.sealed
        for block, first, last in _by_block(pages):
            stored = self._blocks.get(block)
            if stored is None:
                if not add:
                    continue
                stored = self._blocks[block] = bytearray(_BLOCK_BYTES)
            numbers = (pages[first:last] & np.uint64(_BLOCK_PAGES - 1)).astype(np.int64)
            low, high = int(numbers.min()) >> 3, (int(numbers.max()) >> 3) + 1  # bytes
            # Shares the bytearray's memory, which is writable.
            bits = np.frombuffer(stored, np.uint8)[low:high]
            mask = np.zeros(high - low << 3, np.bool_)
            mask[numbers - (low << 3)] = True
            packed = np.packbits(mask, bitorder="little")
            np.copyto(bits, bits | packed if add else bits & ~packed)


def page_numbers_of(spans: Spans) -> U64:
    """uint64[pages]: the number of every page of `spans`, ascending."""
    if len(spans) == 1:
        return np.arange(int(spans.starts[0]) >> PAGE_SHIFT, int(spans.ends[0]) >> PAGE_SHIFT, dtype=np.uint64)
    lengths = spans.pages
    before = np.cumsum(lengths) - lengths
    index = np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(before, lengths)
    pages: U64 = np.repeat(spans.starts >> np.uint64(PAGE_SHIFT), lengths) + index.astype(np.uint64)
    return pages


def within(pages: U64, spans: Spans) -> Bools:
    """bool[n]: which of the page numbers uint64[n] lie in `spans`."""
    if not len(spans):
        return np.zeros(len(pages), np.bool_)
    at = pages << np.uint64(PAGE_SHIFT)
    span = np.searchsorted(spans.starts, at, side="right") - 1
    inside: Bools = (span >= 0) & (at < spans.ends[np.maximum(span, 0)])
    return inside


def common(one: Spans, other: Spans) -> Spans:
    """The address spans that are in both."""
    if not len(one) or not len(other):
        return Spans.empty()
    # Where each of `one` begins and ends among `other`: from the first that ends after its start to the last that
    # begins before its end.
    first = np.searchsorted(other.ends, one.starts, side="right")
    last = np.searchsorted(other.starts, one.ends, side="left")
    count = np.maximum(last - first, 0)
    mine = np.repeat(np.arange(len(one)), count)
    before = np.cumsum(count) - count
    theirs = np.arange(int(count.sum())) - np.repeat(before, count) + np.repeat(first, count)
    return Spans(
        np.maximum(one.starts[mine], other.starts[theirs]),
        np.minimum(one.ends[mine], other.ends[theirs]),
    )


def _by_block(pages: U64) -> list[tuple[int, int, int]]:
    """(block, first index, end index) of each run of ascending page numbers in the same block."""
    if not len(pages):
        return []
    blocks = pages >> np.uint64(_BLOCK_SHIFT)
    cuts = np.flatnonzero(blocks[1:] != blocks[:-1]) + 1
    firsts = np.concatenate(([0], cuts))
    lasts = np.concatenate((cuts, [len(pages)]))
    return list(zip(blocks[firsts].tolist(), firsts.tolist(), lasts.tolist(), strict=True))
