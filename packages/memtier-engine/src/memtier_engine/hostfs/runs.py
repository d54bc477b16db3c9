"""Sorted numbers into runs, so that one read or write serves many of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memtier_engine.model import U64


def bytes_of(words: U64) -> memoryview:
    """The memory of a C-contiguous array as writable bytes, for preadv and pwrite."""
    return words.data.cast("B") if len(words) else memoryview(b"")


def run_bounds(numbers: U64, gap: int = 1) -> NDArray[np.intp]:
    """Where runs begin in `numbers`, with the end appended.

    Args:
        numbers: uint64[n], ascending, unique.
        gap: largest step inside a run; 1: consecutive numbers only.
    Returns:
        intp[r + 1]: run i is `numbers[bounds[i]:bounds[i + 1]]`; [0] if `numbers` is empty.
    """
    if len(numbers) == 0:
        return np.zeros(1, np.intp)
    breaks = np.flatnonzero(np.diff(numbers) > np.uint64(gap)) + 1
    return np.concatenate(([0], breaks, [len(numbers)])).astype(np.intp)
