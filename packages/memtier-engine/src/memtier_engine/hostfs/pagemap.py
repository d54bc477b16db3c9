"""/proc/PID/pagemap: one word per virtual page, in bulk or as runs by category (PAGEMAP_SCAN)."""

from __future__ import annotations

import errno
import os
import platform
import sys
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from memtier_engine.abi.constants import (
    PAGE_IS_SWAPPED,
    PM_FILE,
    PM_MMAP_EXCLUSIVE,
    PM_PFRAME_MASK,
    PM_PRESENT,
    PM_SOFT_DIRTY,
    PM_SWAP,
)
from memtier_engine.abi.syscalls import pagemap_scan
from memtier_engine.closing import OpenFile
from memtier_engine.errors import KernelCallError, ProcessGone, Unavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import live_thread, read_start_ticks
from memtier_engine.hostfs.runs import bytes_of
from memtier_engine.model import PAGE_BYTES, PAGE_SHIFT, U8, U64, Bools

WORD_BYTES = 8
_SCAN_ROWS = 4096
_MERGE_GAP_BYTES = 64 * PAGE_BYTES
_USER_ENDS = ((1 << 47) - PAGE_BYTES, (1 << 56) - PAGE_BYTES) if platform.machine() == "x86_64" else ()
"""Behind them no program has memory, with page tables of four and of five levels: the last page is never given out.
PAGEMAP_SCAN refuses a range that goes beyond (access_ok(), EFAULT), as one that ends at the end of the 2 MiB in which a
stack without address randomization ends. Source: arch/x86/include/asm/page_64_types.h, TASK_SIZE_MAX."""
_NO_ROWS = np.zeros((0, 3), np.uint64)


def _has(words: U64, bit: int) -> Bools:
    found: Bools = (words & np.uint64(bit)) != 0
    return found


def present(words: U64) -> Bools:
    """bool[n]: in RAM (bit 63)."""
    return _has(words, PM_PRESENT)


def swapped(words: U64) -> Bools:
    """bool[n]: in swap, or being migrated (bit 62)."""
    return _has(words, PM_SWAP)


def soft_dirty(words: U64) -> Bools:
    """bool[n]: written since clear_refs 4 (bit 55; always 0 without CONFIG_MEM_SOFT_DIRTY)."""
    return _has(words, PM_SOFT_DIRTY)


def exclusive(words: U64) -> Bools:
    """bool[n]: mapped by this process only (bit 56)."""
    return _has(words, PM_MMAP_EXCLUSIVE)


def is_file(words: U64) -> Bools:
    """bool[n]: a page of a file, or shared anonymous memory (bit 61), of words that are `present`."""
    return _has(words, PM_FILE)


def pfns(words: U64) -> U64:
    """uint64[n]: frame numbers (bits 0-54): 0 without CAP_SYS_ADMIN; meaningless where not present."""
    return words & np.uint64(PM_PFRAME_MASK)


_BYTES_OF_WORD = range(8) if sys.byteorder == "little" else range(7, -1, -1)


class PageFlags(NamedTuple):
    """What a scan asks of n words, a byte or a truth value each: no column of words is made on the way to it.

    A column of 65,536 words is 512 KiB, which malloc(3) asks of the kernel and gives back each time: the page faults
    cost several times what the arithmetic does.
    """

    present: Bools
    swapped: Bools
    exclusive: Bools


def high_bytes(words: U64) -> U8:
    """uint8[n]: bits 56 to 63 of each of `words`, which are consecutive in memory; see `flags_of`."""
    return words.view(np.uint8)[_BYTES_OF_WORD[7] :: WORD_BYTES].copy()


def flags_of(high: U8) -> PageFlags:
    """The flags in the `high_bytes` of words."""
    return PageFlags(_has_bit(high, PM_PRESENT), _has_bit(high, PM_SWAP), _has_bit(high, PM_MMAP_EXCLUSIVE))


