"""Tracker `softdirty`: the soft-dirty bit says which pages were written. Reads are not seen.

Source: Documentation/admin-guide/mm/soft-dirty.rst. Writes between the reading of a page's bit and the clearing
right after the whole process was read are lost; a page that is written all the time shows again in the next scan.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap, exclusive, present, soft_dirty
from memtier_engine.hostfs.proc import CLEAR_REFS_SOFT_DIRTY, clear_refs
from memtier_engine.model import CHUNK_PAGES, U8, PageChunk, ProcessId, Spans
from memtier_engine.trackers.common import FirstSight, chunks, mark_new


class SoftDirtyTracker:
    """Writes only; needs CONFIG_MEM_SOFT_DIRTY."""

    name = "softdirty"
    page_exact = True

    def __init__(self, host: Host) -> None:
        self._host = host
        self._seen = FirstSight()
        self._buffer = np.empty(CHUNK_PAGES, np.uint64)

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`."""
        self._seen.keep(processes)

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`."""
        known = self._seen.previous(process)
        seen: list[tuple[int, int, U8, U8, U8]] = []
        with Pagemap(self._host, process.pid) as pagemap:
            for start, end in chunks(spans):
                words = pagemap.read(start, end, self._buffer)
                resident = present(words)
                written = soft_dirty(words) & resident
                movable = exclusive(words) | ~resident
                columns = (np.packbits(resident), np.packbits(written), np.packbits(movable))
                seen.append((start, len(words), *columns))
        # Cleared before anything is done with what was read: a write in between would be lost.
        clear_refs(self._host, process.pid, CLEAR_REFS_SOFT_DIRTY)
        for start, pages, *packed in seen:
            resident, written, movable = (np.unpackbits(bits, count=pages).view(np.bool_) for bits in packed)
            accessed = written.copy()
            mark_new(accessed, start, known)
            yield PageChunk(start, accessed & resident, resident, written=written, movable=movable)
        self._seen.completed(process, spans)

    def close(self) -> None:
        """See `Tracker.close`."""
