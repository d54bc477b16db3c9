"""Tracker `bpf-sampled`: a random share of a very large process's 2 MiB blocks, exact within them.

Clearing all accessed bits costs 15 ms per GiB and holds up the process's mmap calls: too much for terabytes. Here only
the blocks of a random panel are read and cleared (MADV_COLD, which also moves these pages to the inactive list; the
kernel brings back those in use when it comes by). Of all other blocks only whether they are mapped is read, and their
pages count as in use: nothing outside the panel looks idle. A panel is kept for some scans, then another is drawn.
`estimate` extrapolates the working set, with its standard error.

MADV_COLD passes over pages that other processes map too, over locked ones, and over those that wait in a CPU's batch
(up to 31) to join an LRU list. They keep their bit and count as in use, so both errors are on the safe side.
Source: mm/madvise.c, madvise_cold_or_pageout_pte_range().
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from memtier_engine.abi import syscalls
from memtier_engine.abi.constants import MADV_COLD, UIO_MAXIOV
from memtier_engine.errors import AccessDenied, KernelCallError, ProcessGone
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.model import PAGE_BYTES, PAGE_SHIFT, U64, Bools, PageChunk, ProcessId, Spans
from memtier_engine.trackers.bpf import paging, rights
from memtier_engine.trackers.bpf.program import MAX_BLOCKS, SharedWalker
from memtier_engine.trackers.bpf.tracker import batches, blocks_of
from memtier_engine.trackers.common import FirstSight, mark_new

DEFAULT_SHARE = 0.05
DEFAULT_PANEL_SCANS = 64
"""Longer than it takes a page to count as idle, or no page ever will."""
_BLOCK_MASK = np.uint64(paging.BLOCK_BYTES - 1)


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """Memory of one process accessed in a window, extrapolated from the sampled blocks."""

    accessed_bytes: float
    standard_error_bytes: float
    """Two of them on either side hold the true value in 95 of 100 windows, if 30 or more blocks were sampled."""
    blocks: int  # mapped
    sampled_blocks: int  # of them


def in_panel(blocks: U64, seed: int, share: float) -> Bools:
    """bool[n]: which 2 MiB blocks (by address) belong to the panel `seed`, a random `share` of all.

    The choice is a hash of address and seed (the finalizer of SplitMix64), so no list need be kept.
    """
    mixed = (blocks // np.uint64(paging.BLOCK_BYTES)) ^ np.uint64(seed & (2**64 - 1))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    chosen: Bools = mixed < np.uint64(min(int(share * 2.0**64), 2**64 - 1))
    return chosen


def extrapolate(accessed_pages: U64, mapped_blocks: int) -> WorkingSet | None:
    """The estimate from the accessed pages uint64[n] of each of n sampled blocks out of `mapped_blocks`.

    Simple random sampling of clusters: N times the mean; its variance is N² (1 - n/N) s² / n. None for n < 2.
    """
    count = len(accessed_pages)
    if count < 2:
        return None
    mean = float(accessed_pages.mean())
    spread = float(accessed_pages.var(ddof=1))
    error = mapped_blocks * math.sqrt(max(0.0, 1 - count / mapped_blocks) * spread / count)
    return WorkingSet(mapped_blocks * mean * PAGE_BYTES, error * PAGE_BYTES, mapped_blocks, count)


class SampledBpfTracker:
    """Exact pages of a random share of the blocks; the rest counts as in use."""

    name = "bpf-sampled"
    page_exact = True

    def __init__(
        self,
        host: Host,
        *,
        share: float = DEFAULT_SHARE,
        panel_scans: int = DEFAULT_PANEL_SCANS,
        seed: int | None = None,
        loader: str = "auto",
    ) -> None:
        """Raises TrackerUnavailable: it does not work here; without CAP_SYS_NICE it could not clear any bit."""
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}; use more than 0, at most 1")
        if rights.absent(host, rights.FOR_COLD):
            raise rights.lacking(host, "process_madvise(MADV_COLD) on other processes", rights.FOR_COLD)
        self._host = host
        self._shared = SharedWalker(host, loader)
        self._share = share
        self._panel_scans = panel_scans
        self._seed = int.from_bytes(os.urandom(8), "little") if seed is None else seed
        self._scans: dict[ProcessId, int] = {}
        self._estimates: dict[ProcessId, WorkingSet] = {}
        self._seen = FirstSight()
        self._buffer = np.empty((MAX_BLOCKS, paging.BLOCK_PAGES), np.uint64)

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`."""
        self._seen.keep(processes)
        for process in self._scans.keys() - processes:
            del self._scans[process]
            self._estimates.pop(process, None)

    def estimate(self, process: ProcessId) -> WorkingSet | None:
        """Of the last window; None before the second scan of a panel, or if it has fewer than two mapped blocks."""
        return self._estimates.get(process)

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`."""
        known = self._seen.previous(process)
        scans = self._scans.get(process, 0)
        seed = self._seed + scans // self._panel_scans
        pages_of_sampled: list[U64] = [np.zeros(0, np.uint64)]
        sampled: list[U64] = [np.zeros(0, np.uint64)]
        mapped_blocks = 0
        with Pagemap(self._host, process.pid) as pagemap:
            for pieces in batches(spans):
                blocks, firsts = blocks_of(pieces)
                chosen = in_panel(blocks, seed, self._share)
                asked = blocks | np.where(chosen, np.uint64(0), np.uint64(paging.HEAD_ONLY))
                walk = self._shared.walker.walk(pagemap.fileno(), asked, self._buffer)
                if len(walk.states) and walk.states[0] == paging.STATE_GONE:
                    raise ProcessGone(f"process {process.pid} exited", errno.ESRCH)
                mapped = walk.states != paging.STATE_NOTHING
                mapped_blocks += int(mapped.sum())
                resident = np.repeat(mapped, paging.BLOCK_PAGES).reshape(-1, paging.BLOCK_PAGES)
                accessed = resident.copy()
                resident[chosen] = paging.resident(walk.words[chosen])
                accessed[chosen] = (paging.accessed(walk.words[chosen]) | walk.other_mmu) & resident[chosen]
                pages_of_sampled.append(accessed[chosen & mapped].sum(axis=1, dtype=np.uint64))
                sampled.append(blocks[chosen & mapped])
                for (start, end), first in zip(pieces, firsts, strict=True):
                    rows = slice(first, first + (end - start >> PAGE_SHIFT))
                    touched = accessed.reshape(-1)[rows]
                    mark_new(touched, start, known)
                    there = resident.reshape(-1)[rows]
                    yield PageChunk(start, touched & there, there)
        self._estimates.pop(process, None)
        if scans % self._panel_scans:  # the panel's bits were cleared by the scan before
            found = extrapolate(np.concatenate(pages_of_sampled), mapped_blocks)
            if found is not None:
                self._estimates[process] = found
        try:
            make_cold(process, clipped(np.concatenate(sampled), spans))
        except AccessDenied as failure:
            raise rights.denied(self._host, failure, (*rights.FOR_COLD, *rights.FOR_OTHERS)) from None
        self._scans[process] = scans + 1
        self._seen.completed(process, spans)

    def close(self) -> None:
        """See `Tracker.close`."""
        self._shared.close()


def clipped(blocks: U64, spans: Spans) -> Spans:
    """What `spans` has of the 2 MiB `blocks`; a block that reaches over several spans is cut into as many pieces."""
    blocks = np.unique(blocks)
    ends = blocks + np.uint64(paging.BLOCK_BYTES)
    first = np.searchsorted(spans.ends, blocks, side="right")
    last = np.searchsorted(spans.starts, ends, side="left")
    counts = last - first
    rows = np.repeat(np.arange(len(blocks)), counts)
    which = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
    return Spans(np.maximum(blocks[rows], spans.starts[which]), np.minimum(ends[rows], spans.ends[which]))


def make_cold(process: ProcessId, spans: Spans) -> None:
    """Clear the accessed bits of `spans` (MADV_COLD). What the kernel refuses (locked, shared) stays as it is.

    Raises:
        ProcessGone: it exited.
        AccessDenied: needs CAP_SYS_NICE and CAP_SYS_PTRACE.
    """
    pidfd = syscalls.pidfd_open(process.pid)
    try:
        lengths = spans.ends - spans.starts
        sums = np.cumsum(lengths)
        at = 0
        while at < len(spans):
            last = min(at + UIO_MAXIOV, len(spans))
            advised = 0
            try:
                advised = syscalls.process_madvise(pidfd, spans.starts[at:last], lengths[at:last], MADV_COLD)
            except KernelCallError as failure:
                if failure.errno not in (errno.EINVAL, errno.ENOMEM):
                    raise
            done = (int(sums[at - 1]) if at else 0) + advised
            reached = int(np.searchsorted(sums, done, side="right"))
            at = reached if reached >= last else max(at, reached) + 1  # skip the one it stopped at
    finally:
        os.close(pidfd)
