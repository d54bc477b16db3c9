"""The records that stages hand to each other. No stage imports another: they meet here.

Addresses are bytes, uint64. Pages are base pages of `PAGE_BYTES`. Arrays are one-dimensional numpy
arrays; where several belong together they have the same length and the shape is given as [n].
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = mmap.PAGESIZE
PAGE_SHIFT = PAGE_BYTES.bit_length() - 1
SWAP_NODE = -1
"""Destination "swap out", as the reference writes it in node lists."""
NOWHERE = -2
"""In an array of nodes: never touched, or freed."""
NOT_OURS = -3
"""In an array of nodes: shared with other processes, so neither movable nor on this one's account."""

U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]
Bools = NDArray[np.bool_]


class ProcessId(NamedTuple):
    """One process, never confused with a later one of the same pid."""

    pid: int
    start_ticks: int
    """Field 22 of /proc/PID/stat: start time in clock ticks since boot."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Address spans [n], ascending, disjoint, page aligned."""

    starts: U64
    ends: U64  # exclusive

    @property
    def pages(self) -> NDArray[np.int64]:
        """int64[n]: length of each span in pages."""
        return ((self.ends - self.starts) >> np.uint64(PAGE_SHIFT)).astype(np.int64)

    @property
    def total_bytes(self) -> int:
        """Sum of the lengths."""
        return int((self.ends - self.starts).sum(dtype=np.uint64))

    def __len__(self) -> int:
        return len(self.starts)

    def same_as(self, other: Spans) -> bool:
        """Whether both are the same spans."""
        return self is other or (
            len(self.starts) == len(other.starts)
            and bool((self.starts == other.starts).all())
            and bool((self.ends == other.ends).all())
        )

    @staticmethod
    def empty() -> Spans:
        """No span."""
        return _NO_SPAN


_NO_SPAN = Spans(np.zeros(0, np.uint64), np.zeros(0, np.uint64))


@dataclass(frozen=True, slots=True)
class PageChunk:
    """What one scan saw of some pages of one process: a run of addresses, or several small mappings together."""

    start: int
    """Address of the first page."""
    accessed: Bools  # [m] touched in the window that ends with this scan
    resident: Bools  # [m] in RAM; False: swapped out or never touched
    written: Bools | None = None  # [m] None: this tracker cannot tell writes from reads
    movable: Bools | None = None  # [m] exclusively mapped; None: not known, taken as True
    rates: NDArray[np.float32] | None = None  # [m] observed accesses per page; None: 1 where `accessed`
    spans: Spans | None = None
    """Where the m pages are, in this order. None: at consecutive addresses from `start`."""
    swapped: Bools | None = None  # [m] in swap; None: this tracker cannot tell it from never touched or freed
    tags: U8 | None = None
    """uint8[m], see `frame_tags`: another value than in the scan before means that another page is there now. Means
    nothing where not resident. None: this tracker does not see frames."""

    def parts(self) -> Iterator[PageChunk]:
        """The same as chunks of consecutive addresses, which share this one's arrays."""
        if self.spans is None:
            yield self
            return
        first = 0
        for start, pages in zip(self.spans.starts.tolist(), self.spans.pages.tolist(), strict=True):
            rows = slice(first, first + pages)
            yield PageChunk(
                start,
                self.accessed[rows],
                self.resident[rows],
                None if self.written is None else self.written[rows],
                None if self.movable is None else self.movable[rows],
                None if self.rates is None else self.rates[rows],
                None,
                None if self.swapped is None else self.swapped[rows],
                None if self.tags is None else self.tags[rows],
            )
            first += pages


TAG_FACTOR = np.uint64(0x9E37_79B9_7F4A_7C15)
"""2**64 by the golden ratio: neighbouring frames get tags far apart (Fibonacci hashing)."""


def frame_tags(frames: U64) -> U8:
    """uint8[n]: a byte of each frame number by which another frame is told from it in 255 of 256 cases.

    An age belongs to a page, not to an address: memory that was unmapped and mapped anew, or moved there by mremap(2),
    has other frames. So has a page that the kernel migrated or swapped in; that one merely counts as touched.
    """
    products = frames * TAG_FACTOR
    products >>= np.uint64(56)
    tags: U8 = products.astype(np.uint8)
    return tags


