"""`policy -dump accessed [TIMES [PIDS]]`: the reference's table of an engine's memory by time since the last access."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memtier_engine.engine.loop import Engine
from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES
from memtier_engine.pages.ages import AGE_MAX, PAGED_OUT
from memtier_engine.units import Durations

USAGE = (
    "Usage: dump accessed [TIMES [PIDS]]\n"
    "TIMES: two or more of FLOAT[ns|us|ms|s|m|h], separated by commas; 0 is no limit\n"
    "PIDS: process ids, separated by commas\n"
)
_TIMES = Durations(hint="use 0, 5s, 1.5m or 2h", bare="s", days=False, signed=True, loose=True)
_HEADER = "table: time since last access\n     pid lastaccs>=[s] lastaccs<[s]    pages   mem[G] pidmem[%]\n"


@dataclass(frozen=True, slots=True)
class AccessedDump:
    """What is to be shown."""

    times_s: tuple[float, ...] | None = None
    """Limits, each pair of neighbours a row; None: those of the policy."""
    pids: frozenset[int] | None = None
    """None: all."""

    @classmethod
    def of(cls, words: Sequence[str]) -> AccessedDump:
        """What the words behind `accessed` say. Raises ConfigError: its message is the reference's."""
        pids = None
        if len(words) > 1:
            pids = frozenset(_pid(text) for text in words[1].split(","))
        return cls(_times(words[0]) if words else None, pids)

    def text(self, engine: Engine) -> str:
        """The table; above it the limits, where they are the policy's. Call it in the thread that runs the engine."""
        if self.times_s is not None:
            return accessed_table(engine, self.times_s, self.pids)
        policy = engine.config.policy
        limits_ms = [value or 0 for value in (policy.active_duration_ms, policy.idle_duration_ms, policy.swap_out_ms)]
        head = "using limits from configuration: active {} ms, idle {} ms, swapout {} ms\n".format(*limits_ms)
        return head + accessed_table(engine, (0.0, *(limit_ms / 1000 for limit_ms in limits_ms), 0.0), self.pids)


def parse_times(text: str) -> tuple[float, ...]:
    """Seconds of a comma list such as `0,1m,2h,0`; 0 means no bound on that side.

    Raises:
        ConfigError: fewer than two, or one that is no time.
    """
    times = tuple(_TIMES.seconds(part, key_path="intervalcommand") for part in text.split(","))
    if len(times) < 2:
        raise ConfigError(f"times {text!r}", key_path="intervalcommand", hint="give two or more, like 0,1m,0")
    return times


def _times(text: str) -> tuple[float, ...]:
    try:
        return parse_times(text)
    except ConfigError as failure:
        if "," in text:
            message = f'invalid TIMESPEC "{text}": {failure.message}'
        else:
            message = f'too few TIMESPECs in "{text}", expected two or more'
        raise ConfigError(message, key_path=failure.key_path, hint=failure.hint) from None


def _pid(text: str) -> int:
    if not text.strip().isdecimal() or len(text) > 9:
        raise ConfigError(f'invalid pid: "{text}"', key_path="intervalcommand", hint="give pids, like 1,2")
    return int(text)


def accessed_table(engine: Engine, times_s: Sequence[float], pids: Iterable[int] | None = None) -> str:
    """The reference's table of `policy -dump accessed`: pages of each process by idle time.

    Pages we paged out count where there is no upper bound. Call it in the thread that runs the engine.
    """
    wanted = None if pids is None else set(pids)
    found = sorted(
        (process.pid, pages.histogram())
        for process, pages in engine.pages.items()
        if wanted is None or process.pid in wanted
    )
    idle_s = engine.age_clock.idle_s()
    rows: list[str] = []
    if len(found) > 1:
        rows += _rows("all", sum((each for _, each in found), np.zeros(256, np.int64)), idle_s, times_s)
    for pid, histogram in found:
        rows += _rows(str(pid), histogram, idle_s, times_s)
    return _HEADER + "".join(rows)


def _rows(
    name: str, histogram: NDArray[np.int64], idle_s: NDArray[np.float64], times_s: Sequence[float]
) -> Iterable[str]:
    resident = histogram[: AGE_MAX + 1]
    total = int(resident.sum() + histogram[PAGED_OUT])
    for least_s, below_s in itertools.pairwise(times_s):
        among = (idle_s >= least_s) if least_s else np.ones(AGE_MAX + 1, np.bool_)
        if below_s:
            among &= idle_s < below_s
        pages = int(resident[among].sum()) + (0 if below_s else int(histogram[PAGED_OUT]))
        share = 100 * pages / total if total else math.nan
        percent = "NaN" if math.isnan(share) else f"{share:.2f}"
        yield f"{name:>8} {least_s:13.3f} {below_s:12.3f} {pages:8d} {pages * PAGE_BYTES / 2**30:8.3f} {percent:>9}\n"
