"""Tracker `idlepage`: the kernel's idle page bitmap says which frames were read or written.

Source: Documentation/admin-guide/mm/idle_page_tracking.rst. Each scan reads the bits of the process's
frames and sets them again; a bit that is clear by the next scan means an access. Only bits of frames of the
tracked process are ever set, so trackers side by side do not disturb each other. Those of one node can go further
and look together: `memtier_engine.trackers.idlerounds`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.kpageflags import KpageFlags
from memtier_engine.hostfs.page_idle import IdleBitmap
from memtier_engine.hostfs.pagemap import Pagemap, exclusive, pfns, present
from memtier_engine.model import CHUNK_PAGES, U64, Bools, PageChunk, ProcessId, Spans
from memtier_engine.trackers.common import FirstSight, chunks, grouped, spans_of
from memtier_engine.trackers.idlerounds import IdleRounds


class IdlePageTracker:
    """Exact reads and writes of exclusively mapped pages; needs CONFIG_IDLE_PAGE_TRACKING and root."""

    name = "idlepage"
    page_exact = True
    own_accesses_only = True
    stale_tlb = True

    def __init__(self, host: Host) -> None:
        """Raises TrackerUnavailable if there is no bitmap, AccessDenied without the rights for it."""
        self._reader = IdleReader(host)
        self._host = host
        self._seen = FirstSight()
        self._buffer = np.empty(CHUNK_PAGES, np.uint64)
        self._rounds: IdleRounds | None = None

    def look_together(self, rounds: IdleRounds, interval_s: float) -> None:
        """From now on, scan in the rounds of several trackers; before the first scan."""
        self._rounds = rounds
        rounds.join(self, interval_s)

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`."""
        self._seen.keep(processes)
        if self._rounds is not None:
            self._rounds.keep(self, processes)

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`."""
        if self._rounds is not None:
            yield from self._rounds.scan(self, process, spans)
            return
        with Pagemap(self._host, process.pid) as pagemap:
            for group in grouped(chunks(spans)):
                words = pagemap.read_all(group, self._buffer)
                resident = present(words)
                # A shared frame's bit tells of somebody's access, not of ours: leave those alone.
                tracked = resident & exclusive(words)
                accessed: Bools = np.zeros(len(words), np.bool_)
                if tracked.any():
                    accessed[tracked] = self._reader.touched_and_marked(pfns(words[tracked]))
                self._seen.mark(process, spans, accessed, group)
                yield PageChunk(group[0][0], accessed & resident, resident, movable=tracked, spans=spans_of(group))
        self._seen.completed(process, spans)

    def close(self) -> None:
        """See `Tracker.close`."""
        if self._rounds is not None:
            self._rounds.leave(self)
        self._reader.close()


class IdleReader:
    """The bits of frames, those of large folios found at their heads."""

    def __init__(self, host: Host) -> None:
        """Raises KernelCallError without the bitmap, AccessDenied without root."""
        self.bitmap = IdleBitmap(host)
        self._flags = KpageFlags(host)

    def touched_and_marked(self, frames: U64) -> Bools:
        """bool[n]: touched since the bits were last set. Sets them again."""
        idle = self.bitmap.is_idle(frames)
        owners = frames
        touched = np.flatnonzero(~idle)
        if len(touched):
            # The kernel keeps the bit of a large folio at its head and shows 0 for its tails.
            heads = self._flags.compound_heads(frames[touched])
            tails = heads != frames[touched]
            if tails.any():
                idle[touched[tails]] = self.bitmap.is_idle(heads[tails])
                owners = frames.copy()
                owners[touched] = heads
        self.bitmap.set_idle(owners)
        return ~idle

    def close(self) -> None:
        """Close the files. Safe to call twice."""
        self.bitmap.close()
        self._flags.close()