class Tracker(Protocol):
    """Observes which pages of some processes are touched. It has never heard of policies."""

    name: str
    page_exact: bool
    """False: `accessed` says "this mapping", not "this page"."""
    # May have `own_accesses_only = True`: of a process that does not run, it never reports an access.
    # May have `clears_accessed_bits = False`: it may look on beside another observer of the same process.
    # May have `takes_soft_dirty = True`: it clears bits that may be somebody else's, so dry runs do without it.
    # May have `stale_tlb = True`: it does not flush TLBs, so pages that stay in one can look idle. See `probing`.

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """The whole set to observe from now on; call again when it changes."""

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """Report the window since the last scan of `spans` and begin the next one.

        Chunks come in address order, cover `spans` and hold at most `CHUNK_PAGES` pages each, which are
        consecutive among the pages of `spans`; a chunk without `spans` of its own lies in one span. A span
        scanned for the first time has `accessed` all True where resident: nothing is known.

        Raises:
            ProcessGone: it exited; chunks already yielded stay valid.
        """

    def close(self) -> None:
        """Give everything back. Safe to call twice."""


@runtime_checkable
class LookingTracker(Protocol):
    """A `Tracker` that can say between two scans what was touched since the last one."""

    def look(self, process: ProcessId, spans: Spans) -> Bools | None:
        """bool[pages of `spans`]: touched since the last scan, as far as it can tell. Clears nothing.

        `spans` lie within those of the last scan, in any number. None: it cannot tell now.

        Raises:
            ProcessGone: it exited.
        """


@runtime_checkable
class PacedTracker(Protocol):
    """A `Tracker` that works between scans too, and as hard as their interval makes sensible."""

    def scans_every(self, interval_s: float) -> None:
        """Time between scans from now on."""


@runtime_checkable
class TogetherTracker(Protocol):
    """A `Tracker` of which those of a node's engines look at the same time: one reading serves all."""

    def look_together(self, node: MutableMapping[str, Any], interval_s: float) -> None:
        """Do so from now on, every `interval_s`; before the first scan.

        `node`: what trackers of the same kind have together, by their names.
        """


CHUNK_PAGES = 1 << 16
"""256 MiB of 4 KiB pages: bounds the transient memory of a scan."""


@dataclass(frozen=True, slots=True)
class MoveTask:
    """Spans of one process to be moved to `to_node` (`SWAP_NODE`: paged out)."""

    process: ProcessId
    spans: Spans
    to_node: int = SWAP_NODE
    reason: str = ""
    most_bytes: int | None = None
    """Enough when so much of it was moved, whatever stayed. None: all of it."""


@dataclass(frozen=True, slots=True)
class MoveOutcome:
    """What became of (a part of) a task."""

    process: ProcessId
    spans: Spans  # asked for
    to_node: int
    requested_bytes: int
    moved_bytes: int
    """What the kernel really moved, measured after the call."""
    seconds: float
    stuck: Spans = field(default_factory=Spans.empty)
    """Asked for, still where it was."""
    error: str | None = None
    page_errors: Mapping[int, int] = field(default_factory=dict)
    """Pages that the kernel refused to move, by errno of their status."""
    later: Spans = field(default_factory=Spans.empty)
    """The part of `stuck` that was kept for a reason that passes: a busy page, a full node."""
    there_bytes: int = 0
    """Was on `to_node` before: nothing was moved for it."""
    kept: tuple[Kept, ...] = ()
    """What was not moved, by reason, the reasons of `stuck` among them. `spans` without it is what went."""
    freed_bytes: int | None = None
    """By which RAM use fell, as far as that can be measured, less what is still in the swap cache. None: not known."""
    stored_bytes: int | None = None
    """What the moved pages take where they are now in RAM (zram, zswap). None: not known."""


class Why(IntEnum):
    """Why a page that was asked for was not moved."""

    TOUCHED = 1
    """Used since the decision: it is not idle any more."""
    LOCKED = 2
    """mlock(2), or memory that the kernel never takes."""
    SHARED = 3
    """Mapped by other processes too."""
    FILE = 4
    """A page of a file: dropping it frees nothing that others could not want."""
    ABSENT = 5
    """Not in RAM any more: freed, or out already."""
    BUSY = 6
    """The kernel kept it, for a reason it does not tell: pinned, in a CPU's batch, under writeback."""
    HUGE = 7
    """Part of a huge page of which the rest was not asked for: it would have to be split."""
    HEADLESS = 8
    """Its process lives, but not the first thread of it, by which the kernel would go."""
    NO_ROOM = 9
    """No swap is on, or all of it is full."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Pages that were asked for and not moved, for one reason."""

    why: Why
    spans: Spans
