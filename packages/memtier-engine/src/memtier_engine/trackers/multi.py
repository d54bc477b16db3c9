"""Tracker `multi`: several trackers on the same memory; a page counts as touched if any of them says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memtier_engine.errors import ConfigError
from memtier_engine.hostfs.handles import FileSharingTracker, OpenProcesses
from memtier_engine.model import (
    PAGE_BYTES,
    U8,
    U64,
    Bools,
    LookingTracker,
    PacedTracker,
    PageChunk,
    ProcessId,
    Spans,
    Tracker,
)
from memtier_engine.trackers.common import cut, spans_of
from memtier_engine.trackers.words import page_numbers

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
        self.takes_soft_dirty = any(getattr(part, "takes_soft_dirty", False) for part in parts)
        self.clears_accessed_bits = any(getattr(part, "clears_accessed_bits", True) for part in parts)

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
        readers = [_Reader(part.scan(process, spans)) for part in self.parts]
        for pieces in cut(spans):
            yield _merged(pieces, [reader.take(pieces) for reader in readers])
        for reader in readers:
            reader.finish()

    def look(self, process: ProcessId, spans: Spans) -> Bools | None:
        """See `LookingTracker`: touched if any part says so; None unless all that can see reads can tell."""
        found: Bools | None = None
        for part in self.parts:
            seen = part.look(process, spans) if isinstance(part, LookingTracker) else None
            if seen is None:
                return None
            found = seen if found is None else found | seen
        return found

    def use_files(self, files: OpenProcesses) -> None:
        """See `FileSharingTracker`."""
        for part in self.parts:
            if isinstance(part, FileSharingTracker):
                part.use_files(files)

    def close(self) -> None:
        """See `Tracker.close`."""
        for part in self.parts:
            part.close()


_COLUMNS = ("accessed", "resident", "written", "movable", "rates", "swapped", "tags")


class _Reader:
    """One tracker's chunks, cut to the pieces asked for."""

    def __init__(self, source: Iterator[PageChunk]) -> None:
        self._source = source
        self._chunk: PageChunk | None = None
        self._numbers = np.zeros(0, np.uint64)
        """Of the pages of the chunk."""

    def take(self, pieces: Spans) -> PageChunk:
        """Pages of `pieces`; calls come in address order. Of what the tracker does not tell, nothing is touched."""
        wanted = page_numbers(pieces)
        empty = np.zeros(len(wanted), np.bool_)
        columns: dict[str, Any] = {"accessed": empty, "resident": empty.copy()}
        while self._next(wanted[0]) and self._numbers[0] <= wanted[-1]:
            assert self._chunk is not None
            if len(self._numbers) == len(wanted) and (self._numbers == wanted).all():
                columns = {name: getattr(self._chunk, name) for name in _COLUMNS}
            else:
                self._copy(columns, wanted)
            if self._numbers[-1] > wanted[-1]:
                break  # the rest of it belongs to the next call
            self._chunk = None
        return PageChunk(int(pieces.starts[0]), **columns)

    def finish(self) -> None:
        """Run the scan to its end: only then has the tracker begun the next window."""
        self._chunk = None
        for _ in self._source:
            pass

    def _next(self, number: np.uint64) -> bool:
        """Go on to the chunk that has pages from `number` on."""
        while self._chunk is None or self._numbers[-1] < number:
            self._chunk = next(self._source, None)
            if self._chunk is None:
                return False
            start = np.array([self._chunk.start], np.uint64)
            alone = Spans(start, start + np.uint64(len(self._chunk.accessed) * PAGE_BYTES))
            self._numbers = page_numbers(self._chunk.spans or alone)
        return True

    def _copy(self, columns: dict[str, Any], wanted: U64) -> None:
        rows = np.minimum(np.searchsorted(wanted, self._numbers), len(wanted) - 1)
        both = wanted[rows] == self._numbers
        for name in _COLUMNS:
            column = getattr(self._chunk, name)
            if column is not None:
                if columns.get(name) is None:
                    # What is not told of is movable, as far as this tracker knows.
                    columns[name] = np.full(len(wanted), name == "movable", column.dtype)
                columns[name][rows[both]] = column[both]


def _merged(pieces: Spans, seen: list[PageChunk]) -> PageChunk:
    accessed, resident = seen[0].accessed.copy(), seen[0].resident.copy()
    written: Bools | None = None
    movable: Bools | None = None
    rates: NDArray[np.float32] | None = None
    out: Bools | None = None
    tags: U8 | None = None
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
        out = each.swapped if out is None else out
        tags = each.tags if tags is None else tags
    if rates is not None:
        # Parts that only say "touched" count one access per touched page, as they do alone.
        for each in seen:
            if each.rates is None:
                rates = rates + each.accessed
    return PageChunk(
        int(pieces.starts[0]),
        accessed & resident,
        resident,
        written=written,
        movable=movable,
        rates=rates,
        spans=spans_of(pieces),
        swapped=out if out is None else out & ~resident,
        tags=tags,
    )
