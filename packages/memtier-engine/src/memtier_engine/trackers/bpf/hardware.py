"""Source `hardware`: samples of memory accesses with their data addresses, from the CPU's own event unit.

Intel PEBS (events mem-loads and mem-stores of the PMU `cpu`, or `cpu_core` on hybrids) and AMD IBS (PMU `ibs_op`).
Nothing is cleared and no page table is read: the cost depends on the sampling period only, not on the memory's size.
It finds what is hot and how hot; that a page was not sampled does not prove that nobody touched it.
"""

from __future__ import annotations

import errno
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from loguru import logger
from numpy.typing import NDArray

from memtier_engine.closing import Closing
from memtier_engine.errors import KernelCallError, MemtierError, TrackerUnavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap, present, swapped
from memtier_engine.model import CHUNK_PAGES, PAGE_SHIFT, U64, PageChunk, ProcessId, Spans
from memtier_engine.trackers.bpf import attach
from memtier_engine.trackers.bpf.loaders import Loaded, load
from memtier_engine.trackers.bpf.rights import explained
from memtier_engine.trackers.common import FirstSight, cut, mark_new, spans_of
from memtier_engine.trackers.words import page_numbers, read_words, tags_of

PMUS = "sys/bus/event_source/devices"
DEFAULT_PERIOD = 10007
"""Accesses (AMD: operations) per sample; a prime, so that it does not fall into step with loops."""
LOAD_LATENCY_CYCLES = 3
"""PEBS samples loads that take at least this long; 3 is the least it knows: all."""
_SIZES = {"watched": 1 << 15, "touches": 1 << 17}
_LOST = struct.Struct("=QQ")  # faults, touches
_NONE = np.zeros(0, np.uint64)


@dataclass(frozen=True, slots=True)
class Event:
    """A performance event that carries data addresses."""

    name: str
    kind: int
    config: int
    config1: int = 0
    precise: int = 0
    user_only: bool = True


def memory_events(host: Host) -> list[Event]:
    """The events of this CPU that sample data addresses.

    Raises:
        TrackerUnavailable: it has none, or does not show them to this machine.
    """
    pmus = host.path(PMUS)
    for name in ("cpu", "cpu_core"):
        events = [event for event in ("mem-loads", "mem-stores") if (pmus / name / "events" / event).exists()]
        if events:
            return [_pebs(host, name, event) for event in events]
    if (pmus / "ibs_op" / "type").exists():
        # Before Linux 6.13 the kernel refuses to leave kernel mode out; kernel addresses are dropped by the program.
        return [Event("ibs_op", host.read_int(pmus / "ibs_op" / "type"), 0, user_only=False)]
    raise TrackerUnavailable(
        f"no memory sampling: neither PEBS (cpu/events/mem-loads) nor IBS (ibs_op) in /{PMUS}",
        hint="run on bare metal, or on a virtual machine that is given the CPU's performance counters",
    )


def _pebs(host: Host, pmu: str, event: str) -> Event:
    folder = host.path(PMUS, pmu)
    values = {"config": 0, "config1": 0}
    for term in host.read_text(folder / "events" / event).strip().split(","):
        key, _, text = term.partition("=")
        value = int(text, 0) if text else 1
        if key == "ldlat":
            value = LOAD_LATENCY_CYCLES
        _put(values, host.read_text(folder / "format" / key), value)
    return Event(f"{pmu}/{event}", host.read_int(folder / "type"), values["config"], values["config1"], precise=2)


def _put(values: dict[str, int], layout: str, value: int) -> None:
    """Set the bits that a PMU's format file names, as in `config:0-7,32-35`: lowest bits of `value` first."""
    register, _, ranges = layout.strip().partition(":")
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        width = int(last or first) - int(first) + 1
        values[register] = values.get(register, 0) | (value & ((1 << width) - 1)) << int(first)
        value >>= width


