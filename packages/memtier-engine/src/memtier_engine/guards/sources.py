"""Counters of the kernel into what guards ask: is the node short, what was written to which swap. No IO."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from memtier_engine.guards.meters import DAY_S, WindowMeter

SHORT_S = 10.0
"""Direct reclaim within this time is a shortage: as long as the average that the pressure is taken from."""
AVAILABLE_LEAST = 0.05
"""Of MemTotal: less available is a shortage, whether or not somebody reclaims at this moment."""
_DIRECT = ("pgscan_direct", "pgsteal_direct")
DIRECT = ("allocstall", *_DIRECT)
"""How the names of the counters begin that tell of it."""


class ShortageMeter:
    """Whether the node itself is short of memory, and not one cgroup that sits at its own limit.

    /proc/pressure/memory has the stalls of all tasks, whatever they wait for: reclaim of a cgroup at its memory.max,
    pages coming back from swap. The node's own direct reclaim has counters that cgroups' reclaim does not touch.
    Source: mm/vmscan.c, `if (!cgroup_reclaim(sc))` before __count_vm_events(PGSCAN_*) and ALLOCSTALL.
    """

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def excuse(self, vmstat: Mapping[str, int], meminfo: Mapping[str, int], now_s: float) -> str:
        """Why stalls are not those of a node short of memory; empty: they are, or it cannot be told."""
        counts = [vmstat[name] for name in vmstat if name.startswith("allocstall") or name in _DIRECT]
        total, available = meminfo.get("MemTotal"), meminfo.get("MemAvailable")
        if not counts or not total or available is None:
            return ""
        direct = sum(counts)
        points = self._points
        if points and (now_s < points[-1][0] or direct < points[-1][1]):
            points.clear()
        points.append((now_s, direct))
        while len(points) > 1 and points[1][0] <= now_s - SHORT_S:
            points.popleft()
        if direct > points[0][1] or available < AVAILABLE_LEAST * total:
            return ""
        return f"the node has {available / total:.0%} of its memory available and reclaims none directly"


class SwapWrites:
    """Bytes written to swap on disk within a day, from totals since boot.

    Files have no counter: they get what the kernel wrote to swap in all and is not found on the swap devices.
    """

    def __init__(self) -> None:
        self._meter = WindowMeter(DAY_S)
        self._before: tuple[Mapping[str, int], Mapping[str, int], int] | None = None
        self._total = 0

    def add(
        self,
        disks: Mapping[str, int],
        devices: Mapping[str, int],
        all_swap: int | None,
        now_s: float,
        uptime_s: float | None,
    ) -> int:
        """Take a reading; returns what was written in the last 24 hours.

        Args:
            disks: bytes ever written to the disks behind swap devices, by area.
            devices: bytes ever written to all swap devices, those in RAM among them, by area.
            all_swap: bytes that the kernel ever wrote to swap. None: not known, or no swap is in a file.
            now_s: when.
            uptime_s: since when the totals count; None: not known.
        """
        in_all = all_swap or 0
        before, self._before = self._before, (disks, devices, in_all)
        if before is None:
            self._total = sum(disks.values()) + max(0, in_all - sum(devices.values()))
            if uptime_s is not None:
                self._meter.begin(self._total, uptime_s, now_s)
        else:
            in_files = max(0, in_all - before[2]) - _grown(before[1], devices)
            self._total += _grown(before[0], disks) + max(0, in_files)
        return self._meter.add(self._total, now_s)


def _grown(before: Mapping[str, int], after: Mapping[str, int]) -> int:
    """By which counters grew; one that is new or began anew counts from there."""
    return sum(max(0, total - before[name]) for name, total in after.items() if name in before)
