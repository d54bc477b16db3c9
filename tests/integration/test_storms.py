"""Processes that come and go all the time neither stall a step nor break it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from memtier_engine.engine.loop import Engine, EngineConfig
from memtier_engine.hostfs.host import Host
from memtier_engine.policies.age import AgePolicyConfig
from memtier_engine.targets.cgroups import CgroupsTarget
from memtier_engine.targets.pids import PidsTarget
from support.cgroups import temporary_cgroup
from support.guards import OWN_GUARDS
from support.swap import temporary_zram_swap
from support.waiting import WAIT_S
from support.workload import workload

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")

_STORM = """
import os, select, sys, time
made = 0
while not select.select([sys.stdin], [], [], 0.02)[0]:
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            time.sleep(0.3)
            os._exit(0)
        made += 1
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
print(made, flush=True)
"""
"""Until the end of its input."""
IDLE_S = 1.5


def swap_config() -> EngineConfig:
    return EngineConfig(
        scan_interval_ms=500, policy=AgePolicyConfig(interval_ms=500, swap_out_ms=int(1000 * IDLE_S)), guards=OWN_GUARDS
    )


def enter(cgroup: Path, pid: int) -> None:
    (cgroup / "cgroup.procs").write_text(str(pid))


def test_a_fork_storm_keeps_the_engine_from_nothing() -> None:
    """Hundreds of processes a second beside a steady one in the same cgroup: its cold part still goes out.

    Those that die before they are a scan interval old are left alone: hardly any of the storm's is ever tracked.
    """
    with temporary_zram_swap(512 << 20), temporary_cgroup("storm") as cgroup, workload(8, 24) as steady:
        enter(cgroup, steady.pid)
        storm = subprocess.Popen(
            [sys.executable, "-c", _STORM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        enter(cgroup, storm.pid)
        engine = Engine(CgroupsTarget(Host(), [cgroup]), swap_config())
        for report in engine.run(duration_s=WAIT_S):
            assert report.errors == ()
            if report.scans >= 12 and steady.swapped_share(steady.cold) >= 0.95:
                break
        output, _ = storm.communicate("end\n", timeout=WAIT_S)
        assert int(output) > 500
        assert steady.swapped_share(steady.cold) >= 0.95
        assert steady.hot_stayed(IDLE_S)


def test_processes_killed_at_any_moment_cost_only_their_own_data() -> None:
    """Forty kills at random moments of scans and moves; the survivor is served all along."""
    chance = random.Random(11)
    program = "import sys; held = bytearray(24 << 20); held[::4096] = b'x' * 6144; print(flush=True)"
    program += "; sys.stdin.read()"
    with temporary_zram_swap(1 << 30), workload(4, 24) as survivor:
        for turn in range(8):
            victims = [
                subprocess.Popen(
                    [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
                for _ in range(5)
            ]
            for victim in victims:
                assert victim.stdout is not None
                victim.stdout.readline()
            config = EngineConfig(
                scan_interval_ms=100, policy=AgePolicyConfig(interval_ms=100, swap_out_ms=200), guards=OWN_GUARDS
            )
            engine = Engine(PidsTarget(Host(), [survivor.pid, *(victim.pid for victim in victims)]), config)
            doomed = list(victims)
            for report in engine.run(duration_s=WAIT_S):
                if doomed and chance.random() < 0.5:
                    doomed.pop().kill()
                assert report.errors == ()
                served = turn < 7 or survivor.swapped_share(survivor.cold) >= 0.95
                if not doomed and report.scans >= 12 and served:
                    break
            assert not doomed
            for victim in victims:
                victim.kill()
                victim.communicate()
        assert survivor.popen.poll() is None
        assert survivor.swapped_share(survivor.cold) >= 0.95
