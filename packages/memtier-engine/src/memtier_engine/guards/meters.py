"""Totals that only grow and a time in, amounts within a recent window out. No IO."""

from __future__ import annotations

from collections import deque


class WindowMeter:
    """How much a counter grew within the last `window_s`, from readings at any times.

    Readings are merged into `slots` slots per window, so that the answer may cover up to one slot more than
    the window, never less of it than was observed, and memory stays small.
    """

    def __init__(self, window_s: float, *, slots: int = 48) -> None:
        self.window_s = window_s
        self._slot_s = window_s / slots
        self._points: deque[tuple[float, int]] = deque()  # (time, grown since the first reading)
        self._last: int | None = None
        self._grown = 0

    def begin(self, total: int, since_s: float, now_s: float) -> None:
        """Before the first reading: the counter grew from 0 to `total` in the last `since_s`, evenly for all we know.

        So that a program that starts anew does not forget what it did before.
        """
        seen_s = min(since_s, self.window_s)
        if seen_s <= 0:
            return
        self._last, self._grown = total, int(total * seen_s / since_s)
        steps = max(1, round(seen_s / self._slot_s))
        self._points.extend((now_s - seen_s * (1 - n / steps), self._grown * n // steps) for n in range(steps + 1))

    def add(self, total: int, now_s: float) -> int:
        """Take a reading; returns the growth within the window. A counter that starts anew loses nothing."""
        if self._last is not None:
            self._grown += total - self._last if total >= self._last else total
        self._last = total
        points = self._points
        if points and now_s < points[-1][0]:  # a clock set back
            points.clear()
        if not points or now_s - points[-1][0] >= self._slot_s:
            points.append((now_s, self._grown))
        # The newest point at or before the window's begin stays as its base.
        while len(points) > 1 and points[1][0] <= now_s - self.window_s:
            points.popleft()
        return self._grown - points[0][1]
