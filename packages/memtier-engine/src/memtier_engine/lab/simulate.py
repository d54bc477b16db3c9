"""A recorded trace and a policy in, what the policy would have saved and cost out. No root, no moves, no sleep.

What the simulation knows is what the trace says: which pages were touched between two scans, not how often nor
when. A page that the policy has paged out and that the trace touches counts as one refault and is back in RAM.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from memtier_engine.lab.trace import TraceScan
from memtier_engine.model import (
    CHUNK_PAGES,
    NOWHERE,
    PAGE_BYTES,
    SWAP_NODE,
    MoveTask,
    PageChunk,
    ProcessId,
    Spans,
)
from memtier_engine.mover.bucket import MIB
from memtier_engine.pages.ages import NOT_RESIDENT, PAGED_OUT, AgeClock, ProcessPages
from memtier_engine.policies.base import Policy

HOME_NODE = 0
"""Where pages are that nobody has moved."""
NODE_MAX = 250
_SWAPPED, _ABSENT = PAGED_OUT, NOT_RESIDENT  # in the table of places, beside node numbers


@dataclass(frozen=True, slots=True)
class SimulatedRound:
    """The state after the scan and the decision at one time."""

    time_s: float
    memory_bytes: int
    """What the processes had in RAM when the trace was recorded."""
    paged_out_bytes: int
    moved_away_bytes: int
    """On nodes other than `HOME_NODE`."""
    refault_bytes: int
    """Paged out before, and touched since the round before."""
    moved_bytes: int
    """What the decision of this round moved, to swap and nodes."""


@dataclass(slots=True)
class SimulationReport:
    """What a policy would have done."""

    policy: str
    rounds: list[SimulatedRound] = field(default_factory=list)

    @property
    def saved_bytes(self) -> float:
        """Paged out memory, averaged over time."""
        return self._average([each.paged_out_bytes for each in self.rounds])

    @property
    def saved_share(self) -> float:
        """The same as a share of all memory; 0 without any."""
        memory = self._average([each.memory_bytes for each in self.rounds])
        return self.saved_bytes / memory if memory else 0.0

    @property
    def refault_bytes(self) -> int:
        """Paged out and wanted back, in sum."""
        return sum(each.refault_bytes for each in self.rounds)

    @property
    def moved_bytes(self) -> int:
        """Moved to swap and nodes, in sum."""
        return sum(each.moved_bytes for each in self.rounds)

    @property
    def duration_s(self) -> float:
        """From the first round to the last."""
        return self.rounds[-1].time_s - self.rounds[0].time_s if self.rounds else 0.0

    def text(self) -> str:
        """One line for people."""
        return (
            f"{self.policy}: saved {self.saved_bytes / MIB:.1f} MiB ({100 * self.saved_share:.1f} %) on average, "
            f"refaults {self.refault_bytes / MIB:.1f} MiB, moved {self.moved_bytes / MIB:.1f} MiB "
            f"in {self.duration_s:.0f} s"
        )

    def _average(self, values: list[int]) -> float:
        # What holds after a round holds until the next one.
        if self.duration_s <= 0:
            return float(values[-1]) if values else 0.0
        lengths = np.diff([each.time_s for each in self.rounds])
        return float(np.dot(lengths, values[:-1]) / self.duration_s)


class Simulation:
    """Plays the kernel and the mover for one policy. Make a new one for each run.

    It is a `Locator`: policies that want to know where pages are get it as such.
    """

    def __init__(self, *, bandwidth_mib_per_s: float | None = None) -> None:
        """`bandwidth_mib_per_s`: the most that may be moved between two rounds, per second. None: no limit."""
        self._bandwidth = bandwidth_mib_per_s
        self._places: dict[ProcessId, ProcessPages] = {}  # its bytes are nodes here, not ages

    def nodes(self, process: ProcessId, spans: Spans) -> NDArray[np.int16]:
        """See `Locator.nodes`; `spans` are those of the last scan."""
        nodes = self._places[process].ages.astype(np.int16)
        nodes[nodes == _SWAPPED] = SWAP_NODE
        nodes[nodes == _ABSENT] = NOWHERE
        return nodes

    def run(self, scans: Iterable[TraceScan], policy: Policy) -> SimulationReport:
        """Replay all scans."""
        report = SimulationReport(policy.name)
        clock = AgeClock()
        pages: dict[ProcessId, ProcessPages] = {}
        decided_s: float | None = None
        before_s: float | None = None
        for time_s, group in groupby(scans, key=lambda scan: scan.time_s):
            clock.begin_scan(time_s)
            table = clock.step_table()
            memory = refaults = 0
            seen = set()
            for scan in group:
                seen.add(scan.process)
                memory += int(np.count_nonzero(scan.resident))
                own = pages.get(scan.process)
                if own is None:
                    own = pages[scan.process] = ProcessPages(
                        scan.process, streaks=policy.needs_streaks, places=policy.needs_places
                    )
                refaults += self._replay(scan, own, policy, table)
            for process in pages.keys() - seen:
                del pages[process], self._places[process]
            moved = 0
            interval_s = (policy.interval_ms or 0) / 1000
            if decided_s is None or time_s - decided_s >= interval_s * 0.99:
                decided_s = time_s
                budget = self._budget(None if before_s is None else time_s - before_s, interval_s)
                for task in policy.decide(pages, clock, budget):
                    moved += self._move(task, pages[task.process])
            before_s = time_s
            report.rounds.append(self._round(time_s, memory, refaults, moved))
        return report

    def _budget(self, since_s: float | None, interval_s: float) -> int | None:
        if self._bandwidth is None:
            return None
        return max(PAGE_BYTES, int(self._bandwidth * MIB * max(since_s or 0.0, interval_s)))

    def _replay(self, scan: TraceScan, own: ProcessPages, policy: Policy, table: NDArray[np.uint8]) -> int:
        """One scan as the policy would have seen it. Returns the pages that came back."""
        places = self._places.get(scan.process)
        if places is None:
            places = self._places[scan.process] = ProcessPages(scan.process)
        own.set_spans(scan.spans)
        places.set_spans(scan.spans)
        where = places.ages
        back = (where == _SWAPPED) & scan.accessed
        where[back | ((where == _ABSENT) & scan.resident)] = HOME_NODE
        where[~scan.resident] = _ABSENT
        policy.begin(scan.process, scan.spans)
        for first, last, start in _chunks(scan.spans):
            chunk = PageChunk(
                start,
                scan.accessed[first:last],
                scan.resident[first:last] & (where[first:last] <= NODE_MAX),
                written=None if scan.written is None else scan.written[first:last],
            )
            own.update(chunk, table)
            policy.observe(scan.process, chunk)
        return int(np.count_nonzero(back))

    def _move(self, task: MoveTask, own: ProcessPages) -> int:
        """Do what the kernel would. Returns the bytes moved."""
        places = self._places[task.process]
        target = _SWAPPED if task.to_node == SWAP_NODE else task.to_node
        before = places.ages.copy()
        places.set_age(task.spans, target)
        absent = before > NODE_MAX
        places.ages[absent] = before[absent]  # what is not in RAM does not move
        moved = int(np.count_nonzero(places.ages != before))
        if task.to_node == SWAP_NODE:
            own.set_age(task.spans, PAGED_OUT, only_resident=True)
        else:
            own.set_place(task.spans, task.to_node)
        return moved * PAGE_BYTES

    def _round(self, time_s: float, memory: int, refaults: int, moved_bytes: int) -> SimulatedRound:
        counts = np.zeros(256, np.int64)
        for places in self._places.values():
            counts += np.bincount(places.ages, minlength=256)
        return SimulatedRound(
            time_s,
            memory * PAGE_BYTES,
            int(counts[_SWAPPED]) * PAGE_BYTES,
            int(counts[: NODE_MAX + 1].sum() - counts[HOME_NODE]) * PAGE_BYTES,
            refaults * PAGE_BYTES,
            moved_bytes,
        )


def _chunks(spans: Spans) -> Iterator[tuple[int, int, int]]:
    """(first page, last page + 1, address) of pieces as a tracker reports them."""
    at = 0
    for start, pages in zip(spans.starts.tolist(), spans.pages.tolist(), strict=True):
        for first in range(0, pages, CHUNK_PAGES):
            last = min(first + CHUNK_PAGES, pages)
            yield at + first, at + last, start + first * PAGE_BYTES
        at += pages


def simulate(
    scans: Iterable[TraceScan], policy: Policy, *, bandwidth_mib_per_s: float | None = None
) -> SimulationReport:
    """Replay `scans` against a policy that does not ask where pages are; for others see `Simulation`."""
    return Simulation(bandwidth_mib_per_s=bandwidth_mib_per_s).run(scans, policy)
