"""Policy `auto` on a real process: cold memory leaves without a threshold, hot memory stays."""

from __future__ import annotations

import os

import pytest

from memtier_engine.auto import auto_engine
from memtier_engine.engine import EngineConfig
from memtier_engine.hostfs.host import Host
from memtier_engine.mover.mover import MoverConfig
from memtier_engine.policies.auto import AutoPolicyConfig
from memtier_engine.policies.goals import Goal
from memtier_engine.targets.pids import PidsTarget
from support.guards import OWN_GUARDS
from support.swap import temporary_zram_swap
from support.workload import workload

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")


def test_a_refault_goal_finds_the_cold_memory_of_a_real_process_by_itself() -> None:
    """Windows of 1.5 s instead of a minute, for the test."""
    policy = AutoPolicyConfig(goal=Goal("refaults", 1.0), interval_ms=300, window_ms=1500, idle_least_s=1.0)
    config = EngineConfig(scan_interval_ms=300, mover=MoverConfig(bandwidth_mib_per_s=400), guards=OWN_GUARDS)
    with temporary_zram_swap(512 << 20), workload(16, 48, write=True) as load:
        engine = auto_engine(PidsTarget(Host(), [load.pid]), policy, config)
        for report in engine.run(duration_s=30):  # noqa: B007
            if load.swapped_share(load.cold) >= 0.95:
                break
        assert load.swapped_share(load.cold) >= 0.95, engine.policy.state  # type: ignore[attr-defined]
        assert load.swapped_share(load.hot) <= 0.02
        assert report.refaults.precision is not None
        assert report.refaults.precision >= 0.98