def soft_dirty_bytes(words: U64) -> U8:
    """uint8[n]: not 0 where `soft_dirty`; of `words` that are consecutive in memory."""
    found: U8 = words.view(np.uint8)[_BYTES_OF_WORD[PM_SOFT_DIRTY.bit_length() - 1 >> 3] :: WORD_BYTES] & np.uint8(
        PM_SOFT_DIRTY >> 48 & 0xFF
    )
    return found


def _has_bit(high: U8, bit: int) -> Bools:
    found: Bools = (high & np.uint8(bit >> 56)) != 0
    return found


class ProcessDirectory(Protocol):
    """An open directory /proc/PID, see `handles.ProcessFiles`."""

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        """A file below it."""


class Pagemap(OpenFile):
    """The pagemap of one process, kept open. A context manager; `close()` is safe to call twice.

    The file belongs to the memory that the process had when it was opened: after an exec it answers nothing.
    It is then opened anew, as long as the pid still belongs to the same process.
    """

    def __init__(self, host: Host, pid: int, *, files: ProcessDirectory | None = None) -> None:
        """Open it.

        Args:
            host: the machine.
            pid: whose.
            files: its open directory, if there is one: then nothing need be compared.
        Raises:
            ProcessGone: no such process.
            AccessDenied: needs the same user, or CAP_SYS_PTRACE.
        """
        self.pid = pid
        self._host = host
        self._path = host.proc(pid, "pagemap")
        self._files = files
        self._start_ticks = read_start_ticks(host, pid) if files is None else 0
        self._fd = self._open()

    def _open(self) -> int:
        if self._files is not None:
            return self._files.open("pagemap")
        try:
            return self._host.open(self._path)
        except ProcessGone:
            thread = live_thread(self._host, self.pid)
            if thread is None:
                raise
            return self._host.open(self._host.proc(self.pid, "task", str(thread), "pagemap"))

    def _reopen(self) -> None:
        """Follow the process over an exec; `ProcessGone` if there is no memory behind its pid any more."""
        if self._files is None and read_start_ticks(self._host, self.pid) != self._start_ticks:
            raise ProcessGone(f"process {self.pid} exited", errno.ESRCH)
        fd = self._open()
        os.close(self._fd)
        self._fd = fd

    def read(self, start: int, end: int, out: U64 | None = None) -> U64:
        """The words of pages [start, end).

        Args:
            start: address of the first page.
            end: address after the last; both page aligned.
            out: uint64[>= n] to read into; its first n words are returned. None: a new array.
        Raises:
            ProcessGone: the process exited.
        """
        pages = (end - start) >> PAGE_SHIFT
        words = np.empty(pages, np.uint64) if out is None else out[:pages]
        if len(words) != pages:
            raise ValueError(f"out has {len(words)} words, {pages} pages asked for")
        if pages and self._read_into(words, start) == 0:
            self._reopen()
            if self._read_into(words, start) == 0:
                raise ProcessGone(f"process {self.pid} has no memory at {start:#x}: it exited", errno.ESRCH)
        return words

    def read_all(self, pieces: Sequence[tuple[int, int]], out: U64 | None = None) -> U64:
        """The words of all pieces (start, end), one after the other; else as `read`."""
        if len(pieces) == 1:
            return self.read(*pieces[0], out)
        lengths = [end - start >> PAGE_SHIFT for start, end in pieces]
        total = sum(lengths)
        words = np.empty(total, np.uint64) if out is None else out[:total]
        first = 0
        for (start, end), pages in zip(pieces, lengths, strict=True):
            self.read(start, end, words[first : first + pages])
            first += pages
        return words

    def _read_into(self, words: U64, start: int) -> int:
        """Fill `words`; 0 if the file answers nothing at all. What it does not answer later reads as 0."""
        view = bytes_of(words)
        offset = (start >> PAGE_SHIFT) * WORD_BYTES
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise self._host.error(self._path, error) from None
            if got == 0:
                if done:
                    words[done // WORD_BYTES :] = 0
                break
            done += got
        return done

    def scan_runs(
        self,
        start: int,
        end: int,
        *,
        anyof: int = 0,
        mask: int = 0,
        inverted: int = 0,
        returns: int | None = None,
        flags: int = 0,
    ) -> U64:
        """Runs of pages in [start, end) by category, as PAGEMAP_SCAN reports them.

        Args:
            start: first address.
            end: address after the last; both page aligned. It may lie behind all that a program can have.
            anyof: categories (`PageIs`) of which a page must have one; 0: any page.
            mask: categories that a page must have all.
            inverted: categories that count as present when absent.
            returns: categories to tell apart; None: `anyof | mask`.
            flags: `PmScan`.
        Returns:
            uint64[k, 3]: rows (start, end, categories), ascending, disjoint.
        Raises:
            ProcessGone: the process exited.
            Unavailable: the kernel is older than 6.7 (ENOTTY).
        """
        return_mask = int(anyof | mask) if returns is None else int(returns)
        parts: list[U64] = []
        end = min([end, *(last for last in _USER_ENDS if start < last)])
        at, reopened = start, False
        while at < end:
            rows = np.empty((_SCAN_ROWS, 3), np.uint64)
            try:
                filled, walk_end = pagemap_scan(
                    self._fd,
                    at,
                    end,
                    category_anyof_mask=anyof,
                    category_mask=mask,
                    category_inverted=inverted,
                    return_mask=return_mask,
                    vec=rows,
                    flags=flags,
                )
            except KernelCallError as error:
                if error.errno == errno.ENOTTY:
                    raise Unavailable(
                        "PAGEMAP_SCAN: this kernel does not have it", hint="Linux 6.7 or later"
                    ) from error
                raise
            if filled == 0 and at == start and not self._answers(start):
                # The memory of before an exec: an empty answer, not an error.
                if reopened:
                    raise ProcessGone(f"process {self.pid} exited", errno.ESRCH)
                self._reopen()
                reopened = True
                continue
            if filled:
                parts.append(rows[:filled])
            if walk_end <= at:
                break
            at = walk_end
        if not parts:
            return _NO_ROWS
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _answers(self, start: int) -> bool:
        return self._read_into(np.empty(1, np.uint64), start) != 0

    def resident(self, start: int, end: int) -> Bools:
        """bool[n]: which pages of [start, end) are in RAM."""
        return present(self.read(start, end))

    def swapped_bytes(self, starts: U64, ends: U64) -> int:
        """How much of the spans (ascending, disjoint, page aligned) is in swap."""
        if len(starts) == 0:
            return 0
        # Spans a few pages apart are asked for together: fewer calls, and what lies between is not counted.
        breaks = np.flatnonzero(starts[1:] - ends[:-1] > np.uint64(_MERGE_GAP_BYTES)) + 1
        firsts = np.concatenate(([0], breaks))
        lasts = np.concatenate((breaks, [len(starts)])) - 1
        try:
            runs = np.concatenate(
                [
                    self.scan_runs(int(start), int(end), mask=PAGE_IS_SWAPPED)
                    for start, end in zip(starts[firsts], ends[lasts], strict=True)
                ]
            )
        except Unavailable:
            return sum(
                int(np.count_nonzero(swapped(self.read(int(start), int(end))))) * PAGE_BYTES
                for start, end in zip(starts, ends, strict=True)
            )
        return int((_bytes_below(runs, ends) - _bytes_below(runs, starts)).sum(dtype=np.uint64))


def _bytes_below(runs: U64, addresses: U64) -> U64:
    """uint64[n]: bytes of `runs` (rows start, end, ...; ascending, disjoint) that lie below each address."""
    if len(runs) == 0:
        return np.zeros(len(addresses), np.uint64)
    starts, ends = runs[:, 0], runs[:, 1]
    totals = np.concatenate((np.zeros(1, np.uint64), np.cumsum(ends - starts, dtype=np.uint64)))
    at = np.searchsorted(starts, addresses, side="right")  # runs that begin at or below the address
    inside = np.maximum(at - 1, 0)
    over = np.where(at > 0, np.maximum(ends[inside], addresses) - addresses, np.uint64(0))
    return totals[at] - over
