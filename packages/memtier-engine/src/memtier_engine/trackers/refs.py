"""Tracker `refs`: smaps says how much of each mapping was referenced, clear_refs starts the next window.

Source: Documentation/filesystems/proc.rst (clear_refs, smaps). It works on every kernel with
CONFIG_PROC_PAGE_MONITOR, but is coarse: one touched page makes the whole mapping count as touched.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.hostfs.proc import CLEAR_REFS_REFERENCED, clear_refs, read_smaps
from memtier_engine.model import PAGE_SHIFT, PageChunk, ProcessId, Spans
from memtier_engine.trackers.common import FirstSight, chunks, mark_new


class RefsTracker:
    """Whole mappings only, reads and writes."""

    name = "refs"
    page_exact = False

    def __init__(self, host: Host) -> None:
        self._host = host
        self._seen = FirstSight()

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`."""
        self._seen.keep(processes)

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`."""
        known = self._seen.previous(process)
        table = read_smaps(self._host, process.pid)
        clear_refs(self._host, process.pid, CLEAR_REFS_REFERENCED)
        touched = table.referenced_bytes > 0
        with Pagemap(self._host, process.pid) as pagemap:
            for start, end in chunks(spans):
                resident = pagemap.resident(start, end)
                row = int(np.searchsorted(table.starts, np.uint64(start), side="right")) - 1
                # A mapping that appeared between maps and smaps counts as touched.
                whole = row < 0 or int(table.ends[row]) < end or bool(touched[row])
                accessed = np.full(end - start >> PAGE_SHIFT, whole)
                mark_new(accessed, start, known)
                yield PageChunk(start, accessed & resident, resident)
        self._seen.completed(process, spans)

    def close(self) -> None:
        """See `Tracker.close`."""
