"""Tracker `multi`: several trackers on the same memory; a page counts as touched if any of them says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES, PAGE_SHIFT, Bools, PacedTracker, PageChunk, ProcessId, Spans, Tracker
from memtier_engine.trackers.common import chunks

EXCLUSIVE = (frozenset({"idlepage", "refs", "damon", "bpf", "bpf-sampled"}), frozenset({"softdirty"}))
"""Trackers that read and clear the same bits: accessed, soft-dirty."""


def check_parts(names: Sequence[str]) -> None:
    """Raises ConfigError if trackers of these names cannot work together."""
    if not names:
        raise ConfigError("is empty", key_path="trackers", hint="a list of trackers with `name` and `config`")
    for bits in EXCLUSIVE:
        found = [name for name in names if name in bits]
        if len(found) > 1:
            raise ConfigError(
                f"{' and '.join(found)} disturb each other",
                key_path="trackers",
                hint=f"keep one of {', '.join(sorted(bits))}: each clears what the other has to see",
            )


class MultiTracker:
    """Merges what its parts see, page by page."""

    name = "multi"

    def __init__(self, parts: Sequence[Tracker]) -> None:
        """Raises ConfigError without parts, or with two that clear the same bits of the kernel."""
        check_parts([part.name for part in parts])
        self.parts = tuple(parts)
        self.page_exact = all(part.page_exact for part in parts)
        self.stale_tlb = any(getattr(part, "stale_tlb", False) for part in parts)

    def scans_every(self, interval_s: float) -> None:
        """See `PacedTracker`."""
        for part in self.parts:
            if isinstance(part, PacedTracker):
                part.scans_every(interval_s)

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`."""
        for part in self.parts:
            part.watch(processes)

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`."""
        readers = [_Reader(run for chunk in part.scan(process, spans) for run in chunk.parts()) for part in self.parts]
        for start, end in chunks(spans):
            yield _merged(start, [reader.take(start, end) for reader in readers])
        for reader in readers:
            reader.finish()

    def close(self) -> None:
        """See `Tracker.close`."""
        for part in self.parts:
            part.close()


@dataclass(slots=True)
class _Seen:
    """What one tracker saw of a run of pages; None: it does not tell."""

    reported: Bools
    accessed: Bools
    resident: Bools
    written: Bools | None = None
    movable: Bools | None = None
    rates: NDArray[np.float32] | None = None


class _Reader:
    """Cuts one tracker's chunks to the sizes asked for."""

    def __init__(self, source: Iterator[PageChunk]) -> None:
        self._source = source
        self._chunk: PageChunk | None = None

    def take(self, start: int, end: int) -> _Seen:
        """Pages from `start` to `end`; calls come in address order."""
        pages = end - start >> PAGE_SHIFT
        first = self._next(start)
        if first is not None and first.start == start and len(first.accessed) == pages:
            self._chunk = None
            return _Seen(
                np.ones(pages, np.bool_), first.accessed, first.resident, first.written, first.movable, first.rates
            )
        seen = _Seen(np.zeros(pages, np.bool_), np.zeros(pages, np.bool_), np.zeros(pages, np.bool_))
        while (part := self._next(start)) is not None and part.start < end:
            self._copy(part, seen, start, end)
            if _end(part) > end:
                break  # the rest of it belongs to the next call
            self._chunk = None
        return seen

    def finish(self) -> None:
        """Run the scan to its end: only then has the tracker begun the next window."""
        self._chunk = None
        for _ in self._source:
            pass

    def _next(self, start: int) -> PageChunk | None:
        while self._chunk is None or _end(self._chunk) <= start:
            self._chunk = next(self._source, None)
            if self._chunk is None:
                return None
        return self._chunk

    def _copy(self, part: PageChunk, seen: _Seen, start: int, end: int) -> None:
        low, high = max(start, part.start), min(end, _end(part))
        source = slice(low - part.start >> PAGE_SHIFT, high - part.start >> PAGE_SHIFT)
        target = slice(low - start >> PAGE_SHIFT, high - start >> PAGE_SHIFT)
        seen.reported[target] = True
        seen.accessed[target] = part.accessed[source]
        seen.resident[target] = part.resident[source]
        pages = len(seen.reported)
        if part.written is not None:
            seen.written = np.zeros(pages, np.bool_) if seen.written is None else seen.written
            seen.written[target] = part.written[source]
        if part.movable is not None:
            seen.movable = np.ones(pages, np.bool_) if seen.movable is None else seen.movable
            seen.movable[target] = part.movable[source]
        if part.rates is not None:
            seen.rates = np.zeros(pages, np.float32) if seen.rates is None else seen.rates
            seen.rates[target] = part.rates[source]


def _end(chunk: PageChunk) -> int:
    return chunk.start + len(chunk.accessed) * PAGE_BYTES


def _merged(start: int, seen: list[_Seen]) -> PageChunk:
    accessed, resident = seen[0].accessed.copy(), seen[0].resident.copy()
    written: Bools | None = None
    movable: Bools | None = None
    rates: NDArray[np.float32] | None = None
    for each in seen[1:]:
        accessed |= each.accessed
        resident |= each.resident
    for each in seen:
        if each.written is not None:
            written = each.written if written is None else written | each.written
        if each.movable is not None:
            movable = each.movable if movable is None else movable & each.movable
        if each.rates is not None:
            rates = each.rates if rates is None else rates + each.rates
    if rates is not None:
        # Parts that only say "touched" count one access per touched page, as they do alone.
        for each in seen:
            if each.rates is None:
                rates = rates + each.accessed
    return PageChunk(start, accessed & resident, resident, written=written, movable=movable, rates=rates)
