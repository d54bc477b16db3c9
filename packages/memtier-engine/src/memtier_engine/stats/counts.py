"""Accesses per region of everything an engine scans, kept for whoever asks."""

from __future__ import annotations

import threading

from memtier_engine.model import PageChunk, ProcessId, Spans
from memtier_engine.pages.regions import Counters, RegionCounters
from memtier_engine.stats.observer import Observer


class AccessCounts(Observer):
    """Counts since the last reset. All methods may be called from any thread."""

    def __init__(self, regions: RegionCounters | None = None) -> None:
        """`regions`: how memory is cut, and not shared with others; None: 512 pages."""
        self._regions = regions or RegionCounters()
        self._lock = threading.Lock()

    def scan_began(self, process: ProcessId, spans: Spans, now_s: float) -> None:
        """See `Observer`."""
        with self._lock:
            self._regions.begin(process, spans)

    def chunk(self, process: ProcessId, chunk: PageChunk) -> None:
        """See `Observer`."""
        with self._lock:
            self._regions.add(process, chunk)

    def forgotten(self, process: ProcessId) -> None:
        """See `Observer`."""
        with self._lock:
            self._regions.keep(self._regions.processes() - {process})

    def reset(self) -> None:
        """Count from 0 again."""
        with self._lock:
            self._regions.reset()

    def clear(self) -> None:
        """Forget all processes."""
        with self._lock:
            self._regions.keep(())

    def tables(self) -> dict[ProcessId, Counters]:
        """What was counted, by process."""
        with self._lock:
            return {process: self._regions.of(process) for process in sorted(self._regions.processes())}
