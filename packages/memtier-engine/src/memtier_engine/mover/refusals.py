"""Mappings of one process that the kernel refused to page out of, remembered for a while."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from memtier_engine.hostfs.handles import ProcessFiles
from memtier_engine.hostfs.maps import parse_mappings
from memtier_engine.model import U64, Spans
from memtier_engine.mover import edge

KEPT_S = 60.0
"""Then the kernel is asked again: a program may have unlocked its memory."""
MAPS_S = 5.0
"""So long the list of mappings is taken for the present one: with 60 000 of them, reading it takes 0.1 s."""


class Refusals:
    """One per process. Reads /proc/PID/maps, and that only once the kernel refused something.

    smaps would tell of locked mappings beforehand (VmFlags), for a walk over all page tables of the process each time.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._spans = Spans.empty()
        self._fresh: list[tuple[int, int]] = []
        self._until_s = 0.0
        self._mappings = Spans.empty()
        self._mappings_s: float | None = None

    @property
    def spans(self) -> Spans:
        """What was refused lately."""
        if self._now_s() >= self._until_s:
            self._spans = Spans.empty()
            self._fresh.clear()
        elif self._fresh:  # all at once: there may be thousands
            found = _merged(np.array(self._fresh, np.uint64))
            self._spans = edge.joined([edge.without(self._spans, found), found])
            self._fresh.clear()
        return self._spans

    def borders(self, files: ProcessFiles) -> U64:
        """Where mappings begin and end.

        Raises:
            ProcessGone: it exited.
        """
        now_s = self._now_s()
        if self._mappings_s is None or now_s >= self._mappings_s + MAPS_S:
            found = parse_mappings(files.read("maps"))
            self._mappings, self._mappings_s = Spans(found.starts, found.ends), now_s
        return np.concatenate((self._mappings.starts, self._mappings.ends))

    def refused(self, start: int, end: int) -> int:
        """The span, which lies in one mapping, was refused. Returns where the kernel may do as asked again."""
        at = int(np.searchsorted(self._mappings.starts, np.uint64(start), side="right")) - 1
        if at >= 0 and int(self._mappings.ends[at]) >= end:
            start, end = int(self._mappings.starts[at]), int(self._mappings.ends[at])
        if self._now_s() >= self._until_s:
            self._spans = Spans.empty()
            self._fresh.clear()
            self._until_s = self._now_s() + KEPT_S
        self._fresh.append((start, end))
        return end


def _merged(rows: U64) -> Spans:
    """Rows of (start, end), in any order, as spans."""
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    ends = np.maximum.accumulate(rows[:, 1])
    apart = rows[1:, 0] > ends[:-1]
    return Spans(rows[np.concatenate(([True], apart)), 0], ends[np.concatenate((apart, [True]))])
