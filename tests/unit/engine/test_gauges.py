"""Gauges on a folder dressed as a machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from memtier_engine.guards.gauges import HostGauges
from support.hostfolder import HostFolder


def pressure(total_us: int) -> str:
    return f"some avg10=0.00 avg60=0.00 avg300=0.00 total={total_us}\n"


@pytest.fixture
def machine(tmp_path: Path) -> HostFolder:
    return HostFolder(tmp_path)


def test_the_stall_time_is_that_since_the_last_question(machine: HostFolder) -> None:
    """300 ms in a minute are half a percent."""
    machine.write("proc/pressure/memory", pressure(1_000_000))
    gauges = HostGauges(machine.host)
    assert gauges.stall_percent(0) is None
    machine.write("proc/pressure/memory", pressure(1_300_000))
    assert gauges.stall_percent(60) == pytest.approx(0.5)
    assert gauges.stall_percent(120) == 0


def test_the_worst_cgroup_counts_and_the_nodes_pressure_does_not(machine: HostFolder) -> None:
    machine.write("proc/pressure/memory", pressure(0))
    paths = [machine.cgroup(f"sys/fs/cgroup/{name}", memory_pressure=pressure(0)) for name in "ab"]
    gauges = HostGauges(machine.host, paths)
    gauges.stall_percent(0)
    machine.write("proc/pressure/memory", pressure(9_000_000))
    machine.cgroup("sys/fs/cgroup/b", memory_pressure=pressure(100_000))
    assert gauges.stall_percent(10) == pytest.approx(1.0)


def test_a_recreated_cgroup_starts_anew(machine: HostFolder) -> None:
    path = machine.cgroup("sys/fs/cgroup/a", memory_pressure=pressure(5_000_000))
    gauges = HostGauges(machine.host, [path])
    gauges.stall_percent(0)
    machine.cgroup("sys/fs/cgroup/a", memory_pressure=pressure(1_000))
    assert gauges.stall_percent(10) is None
    machine.cgroup("sys/fs/cgroup/a", memory_pressure=pressure(101_000))
    assert gauges.stall_percent(20) == pytest.approx(1.0)


def test_without_pressure_information_nothing_is_known(machine: HostFolder) -> None:
    gauges = HostGauges(machine.host)
    assert [gauges.stall_percent(now_s) for now_s in (0, 10)] == [None, None]


def test_available_memory_is_the_kernels_estimate(machine: HostFolder) -> None:
    gauges = HostGauges(machine.host)
    assert gauges.available_bytes() is None
    machine.write("proc/meminfo", "MemTotal: 100 kB\nMemAvailable: 64 kB\n")
    assert gauges.available_bytes() == 64 << 10
