"""What a memory-bound process loses to scans at an interval: its own CPU time per unit of work, before and after each.

On a machine that others use too, turns with scans and turns without differ by ten times what is looked for. So every
scan is compared with the units of work just around it: what they take longer while it runs, and shortly after it,
when the CPU has to find the pages again and to set their accessed bits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.model import PAGE_BYTES, ProcessId, Spans, Tracker

SIZE = 256 << 20
AFTER_S = 0.1
"""A dozen units of work: the first two touch every page again."""
AROUND_S = 0.4
_WORK = """
import json, sys, time
import numpy as np
held = np.ones(int(sys.argv[1]) // 8, np.int64)
where = np.random.default_rng(1).integers(0, len(held), 1 << 19)
print(held.ctypes.data, flush=True)
for line in sys.stdin:
    end, units, now, spent = time.monotonic() + float(line), [], 0.0, time.process_time()
    while now < end:
        held[where].sum()
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
    """Sums 2**19 random numbers of 256 MiB per unit of work, while it is told to."""

    def __init__(self, popen: subprocess.Popen[str], address: int) -> None:
        self._popen = popen
        self.process: ProcessId = process_id(Host(), popen.pid)
        start = address & -PAGE_BYTES
        self.spans = Spans(np.array([start], np.uint64), np.array([start + SIZE], np.uint64))

    def under(self, tracker: Tracker, interval_s: float, scans: int) -> Loss:
        """Work under `scans` scans, one each `interval_s`."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        tracker.watch(frozenset({self.process}))
        self._scan(tracker)
        self._popen.stdin.write(f"{interval_s * (scans + 1)}\n")
        self._popen.stdin.flush()
        waiting, times, due_s = threading.Event(), [], time.monotonic()
        for _ in range(scans):
            due_s += interval_s
            waiting.wait(due_s - time.monotonic())
            times.append(self._scan(tracker))
        units = np.array(json.loads(self._popen.stdout.readline()))
        return Loss(interval_s, float(np.median([excess_s(units[:, 0], units[:, 1], *each) for each in times])))

    def _scan(self, tracker: Tracker) -> tuple[float, float]:
        began_s = time.monotonic()
        for _ in tracker.scan(self.process, self.spans):
            pass
        return began_s, time.monotonic()


def excess_s(
    ends_s: np.typing.NDArray[np.float64], costs_s: np.typing.NDArray[np.float64], began_s: float, ended_s: float
) -> float:
    """What the units of work (ending at `ends_s`) from the scan on took longer than those around it."""
    during = (ends_s >= began_s) & (ends_s < ended_s + AFTER_S)
    around = ~during & (ends_s >= began_s - AROUND_S) & (ends_s < ended_s + AFTER_S + AROUND_S)
    return float((costs_s[during] - np.median(costs_s[around])).sum())


@contextmanager
def workload() -> Iterator[Workload]:
    """The process; it waits between its turns."""
    popen = subprocess.Popen(
        [sys.executable, "-c", _WORK, str(SIZE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert popen.stdin is not None
    assert popen.stdout is not None
    try:
        yield Workload(popen, int(popen.stdout.readline()))
    finally:
        popen.stdin.close()
        popen.kill()
        popen.wait()
        popen.stdout.close()
