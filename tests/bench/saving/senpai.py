"""The loop to compare with: `senpai.py CGROUP`. Asks the kernel for a little memory as long as nobody stalls for it.

In the manner of facebookincubator/senpai: a share of the cgroup's memory per turn, less the nearer its stall time
is to a limit, none above it. Its shares and turns are ten times as fast as there, as all times here.
"""

import sys
import time
from pathlib import Path

INTERVAL_S = 0.6
RECLAIM_SHARE = 0.005
STALL_LIMIT = 0.001  # share of the time


def wanted_bytes(current_bytes: int, stall_us: int, passed_s: float) -> int:
    """What to reclaim after a turn of `passed_s` with so much stall."""
    stall = stall_us / 1e6 / max(passed_s, 1e-6)
    return int(current_bytes * RECLAIM_SHARE * max(0.0, 1 - stall / STALL_LIMIT))


def main(cgroup: Path) -> None:
    """Until killed."""
    before_us, before_s = None, time.monotonic()
    while True:
        now_us, now_s = int((cgroup / "memory.pressure").read_text().split("total=")[1].split()[0]), time.monotonic()
        if before_us is not None:
            current_bytes = int((cgroup / "memory.current").read_text())
            try:
                size = wanted_bytes(current_bytes, now_us - before_us, now_s - before_s)
                (cgroup / "memory.reclaim").write_text(str(size))
            except OSError:  # EAGAIN: not all of it could be reclaimed
                pass
        before_us, before_s = now_us, now_s
        time.sleep(INTERVAL_S)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
