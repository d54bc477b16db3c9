"""How many lines a log takes about one matter, such as a container: nobody fills it, nor pushes out what others say."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

LINES_MOST = 100
WINDOW_S = 600.0
MATTERS_MOST = 4096
"""Those that were not heard of for longest are forgotten, and begin anew."""


@dataclass(slots=True)
class _Window:
    began_s: float
    taken: int = 0
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """What is to be done with a line."""

    wanted: bool
    is_full: bool = False
    """It is the first that has no place: say so once."""
    left_out: int = 0
    """Before this line, not told yet."""


class LogQuota:
    """So many lines within a window of time. Not for several threads at once."""

    def __init__(
        self,
        *,
        lines_most: int = LINES_MOST,
        window_s: float = WINDOW_S,
        matters_most: int = MATTERS_MOST,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """A window begins with the first line about a matter after the last one's end."""
        self._lines_most = lines_most
        self._window_s = window_s
        self._matters_most = matters_most
        self._now_s = now_s
        self._windows: OrderedDict[str, _Window] = OrderedDict()

    def place(self, matter: str) -> Place:
        """For one more line."""
        now_s = self._now_s()
        window = self._windows.get(matter)
        left_out = 0
        if window is None or now_s - window.began_s >= self._window_s:
            left_out = 0 if window is None else window.left_out
            window = self._windows[matter] = _Window(now_s)
        self._windows.move_to_end(matter)
        if len(self._windows) > self._matters_most:
            self._windows.popitem(last=False)
        if window.taken < self._lines_most:
            window.taken += 1
            return Place(True, left_out=left_out)
        window.left_out += 1
        return Place(False, is_full=window.left_out == 1)
