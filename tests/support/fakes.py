"""Stand-ins for the stages around the one under test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from memtier_engine.model import PAGE_BYTES, PageChunk, ProcessId, Spans

PROCESS = ProcessId(4242, 7)
BASE = 0x7F00_0000_0000


def spans(*page_ranges: tuple[int, int]) -> Spans:
    """Spans from (first page, last page + 1) pairs, counted from `BASE`."""
    array = np.array(page_ranges, np.uint64).reshape(-1, 2) * np.uint64(PAGE_BYTES) + np.uint64(BASE)
    return Spans(array[:, 0].copy(), array[:, 1].copy())


def pages_of(found: Spans) -> list[tuple[int, int]]:
    """The inverse of `spans`."""
    first = (found.starts - np.uint64(BASE)) // np.uint64(PAGE_BYTES)
    last = (found.ends - np.uint64(BASE)) // np.uint64(PAGE_BYTES)
    return list(zip(first.tolist(), last.tolist(), strict=True))


def chunk(
    first_page: int,
    accessed: Sequence[int],
    resident: Sequence[int] | None = None,
    movable: Sequence[int] | None = None,
) -> PageChunk:
    """A chunk from 0/1 lists; `resident` defaults to all."""
    touched = np.array(accessed, np.bool_)
    return PageChunk(
        BASE + first_page * PAGE_BYTES,
        touched,
        np.ones(len(touched), np.bool_) if resident is None else np.array(resident, np.bool_),
        movable=None if movable is None else np.array(movable, np.bool_),
    )


class FakeTarget:
    """A target whose processes the test sets."""

    def __init__(self, *processes: ProcessId) -> None:
        self.processes = frozenset(processes)

    def poll(self) -> frozenset[ProcessId]:
        return self.processes


class FakeTracker:
    """Reports what the test put into `touched`: page numbers from `BASE`, and which pages are not in RAM."""

    name = "fake"
    page_exact = True

    def __init__(self) -> None:
        self.touched: set[int] = set()
        self.absent: set[int] = set()
        self.watched: frozenset[ProcessId] = frozenset()
        self.closed = False
        self.failure: Exception | None = None

    def watch(self, processes: frozenset[ProcessId]) -> None:
        self.watched = processes

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        for start, end in zip(spans.starts.tolist(), spans.ends.tolist(), strict=True):
            first, last = (start - BASE) // PAGE_BYTES, (end - BASE) // PAGE_BYTES
            if self.failure is not None:
                raise self.failure
            yield chunk(
                first,
                [page in self.touched for page in range(first, last)],
                [page not in self.absent for page in range(first, last)],
            )

    def close(self) -> None:
        self.closed = True
