"""Tracker `damon`: the kernel samples a few pages per region and adapts the regions to what it finds.

Its cost does not grow with the memory watched, and its answer is by regions, not by pages. A region counts as
touched if samples of the last aggregation found accesses, or if its accesses changed since the last scan.

Regions are of each process's addresses. Kernels without CONFIG_DAMON_VADDR can only watch physical memory: then
the whole machine's is watched, and a page is what the region over its frame is. That is coarser: neighbours in
memory are often not neighbours in a process, and a region may be in use by somebody else.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from loguru import logger
from numpy.typing import NDArray

from memtier_engine.clock import Clock, SystemClock
from memtier_engine.errors import ConfigError, KernelCallError, ProcessGone, TrackerUnavailable
from memtier_engine.hostfs.damon import DamonAttributes, DamonRegions, Kdamond, areas_of, joined
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import read_mappings, read_start_ticks
from memtier_engine.hostfs.numa import frame_nodes
from memtier_engine.hostfs.pagemap import Pagemap, pfns, present, swapped
from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, PAGE_SHIFT, PageChunk, ProcessId, Spans
from memtier_engine.trackers.common import FirstSight, cut, mark_new, spans_of
from memtier_engine.trackers.words import page_numbers, read_words, tags_of

_Value = TypeVar("_Value", bound=np.generic)


AGGREGATIONS_PER_SCAN = 5
AGGREGATION_LEAST_US, AGGREGATION_MOST_US = 100_000, 500_000
"""A reading waits for the end of an aggregation: that long the engine does nothing else."""
SAMPLES_PER_AGGREGATION = 20
"""As the kernel's documentation has it, whatever the lengths. So a count means the same at each interval."""
REGIONS_LEAST = 100
"""Of few regions, each holds memory in use and idle memory, and looks idle when the samples happen to miss the former.
On 64 MiB of which 20 are in use, ten regions had most of what is in use out again and again, and a hundred none of it
for long. They cost a hundred looks per sample, so it pays to take no more samples than the scans can use."""
REGIONS_LEAST_OF_FEW = 10
REGIONS_LEAST_PER_MOST = 0.1
"""The kernel splits regions only while there are fewer than half of the most, and it begins with up to three times the
least: with more than this, regions would never fit the memory in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DamonConfig:
    """The keys of the reference's `damon` tracker that mean something without bpftrace and perf."""

    sample_us: int | None = None
    """None: a twentieth of an aggregation."""
    aggregation_us: int | None = None
    """Samples of so long a time are counted together. None: a fifth of the time between scans, 100 to 500 ms."""
    update_us: int = 1_000_000
    regions_min: int | None = None
    """None: 100, or a tenth of `regions_max` if that is less, but 10 if there may be so many."""
    regions_max: int = 1000
    filter_bytes_max: int | None = 32 << 20
    """Accesses of larger regions say too little about each page to count as heat
    (`filteraddressrangesizemax`). None: all count."""
    kdamonds: tuple[int, ...] = ()
    """Use one of these (`kdamondslist`); empty: any that is free."""
    create: int = 1
    """How many to make if the machine has none (`nrkdamonds`)."""
    physical: bool | None = None
    """Watch physical memory. None: only where the kernel cannot watch processes."""

    def __post_init__(self) -> None:
        if self.aggregation_us is not None and self.aggregation_us <= 0:
            raise ConfigError(f"value {self.aggregation_us}", key_path="aggregationus", hint="use 1 or more")
        attributes = self.attributes(None)
        if not 0 < attributes.sample_us <= attributes.aggregation_us:
            raise ConfigError(
                f"value {attributes.sample_us}",
                key_path="samplingus",
                hint=f"from 1 to aggregationus, which is {attributes.aggregation_us}",
            )
        if attributes.update_us <= 0:
            raise ConfigError(f"value {attributes.update_us}", key_path="regionsupdateus", hint="use 1 or more")
        if attributes.regions_max < 3:
            raise ConfigError(f"value {attributes.regions_max}", key_path="maxtargetregions", hint="use 3 or more")
        if not 3 <= attributes.regions_min <= attributes.regions_max:
            raise ConfigError(
                f"value {attributes.regions_min}",
                key_path="mintargetregions",
                hint=f"from 3 to maxtargetregions, which is {attributes.regions_max}",
            )
        if self.create < 1:
            raise ConfigError(f"value {self.create}", key_path="nrkdamonds", hint="use 1 or more")

    def attributes(self, scan_interval_s: float | None) -> DamonAttributes:
        """What the kernel is told. `scan_interval_s`: time between scans; None: not known."""
        aggregation_us = self.aggregation_us
        if aggregation_us is None:
            fitting_us = int((scan_interval_s or 0.0) * 1e6 / AGGREGATIONS_PER_SCAN)
            aggregation_us = min(max(fitting_us, AGGREGATION_LEAST_US), AGGREGATION_MOST_US)
            aggregation_us = max(aggregation_us, (self.sample_us or 0) * SAMPLES_PER_AGGREGATION)
        regions_min = self.regions_min
        if regions_min is None:
            fitting = min(REGIONS_LEAST, int(self.regions_max * REGIONS_LEAST_PER_MOST))
            regions_min = min(max(fitting, REGIONS_LEAST_OF_FEW), self.regions_max)
        return DamonAttributes(
            sample_us=max(1, aggregation_us // SAMPLES_PER_AGGREGATION) if self.sample_us is None else self.sample_us,
            aggregation_us=aggregation_us,
            update_us=self.update_us,
            regions_min=regions_min,
            regions_max=self.regions_max,
        )


class DamonTracker:
    """One kdamond for all processes; reads and writes alike."""

    name = "damon"
    page_exact = False
    stale_tlb = True

    def __init__(self, host: Host, config: DamonConfig | None = None, *, clock: Clock | None = None) -> None:
        """Raises TrackerUnavailable without DAMON, or if all kdamonds are in use."""
        self._host = host
        self._config = config or DamonConfig()
        self._clock = clock or SystemClock()
        self._attributes = self._config.attributes(None)
        self._scan_interval_s: float | None = None
        self._kdamond = Kdamond(host, among=self._config.kdamonds, create=self._config.create)
        try:
            self.physical = self._decide_physical()
            self._kdamond.configure(self._attributes, self._operations)
        except KernelCallError as failure:
            self._kdamond.close()
            raise TrackerUnavailable(
                f"DAMON: {failure}",
                hint="a kernel with CONFIG_DAMON_VADDR=y or CONFIG_DAMON_PADDR=y, and attributes that it takes",
            ) from None
        self._watched: frozenset[ProcessId] = frozenset()
        self._snapshot: dict[int, DamonRegions] | None = None
        self._memory: DamonRegions | None = None
        self._snapshot_s = 0.0
        self._scanned_s: dict[ProcessId, float] = {}
        self._seen = FirstSight()
        self._buffer = np.empty(CHUNK_PAGES, np.uint64)

    @property
    def snapshot_s(self) -> float | None:
        """When what is known was read; None: nothing is, the next scan reads."""
        return None if self._snapshot is None and self._memory is None else self._snapshot_s

    def scans_every(self, interval_s: float) -> None:
        """See `PacedTracker`. Holds from when processes come or go; for physical memory from when it is switched on."""
        self._scan_interval_s = interval_s

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`. Also the beginning of a round: what is scanned next is read afresh."""
        if self.physical:
            self._watch_memory(processes)
        elif processes != self._watched or (processes and not self._kdamond.running()):
            self._retarget(processes)
        self._snapshot = self._memory = None

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`."""
        if process not in self._watched:
            raise ProcessGone(f"process {process.pid} exited", errno.ESRCH)
        source: _Source = _ByFrame(self._read_memory()) if self.physical else _ByAddress(self._regions(process))
        regions = source.regions
        window_s = self._snapshot_s - self._scanned_s.get(process, -np.inf)
        known = self._seen.known(process, spans)
        touched = regions.accesses > 0
        # `age` counts aggregations since the accesses changed: so short, it may have been used since the last scan.
        touched |= regions.ages * (self._attributes.aggregation_us / 1e6) < window_s
        rates = self._rates(regions)
        with Pagemap(self._host, process.pid) as pagemap:
            for pieces in cut(spans):
                words = read_words(pagemap, pieces, self._buffer)
                resident = present(words)
                accessed = source.spread(touched, pieces, words, outside=True)
                mark_new(accessed, pieces, known)
                by_page = source.spread(rates, pieces, words, outside=0.0)
                yield PageChunk(
                    int(pieces.starts[0]),
                    accessed & resident,
                    resident,
                    rates=by_page,
                    spans=spans_of(pieces),
                    swapped=swapped(words),
                    tags=tags_of(words),
                )
        self._seen.completed(process, spans)
        self._scanned_s[process] = self._snapshot_s

    def regions(self) -> dict[int, DamonRegions]:
        """The last snapshot by pid, as the kernel cut the regions; empty before the first scan of a round, and
        where physical memory is watched."""
        return self._snapshot or {}

    def close(self) -> None:
        """See `Tracker.close`."""
        self._kdamond.close()

    def _decide_physical(self) -> bool:
        if self._config.physical is not None:
            return self._config.physical
        found = self._kdamond.operations()
        physical = "vaddr" not in found and "paddr" in found
        if physical:
            logger.bind(node="damon").info(
                "damon: this kernel cannot watch processes: physical memory is watched instead"
            )
        return physical

    @property
    def _operations(self) -> str:
        return "paddr" if self.physical else "vaddr"

    def _configure(self) -> None:
        """To be followed by a command that makes the kernel read it."""
        attributes = self._config.attributes(self._scan_interval_s)
        if attributes != self._attributes:
            self._kdamond.configure(attributes, self._operations)
            self._attributes = attributes

    def _watch_memory(self, processes: frozenset[ProcessId]) -> None:
        alive = frozenset(filter(self._is_alive, processes))
        if not alive:
            self._kdamond.stop()
        elif not self._kdamond.running():
            self._configure()
            self._kdamond.watch_memory(_memory(self._host))
        self._keep(alive)

    def _keep(self, alive: frozenset[ProcessId]) -> None:
        self._watched = alive
        self._seen.keep(alive)
        for process in self._scanned_s.keys() - alive:
            del self._scanned_s[process]

    def _retarget(self, processes: frozenset[ProcessId]) -> None:
        known = {pid: areas_of(regions) for pid, regions in (self._snapshot or {}).items()}
        alive = processes
        self._configure()
        if self._kdamond.running():
            known |= {process.pid: self._mapped(process) for process in alive if process.pid not in known}
        for _ in range(3):  # one that exits meanwhile makes the kernel refuse all of them
            alive = frozenset(filter(self._is_alive, alive))
            try:
                self._kdamond.watch(sorted(process.pid for process in alive), known)
                break
            except KernelCallError as failure:
                logger.debug("damon: {}", failure)
        else:
            self._kdamond.stop()
            alive = frozenset()
        self._keep(alive)

    def _mapped(self, process: ProcessId) -> Spans:
        try:
            return joined(read_mappings(self._host, process.pid).tierable())
        except KernelCallError:
            return Spans.empty()

    def _is_alive(self, process: ProcessId) -> bool:
        try:
            return read_start_ticks(self._host, process.pid) == process.start_ticks
        except KernelCallError:
            return False

    def _regions(self, process: ProcessId) -> DamonRegions:
        if self._snapshot is None:
            try:
                self._snapshot = self._kdamond.read()
            except KernelCallError:
                # It ends by itself when the last process is gone.
                if self._kdamond.running():
                    raise
                raise ProcessGone(f"process {process.pid} exited", errno.ESRCH) from None
            self._snapshot_s = self._clock.now_s()
        return self._snapshot[process.pid]

    def _read_memory(self) -> DamonRegions:
        if self._memory is None:
            self._memory = self._kdamond.read_memory()
            self._snapshot_s = self._clock.now_s()
        return self._memory

    def _rates(self, regions: DamonRegions) -> NDArray[np.float32]:
        sizes = (regions.ends - regions.starts).astype(np.float64)
        rates = regions.accesses / np.maximum(1.0, sizes / PAGE_BYTES)
        if self._config.filter_bytes_max is not None:
            rates[sizes > self._config.filter_bytes_max] = 0.0
        return rates.astype(np.float32)


def _memory(host: Host) -> Spans:
    """All physical memory as addresses: one span per node, holes included."""
    frames = frame_nodes(host)
    shift = np.uint64(PAGE_SHIFT)
    return Spans(frames.first_pfns << shift, frames.end_pfns << shift)


class _ByAddress:
    """Regions of one process's addresses."""

    def __init__(self, regions: DamonRegions) -> None:
        self.regions = regions

    def spread(
        self, values: NDArray[_Value], pieces: Spans, words: NDArray[np.uint64], *, outside: bool | float
    ) -> NDArray[_Value]:
        """The value of the region over each page of `pieces`; `outside` where there is none."""
        if len(pieces) == 1:
            return spread(self.regions, values, int(pieces.starts[0]), int(pieces.ends[0]), outside=outside)
        addresses = page_numbers(pieces) << np.uint64(PAGE_SHIFT)
        return _spread_to(self.regions, values, addresses, outside=outside)


class _ByFrame:
    """Regions of physical memory."""

    def __init__(self, regions: DamonRegions) -> None:
        self.regions = regions

    def spread(
        self, values: NDArray[_Value], pieces: Spans, words: NDArray[np.uint64], *, outside: bool | float
    ) -> NDArray[_Value]:
        """The value of the region over the frame of each pagemap word; `outside` where there is no frame."""
        return spread_by_frame(self.regions, values, words, outside=outside)


_Source = _ByAddress | _ByFrame


def spread_by_frame(
    regions: DamonRegions, values: NDArray[_Value], words: NDArray[np.uint64], *, outside: bool | float
) -> NDArray[_Value]:
    """The value of the region of physical addresses that holds the frame of each pagemap word.

    Args:
        regions: of physical addresses.
        values: [regions].
        words: uint64[n] of pagemap.
        outside: for pages that have no frame, and for frames in no region.
    """
    if not len(regions):
        return np.full(len(words), outside, values.dtype)
    found = _spread_to(regions, values, pfns(words) << np.uint64(PAGE_SHIFT), outside=outside)
    return np.where(present(words), found, np.asarray(outside, values.dtype))


def _spread_to(
    regions: DamonRegions, values: NDArray[_Value], addresses: NDArray[np.uint64], *, outside: bool | float
) -> NDArray[_Value]:
    """The value of the region that holds each of uint64[n] addresses; `outside` where there is none."""
    if not len(regions):
        return np.full(len(addresses), outside, values.dtype)
    at = np.maximum(np.searchsorted(regions.starts, addresses, side="right") - 1, 0)
    found = (addresses >= regions.starts[at]) & (addresses < regions.ends[at])
    return np.where(found, values[at], np.asarray(outside, values.dtype))


def spread(
    regions: DamonRegions, values: NDArray[_Value], start: int, end: int, *, outside: bool | float
) -> NDArray[_Value]:
    """The value of the region over each page of [start, end); `outside` where there is none."""
    pages = np.full(end - start >> PAGE_SHIFT, outside, values.dtype)
    first = int(np.searchsorted(regions.ends, np.uint64(start), side="right"))
    last = int(np.searchsorted(regions.starts, np.uint64(end), side="left"))
    if first >= last:
        return pages
    lows = np.maximum(regions.starts[first:last].astype(np.int64) - start, 0) >> PAGE_SHIFT
    highs = np.minimum(regions.ends[first:last].astype(np.int64), end) - start >> PAGE_SHIFT
    lengths = np.maximum(highs - lows, 0)
    before = np.cumsum(lengths) - lengths
    index = np.arange(int(lengths.sum())) - np.repeat(before, lengths) + np.repeat(lows, lengths)
    pages[index] = np.repeat(values[first:last], lengths)
    return pages
