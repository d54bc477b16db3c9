"""Policy `auto` on a real process: cold memory leaves without a threshold, hot memory stays."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from memtier_engine.engine.auto import auto_engine
from memtier_engine.engine.loop import EngineConfig, StepReport
from memtier_engine.hostfs.host import Host
from memtier_engine.mover.mover import MoverConfig
from memtier_engine.policies.auto import AutoPolicyConfig
from memtier_engine.policies.goals import Goal
from memtier_engine.targets.pids import PidsTarget
from support.guards import OWN_GUARDS
from support.swap import temporary_zram_swap
from support.waiting import WAIT_S
from support.workload import workload

IDLE_LEAST_S = 1.0
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")


def test_a_refault_goal_finds_the_cold_memory_of_a_real_process_by_itself() -> None:
    """Windows of 1.5 s instead of a minute, for the test."""
    policy = AutoPolicyConfig(goal=Goal("refaults", 1.0), interval_ms=300, window_ms=1500, idle_least_s=IDLE_LEAST_S)
    config = EngineConfig(scan_interval_ms=300, mover=MoverConfig(bandwidth_mib_per_s=400), guards=OWN_GUARDS)
    with temporary_zram_swap(512 << 20), workload(16, 48, write=True) as load:
        engine = auto_engine(PidsTarget(Host(), [load.pid]), policy, config)
        for report in engine.run(duration_s=WAIT_S):  # noqa: B007
            if load.swapped_share(load.cold) >= 0.95:
                break
        assert load.swapped_share(load.cold) >= 0.95, engine.policy.state  # type: ignore[attr-defined]
        assert load.hot_stayed(IDLE_LEAST_S)
        assert report.refaults.precision is not None
        assert report.refaults.precision >= 0.98 or load.longest_pause_s() > IDLE_LEAST_S / 2


_PHASES = """
import mmap, select, sys, time
area = mmap.mmap(-1, 96 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)
for at in range(0, 96 << 20, 4096):
    area[at : at + 8] = at.to_bytes(8, "little")
print("ready", flush=True)
hot, longest, began = 0, 0.0, time.monotonic()
while True:
    for at in range(hot << 20, (hot + 16) << 20, 4096):
        area[at]
    longest, began = max(longest, time.monotonic() - began), time.monotonic()
    if select.select([sys.stdin], [], [], 0.02)[0]:
        hot = int(sys.stdin.readline())
        print(longest, flush=True)  # for how long it left a hot page alone at most
        longest, began = 0.0, time.monotonic()
"""
PHASE_WINDOW_S = 2.0
PHASE_GOAL_PERCENT = 20.0
WINDOWS_AFTER = 6


def test_after_a_phase_change_refaults_are_under_the_goal_within_three_windows_and_savings_come_back() -> None:
    """The hot 16 of 96 MiB become other 16 MiB, which are out: they come back once, and the old ones go.

    Windows of 2 s instead of a minute; without the guard on refaults, which would stop all for a minute.
    """
    policy = AutoPolicyConfig(
        goal=Goal("refaults", PHASE_GOAL_PERCENT),
        interval_ms=300,
        window_ms=int(1000 * PHASE_WINDOW_S),
        idle_least_s=IDLE_LEAST_S,
    )
    guards = replace(OWN_GUARDS, refaults=None)
    config = EngineConfig(scan_interval_ms=300, mover=MoverConfig(bandwidth_mib_per_s=400), guards=guards)
    with temporary_zram_swap(128 << 20):
        popen = subprocess.Popen(
            [sys.executable, "-c", _PHASES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert popen.stdin is not None
        assert popen.stdout is not None
        try:
            popen.stdout.readline()
            engine = auto_engine(PidsTarget(Host(), [popen.pid]), policy, config)
            moved: StepReport | None = None
            # By windows since the move: percent of the memory in RAM per minute, and what came back until then.
            counted: list[tuple[float, int]] = []
            before: StepReport | None = None
            for report in engine.run(duration_s=2 * WAIT_S):
                if moved is None:
                    if report.paged_out_bytes >= 76 << 20:
                        popen.stdin.write("48\n")
                        popen.stdin.flush()
                        popen.stdout.readline()
                        moved = before = report
                    continue
                assert before is not None
                if report.time_s - before.time_s >= PHASE_WINDOW_S:
                    came = report.refault_bytes_total - before.refault_bytes_total
                    minutes = (report.time_s - before.time_s) / 60
                    back = report.refault_bytes_total - moved.refault_bytes_total
                    counted.append((100 * came / report.resident_bytes / minutes, back))
                    before = report
                over = [rate for rate, back in counted if back >= 15 << 20]  # the first of these brought it back
                if len(over) >= WINDOWS_AFTER and report.paged_out_bytes >= 76 << 20:
                    break
            popen.stdin.write("48\n")
            popen.stdin.flush()
            longest_s = float(popen.stdout.readline())
            assert moved is not None, f"the cold memory did not go out: {engine.policy.state}"  # type: ignore[attr-defined]
            assert over, f"the new hot set was out and had to come back: {counted}"
            assert max(rate for rate, _ in counted) > PHASE_GOAL_PERCENT
            assert report.paged_out_bytes >= 76 << 20, f"the old hot set did not go out: {engine.policy.state}"  # type: ignore[attr-defined]
            if longest_s > IDLE_LEAST_S / 2:
                return  # the machine kept it from running: its hot set was idle, and came back more than once
            assert max(over[3:]) <= PHASE_GOAL_PERCENT, counted
            assert counted[-1][1] <= 20 << 20, "and it came back only once"
        finally:
            popen.kill()
            popen.wait()
            popen.stdin.close()
            popen.stdout.close()
