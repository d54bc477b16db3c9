"""Samples of a process over time -> whether its memory is flat and nothing leaks. No IO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WARM_UP_SHARE = 0.25
"""Of the time: caches fill, the allocator's arenas grow to what the churn needs at once."""
WARM_UP_LEAST_S = 75.0
"""Until 20 engines of all classes have come and gone once: from 34 to 40 MiB where it was measured."""
SLOPE_MIB_PER_HOUR_MAX = 1.0
SLOPE_FROM_HOURS = 0.5
"""After the warm-up. In less time the slope is that of the noise: then what counts is the growth in all."""
GROWTH_MIB_MAX = 1.5
"""The allocator's arenas breathe with the load by about one."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The process at one time."""

    at_s: float
    memory_bytes: int
    """Anonymous memory, in RAM and in swap."""
    fds: int
    threads: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a run showed."""

    hours: float
    """Without the warm-up."""
    memory_mib: float
    """Median after the warm-up."""
    slope_mib_per_hour: float
    """Theil-Sen: the median of the slopes between all pairs of samples, deaf to single peaks."""
    growth_mib: float
    """Median of the last third less that of the first, after the warm-up."""
    complaints: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.hours * 60:.0f} min after the warm-up: {self.memory_mib:.1f} MiB, "
            f"slope {self.slope_mib_per_hour:+.2f} MiB/h, growth {self.growth_mib:+.2f} MiB"
        )


def judge(samples: Sequence[Sample], idle: tuple[Sample, Sample]) -> Verdict:
    """Judge a run.

    Args:
        samples: under churn, ascending in time, over 90 s or more.
        idle: the process without any container, before the churn and after it: then fds and threads are the same.
    """
    times_s = np.array([each.at_s for each in samples])
    after = times_s >= times_s[0] + max(WARM_UP_LEAST_S, WARM_UP_SHARE * (times_s[-1] - times_s[0]))
    hours = (times_s[after] - times_s[after][0]) / 3600
    memory_mib = np.array([each.memory_bytes for each in samples])[after] / 2**20
    slope = theil_sen(hours, memory_mib)
    third = max(1, len(hours) // 3)
    growth = float(np.median(memory_mib[-third:]) - np.median(memory_mib[:third]))
    complaints = []
    grows = slope > SLOPE_MIB_PER_HOUR_MAX if hours[-1] >= SLOPE_FROM_HOURS else growth > GROWTH_MIB_MAX
    if grows:
        complaints.append(f"memory grows by {slope:.2f} MiB/h, {growth:.2f} MiB in all")
    before, finally_ = idle
    if finally_.fds > before.fds:
        complaints.append(f"{finally_.fds - before.fds} file descriptors are left open, of {before.fds} before")
    if finally_.threads > before.threads:
        complaints.append(f"{finally_.threads - before.threads} threads are left, of {before.threads} before")
    return Verdict(float(hours[-1]), float(np.median(memory_mib)), slope, growth, tuple(complaints))


def theil_sen(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The median slope between all pairs of points."""
    first, second = np.triu_indices(len(x), 1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))
