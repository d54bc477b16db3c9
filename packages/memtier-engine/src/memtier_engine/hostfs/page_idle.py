"""The idle page bitmap: one bit per frame, in words of 64. Only the bits and words asked for are touched.

Source: Documentation/admin-guide/mm/idle_page_tracking.rst, mm/page_idle.c. Offsets and sizes must be
multiples of 8. A 1 written marks the frame idle and clears the accessed bits of every mapping of it; a 0
written changes nothing. A 1 read means "not accessed since it was marked". Only frames on an LRU list have a
bit; that of a huge page is its head frame's.
"""

from __future__ import annotations

import os

import numpy as np

from memtier_engine.closing import OpenFile
from memtier_engine.distinct import distinct_places
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.runs import bytes_of, run_bounds
from memtier_engine.model import U64, Bools

IDLE_BITMAP = "sys/kernel/mm/page_idle/bitmap"
FRAMES_PER_WORD = 64
WORD_BYTES = 8
WRITE_GAP_WORDS = 8
"""Words with bits at most so far apart are written together, with zeros between them: the kernel passes over 64 zeros
in less time than a system call takes."""


class IdleBitmap(OpenFile):
    """The bitmap of the whole machine, kept open. A context manager; `close()` is safe to call twice."""

    def __init__(self, host: Host) -> None:
        """Open it.

        Raises:
            KernelCallError: ENOENT without CONFIG_IDLE_PAGE_TRACKING; `AccessDenied` without root.
        """
        self._host = host
        self._path = host.path(IDLE_BITMAP)
        self._fd = host.open(self._path, os.O_RDWR)

    def read_words(self, word_indexes: U64) -> U64:
        """The words at `word_indexes`, one read per run of neighbours.

        Reading costs a reverse-map walk per idle frame in a word, so words in between are not read along.

        Args:
            word_indexes: uint64[n], ascending, unique: frame number // 64.
        Returns:
            uint64[n]: bit i of a word is frame 64 * index + i. Past the last frame, and in a word within which
                memory ends: 0.
        """
        words = np.zeros(len(word_indexes), np.uint64)
        view = bytes_of(words)
        bounds = run_bounds(word_indexes)
        offsets = (word_indexes[bounds[:-1]] * np.uint64(WORD_BYTES)).tolist()
        edges = (bounds * WORD_BYTES).tolist()
        try:
            for offset, begin, end in zip(offsets, edges[:-1], edges[1:], strict=True):
                while begin < end:
                    got = os.preadv(self._fd, [view[begin:end]], offset)
                    if got == 0:
                        break
                    begin, offset = begin + got, offset + got
        except OSError as error:
            raise self._host.error(self._path, error) from None
        return words

    def set_idle(self, pfns: U64) -> None:
        """Mark frames idle: one write per run of nearly neighbouring words, 0 for every frame not named.

        Args:
            pfns: uint64[n], any order, duplicates allowed.
        """
        if len(pfns) == 0:
            return
        indexes, words = _with_gaps(*idle_words(pfns))
        view = bytes_of(words)
        bounds = run_bounds(indexes)
        offsets = (indexes[bounds[:-1]] * np.uint64(WORD_BYTES)).tolist()
        edges = (bounds * WORD_BYTES).tolist()
        try:
            for offset, begin, end in zip(offsets, edges[:-1], edges[1:], strict=True):
                while begin < end:
                    done = os.pwrite(self._fd, view[begin:end], offset)
                    if done == 0:
                        break  # memory ends within this word: its bits are set, but the kernel counts it as 0 bytes
                    begin, offset = begin + done, offset + done
        except OSError as error:
            raise self._host.error(self._path, error, "write") from None

    def is_idle(self, pfns: U64) -> Bools:
        """bool[n]: which frames (any order) were not accessed since they were marked."""
        indexes, where = distinct(pfns >> np.uint64(6))
        words = self.read_words(indexes)[where]
        return (words >> (pfns & np.uint64(63)) & np.uint64(1)).astype(np.bool_)


_TABLE_MOST = 4
"""Times as many entries as there are numbers up to which a table takes less time than to sort them: it is as long as
what they are spread over, up to all of the machine's memory."""


def distinct(numbers: U64) -> tuple[U64, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """(ascending distinct numbers, index of each of `numbers` in them); if close, faster than by sorting."""
    if len(numbers) == 0:
        return numbers, np.zeros(0, np.int64)
    least = numbers.min()
    offsets = (numbers - least).view(np.int64)
    size = int(offsets.max()) + 1
    if size > _TABLE_MOST * len(numbers):
        return distinct_places(numbers)
    table = np.zeros(size, np.bool_)
    table[offsets] = True
    places = np.cumsum(table, dtype=np.int64) - 1
    return np.flatnonzero(table).astype(np.uint64) + least, places[offsets]


def _with_gaps(indexes: U64, words: U64) -> tuple[U64, U64]:
    """The same with words of zeros in the small gaps."""
    steps = np.diff(indexes).astype(np.int64)
    steps[steps > WRITE_GAP_WORDS] = 1
    if (steps == 1).all():
        return indexes, words
    places = np.concatenate((np.zeros(1, np.int64), np.cumsum(steps)))
    counts = np.concatenate((steps, np.ones(1, np.int64)))
    filled = np.zeros(len(words) + int((counts - 1).sum()), np.uint64)
    filled[places] = words
    within = (np.arange(len(filled)) - np.repeat(places, counts)).astype(np.uint64)
    return np.repeat(indexes, counts) + within, filled


def idle_words(pfns: U64) -> tuple[U64, U64]:
    """Frame numbers as (ascending unique word indexes, words with exactly these frames' bits)."""
    # Neighbours in a process are mostly neighbours in memory: what is to be sorted is far less after the first pass.
    indexes, words = _joined(pfns >> np.uint64(6), np.uint64(1) << (pfns & np.uint64(63)))
    if (indexes[1:] > indexes[:-1]).all():
        return indexes, words
    order = np.argsort(indexes, kind="stable")
    return _joined(indexes[order], words[order])


def _joined(indexes: U64, words: U64) -> tuple[U64, U64]:
    """The same with one word for those of equal indexes side by side."""
    firsts = np.flatnonzero(np.concatenate(([True], indexes[1:] != indexes[:-1])))
    return indexes[firsts], np.bitwise_or.reduceat(words, firsts)
