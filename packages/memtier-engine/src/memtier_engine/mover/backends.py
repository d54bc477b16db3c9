"""The two system calls that move pages: what goes to the kernel, what it says, and what became of each page."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from memtier_engine.abi import syscalls
from memtier_engine.abi.constants import MADV_PAGEOUT, PAGE_IS_HUGE, PAGE_IS_PFNZERO
from memtier_engine.distinct import distinct_counts
from memtier_engine.errors import KernelCallError, ProcessGone, Unavailable
from memtier_engine.hostfs.handles import ProcessFiles
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.model import PAGE_BYTES, PAGE_SHIFT, SWAP_NODE, U8, U64, Bools, Kept, ProcessId, Spans, Why
from memtier_engine.mover import edge
from memtier_engine.mover.edge import GOES, addresses_of, pages_as_spans
from memtier_engine.mover.refusals import Refusals

IOVECS_MAX = 1024
"""UIO_MAXIOV: process_madvise refuses more with EINVAL."""
INTERRUPTED_MAX = 8
CALLS_MAX = 8
"""Of move_pages for one batch: each goes on behind what held up the one before."""
PIECE_BYTES = 64 * PAGE_BYTES
"""What the kernel isolates at once (up to a page table, 2 MiB) it puts back at once, when all of it is on its way to
the device (mm/madvise.c, reclaim_pages()). A page that is written by then is not on a list when folio_end_writeback()
wants it at the end of one, and lands at the head: reclaim takes all others of the cgroup first. On 6.12 without MGLRU
and with a fast disk, asking for 2000 such pages took 8000 of others; paged out in pieces of 256 KiB, none."""
_BUSY = (-errno.EAGAIN, -errno.EBUSY)
_MERGE_GAP_BYTES = 64 * PAGE_BYTES
"""Spans so close together are read in one call: half a KiB of words costs less than a call."""

ProcessHandle = ProcessFiles
"""Open files of one process, which can never be another's: see `hostfs.handles`."""
Look = Callable[[ProcessId, Spans], Bools | None]
"""See `model.LookingTracker.look`."""


@dataclass(slots=True)
class BatchResult:
    """What one batch did."""

    moved_bytes: int = 0
    stuck: Spans = field(default_factory=Spans.empty)
    """Asked for, still where it was."""
    busy: Spans = field(default_factory=Spans.empty)
    """The part of `stuck` that was in use by the kernel just now: worth another try soon."""
    full: bool = False
    """The node has no room: the rest of the task fares no better."""
    error: str | None = None
    page_errors: dict[int, int] = field(default_factory=dict)
    """Pages that stayed, by errno of their status; only of move_pages."""
    there_bytes: int = 0
    """Was on the node before; only of move_pages."""
    kept: tuple[Kept, ...] = ()
    """What was not moved, by reason."""
    tried_bytes: int | None = None
    """From the front, so much of what was asked for was dealt with; None: all."""
    call_s: float | None = None
    """How long the system call took that moves, which holds the target's mmap lock; None: not measured."""
    asked_bytes: int | None = None
    """What the kernel was asked for; None: all."""
    looked: bool = False
    """Whether it is known what was touched since the decision."""
    touched_share: float = 0.0
    """Of what was about to move, the part that turned out to be in use."""


