"""What goals of policy `auto` ask of the machine: the stall time since the last question, and available memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from memtier_engine.errors import KernelCallError
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.proc import meminfo
from memtier_engine.hostfs.psi import read_pressure


class HostGauges:
    """Reads memory.pressure of the engine's cgroups, or the node's where it has none, and /proc/meminfo."""

    def __init__(self, host: Host, cgroups: Sequence[Path] = ()) -> None:
        """`cgroups`: directories, which may come and go."""
        self._host = host
        paths = [path / "memory.pressure" for path in cgroups] or [host.path("proc", "pressure", "memory")]
        self._totals_us: dict[Path, tuple[int, float] | None] = dict.fromkeys(paths)

    def stall_percent(self, now_s: float) -> float | None:
        """Share of the time since the last call in which some task waited for memory, of the worst cgroup.

        None: there is no pressure information, or this is the first call.
        """
        shares = []
        for path, before in self._totals_us.items():
            try:
                pressure = read_pressure(self._host, path)
            except (KernelCallError, ValueError):
                pressure = None
            if pressure is None:
                self._totals_us[path] = None
                continue
            total_us = pressure.some.total_us
            self._totals_us[path] = (total_us, now_s)
            # A total that fell is that of a new cgroup of the same name.
            if before is not None and now_s > before[1] and total_us >= before[0]:
                shares.append((total_us - before[0]) / (now_s - before[1]) / 1e4)
        return max(shares, default=None)

    def available_bytes(self) -> int | None:
        """MemAvailable; None: /proc/meminfo cannot be read."""
        try:
            return meminfo(self._host).get("MemAvailable")
        except KernelCallError:
            return None
