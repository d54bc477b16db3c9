"""Tracker `userfault` on this process's own memory: every write, nothing but writes."""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.model import PAGE_BYTES, Spans
from memtier_engine.trackers.registry import why_not
from memtier_engine.trackers.userfault import UserfaultTracker

PAGES = 64
WHY = why_not("userfault", Host())
pytestmark = pytest.mark.skipif(
    WHY is not None, reason=f"userfaultfd does not work here: {WHY}; needs Linux 6.7 or newer"
)


class Area:
    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, PAGES * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.pin = ctypes.c_char.from_buffer(self.memory)
        start = np.array([ctypes.addressof(self.pin)], np.uint64)
        self.spans = Spans(start, start + np.uint64(PAGES * PAGE_BYTES))
        self.process = process_id(Host(), os.getpid())
        for page in range(PAGES):
            self.write(page)

    def write(self, page: int) -> None:
        self.memory[page * PAGE_BYTES] = (self.memory[page * PAGE_BYTES] + 1) % 256

    def written(self, tracker: UserfaultTracker) -> list[int]:
        chunks = list(tracker.scan(self.process, self.spans))
        assert all(chunk.written is not None for chunk in chunks)
        return np.flatnonzero(np.concatenate([chunk.accessed for chunk in chunks])).tolist()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sets(st.integers(0, PAGES - 1)), min_size=1, max_size=4))
def test_exactly_the_written_pages_are_reported_in_each_window(windows: list[set[int]]) -> None:
    area, tracker = Area(), UserfaultTracker(Host())
    try:
        assert area.written(tracker) == list(range(PAGES))  # first sight
        for window in windows:
            for page in window:
                area.write(page)
            assert area.written(tracker) == sorted(window)
    finally:
        tracker.close()


def test_reads_are_not_reported() -> None:
    area, tracker = Area(), UserfaultTracker(Host())
    area.written(tracker)
    assert sum(area.memory[page * PAGE_BYTES] for page in range(PAGES)) > 0
    assert area.written(tracker) == []
    tracker.close()


def test_it_works_without_root() -> None:
    """In a child that gave up root; the kernel allows it for one's own user-mode faults."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            libc = ctypes.CDLL(None)
            libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self is root's after setuid
            area, tracker = Area(), UserfaultTracker(Host())
            area.written(tracker)
            area.write(7)
            status = 0 if area.written(tracker) == [7] else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
