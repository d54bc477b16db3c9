"""The two system calls that move pages, with their errors sorted by what to do about them."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from memtier_engine.abi import syscalls
from memtier_engine.abi.constants import MADV_PAGEOUT
from memtier_engine.errors import KernelCallError, ProcessGone
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import read_start_ticks
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.model import PAGE_BYTES, PAGE_SHIFT, SWAP_NODE, U64, Bools, ProcessId, Spans
from memtier_engine.pages.ages import true_runs

IOVECS_MAX = 1024
"""UIO_MAXIOV: process_madvise refuses more with EINVAL."""
INTERRUPTED_MAX = 8
CALLS_MAX = 8
"""Of move_pages for one batch: each goes on behind what held up the one before."""
_BUSY = (-errno.EAGAIN, -errno.EBUSY)
SPLITS_MAX = 64
"""A batch is split this often around what the kernel refuses before the rest of it is given up."""


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


class ProcessHandle:
    """Kept-open pidfd and pagemap of one process: they pin it, so that a recycled pid is never moved."""

    def __init__(self, host: Host, process: ProcessId) -> None:
        """Raises ProcessGone if the process exited or the pid is another's by now."""
        self.process = process
        self.pidfd = syscalls.pidfd_open(process.pid)
        try:
            # The pidfd came after the process was seen: only the start time tells whose it is.
            if read_start_ticks(host, process.pid) != process.start_ticks:
                raise ProcessGone(f"pid {process.pid} is a new process", errno.ESRCH)
            self.pagemap = Pagemap(host, process.pid)
        except BaseException:
            os.close(self.pidfd)
            raise

    def close(self) -> None:
        """Close both. Safe to call twice."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
            self.pagemap.close()


def page_out(handle: ProcessHandle, spans: Spans) -> BatchResult:
    """MADV_PAGEOUT on up to `IOVECS_MAX` spans; what really left is counted in pagemap afterwards.

    Raises:
        ProcessGone: it exited.
        KernelCallError: EPERM and whatever else no retry can mend.
    """
    swapped_before = handle.pagemap.swapped_bytes(spans.starts, spans.ends)
    result = BatchResult()
    done = _advise(handle, spans.starts.copy(), spans.ends - spans.starts, result)
    swapped_after = handle.pagemap.swapped_bytes(spans.starts, spans.ends)
    result.moved_bytes = max(0, swapped_after - swapped_before)
    if swapped_after < spans.total_bytes:
        result.stuck = _resident(handle, spans)
        if not done:
            result.busy = result.stuck
    return result


def _advise(handle: ProcessHandle, starts: U64, lengths: U64, result: BatchResult) -> bool:
    """Walk on through partial returns and refusals until everything was advised or given up.

    Returns False if the kernel asks to come again later (EAGAIN).
    """
    interrupted = splits = 0
    while len(starts):
        try:
            done = syscalls.process_madvise(handle.pidfd, starts[:IOVECS_MAX], lengths[:IOVECS_MAX], MADV_PAGEOUT)
        except ProcessGone:
            raise
        except KernelCallError as failure:
            if failure.errno == errno.EINTR and interrupted < INTERRUPTED_MAX:
                interrupted += 1
                continue
            if failure.errno == errno.EAGAIN:
                return False
            if failure.errno not in (errno.ENOMEM, errno.EINVAL, errno.EBADF):
                raise
            # ENOMEM: a hole; EINVAL: a mapping that cannot be paged out (mlocked, hugetlb, device).
            splits += 1
            result.error = str(failure)
            if splits > SPLITS_MAX:
                return True
            starts, lengths = _split_first(starts, lengths)
            continue
        if done <= 0:
            return True
        starts, lengths = _without_first(starts, lengths, done)
    return True


def _split_first(starts: U64, lengths: U64) -> tuple[U64, U64]:
    """Halve the span at the front; a single page is given up."""
    pages = int(lengths[0]) >> PAGE_SHIFT
    if pages <= 1:
        return starts[1:], lengths[1:]
    half = np.uint64(pages // 2 * PAGE_BYTES)
    first = np.array([starts[0], starts[0] + half], np.uint64)
    sizes = np.array([half, lengths[0] - half], np.uint64)
    return np.concatenate((first, starts[1:])), np.concatenate((sizes, lengths[1:]))


def _without_first(starts: U64, lengths: U64, done_bytes: int) -> tuple[U64, U64]:
    """The spans after the first `done_bytes`."""
    total = np.cumsum(lengths)
    count = int(np.searchsorted(total, np.uint64(done_bytes), side="right"))
    rest = np.uint64(done_bytes) - (total[count - 1] if count else np.uint64(0))
    starts, lengths = starts[count:].copy(), lengths[count:].copy()
    if len(starts):
        starts[0] += rest
        lengths[0] -= rest
    return starts, lengths


def _resident(handle: ProcessHandle, spans: Spans) -> Spans:
    """The pages of `spans` that are in RAM."""
    pairs: list[NDArray[np.uint64]] = []
    for start, end in zip(spans.starts.tolist(), spans.ends.tolist(), strict=True):
        runs = true_runs(handle.pagemap.resident(start, end)).astype(np.uint64)
        pairs.append(np.uint64(start) + (runs << np.uint64(PAGE_SHIFT)))
    runs = np.concatenate(pairs) if pairs else np.zeros((0, 2), np.uint64)
    return Spans(runs[:, 0].copy(), runs[:, 1].copy())


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


def move_to_node(handle: ProcessHandle, spans: Spans, node: int) -> BatchResult:
    """move_pages(2) to `node`, only pages that are elsewhere.

    When a page cannot be taken from where it is (the kernel or a device holds it), the call ends there: the status
    of its neighbours stays unwritten, though they were moved, and what comes after them is not tried (mm/migrate.c,
    do_pages_move). So the kernel is asked where they are, and called again for the rest.

    Raises:
        ProcessGone: it exited.
        KernelCallError: ENODEV (no such node), EPERM and the like.
    """
    pid = handle.process.pid
    addresses = addresses_of(spans)
    status = syscalls.move_pages(pid, addresses, None)
    result = BatchResult(there_bytes=int(np.count_nonzero(status == node)) * PAGE_BYTES)
    # A negative status is a page without a place: absent, or the shared zero page.
    todo = addresses[(status >= 0) & (status != node)]
    last = np.full(len(addresses), node, np.int32)  # of pages that are not in `todo`, nothing is left to do
    for _ in range(CALLS_MAX):
        if not len(todo):
            break
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
    _sort_out(result, addresses, last, node)
    return result


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


def _sort_out(result: BatchResult, addresses: U64, status: NDArray[np.int32], node: int) -> None:
    stays = status != node
    result.stuck = pages_as_spans(addresses[stays])
    result.busy = pages_as_spans(addresses[np.isin(status, _BUSY)])
    _count_errors(result, status)


def _count_errors(result: BatchResult, status: NDArray[np.int32]) -> None:
    numbers, counts = np.unique(-status[status < 0], return_counts=True)
    for number, pages in zip(numbers.tolist(), counts.tolist(), strict=True):
        result.page_errors[number] = result.page_errors.get(number, 0) + pages


def move(handle: ProcessHandle, spans: Spans, node: int) -> BatchResult:
    """Page out or migrate, by `node`."""
    return page_out(handle, spans) if node == SWAP_NODE else move_to_node(handle, spans, node)
