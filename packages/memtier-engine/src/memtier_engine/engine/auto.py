"""A target and a goal in, an engine with policy `auto` out: the parts that belong together, put together."""

from __future__ import annotations

from collections.abc import Sequence

from memtier_engine.clock import Clock, SystemClock
from memtier_engine.engine.loop import Engine, EngineConfig
from memtier_engine.guards.gauges import HostGauges
from memtier_engine.hostfs.host import Host
from memtier_engine.model import Tracker
from memtier_engine.pages.refaults import RefaultLedger
from memtier_engine.policies.auto import AutoPolicy, AutoPolicyConfig
from memtier_engine.stats.observer import Observer
from memtier_engine.targets.base import Target, innermost
from memtier_engine.targets.cgroups import CgroupsTarget

REMEMBER_S = 2 * 3600.0
"""Refaults after a longer time count as if they came after this: goals are about minutes."""


def auto_engine(
    target: Target,
    policy: AutoPolicyConfig,
    config: EngineConfig | None = None,
    *,
    host: Host | None = None,
    clock: Clock | None = None,
    tracker: Tracker | None = None,
    observers: Sequence[Observer] = (),
) -> Engine:
    """An engine that works for the goal of `policy`; of `config`, its own policy has no effect.

    Raises:
        TrackerUnavailable: the tracker does not work here.
    """
    host = host or Host()
    source = innermost(target)
    gauges = HostGauges(host, source.directories() if isinstance(source, CgroupsTarget) else ())
    gauges.stall_percent((clock or SystemClock()).now_s())  # the first window has a beginning
    ledger = RefaultLedger(remember_s=REMEMBER_S, gaps=True)
    return Engine(
        target,
        config,
        host=host,
        clock=clock,
        tracker=tracker,
        policy=AutoPolicy(policy, ledger, gauges),
        refaults=ledger,
        observers=observers,
    )
