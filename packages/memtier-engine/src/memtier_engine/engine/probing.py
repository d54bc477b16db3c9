"""A few pages first, the rest after a scan: for trackers to which a busy process can look idle.

A CPU sets the accessed bit of a page when it loads the page's entry into its TLB. Where clearing the bit does not flush
the TLBs, a page that stays in one is used and shows no access: some MiB of small pages, GiBs of huge ones, of a process
that has its CPU for itself. Paging out even one page flushes the TLBs of all CPUs that the process runs on, so the scan
after that sees what was hidden before.

Source: arch/x86/include/asm/pgtable.h, ptep_clear_flush_young() in arch/x86/mm/pgtable.c (does not flush);
mm/rmap.c, try_to_unmap_flush(); arch/x86/mm/tlb.c, arch_tlbbatch_flush().
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveOutcome, MoveTask, ProcessId
from memtier_engine.mover.mover import take

PROBE_BYTES = 64 * PAGE_BYTES
"""More than the 31 pages a CPU may hold back in a batch for the LRU lists, which cannot be paged out."""
GROWTH = 8
"""Where nothing of a probe went out, the next one is larger by this."""
PROBE_BYTES_MAX = 1 << 50
"""More than any process has: where nothing can go out for long (no swap), probes stop growing."""


class Probing:
    """One per engine: which processes were scanned since memory of theirs went out."""

    def __init__(self, tracker: object) -> None:
        """`tracker`: its `stale_tlb` says whether probes are needed."""
        self.needed = bool(getattr(tracker, "stale_tlb", False))
        self._probed: set[ProcessId] = set()
        """Something went out since the last scan."""
        self._sure: set[ProcessId] = set()
        """Scanned after something went out, and that after the last decision."""
        self._probe_bytes: dict[ProcessId, int] = {}

    @property
    def waits(self) -> bool:
        """Whether a scan would tell more than the last one."""
        return bool(self._probed)

    def scanned(self, process: ProcessId) -> None:
        """Its pages were looked at."""
        if process in self._probed:
            self._probed.discard(process)
            self._sure.add(process)

    def moved(self, outcome: MoveOutcome) -> None:
        """What became of a task."""
        if not self.needed or outcome.to_node != SWAP_NODE or not outcome.requested_bytes:
            return
        process = outcome.process
        if outcome.moved_bytes:
            self._probed.add(process)
            self._probe_bytes.pop(process, None)
        else:
            probe_bytes = self._probe_bytes.get(process, PROBE_BYTES) * GROWTH
            self._probe_bytes[process] = min(probe_bytes, PROBE_BYTES_MAX)

    def forget(self, process: ProcessId) -> None:
        """It is gone."""
        self._probed.discard(process)
        self._sure.discard(process)
        self._probe_bytes.pop(process, None)

    def limit(self, tasks: Sequence[MoveTask]) -> list[MoveTask]:
        """A decision: the tasks, those to swap cut down to a probe where the process is not sure to be idle."""
        if not self.needed:
            return list(tasks)
        limited = list(self._limited(tasks))
        # From here on, pages hide again. What is moved now makes the next scan a sure one.
        self._sure.clear()
        return limited

    def _limited(self, tasks: Sequence[MoveTask]) -> Iterator[MoveTask]:
        begun: set[ProcessId] = set()
        for task in tasks:
            process = task.process
            if task.to_node != SWAP_NODE or process in self._sure:
                yield task
            elif process not in self._probed and process not in begun and len(task.spans):
                begun.add(process)
                first, _ = take(task.spans, self._probe_bytes.get(process, PROBE_BYTES))
                yield MoveTask(process, first, task.to_node, task.reason)
