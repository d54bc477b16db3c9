"""What trackers share: cutting spans into chunks, and knowing which pages are seen for the first time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, PAGE_SHIFT, Bools, ProcessId, Spans

CHUNK_BYTES = CHUNK_PAGES * PAGE_BYTES


def chunks(spans: Spans) -> Iterator[tuple[int, int]]:
    """(start, end) of each piece of at most `CHUNK_PAGES` pages; none reaches over the end of a span."""
    for start, end in zip(spans.starts.tolist(), spans.ends.tolist(), strict=True):
        for first in range(start, end, CHUNK_BYTES):
            yield first, min(first + CHUNK_BYTES, end)


def grouped(pieces: Iterable[tuple[int, int]], most_pages: int = CHUNK_PAGES) -> Iterator[list[tuple[int, int]]]:
    """Consecutive pieces (start, end) together, as long as they hold at most `most_pages` pages."""
    group: list[tuple[int, int]] = []
    left = most_pages * PAGE_BYTES
    for start, end in pieces:
        if group and end - start > left:
            yield group
            group, left = [], most_pages * PAGE_BYTES
        group.append((start, end))
        left -= end - start
    if group:
        yield group


def spans_of(group: list[tuple[int, int]]) -> Spans | None:
    """The `PageChunk.spans` of a group of pieces: None for a single one."""
    if len(group) == 1:
        return None
    table = np.array(group, np.uint64)
    return Spans(table[:, 0], table[:, 1])


class FirstSight:
    """Remembers which spans were scanned before: of others nothing is known, so they count as touched."""

    def __init__(self) -> None:
        self._known: dict[ProcessId, Spans] = {}

    def keep(self, processes: frozenset[ProcessId]) -> None:
        """Forget all other processes."""
        for process in self._known.keys() - processes:
            del self._known[process]

    def previous(self, process: ProcessId) -> Spans:
        """The spans of the last completed scan of `process`."""
        return self._known.get(process, Spans.empty())

    def mark(self, process: ProcessId, spans: Spans, accessed: Bools, group: list[tuple[int, int]]) -> None:
        """Set `accessed` for all pages of `group` that the last scan of `process` did not cover.

        `spans`: what is scanned now; the usual case, that it is the same as then, costs nothing.
        """
        known = self.previous(process)
        if spans.same_as(known):
            return
        first = 0
        for start, end in group:
            pages = end - start >> PAGE_SHIFT
            mark_new(accessed[first : first + pages], start, known)
            first += pages

    def completed(self, process: ProcessId, spans: Spans) -> None:
        """A scan of `spans` went through."""
        self._known[process] = spans


def mark_new(accessed: Bools, start: int, known: Spans) -> None:
    """Set `accessed` for all pages of the chunk at `start` that lie outside `known`."""
    end = start + len(accessed) * PAGE_BYTES
    first = int(np.searchsorted(known.ends, np.uint64(start), side="right"))
    at = start
    while first < len(known) and int(known.starts[first]) < end:
        begin = int(known.starts[first])
        if begin > at:
            accessed[at - start >> PAGE_SHIFT : begin - start >> PAGE_SHIFT] = True
        at = int(known.ends[first])
        first += 1
    if at < end:
        accessed[at - start >> PAGE_SHIFT :] = True
