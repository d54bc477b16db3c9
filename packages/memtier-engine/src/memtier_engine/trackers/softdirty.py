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
from loguru import logger

from memtier_engine.hostfs.handles import OpenProcesses
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap, flags_of, high_bytes, present, soft_dirty, soft_dirty_bytes
from memtier_engine.hostfs.proc import CLEAR_REFS_REFERENCED, CLEAR_REFS_SOFT_DIRTY, SmapsTable, parse_smaps
from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, U8, U64, Bools, PageChunk, ProcessId, Spans
from memtier_engine.trackers.common import FirstSight, TrackerFiles, cut, mark_new, offsets_of, spans_of
from memtier_engine.trackers.words import read_words, tags_out_of


@dataclass(frozen=True, slots=True)
class SoftDirtyConfig:
    """Keys of the reference's `softdirty` tracker that are no matter of regions."""

    track_referenced: bool = False
    """Reads count too (`trackreferenced`), if only by mapping."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One chunk as it was read."""

    pieces: Spans
    flags: U8  # of each page, see `high_bytes`
    written: U8  # of each page, packed eight to the byte
    tags: U8 | None

    def written_bytes(self) -> U64:
        """uint64[pieces]: how much of each was written."""
        written = np.unpackbits(self.written, count=len(self.flags))
        counts = np.add.reduceat(written, offsets_of(self.pieces)[:-1], dtype=np.int64)
        return counts.astype(np.uint64) * np.uint64(PAGE_BYTES)


class SoftDirtyTracker:
    """Writes only, or reads by mapping as well; needs CONFIG_MEM_SOFT_DIRTY."""

    name = "softdirty"
    takes_soft_dirty = True
    page_exact = True
    own_accesses_only = True

    def __init__(
        self, host: Host, config: SoftDirtyConfig | None = None, *, files: OpenProcesses | None = None
    ) -> None:
        self._host = host
        self._config = config or SoftDirtyConfig()
        self._seen = FirstSight()
        self._buffer = np.empty(CHUNK_PAGES, np.uint64)
        self._files = TrackerFiles(host, files)
        # Documentation/admin-guide/mm/soft-dirty.rst: the bit was made for CRIU, and there is one per page for all.
        logger.warning(
            "tracker softdirty clears the soft-dirty bits of its processes with each scan: who else goes by them, such "
            "as an incremental dump by CRIU or a garbage collector, misses pages; track no such process with it"
        )

    def use_files(self, files: OpenProcesses) -> None:
        """Open files of processes there from now on; before the first scan."""
        self._files.use(files)

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`."""
        self._files.keep(processes)
        self._seen.keep(processes)

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`. Who gives up between two chunks is told next time that all was touched."""
        known = self._seen.known(process, spans)
        with self._files.of(process) as files:
            with Pagemap(self._host, process.pid, files=files) as pagemap:
                parts = [self._part(pagemap, pieces) for pieces in cut(spans)]
            doubtful = [np.zeros(len(part.pieces), np.bool_) for part in parts]
            if self._config.track_referenced and parts:
                # Read after pagemap: what is written in between makes a mapping doubtful, and never hides a read.
                of_pieces = touched_beyond(
                    parse_smaps(files.read("smaps")),
                    np.concatenate([part.pieces.starts for part in parts]),
                    np.concatenate([part.pieces.ends for part in parts]),
                    np.concatenate([part.written_bytes() for part in parts]),
                )
                doubtful = np.split(of_pieces, np.cumsum([len(part.pieces) for part in parts])[:-1])
            self._seen.forget(process)
            if self._config.track_referenced:
                files.write("clear_refs", str(CLEAR_REFS_REFERENCED))
            # Cleared before anything is done with what was read: a write in between would be lost.
            files.write("clear_refs", str(CLEAR_REFS_SOFT_DIRTY))
        for part, unsure in zip(parts, doubtful, strict=True):
            resident, swapped, exclusive = flags_of(part.flags)
            written = np.unpackbits(part.written, count=len(resident)).view(np.bool_)
            accessed = written | np.repeat(unsure, part.pieces.pages) if unsure.any() else written.copy()
            mark_new(accessed, part.pieces, known)
            yield PageChunk(
                int(part.pieces.starts[0]),
                accessed & resident,
                resident,
                written=written,
                movable=exclusive | ~resident,
                spans=spans_of(part.pieces),
                swapped=swapped,
                tags=part.tags,
            )
        self._seen.completed(process, spans)

    def _part(self, pagemap: Pagemap, pieces: Spans) -> _Part:
        words = read_words(pagemap, pieces, self._buffer)
        flags = high_bytes(words)
        resident = flags_of(flags).present
        written = np.packbits(np.logical_and(soft_dirty_bytes(words), resident))
        return _Part(pieces, flags, written, tags_out_of(words, resident))

    def look(self, process: ProcessId, spans: Spans) -> Bools | None:
        """See `LookingTracker`: the bits of writes. None with `track_referenced`: reads leave none in pagemap."""
        if self._config.track_referenced:
            return None
        found = [np.zeros(0, np.bool_)]
        with self._files.of(process) as files, Pagemap(self._host, process.pid, files=files) as pagemap:
            for pieces in cut(spans):
                words = read_words(pagemap, pieces)
                found.append(soft_dirty(words) & present(words))
        return np.concatenate(found)

    def close(self) -> None:
        """See `Tracker.close`."""
        self._files.close()


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
