"""Tracker `refs`: smaps says how much of each mapping was referenced, clearing starts the next window.

Source: Documentation/filesystems/proc.rst (clear_refs, smaps). It works on every kernel with
CONFIG_PROC_PAGE_MONITOR, but is coarse: one touched page makes the whole mapping count as touched.

Where none of what is touched is shared or locked, `memtier_engine.trackers.clearing.Cold` clears it. Elsewhere that
would leave bits set, and one is enough to make the whole mapping look touched for ever: clear_refs then, with what it
costs the process. Mappings with a small part of the process's memory, such as the data of libraries, are not worth it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from memtier_engine.errors import AccessDenied
from memtier_engine.hostfs.handles import OpenProcesses, ProcessFiles
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap, present, swapped
from memtier_engine.hostfs.proc import SmapsTable, parse_smaps
from memtier_engine.model import CHUNK_PAGES, Bools, PageChunk, ProcessId, Spans
from memtier_engine.trackers.clearing import Batches, BestClearing, Ranges, in_steps
from memtier_engine.trackers.common import BLOCK_BYTES, FirstSight, TrackerFiles, cut, mark_new, overlaps, spans_of
from memtier_engine.trackers.words import read_words, tags_of

SHARED_PART = 1 / 16
"""Of the memory in RAM: mappings that are shared or locked in parts, together, up to which they count as in use."""


class RefsTracker:
    """Whole mappings only, reads and writes."""

    name = "refs"
    page_exact = False
    own_accesses_only = True

    def __init__(self, host: Host, *, files: OpenProcesses | None = None) -> None:
        self._host = host
        self._files = TrackerFiles(host, files)
        self._seen = FirstSight()
        self._clearing = BestClearing(host)
        self.stale_tlb = not (self._clearing.flushes() and self._clearing.refs.flushes())
        self._batches = Batches()
        self._buffer = np.empty(CHUNK_PAGES, np.uint64)

    def use_files(self, files: OpenProcesses) -> None:
        """Open files of processes there from now on; before the first scan."""
        self._files.use(files)

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`."""
        self._seen.keep(processes)
        self._clearing.watch(processes)
        self._files.keep(processes)

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`. Who gives up between two chunks is told next time that all was touched."""
        known = self._seen.known(process, spans)
        with self._files.of(process) as files:
            table = parse_smaps(files.read("smaps"))
            touched = table.referenced_bytes > 0
            self._seen.forget(process)
            self._clear(process, files, table, touched, spans)
            # A mapping that appeared between maps and smaps counts as touched: the row before the first stands for it.
            ends = np.concatenate((np.zeros(1, np.uint64), table.ends))
            touched = np.concatenate((np.ones(1, np.bool_), touched))
            with Pagemap(self._host, process.pid, files=files) as pagemap:
                for pieces in cut(spans):
                    words = read_words(pagemap, pieces, self._buffer)
                    resident = present(words)
                    row = np.searchsorted(table.starts, pieces.starts, side="right")
                    accessed = np.repeat(touched[row] | (ends[row] < pieces.ends), pieces.pages)
                    mark_new(accessed, pieces, known)
                    yield PageChunk(
                        int(pieces.starts[0]),
                        accessed & resident,
                        resident,
                        spans=spans_of(pieces),
                        swapped=swapped(words),
                        tags=tags_of(words),
                    )
        self._seen.completed(process, spans)

    def _clear(self, process: ProcessId, files: ProcessFiles, table: SmapsTable, touched: Bools, spans: Spans) -> None:
        """Clear the touched mappings."""
        clearing = self._clearing.of(process)
        stuck = touched & ((table.shared_bytes > 0) | table.locked) & _within(table, spans)
        if int(table.rss_bytes[stuck].sum()) > SHARED_PART * int(table.rss_bytes.sum()):
            clearing = self._clearing.refs
        try:
            ranges = overlaps(Spans(table.starts[touched & ~stuck], table.ends[touched & ~stuck]), spans).spans
            if not clearing.whole:
                self._batches.drain()  # one page in a batch would keep its bit
            clearing.clear(files, Ranges(in_steps(ranges, BLOCK_BYTES)), spans)
        except AccessDenied as failure:
            self._clearing.refused(process, failure)
            self._clearing.of(process).clear(files, Ranges.none(), spans)

    def close(self) -> None:
        """See `Tracker.close`."""
        self._files.close()


def _within(table: SmapsTable, spans: Spans) -> Bools:
    """bool[n]: mappings of which some is in `spans`."""
    found = np.zeros(len(table), np.bool_)
    found[overlaps(Spans(table.starts, table.ends), spans).rows] = True
    return found
