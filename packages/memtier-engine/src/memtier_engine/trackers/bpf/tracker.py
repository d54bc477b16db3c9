"""Tracker `bpf`: accessed and dirty bits straight from the page tables, read by a BPF program.

Exact per page (2 MiB and 1 GiB pages: per huge page), for reads and writes, without the idle bitmap. A scan reads the
bits of `spans`, then clears those of the whole process (clear_refs 1). Touches between the reading and the clearing of
a page, milliseconds, are not seen. `written` tells pages that were touched and are dirty: those touched and clean
were only read, but a page that was dirty before and only read in this window shows as written too.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import numpy as np
from loguru import logger

from memtier_engine.errors import AccessDenied, KernelCallError, ProcessGone
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap, soft_dirty
from memtier_engine.hostfs.probe_base import TrialPages
from memtier_engine.hostfs.proc import CLEAR_REFS_REFERENCED, CLEAR_REFS_SOFT_DIRTY, clear_refs
from memtier_engine.model import PAGE_SHIFT, U64, PageChunk, ProcessId, Spans
from memtier_engine.trackers.bpf import paging, rights
from memtier_engine.trackers.bpf.program import MAX_BLOCKS, SharedWalker
from memtier_engine.trackers.common import FirstSight, chunks, grouped, spans_of

_BLOCK_MASK = paging.BLOCK_BYTES - 1
_BLOCK_SHIFT = paging.BLOCK_BYTES.bit_length() - 1


class BpfTracker:
    """Exact reads and writes, page by page; needs BPF, BTF and root."""

    name = "bpf"
    page_exact = True
    own_accesses_only = True

    def __init__(self, host: Host, *, loader: str = "auto") -> None:
        """Raises TrackerUnavailable: with the reason and what would help."""
        self._host = host
        self._shared = SharedWalker(host, loader)
        self.walker = self._shared.walker
        self.loader = self.walker.loader
        self.flushes = flush_is_free(host)
        self._seen = FirstSight()
        self._warned: set[ProcessId] = set()
        self._buffer = np.empty((MAX_BLOCKS, paging.BLOCK_PAGES), np.uint64)

    @property
    def stale_tlb(self) -> bool:
        """See `memtier_engine.engine.probing`."""
        return not self.flushes

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`."""
        self._seen.keep(processes)
        self._warned &= processes

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`."""
        try:
            with Pagemap(self._host, process.pid) as pagemap:
                for pieces in batches(spans):
                    yield from self._read(process, pagemap, pieces, spans)
            clear_refs(self._host, process.pid, CLEAR_REFS_REFERENCED)
            if self.flushes:
                clear_refs(self._host, process.pid, CLEAR_REFS_SOFT_DIRTY)
        except AccessDenied as failure:
            raise rights.denied(self._host, failure, rights.FOR_OTHERS) from None
        self._seen.completed(process, spans)

    def _read(
        self, process: ProcessId, pagemap: Pagemap, pieces: list[tuple[int, int]], spans: Spans
    ) -> Iterator[PageChunk]:
        blocks, firsts = blocks_of(pieces)
        walk = self.walker.walk(pagemap.fileno(), blocks, self._buffer)
        if len(walk.states) and walk.states[0] == paging.STATE_GONE:
            raise ProcessGone(f"process {process.pid} exited", errno.ESRCH)
        if walk.other_mmu:
            self._warn_of_other_mmu(process)
        flat = walk.words.reshape(-1)
        row_of = dict(zip(pieces, firsts, strict=True))
        for group in grouped(pieces):
            rows = [flat[row_of[piece] : row_of[piece] + (piece[1] - piece[0] >> PAGE_SHIFT)] for piece in group]
            words = rows[0] if len(rows) == 1 else np.concatenate(rows)
            resident = paging.resident(words)
            accessed = resident.copy() if walk.other_mmu else paging.accessed(words) & resident
            written = paging.dirty(words) & accessed
            self._seen.mark(process, spans, accessed, group)
            accessed &= resident
            yield PageChunk(group[0][0], accessed, resident, written=written, spans=spans_of(group))

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
        self._shared.close()


def flush_is_free(host: Host) -> bool:
    """Whether clear_refs 4 does nothing on this kernel but flush the TLBs of the process.

    clear_refs 1 clears the accessed bits without a flush, and a page that a CPU has in its TLB does not set the bit
    again: a busy process with a small working set looked idle by half (seen on 6.18). clear_refs 4 flushes; without
    CONFIG_MEM_SOFT_DIRTY that is all it does, in 1 ms per GiB. With it, every page would be write-protected, which
    costs the process a fault per page written: then we leave it to the kernel's own flushes.
    Source: fs/proc/task_mmu.c, clear_refs_write().
    """
    trial = TrialPages(1)
    try:
        clear_refs(host, host.own_pid, CLEAR_REFS_SOFT_DIRTY)
        trial.touch(0, 1)
        with Pagemap(host, host.own_pid) as pagemap:
            return not soft_dirty(pagemap.read(trial.start, trial.end)).any()
    except KernelCallError:  # EINVAL: newer kernels refuse it without CONFIG_MEM_SOFT_DIRTY
        return False
    finally:
        trial.close()


def batches(spans: Spans) -> Iterator[list[tuple[int, int]]]:
    """The chunks (start, end) of `spans` in groups whose 2 MiB blocks fit into one run of the walk."""
    pieces: list[tuple[int, int]] = []
    used = 0
    for start, end in chunks(spans):
        count = ((end + _BLOCK_MASK) >> _BLOCK_SHIFT) - (start >> _BLOCK_SHIFT)
        if pieces and used + count > MAX_BLOCKS:
            yield pieces
            pieces, used = [], 0
        pieces.append((start, end))
        used += count
    if pieces:
        yield pieces


def blocks_of(pieces: list[tuple[int, int]]) -> tuple[U64, list[int]]:
    """(addresses of the 2 MiB blocks that hold `pieces`, per piece the number of its first page among their pages)."""
    columns = [np.arange(start & ~_BLOCK_MASK, end, paging.BLOCK_BYTES, dtype=np.uint64) for start, end in pieces]
    before = np.cumsum([0] + [len(column) for column in columns[:-1]]).tolist()
    firsts = [
        count * paging.BLOCK_PAGES + ((start & _BLOCK_MASK) >> PAGE_SHIFT)
        for (start, _), count in zip(pieces, before, strict=True)
    ]
    return np.concatenate(columns), firsts
