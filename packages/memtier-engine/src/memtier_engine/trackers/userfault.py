"""Tracker `userfault`: exact writes of the calling process itself, without root. For experiments.

Source: Documentation/admin-guide/mm/pagemap.rst (PAGEMAP_SCAN with PM_SCAN_WP_MATCHING) and
Documentation/admin-guide/mm/userfaultfd.rst (UFFD_FEATURE_WP_ASYNC, Linux 6.7). Reading which pages were
written and write-protecting them again is one atomic call: no write is lost between two scans.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import numpy as np

from memtier_engine.abi import syscalls
from memtier_engine.abi.constants import (
    PAGE_IS_WRITTEN,
    PM_SCAN_CHECK_WPASYNC,
    PM_SCAN_WP_MATCHING,
    UFFD_FEATURE_WP_ASYNC,
    UFFD_FEATURE_WP_UNPOPULATED,
    UFFD_USER_MODE_ONLY,
    UFFDIO_REGISTER_MODE_WP,
)
from memtier_engine.errors import KernelCallError, TrackerUnavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap, present, swapped
from memtier_engine.model import CHUNK_PAGES, PAGE_SHIFT, Bools, PageChunk, ProcessId, Spans
from memtier_engine.trackers.common import FirstSight, cut, mark_new, spans_of
from memtier_engine.trackers.words import read_words, tags_of


class UserfaultTracker:
    """Writes of this process only; other processes are refused."""

    name = "userfault"
    page_exact = True
    clears_accessed_bits = False

    def __init__(self, host: Host) -> None:
        """Raises KernelCallError where the kernel or a sysctl does not allow it."""
        self._host = host
        self._seen = FirstSight()
        self._watched: set[tuple[int, int]] = set()
        self._runs = np.empty((CHUNK_PAGES // 2 + 1, 3), np.uint64)
        self._uffd = syscalls.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK | UFFD_USER_MODE_ONLY)
        try:
            syscalls.uffdio_api(self._uffd, UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED)
        except KernelCallError:
            os.close(self._uffd)
            raise

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`.

        Raises:
            TrackerUnavailable: there is another process among them.
        """
        others = sorted(process.pid for process in processes if process.pid != os.getpid())
        if others:
            raise TrackerUnavailable(
                f"tracker userfault sees only its own process ({os.getpid()}), not {others}",
                hint="use tracker auto for other processes",
            )
        self._seen.keep(processes)

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`."""
        known = self._seen.known(process, spans)
        current = set(zip(spans.starts.tolist(), spans.ends.tolist(), strict=True))
        self._watched &= current
        with Pagemap(self._host, process.pid) as pagemap:
            for span in sorted(current - self._watched):  # a system call each, once
                if self._register(*span):
                    self._watched.add(span)
            for pieces in cut(spans):
                words = read_words(pagemap, pieces)
                resident = present(words)
                # Here neighbours are not joined: one that could not be registered would speak for all.
                written = np.concatenate(
                    [
                        self._written_and_protected(pagemap.fileno(), start, end)
                        for start, end in zip(pieces.starts.tolist(), pieces.ends.tolist(), strict=True)
                    ]
                )
                accessed = written & resident
                mark_new(accessed, pieces, known)
                yield PageChunk(
                    int(pieces.starts[0]),
                    accessed & resident,
                    resident,
                    written=written & resident,
                    spans=spans_of(pieces),
                    swapped=swapped(words),
                    tags=tags_of(words),
                )
        self._seen.completed(process, spans)

    def _register(self, start: int, end: int) -> bool:
        """False for mappings that userfaultfd cannot protect, such as private file mappings."""
        try:
            syscalls.uffdio_register(self._uffd, start, end - start, UFFDIO_REGISTER_MODE_WP)
        except KernelCallError as failure:
            if failure.errno in (errno.EINVAL, errno.EPERM, errno.ENOMEM, errno.EBUSY):
                return False
            raise
        return True

    def _written_and_protected(self, pagemap_fd: int, start: int, end: int) -> Bools:
        written: Bools = np.zeros(end - start >> PAGE_SHIFT, np.bool_)
        at = start
        while at < end:
            try:
                rows, at = syscalls.pagemap_scan(
                    pagemap_fd,
                    at,
                    end,
                    category_mask=PAGE_IS_WRITTEN,
                    return_mask=PAGE_IS_WRITTEN,
                    vec=self._runs,
                    flags=PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
                )
            except KernelCallError as failure:
                if failure.errno != errno.EPERM:
                    raise
                written[:] = True  # not registered: nothing is known, so it counts as written
                return written
            for first, last in ((self._runs[:rows, :2] - np.uint64(start)) >> np.uint64(PAGE_SHIFT)).tolist():
                written[first:last] = True
        return written

    def close(self) -> None:
        """See `Tracker.close`."""
        if self._uffd >= 0:
            os.close(self._uffd)
            self._uffd = -1
