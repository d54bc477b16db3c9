"""Scans in, ages out: one byte per page says how many scans ago the page was last touched. No IO.

The byte is a small floating-point number: exact up to `LINEAR_SCANS` scans, then 16 steps per doubling,
so 254 values reach days at the usual intervals. It errs in one direction only: the age it stands for is
never more than the true one, so no page is judged idle too early.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from memtier_engine.distinct import distinct
from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, PAGE_SHIFT, U8, U64, PageChunk, ProcessId, Spans

LINEAR_SCANS = 128
STEPS_PER_DOUBLING = 16
AGE_MAX = 253
PAGED_OUT = 254
"""We paged it out and it has not come back."""
NOT_RESIDENT = 255
"""Never touched, freed, or swapped out by someone else."""


def _scale() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(step[256], min_scans[256]): scans between increments at a value, and the least age it stands for."""
    step = np.ones(256, np.int64)
    least = np.zeros(256, np.int64)
    for value in range(1, AGE_MAX + 1):
        doubling = max(0, value - LINEAR_SCANS) // STEPS_PER_DOUBLING + (value >= LINEAR_SCANS)
        step[value] = 1 << doubling
        # Increments fall on multiples of the step, counted from the first scan of all: the first one
        # within a doubling may come after half a step, the others come exactly a step apart.
        waited = step[value - 1]
        if value - 1 > 0 and step[value - 2] != waited:
            waited >>= 1
        least[value] = least[value - 1] + waited
    return step, least


STEP_SCANS, MIN_SCANS = _scale()
_ON_ABSENT = np.full(256, NOT_RESIDENT, np.uint8)
_ON_ABSENT[PAGED_OUT] = PAGED_OUT


WINDOW_INTERVALS_MAX = 3
"""A window counts for at most so many intervals. Whoever was stopped between two scans (SIGSTOP, a debugger, a frozen
VM whose CLOCK_MONOTONIC was set on) saw one window of unknown use, not hours of idleness."""


class AgeClock:
    """Counts scans and remembers when they were, to turn ages into seconds."""

    def __init__(self) -> None:
        self.scans = 0
        self.now_s = -np.inf
        """Time of the last scan; -inf before the first."""
        self.counted_s = 0.0
        """Time that counts since the first scan: less than what passed where a window was too long."""
        self._times_s = np.full(int(MIN_SCANS[AGE_MAX]) + 1, -np.inf)  # of `counted_s`
        self._idle_s: NDArray[np.float64] | None = None

    def begin_scan(self, now_s: float, interval_s: float | None = None) -> None:
        """A new scan starts now.

        `interval_s`: what the time since the last scan should be; it counts for at most `WINDOW_INTERVALS_MAX` times
        as much. None: whatever it is.
        """
        passed_s = max(0.0, now_s - self.now_s) if np.isfinite(self.now_s) else 0.0
        if interval_s is not None:
            passed_s = min(passed_s, WINDOW_INTERVALS_MAX * interval_s)
        self.scans += 1
        self.now_s = now_s
        self.counted_s += passed_s
        self._idle_s = None
        self._times_s[self.scans % len(self._times_s)] = self.counted_s

    def step_table(self) -> U8:
        """uint8[256]: the age after this scan of a resident page that was not touched."""
        table = np.arange(256, dtype=np.uint8)
        grows = (self.scans % STEP_SCANS == 0) & (table < AGE_MAX)
        table[grows] += 1
        table[PAGED_OUT] = table[NOT_RESIDENT] = 0  # it came back, or is new
        return table

    def idle_s(self) -> NDArray[np.float64]:
        """float64[AGE_MAX + 1]: seconds that a page of each age has been idle for at least. Not to be changed.

        Ages from before the first scan are infinite here, but no page can have them.
        """
        if self._idle_s is not None:
            return self._idle_s
        back = MIN_SCANS[: AGE_MAX + 1]
        known = back < self.scans
        times = self._times_s[(self.scans - back) % len(self._times_s)]
        self._idle_s = np.where(known, self.counted_s - times, np.inf)
        return self._idle_s

    def least_age(self, idle_s: float) -> int | None:
        """The smallest age that means "idle for at least `idle_s`"; None if no page can be so old yet."""
        idle = self.idle_s()
        index = int(np.searchsorted(idle, idle_s, side="left"))
        return index if index <= AGE_MAX and np.isfinite(idle[index]) else None


