"""The engine on a real process: cold memory leaves RAM, hot memory stays."""

from __future__ import annotations

import os
import signal

import pytest

from memtier_engine.engine.loop import Engine, EngineConfig, StepReport
from memtier_engine.errors import TrackerUnavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.mover.mover import MoverConfig
from memtier_engine.policies.age import AgePolicyConfig
from memtier_engine.targets.pids import PidsTarget
from memtier_engine.trackers.damon_shared import SharedDamonTracker
from memtier_engine.trackers.registry import TRACKERS, create_tracker, why_not
from support.guards import OWN_GUARDS
from support.swap import temporary_zram_swap
from support.waiting import WAIT_S
from support.workload import workload

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")


IDLE_S = 1.2


def config(tracker: str, *, bandwidth_mib_per_s: float | None = 400) -> EngineConfig:
    return EngineConfig(
        guards=OWN_GUARDS,
        tracker=tracker,
        scan_interval_ms=300,
        policy=AgePolicyConfig(interval_ms=300, swap_out_ms=int(1000 * IDLE_S)),
        mover=MoverConfig(bandwidth_mib_per_s=bandwidth_mib_per_s),
    )


def tracker_or_skip(name: str) -> str:
    why = why_not(name, Host())
    if why is not None:
        pytest.skip(f"tracker {name} does not work on this kernel: {why[0]}; `make e2e` runs it in the test VM")
    return name


@pytest.mark.parametrize(
    # bpf-sampled knows a share of the blocks only; bpf-hardware finds hot pages and cannot prove that one is cold.
    "name",
    sorted(set(TRACKERS) - {"userfault", "finder", "stub", "bpf-sampled", "bpf-hardware"}),
)
@pytest.mark.parametrize("strips", [1, 8])
def test_cold_memory_leaves_and_hot_memory_stays(name: str, strips: int) -> None:
    """Hot memory is written, so that every tracker can see it."""
    with (
        temporary_zram_swap(512 << 20),
        workload(16, 48, strips=strips, write=True) as load,
        workload(4, 16, write=True) as bystander,
    ):
        engine = Engine(PidsTarget(Host(), [load.pid]), config(tracker_or_skip(name)))
        # Kernels without CONFIG_DAMON_VADDR only have physical memory, whose regions are shared with whatever else is
        # in RAM: what is cold in a region that another process keeps hot stays. How much goes out is the machine's
        # doing there; in a process's own memory it is 95 %, as the VM tests show.
        physical = isinstance(engine.tracker, SharedDamonTracker) and getattr(engine.tracker.core, "physical", False)
        least = 0.02 if physical else 0.95
        out_since_s = None
        for report in engine.run(duration_s=WAIT_S):  # ends early; a guard may hold it back for a while
            if out_since_s is None and load.swapped_share(load.cold) >= least:
                out_since_s = report.time_s
            if out_since_s is not None and report.time_s >= out_since_s + 2:
                break
        assert load.swapped_share(load.cold) >= least
        assert load.hot_stayed(IDLE_S, came_back=1.0 if physical else 0.02)
        assert report.paged_out_bytes >= least * load.cold.total_bytes
        assert bystander.swapped_share(bystander.cold) == 0.0


def test_what_is_paged_out_reads_back_unchanged_and_counts_as_refault() -> None:
    """A frozen process is all cold; when it goes on, it finds its data."""
    with temporary_zram_swap(512 << 20), workload(16, 16, write=True) as load:
        os.kill(load.pid, signal.SIGSTOP)
        engine = Engine(PidsTarget(Host(), [load.pid]), config("auto"))
        for report in engine.run(duration_s=WAIT_S):
            if load.swapped_share(load.hot) >= 0.95:
                os.kill(load.pid, signal.SIGCONT)
            if report.refault_bytes_total >= 0.5 * load.hot.total_bytes:
                break
        assert report.refault_bytes_total >= 0.5 * load.hot.total_bytes
        assert load.popen.poll() is None


def test_the_real_rate_stays_within_the_limit() -> None:
    """It may be slower: a machine with other things to do. That it is not slower by itself, tests with a clock show."""
    with temporary_zram_swap(512 << 20), workload(1, 160) as load:
        engine = Engine(PidsTarget(Host(), [load.pid]), config("auto", bandwidth_mib_per_s=20))
        reports: list[StepReport] = []
        for report in engine.run(duration_s=WAIT_S):
            if report.moved_bytes_total:
                reports.append(report)
            if report.moved_bytes_total >= 100 << 20:
                break
        first, last = reports[0], reports[-1]
        assert last.moved_bytes_total >= 100 << 20, "and it goes on as long as there is something to move"
        rate = (last.moved_bytes_total - first.moved_bytes_total) / (last.time_s - first.time_s) / (1 << 20)
        assert rate <= 21


def test_a_process_that_is_killed_in_between_costs_nothing() -> None:
    with temporary_zram_swap(512 << 20), workload(8, 32) as load, workload(8, 32, write=True) as other:
        engine = Engine(PidsTarget(Host(), [load.pid, other.pid]), config("auto", bandwidth_mib_per_s=10))
        for number, report in enumerate(engine.run(duration_s=WAIT_S)):
            if number == 6:
                load.popen.kill()
            if number > 6 and report.processes == 1 and other.swapped_share(other.cold) > 0.5:
                break
        assert report.processes == 1
        assert other.swapped_share(other.cold) > 0.5


def test_userfault_refuses_other_processes() -> None:
    tracker_or_skip("userfault")
    with workload(1, 1) as load:
        tracker = create_tracker("userfault", Host()).tracker
        with pytest.raises(TrackerUnavailable, match="own process"):
            tracker.watch(frozenset({load.process}))
        tracker.close()
