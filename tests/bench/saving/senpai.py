"""The loop to compare with: `senpai.py CGROUP`. Asks the kernel for a little memory as long as nobody stalls for it.

In the manner of facebookincubator/senpai: a share of the cgroup's memory per turn, less the nearer its stall time
is to a limit, none above it. Its shares and turns are ten times as fast as there, as all times here.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

INTERVAL_S = 0.6
RECLAIM_SHARE = 0.005
STALL_LIMIT = 0.001
"""Share of the time."""


def wanted_bytes(current_bytes: int, stall_us: int, passed_s: float) -> int:
    """What to reclaim after a turn of `passed_s` with so much stall."""
    stall = stall_us / 1e6 / max(passed_s, 1e-6)
    return int(current_bytes * RECLAIM_SHARE * max(0.0, 1 - stall / STALL_LIMIT))


def stall_total_us(cgroup: Path) -> int:
    """Time in which some task of the cgroup waited for memory."""
    return int((cgroup / "memory.pressure").read_text().split("total=")[1].split()[0])


def main(cgroup: Path) -> None:
    """Until killed."""
    before_us, before_s = stall_total_us(cgroup), time.monotonic()
    while True:
        time.sleep(INTERVAL_S)
        now_us, now_s = stall_total_us(cgroup), time.monotonic()
        size = wanted_bytes(int((cgroup / "memory.current").read_text()), now_us - before_us, now_s - before_s)
        before_us, before_s = now_us, now_s
        if size >= 4096:
            try:
                (cgroup / "memory.reclaim").write_text(str(size))
            except OSError:  # EAGAIN: not all of it could be reclaimed
                pass


if __name__ == "__main__":
    main(Path(sys.argv[1]))
