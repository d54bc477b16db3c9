"""Which parts of a process's mappings hold something: spans in, 2 MiB blocks of them out.

Anybody may map 128 TiB and use 11 MiB of it: sanitizers, garbage collectors and databases do. What is kept and read for
each page follows what is there, so the large mappings of a process are asked for it first (PAGEMAP_SCAN, Linux 6.7:
one call over 60 TiB takes 0.3 ms, since the walk skips what has no page table; 3.5 ms per GiB of 4 KiB pages that are
there). Older kernels have no cheap way through a hole: smaps tells each mapping's Rss and Swap, and one that is large
and nearly empty is left out, with a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memtier_engine.abi.constants import PAGE_IS_PRESENT, PAGE_IS_SWAPPED
from memtier_engine.errors import Unavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.hostfs.proc import SmapsTable, read_smaps
from memtier_engine.model import U64, Spans

BLOCK_BYTES = 2 << 20
"""What one page table covers on x86_64 and, with 4 KiB pages, on aarch64."""
WHOLE_BYTES = 64 << 20
"""So much is taken as it is, whatever it holds: 16 KiB of ages."""
WHOLE_FACTOR = 2
"""And so many times what the process was seen to hold."""
CALLS_MOST = 512
"""Ranges to ask for one by one. Of more, one call goes over all, and over what lies between them."""
EMPTY_BYTES = 1 << 30
EMPTY_FACTOR = 8
"""Without PAGEMAP_SCAN a mapping so large, of which less than this part is there, is left out."""

_BLOCK_MASK = np.uint64(BLOCK_BYTES - 1)


@dataclass(frozen=True, slots=True)
class Held:
    """What is to be looked at."""

    spans: Spans
    left_out: Spans
    """Mappings that would cost too much on this kernel."""


def whole_most(known_bytes: int) -> int:
    """Mappings of so much in all are taken whole, of a process that was seen to hold `known_bytes`."""
    return max(WHOLE_BYTES, WHOLE_FACTOR * known_bytes)


def held(pagemap: Pagemap, spans: Spans, known_bytes: int, smaps: SmapsTable | None = None) -> Held:
    """The 2 MiB blocks that hold a page in RAM or in swap, clipped to `spans`; neighbours joined within a span.

    Args:
        pagemap: of the process.
        spans: its mappings that can be tiered.
        known_bytes: what the process was seen to hold last; 0 at first.
        smaps: of the process, for kernels without PAGEMAP_SCAN.
    Raises:
        ProcessGone: it exited.
        Unavailable: this kernel has no PAGEMAP_SCAN, and `smaps` is None.
    """
    lengths = spans.ends - spans.starts
    most = whole_most(known_bytes)
    if spans.total_bytes <= most:
        return Held(spans, Spans.empty())
    # The smallest mappings are taken whole, as long as they are little in sum; the others are asked.
    order = np.argsort(lengths, kind="stable")
    whole = np.zeros(len(spans), np.bool_)
    whole[order[np.cumsum(lengths[order], dtype=np.uint64) <= np.uint64(most)]] = True
    asked = Spans(spans.starts[~whole], spans.ends[~whole])
    left_out = Spans.empty()
    try:
        found = _blocks(pagemap, asked)
    except Unavailable:
        if smaps is None:
            raise
        found, left_out = by_smaps(asked, smaps)
    if whole.any():
        found = Spans(
            np.concatenate((found.starts, spans.starts[whole])), np.concatenate((found.ends, spans.ends[whole]))
        )
        order = np.argsort(found.starts, kind="stable")
        found = Spans(found.starts[order], found.ends[order])
    return Held(found, left_out)


def held_of(host: Host, pid: int, spans: Spans) -> Spans:
    """What of `spans` holds something, of a process that nothing is known of yet; errors as `held`."""
    if spans.total_bytes <= WHOLE_BYTES:
        return spans
    with Pagemap(host, pid) as pagemap:
        try:
            return held(pagemap, spans, 0).spans
        except Unavailable:
            return held(pagemap, spans, 0, read_smaps(host, pid)).spans


def by_smaps(spans: Spans, smaps: SmapsTable) -> tuple[Spans, Spans]:
    """(to be looked at, left out) of whole mappings, by what smaps says they hold."""
    row = np.maximum(np.searchsorted(smaps.starts, spans.starts, side="right") - 1, 0)
    known = len(smaps) > 0 and (smaps.starts[row] <= spans.starts) & (smaps.ends[row] >= spans.ends)
    lengths = spans.ends - spans.starts
    there = np.where(known, smaps.rss_bytes[row] + smaps.swap_bytes[row], lengths) if len(smaps) else lengths
    empty = there == 0
    sparse = (lengths > np.uint64(EMPTY_BYTES)) & (there < lengths // np.uint64(EMPTY_FACTOR)) & ~empty
    keep = ~empty & ~sparse
    return Spans(spans.starts[keep], spans.ends[keep]), Spans(spans.starts[sparse], spans.ends[sparse])


def _blocks(pagemap: Pagemap, spans: Spans) -> Spans:
    runs = [_runs(pagemap, start, end) for start, end in _ranges(spans)]
    rows = np.concatenate(runs) if runs else np.zeros((0, 3), np.uint64)
    if not len(rows):
        return Spans.empty()
    # Runs to blocks, neighbours joined, then cut to the mappings.
    starts = rows[:, 0] & ~_BLOCK_MASK
    ends = (rows[:, 1] + _BLOCK_MASK) & ~_BLOCK_MASK
    apart = starts[1:] > ends[:-1]
    starts, ends = starts[np.concatenate(([True], apart))], ends[np.concatenate((apart, [True]))]
    return overlap(spans, Spans(starts, ends))


def _ranges(spans: Spans) -> Sequence[tuple[int, int]]:
    """(start, end) of what is asked for in one call each: neighbouring mappings together."""
    if not len(spans):
        return ()
    apart = np.flatnonzero(spans.starts[1:] - spans.ends[:-1] > np.uint64(BLOCK_BYTES))
    if len(apart) >= CALLS_MOST:
        return ((int(spans.starts[0]), int(spans.ends[-1])),)
    firsts = np.concatenate(([0], apart + 1))
    lasts = np.concatenate((apart, [len(spans) - 1]))
    return list(zip(spans.starts[firsts].tolist(), spans.ends[lasts].tolist(), strict=True))


def _runs(pagemap: Pagemap, start: int, end: int) -> U64:
    # No category is returned, so that pages in RAM and pages in swap beside them make one run.
    return pagemap.scan_runs(start, end, anyof=PAGE_IS_PRESENT | PAGE_IS_SWAPPED, returns=0)


def overlap(spans: Spans, others: Spans) -> Spans:
    """What lies in both; pieces of different `spans` stay apart, whether they touch or not."""
    first = np.searchsorted(others.ends, spans.starts, side="right")
    last = np.searchsorted(others.starts, spans.ends, side="left")
    counts = np.maximum(last - first, 0)
    total = int(counts.sum())
    if not total:
        return Spans.empty()
    before = np.cumsum(counts) - counts
    own = np.repeat(np.arange(len(spans)), counts)
    other = np.arange(total) - np.repeat(before, counts) + np.repeat(first, counts)
    return Spans(np.maximum(spans.starts[own], others.starts[other]), np.minimum(spans.ends[own], others.ends[other]))
