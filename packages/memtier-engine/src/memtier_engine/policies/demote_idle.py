"""Policy `demote-idle`: what one scan found untouched goes to the idle node, once and one way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveTask, ProcessId
from memtier_engine.pages.ages import AgeClock, ProcessPages
from memtier_engine.policies.base import BasePolicy, check_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoteIdlePolicyConfig:
    """The keys of the reference's `demote-idle` policy, with units in their names."""

    interval_ms: int = 5000
    """Time between scans and decisions (`intervalms`)."""
    idle_numas: tuple[int, ...]
    """The first is the destination (`idlenumas`)."""

    def __post_init__(self) -> None:
        check_interval(self.interval_ms)
        if not self.idle_numas or min(self.idle_numas) < SWAP_NODE:
            raise ConfigError(
                f"value {list(self.idle_numas)}", key_path="idlenumas", hint="a list of nodes, or [-1] for swap"
            )


class DemoteIdlePolicy(BasePolicy):
    """Untouched for a whole scan interval is idle; a page that was demoted is not asked for again."""

    name = "demote-idle"
    needs_places = True

    def __init__(self, config: DemoteIdlePolicyConfig) -> None:
        self.config = config
        self._interval_ms = config.interval_ms

    def decide(
        self, pages: Mapping[ProcessId, ProcessPages], clock: AgeClock, budget_bytes: int | None
    ) -> list[MoveTask]:
        """See `Policy.decide`."""
        node = self.config.idle_numas[0]
        left = None if budget_bytes is None else max(1, budget_bytes // PAGE_BYTES)
        tasks = []
        for process, own in pages.items():
            if left == 0:
                break
            spans = own.select(
                age_from=1,
                not_on_node=None if node == SWAP_NODE else node,
                limit_pages=left,
                leave_kept=node == SWAP_NODE,
            )
            if len(spans):
                tasks.append(MoveTask(process, spans, node, "idle"))
                left = None if left is None else left - int(spans.pages.sum())
        return tasks
