"""What a memory-bound process loses to scans at an interval: its own CPU time per unit of work, before and after each.

On a machine that others use too, turns with scans and turns without differ by ten times what is looked for. So every
scan is compared with the units of work just around it: what they take longer while it runs, and shortly after it,
when the CPU has to find the pages again and to set their accessed bits. A tracker that looks all the time has no such
moments: turns beside it are compared with turns without, by the median unit of work.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.model import PAGE_BYTES, ProcessId, Spans, Tracker

AFTER_S = 0.1
"""A dozen units of work: the first two touch every page again."""
TOUCHES_PER_PAGE = 8
AROUND_S = 0.4
_WORK = """
import json, sys, time
import numpy as np
held = np.ones(int(sys.argv[1]) // 8, np.int64)
where = np.random.default_rng(1).integers(0, len(held), int(sys.argv[1]) // 4096 * int(sys.argv[2]))
print(held.ctypes.data, flush=True)
for line in sys.stdin:
    end, units, now, spent = time.monotonic() + float(line), [], 0.0, time.process_time()
    while now < end:
        held[where] += 1
        now, before, spent = time.monotonic(), spent, time.process_time()
        units.append((now, spent - before))
    print(json.dumps(units), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Loss:
    """Of a process under scans at one interval."""

    interval_s: float
    per_scan_s: float
    """CPU time that a scan costs the process, the median of all."""

    @property
    def ratio(self) -> float:
        """Its CPU time for the same work against that without scans."""
        return 1 + self.per_scan_s / self.interval_s


class Workload:
    """Adds to random numbers in its memory, eight per page in a unit of work, while it is told to."""

    def __init__(self, popen: subprocess.Popen[str], address: int, size_bytes: int) -> None:
        self._popen = popen
        self.process: ProcessId = process_id(Host(), popen.pid)
        start = address & -PAGE_BYTES
        self.spans = Spans(np.array([start], np.uint64), np.array([start + size_bytes], np.uint64))

    def under(self, tracker: Tracker, interval_s: float, scans: int) -> Loss:
        """Work under `scans` scans, one each `interval_s`."""
        tracker.watch(frozenset({self.process}))
        self._scan(tracker)
        self._begin(interval_s * (scans + 1))
        waiting, times, due_s = threading.Event(), [], time.monotonic()
        for _ in range(scans):
            due_s += interval_s
            waiting.wait(due_s - time.monotonic())
            times.append(self._scan(tracker))
        ends_s, costs_s = self._end()
        return Loss(interval_s, float(np.median([excess_s(ends_s, costs_s, *each) for each in times])))

    def beside(self, tracker: Callable[[], Tracker], turns: int, turn_s: float) -> float:
        """CPU time per unit of work while `tracker` watches and scans once a turn, against turns without it."""
        with_s, without_s = [], []
        for _ in range(turns):
            self._begin(turn_s)
            without_s.append(self._end()[1])
            watching = tracker()
            try:
                watching.watch(frozenset({self.process}))
                self._begin(turn_s)
                with_s.append(self._end()[1])
                self._scan(watching)
            finally:
                watching.close()
        return float(np.median(np.concatenate(with_s)) / np.median(np.concatenate(without_s)))

    def _begin(self, duration_s: float) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write(f"{duration_s}\n")
        self._popen.stdin.flush()

    def _end(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """When each unit of work ended, and the CPU time that it took."""
        assert self._popen.stdout is not None
        units = np.array(json.loads(self._popen.stdout.readline()))
        return units[:, 0], units[:, 1]

    def _scan(self, tracker: Tracker) -> tuple[float, float]:
        began_s = time.monotonic()
        for _ in tracker.scan(self.process, self.spans):
            pass
        return began_s, time.monotonic()


def excess_s(ends_s: NDArray[np.float64], costs_s: NDArray[np.float64], began_s: float, ended_s: float) -> float:
    """What the units of work (ending at `ends_s`) from the scan on took longer than those around it."""
    during = (ends_s >= began_s) & (ends_s < ended_s + AFTER_S)
    around = ~during & (ends_s >= began_s - AROUND_S) & (ends_s < ended_s + AFTER_S + AROUND_S)
    return float((costs_s[during] - np.median(costs_s[around])).sum())


@contextmanager
def workload(size_bytes: int) -> Iterator[Workload]:
    """The process; it waits between its turns."""
    command = [sys.executable, "-c", _WORK, str(size_bytes), str(TOUCHES_PER_PAGE)]
    popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert popen.stdin is not None
    assert popen.stdout is not None
    try:
        yield Workload(popen, int(popen.stdout.readline()), size_bytes)
    finally:
        popen.stdin.close()
        popen.kill()
        popen.wait()
        popen.stdout.close()
