"""A few pages first, the rest after a scan: for trackers to which a busy process can look idle.

A CPU sets the accessed bit of a page when it loads the page's entry into its TLB. Where clearing the bit does not flush
the TLBs, a page that stays in one is used and shows no access: some MiB of small pages, GiBs of huge ones, of a process
that has its CPU for itself. Paging out even one page flushes the TLBs of all CPUs that the process runs on, so the scan
after that sees what was hidden before.

Source: arch/x86/include/asm/pgtable.h, ptep_clear_flush_young() in arch/x86/mm/pgtable.c (does not flush);
mm/rmap.c, try_to_unmap_flush(); arch/x86/mm/tlb.c, arch_tlbbatch_flush().
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveOutcome, MoveTask, ProcessId
from memtier_engine.pages.space import Probe

PROBE_BYTES = 64 * PAGE_BYTES
"""More than the 31 pages a CPU may hold back in a batch for the LRU lists, which cannot be paged out."""
GROWTH = 8
"""Where nothing of a probe went out, the next one is larger by this."""
PROBE_BYTES_MAX = 1 << 50
"""More than any process has: where nothing can go out for long (no swap), probes stop growing."""


class Probing:
    """One per engine: what is known of each address space stands in its `Probe`."""

    def __init__(
        self, tracker: object, probe_of: Callable[[ProcessId], Probe | None], probes: Callable[[], Iterable[Probe]]
    ) -> None:
        """Set up.

        Args:
            tracker: its `stale_tlb` says whether probes are needed.
            probe_of: the probe of a process's address space; None: it is not ours any more.
            probes: those of all address spaces.
        """
        self.needed = bool(getattr(tracker, "stale_tlb", False))
        self._probe_of = probe_of
        self._probes = probes

    def scanned(self, probe: Probe) -> None:
        """Its pages were looked at."""
        if probe.waits:
            probe.waits, probe.sure = False, True

    def moved(self, outcome: MoveOutcome) -> None:
        """What became of a task."""
        probe = self._probe_of(outcome.process)
        if not self.needed or probe is None or outcome.to_node != SWAP_NODE or not outcome.requested_bytes:
            return
        if outcome.moved_bytes:
            probe.waits, probe.next_bytes = True, None
        else:
            probe.next_bytes = min((probe.next_bytes or PROBE_BYTES) * GROWTH, PROBE_BYTES_MAX)

    def limit(self, tasks: Sequence[MoveTask]) -> list[MoveTask]:
        """A decision: the tasks, those to swap cut down to a probe where the process is not sure to be idle."""
        if not self.needed:
            return list(tasks)
        limited = list(self._limited(tasks, {task.process: self._probe_of(task.process) or Probe() for task in tasks}))
        # From here on, pages hide again. What is moved now makes the next scan a sure one.
        for probe in self._probes():
            probe.sure = False
        return limited

    def _limited(self, tasks: Sequence[MoveTask], probes: Mapping[ProcessId, Probe]) -> Iterator[MoveTask]:
        begun: set[ProcessId] = set()
        for task in tasks:
            process, probe = task.process, probes[task.process]
            if task.to_node != SWAP_NODE or probe.sure:
                if task.to_node == SWAP_NODE:
                    probe.trial = False
                yield task
            elif not probe.waits and process not in begun and len(task.spans):
                begun.add(process)
                probe.trial = True
                # Not its first pages: those may be locked, or shared, and then nothing would be known for long.
                yield replace(task, most_bytes=probe.next_bytes or PROBE_BYTES)
