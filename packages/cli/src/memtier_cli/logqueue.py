"""Lines for a log that may be full, slow or gone: put into a bounded queue, written by a thread of their own.

Whoever reads a program's log can stall (a hung disk under the container runtime's log writer, a terminal that was
stopped): a write then blocks for ever. Here nobody who has something to say waits for it; what does not fit is
counted and told when there is room again.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime

LINES_MAX = 4096
BYTES_MAX = 2 << 20
_WRITE_BYTES = 32 << 10
_AGAIN_S = 1.0


def lost_text(lost: int) -> str:
    """The line about lost ones."""
    return f"WARN: {lost} log lines are lost: the log's reader is too slow\n"


def lost_object(lost: int) -> str:
    """The same, for a log whose lines are JSON objects."""
    now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
    message = lost_text(lost).removeprefix("WARN: ").rstrip("\n")
    return f'{{"time": "{now}", "level": "WARN", "message": "{message}"}}\n'


class LogQueue:
    """Writes to a file descriptor. Methods may be called from any thread, but not from a signal handler."""

    def __init__(
        self,
        fd: int,
        *,
        tell_lost: Callable[[int], str] = lost_text,
        lines_max: int = LINES_MAX,
        bytes_max: int = BYTES_MAX,
    ) -> None:
        """Nothing is written before `start`. `tell_lost` makes the line about lost ones."""
        self.lost_total = 0
        self._fd = fd
        self._tell_lost = tell_lost
        self._lines_max, self._bytes_max = lines_max, bytes_max
        self._lines: deque[bytes] = deque()
        self._bytes = self._lost = 0
        self._writing = self._closing = self._torn = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="memtier-log", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def put(self, text: str) -> None:
        """Queue a line, with its line feed, or lose it; returns at once."""
        line = text.encode(errors="backslashreplace")
        with self._changed:
            if len(self._lines) >= self._lines_max or self._bytes + len(line) > self._bytes_max or self._closing:
                self._lost += 1
                self.lost_total += 1
                return
            self._lines.append(line)
            self._bytes += len(line)
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all is written; False if that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._lines or self._writing or self._lost), timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Write what is there, then no more; False if that took too long: what is left is lost."""
        written = self.flush(timeout_s)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        return written

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._lost or self._closing)
                if self._closing:
                    return
                data = self._take()
                self._writing = True
            try:
                written = self._write(data)
            finally:
                with self._changed:
                    self._writing = False
                    self._changed.notify_all()
            if not written:
                time.sleep(_AGAIN_S)  # nobody is there, or the disk is full: not as fast as lines come

    def _take(self) -> bytes:
        parts: list[bytes] = []
        size = 0
        while self._lines and size < _WRITE_BYTES:
            parts.append(self._lines.popleft())
            size += len(parts[-1])
        self._bytes -= size
        if not self._lines and self._lost:  # after those that came before them
            parts.append(self._tell_lost(self._lost).encode(errors="backslashreplace"))
            self._lost = 0
        return b"".join(parts)

    def _write(self, data: bytes) -> bool:
        if self._torn:  # else what comes next would be part of that line
            data = b"\n" + data
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:  # whoever shares the file made it so
                with contextlib.suppress(OSError):
                    select.select([], [self._fd], [], _AGAIN_S)
            except OSError:
                if written := data[: len(data) - len(view)]:
                    self._torn = not written.endswith(b"\n")
                lost = bytes(view).count(b"\n")
                with self._changed:
                    self._lost += lost
                    self.lost_total += lost
                return False
        self._torn = False
        return True