_COUNTED_AT_ONCE = 1 << 13
"""Pages: bincount() makes a column of eight bytes each, which is to stay in the CPU's cache."""
_PIECE_SHIFT = 5
_GOLDEN = np.uint64(0x9E37_79B9_7F4A_7C15)
"""2**64 by the golden ratio: multiplied by it, neighbours are far apart (Fibonacci hashing)."""


class ProcessPages:
    """The pages of one process: where they are, how old each is, and what is known of its place."""

    def __init__(self, process: ProcessId, *, streaks: bool = False, places: bool = False) -> None:
        self.process = process
        self.spans = Spans.empty()
        self.offsets = np.zeros(1, np.int64)
        """int64[n + 1]: index of the first page of each span; the last entry is the number of pages."""
        self.ages: U8 = np.zeros(0, np.uint8)
        self.streaks: U8 | None = np.zeros(0, np.uint8) if streaks else None
        """Scans in a row in which the page was touched, at most 255; only kept for policies that ask."""
        self.places: U8 | None = np.zeros(0, np.uint8) if places else None
        """Node + 1 that we last put the page on; 0: not known. Only kept for policies that ask."""
        self.kept: U8 | None = None
        """`Why` a page could not be paged out when that was tried; 0: it may be asked for. None: of no page."""
        self._tags: U8 | None = None
        """`frame_tags` of the scan before, of a tracker that sees frames."""

    @property
    def tracked_bytes(self) -> int:
        """Address space covered."""
        return len(self.ages) * PAGE_BYTES

    def set_spans(self, spans: Spans, *, fill: int = NOT_RESIDENT) -> None:
        """Follow the process's mappings: pages keep their ages wherever their address is still mapped.

        `fill`: the age of new pages.
        """
        if spans.same_as(self.spans):
            return
        offsets = np.concatenate(([0], np.cumsum(spans.pages)))
        copies = list(_overlaps(self.spans, self.offsets, spans, offsets))

        def carried(old: U8 | None, fill: int) -> U8 | None:
            if old is None:
                return None
            new = np.full(int(offsets[-1]), fill, np.uint8)
            for source, target, length in copies:
                new[target : target + length] = old[source : source + length]
            return new

        ages = carried(self.ages, fill)
        assert ages is not None
        self.ages = ages
        self.streaks, self.places, self.kept, self._tags = (
            carried(column, 0) for column in (self.streaks, self.places, self.kept, self._tags)
        )
        self.spans, self.offsets = spans, offsets

    def index_of(self, address: int) -> int:
        """Index of the page at `address`, which must be mapped."""
        span = int(np.searchsorted(self.spans.starts, np.uint64(address), side="right")) - 1
        if span < 0 or address >= int(self.spans.ends[span]):
            raise KeyError(f"{address:#x} is in no tracked mapping of pid {self.process.pid}")
        return int(self.offsets[span]) + (address - int(self.spans.starts[span]) >> PAGE_SHIFT)

    def page_numbers(self, indices: NDArray[np.intp]) -> U64:
        """uint64[n]: address / page size of the pages at `indices`."""
        span = np.searchsorted(self.offsets, indices, side="right") - 1
        pages: U64 = (self.spans.starts[span] >> np.uint64(PAGE_SHIFT)) + (indices - self.offsets[span]).astype(
            np.uint64
        )
        return pages

    def update(self, chunk: PageChunk, step_table: U8) -> int:
        """Take over what a scan of `self.spans` saw. Returns the pages that we had paged out and that came back."""
        first = self.index_of(chunk.start)
        rows = slice(first, first + len(chunk.accessed))
        ages = self.ages[rows]
        before = ages.copy()
        quiet = ~chunk.accessed
        if chunk.movable is not None:
            quiet &= chunk.movable  # shared pages cannot be moved: never a candidate
        if chunk.tags is not None:
            self._follow_frames(rows, chunk.tags, quiet)
        absent = ~chunk.resident
        ages[:] = _looked_up(step_table, before)
        np.multiply(ages, quiet, out=ages)
        if absent.any():
            np.putmask(ages, absent, _looked_up(_ON_ABSENT, before))
            if chunk.swapped is not None:
                # What we paged out and is not in swap any more was freed: MADV_DONTNEED, munmap and mmap, exec.
                np.putmask(ages, absent & ~chunk.swapped, NOT_RESIDENT)
            if self.kept is not None:
                np.putmask(self.kept[rows], absent, 0)
        if self.streaks is not None:
            streaks = self.streaks[rows]
            np.copyto(streaks, np.where(quiet | absent, 0, np.minimum(streaks, 254) + 1))
        if self.places is not None:
            np.putmask(self.places[rows], absent, 0)
        return int(np.count_nonzero((before == PAGED_OUT) & chunk.resident))

    def _follow_frames(self, rows: slice, tags: U8, quiet: NDArray[np.bool_]) -> None:
        """A page in another frame than before is another page, or was migrated: it counts as touched."""
        if self._tags is None:
            self._tags = np.zeros(len(self.ages), np.uint8)
            known = False
        else:
            known = True
        own = self._tags[rows]
        if known:
            quiet &= own == tags
        own[:] = tags

    def keep(self, spans: Spans, why: int) -> None:
        """Remember that all pages of `spans` could not be paged out, and why: `select` leaves them out from now on."""
        if self.kept is None:
            self.kept = np.zeros(len(self.ages), np.uint8)
        for first, last in self._index_runs(spans):
            self.kept[first:last] = why

    def release(self, whys: Collection[int]) -> None:
        """Pages kept for these reasons may be asked for again."""
        if self.kept is not None:
            np.putmask(self.kept, np.isin(self.kept, list(whys)), 0)
            if not self.kept.any():
                self.kept = None

    def kept_bytes(self) -> dict[int, int]:
        """Memory that could not be paged out, by why."""
        if self.kept is None:
            return {}
        counts = np.bincount(self.kept, minlength=2)
        return {int(why): int(counts[why]) * PAGE_BYTES for why in np.flatnonzero(counts).tolist() if why}

    def rest(self, step_table: U8) -> None:
        """Take over that no page was touched since the last scan, and none came or went."""
        table = step_table.copy()
        table[PAGED_OUT], table[NOT_RESIDENT] = PAGED_OUT, NOT_RESIDENT
        for first in range(0, len(self.ages), CHUNK_PAGES):
            ages = self.ages[first : first + CHUNK_PAGES]
            ages[:] = _looked_up(table, ages)
        if self.streaks is not None:
            self.streaks[:] = 0

    def histogram(self, *, leave: Collection[int] | None = None) -> NDArray[np.int64]:
        """int64[256]: pages of each age, with `PAGED_OUT` and `NOT_RESIDENT` at their own values.

        `leave`: without pages that are kept for one of these reasons, see `keep`.
        """
        counts = np.zeros(256, np.int64)
        left = None if self.kept is None or not leave else list(leave)
        for first in range(0, len(self.ages), CHUNK_PAGES):
            ages = self.ages[first : first + CHUNK_PAGES]
            if left is not None and self.kept is not None:
                ages = ages[~np.isin(self.kept[first : first + CHUNK_PAGES], left)]
            for at in range(0, len(ages), _COUNTED_AT_ONCE):
                counts += np.bincount(ages[at : at + _COUNTED_AT_ONCE], minlength=256)
        return counts

    def region_counts(self, age_below: int, pages_in_region: int = 512) -> NDArray[np.int64]:
        """int64[r]: pages younger than `age_below` in each region, regions cut from each span's start."""
        cuts = [
            np.arange(int(self.offsets[i]), int(self.offsets[i + 1]), pages_in_region) for i in range(len(self.spans))
        ]
        if not cuts or not len(self.ages):
            return np.zeros(0, np.int64)
        young = (self.ages < age_below).view(np.uint8)
        return np.add.reduceat(young, np.concatenate(cuts), dtype=np.int64)

    def select(
        self,
        *,
        age_from: int = 0,
        age_to: int = AGE_MAX,
        streak_from: int = 0,
        not_on_node: int | None = None,
        limit_pages: int | None = None,
        share: float = 1.0,
        leave_kept: bool = False,
    ) -> Spans:
        """Runs of resident pages with `age_from <= age <= age_to`, in address order, up to `limit_pages`.

        `share`: only so much of the address space, in pieces of 128 KiB all over it. Each time the same ones, and those
        of a smaller share are among those of a larger one.
        `leave_kept`: without pages that could not be paged out, see `keep`.
        """
        starts: list[NDArray[np.uint64]] = []
        ends: list[NDArray[np.uint64]] = []
        left = limit_pages
        for first in range(0, len(self.ages), CHUNK_PAGES):
            last = min(first + CHUNK_PAGES, len(self.ages))
            ages = self.ages[first:last]
            wanted = (ages >= age_from) & (ages <= age_to)
            if streak_from and self.streaks is not None:
                wanted &= self.streaks[first:last] >= streak_from
            if not_on_node is not None and self.places is not None:
                wanted &= self.places[first:last] != not_on_node + 1
            if leave_kept and self.kept is not None:
                wanted &= self.kept[first:last] == 0
            if share < 1:
                candidates = np.flatnonzero(wanted)
                wanted[candidates[~in_share(self.page_numbers(candidates + first), share)]] = False
            if not wanted.any():
                continue
            low, high = np.searchsorted(self.offsets, (first, last), side="right").tolist()
            runs = true_runs(wanted, self.offsets[low:high] - first)
            if left is not None:
                runs = first_pages(runs, left)
                left -= int((runs[:, 1] - runs[:, 0]).sum())
            if len(runs):
                rows = runs[:, 0] + first
                span = np.searchsorted(self.offsets, rows, side="right") - 1
                start = self.spans.starts[span] + (
                    (rows - self.offsets[span]).astype(np.uint64) << np.uint64(PAGE_SHIFT)
                )
                starts.append(start)
                ends.append(start + ((runs[:, 1] - runs[:, 0]).astype(np.uint64) << np.uint64(PAGE_SHIFT)))
            if left == 0:
                break
        return _joined(starts, ends)

    def set_age(self, spans: Spans, age: int, *, only_resident: bool = False) -> None:
        """Give all pages of `spans` that are still mapped this age."""
        for first, last in self._index_runs(spans):
            ages = self.ages[first:last]
            if only_resident:
                np.putmask(ages, ages <= AGE_MAX, age)
            else:
                ages[:] = age

    def set_place(self, spans: Spans, node: int) -> None:
        """Remember that all pages of `spans` are on `node`; `NOWHERE`: it is not known where."""
        if self.places is not None:
            for first, last in self._index_runs(spans):
                self.places[first:last] = max(0, node + 1)

    def age_alike(self, spans: Spans) -> int | None:
        """The age that all pages of `spans` have; None: not all have the same, or not all are mapped."""
        found: int | None = None
        pages = 0
        for first, last in self._index_runs(spans):
            age = int(self.ages[first])
            if found not in (None, age) or (self.ages[first:last] != age).any():
                return None
            found, pages = age, pages + last - first
        return found if pages << PAGE_SHIFT == spans.total_bytes else None

    def _index_runs(self, spans: Spans) -> Iterator[tuple[int, int]]:
        if len(spans) == 1 and len(self.spans):  # mostly, and then mostly within one mapping
            start, end = int(spans.starts[0]), int(spans.ends[0])
            row = int(np.searchsorted(self.spans.starts, np.uint64(start), side="right")) - 1
            if row >= 0 and end <= int(self.spans.ends[row]):
                first = int(self.offsets[row]) + (start - int(self.spans.starts[row]) >> PAGE_SHIFT)
                yield first, first + (end - start >> PAGE_SHIFT)
                return
        own = np.concatenate(([0], np.cumsum(spans.pages)))
        for _, target, length in _overlaps(spans, own, self.spans, self.offsets):
            yield target, target + length


