"""Tracker `softdirty`: the soft-dirty bit says which pages were written.

Source: Documentation/admin-guide/mm/soft-dirty.rst. Writes between the reading of a page's bit and the clearing
right after the whole process was read are lost; a page that is written all the time shows again in the next scan.

Reads leave no trace in that bit. With `track_referenced`, smaps tells how much of each mapping was touched: if that
is more than was written, some pages were only read, nobody knows which, and the whole mapping counts as touched. So
memory that is only read is never taken for idle, and mappings that are written or left alone are known page by page.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap, exclusive, present, soft_dirty
from memtier_engine.hostfs.proc import (
    CLEAR_REFS_REFERENCED,
    CLEAR_REFS_SOFT_DIRTY,
    SmapsTable,
    clear_refs,
    read_smaps,
)
from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, U8, U64, Bools, PageChunk, ProcessId, Spans
from memtier_engine.trackers.common import FirstSight, chunks, mark_new


@dataclass(frozen=True, slots=True)
class SoftDirtyConfig:
    """Keys of the reference's `softdirty` tracker that are no matter of regions."""

    track_referenced: bool = False
    """Reads count too (`trackreferenced`), if only by mapping."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """One chunk as it was read, packed eight pages to the byte."""

    start: int
    pages: int
    resident: U8
    written: U8
    movable: U8
    written_bytes: int

    def columns(self) -> tuple[Bools, Bools, Bools]:
        """Resident, written, movable."""
        resident, written, movable = (
            np.unpackbits(bits, count=self.pages).view(np.bool_) for bits in (self.resident, self.written, self.movable)
        )
        return resident, written, movable


class SoftDirtyTracker:
    """Writes only, or reads by mapping as well; needs CONFIG_MEM_SOFT_DIRTY."""

    name = "softdirty"
    page_exact = True
    own_accesses_only = True

    def __init__(self, host: Host, config: SoftDirtyConfig | None = None) -> None:
        self._host = host
        self._config = config or SoftDirtyConfig()
        self._seen = FirstSight()
        self._buffer = np.empty(CHUNK_PAGES, np.uint64)

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`."""
        self._seen.keep(processes)

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`."""
        known = self._seen.previous(process)
        with Pagemap(self._host, process.pid) as pagemap:
            pieces = [self._piece(pagemap, start, end) for start, end in chunks(spans)]
        doubtful = np.zeros(len(pieces), np.bool_)
        if self._config.track_referenced:
            # Read after pagemap: what is written in between makes a mapping doubtful, and never hides a read.
            doubtful = touched_beyond(
                read_smaps(self._host, process.pid),
                np.array([piece.start for piece in pieces], np.uint64),
                np.array([piece.start + piece.pages * PAGE_BYTES for piece in pieces], np.uint64),
                np.array([piece.written_bytes for piece in pieces], np.uint64),
            )
            clear_refs(self._host, process.pid, CLEAR_REFS_REFERENCED)
        # Cleared before anything is done with what was read: a write in between would be lost.
        clear_refs(self._host, process.pid, CLEAR_REFS_SOFT_DIRTY)
        for piece, unsure in zip(pieces, doubtful.tolist(), strict=True):
            resident, written, movable = piece.columns()
            accessed = np.ones(piece.pages, np.bool_) if unsure else written.copy()
            mark_new(accessed, piece.start, known)
            yield PageChunk(piece.start, accessed & resident, resident, written=written, movable=movable)
        self._seen.completed(process, spans)

    def _piece(self, pagemap: Pagemap, start: int, end: int) -> _Piece:
        words = pagemap.read(start, end, self._buffer)
        resident = present(words)
        written = soft_dirty(words) & resident
        movable = exclusive(words) | ~resident
        packed = (np.packbits(resident), np.packbits(written), np.packbits(movable))
        return _Piece(start, len(words), *packed, written_bytes=int(written.sum()) * PAGE_BYTES)

    def close(self) -> None:
        """See `Tracker.close`."""


def touched_beyond(
    table: SmapsTable,
    starts: U64,
    ends: U64,
    written_bytes: U64,
) -> Bools:
    """bool[n]: which pieces lie in a mapping of which more was referenced than their pieces, all together, had written.

    Args:
        table: the process's mappings.
        starts, ends, written_bytes: uint64[n], of pieces of mappings in ascending order. A piece that lies in none,
            or reaches over the end of one that changed meanwhile, counts as touched.
    """
    rows = np.searchsorted(table.starts, starts, side="right") - 1
    outside = rows < 0
    if not len(table.starts):
        return outside
    within = np.maximum(rows, 0)
    outside |= table.ends[within] < ends
    written = np.bincount(within, weights=written_bytes.astype(np.float64), minlength=len(table.starts))
    beyond: Bools = outside | (table.referenced_bytes[within] > written[within])
    return beyond
