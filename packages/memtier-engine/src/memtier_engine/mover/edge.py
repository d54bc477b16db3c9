"""Which pages of a batch go to the kernel and which stay, by what was read just before the call and just after it.

A decision is some time old when a batch's turn comes. Pages have been touched, freed, shared or locked since, and the
kernel tells of none of them: MADV_PAGEOUT passes over a shared page in silence, takes one that was touched, and drops
clean pages of files that others read. All here is a function of arrays; `backends` does the reading.

Source: fs/proc/task_mmu.c, pte_to_pagemap_entry(); mm/madvise.c, madvise_cold_or_pageout_pte_range(),
can_madv_lru_vma().
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memtier_engine.abi.constants import PM_FILE, PM_MMAP_EXCLUSIVE, PM_PRESENT, PM_SWAP
from memtier_engine.distinct import distinct
from memtier_engine.model import PAGE_BYTES, PAGE_SHIFT, U8, U64, Bools, Kept, Spans, Why

GOES = 0
"""In an array of reasons: none to stay."""
HUGE_BYTES = 2 << 20
"""One entry of a page table's second level maps so much (x86_64, and aarch64 with pages of 4 KiB)."""
_TELLING = np.uint64(PM_PRESENT | PM_MMAP_EXCLUSIVE | PM_FILE)
_OURS_ALONE = np.uint64(PM_PRESENT | PM_MMAP_EXCLUSIVE)
_SWAP_TYPE = 0x1F
_SWAP_TYPES_LEAST = 23
"""Swap areas have numbers below this. Those above are given to entries that are not in swap: under migration,
poisoned, device memory, guard pages. Source: include/linux/swap.h, MAX_SWAPFILES."""


def is_present(words: U64) -> Bools:
    """bool[n]: in RAM."""
    found: Bools = (words & np.uint64(PM_PRESENT)) != 0
    return found


def is_out(words: U64) -> Bools:
    """bool[n]: really in swap. Without CAP_SYS_ADMIN, pages under migration and guard pages read so too."""
    found: Bools = ((words & np.uint64(PM_PRESENT | PM_SWAP)) == np.uint64(PM_SWAP)) & (
        (words & np.uint64(_SWAP_TYPE)) < np.uint64(_SWAP_TYPES_LEAST)
    )
    return found


def all_go(words: U64) -> bool:
    """Whether no page has a reason to stay that its word tells of. Mostly so, and found in one pass."""
    return bool(((words & _TELLING) == _OURS_ALONE).all())


def reasons_before(words: U64, *, refused: Bools | None = None, zero: Bools | None = None) -> U8:
    """Why each page of a page-out stays, or `GOES`.

    Args:
        words: uint64[n] of pagemap, read just now.
        refused: bool[n]: in a mapping that the kernel refused to page out of.
        zero: bool[n]: the kernel's page of zeros, which stands for memory that was read and never written.
    Returns:
        uint8[n]: `Why` or `GOES`.
    """
    reasons = np.full(len(words), GOES, np.uint8)
    reasons[(words & np.uint64(PM_MMAP_EXCLUSIVE)) == 0] = Why.SHARED
    if refused is not None:
        reasons[refused] = Why.LOCKED
    reasons[(words & np.uint64(PM_FILE)) != 0] = Why.FILE
    reasons[~is_present(words)] = Why.ABSENT
    if zero is not None:
        reasons[zero] = Why.ABSENT
    return reasons


