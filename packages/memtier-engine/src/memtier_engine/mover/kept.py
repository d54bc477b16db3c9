"""What stayed where it was, by process and reason, for a person to read: one line each, and not over and over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from memtier_engine.model import MoveOutcome, ProcessId, Why

IN_WORDS: Mapping[Why, str] = {
    Why.TOUCHED: "used again before its turn came",
    Why.LOCKED: "locked (mlock) or of a kind that the kernel never pages out",
    Why.SHARED: "shared with other processes",
    Why.FILE: "pages of files, which others may be reading",
    Why.BUSY: "held by the kernel just now (pinned, or being written)",
    Why.HUGE: "parts of huge pages that are not idle as a whole",
}
"""What is worth a line: what is absent is no news."""
AGAIN_S = 600.0
"""The same is said once in so long,"""
AGAIN_FACTOR = 2.0
"""or when it has grown by this."""
LEAST_BYTES = 1 << 20
"""Less is not worth a line."""


class KeptBytes:
    """Collects outcomes; asked for its bytes or lines after each decision's moves. Time is an argument."""

    def __init__(self) -> None:
        self._now: Counter[tuple[ProcessId, Why]] = Counter()
        self._said: dict[tuple[ProcessId, Why], tuple[float, int]] = {}

    def add(self, outcome: MoveOutcome) -> None:
        """One more outcome of the mover."""
        for each in outcome.kept:
            if each.why in IN_WORDS:
                self._now[outcome.process, each.why] += each.spans.total_bytes

    def bytes(self) -> dict[tuple[int, Why], int]:
        """What was kept since the last `begin`, by pid and reason."""
        return {(process.pid, why): size for (process, why), size in self._now.items()}

    def begin(self) -> None:
        """A new decision: what it wants is counted anew, so that nothing counts twice."""
        self._now.clear()

    def lines(self, now_s: float) -> Iterator[str]:
        """What is new: "pid 123: 256 MiB stay in RAM: locked ...". The largest first."""
        for key, size in self._now.most_common():
            said_s, said_bytes = self._said.get(key, (float("-inf"), 0))
            due = now_s - said_s >= AGAIN_S or size >= AGAIN_FACTOR * said_bytes
            if size >= LEAST_BYTES and due:
                self._said[key] = (now_s, size)
                yield f"pid {key[0].pid}: {size >> 20} MiB stay in RAM: {IN_WORDS[key[1]]}"

    def forget(self, process: ProcessId) -> None:
        """It is gone."""
        for key in [key for key in (*self._now, *self._said) if key[0] == process]:
            self._now.pop(key, None)
            self._said.pop(key, None)
