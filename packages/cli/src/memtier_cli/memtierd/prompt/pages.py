"""Command `pages`: select pages of a process, and look at pages and frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from memtier_cli.flags import Flag, Parsed
from memtier_cli.memtierd.prompt.asked import asked_for, memory_of
from memtier_cli.memtierd.prompt.command import Command, Console, OnHost
from memtier_cli.memtierd.prompt.errors import CommandError
from memtier_cli.memtierd.prompt.gotext import go_bool
from memtier_cli.memtierd.prompt.ranges import Selection, page_count, range_lines
from memtier_engine.abi import syscalls
from memtier_engine.abi.constants import (
    PM_FILE,
    PM_MMAP_EXCLUSIVE,
    PM_PFRAME_MASK,
    PM_PRESENT,
    PM_SOFT_DIRTY,
    PM_SWAP,
    PM_UFFD_WP,
)
from memtier_engine.distinct import distinct_counts
from memtier_engine.errors import KernelCallError
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.kpageflags import KpageFlags
from memtier_engine.hostfs.page_idle import IdleBitmap
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.model import PAGE_BYTES, U64, Bools, ProcessId, Spans
from memtier_engine.mover.edge import addresses_of, pages_as_spans
from memtier_engine.mover.mover import take
from memtier_engine.trackers.pageruns import runs_where

FLAG_NAMES = (
    *("LOCKED", "ERROR", "REFERENCED", "UPTODATE", "DIRTY", "LRU", "ACTIVE", "SLAB", "WRITEBACK", "RECLAIM", "BUDDY"),
    *("MMAP", "ANON", "SWAPCACHE", "SWAPBACKED", "COMPOUND_HEAD", "COMPOUND_TAIL", "HUGE", "UNEVICTABLE"),
    *("HWPOISON", "NOPAGE", "KSM", "THP", "OFFLINE", "ZERO_PAGE", "IDLE", "PGTABLE"),
)
"""Bits 0 to 26 of /proc/kpageflags. Source: Documentation/admin-guide/mm/pagemap.rst."""
_ATTRIBUTES = {
    "Present": (PM_PRESENT, True),
    "Exclusive": (PM_MMAP_EXCLUSIVE, True),
    "Dirty": (PM_SOFT_DIRTY, True),
    "NotDirty": (PM_SOFT_DIRTY, False),
}
_ASKED_BYTES = 1 << 30
_SHOWN_BITS = (PM_SOFT_DIRTY, PM_MMAP_EXCLUSIVE, PM_UFFD_WP, PM_FILE, PM_SWAP, PM_PRESENT)


class PagesNeeds(Console, OnHost, Protocol):
    """What `pages` needs of a prompt."""

    ranges: Selection | None
    pages: Selection | None


def _pages(prompt: PagesNeeds, flags: Parsed) -> None:
    idle, set_idle, frame = (flags.integer(name, -1) for name in ("pi", "si", "pk"))
    if idle != -1 or set_idle != -1:
        _idle_bits(prompt, idle, set_idle)
    elif frame != -1:
        _frame_flags(prompt, frame)
    elif not flags.texts and not flags.rest:
        _summary(prompt)
    else:
        _select(prompt, flags)


def _frames(number: int) -> U64:
    if not 0 <= number < 1 << 55:
        raise CommandError(f"no frame has the number {number}")
    return np.array([number], np.uint64)


def _idle_bits(prompt: PagesNeeds, shown: int, to_set: int) -> None:
    """Show the bit of one frame, set that of another; -1: of none."""
    frames = {frame: _frames(frame) for frame in (shown, to_set) if frame != -1}
    try:
        bitmap = IdleBitmap(prompt.host)
    except KernelCallError as failure:
        raise CommandError(f"failed to open idle bitmap: {failure}") from None
    with bitmap:
        if shown != -1:
            prompt.say(f"PFN {shown} idle: {go_bool(bool(bitmap.is_idle(frames[shown])[0]))}")
        if to_set != -1:
            bitmap.set_idle(frames[to_set])


def _frame_flags(prompt: PagesNeeds, frame: int) -> None:
    frames = _frames(frame)
    with KpageFlags(prompt.host) as table:
        if not table.has(frame):
            raise CommandError(f"reading flags of PFN {frame} from kpageflags failed: there is no such frame")
        word = int(table.read(frames)[0])
    prompt.say_all([f"{name:<13} {word >> bit & 1}" for bit, name in enumerate(FLAG_NAMES)])


def _summary(prompt: PagesNeeds) -> None:
    if prompt.pages is None:
        raise CommandError("no pages selelected, try pages -pid PID")  # scripts look for it as it is spelt
    pid = prompt.pages.process.pid
    counts = node_counts(prompt.pages)
    prompt.say_all([f"pages of pid {pid}", *(f"node {node}: {pages}" for node, pages in sorted(counts.items()))])


def node_counts(pages: Selection) -> dict[int, int]:
    """How many of the pages are on each node now; those that are on none are left out."""
    found: Counter[int] = Counter()
    for _, status in _asked(pages):
        found.update(distinct_counts(status[status >= 0]))
    return found


def _asked(pages: Selection) -> Iterator[tuple[U64, NDArray[np.int32]]]:
    """(addresses, node or -errno of each) of some pages at a time: the kernel is asked where they are now."""
    left = pages.spans
    while len(left):
        part, left = take(left, _ASKED_BYTES)
        addresses = addresses_of(part)
        yield addresses, syscalls.move_pages(pages.process.pid, addresses, None)


def _select(prompt: PagesNeeds, flags: Parsed) -> None:
    pid = flags.integer("pid", -1)
    if pid <= 0:
        raise CommandError("missing -pid=PID")
    prompt.say(f"searching for address ranges of pid {pid}")
    process, spans = memory_of(prompt.host, pid)
    prompt.say(f"found {len(spans)} address ranges")
    spans = asked_for(prompt, spans, flags.text("ranges"))
    count = flags.integer("pm", -1)
    if count != -1:
        _pagemap(prompt, process, spans, count)
        return
    prompt.ranges = Selection(process, spans)
    prompt.say(f"aranges = <{len(spans)} address ranges of pid {pid}>")
    count = flags.integer("pr", -1)
    if count >= 0:
        prompt.say_all(range_lines(Spans(spans.starts[:count], spans.ends[:count])))
        return
    pages = _matching(prompt.host, process, spans, _attributes(flags.text("attrs")))
    prompt.say(f"pages = <{page_count(pages)} pages of pid {pid}>")
    node = flags.integer("node", -1)
    if node != -1:
        found = [addresses[status == node] for addresses, status in _asked(Selection(process, pages))]
        pages = pages_as_spans(np.concatenate(found)) if found else pages
    prompt.pages = Selection(process, pages)


def _attributes(text: str) -> list[tuple[int, bool]]:
    names = [name for name in text.split(",") if name] or ["Present", "Exclusive"]
    for name in names:
        if name not in _ATTRIBUTES:
            raise CommandError(f'invalid -attrs: unknown page attribute "{name}", available: {", ".join(_ATTRIBUTES)}')
    if "Dirty" in names and "NotDirty" in names:
        raise CommandError("invalid -attrs: Dirty and NotDirty contradict each other")
    return [_ATTRIBUTES[name] for name in names]


def _matching(host: Host, process: ProcessId, spans: Spans, wanted: Sequence[tuple[int, bool]]) -> Spans:
    """The pages of `spans` that have, or have not, each of the pagemap bits."""

    def matches(words: U64) -> Bools:
        found: Bools = np.ones(len(words), np.bool_)
        for bit, value in wanted:
            found &= ((words & np.uint64(bit)) != 0) == value
        return found

    with Pagemap(host, process.pid) as pagemap:
        return runs_where(pagemap, spans, matches)


def _pagemap(prompt: PagesNeeds, process: ProcessId, spans: Spans, count: int) -> None:
    prompt.say("bits: softdirty, exclusive, uffd_wp, file, swap, present")
    left = max(0, count)
    with Pagemap(prompt.host, process.pid) as pagemap:
        for start, end in zip(spans.starts.tolist(), spans.ends.tolist(), strict=True):
            if not left:
                break
            words = pagemap.read(start, min(end, start + left * PAGE_BYTES))
            left -= len(words)
            prompt.say_all(list(map(_pagemap_line, range(start, end, PAGE_BYTES), words.tolist())))


def _pagemap_line(address: int, word: int) -> str:
    bits = "".join("1" if word & bit else "0" for bit in _SHOWN_BITS)
    return f"{address:x}: bits: {bits} pfn: {word & PM_PFRAME_MASK}"


PAGES = Command(
    "pages",
    _pages,
    (
        Flag("pid", "select pages of this process", "int", "-1"),
        Flag("attrs", f"attributes of the pages: {', '.join(_ATTRIBUTES)}; default Present,Exclusive", "string"),
        Flag("ranges", "only in these ranges: START, START-END or START+SIZE in hex, separated by commas", "string"),
        Flag("node", "only pages on this node", "int", "-1"),
        Flag("pr", "print the first N address ranges", "int", "-1"),
        Flag("pm", "print the pagemap bits of the first N pages", "int", "-1"),
        Flag("pk", "print the flags of a page frame", "int", "-1"),
        Flag("pi", "print the idle bit of a page frame", "int", "-1"),
        Flag("si", "set the idle bit of a page frame", "int", "-1"),
    ),
)