class AccessSampler(Closing):
    """Sampled accesses of chosen processes per page, counted in the kernel; gone with `close`."""

    def __init__(
        self, host: Host, *, events: list[Event] | None = None, period: int = DEFAULT_PERIOD, loader: str = "auto"
    ) -> None:
        """Load and attach on every CPU.

        Args:
            events: None: those of this CPU.
        Raises:
            TrackerUnavailable: this CPU, or these rights, do not offer it.
        """
        self._fds: list[int] = []
        self._watched: frozenset[ProcessId] = frozenset()
        self._loaded: Loaded | None = None
        self._lost_area: mmap.mmap | None = None
        self.period = period
        attach.need_initial_pid_namespace(host)
        try:
            self.events = memory_events(host) if events is None else events
            self._loaded = load(host, ("on_sample",), loader, _SIZES)
            cpus = attach.online_cpus(host)
            self._lost_area = mmap.mmap(self._loaded.map_fd("lost"), mmap.PAGESIZE, mmap.MAP_SHARED)
            self._attach_all(cpus)
        except MemtierError as failure:
            self.close()
            raise explained(host, failure) from None

    def _attach_all(self, cpus: list[int]) -> None:
        refused: KernelCallError | None = None
        for event in self.events:
            try:
                self._fds += self._attached(event, cpus)
            except KernelCallError as failure:
                # Some CPUs sample loads only together with an auxiliary event: ENODATA. Stores are there then.
                if failure.errno != errno.ENODATA:
                    raise
                refused = failure
        if refused is not None and not self._fds:
            raise refused

    def _attached(self, event: Event, cpus: list[int]) -> list[int]:
        assert self._loaded is not None
        try:
            return attach.attach_perf_event(
                self._loaded.program_fd("on_sample"),
                event.kind,
                event.config,
                cpus,
                period=self.period,
                config1=event.config1,
                precise=event.precise,
                user_only=event.user_only,
            )
        except KernelCallError as failure:
            raise type(failure)(f"event {event.name}: {failure.message}", failure.errno) from None

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """The whole set to sample from now on."""
        assert self._loaded is not None
        self._watched = attach.follow(self._loaded.map_fd("watched"), self._watched, processes)

    def read(self) -> dict[ProcessId, tuple[U64, U64]]:
        """By process: page addresses uint64[n], ascending, and how often each was sampled since the last reading."""
        assert self._loaded is not None
        keys, counts = attach.take_all(self._loaded.map_fd("touches"), 2, 1)
        return {
            process: (keys[rows, 0] << np.uint64(PAGE_SHIFT), counts[rows, 0])
            for process, rows in attach.rows_by_process(keys, self._watched).items()
        }

    @property
    def lost(self) -> int:
        """Samples that found the map full (131 072 pages): read more often."""
        return 0 if self._lost_area is None else _LOST.unpack_from(self._lost_area)[1]

    def close(self) -> None:
        """Detach and unload. Safe to call twice."""
        attach.close_all(self._fds)
        if self._lost_area is not None:
            self._lost_area.close()
            self._lost_area = None
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None


class HardwareTracker:
    """Which pages are hot, and how hot, by sampling: `rates` are estimated accesses in the window."""

    name = "bpf-hardware"
    page_exact = False

    def __init__(self, host: Host, *, sampler: AccessSampler | None = None) -> None:
        """Raises TrackerUnavailable."""
        self._host = host
        self._sampler = sampler or AccessSampler(host)
        logger.warning("tracker {}: a page without samples may be in use; for heat, not for paging out", self.name)
        self._seen = FirstSight()
        self._watched: frozenset[ProcessId] = frozenset()
        self._samples: dict[ProcessId, tuple[U64, U64]] = {}
        self._buffer = np.empty(CHUNK_PAGES, np.uint64)

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`."""
        self._sampler.watch(processes)
        self._watched = processes
        self._seen.keep(processes)
        for process in self._samples.keys() - processes:
            del self._samples[process]

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`."""
        known = self._seen.known(process, spans)
        for other, (more_pages, more_counts) in self._sampler.read().items():
            pages, counts = self._samples.get(other, (_NONE, _NONE))
            self._samples[other] = np.concatenate((pages, more_pages)), np.concatenate((counts, more_counts))
        pages, counts = self._samples.get(process, (_NONE, _NONE))
        sampled = pages >> np.uint64(PAGE_SHIFT)
        with Pagemap(self._host, process.pid) as pagemap:
            for pieces in cut(spans):
                words = read_words(pagemap, pieces, self._buffer)
                resident = present(words)
                numbers = page_numbers(pieces)
                rows = np.minimum(np.searchsorted(numbers, sampled), len(numbers) - 1)
                inside = numbers[rows] == sampled
                rates: NDArray[np.float32] = np.zeros(len(resident), np.float32)
                np.add.at(rates, rows[inside], (counts[inside] * np.uint64(self._sampler.period)).astype(np.float32))
                accessed = rates > 0
                mark_new(accessed, pieces, known)
                yield PageChunk(
                    int(pieces.starts[0]),
                    accessed & resident,
                    resident,
                    rates=rates,
                    spans=spans_of(pieces),
                    swapped=swapped(words),
                    tags=tags_of(words),
                )
        self._samples.pop(process, None)
        self._seen.completed(process, spans)

    def close(self) -> None:
        """See `Tracker.close`."""
        self._sampler.close()
