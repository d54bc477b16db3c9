"""Totals that only grow and a time in, amounts within a recent window out. No IO."""

from __future__ import annotations

from collections import deque

DAY_S = 24 * 3600.0


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


class StoredMeter:
    """How well what one engine stored compresses: its own batches only. No IO.

    What does not compress is not asked again at once: after `window_s` so much goes out as it takes to tell, and where
    that does not compress either, the next time is twice as far away.
    """

    def __init__(self, least_bytes: int, window_s: float = 600.0) -> None:
        """`least_bytes`: less than this says nothing; `window_s`: for so long a batch counts."""
        self._least = least_bytes
        self._first_s = self.window_s = window_s
        self._batches: deque[tuple[float, int, int]] = deque()  # (time, original, stored)
        self._original = self._stored = 0
        self.unknown_bytes = 0
        """Moved without anybody knowing what it takes, since something was known."""

    def add(self, moved_bytes: int, stored_bytes: int | None, now_s: float) -> None:
        """A batch of `moved_bytes` takes `stored_bytes`; None: not known."""
        if stored_bytes is None:
            self.unknown_bytes += moved_bytes
            return
        self.unknown_bytes = 0
        self._original += moved_bytes
        self._stored += max(0, stored_bytes)
        self._batches.append((now_s, moved_bytes, max(0, stored_bytes)))

    def ratio(self, close_at: float, now_s: float) -> float | None:
        """Original by stored size of what went out lately; None: too little to tell."""
        ratio = self._ratio()
        while self._batches and not 0 <= now_s - self._batches[0][0] < self.window_s:
            _, original, stored = self._batches.popleft()
            self._original -= original
            self._stored -= stored
        left = self._ratio()
        if ratio is not None:
            if ratio > close_at:
                self.window_s = self._first_s
            elif left is None:  # all that was known is forgotten: it may be tried again
                self.window_s = min(DAY_S, 2 * self.window_s)
                self._batches.clear()
                self._original = self._stored = 0
        return left

    def _ratio(self) -> float | None:
        return None if self._original < self._least else self._original / max(1, self._stored)
