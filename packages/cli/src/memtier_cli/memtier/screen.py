"""What a long run says: states, messages and a result, to outputs that may be narrow, slow, full or gone.

On a terminal the state is one line that changes in place and messages stand above it; elsewhere it is one line after
the other, each with its time. Nothing here waits for whoever reads, or ends by an error of the output.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from loguru import logger

from memtier_cli.logqueue import LogQueue, lost_object, lost_text

_STDOUT, _STDERR = 1, 2
_CLEAR = "\r\x1b[K"
_FLUSH_S = 0.2
_FLUSH_TRIES = 50
"""At the end, for a reader that is slow; one that has lost lines already is not waited for."""


class Screen:
    """Standard output and error. A context manager: at its end all is written, as far as it is taken."""

    def __init__(self, *, as_json: bool = False, messages_as_json: bool = False) -> None:
        """Whether states, and messages, are JSON objects, one a line. States in words a terminal shows in place."""
        self.in_place = not as_json and os.isatty(_STDOUT) and os.environ.get("TERM") != "dumb"
        self._out = LogQueue(_STDOUT, tell_lost=_lost_object if as_json else _lost_text)
        self._err = LogQueue(_STDERR, tell_lost=lost_object if messages_as_json else lost_text)
        self._one_output = os.path.samestat(os.fstat(_STDOUT), os.fstat(_STDERR))
        self._utf8 = "utf-8" in (getattr(sys.stdout, "encoding", None) or "").lower()
        self._lock = threading.Lock()
        self._state = ""
        self._told = False

    def __enter__(self) -> Self:
        self._out.start()
        self._err.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._leave_state()
        _finish(self._out)
        if self._out.lost_total:
            self._tell_lost()
        _finish(self._err)

    def state(self, text: str) -> None:
        """Show a state; on a terminal in the place of the one before."""
        with self._lock:
            if self.in_place:
                self._state = self._plain(text)
                self._out.put(f"\r{self._state}\x1b[K")
            else:
                self._out.put(f"{self._plain(text)}\n")
        if self._out.lost_total:
            self._tell_lost()

    def message(self, text: str) -> None:
        """Show the lines of a message, above the state if there is one. From any thread."""
        text = self._encodable(text)
        with self._lock:
            if self._one_output:  # else their order would be any, and a state would be written into
                self._out.put(f"{_CLEAR if self._state else ''}{text}{self._state}")
            else:
                self._err.put(text)

    def result(self, text: str) -> None:
        """A last line below the state."""
        with self._lock:
            self._leave_state()
            self._out.put(f"{self._plain(text)}\n")

    @property
    def width(self) -> int:
        """Characters that a line in place has room for: the last column is left free, where some wrap."""
        return max(1, shutil.get_terminal_size().columns - 1)

    def _leave_state(self) -> None:
        if self._state:
            self._state = ""
            self._out.put("\n")

    def _tell_lost(self) -> None:
        if not self._told:
            self._told = True
            logger.warning("standard output takes no more: lines are lost, the work goes on")

    def _plain(self, text: str) -> str:
        return self._encodable("".join(each if each.isprintable() else ascii(each)[1:-1] for each in text))

    def _encodable(self, text: str) -> str:
        return text if self._utf8 else text.encode("ascii", "backslashreplace").decode("ascii")


def _lost_text(lost: int) -> str:
    return f"{lost} lines are lost here: nothing more was taken\n"


def _lost_object(lost: int) -> str:
    return f'{{"event": "lost", "lines": {lost}}}\n'


def _finish(queue: LogQueue) -> None:
    for _ in range(_FLUSH_TRIES):
        if queue.flush(_FLUSH_S) or queue.lost_total:
            break
    queue.close(0)


def fit(parts: Sequence[str], dispensable: Sequence[int], reason: str, width: int) -> str:
    """`parts` and then `reason` in one line of at most `width` characters.

    Args:
        parts: what is said, in the order in which it is shown.
        dispensable: indices of parts, those that go first at first.
        reason: its beginning is kept whatever else goes; empty if there is none.
        width: characters.
    """
    needed = min(len(reason), 2 * width // 3)
    shown = dict(enumerate(parts))
    for index in dispensable:
        if len(", ".join(shown.values())) + 2 * bool(needed) + needed <= width:
            break
        del shown[index]
    text = ", ".join([*shown.values(), *([reason] if reason else [])])
    return text if len(text) <= width else f"{text[: max(0, width - 3)]}..."[:width]
