"""/proc/kpageflags: one word of flags (`Kpf`) per frame, and the head frames of huge pages."""

from __future__ import annotations

import os

import numpy as np

from memtier_engine.abi.constants import KPF_COMPOUND_HEAD, KPF_COMPOUND_TAIL
from memtier_engine.closing import OpenFile
from memtier_engine.distinct import distinct_places
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.runs import bytes_of, run_bounds
from memtier_engine.model import U64

KPAGEFLAGS = "proc/kpageflags"
WORD_BYTES = 8
_READ_GAP_FRAMES = 64  # reading a word too many costs some 10 ns, a system call some 300
_READ_FRAMES = 1 << 16  # of one read: bounds the buffer
_MAX_ORDER = 18  # 1 GiB of 4 KiB frames


class KpageFlags(OpenFile):
    """The flags of the machine's frames, kept open. A context manager; `close()` is safe to call twice."""

    def __init__(self, host: Host) -> None:
        """Open it.

        Raises:
            KernelCallError: ENOENT without CONFIG_PROC_PAGE_MONITOR; `AccessDenied` without root.
        """
        self._host = host
        self._path = host.path(KPAGEFLAGS)
        self._fd = host.open(self._path)

    def has(self, pfn: int) -> bool:
        """Whether there is such a frame."""
        try:
            return len(os.pread(self._fd, WORD_BYTES, pfn * WORD_BYTES)) == WORD_BYTES
        except (OSError, OverflowError):
            return False

    def read(self, pfns: U64) -> U64:
        """The flags of frames, neighbours in one read.

        Args:
            pfns: uint64[n], ascending, unique.
        Returns:
            uint64[n]: `Kpf` bits; 0 past the last frame.
        """
        flags = np.zeros(len(pfns), np.uint64)
        bounds = run_bounds(pfns, gap=_READ_GAP_FRAMES)
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            self._read_run(pfns[begin:end], flags[begin:end])
        return flags

    def _read_run(self, pfns: U64, flags: U64) -> None:
        """Fill `flags` for one run, `_READ_FRAMES` frames at a time."""
        begin = 0
        while begin < len(pfns):
            first = pfns[begin]
            end = int(np.searchsorted(pfns, first + np.uint64(_READ_FRAMES)))
            words = np.zeros(int(pfns[end - 1] - first) + 1, np.uint64)
            view = bytes_of(words)
            offset, done = int(first) * WORD_BYTES, 0
            try:
                while done < len(view):
                    got = os.preadv(self._fd, [view[done:]], offset + done)
                    if got == 0:
                        break
                    done += got
            except OSError as error:
                raise self._host.error(self._path, error) from None
            flags[begin:end] = words[(pfns[begin:end] - first).astype(np.intp)]
            begin = end

    def compound_heads(self, pfns: U64) -> U64:
        """Each frame's head frame: itself, unless it is a tail of a compound page.

        A compound page of order k begins at a multiple of 2**k, so the head is the first frame with
        COMPOUND_HEAD among the tail's number rounded down to multiples of 2, 4, 8, ...

        Args:
            pfns: uint64[n], any order, duplicates allowed.
        Returns:
            uint64[n].
        """
        frames, where = distinct_places(pfns)
        heads = frames.copy()
        tails = np.flatnonzero(self.read(frames) & np.uint64(KPF_COMPOUND_TAIL))
        for order in range(1, _MAX_ORDER + 1):
            if len(tails) == 0:
                break
            rounded = frames[tails] >> np.uint64(order) << np.uint64(order)
            candidates, of = distinct_places(rounded)
            is_head = ((self.read(candidates) & np.uint64(KPF_COMPOUND_HEAD)) != 0)[of]
            heads[tails[is_head]] = rounded[is_head]
            tails = tails[~is_head]
        return heads[where]
