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

from memtier_engine.errors import AccessDenied, ProcessGone
from memtier_engine.hostfs.handles import OpenProcesses
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, PAGE_SHIFT, U64, Bools, PageChunk, ProcessId, Spans
from memtier_engine.trackers.bpf import paging, rights
from memtier_engine.trackers.bpf.blocks import laid_out
from memtier_engine.trackers.bpf.program import MAX_BLOCKS, SharedWalker
from memtier_engine.trackers.bpf.tracker import BitClearer, Seen, look_at
from memtier_engine.trackers.clearing import Cold
from memtier_engine.trackers.common import FirstSight, TrackerFiles, cut, mark_new, spans_of

DEFAULT_SHARE = 0.05
DEFAULT_PANEL_SCANS = 64
"""Longer than it takes a page to count as idle, or no page ever will."""


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
        files: OpenProcesses | None = None,
    ) -> None:
        """Raises TrackerUnavailable: it does not work here; without CAP_SYS_NICE it could not clear any bit."""
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}; use more than 0, at most 1")
        if rights.absent(host, rights.FOR_COLD):
            raise rights.lacking(host, "process_madvise(MADV_COLD) on other processes", rights.FOR_COLD)
        self._host = host
        self._shared = SharedWalker(host, loader)
        self._bits = BitClearer(self._shared.walker)
        self._clearing = Cold()
        self._files = TrackerFiles(host, files)
        self._share = share
        self._panel_scans = panel_scans
        self._seed = int.from_bytes(os.urandom(8), "little") if seed is None else seed
        self._scans: dict[ProcessId, int] = {}
        self._estimates: dict[ProcessId, WorkingSet] = {}
        self._seen = FirstSight()
        self._buffer = np.empty((MAX_BLOCKS, paging.BLOCK_PAGES), np.uint64)

    def use_files(self, files: OpenProcesses) -> None:
        """Open files of processes there from now on; before the first scan."""
        self._files.use(files)

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`."""
        self._files.keep(processes)
        self._bits.watch(processes)
        self._seen.keep(processes)
        for process in self._scans.keys() - processes:
            del self._scans[process]
            self._estimates.pop(process, None)

    def estimate(self, process: ProcessId) -> WorkingSet | None:
        """Of the last window; None before the second scan of a panel, or if it has fewer than two mapped blocks."""
        return self._estimates.get(process)

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`. What was yielded is cleared, what was not is not."""
        known = self._seen.known(process, spans)
        scans = self._scans.get(process, 0)
        seed = self._seed + scans // self._panel_scans
        pages_of_sampled: list[U64] = [np.zeros(0, np.uint64)]
        mapped_blocks = 0
        self._bits.begin(process)
        with self._files.of(process) as files, Pagemap(self._host, process.pid, files=files) as pagemap:
            for pieces in cut(spans, CHUNK_PAGES, MAX_BLOCKS):
                seen, chosen = self._look(pagemap, pieces, seed)
                mapped = seen.walk.states != paging.STATE_NOTHING
                mapped_blocks += int(mapped.sum())
                accessed = seen.accessed | seen.resident & (seen.layout.of_blocks(~chosen) | seen.walk.other_mmu)
                pages_of_sampled.append(self._accessed_by_block(seen, accessed, chosen & mapped))
                mark_new(accessed, pieces, known)
                swapped = None if not chosen.all() else paging.swapped(seen.words)
                try:
                    self._bits.clear(files, pagemap, seen, self._clearing, self._buffer)
                except AccessDenied as failure:
                    raise rights.denied(self._host, failure, (*rights.FOR_COLD, *rights.FOR_OTHERS)) from None
                accessed &= seen.resident
                yield PageChunk(int(pieces.starts[0]), accessed, seen.resident, spans=spans_of(pieces), swapped=swapped)
        self._estimates.pop(process, None)
        if scans % self._panel_scans:  # the panel's bits were cleared by the scan before
            found = extrapolate(np.concatenate(pages_of_sampled), mapped_blocks)
            if found is not None:
                self._estimates[process] = found
        self._scans[process] = scans + 1
        self._seen.completed(process, spans)

    def _look(self, pagemap: Pagemap, pieces: Spans, seed: int) -> tuple[Seen, Bools]:
        """What was seen, and bool[b]: which of its blocks are of the panel. Others are resident if anything maps them,
        and have no bits set."""
        layout = laid_out(pieces)
        chosen = in_panel(layout.addresses, seed, self._share)
        asked = layout.addresses | np.where(chosen, np.uint64(0), np.uint64(paging.HEAD_ONLY))
        walk = self._shared.walker.walk(pagemap.fileno(), asked, self._buffer)
        if walk.states[0] == paging.STATE_GONE:
            raise ProcessGone(f"process {pagemap.pid} exited", errno.ESRCH)
        walk.words[~chosen] = 0
        walk.words[~chosen & (walk.states != paging.STATE_NOTHING)] = paging.PTE_PRESENT
        words: U64 = walk.words.reshape(-1)[layout.places]
        resident = paging.resident(words)
        return Seen(pieces, layout, walk, words, resident, paging.accessed(words) & resident), chosen

    @staticmethod
    def _accessed_by_block(seen: Seen, accessed: Bools, wanted: Bools) -> U64:
        """uint64[blocks wanted]: accessed pages of each."""
        # Pages of blocks that are not wanted count as accessed, so nearly all do: 2 ms per GiB to look each of them up.
        numbers = seen.layout.numbers(np.flatnonzero(accessed & seen.layout.of_blocks(wanted)))
        block = np.searchsorted(seen.layout.addresses, numbers << np.uint64(PAGE_SHIFT), side="right") - 1
        counts: U64 = np.bincount(block, minlength=len(wanted))[wanted].astype(np.uint64)
        return counts

    def look(self, process: ProcessId, spans: Spans) -> Bools | None:
        """See `LookingTracker`: exact in the panel, touched outside."""
        seed = self._seed + max(0, self._scans.get(process, 0) - 1) // self._panel_scans
        found = [np.zeros(0, np.bool_)]
        with self._files.of(process) as files, Pagemap(self._host, process.pid, files=files) as pagemap:
            for layout in map(laid_out, cut(spans, CHUNK_PAGES, MAX_BLOCKS)):
                seen = look_at(self._shared.walker, pagemap, layout)
                outside = seen.layout.of_blocks(~in_panel(seen.layout.addresses, seed, self._share))
                found.append(seen.accessed | seen.resident & (outside | seen.walk.other_mmu))
        return np.concatenate(found)

    def close(self) -> None:
        """See `Tracker.close`."""
        self._files.close()
        self._shared.close()
