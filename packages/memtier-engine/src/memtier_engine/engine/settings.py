"""How an engine works on its target: what the library takes, and what a configuration file becomes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from memtier_engine.errors import ConfigError
from memtier_engine.guards.config import GuardsConfig
from memtier_engine.mover.mover import MoverConfig
from memtier_engine.policies.age import AgePolicyConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine works on its target."""

    tracker: str = "auto"
    scan_interval_ms: int = 5000
    """Time between looks at every page."""
    policy: AgePolicyConfig = field(default_factory=AgePolicyConfig)
    mover: MoverConfig = field(default_factory=MoverConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    """When to move nothing."""
    dry_run: bool = False
    """Decide and report, but move nothing."""
    count_swap_ins: bool = True
    """Have the kernel count swap-ins and their duration as they happen (by BPF where it works, else by its delay
    accounting where that is on), in processes that memory went out of. BPF adds a twentieth to the cost of every page
    fault on the machine, a fifth in those processes."""

    def __post_init__(self) -> None:
        if self.scan_interval_ms <= 0:
            raise ConfigError(
                f"value {self.scan_interval_ms}",
                key_path="tracker.scanintervalms",
                hint="use 1 or more; default 5000",
            )


def swap_config(config: EngineConfig | None, idle_after_s: float) -> EngineConfig:
    """`config`, or the default, with a policy that pages out what is idle for so long.

    Raises:
        ConfigError: not above 0.
    """
    if idle_after_s <= 0:
        raise ConfigError(f"value {idle_after_s}", key_path="idle_after_s", hint="use more than 0 seconds")
    config = config or EngineConfig(scan_interval_ms=max(100, min(5000, int(idle_after_s * 250))))
    swap = replace(config.policy, swap_out_ms=int(idle_after_s * 1000), interval_ms=config.scan_interval_ms)
    return replace(config, policy=swap)
