"""Tracker `bpf`: accessed and dirty bits straight from the page tables, read by a BPF program.

Exact per page (2 MiB and 1 GiB pages: per huge page), for reads and writes, without the idle bitmap. A scan reads the
bits of up to 256 MiB, clears those that are set (`memtier_engine.trackers.clearing`), and goes on. Touches between
the reading and the clearing of a page, a few milliseconds, are not seen. `written` tells pages that were touched and
are dirty: those touched and clean were only read, but a page that was dirty before and only read in this window shows
as written too.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from loguru import logger

from memtier_engine.distinct import distinct
from memtier_engine.errors import AccessDenied, ProcessGone
from memtier_engine.hostfs.handles import OpenProcesses, ProcessFiles
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap, exclusive, present
from memtier_engine.model import CHUNK_PAGES, PAGE_SHIFT, U64, Bools, PageChunk, ProcessId, Spans, frame_tags
from memtier_engine.trackers.bpf import paging, rights
from memtier_engine.trackers.bpf.blocks import Layout, laid_out, runs_of
from memtier_engine.trackers.bpf.program import MAX_BLOCKS, SharedWalker, Walk, Walker
from memtier_engine.trackers.clearing import Batches, BestClearing, Clearing, Ranges, ranges_of
from memtier_engine.trackers.common import FirstSight, TrackerFiles, cut, mark_new, merged, overlaps, spans_of
from memtier_engine.trackers.words import read_words

RETRY_BLOCKS = 32
"""Pages that kept their bits are tried once more if they lie this close together (64 MiB): some 3 ms."""
KEPT_PAGES = 4096
"""Of a process of up to that many (16 MiB), and spans, where its pages are found is kept: 32 KiB at most. With 1000 of
them, that took half of a scan."""
RETRY_SCANS = 8
"""Pages that others map too are tried again after so many scans: the others may be gone."""
_BLOCK_SHIFT = paging.BLOCK_BYTES.bit_length() - 1
_BLOCK_PAGE_SHIFT = np.uint64(_BLOCK_SHIFT - PAGE_SHIFT)


class BpfTracker:
    """Exact reads and writes, page by page; needs BPF, BTF and root."""

    name = "bpf"
    page_exact = True
    own_accesses_only = True

    def __init__(
        self,
        host: Host,
        *,
        loader: str = "auto",
        files: OpenProcesses | None = None,
        clearing: BestClearing | None = None,
    ) -> None:
        """Load the walk.

        Args:
            host: the machine.
            loader: of BPF programs.
            files: of the processes, shared with others; None: its own.
            clearing: None: the best there is.
        Raises:
            TrackerUnavailable: with the reason and what would help.
        """
        self._host = host
        self._shared = SharedWalker(host, loader)
        self.walker = self._shared.walker
        self.loader = self.walker.loader
        self.clearing = clearing or BestClearing(host)
        self.flushes = self.clearing.flushes()
        self._bits = BitClearer(self.walker)
        self._files = TrackerFiles(host, files)
        self._seen = FirstSight()
        self._kept_layouts: dict[ProcessId, list[Layout]] = {}
        self._warned: set[ProcessId] = set()
        self._buffer = np.empty((MAX_BLOCKS, paging.BLOCK_PAGES), np.uint64)

    @property
    def stale_tlb(self) -> bool:
        """See `memtier_engine.engine.probing`."""
        return not self.flushes

    def use_files(self, files: OpenProcesses) -> None:
        """Open files of processes there from now on; before the first scan."""
        self._files.use(files)

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`."""
        self._files.keep(processes)
        self._seen.keep(processes)
        self.clearing.watch(processes)
        self._bits.watch(processes)
        self._warned &= processes
        for process in self._kept_layouts.keys() - processes:
            del self._kept_layouts[process]

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`. What was yielded is cleared, what was not is not: it may be given up at any chunk."""
        known = self._seen.known(process, spans)
        clearing = self.clearing.of(process)
        try:
            with self._files.of(process) as files, Pagemap(self._host, process.pid, files=files) as pagemap:
                touched = shared = 0
                self._bits.begin(process)
                for layout in self._layouts(process, spans, same=known is None):
                    seen = look_at(self.walker, pagemap, layout, self._buffer)
                    if seen.walk.other_mmu:
                        self._warn_of_other_mmu(process)
                    chunk = self._chunk(seen, known)
                    if not clearing.whole:
                        try:
                            touched += int(np.count_nonzero(seen.accessed))
                            shared += self._bits.clear(files, pagemap, seen, clearing, self._buffer)
                        except AccessDenied as failure:
                            self.clearing.refused(process, failure)
                            clearing = self.clearing.of(process)
                    yield chunk
                if clearing.whole or self.clearing.all_is_better(files, touched, shared):
                    self.clearing.refs.clear(files, Ranges.none(), spans)
        except AccessDenied as failure:
            raise rights.denied(self._host, failure, rights.FOR_OTHERS) from None
        self._seen.completed(process, spans)

    def _layouts(self, process: ProcessId, spans: Spans, *, same: bool) -> Iterable[Layout]:
        """The chunks of a scan; those of small processes are kept for as long as their spans stay the same."""
        kept = self._kept_layouts.get(process)
        if kept is not None and same:
            return kept
        made = map(laid_out, cut(spans, CHUNK_PAGES, MAX_BLOCKS))
        if len(spans) > KEPT_PAGES or int(spans.pages.sum()) > KEPT_PAGES:
            self._kept_layouts.pop(process, None)
            return made
        self._kept_layouts[process] = layouts = list(made)
        return layouts

    def _chunk(self, seen: Seen, known: Spans | None) -> PageChunk:
        words, resident = seen.words, seen.resident
        accessed = resident.copy() if seen.walk.other_mmu else seen.accessed.copy()
        written = paging.dirty(words) & accessed
        mark_new(accessed, seen.pieces, known)
        accessed &= resident
        return PageChunk(
            int(seen.pieces.starts[0]),
            accessed,
            resident,
            written=written,
            spans=spans_of(seen.pieces),
            swapped=paging.swapped(words),
            tags=frame_tags(paging.frames(words, self.walker.mask)),
        )

    def look(self, process: ProcessId, spans: Spans) -> Bools | None:
        """See `LookingTracker`: the bits as they are."""
        found = [np.zeros(0, np.bool_)]
        try:
            with self._files.of(process) as files, Pagemap(self._host, process.pid, files=files) as pagemap:
                for layout in map(laid_out, cut(spans, CHUNK_PAGES, MAX_BLOCKS)):
                    seen = look_at(self.walker, pagemap, layout)
                    found.append(seen.resident if seen.walk.other_mmu else seen.accessed)
        except AccessDenied as failure:
            raise rights.denied(self._host, failure, rights.FOR_OTHERS) from None
        return np.concatenate(found)

    def _warn_of_other_mmu(self, process: ProcessId) -> None:
        if process not in self._warned:
            self._warned.add(process)
            logger.warning(
                "process {}: a virtual machine or device uses its memory unseen, so all of it counts as in use; "
                "tracker idlepage sees such accesses",
                process.pid,
            )

    def close(self) -> None:
        """See `Tracker.close`."""
        self._files.close()
        self._shared.close()


class Seen(NamedTuple):
    """One run of the walk."""

    pieces: Spans
    layout: Layout
    walk: Walk
    words: U64  # uint64[m], of the pages of `pieces`
    resident: Bools  # bool[m]
    accessed: Bools  # bool[m]: bit set, of resident pages


def look_at(walker: Walker, pagemap: Pagemap, layout: Layout, buffer: U64 | None = None) -> Seen:
    """Read the words of the pages of `layout`, at most `MAX_BLOCKS` blocks.

    Raises:
        ProcessGone: it exited.
    """
    walk = walker.walk(pagemap.fileno(), layout.addresses, buffer)
    if walk.states[0] == paging.STATE_GONE:
        raise ProcessGone(f"process {pagemap.pid} exited", errno.ESRCH)
    words: U64 = walk.words.reshape(-1)[layout.places]
    resident = paging.resident(words)
    return Seen(layout.pieces, layout, walk, words, resident, paging.accessed(words) & resident)


class BitClearer:
    """Clears the bits that a walk found set, and looks whether they are."""

    def __init__(self, walker: Walker) -> None:
        self._walker = walker
        self._batches = Batches()
        self._shared: dict[ProcessId, _Shared] = {}

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """Forget all other processes."""
        for process in self._shared.keys() - processes:
            del self._shared[process]

    def begin(self, process: ProcessId) -> None:
        """A scan begins."""
        shared = self._shared.setdefault(process, _Shared())
        shared.scans += 1
        if shared.scans % RETRY_SCANS == 0:
            shared.spans = Spans.empty()

    def clear(self, files: ProcessFiles, pagemap: Pagemap, seen: Seen, clearing: Clearing, buffer: U64) -> int:
        """Clear what `seen` has set, but for pages that kept their bit lately because others have them too.

        Args:
            files: of the process.
            pagemap: of the process.
            seen: what was seen just now.
            clearing: how.
            buffer: for words; may be the one of `seen`, of which only the columns are used any more.
        Returns:
            How many pages kept their bit because others have them too.
        Raises:
            AccessDenied, ProcessGone: see `Clearing`.
        """
        states = seen.walk.states
        # A block that changed while it was read may be a huge page by now: cleared in parts, it would be split.
        sure = (states == paging.STATE_TABLE) | (states == paging.STATE_HUGE_PMD)
        touched = seen.accessed if sure.all() else seen.accessed & seen.layout.of_blocks(sure)
        if not touched.any():
            return 0
        lately = self._shared.setdefault(files.process, _Shared())
        passed = 0
        if len(lately.spans):
            # Trying again with each scan would cost as much as they are, for ever: 40 children of a server, say.
            known = ~_outside(seen.pieces, lately.spans, len(touched))
            passed = int(np.count_nonzero(touched & known))
            touched = touched & ~known
            if not touched.any():
                return passed
        huge_blocks = states == paging.STATE_HUGE_PMD
        huge = seen.layout.of_blocks(huge_blocks) if huge_blocks.any() else None
        runs, of_huge = runs_of(seen.layout, touched, huge)
        clearing.clear(files, ranges_of(runs, seen.pieces, of_huge), seen.pieces)
        if huge is not None:
            touched = touched & ~huge
        kept = self._still_set(pagemap, seen.layout, touched, buffer)
        if not kept.any():
            return passed
        numbers = seen.layout.numbers(np.flatnonzero(kept))
        if self._few(numbers):
            self._batches.drain()
            # Whole blocks now: of a large folio of a file, a part alone cannot be cleared while it is dirty.
            blocks = distinct(numbers >> _BLOCK_PAGE_SHIFT) << np.uint64(_BLOCK_SHIFT)
            around = Spans(blocks, blocks + np.uint64(paging.BLOCK_BYTES))
            clearing.clear(files, Ranges(overlaps(around, seen.pieces).spans), seen.pieces)
            kept = self._still_set(pagemap, seen.layout, kept, buffer)
            numbers = seen.layout.numbers(np.flatnonzero(kept))
        if len(numbers):
            runs, _ = runs_of(seen.layout, kept)
            with_others = _shared_of(pagemap, runs, numbers)
            lately.spans = merged(lately.spans, with_others)
            passed += int(with_others.pages.sum())
        return passed

    def _few(self, numbers: U64) -> bool:
        """Whether trying again costs little: as many as wait in batches, or in one place."""
        few = int(numbers[-1] - numbers[0]) < RETRY_BLOCKS * paging.BLOCK_PAGES
        return few or len(numbers) <= self._batches.most_pages

    def _still_set(self, pagemap: Pagemap, layout: Layout, pages: Bools, buffer: U64) -> Bools:
        """bool[n]: which of these pages have their bit set."""
        words: U64 = self._walker.walk(pagemap.fileno(), layout.addresses, buffer).words.reshape(-1)[layout.places]
        return pages & paging.resident(words) & paging.accessed(words)


@dataclass(slots=True)
class _Shared:
    """Pages of one process that others map too, as found by the last scans."""

    scans: int = 0
    spans: Spans = field(default_factory=Spans.empty)


def _outside(pieces: Spans, known: Spans, pages: int) -> Bools:
    outside = np.zeros(pages, np.bool_)
    mark_new(outside, pieces, known)
    return outside


def _shared_of(pagemap: Pagemap, runs: Spans, numbers: U64) -> Spans:
    """Those of the pages of `runs` (uint64[n] `numbers`) that other processes map too."""
    words = read_words(pagemap, runs)
    shared = numbers[present(words) & ~exclusive(words)]
    if not len(shared):
        return Spans.empty()
    apart = np.diff(shared) != 1
    shift = np.uint64(PAGE_SHIFT)
    heads, tails = shared[np.concatenate(([True], apart))], shared[np.concatenate((apart, [True]))]
    return Spans(heads << shift, (tails + np.uint64(1)) << shift)
