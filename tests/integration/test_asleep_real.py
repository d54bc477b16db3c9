"""A sleeping process in a real cgroup is not scanned again, and what it does after waking is seen at once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from memtier_engine.clock import SystemClock
from memtier_engine.engine.loop import Engine, EngineConfig
from memtier_engine.hostfs.host import Host
from memtier_engine.targets.cgroups import CgroupsTarget
from memtier_engine.trackers.registry import why_not
from support.cgroups import temporary_cgroup
from support.toucher import toucher
from support.waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")


@pytest.mark.parametrize("name", ["bpf", "refs"])
def test_a_sleeper_costs_no_scan_and_is_seen_when_it_wakes(name: str, tmp_path: Path) -> None:
    why = why_not(name, Host())
    if why is not None:
        pytest.skip(f"tracker {name} does not work on this kernel: {why[0]}; `make e2e` runs it in the test VM")
    with temporary_cgroup("asleep") as cgroup, toucher("anonymous", 1000, tmp_path) as load:
        load.write(range(1000))
        (cgroup / "cgroup.procs").write_text(str(load.process.pid))
        config = EngineConfig(tracker=name, scan_interval_ms=100, dry_run=True)
        engine = Engine(CgroupsTarget(Host(), [cgroup]), config)
        real = 0
        tracker_scan = engine.tracker.scan

        def counted(*arguments):  # type: ignore[no-untyped-def]
            nonlocal real
            real += 1
            return tracker_scan(*arguments)

        engine.tracker.scan = counted  # type: ignore[method-assign]
        now_s = SystemClock().now_s() + 10

        def ages_after(scans: int) -> list[int]:
            nonlocal now_s
            for _ in range(scans):
                now_s += 1
                engine.step(now_s)
            (own,) = engine.pages.values()
            first = own.index_of(load.address)
            return [int(age) for age in own.ages[first : first + 1000]]

        def asleep_again() -> None:
            """It has answered, and waits for the next question."""
            stat = Path(f"/proc/{load.process.pid}/stat")
            until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S")
            time.sleep(0.05)  # the kernel accounts a run to the cgroup when it ends or at the next tick

        time.sleep(0.2)  # younger processes are left alone
        asleep_again()
        ages_after(3)
        before = real
        assert ages_after(5)[0] >= 5
        assert real <= before + 1  # one of six is a real one whatever happens
        asleep = real
        if name == "bpf":
            load.write(range(100, 200))
            asleep_again()
            ages = ages_after(1)
            assert [page for page, age in enumerate(ages) if age == 0] == list(range(100, 200))
        else:
            load.write([5])
            asleep_again()
            assert ages_after(1) == [0] * 1000
        assert real == asleep + 1
        engine.close()
