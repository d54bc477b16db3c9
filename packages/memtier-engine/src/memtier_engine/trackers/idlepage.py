"""Tracker `idlepage`: the kernel's idle page bitmap says which frames were read or written.

Source: Documentation/admin-guide/mm/idle_page_tracking.rst. Each scan reads the bits of the process's
frames and sets them again; a bit that is clear by the next scan means an access. Only bits of frames of the
tracked process are ever set, so trackers side by side do not disturb each other. Those of one node can go further
and look together: `memtier_engine.trackers.idlerounds`.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import numpy as np

from memtier_engine.hostfs.handles import OpenProcesses
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap, flags_of, high_bytes, pfns
from memtier_engine.model import CHUNK_PAGES, Bools, PageChunk, ProcessId, Spans
from memtier_engine.trackers.common import FirstSight, TrackerFiles, cut, mark_new, spans_of
from memtier_engine.trackers.idlereader import IdleReader
from memtier_engine.trackers.idlerounds import IdleRounds
from memtier_engine.trackers.words import read_words, tags_out_of


class IdlePageTracker:
    """Exact reads and writes of exclusively mapped pages; needs CONFIG_IDLE_PAGE_TRACKING and root."""

    name = "idlepage"
    page_exact = True
    own_accesses_only = True
    stale_tlb = True

    def __init__(self, host: Host, *, files: OpenProcesses | None = None) -> None:
        """Raises TrackerUnavailable if there is no bitmap, AccessDenied without the rights for it."""
        self._reader = IdleReader(host)
        self._host = host
        self._seen = FirstSight()
        self._buffer = np.empty(CHUNK_PAGES, np.uint64)
        self._rounds: IdleRounds | None = None
        self._files = TrackerFiles(host, files)

    def use_files(self, files: OpenProcesses) -> None:
        """Open files of processes there from now on; before the first scan."""
        self._files.use(files)

    def look_together(self, node: MutableMapping[str, Any], interval_s: float) -> None:
        """See `TogetherTracker`: it scans in the rounds of all trackers of its kind."""
        rounds: IdleRounds = node.setdefault(self.name, IdleRounds(self._host, IdleReader))
        self._rounds = rounds
        rounds.join(self, interval_s)

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`."""
        self._files.keep(processes)
        self._seen.keep(processes)
        if self._rounds is not None:
            self._rounds.keep(self, processes)

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`."""
        if self._rounds is not None:
            yield from self._rounds.scan(self, process, spans)
            return
        known = self._seen.known(process, spans)
        with self._files.of(process) as files, Pagemap(self._host, process.pid, files=files) as pagemap:
            for pieces in cut(spans):
                words = read_words(pagemap, pieces, self._buffer)
                resident, swapped, exclusive = flags_of(high_bytes(words))
                # A shared frame's bit tells of somebody's access, not of ours: leave those alone.
                tracked = resident & exclusive
                accessed: Bools = np.zeros(len(words), np.bool_)
                if tracked.any():
                    accessed[tracked] = self._reader.touched_and_marked(pfns(words[tracked]))
                mark_new(accessed, pieces, known)
                yield PageChunk(
                    int(pieces.starts[0]),
                    accessed & resident,
                    resident,
                    movable=tracked,
                    spans=spans_of(pieces),
                    swapped=swapped,
                    tags=tags_out_of(words, resident),
                )
        self._seen.completed(process, spans)

    def look(self, process: ProcessId, spans: Spans) -> Bools | None:
        """See `LookingTracker`: the bits are read and stay as they are. Pages that others map too count as touched."""
        found = [np.zeros(0, np.bool_)]
        with self._files.of(process) as files, Pagemap(self._host, process.pid, files=files) as pagemap:
            for pieces in cut(spans):
                words = read_words(pagemap, pieces)
                touched, _, exclusive = flags_of(high_bytes(words))
                tracked = touched & exclusive
                touched[tracked] = ~self._reader.idle(pfns(words[tracked]))[0]
                found.append(touched)
        return np.concatenate(found)

    def close(self) -> None:
        """See `Tracker.close`."""
        self._files.close()
        if self._rounds is not None:
            self._rounds.leave(self)
        self._reader.close()
