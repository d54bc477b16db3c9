"""The idle bits of frames, those of large folios found at their heads.

The kernel keeps the bit of a large folio at its head and shows 0 for its tails, so the flags of each frame that looks
touched are to be asked for. A frame that is no tail does not become one as long as it is mapped: it is not asked for
again for a minute or two. One that was freed meanwhile, and came back as a tail, looks touched until then.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from memtier_engine.distinct import distinct as distinct_values
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.kpageflags import KpageFlags
from memtier_engine.hostfs.page_idle import FRAMES_PER_WORD, IdleBitmap, distinct, idle_words
from memtier_engine.model import U64, Bools

_Words = tuple[U64, U64]
"""(ascending indexes, the words there)."""
KNOWN_S = 60.0
"""What is known of frames is forgotten after this to twice this time."""
_WITHIN = np.uint64(FRAMES_PER_WORD - 1)
_ONE = np.uint64(1)


class IdleReader:
    """One per bitmap that is open."""

    def __init__(self, host: Host, *, now_s: Callable[[], float] = time.monotonic) -> None:
        """Raises KernelCallError without the bitmap, AccessDenied without root."""
        self.bitmap = IdleBitmap(host)
        self._flags = KpageFlags(host)
        self._no_tails = _Remembered(now_s)

    def touched_and_marked(self, frames: U64) -> Bools:
        """bool[n]: touched since the bits were last set. Sets them again.

        The bit of a frame that was not touched is still set: setting it again would clear an access of just now.
        """
        idle, owners = self.idle(frames)
        touched = ~idle
        self.bitmap.set_idle(owners[touched])
        return touched

    def idle(self, frames: U64) -> tuple[Bools, U64]:
        """(bool[n]: not touched since the bits were last set, uint64[n]: the frames that hold the bits)."""
        if not len(frames):
            return np.zeros(0, np.bool_), frames
        # Neighbours in a process are mostly neighbours in memory: what follows is by runs of frames of one word.
        numbers = frames >> np.uint64(6)
        firsts = np.flatnonzero(np.concatenate(([True], numbers[1:] != numbers[:-1])))
        lengths = np.diff(firsts, append=len(frames))
        indexes, where = distinct(numbers[firsts])
        idle = _bits(np.repeat(self.bitmap.read_words(indexes)[where], lengths), frames)
        owners = frames
        touched = np.flatnonzero(~idle)
        known = np.repeat(self._no_tails.words(indexes)[where], lengths)[touched]
        asked = touched[~_bits(known, frames[touched])]
        if len(asked):
            heads = self._flags.compound_heads(frames[asked])
            tails = heads != frames[asked]
            self._no_tails.add(frames[asked[~tails]])
            if tails.any():
                idle[asked[tails]] = self.bitmap.is_idle(heads[tails])
                owners = frames.copy()
                owners[asked] = heads
        return idle, owners

    def close(self) -> None:
        """Close the files. Safe to call twice."""
        self.bitmap.close()
        self._flags.close()


class _Remembered:
    """A set of frames, as words of 64; what was added more than `KNOWN_S` to twice that ago is not in it any more."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._began_s = now_s()
        # Each less than half as long as the one before it: a table is made anew now and then, not with all that is
        # known at each call.
        self._newer: list[_Words] = []
        self._older: list[_Words] = []

    def words(self, indexes: U64) -> U64:
        """uint64[n]: the words at `indexes`, which ascend."""
        self._forget()
        found = np.zeros(len(indexes), np.uint64)
        for table in (*self._newer, *self._older):
            found |= _at(table, indexes)
        return found

    def add(self, frames: U64) -> None:
        """Remember these."""
        if not len(frames):
            return
        self._forget()
        added = idle_words(frames)
        while self._newer and len(self._newer[-1][0]) <= 2 * len(added[0]):
            added = _both(self._newer.pop(), added)
        self._newer.append(added)

    def _forget(self) -> None:
        now_s = self._now_s()
        if now_s - self._began_s >= KNOWN_S:
            self._older = self._newer if now_s - self._began_s < 2 * KNOWN_S else []
            self._newer = []
            self._began_s = now_s


def _bits(words: U64, frames: U64) -> Bools:
    """bool[n]: the bit of each frame in its word. Nothing is left of `words`."""
    words >>= frames & _WITHIN
    words &= _ONE
    found: Bools = words != 0
    return found


def _both(one: _Words, other: _Words) -> _Words:
    indexes = distinct_values(np.concatenate((one[0], other[0])))
    return indexes, _at(one, indexes) | _at(other, indexes)


def _at(table: _Words, indexes: U64) -> U64:
    known, words = table
    places = np.minimum(np.searchsorted(known, indexes), len(known) - 1)
    return np.where(known[places] == indexes, words[places], np.uint64(0))
