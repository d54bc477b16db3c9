"""Counts what an engine does. However long it runs and however many processes come and go, it stays small."""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from memtier_engine.clock import Clock, SystemClock
from memtier_engine.model import PAGE_SHIFT, SWAP_NODE, MoveOutcome, PageChunk, ProcessId, Spans
from memtier_engine.stats.observer import Observer

PIDS_MAX = 4096
"""Processes with numbers of their own per kind of record; then the one heard of longest ago is dropped."""
EVENTS_MAX = 512
EVENT_NAME_MAX = 200
OTHER_EVENTS = "other events"
"""Counts events once there are too many names."""
MOVES_RECORDED_MAX = 10_000
_KERNEL_SAID = re.compile(r": ([^:\[]+) \[E[A-Z0-9]+\]")
_Counts = TypeVar("_Counts")


@dataclass(slots=True)
class EventCount:
    """How often something happened, and when first and last, in seconds of the clock."""

    count: int
    first_s: float
    last_s: float


@dataclass(slots=True)
class AdviceCounts:
    """process_madvise of one process."""

    calls: int = 0
    requested_pages: int = 0
    moved_pages: int = 0
    paged_out_pages: int = 0
    """Advised with MADV_PAGEOUT, whatever came of it."""


@dataclass(slots=True)
class MoveCounts:
    """move_pages of one process."""

    calls: int = 0
    requested_pages: int = 0
    moved_pages: int = 0
    moved_by_node: dict[int, int] = field(default_factory=dict)
    pages_by_errno: dict[int, int] = field(default_factory=dict)
    last: MoveOutcome | None = None
    last_with_errors: MoveOutcome | None = None


@dataclass(slots=True)
class ScanCounts:
    """Scans of one process."""

    scans: int = 0
    seconds: float = 0.0
    last_seconds: float = 0.0
    max_seconds: float = 0.0
    scanned_pages: int = 0
    last_scanned_pages: int = 0
    touched_pages: int = 0
    """Accessed plus written, as the reference adds them."""
    last_touched_pages: int = 0


@dataclass(slots=True)
class SwapInCounts:
    """Pages of one process that were in swap when it wanted them."""

    swap_ins: int = 0
    waits: int = 0
    """Of them, those that waited for the swap device."""
    wait_s: float = 0.0
    """Time that these took in all."""


