"""Guards on the real kernel: real stalls stop the moving within a second, real processes are left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from memtier_engine.engine.loop import Engine, EngineConfig
from memtier_engine.guards.base import Thresholds
from memtier_engine.guards.config import GuardsConfig
from memtier_engine.guards.processes import FactsReader
from memtier_engine.guards.readers import CgroupReader, PressureReader
from memtier_engine.guards.skip import SkipRules
from memtier_engine.hostfs.cgroup import Cgroup
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.mover.mover import MoverConfig
from memtier_engine.policies.age import AgePolicyConfig
from memtier_engine.targets.cgroups import CgroupsTarget
from memtier_engine.targets.pids import PidsTarget
from support.cgroups import temporary_cgroup
from support.guards import OWN_GUARDS
from support.swap import temporary_zram_swap
from support.workload import workload

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")

MEMORY_PRESSURE = Path("/proc/pressure/memory")
LIMITS = Thresholds(close_at=2.0, open_at=1.5, hold_s=2.0)
_STALLER = """
import mmap
open("/proc/self/comm", "w").write("staller")
held = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
held.madvise(mmap.MADV_NOHUGEPAGE)
for at in range(0, 64 << 20, 4096):
    held[at:at + 8] = at.to_bytes(8, "little")
print("ready", flush=True)
while True:
    for _ in range(2):  # twice: only pages that were in active use stall when they come back
        sum(held[::4096])
    held.madvise(21)  # MADV_PAGEOUT
"""


@contextmanager
def stalls(cgroup: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process that waits for its own memory to come back from swap, again and again."""
    popen = subprocess.Popen([sys.executable, "-c", _STALLER], stdout=subprocess.PIPE, text=True)
    assert popen.stdout is not None
    try:
        popen.stdout.readline()
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text(str(popen.pid))
        yield popen
    finally:
        popen.kill()
        popen.wait()
        popen.stdout.close()


def needs_psi() -> None:
    if not MEMORY_PRESSURE.exists():
        pytest.skip("needs pressure stall information: CONFIG_PSI=y and psi=1; `make e2e` has it in the test VM")


def test_the_kernel_takes_our_trigger_and_it_fires() -> None:
    needs_psi()
    reader = PressureReader(Host(), MEMORY_PRESSURE, LIMITS, trigger=True)
    with temporary_zram_swap(512 << 20):
        assert reader.read(time.monotonic()).value is not None
        assert reader.has_trigger
        reader.poll(0)
        with stalls():
            end_s = time.monotonic() + 10
            while not reader.poll(time.monotonic()):
                assert time.monotonic() < end_s, "the trigger did not fire"
                time.sleep(0.05)
    reader.close()
    assert not reader.has_trigger


def test_a_recreated_cgroup_gets_a_trigger_of_its_own() -> None:
    needs_psi()
    with temporary_cgroup("guards") as path:
        if not (path / "memory.pressure").exists():
            pytest.skip(
                "needs memory.pressure in cgroups: a kernel with CONFIG_PSI and cgroup_disable without pressure"
            )
        reader = PressureReader(Host(), path / "memory.pressure", LIMITS, trigger=True)
        reader.read(0)
        first = reader.has_trigger
        path.rmdir()
        gone = reader.read(1)
        assert gone.value is None
        assert not reader.has_trigger
        path.mkdir()
        assert reader.read(2).value == 0.0
        assert reader.has_trigger == first
        reader.close()


def test_moving_stops_while_the_cgroup_stalls_and_goes_on_after_it() -> None:
    """The stalls are another process's of the same cgroup. Not one batch moves from when the guard closes on."""
    needs_psi()
    with temporary_zram_swap(768 << 20), temporary_cgroup("stalls") as path, workload(1, 200) as load:
        if not (path / "memory.pressure").exists():
            pytest.skip("needs memory.pressure in cgroups: a kernel with CONFIG_PSI")
        (path / "cgroup.procs").write_text(str(load.pid))
        config = EngineConfig(
            tracker="auto",
            scan_interval_ms=300,
            policy=AgePolicyConfig(interval_ms=300, swap_out_ms=900),
            mover=MoverConfig(bandwidth_mib_per_s=5),
            guards=replace(OWN_GUARDS, memory_psi_cgroup=LIMITS, skip=SkipRules(names=("staller",))),
        )
        engine = Engine(CgroupsTarget(Host(), [path]), config)
        moves: list[bool] = []
        """Of each call that moved: whether the guard was closed."""
        most_pending = 0

        def work_until(condition: Callable[[], bool], what: str) -> None:
            nonlocal most_pending
            end_s = time.monotonic() + 90
            while not condition():
                assert time.monotonic() < end_s, f"did not {what}: {engine.guards.verdict.reasons}"
                before = engine._moved_bytes
                report, due_s = engine.advance(time.monotonic())
                closed = not engine.guards.verdict.demotion_allowed
                if engine._moved_bytes > before:
                    moves.append(closed)
                if closed and report is None:
                    most_pending = max(most_pending, engine.mover.pending_bytes)
                time.sleep(max(0.0, min(0.05, due_s - time.monotonic())))

        work_until(lambda: len(moves) > 2, "start")
        with stalls(path):
            work_until(lambda: not engine.guards.verdict.demotion_allowed, "close")
            looks = engine.age_clock.scans
            work_until(lambda: engine.age_clock.scans >= looks + 5, "look on")
        moved = len(moves)
        work_until(lambda: len(moves) > moved, "go on")
        assert not any(moves)
        assert most_pending == 0
        engine.close()


def test_a_real_time_thread_is_seen() -> None:
    program = (
        "import os, threading, time\n"
        "def work():\n"
        "    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1)); print('ready', flush=True); time.sleep(60)\n"
        "threading.Thread(target=work).start()\n"
    )
    popen = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert popen.stdout is not None
    assert popen.stderr is not None
    try:
        if popen.stdout.readline() != "ready\n":
            pytest.skip(f"needs CAP_SYS_NICE and real-time bandwidth: {popen.stderr.read()[-200:]}")
        facts = FactsReader(Host()).read(process_id(Host(), popen.pid), 0)
        assert facts is not None
        assert facts.realtime_policy == os.SCHED_RR
        assert facts.rss_bytes is not None
        assert facts.rss_bytes > 1 << 20
    finally:
        popen.kill()
        popen.communicate()


def test_a_process_keeps_its_minimum_when_all_of_it_is_idle() -> None:
    """A frozen process is all cold, yet 40 MiB stay."""
    with temporary_zram_swap(512 << 20), workload(1, 64) as load:
        config = EngineConfig(
            scan_interval_ms=300,
            policy=AgePolicyConfig(interval_ms=300, swap_out_ms=900),
            mover=MoverConfig(bandwidth_mib_per_s=None),
            guards=replace(OWN_GUARDS, skip=SkipRules(rss_least_bytes=40 << 20)),
        )
        engine = Engine(PidsTarget(Host(), [load.pid]), config)
        reports = list(engine.run(duration_s=5))
        status = Path(f"/proc/{load.pid}/status").read_text()
        rss_bytes = int(status.partition("VmRSS:")[2].split()[0]) << 10
        assert reports[-1].moved_bytes_total > 16 << 20
        assert 39 << 20 <= rss_bytes <= 44 << 20


def test_reading_a_cgroup_without_guarantees_limits_nothing() -> None:
    with temporary_cgroup("plain") as path:
        assert Cgroup(path).exists()
        reader = CgroupReader(Host(), (path,), GuardsConfig())
        assert reader.read(0)["protection"].value is None
        reader.close()
