"""Policies from a configuration file on a real process: 64 MiB, of which 8 are written all the time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from memtier_engine.config.files import parse
from memtier_engine.engine.loop import StepReport
from memtier_engine.errors import MemtierError
from memtier_engine.hostfs.host import Host
from memtier_engine.model import MoveOutcome
from memtier_engine.stats.observer import Observer
from memtier_engine.stats.recorder import Statistics
from memtier_engine.stats.tables import tables_text
from memtier_engine.trackers.registry import create_tracker
from support.swap import temporary_zram_swap
from support.waiting import WAIT_S
from support.workload import workload

INTERVAL_S = 1.0
_CONFIG = """\
guards: {{psimemorynode: null, psiionode: null}}
policy:
  name: {policy}
  config: |
    intervalms: 1000
    pidwatcher: {{name: pidlist, config: "pids: [{pid}]"}}
    mover: {{bandwidth: 200}}
    {tracker}
    {keys}
"""
_TRACKER = 'tracker: {name: auto, config: "scanintervalms: 1000\\nmaxcountperregion: 0"}'


@pytest.fixture(scope="module", autouse=True)
def _swap() -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("needs root to page out another process: run the tests as root")
    try:
        found = create_tracker("auto", Host()).tracker
    except MemtierError as missing:
        pytest.skip(f"needs a tracker: {missing}")
    exact = found.page_exact
    found.close()
    if not exact:
        pytest.skip("needs a tracker that tells pages apart (`memtier check`); `make e2e` runs it in the test VM")
    with temporary_zram_swap(512 << 20):
        yield


class Moved(Observer):
    """What the mover said, also after the last report."""

    def __init__(self) -> None:
        self.bytes = 0

    def moved(self, outcome: MoveOutcome) -> None:
        self.bytes += outcome.moved_bytes


@dataclass(frozen=True)
class Ran:
    """What came of a run."""

    report: StepReport
    statistics: Statistics
    moved: Moved
    left_alone: bool
    """The process was kept from running for so long that memory it uses was idle."""


def run(policy: str, keys: str, enough: Callable[[StepReport], bool]) -> Ran:
    """Until `enough`, and some scans more."""
    statistics, moved = Statistics(), Moved()
    with workload(8, 56, write=True) as load:
        time.sleep(1.1)  # the engine leaves processes alone that are younger than a scan interval
        text = _CONFIG.format(policy=policy, pid=load.pid, tracker=_TRACKER, keys=keys)
        engine = parse(text).build(observers=[statistics, moved])
        enough_at: int | None = None
        for report in engine.run(duration_s=WAIT_S):
            if enough_at is None and enough(report):
                enough_at = report.scans
            if enough_at is not None and report.scans >= enough_at + 5:
                break
        assert enough_at is not None, report
        return Ran(report, statistics, moved, left_alone=load.longest_pause_s() > INTERVAL_S / 2)


def out_share(report: StepReport) -> float:
    return report.paged_out_bytes / (report.paged_out_bytes + report.resident_bytes)


def test_ratio_pages_out_the_share_and_no_more() -> None:
    ran = run("ratio", "ratio: 0.5", lambda report: out_share(report) >= 0.4)
    assert 0.4 <= out_share(ran.report) <= 0.52
    assert ran.report.refault_bytes_total <= 2 << 20 or ran.left_alone, "the half used least is not wanted back"
    [row] = tables_text(ran.statistics, ["process_madvise"], "csv").splitlines()[2:]
    done_gib = float(row.split(",")[4])
    assert done_gib * 1024 == pytest.approx(ran.moved.bytes / 2**20, abs=0.1)
    assert ran.moved.bytes == ran.report.moved_bytes_total
    assert ran.statistics.events["PolicyRatio.loop"].count >= 5


def test_demote_idle_takes_what_is_idle_and_leaves_what_is_in_use() -> None:
    ran = run("demote-idle", "idlenumas: [-1]", lambda report: report.paged_out_bytes >= 50 << 20)
    assert ran.report.refault_bytes_total <= 2 << 20 or ran.left_alone
    assert next(iter(ran.statistics.scans.values())).scans == ran.report.scans


def test_heat_sends_the_cold_class_to_swap_and_keeps_the_rest() -> None:
    keys = "heatmap: {heatclasses: 4, heatretention: 0.3}\n    heatnumas: {0: [-1]}"
    ran = run("heat", keys, lambda report: report.paged_out_bytes >= 50 << 20)
    assert ran.report.refault_bytes_total <= 2 << 20 or ran.left_alone


def test_the_stub_moves_nothing() -> None:
    engine = parse("policy: {name: stub}\n").build()
    reports = list(engine.run(duration_s=0.2))
    assert reports[-1].moved_bytes_total == 0
