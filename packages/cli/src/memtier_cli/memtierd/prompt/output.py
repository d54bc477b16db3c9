"""Where a prompt's output goes: standard output, and on demand the log as well or instead."""

from __future__ import annotations

import threading
from typing import Protocol

from memtier_cli.libraries import logger


class Stream(Protocol):
    """What can be written to."""

    def write(self, text: str, /) -> object:
        """Take text."""

    def flush(self) -> object:
        """Pass it on."""


class Output:
    """Text goes out at once. Writes of several threads are not mixed within one call."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._line = ""
        self.to_stream = True
        self.to_log = False
        self.prefix = ""
        """Put before each line in the log."""

    def write(self, text: str) -> None:
        """Text as it is."""
        if not text:
            return
        with self._lock:
            if self.to_stream:
                self._stream.write(text)
                self._stream.flush()
            if self.to_log:
                *lines, self._line = (self._line + text).split("\n")
                for line in lines:
                    logger().info("{}{}", self.prefix, line)

    def banner(self, text: str) -> None:
        """The prompt string: nothing for the log."""
        if self.to_stream:
            with self._lock:
                self._stream.write(text)
                self._stream.flush()
