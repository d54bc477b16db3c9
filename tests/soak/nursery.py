"""Processes that live for seconds, cheaply: one parent that forks, so that a birth costs no interpreter start.

`python -m soak.nursery` reads a line `CGROUP MIB SECONDS` per process. Each joins the cgroup, fills memory, keeps a
quarter of it in use, and exits when its time is over; some fork a child that dies first.
"""

from __future__ import annotations

import mmap
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

PAGE = 4096


class Nursery:
    """The parent, as a context manager; at the end all its processes are dead."""

    def __enter__(self) -> Self:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "soak.nursery"], stdin=subprocess.PIPE, text=True, env=environment
        )
        self.births = 0
        return self

    def bear(self, cgroup: Path, mib: int, life_s: float) -> None:
        """One more process, soon."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(f"{cgroup} {mib} {life_s}\n")
        self._popen.stdin.flush()
        self.births += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        self._popen.wait(30)


def _live(cgroup: str, mib: int, life_s: float) -> None:
    try:
        Path(cgroup, "cgroup.procs").write_text("0")
    except OSError:  # the container was stopped meanwhile
        return
    end_s = time.monotonic() + life_s
    if random.random() < 0.2 and (child := os.fork()) == 0:
        time.sleep(life_s / 2)
        os._exit(0)
    else:
        child = 0
    size = mib << 20
    held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    while (left_s := end_s - time.monotonic()) > 0:
        for at in range(0, size, PAGE):
            held[at] = 1
        size = (mib << 20) // 4
        time.sleep(min(left_s, 0.5))
    if child:
        os.waitpid(child, 0)


def main() -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], 0.5)
        while os_wait():
            pass
        if not readable:
            continue
        line = sys.stdin.readline()
        if not line:
            break
        cgroup, mib, life_s = line.rsplit(" ", 2)
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _live(cgroup, int(mib), float(life_s))
            os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)


def os_wait() -> bool:
    """Reap one child; False if none has ended."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] > 0
    except ChildProcessError:
        return False


if __name__ == "__main__":
    main()