class Statistics(Observer):
    """One per program: engines report to it, tables read it. All methods may be called from any thread."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._scan = threading.local()
        self.events: dict[str, EventCount] = {}
        self.advice: dict[int, AdviceCounts] = {}
        self.moves: dict[int, MoveCounts] = {}
        self.scans: dict[int, ScanCounts] = {}
        self.swap_ins: dict[int, SwapInCounts] = {}
        self.paged_out_pages_total = 0
        """Advised with MADV_PAGEOUT since the start, of all processes ever."""
        self._recording: deque[MoveOutcome] | None = None

    def now_s(self) -> float:
        """The clock of the events."""
        return self._clock.now_s()

    def event(self, name: str) -> None:
        """Count one."""
        name = " ".join(name[:EVENT_NAME_MAX].split())
        now_s = self._clock.now_s()
        with self._lock:
            if name not in self.events and len(self.events) >= EVENTS_MAX:
                name = OTHER_EVENTS
            found = self.events.get(name)
            if found is None:
                self.events[name] = EventCount(1, now_s, now_s)
            else:
                found.count += 1
                found.last_s = now_s

    def scan_began(self, process: ProcessId, spans: Spans, now_s: float) -> None:
        """See `Observer`."""
        self._scan.pages = 0
        self._scan.touched = 0

    def chunk(self, process: ProcessId, chunk: PageChunk) -> None:
        """See `Observer`."""
        seen = chunk.resident if chunk.movable is None else chunk.resident & chunk.movable
        self._scan.pages += int(np.count_nonzero(seen))
        touched = int(np.count_nonzero(chunk.accessed & seen))
        if chunk.written is not None:
            # A written page was accessed: what only the write bit tells is not counted twice.
            touched += int(np.count_nonzero(chunk.written & seen & ~chunk.accessed))
        self._scan.touched += touched

    def scan_ended(self, process: ProcessId, seconds: float) -> None:
        """See `Observer`."""
        with self._lock:
            counts = _recent(self.scans, process.pid, ScanCounts)
            counts.scans += 1
            counts.seconds += seconds
            counts.last_seconds = seconds
            counts.max_seconds = max(counts.max_seconds, seconds)
            counts.scanned_pages += self._scan.pages
            counts.last_scanned_pages = self._scan.pages
            counts.touched_pages += self._scan.touched
            counts.last_touched_pages = self._scan.touched

    def moved(self, outcome: MoveOutcome) -> None:
        """See `Observer`."""
        requested = outcome.requested_bytes >> PAGE_SHIFT
        # The reference counts what is on the destination after the call, whoever brought it there.
        done = outcome.moved_bytes + outcome.there_bytes >> PAGE_SHIFT
        if outcome.error:
            # Without pid and counts, which would make a name of its own for every call.
            call = "process_madvise" if outcome.to_node == SWAP_NODE else "move_pages"
            self.event(f"{call}(...) error: {_reason(outcome.error)}")
        with self._lock:
            if outcome.to_node == SWAP_NODE:
                advice = _recent(self.advice, outcome.process.pid, AdviceCounts)
                advice.calls += 1
                advice.requested_pages += requested
                advice.moved_pages += done
                advice.paged_out_pages += requested
                self.paged_out_pages_total += requested
                return
            counts = _recent(self.moves, outcome.process.pid, MoveCounts)
            counts.calls += 1
            counts.requested_pages += requested
            counts.moved_pages += done
            counts.moved_by_node[outcome.to_node] = counts.moved_by_node.get(outcome.to_node, 0) + done
            for number, pages in outcome.page_errors.items():
                counts.pages_by_errno[number] = counts.pages_by_errno.get(number, 0) + pages
            counts.last = outcome
            if outcome.page_errors:
                counts.last_with_errors = outcome
            if self._recording is not None:
                self._recording.append(outcome)

    def swapped_in(self, process: ProcessId, count: int, waits: int, wait_s: float) -> None:
        """See `Observer`."""
        with self._lock:
            counts = _recent(self.swap_ins, process.pid, SwapInCounts)
            counts.swap_ins += count
            counts.waits += waits
            counts.wait_s += wait_s

    def record_moves(self, on: bool) -> None:
        """Keep every move_pages call from now on, the last `MOVES_RECORDED_MAX` at most; or stop."""
        with self._lock:
            self._recording = deque(maxlen=MOVES_RECORDED_MAX) if on else None

    def recorded_moves(self) -> list[MoveOutcome] | None:
        """The calls recorded since the last time this was asked; None: not recording."""
        with self._lock:
            if self._recording is None:
                return None
            found = list(self._recording)
            self._recording.clear()
            return found

    def locked(self) -> threading.Lock:
        """Hold it (`with statistics.locked():`) while reading the tables."""
        return self._lock


def move_text(outcome: MoveOutcome) -> str:
    """One call as the reference writes it."""
    requested = outcome.requested_bytes >> PAGE_SHIFT
    done = outcome.moved_bytes + outcome.there_bytes >> PAGE_SHIFT
    first = int(outcome.spans.starts[0]) if len(outcome.spans) else 0
    errors = " ".join(f"{number}:{pages}" for number, pages in sorted(outcome.page_errors.items()))
    other = max(0, requested - done - sum(outcome.page_errors.values()))
    failed = outcome.error is not None and not done
    status = (1 << 64) - 1 if failed else 0
    return (
        f"move_pages(pid={outcome.process.pid}, pagecount={requested}, firstpage={first:x} dest={outcome.to_node})"
        f" => (return={status} on_dest={done} on_other={other} [errno:pagecount]=map[{errors}])"
    )


def _reason(error: str) -> str:
    """What the kernel said, as Go prints it, of an error of `errors.KernelCallError`; else the end of the text."""
    found = _KERNEL_SAID.search(error)
    return found[1].lower() if found else error.rpartition(": ")[2]


def error_text(number: int) -> str:
    """The text of an errno as Go prints it: lower case."""
    return os.strerror(number).lower()


def _recent(table: dict[int, _Counts], pid: int, make: Callable[[], _Counts]) -> _Counts:
    """The entry of `pid`, put last; the first goes when there are too many."""
    found = table.pop(pid, None)
    if found is None:
        found = make()
        while len(table) >= PIDS_MAX:
            del table[next(iter(table))]
    table[pid] = found
    return found
