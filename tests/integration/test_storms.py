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
from support.workload import workload

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")

_STORM = """
import os, time
end = time.monotonic() + 6
made = 0
while time.monotonic() < end:
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
    time.sleep(0.02)
print(made, flush=True)
"""


def swap_config() -> EngineConfig:
    return EngineConfig(
        scan_interval_ms=500, policy=AgePolicyConfig(interval_ms=500, swap_out_ms=1500), guards=OWN_GUARDS
    )


def enter(cgroup: Path, pid: int) -> None:
    (cgroup / "cgroup.procs").write_text(str(pid))


def test_a_fork_storm_does_not_stall_a_step() -> None:
    """Hundreds of processes a second beside a steady one in the same cgroup: its cold part still goes out."""
    with temporary_zram_swap(512 << 20), temporary_cgroup("storm") as cgroup, workload(8, 24) as steady:
        enter(cgroup, steady.pid)
        storm = subprocess.Popen([sys.executable, "-c", _STORM], stdout=subprocess.PIPE, text=True)
        enter(cgroup, storm.pid)
        engine = Engine(CgroupsTarget(Host(), [cgroup]), swap_config())
        slowest_s = max(report.scan_seconds for report in engine.run(duration_s=6))
        output, _ = storm.communicate(timeout=30)
        assert int(output) > 500
        assert slowest_s < 1.0
        assert steady.swapped_share(steady.cold) >= 0.95
        assert steady.swapped_share(steady.hot) <= 0.02


def test_processes_killed_at_any_moment_cost_only_their_own_data() -> None:
    """Forty kills at random moments of scans and moves; the survivor is served all along."""
    chance = random.Random(11)
    program = "import sys; held = bytearray(24 << 20); held[::4096] = b'x' * 6144; print(flush=True)"
    program += "; sys.stdin.read()"
    with temporary_zram_swap(1 << 30), workload(4, 24) as survivor:
        for _ in range(8):
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
            for report in engine.run(duration_s=2):
                if doomed and chance.random() < 0.5:
                    doomed.pop().kill()
                assert report.errors == ()
            for victim in victims:
                victim.kill()
                victim.communicate()
        assert survivor.popen.poll() is None
        assert survivor.swapped_share(survivor.cold) >= 0.95
