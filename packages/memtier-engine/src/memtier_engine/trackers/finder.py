"""Tracker `finder`: reports all memory with a constant number of accesses, and measures nothing.

With bit filters, pages that do not match are reported as not movable, which keeps every policy off them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap, exclusive, present, soft_dirty, swapped
from memtier_engine.model import CHUNK_PAGES, U64, Bools, PageChunk, ProcessId, Spans
from memtier_engine.trackers.common import cut, spans_of
from memtier_engine.trackers.pageruns import runs_where
from memtier_engine.trackers.words import read_words, tags_of


@dataclass(frozen=True, slots=True, kw_only=True)
class FinderConfig:
    """The keys of the reference's `finder` tracker."""

    report_accesses: int = 0
    """Accesses that each mapping is said to have had (`reportaccesses`)."""
    exclusive: bool | None = None
    """Only pages with, or without, this pagemap bit (`pagemapbitexclusive`). None: both."""
    present: bool | None = None
    soft_dirty: bool | None = None


class FinderTracker:
    """Everything there is, untouched unless configured otherwise."""

    name = "finder"
    page_exact = True
    clears_accessed_bits = False

    def __init__(self, host: Host, config: FinderConfig | None = None) -> None:
        self._host = host
        self._config = config or FinderConfig()
        self._buffer = np.empty(CHUNK_PAGES, np.uint64)

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`."""

    @property
    def report_accesses(self) -> int:
        """As configured."""
        return self._config.report_accesses

    def find(self, process: ProcessId, spans: Spans) -> Spans:
        """`spans` as they are; with bit filters the runs of matching pages in them, none over the end of a span.

        Raises:
            ProcessGone: it exited.
        """
        wanted = self._wanted()
        if not wanted:
            return spans
        with Pagemap(self._host, process.pid) as pagemap:
            return runs_where(pagemap, spans, lambda words: _matching(words, wanted))

    def _wanted(self) -> list[tuple[Callable[[U64], Bools], bool]]:
        config = self._config
        bits = ((exclusive, config.exclusive), (present, config.present), (soft_dirty, config.soft_dirty))
        return [(bit, value) for bit, value in bits if value is not None]

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`; there is no window and no first scan here."""
        config = self._config
        wanted = self._wanted()
        span_pages = spans.pages
        with Pagemap(self._host, process.pid) as pagemap:
            for pieces in cut(spans):
                words = read_words(pagemap, pieces, self._buffer)
                matches = _matching(words, wanted)
                resident = present(words)
                accessed = np.full(len(words), config.report_accesses > 0) & matches
                span = np.searchsorted(spans.starts, pieces.starts, side="right") - 1
                of_page = np.repeat((config.report_accesses / span_pages[span]).astype(np.float32), pieces.pages)
                rates = np.where(matches, of_page, np.float32(0))
                movable = matches & (exclusive(words) | ~resident)
                yield PageChunk(
                    int(pieces.starts[0]),
                    accessed & resident,
                    resident,
                    movable=movable,
                    rates=rates,
                    spans=spans_of(pieces),
                    swapped=swapped(words),
                    tags=tags_of(words),
                )

    def close(self) -> None:
        """See `Tracker.close`."""


def _matching(words: U64, wanted: Sequence[tuple[Callable[[U64], Bools], bool]]) -> Bools:
    """bool[n]: pages whose bits are as wanted."""
    matches = np.ones(len(words), np.bool_)
    for bit, value in wanted:
        matches &= bit(words) == value
    return matches
