"""Memory that processes of one program share after fork(2): counted once, and never promised.

A master that forks its workers shares its memory with all of them until somebody writes. Each sees all of it in RAM;
paging it out of one frees nothing, for the others still map it. Only pagemap tells (bit 56: mapped by one process
only), in 7 ms per GiB, so only processes that have a relative among those tracked are asked, once a minute.

Relatives by fork(2) without exec(2) have code and stack at the same addresses, which are random for everybody else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from memtier_engine.errors import KernelCallError
from memtier_engine.hostfs.handles import OpenProcesses
from memtier_engine.hostfs.pagemap import Pagemap, exclusive, is_file, present
from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, PAGE_SHIFT, U64, Spans, Why
from memtier_engine.pages.ages import true_runs
from memtier_engine.pages.space import AddressSpace

EVERY_S = 60.0
PAGES_A_ROUND = 1 << 19
"""2 GiB: what is looked at in one scan; the rest follows in the next ones."""
_CHUNK_BYTES = CHUNK_PAGES * PAGE_BYTES


class Families:
    """One per engine."""

    def __init__(self, files: OpenProcesses) -> None:
        self.files = files

    def count(self, spaces: Iterable[AddressSpace], now_s: float) -> None:
        """Look at those whose turn it is; `shared_bytes`, `sharers` and what `kept` says of them are new then."""
        found = list(spaces)
        if len(found) < 2:
            for space in found:
                _alone(space)
            return
        families = Counter(space.layout for space in found)
        left = PAGES_A_ROUND
        for space in sorted(found, key=lambda each: each.shared_s):
            size = families[space.layout] if space.layout else 1
            if size < 2:
                _alone(space)
            elif now_s - space.shared_s >= EVERY_S and left > 0:
                space.shared_s, space.sharers = now_s, size
                left -= len(space.pages.ages)
                try:
                    self._look(space)
                except KernelCallError:  # it exits: the next scan will say so
                    _alone(space)

    def _look(self, space: AddressSpace) -> None:
        own = space.pages
        shared: list[U64] = []
        buffer = np.empty(CHUNK_PAGES, np.uint64)
        with self.files.of(space.process) as files:
            for start, end in zip(own.spans.starts.tolist(), own.spans.ends.tolist(), strict=True):
                for first in range(start, end, _CHUNK_BYTES):
                    shared.append(_shared_runs(files.pagemap, first, min(first + _CHUNK_BYTES, end), buffer))
        rows = np.concatenate(shared) if shared else np.zeros((0, 2), np.uint64)
        spans = Spans(rows[:, 0].copy(), rows[:, 1].copy())
        space.shared_bytes = spans.total_bytes
        own.release((Why.SHARED,))
        if len(spans):
            own.keep(spans, Why.SHARED)


def _shared_runs(pagemap: Pagemap, start: int, end: int, buffer: U64) -> U64:
    words = pagemap.read(start, end, buffer)
    runs = true_runs(present(words) & ~exclusive(words) & ~is_file(words)).astype(np.uint64)
    found: U64 = np.uint64(start) + (runs << np.uint64(PAGE_SHIFT))
    return found


def _alone(space: AddressSpace) -> None:
    if space.shared_bytes:
        space.pages.release((Why.SHARED,))
    space.shared_bytes, space.sharers, space.shared_s = 0, 1, -np.inf


def histogram_of(spaces: Iterable[AddressSpace]) -> NDArray[np.int64]:
    """int64[256]: pages of each age in all spaces; what the members of a family share is counted once."""
    tells: dict[bytes, AddressSpace] = {}
    for space in spaces:
        if space.shared_bytes and space.shared_bytes > getattr(tells.get(space.layout), "shared_bytes", 0):
            tells[space.layout] = space
    counts = np.zeros(256, np.int64)
    for space in spaces:
        once = space.shared_bytes and tells.get(space.layout) is not space
        counts += space.pages.histogram(leave=(Why.SHARED,) if once else None)
    return counts
