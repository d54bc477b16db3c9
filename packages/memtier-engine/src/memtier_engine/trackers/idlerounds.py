"""Trackers `idlepage` of one node look together: each word of the bitmap is read and set once for all of them.

The frames of many containers lie mixed in memory, so that most words of the bitmap hold bits of several of them, and
the kernel walks the reverse map of every idle frame in a word that is read. Trackers that scan one by one have it
walk the frames of all the others too, each of them.

The first tracker to scan after the interval looks for all that are due; what it saw of the others' processes waits
until they scan, which their engines do right after. The bits are set at the moment they are read, for all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from memtier_engine.errors import KernelCallError
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap, flags_of, high_bytes, pfns
from memtier_engine.model import U8, U64, Bools, PageChunk, ProcessId, Spans
from memtier_engine.pages.ages import ProcessPages
from memtier_engine.trackers.common import cut, spans_of
from memtier_engine.trackers.words import read_words

ROUND_PAGES = 1 << 22
"""Looked at in one go (16 GiB): bounds the memory of a round to some 40 MiB."""
_DUE = 0.5
"""A process whose last look is older than this part of its interval is looked at with the others."""
_ACCESSED, _MOVABLE, _RESIDENT, _SWAPPED = np.uint8(1), np.uint8(2), np.uint8(4), np.uint8(8)


class FrameReader(Protocol):
    """What a round asks of the bitmap."""

    def touched_and_marked(self, frames: U64) -> Bools:
        """bool[n]: which frames were touched since they were last asked for; asks anew."""

    def close(self) -> None:
        """Give it back."""


@dataclass(slots=True)
class _Member:
    """One tracker."""

    interval_s: float
    looks: dict[ProcessId, _Look] = field(default_factory=dict)


@dataclass(slots=True)
class _Look:
    """What is known of a process from the last round that had it."""

    spans: Spans
    time_s: float
    seen: U8 | None
    """uint8[pages of spans] of flags; None: its tracker has taken it."""


class IdleRounds:
    """The trackers of a node. Methods may be called from any thread."""

    def __init__(
        self,
        host: Host,
        reader: Callable[[Host], FrameReader],
        *,
        now_s: Callable[[], float] = time.monotonic,
        round_pages: int = ROUND_PAGES,
    ) -> None:
        """`reader`: makes the reader of the bitmap, when the first tracker joins."""
        self._host = host
        self._make_reader = reader
        self._reader: FrameReader | None = None
        self._now_s = now_s
        self._round_pages = round_pages
        self._members: dict[object, _Member] = {}
        self._lock = threading.Lock()
        self.rounds = 0
        """How many there were."""

    def join(self, tracker: object, interval_s: float) -> None:
        """A tracker that scans every `interval_s`."""
        with self._lock:
            if self._reader is None:
                self._reader = self._make_reader(self._host)
            self._members[tracker] = _Member(interval_s)

    def leave(self, tracker: object) -> None:
        """It scans no more. Safe to call twice; the last one closes the bitmap."""
        with self._lock:
            self._members.pop(tracker, None)
            if not self._members and self._reader is not None:
                self._reader.close()
                self._reader = None

    def keep(self, tracker: object, processes: frozenset[ProcessId]) -> None:
        """Forget all other processes of a tracker."""
        with self._lock:
            looks = self._members[tracker].looks
            for process in looks.keys() - processes:
                del looks[process]

    def scan(self, tracker: object, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`."""
        with self._lock:
            member = self._members[tracker]
            look = member.looks.get(process)
            if look is None or look.seen is None or self._now_s() - look.time_s >= _DUE * member.interval_s:
                look = self._round(member, process, spans)
            seen, known = look.seen, look.spans
            assert seen is not None
            look.seen, look.spans = None, spans
        if not known.same_as(spans):
            seen = _carried(process, seen, known, spans)  # mapped since the look: not known to be in RAM
        first, told = 0, False
        try:
            for pieces in cut(spans):
                pages = int(pieces.pages.sum())
                flags = seen[first : first + pages]
                resident, movable, out = (flags & _RESIDENT) != 0, (flags & _MOVABLE) != 0, (flags & _SWAPPED) != 0
                yield PageChunk(
                    int(pieces.starts[0]),
                    (flags & _ACCESSED) != 0,
                    resident,
                    movable=movable,
                    spans=spans_of(pieces),
                    swapped=out,
                )
                first += pages
            told = True
        finally:
            if not told:  # given up in between: the next scan tells it again
                with self._lock:
                    if look.seen is None and look.spans is spans:
                        look.seen = seen

    def _round(self, member: _Member, process: ProcessId, spans: Spans) -> _Look:
        """Look at `process` and at all others that are due."""
        self.rounds += 1
        now_s = self._now_s()
        # One that nobody asked for since the last look sleeps: it is looked at when its tracker scans it again.
        due = [
            (other, each, look.spans)
            for other in self._members.values()
            for each, look in other.looks.items()
            if look.seen is None and now_s - look.time_s >= _DUE * other.interval_s
            if not (other is member and each == process)
        ]
        sizes = np.cumsum([spans.pages.sum(), *(where.pages.sum() for _, _, where in due)])
        todo = [(member, process, spans), *due[: max(0, int(np.count_nonzero(sizes <= self._round_pages)) - 1)]]
        found: list[tuple[_Member, ProcessId, Spans, U8]] = []
        frames: list[U64] = []
        for owner, each, where in todo:
            try:
                words = self._words(each, where)
            except KernelCallError:
                if owner is member and each == process:
                    raise
                del owner.looks[each]  # it exited: its own tracker will notice
                continue
            resident, out, exclusive = flags_of(high_bytes(words))
            tracked = resident & exclusive
            frames.append(pfns(words[tracked]))
            found.append((owner, each, where, resident * _RESIDENT | tracked * _MOVABLE | out * _SWAPPED))
        assert self._reader is not None
        touched = self._reader.touched_and_marked(np.concatenate(frames))
        first = 0
        for (owner, each, where, flags), own in zip(found, frames, strict=True):
            flags[(flags & _MOVABLE) != 0] |= touched[first : first + len(own)] * _ACCESSED
            first += len(own)
            flags |= _unheard(each, owner.looks.get(each), where)
            flags[(flags & _RESIDENT) == 0] &= _SWAPPED
            owner.looks[each] = _Look(where, now_s, flags)
        return member.looks[process]

    def _words(self, process: ProcessId, spans: Spans) -> U64:
        with Pagemap(self._host, process.pid) as pagemap:
            parts = [read_words(pagemap, pieces) for pieces in cut(spans)]
            return np.concatenate([np.zeros(0, np.uint64), *parts])


def _unheard(process: ProcessId, before: _Look | None, spans: Spans) -> U8:
    """uint8[pages of spans]: accessed, where an earlier look saw that and nobody asked, or where there was no look."""
    if before is None:
        return np.full(int(spans.pages.sum()), _ACCESSED)
    if before.seen is not None:
        known = before.seen & _ACCESSED
    elif before.spans.same_as(spans):
        return np.zeros(1, np.uint8)
    else:
        known = np.zeros(int(before.spans.pages.sum()), np.uint8)
    return _carried(process, known, before.spans, spans, int(_ACCESSED))


def _carried(process: ProcessId, values: U8, old: Spans, new: Spans, fill: int = 0) -> U8:
    """The values of pages of `old` for those of `new`."""
    pages = ProcessPages(process)
    pages.set_spans(old)
    pages.ages = values
    pages.set_spans(new, fill=fill)
    return pages.ages
