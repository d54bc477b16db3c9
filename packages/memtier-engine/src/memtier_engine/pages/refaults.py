"""Page-outs and what comes back, in; how right the decisions were, and after how long pages are wanted again.

No IO. The account is kept per address space (`SpaceLedger`); here are the sums over one engine.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memtier_engine.model import PAGE_BYTES, PageChunk, ProcessId, Spans
from memtier_engine.pages.ages import AGE_MAX, ProcessPages
from memtier_engine.pages.gaps import BINS, bin_of
from memtier_engine.pages.governor import SHARE_PERCENT, Governor
from memtier_engine.pages.spaceledger import JUDGE_S, SpaceLedger, SwapInsSeen


@dataclass(frozen=True, slots=True)
class RefaultStats:
    """How right the decisions to page out were. Bytes since the start."""

    early_bytes: int = 0
    """Came back within the time of judgement (`JUDGE_S`): wrong decisions."""
    late_bytes: int = 0
    """Came back after that."""
    kept_bytes: int = 0
    """Stayed out for longer than that: right decisions."""
    pending_bytes: int = 0
    """Out for less than that, so far right."""
    recent_precision: float | None = None
    """Share of what went out within that time that has not come back. None: nothing went out."""
    stored_bytes: int = 0
    """Memory that remembering takes."""
    swap_ins: int | None = None
    """Faults of its processes on pages in swap, counted by the kernel as they happen. None: not counted here.
    Pages that came along with such a page are in `early_bytes` and `late_bytes`, but not here."""
    swap_in_waits: int | None = None
    """Of them, those that waited for the swap device."""
    swap_in_wait_s: float | None = None
    """Time that these took in all."""

    @property
    def mean_swap_in_wait_s(self) -> float | None:
        """What a process waits, on average, for a page that is not in memory. None: not known."""
        if not self.swap_in_waits or self.swap_in_wait_s is None:
            return None
        return self.swap_in_wait_s / self.swap_in_waits

    @property
    def precision(self) -> float | None:
        """Share of right decisions since the start, those still pending among them. None: there were none."""
        total = self.early_bytes + self.kept_bytes + self.pending_bytes
        return 1 - self.early_bytes / total if total else None


class RefaultLedger:
    """The sum of one engine's `SpaceLedger`s, which it makes and forgets."""

    def __init__(
        self,
        *,
        judge_s: float = JUDGE_S,
        remember_s: float | None = None,
        gaps: bool = False,
        share_percent: float | None = SHARE_PERCENT,
    ) -> None:
        """Set up empty.

        Args:
            judge_s: what comes back within this time counts against the decision.
            remember_s: how long to know when each page went out, if longer than `judge_s`.
            gaps: also count after how long pages are touched again, for policies that ask.
            share_percent: see `Governor`; None: nothing is governed.
        """
        self.judge_s = judge_s
        self.remember_s = max(judge_s, remember_s or 0.0)
        self.share_percent = share_percent
        """Of spaces that come from now on."""
        self._gaps = np.zeros(BINS, np.int64) if gaps else None
        self._spaces: dict[ProcessId, SpaceLedger] = {}
        self._gone: list[int] = [0, 0, 0]  # early, late, kept: pages of spaces that are forgotten
        self._swap_ins: tuple[int, int, float] | None = None
        self._swap_bytes: int | None = None
        self.swap_shrank = False
        """Whether swap was taken away since the scan before: what comes back now was not asked for."""

    def __len__(self) -> int:
        """Spaces that an account is kept of."""
        return len(self._spaces)

    def space(self, process: ProcessId) -> SpaceLedger:
        """The account of one, made if need be."""
        found = self._spaces.get(process)
        if found is None:
            share = self.share_percent
            found = self._spaces[process] = SpaceLedger(
                judge_s=self.judge_s,
                remember_s=self.remember_s,
                gaps=self._gaps is not None,
                governor=None if share is None else Governor(share),
            )
        return found

    @property
    def governors(self) -> dict[ProcessId, Governor]:
        """Of the spaces that have one, by process."""
        return {process: space.governor for process, space in self._spaces.items() if space.governor is not None}

    def begin_scan(self, swap_bytes: int | None) -> None:
        """A scan begins, of a node with so much swap in all (None: not known).

        swapoff(2) takes what it has brought back off the total as it goes on (si_swapinfo() in mm/swapfile.c).
        """
        before, self._swap_bytes = self._swap_bytes, swap_bytes
        self.swap_shrank = before is not None and swap_bytes is not None and swap_bytes < before

    def paged_out(
        self,
        process: ProcessId,
        moved: Spans,
        stuck: Spans,
        idle_s: float | NDArray[np.float64],
        now_s: float,
        *,
        trial: bool = False,
        stopped: bool = False,
    ) -> None:
        """See `SpaceLedger.paged_out`."""
        self.space(process).paged_out(moved, stuck, idle_s, now_s, trial=trial, stopped=stopped)

    def remapped(self, process: ProcessId, own: ProcessPages, spans: Spans) -> None:
        """See `SpaceLedger.remapped`."""
        if process in self._spaces:
            self._spaces[process].remapped(own, spans)

    def observe(
        self, process: ProcessId, own: ProcessPages, chunk: PageChunk, idle_s: NDArray[np.float64], now_s: float
    ) -> None:
        """See `SpaceLedger.observe`."""
        self.space(process).observe(own, chunk, idle_s, now_s, unasked=self.swap_shrank)

    def settle(self, process: ProcessId, own: ProcessPages, seen: SwapInsSeen | None, now_s: float) -> bool:
        """After a scan: what came back, and what follows from it. Whether the decision turned out wrong just now.

        `own`: its pages, as of this scan; `seen`: see `SpaceLedger.settle`.
        """
        space = self._spaces.get(process)
        if space is None or not space.settle(seen) or space.governor is None:
            return False
        return space.governor.judge(int(own.histogram()[: AGE_MAX + 1].sum()), now_s)

    def returned(self, process: ProcessId) -> bool:
        """See `SpaceLedger.returned`."""
        return process in self._spaces and self._spaces[process].returned

    def swapped_in(self, count: int, waits: int, wait_s: float) -> None:
        """The kernel counted `count` faults on pages in swap, of which `waits` took `wait_s` in all."""
        before = self._swap_ins or (0, 0, 0.0)
        self._swap_ins = (before[0] + count, before[1] + waits, before[2] + wait_s)

    def forget(self, process: ProcessId) -> None:
        """The process is no longer ours: what is out of it is neither right nor wrong."""
        space = self._spaces.pop(process, None)
        if space is not None:
            gaps = space.take_gaps()  # settles what is not settled
            self._gone[0] += space.early
            self._gone[1] += space.late
            self._gone[2] += space.kept
            if self._gaps is not None:
                self._gaps += gaps

    def keep(self, processes: Collection[ProcessId]) -> None:
        """Forget all others, however they came in: also those whose last page went out after they were forgotten."""
        for process in self._spaces.keys() - set(processes):
            self.forget(process)

    def take_gaps(self) -> NDArray[np.int64]:
        """See `SpaceLedger.take_gaps`; of all together."""
        if self._gaps is None:
            return np.zeros(BINS, np.int64)
        taken, self._gaps = self._gaps, np.zeros(BINS, np.int64)
        for space in self._spaces.values():
            taken += space.take_gaps()
        return taken

    def wanted_bytes(self) -> int:
        """What came back because it was wanted, ever."""
        pages = self._gone[0] + self._gone[1] + sum(space.early + space.late for space in self._spaces.values())
        return pages * PAGE_BYTES

    def stats(self, now_s: float) -> RefaultStats:
        """The account at `now_s`."""
        early, late, kept = self._gone
        pending = moved = stored = 0
        for space in self._spaces.values():
            counts = space.counts(now_s)
            kept += counts[0]
            pending += counts[1]
            moved += counts[2]
            early += space.early
            late += space.late
            stored += space.stored_bytes
        swap_ins, waits, wait_s = self._swap_ins or (None, None, None)
        return RefaultStats(
            early_bytes=early * PAGE_BYTES,
            late_bytes=late * PAGE_BYTES,
            kept_bytes=kept * PAGE_BYTES,
            pending_bytes=pending * PAGE_BYTES,
            recent_precision=pending / moved if moved else None,
            stored_bytes=stored,
            swap_ins=swap_ins,
            swap_in_waits=waits,
            swap_in_wait_s=wait_s,
        )

    def out_pages(self, now_s: float, total: int) -> NDArray[np.int64]:
        """int64[BINS]: pages that are out, by how long they have been idle.

        `total`: all that are out; those not remembered any more count as idle for as long as is remembered.
        """
        counts = np.zeros(BINS, np.int64)
        for space in self._spaces.values():
            counts += space.out_pages(now_s)
        counts[bin_of(self.remember_s)] += max(0, total - int(counts.sum()))
        return counts
