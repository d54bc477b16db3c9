"""Routine `statactions`: the table "time since last access" of an engine, every interval, as text."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from memtier_engine.config.routines import RoutineSpec
from memtier_engine.engine.loop import Engine
from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES
from memtier_engine.pages.ages import AGE_MAX, PAGED_OUT

_TIME = re.compile(r"\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*(ns|us|ms|s|m|h)?\s*")
_SECONDS = {None: 1.0, "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_HEADER = "table: time since last access\n     pid lastaccs>=[s] lastaccs<[s]    pages   mem[G] pidmem[%]\n"


def parse_times(text: str) -> tuple[float, ...]:
    """Seconds of a comma list such as `0,1m,2h,0`; 0 means no bound on that side.

    Raises:
        ConfigError: fewer than two, or one that is no time.
    """
    times = []
    for part in text.split(","):
        found = _TIME.fullmatch(part)
        if found is None:
            raise ConfigError(f"time {part!r}", key_path="intervalcommand", hint="use 0, 5s, 1.5m or 2h")
        times.append(float(found[1]) * _SECONDS[found[2]])
    if len(times) < 2:
        raise ConfigError(f"times {text!r}", key_path="intervalcommand", hint="give two or more, like 0,1m,0")
    return tuple(times)


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


def _dump_words(spec: RoutineSpec) -> tuple[str, ...] | None:
    """What follows `policy -dump accessed` in the command of the routine; None for the stub.

    Raises:
        ConfigError: it runs something else, which needs the whole prompt.
    """
    if spec.config is None:
        return None
    command = spec.config.interval_command
    if spec.config.pageout_command or spec.config.interval_command_runner != "memtier":
        raise ConfigError("only `intervalcommandrunner: memtier` is supported here", key_path="routines")
    if command[:3] != ("policy", "-dump", "accessed") or len(command) > 5:
        raise ConfigError(
            f"{' '.join(command)!r} is not supported here",
            key_path="intervalcommand",
            hint='use ["policy", "-dump", "accessed", "0,1m,30m,0"]',
        )
    return command[3:]


class StatActions:
    """Runs the routines of one engine when they are due. Call `run_due` after each scan, in the engine's thread."""

    def __init__(self, specs: Sequence[RoutineSpec], write: Callable[[str], None], *, now_s: float) -> None:
        """`write` gets each command's output. Raises: ConfigError for times that cannot be read."""
        self._write = write
        self._routines = [
            _Routine(spec.config.interval_ms / 1000, words, now_s)
            for spec in specs
            if (words := _dump_words(spec)) is not None and spec.config is not None
        ]

    def run_due(self, engine: Engine, now_s: float) -> None:
        """Write the output of those whose interval is over."""
        for routine in self._routines:
            if routine.is_due(now_s):
                self._write(accessed_table(engine, routine.times_s or _limits(engine), routine.pids))


class _Routine:
    def __init__(self, interval_s: float, words: Sequence[str], now_s: float) -> None:
        self.times_s = parse_times(words[0]) if words else None
        self.pids: tuple[int, ...] | None = None
        if len(words) > 1:
            try:
                self.pids = tuple(int(word) for word in words[1].split(","))
            except ValueError:
                raise ConfigError(f"pids {words[1]!r}", key_path="intervalcommand", hint="like 1,2") from None
        self._interval_s = interval_s
        self._due_s = now_s + self._interval_s

    def is_due(self, now_s: float) -> bool:
        if now_s < self._due_s:
            return False
        self._due_s += self._interval_s
        if self._due_s <= now_s:  # missed ones are left out
            self._due_s = now_s + self._interval_s
        return True


def check_routines(specs: Sequence[RoutineSpec]) -> None:
    """Raise ConfigError for a routine whose command cannot be run."""
    StatActions(specs, lambda text: None, now_s=0.0)


def _limits(engine: Engine) -> tuple[float, ...]:
    policy = engine.config.policy
    durations = (policy.active_duration_ms, policy.idle_duration_ms, policy.swap_out_ms)
    return (0.0, *((duration or 0) / 1000 for duration in durations), 0.0)
