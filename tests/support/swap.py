"""A zram swap for tests that page out, taken away afterwards."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.proc import read_swaps
from support.waiting import until

_CONTROL = Path("/sys/class/zram-control")


_MEMORY_PRESSURE = Path("/proc/pressure/memory")
_CALM_PERCENT = 4.0  # below where the guard on the node's memory pressure opens again


def calm_down(deadline_s: float = 60.0) -> None:
    """Wait until what came back from swap in the test before no longer counts as pressure of the node."""
    end_s = time.monotonic() + deadline_s
    while _MEMORY_PRESSURE.exists() and time.monotonic() < end_s:
        if float(_MEMORY_PRESSURE.read_text().partition("avg10=")[2].split()[0]) < _CALM_PERCENT:
            return
        time.sleep(0.5)


def swap_is_on() -> bool:
    """Whether the machine has any swap."""
    return len(Path("/proc/swaps").read_text().splitlines()) > 1


@contextmanager
def temporary_zram_swap(size_bytes: int, *, own: bool = False, calm: bool = True) -> Iterator[None]:
    """Swap for the time of the test: a zram device made and removed here, preferred to all others.

    Where none can be made it is the machine's own, if there is enough. That may be a slow disk, whose reads bring in
    neighbours too, or belong to somebody who switches it off meanwhile, so that all comes back.

    `own`: then the test is skipped instead, since its verdict hangs on that.
    `calm`: wait until the node's memory pressure is low before, for engines whose guards look at it.
    """
    if calm:
        calm_down()
    if not _CONTROL.exists():
        subprocess.run(["modprobe", "zram", "num_devices=0"], check=False, capture_output=True)
    areas = read_swaps(Host())
    try:
        number = int((_CONTROL / "hot_add").read_text())
    except OSError as error:
        if own or sum(area.free_bytes for area in areas) < size_bytes:
            pytest.skip(f"needs swap, or root and a kernel with zram (CONFIG_ZRAM) to make one: {error}")
        yield
        return
    device = f"/dev/zram{number}"
    highest = max((area.priority for area in areas), default=0)
    try:
        Path(f"/sys/block/zram{number}/disksize").write_text(str(size_bytes))
        subprocess.run(["mkswap", device], check=True, capture_output=True)
        subprocess.run(["swapon", "-p", str(min(max(highest, 0) + 1, 32767)), device], check=True)
        yield
    finally:
        subprocess.run(["swapoff", device], check=False, capture_output=True)
        until(lambda: _removed(number), f"{device} could not be removed")


def _removed(number: int) -> bool:
    try:
        (_CONTROL / "hot_remove").write_text(str(number))
    except OSError:  # EBUSY: udev looks at every device that changes
        return False
    return True
