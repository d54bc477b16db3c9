"""Bins of time between two touches of a page, which grow with it. No IO."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BINS_PER_DOUBLING = 8
BINS = 20 * BINS_PER_DOUBLING + 1
BIN_S: NDArray[np.float64] = np.concatenate(([0.0], 2.0 ** (np.arange(1, BINS) / BINS_PER_DOUBLING)))
"""float64[BINS]: the least gap of each bin in seconds, from 0 to 12 days."""


def bins_of(seconds: NDArray[np.float64]) -> NDArray[np.intp]:
    """The bin of each gap."""
    return np.searchsorted(BIN_S, seconds, side="right") - 1


def bin_of(seconds: float) -> int:
    """The bin of one gap."""
    return int(np.searchsorted(BIN_S, seconds, side="right")) - 1
