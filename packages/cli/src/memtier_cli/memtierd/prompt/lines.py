"""Where the lines of a session come from: text, a stream, or a person at a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from memtier_cli.memtierd.prompt.output import Output

LINE_BYTES_MAX = 1 << 20


class LineTooLong(Exception):
    """A line of more than `LINE_BYTES_MAX`; it was skipped."""


class Lines(Protocol):
    """Lines, one after the other."""

    interactive: bool
    """Whether a person types them."""

    def read(self, prompt: str, output: Output) -> str | None:
        """The next line without its end; None: there are no more. Prints the prompt string first."""


class StreamLines:
    """Lines of a byte stream. What comes after the last newline is never run: it may be half a command."""

    interactive = False

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def read(self, prompt: str, output: Output) -> str | None:
        """See `Lines.read`."""
        output.banner(prompt)
        line = self._stream.readline(LINE_BYTES_MAX)
        if len(line) == LINE_BYTES_MAX and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = self._stream.readline(LINE_BYTES_MAX)
            raise LineTooLong(f"line of more than {LINE_BYTES_MAX} bytes skipped")
        if not line.endswith(b"\n"):
            return None
        return line[:-1].decode("utf-8", "surrogateescape").removesuffix("\r")


class TextLines:
    """The lines of a text; the last one needs no newline, and is empty if the text ends with one."""

    interactive = False

    def __init__(self, text: str) -> None:
        self._lines: Iterator[str] = iter(text.split("\n"))

    def read(self, prompt: str, output: Output) -> str | None:
        """See `Lines.read`."""
        output.banner(prompt)
        return next(self._lines, None)


def standard_input() -> Lines:
    """A terminal with line editing if standard input and output are one, else plain lines."""
    if sys.stdin is None:  # closed before we started
        return TextLines("q")
    if sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty():
        from memtier_cli.memtierd.prompt.terminal import TerminalLines

        return TerminalLines(history_file())
    return StreamLines(sys.stdin.buffer)


def history_file() -> Path | None:
    """Where lines typed are kept; None: nowhere, when there is no home directory."""
    state = os.environ.get("XDG_STATE_HOME", "")
    if state.startswith("/"):
        return Path(state, "memtier", "memtierd_history")
    home = os.environ.get("HOME", "")
    return Path(home, ".local", "state", "memtier", "memtierd_history") if home.startswith("/") else None
