"""Raw access events: one row per region and scan, kept until they are fetched, the newest if there are too many."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memtier_engine.model import PAGE_SHIFT, PageChunk, ProcessId, Spans
from memtier_engine.pages.regions import Counters, RegionCounters
from memtier_engine.stats.observer import Observer

ROWS_MAX = 1_000_000
"""About 48 MB; older rows are dropped."""
HEADER = "          timestamp       pid             addr    pages     accs   writes"


@dataclass(frozen=True, slots=True)
class _Scan:
    time_ns: int
    pid: int
    counters: Counters


class RawEvents(Observer):
    """Records while it is on. All methods may be called from any thread."""

    def __init__(self, regions: RegionCounters | None = None, *, now_ns: Callable[[], int] = time.time_ns) -> None:
        """`regions`: how memory is cut, and not shared with others; None: 512 pages. `now_ns`: Unix time."""
        self._regions = regions or RegionCounters()
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._scans: deque[_Scan] = deque()
        self._rows = 0
        self._on = False
        self._began_ns: dict[ProcessId, int] = {}

    @property
    def on(self) -> bool:
        """Whether it records."""
        return self._on

    def start(self) -> None:
        """Record from now on."""
        with self._lock:
            self._on = True

    def stop(self) -> None:
        """Stop, and drop what was not fetched."""
        with self._lock:
            self._on = False
            self._scans.clear()
            self._rows = 0
            self._began_ns.clear()
            self._regions.keep([])

    @property
    def every_scan(self) -> bool:
        """See `Observer`."""
        return self._on

    def scan_began(self, process: ProcessId, spans: Spans, now_s: float) -> None:
        """See `Observer`."""
        if self._on:
            with self._lock:
                self._began_ns[process] = self._now_ns()
                self._regions.keep([*self._regions.processes() - {process}])
                self._regions.begin(process, spans)

    def chunk(self, process: ProcessId, chunk: PageChunk) -> None:
        """See `Observer`."""
        if process in self._began_ns:
            with self._lock:
                if process in self._began_ns:
                    self._regions.add(process, chunk)

    def scan_ended(self, process: ProcessId, seconds: float) -> None:
        """See `Observer`."""
        with self._lock:
            began_ns = self._began_ns.pop(process, None)
            if began_ns is None:
                return
            counters = self._regions.of(process)
            self._regions.keep(self._regions.processes() - {process})
            self._scans.append(_Scan(began_ns, process.pid, counters))
            self._rows += len(counters)
            while self._rows > ROWS_MAX:
                self._rows -= len(self._scans.popleft().counters)

    def fetch(self) -> str | None:
        """Header and rows since the last fetch, a line each; None while it is off."""
        with self._lock:
            if not self._on:
                return None
            scans, self._scans, self._rows = self._scans, deque(), 0
        lines = [HEADER]
        for scan in scans:
            lines.extend(_lines(scan))
        return "\n".join(lines) + "\n"


def _lines(scan: _Scan) -> list[str]:
    own = scan.counters
    pages: NDArray[np.int64] = ((own.ends - own.starts) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    columns = (column.tolist() for column in (own.starts, pages, own.accesses, own.writes))
    row = f"{scan.time_ns:20d} {scan.pid:8d} {{:16x}} {{:8d}} {{:8d}} {{:8d}}".format
    return list(map(row, *columns))
