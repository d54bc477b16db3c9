"""Tracker `refs`: smaps says how much of each mapping was referenced, clear_refs starts the next window.

Source: Documentation/filesystems/proc.rst (clear_refs, smaps). It works on every kernel with
CONFIG_PROC_PAGE_MONITOR, but is coarse: one touched page makes the whole mapping count as touched.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap, present
from memtier_engine.hostfs.proc import CLEAR_REFS_REFERENCED, clear_refs, read_smaps
from memtier_engine.model import PAGE_SHIFT, PageChunk, ProcessId, Spans
from memtier_engine.trackers.common import FirstSight, chunks, grouped, spans_of


class RefsTracker:
    """Whole mappings only, reads and writes."""

    name = "refs"
    page_exact = False
    own_accesses_only = True
    stale_tlb = True

    def __init__(self, host: Host) -> None:
        self._host = host
        self._seen = FirstSight()

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`."""
        self._seen.keep(processes)

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`."""
        table = read_smaps(self._host, process.pid)
        clear_refs(self._host, process.pid, CLEAR_REFS_REFERENCED)
        # A mapping that appeared between maps and smaps counts as touched: the row before the first stands for it.
        ends = np.concatenate((np.zeros(1, np.uint64), table.ends))
        touched = np.concatenate((np.ones(1, np.bool_), table.referenced_bytes > 0))
        with Pagemap(self._host, process.pid) as pagemap:
            for group in grouped(chunks(spans)):
                resident = present(pagemap.read_all(group))
                pieces = np.array(group, np.uint64)
                row = np.searchsorted(table.starts, pieces[:, 0], side="right")
                whole = touched[row] | (ends[row] < pieces[:, 1])
                accessed = np.repeat(whole, ((pieces[:, 1] - pieces[:, 0]) >> np.uint64(PAGE_SHIFT)).astype(np.int64))
                self._seen.mark(process, spans, accessed, group)
                yield PageChunk(group[0][0], accessed & resident, resident, spans=spans_of(group))
        self._seen.completed(process, spans)

    def close(self) -> None:
        """See `Tracker.close`."""
