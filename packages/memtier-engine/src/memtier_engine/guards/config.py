"""The thresholds of all guards. The defaults are meant for a node that does other people's work."""

from __future__ import annotations

from dataclasses import dataclass, field

from memtier_engine.errors import ConfigError
from memtier_engine.guards.base import GIB, MIB, Thresholds
from memtier_engine.guards.skip import SkipRules

MEMORY_PSI_NODE = Thresholds(close_at=10.0, open_at=5.0)
MEMORY_PSI_CGROUP = Thresholds(close_at=5.0, open_at=2.0)
IO_PSI_NODE = Thresholds(close_at=50.0, open_at=25.0, fast_at=90.0)
IO_PSI_CGROUP = Thresholds(close_at=30.0, open_at=15.0, fast_at=90.0)
SWAP_FILL = Thresholds(close_at=90.0, open_at=85.0)
COMPRESSION = Thresholds(close_at=1.2, open_at=1.4)
REFAULTS = Thresholds(close_at=5.0, open_at=2.0)

COMPRESSION_LEAST_BYTES = 64 * MIB
"""Less than this in zram and zswap says nothing about how well memory here compresses."""
_HIGH_CLOSES = (
    "memory_psi_node",
    "memory_psi_cgroup",
    "io_psi_node",
    "io_psi_cgroup",
    "swap_fill",
    "refaults",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardsConfig:
    """All guards of an engine. None switches a guard off."""

    memory_psi_node: Thresholds | None = MEMORY_PSI_NODE
    """Percent of time in which some task of the node waited for memory, over 10 s (`some avg10`). More than
    that is a node short of memory, where paging out adds faults."""
    memory_psi_cgroup: Thresholds | None = MEMORY_PSI_CGROUP
    """The same of the engine's own cgroup: its stalls may be our doing, so less of it closes."""
    io_psi_node: Thresholds | None = IO_PSI_NODE
    """Percent of time in which some task waited for block devices. Builds and backups do that too, hence high."""
    io_psi_cgroup: Thresholds | None = IO_PSI_CGROUP
    swap_fill: Thresholds | None = SWAP_FILL
    """Percent of all swap in use: the rest is the kernel's reserve for real need."""
    swap_writes_bytes_per_day: int | None = 84 * GIB
    """Written to swap on disk in the last 24 hours; some 1 MiB/s, which wears out no current SSD in its
    warranted life. Swap in RAM (zram) does not count."""
    compression: Thresholds | None = COMPRESSION
    """Original size by memory used in zram and zswap. Below 1.2 paging out saves under a sixth and costs CPU."""
    refaults: Thresholds | None = REFAULTS
    """Percent that came back early of what was paged out of a process, or of its memory in RAM within a minute: from
    `close_at` on its pages must be idle for longer to go out (see `pages.governor`). Policy `reclaim`: percent of the
    cgroups' memory that came back within the last minute."""
    protection: bool = True
    """Leave a cgroup what its memory.min and memory.low guarantee: MADV_PAGEOUT does not look at them."""
    start_grace_s: float | None = None
    """Move nothing for so long after the start. None: two scan intervals; 0: off."""
    skip: SkipRules = field(default_factory=SkipRules)
    """Processes that nothing is taken from."""

    def __post_init__(self) -> None:
        for name in _HIGH_CLOSES:
            limits: Thresholds | None = getattr(self, name)
            if limits is not None and not 0 <= limits.open_at <= limits.close_at <= 100:
                raise ConfigError(
                    f"closes at {limits.close_at:g} %, opens at {limits.open_at:g} %",
                    key_path=f"guards.{name}",
                    hint="use percents from 0 to 100, opening at or below where it closes",
                )
        ratio = self.compression
        if ratio is not None and not 0 < ratio.close_at < ratio.open_at:
            raise ConfigError(
                f"closes at {ratio.close_at:g}, opens at {ratio.open_at:g}",
                key_path="guards.compression",
                hint="use ratios above 0, opening above where it closes",
            )
        if self.swap_writes_bytes_per_day is not None and self.swap_writes_bytes_per_day <= 0:
            raise ConfigError(
                f"value {self.swap_writes_bytes_per_day}",
                key_path="guards.swap_writes_bytes_per_day",
                hint="use a size above 0, or leave it out",
            )
        if self.start_grace_s is not None and self.start_grace_s < 0:
            raise ConfigError(f"value {self.start_grace_s}", key_path="guards.start_grace_s", hint="use 0 s or more")