def page_out(
    handle: ProcessHandle,
    spans: Spans,
    *,
    limit_bytes: int | None = None,
    refusals: Refusals | None = None,
    look: Look | None = None,
    keep_huge: bool = False,
    probe: bool = False,
    piecewise: bool = False,
) -> BatchResult:
    """MADV_PAGEOUT on those pages of `spans` that can go; what left is counted in pagemap afterwards.

    Never asked for: pages of files (they would be dropped, whoever else reads them), pages that others map too (the
    kernel leaves them), and what is not in RAM.

    Args:
        handle: of the process.
        spans: any number of them.
        limit_bytes: stop after so much that can go, or at the end of the 2 MiB there; None: no limit.
        refusals: what is known of mappings that cannot be paged out; gets to know more.
        look: asked last what was touched since the decision; such pages stay.
        keep_huge: leave huge pages alone that `spans` covers in part, instead of having them split.
        probe: not a page above the limit, but for huge pages.
        piecewise: in pieces of `PIECE_BYTES`, huge pages whole: for swap that takes its time to write.
    Raises:
        ProcessGone: it exited.
        KernelCallError: EPERM and whatever else no retry can mend.
    """
    refusals = refusals or Refusals()
    batch = _Batch.of(handle.pagemap, spans, refusals)
    if keep_huge and len(partly := edge.partly_asked(spans)):
        batch.keep_huge(runs_of(handle.pagemap, partly, PAGE_IS_HUGE))
    result = BatchResult()
    if limit_bytes is not None:
        batch.cut(limit_bytes, runs_of(handle.pagemap, spans, PAGE_IS_HUGE) if probe else None)
        result.tried_bytes = len(batch.reasons) * PAGE_BYTES
    going = batch.going
    if look is not None and len(going):
        touched = look(handle.process, going)
        if touched is not None:
            result.looked = True
            pages = np.count_nonzero(touched)
            result.touched_share = float(pages) / len(touched)
            if pages:
                batch.reasons[np.flatnonzero(batch.reasons == GOES)[touched]] = Why.TOUCHED
                going = batch.going
    done = True
    result.asked_bytes = going.total_bytes
    if len(going):
        asked = going
        if piecewise:
            asked = edge.in_pieces(going, PIECE_BYTES, runs_of(handle.pagemap, going, PAGE_IS_HUGE))
        began_s = time.monotonic()
        try:
            done = _advise(handle, asked, refusals)
        except ProcessGone:
            if handle.why_not_by_pidfd() is None:
                raise
            batch.reasons[batch.reasons == GOES] = Why.HEADLESS
            result.kept, result.stuck = batch.kept, going
            return result
        result.call_s = time.monotonic() - began_s
        result.moved_bytes = batch.went(going, read_words(handle.pagemap, going), refusals) * PAGE_BYTES
    if batch.reasons.any():
        result.kept = batch.kept
        result.stuck = batch.where((batch.reasons != GOES) & (batch.reasons != Why.ABSENT))
        if not done:
            result.busy = batch.where(batch.reasons == Why.BUSY)
    return result