def reasons_after(asked: Bools, words: U64, refused: Bools) -> U8:
    """What kept the pages that the kernel was asked for.

    Args:
        asked: bool[n]: the call was made for the page.
        words: uint64[n] of pagemap, read after the call.
        refused: bool[n]: in a mapping that the kernel refused to page out of.
    Returns:
        uint8[n]: `Why` where it was asked for and not paged out, else `GOES`.
    """
    reasons = np.full(len(words), GOES, np.uint8)
    stays = asked & ~is_out(words)
    reasons[stays] = Why.BUSY
    reasons[stays & ((words & np.uint64(PM_MMAP_EXCLUSIVE)) == 0)] = Why.SHARED  # forked meanwhile
    reasons[stays & refused] = Why.LOCKED
    reasons[stays & ~is_present(words)] = Why.ABSENT
    return reasons


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a batch ends."""

    pages: int
    """Of those looked at, so many belong to the batch."""
    more: bool
    """Whether there are others that go."""


def cut_batch(addresses: U64, goes: Bools, limit_bytes: int, huge: Spans | None = None) -> Cut:
    """End a batch after about `limit_bytes` of pages that go, and never inside 2 MiB that go as a whole.

    A huge page that is asked for in two parts is split by the first one: from then on it costs 512 entries, and the
    half that was not idle pays for it.

    Args:
        addresses: uint64[n], ascending.
        goes: bool[n].
        limit_bytes: more than 0; exceeded by less than `HUGE_BYTES`.
        huge: where huge pages are; None: they may be anywhere.
    """
    total = np.cumsum(goes)
    if not len(total):
        return Cut(0, False)
    end = int(np.searchsorted(total, max(1, limit_bytes // PAGE_BYTES), side="left")) + 1
    if end >= len(total):
        return Cut(len(total), False)
    block = addresses[end - 1] // np.uint64(HUGE_BYTES) * np.uint64(HUGE_BYTES)
    if huge is not None and not inside(np.array([block]), huge).any():
        return Cut(end, bool(total[-1] > total[end - 1]))
    first, last = np.searchsorted(addresses, np.array([block, block + np.uint64(HUGE_BYTES)], np.uint64)).tolist()
    if last - first == HUGE_BYTES // PAGE_BYTES and goes[first:last].all():
        end = last
    return Cut(end, bool(total[-1] > total[end - 1]))


def cut_whole(start: int, end: int, limit_bytes: int, huge: Spans | None = None) -> int:
    """What `cut_batch` says of one span of which all pages go: where, as an address, the batch ends."""
    at = start + max(1, limit_bytes // PAGE_BYTES) * PAGE_BYTES
    if at >= end:
        return end
    block = (at - PAGE_BYTES) // HUGE_BYTES * HUGE_BYTES
    if block < start or block + HUGE_BYTES > end:
        return at
    if huge is not None and not inside(np.array([block], np.uint64), huge).any():
        return at
    return block + HUGE_BYTES


def partly_asked(spans: Spans) -> Spans:
    """The blocks of 2 MiB, as spans, that `spans` covers in part."""
    block = np.uint64(HUGE_BYTES)
    ends = np.concatenate((spans.starts, spans.ends))
    ends = ends[ends % block != 0]
    if not len(ends):
        return Spans.empty()
    blocks = distinct(ends // block * block)
    return Spans(blocks, blocks + block)


def inside(addresses: U64, spans: Spans) -> Bools:
    """bool[n]: which addresses lie in `spans` (ascending, disjoint)."""
    if not len(spans):
        return np.zeros(len(addresses), np.bool_)
    at = np.searchsorted(spans.starts, addresses, side="right") - 1
    found: Bools = (at >= 0) & (addresses < spans.ends[np.maximum(at, 0)])
    return found


def in_pieces(spans: Spans, piece_bytes: int, whole: Spans) -> Spans:
    """`spans`, cut at each multiple of `piece_bytes` that is not within `whole`."""
    firsts = spans.starts // np.uint64(piece_bytes)
    counts = ((spans.ends - np.uint64(1)) // np.uint64(piece_bytes) - firsts).astype(np.int64)
    before = np.cumsum(counts) - counts
    index = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(before, counts)
    borders = (np.repeat(firsts, counts) + index.astype(np.uint64) + np.uint64(1)) * np.uint64(piece_bytes)
    if len(whole):
        at = np.maximum(np.searchsorted(whole.starts, borders, side="right") - 1, 0)
        borders = borders[(borders <= whole.starts[at]) | (borders >= whole.ends[at])]
    return Spans(*cut_at(spans.starts, spans.ends, borders))


def cut_at(starts: U64, ends: U64, borders: U64) -> tuple[U64, U64]:
    """The spans, cut in two wherever one of `borders` lies inside one of them."""
    borders = distinct(borders)
    at = np.searchsorted(starts, borders, side="right") - 1
    cuts = borders[(at >= 0) & (borders > starts[np.maximum(at, 0)]) & (borders < ends[np.maximum(at, 0)])]
    return np.sort(np.concatenate((starts, cuts))), np.sort(np.concatenate((ends, cuts)))


def addresses_of(spans: Spans) -> U64:
    """uint64[pages]: the address of every page of `spans`."""
    pages = spans.pages
    before = np.cumsum(pages) - pages
    index = np.arange(int(pages.sum()), dtype=np.int64) - np.repeat(before, pages)
    addresses: U64 = np.repeat(spans.starts, pages) + (index.astype(np.uint64) << np.uint64(PAGE_SHIFT))
    return addresses


def pages_as_spans(addresses: U64) -> Spans:
    """Ascending page addresses as spans, neighbours joined."""
    if not len(addresses):
        return Spans.empty()
    apart = np.flatnonzero(np.diff(addresses) != np.uint64(PAGE_BYTES))
    firsts = np.concatenate(([0], apart + 1))
    lasts = np.concatenate((apart, [len(addresses) - 1]))
    return Spans(addresses[firsts], addresses[lasts] + np.uint64(PAGE_BYTES))


def sample(spans: Spans, pages: int) -> Spans:
    """At most so many single pages, spread evenly over `spans`."""
    ends = np.cumsum(spans.pages)
    total = int(ends[-1]) if len(ends) else 0
    chosen = distinct(np.linspace(0, max(total - 1, 0), min(pages, total)).astype(np.int64))
    row = np.searchsorted(ends, chosen, side="right")
    within = chosen - (ends[row] - spans.pages[row])
    addresses: U64 = spans.starts[row] + (within.astype(np.uint64) << np.uint64(PAGE_SHIFT))
    return Spans(addresses, addresses + np.uint64(PAGE_BYTES))


def kept_by_reason(addresses: U64, reasons: U8) -> tuple[Kept, ...]:
    """The pages that stay, by reason, in the order of `Why`."""
    found = np.flatnonzero(np.bincount(reasons, minlength=1))
    return tuple(Kept(Why(why), pages_as_spans(addresses[reasons == why])) for why in found.tolist() if why != GOES)


def without(spans: Spans, others: Spans) -> Spans:
    """The pages of `spans` that are not in `others`."""
    if not len(others) or not len(spans):
        return spans
    starts, ends = cut_at(spans.starts, spans.ends, np.concatenate((others.starts, others.ends)))
    outside = ~inside(starts, others)
    return Spans(starts[outside], ends[outside])


def joined(parts: list[Spans]) -> Spans:
    """Disjoint spans from several lists, in the order of addresses."""
    parts = [part for part in parts if len(part)]
    if len(parts) < 2:
        return parts[0] if parts else Spans.empty()
    starts = np.concatenate([part.starts for part in parts])
    order = np.argsort(starts, kind="stable")
    return Spans(starts[order], np.concatenate([part.ends for part in parts])[order])


def for_want_of_room(kept: tuple[Kept, ...]) -> tuple[Kept, ...]:
    """What the kernel kept without a word, where it is known that it had nowhere to put it."""
    return tuple(Kept(Why.NO_ROOM, each.spans) if each.why is Why.BUSY else each for each in kept)


def went(spans: Spans, kept: tuple[Kept, ...]) -> Spans:
    """What of `spans` is where it was to go: all but what was kept."""
    return without(spans, joined([each.spans for each in kept]))
