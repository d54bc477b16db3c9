"""`memtierd -prompt` as a script drives it: a line in, what it prints until the next prompt string out."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.waiting import WAIT_S

_BESIDE = Path(sys.executable).parent / "memtierd"
MEMTIERD = _BESIDE if _BESIDE.exists() else Path(shutil.which("memtierd") or _BESIDE)
PROMPT = "memtierd> "
DEADLINE_S = WAIT_S


class Reader:
    """Bytes of a file descriptor, waited for with a deadline."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.seen = ""

    def until(self, end: str, deadline_s: float = DEADLINE_S) -> str:
        """What comes before `end`, which is taken too."""
        limit_s = time.monotonic() + deadline_s
        while end not in self.seen:
            left_s = limit_s - time.monotonic()
            ready, _, _ = select.select([self.fd], [], [], max(0.0, left_s))
            assert ready, f"no {end!r} within {deadline_s} s in {self.seen!r}"
            try:
                part = os.read(self.fd, 1 << 16)
            except OSError:  # the other end of a terminal is closed
                part = b""
            assert part, f"ended without {end!r}: {self.seen!r}"
            self.seen += part.decode("utf-8", "replace")
        found, _, self.seen = self.seen.partition(end)
        return found


class Daemon:
    """The program with its standard streams as pipes."""

    def __init__(self, *words: object) -> None:
        self.popen = subprocess.Popen(
            [str(MEMTIERD), "-prompt", *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stdout is not None
        self.reader = Reader(self.popen.stdout.fileno())
        self.reader.until(PROMPT)

    def tell(self, line: str) -> None:
        """A line, without waiting for its output."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()

    def ask(self, line: str) -> str:
        """A line, and its output."""
        self.tell(line)
        return self.reader.until(PROMPT)

    def ask_until(self, line: str, wanted: str, deadline_s: float = DEADLINE_S) -> str:
        """Ask again until the output holds `wanted`."""
        limit_s = time.monotonic() + deadline_s
        while wanted not in (found := self.ask(line)):
            assert time.monotonic() < limit_s, f"no {wanted!r} within {deadline_s} s: {found}"
            time.sleep(0.1)
        return found

    def end(self) -> tuple[int, str]:
        """End of input: (exit status, standard error)."""
        _, errors = self.popen.communicate(timeout=DEADLINE_S)
        return self.popen.returncode, errors


@contextmanager
def memtierd(*words: object) -> Iterator[Daemon]:
    """The program, killed in the end if the test did not end it."""
    daemon = Daemon(*words)
    try:
        yield daemon
    finally:
        daemon.popen.kill()
        daemon.popen.communicate()
