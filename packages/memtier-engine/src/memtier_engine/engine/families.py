"""Memory that processes of one program share after fork(2): counted once, and never promised.

A master that forks its workers shares its memory with all of them until somebody writes. Each sees all of it in RAM;
paging it out of one frees nothing, for the others still map it. Only pagemap tells (bit 56: mapped by one process
only), in 7 ms per GiB and some microseconds per mapping that lies apart, so only processes that have a relative among
those tracked are asked, once a minute.

Relatives by fork(2) without exec(2) have code and stack at the same addresses, which are random for everybody else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from memtier_engine.errors import KernelCallError
from memtier_engine.hostfs.handles import OpenProcesses
from memtier_engine.hostfs.pagemap import exclusive, is_file, present
from memtier_engine.hostfs.runs import run_bounds
from memtier_engine.model import CHUNK_PAGES, PAGE_SHIFT, U64, Spans, Why
from memtier_engine.pages.space import AddressSpace
from memtier_engine.trackers.common import cut
from memtier_engine.trackers.words import page_numbers, read_words

EVERY_S = 60.0
PAGES_A_ROUND = 1 << 19
"""2 GiB: what is looked at in one scan; the rest follows in the next ones."""
PAGES_A_SPAN = 16
"""So many more count for each mapping: a process may have 65 530, all apart, with a read for each."""
BLOCKS_AT_ONCE = 4096
"""Between two questions whether to halt: at most so many reads."""


class Families:
    """One per engine."""

    def __init__(self, files: OpenProcesses, halted: Callable[[], bool] = lambda: False) -> None:
        """`halted`: asked again and again; True ends a look, and nothing of it is kept."""
        self.files = files
        self._halted = halted

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
                left -= len(space.pages.ages) + PAGES_A_SPAN * len(space.pages.spans)
                try:
                    if not self._look(space):
                        return
                except KernelCallError:  # it exits: the next scan will say so
                    _alone(space)

    def _look(self, space: AddressSpace) -> bool:
        """False: halted meanwhile."""
        own = space.pages
        shared: list[U64] = []
        with self.files.of(space.process) as files:
            for pieces in cut(own.spans, CHUNK_PAGES, BLOCKS_AT_ONCE):
                if self._halted():
                    return False
                words = read_words(files.pagemap, pieces)
                shared.append(page_numbers(pieces)[present(words) & ~exclusive(words) & ~is_file(words)])
        numbers = np.concatenate(shared) if shared else np.zeros(0, np.uint64)
        bounds = run_bounds(numbers)
        shift = np.uint64(PAGE_SHIFT)
        spans = Spans(numbers[bounds[:-1]] << shift, (numbers[bounds[1:] - 1] + np.uint64(1)) << shift)
        space.shared_bytes = spans.total_bytes
        own.release((Why.SHARED,))
        if len(spans):
            own.keep(spans, Why.SHARED)
        return True


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