def _looked_up(table: U8, ages: U8) -> U8:
    """`table[ages]` of uint8[256], without the eight bytes per page that an index takes."""
    return np.frombuffer(ages.tobytes().translate(table.tobytes()), np.uint8)


def in_share(pages: U64, share: float) -> NDArray[np.bool_]:
    """bool[n]: whether the piece that each page number lies in is of the share, by a hash of its number."""
    pieces = pages >> np.uint64(_PIECE_SHIFT)
    hashed: U64 = (pieces * _GOLDEN) >> np.uint64(40)
    return hashed < np.uint64(round(share * (1 << 24)))


def true_runs(mask: NDArray[np.bool_], borders: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """int64[k, 2]: half-open index runs where `mask` is True, none over an index in `borders`."""
    padded = np.zeros(len(mask) + 2, np.int8)
    padded[1:-1] = mask
    runs = np.flatnonzero(np.diff(padded)).reshape(-1, 2)
    if borders is None or not len(borders) or not len(runs):
        return runs
    of_run = np.searchsorted(runs[:, 0], borders, side="right") - 1
    inside = (of_run >= 0) & (borders > runs[of_run, 0]) & (borders < runs[of_run, 1])
    cuts = borders[inside]
    if not len(cuts):
        return runs
    return np.column_stack((np.sort(np.concatenate((runs[:, 0], cuts))), np.sort(np.concatenate((runs[:, 1], cuts)))))


def first_pages(runs: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """The runs that make up the first `limit` pages, the last one cut."""
    lengths = runs[:, 1] - runs[:, 0]
    total = np.cumsum(lengths)
    count = int(np.searchsorted(total, limit, side="left"))
    if count == len(runs):
        return runs
    kept = runs[: count + 1].copy()
    kept[-1, 1] -= int(total[count]) - limit
    return kept[kept[:, 1] > kept[:, 0]]


def _joined(starts: list[NDArray[np.uint64]], ends: list[NDArray[np.uint64]]) -> Spans:
    if not starts:
        return Spans.empty()
    first, last = np.concatenate(starts), np.concatenate(ends)
    apart = first[1:] != last[:-1]  # runs that meet at a chunk border are one
    return Spans(first[np.concatenate(([True], apart))], last[np.concatenate((apart, [True]))])


def _overlaps(
    old: Spans, old_offsets: NDArray[np.int64], new: Spans, new_offsets: NDArray[np.int64]
) -> Iterator[tuple[int, int, int]]:
    """(old index, new index, pages) of each address run in both, unbroken sequences of runs as one."""
    if not len(old) or not len(new):
        return
    points = distinct(np.concatenate((old.starts, old.ends, new.starts, new.ends)))
    starts, ends = points[:-1], points[1:]
    in_old = np.searchsorted(old.starts, starts, side="right") - 1
    in_new = np.searchsorted(new.starts, starts, side="right") - 1
    both = (in_old >= 0) & (in_new >= 0)
    both &= (ends <= old.ends[in_old]) & (ends <= new.ends[in_new])
    starts, ends, in_old, in_new = starts[both], ends[both], in_old[both], in_new[both]
    if not len(starts):
        return
    shift = np.uint64(PAGE_SHIFT)
    length = ((ends - starts) >> shift).astype(np.int64)
    source = old_offsets[in_old] + ((starts - old.starts[in_old]) >> shift).astype(np.int64)
    target = new_offsets[in_new] + ((starts - new.starts[in_new]) >> shift).astype(np.int64)
    breaks = (source[1:] != source[:-1] + length[:-1]) | (target[1:] != target[:-1] + length[:-1])
    heads = np.flatnonzero(np.concatenate(([True], breaks)))
    sums = np.add.reduceat(length, heads)
    yield from zip(source[heads].tolist(), target[heads].tolist(), sums.tolist(), strict=True)