class _Batch:
    """Pages, and why each stays. Their addresses are only written out where some do: mostly one run goes as a whole."""

    def __init__(self, spans: Spans, reasons: U8) -> None:
        self.spans = spans
        self.reasons = reasons
        self._of_pages: U64 | None = None

    @classmethod
    def of(cls, pagemap: Pagemap, spans: Spans, refusals: Refusals) -> _Batch:
        """By what the kernel says now."""
        words, refused = read_words(pagemap, spans), refusals.spans
        if not len(refused) and edge.all_go(words):
            return cls(spans, np.full(len(words), GOES, np.uint8))
        batch = cls(spans, np.zeros(0, np.uint8))
        batch.reasons = edge.reasons_before(words, refused=edge.inside(batch._addresses, refused))
        if (batch.reasons == Why.SHARED).any():
            # Not exclusive, as what is shared: memory that was read and never written.
            zero = runs_of(pagemap, spans, PAGE_IS_PFNZERO)
            batch.reasons[edge.inside(batch._addresses, zero)] = Why.ABSENT
        return batch

    @property
    def _addresses(self) -> U64:
        """uint64[n]: the pages."""
        if self._of_pages is None:
            self._of_pages = addresses_of(self.spans)
        return self._of_pages

    def keep_huge(self, huge: Spans) -> None:
        """Those of `huge` that would go stay."""
        if len(huge):
            self.reasons[(self.reasons == GOES) & edge.inside(self._addresses, huge)] = Why.HUGE

    def cut(self, limit_bytes: int, huge: Spans | None) -> None:
        """See `edge.cut_batch`."""
        if len(self.spans) == 1 and not self.reasons.any():
            start, end = int(self.spans.starts[0]), int(self.spans.ends[0])
            end = edge.cut_whole(start, end, limit_bytes, huge)
            self.spans, self._of_pages = Spans(self.spans.starts, np.array([end], np.uint64)), None
            self.reasons = self.reasons[: (end - start) >> PAGE_SHIFT]
            return
        pages = edge.cut_batch(self._addresses, self.reasons == GOES, limit_bytes, huge).pages
        self._of_pages, self.reasons = self._addresses[:pages], self.reasons[:pages]
        self.spans = pages_as_spans(self._of_pages)

    @property
    def going(self) -> Spans:
        """What goes."""
        if len(self.spans) == 1 and not self.reasons.any():
            return self.spans
        return self.where(self.reasons == GOES)

    def where(self, chosen: Bools) -> Spans:
        """The pages chosen, bool[n]."""
        return pages_as_spans(self._addresses[chosen])

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What stays."""
        return edge.kept_by_reason(self._addresses, self.reasons)

    def went(self, going: Spans, words: U64, refusals: Refusals) -> int:
        """`going` was asked for, and these are its words now. Returns how many of its pages are out."""
        out = int(np.count_nonzero(edge.is_out(words)))
        if out < len(words):
            refused = edge.inside(addresses_of(going), refusals.spans)
            self.reasons[self.reasons == GOES] = edge.reasons_after(np.ones(len(words), np.bool_), words, refused)
        return out


def read_words(pagemap: Pagemap, spans: Spans) -> U64:
    """uint64[pages of `spans`]: their words of pagemap, in few calls."""
    if len(spans) < 2:
        return pagemap.read(int(spans.starts[0]), int(spans.ends[0])) if len(spans) else np.zeros(0, np.uint64)
    parts = []
    for group in _groups(spans):
        start, end = int(group.starts[0]), int(group.ends[-1])
        words = pagemap.read(start, end)
        if len(group) > 1:
            words = words[(addresses_of(group) - np.uint64(start)) >> np.uint64(PAGE_SHIFT)]
        parts.append(words)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def runs_of(pagemap: Pagemap, spans: Spans, category: int) -> Spans:
    """Where pages of a category of PAGEMAP_SCAN are, near `spans` too; nothing on kernels before 6.7."""
    try:
        runs = [pagemap.scan_runs(int(group.starts[0]), int(group.ends[-1]), mask=category) for group in _groups(spans)]
    except Unavailable:
        return Spans.empty()
    return edge.joined([Spans(found[:, 0], found[:, 1]) for found in runs])


def _groups(spans: Spans) -> list[Spans]:
    """Neighbours a few pages apart together."""
    if len(spans) < 2:
        return [spans] if len(spans) else []
    breaks = np.flatnonzero(spans.starts[1:] - spans.ends[:-1] > np.uint64(_MERGE_GAP_BYTES)) + 1
    firsts, lasts = [0, *breaks.tolist()], [*breaks.tolist(), len(spans)]
    return [Spans(spans.starts[a:b], spans.ends[a:b]) for a, b in zip(firsts, lasts, strict=True)]


def _advise(handle: ProcessHandle, spans: Spans, refusals: Refusals) -> bool:
    """Walk on through partial returns and refusals until everything was advised or refused.

    Returns False if the kernel asks to come again later (EAGAIN).
    """
    starts, ends = spans.starts, spans.ends
    interrupted, cut = 0, False
    while len(starts):
        try:
            chunk = slice(IOVECS_MAX)
            done = syscalls.process_madvise(handle.pidfd, starts[chunk], ends[chunk] - starts[chunk], MADV_PAGEOUT)
        except ProcessGone:
            raise
        except KernelCallError as failure:
            if failure.errno == errno.EINTR and interrupted < INTERRUPTED_MAX:
                interrupted += 1
            elif failure.errno == errno.EAGAIN:
                return False
            elif failure.errno == errno.ENOMEM:
                # The first span has a hole in it; what is around the hole was advised all the same.
                # Source: mm/madvise.c, madvise_walk_vmas().
                starts, ends = starts[1:], ends[1:]
            elif failure.errno == errno.EINVAL and not cut:
                # Somewhere in the first span a mapping is mlocked, of hugetlbfs or a device (can_madv_lru_vma()); the
                # mappings before it were advised. The kernel does not tell which, so it is asked one by one.
                starts, ends = edge.cut_at(starts, ends, refusals.borders(handle))
                cut = True
            elif failure.errno == errno.EINVAL:
                behind = refusals.refused(int(starts[0]), int(ends[0]))
                left = ends > np.uint64(behind)
                starts, ends = starts[left], ends[left]
            else:
                raise
            continue
        if done <= 0 or (len(starts) == 1 and done >= int(ends[0]) - int(starts[0])):
            return True
        starts, ends = _without_first(starts, ends, done)
    return True


def _without_first(starts: U64, ends: U64, done_bytes: int) -> tuple[U64, U64]:
    """The spans after the first `done_bytes`."""
    total = np.cumsum(ends - starts)
    count = int(np.searchsorted(total, np.uint64(done_bytes), side="right"))
    rest = np.uint64(done_bytes) - (total[count - 1] if count else np.uint64(0))
    starts, ends = starts[count:].copy(), ends[count:]
    if len(starts):
        starts[0] += rest
    return starts, ends


def move_to_node(handle: ProcessHandle, spans: Spans, node: int, *, look: Look | None = None) -> BatchResult:
    """move_pages(2) to `node`, only pages that are elsewhere.

    When a page cannot be taken from where it is (the kernel or a device holds it), the call ends there: the status
    of its neighbours stays unwritten, though they were moved, and what comes after them is not tried (mm/migrate.c,
    do_pages_move). So the kernel is asked where they are, and called again for the rest.

    Args:
        handle: of the process.
        spans: what is to be there.
        node: where.
        look: asked what was touched since the decision; such pages stay.
    Raises:
        ProcessGone: it exited.
        KernelCallError: ENODEV (no such node), EPERM and the like.
    """
    pid = handle.process.pid
    _check(handle)
    addresses = addresses_of(spans)
    try:
        status = syscalls.move_pages(pid, addresses, None)
    except KernelCallError as failure:
        if failure.errno != errno.EINVAL or handle.why_not_by_pidfd() is None:
            raise
        return BatchResult(stuck=spans, kept=(Kept(Why.HEADLESS, spans),), asked_bytes=0)
    result = BatchResult(there_bytes=int(np.count_nonzero(status == node)) * PAGE_BYTES)
    # A negative status is a page without a place: absent, or the shared zero page.
    elsewhere = (status >= 0) & (status != node)
    reasons = np.where(status < 0, np.uint8(Why.ABSENT), np.uint8(GOES))
    if look is not None and elsewhere.any():
        touched = look(handle.process, pages_as_spans(addresses[elsewhere]))
        if touched is not None:
            result.looked, result.touched_share = True, float(np.count_nonzero(touched)) / len(touched)
            at = np.flatnonzero(elsewhere)[touched]
            reasons[at], elsewhere[at] = Why.TOUCHED, False
    todo = addresses[elsewhere]
    result.asked_bytes = len(todo) * PAGE_BYTES
    last = np.full(len(addresses), node, np.int32)  # of pages that are not in `todo`, nothing is left to do
    for _ in range(CALLS_MAX):
        if not len(todo):
            break
        _check(handle)
        status = _moved(pid, todo, node)
        last[np.searchsorted(addresses, todo)] = status
        result.moved_bytes += int(np.count_nonzero(status == node)) * PAGE_BYTES
        if (status == -errno.ENOMEM).any():
            result.full = True
            result.error = f"move_pages(pid={pid}): node {node} is full"
            break
        kept = np.isin(status, _BUSY)
        if kept.all():
            break
        todo = _untried_first(todo, kept)
    _check(handle)
    _sort_out(result, addresses, last, node, reasons)
    return result


def _check(handle: ProcessHandle) -> None:
    """move_pages goes by number: while the process is not over, around the call, the number is its own.

    Raises:
        ProcessGone: it exited, and whose pages were moved or asked about since the last check is not known.
    """
    if handle.exited():
        raise ProcessGone(f"process {handle.process.pid} exited", errno.ESRCH)


def _moved(pid: int, addresses: U64, node: int) -> NDArray[np.int32]:
    """int32[n]: `node`, or -errno; -EAGAIN where the kernel did not tell and the page is not there."""
    try:
        status = syscalls.move_pages(pid, addresses, node)
    except KernelCallError as failure:
        if failure.errno != errno.ENOMEM:
            raise
        where = syscalls.move_pages(pid, addresses, None)  # some may have found room
        return np.where((where >= 0) & (where != node), np.int32(-errno.ENOMEM), where)
    untold = status == syscalls.NOT_TRIED
    if untold.any():
        where = syscalls.move_pages(pid, addresses[untold], None)
        status[untold] = np.where((where >= 0) & (where != node), -errno.EAGAIN, where)
    return status


def _untried_first(addresses: U64, kept: Bools) -> U64:
    """The pages that are `kept`, not all: first the run at the end, which the kernel may not have come to."""
    end = int(np.flatnonzero(~kept)[-1]) + 1
    return np.concatenate((addresses[end:], addresses[:end][kept[:end]]))


def _sort_out(result: BatchResult, addresses: U64, status: NDArray[np.int32], node: int, reasons: U8) -> None:
    stays = status != node
    reasons[stays] = _reasons_of(status[stays])
    result.kept = edge.kept_by_reason(addresses, reasons)
    result.stuck = pages_as_spans(addresses[(reasons != GOES) & (reasons != Why.ABSENT)])
    result.busy = pages_as_spans(addresses[np.isin(status, _BUSY)])
    _count_errors(result, status)


def _reasons_of(status: NDArray[np.int32]) -> U8:
    """uint8[n]: `Why`, of pages that are not on the node."""
    reasons = np.full(len(status), Why.BUSY, np.uint8)
    reasons[status == -errno.EACCES] = Why.SHARED
    reasons[(status == -errno.ENOENT) | (status == -errno.EFAULT)] = Why.ABSENT
    return reasons


def _count_errors(result: BatchResult, status: NDArray[np.int32]) -> None:
    for number, pages in distinct_counts(-status[status < 0]).items():
        result.page_errors[number] = result.page_errors.get(number, 0) + pages


def move(handle: ProcessHandle, spans: Spans, node: int) -> BatchResult:
    """Page out or migrate, by `node`."""
    return page_out(handle, spans) if node == SWAP_NODE else move_to_node(handle, spans, node)
