"""Policies from a configuration file on a real process: 64 MiB, of which 8 are written all the time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

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

_LOAD = """
import mmap, time
area = mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, 64 << 20, 4096):
    area[at] = 1
print("ready", flush=True)
while True:
    for at in range(0, 8 << 20, 4096):
        area[at] = 2
    time.sleep(0.05)
"""
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


def run(
    policy: str, keys: str, duration_s: float = 9.0, observers: Sequence[Observer] = ()
) -> tuple[StepReport, Statistics]:
    """The last report, and what was counted."""
    load = subprocess.Popen([sys.executable, "-S", "-c", _LOAD], stdout=subprocess.PIPE)
    statistics = Statistics()
    try:
        assert load.stdout is not None
        load.stdout.readline()
        time.sleep(1.1)  # the engine leaves processes alone that are younger than a second
        text = _CONFIG.format(policy=policy, pid=load.pid, tracker=_TRACKER, keys=keys)
        reports = list(parse(text).build(observers=[statistics, *observers]).run(duration_s=duration_s))
        return reports[-1], statistics
    finally:
        load.kill()
        load.wait()


def test_ratio_pages_out_the_share_and_no_more() -> None:
    moved = Moved()
    report, statistics = run("ratio", "ratio: 0.5", observers=[moved])
    share = report.paged_out_bytes / (report.paged_out_bytes + report.resident_bytes)
    assert 0.4 <= share <= 0.52
    assert report.refault_bytes_total <= 2 << 20, "the half that is used least is not wanted back"
    [row] = tables_text(statistics, ["process_madvise"], "csv").splitlines()[2:]
    done_gib = float(row.split(",")[4])
    assert done_gib * 1024 == pytest.approx(moved.bytes / 2**20, abs=0.1)
    assert 0 <= moved.bytes - report.moved_bytes_total <= 4 << 20
    assert statistics.events["PolicyRatio.loop"].count >= 5


def test_demote_idle_takes_what_is_idle_and_leaves_what_is_in_use() -> None:
    report, statistics = run("demote-idle", "idlenumas: [-1]")
    assert report.paged_out_bytes >= 50 << 20
    assert report.refault_bytes_total <= 2 << 20
    assert next(iter(statistics.scans.values())).scans == report.scans


def test_heat_sends_the_cold_class_to_swap_and_keeps_the_rest() -> None:
    report, _ = run("heat", "heatmap: {heatclasses: 4, heatretention: 0.3}\n    heatnumas: {0: [-1]}")
    assert report.paged_out_bytes >= 50 << 20
    assert report.refault_bytes_total <= 2 << 20


def test_the_stub_moves_nothing() -> None:
    engine = parse("policy: {name: stub}\n").build()
    reports = list(engine.run(duration_s=0.2))
    assert reports[-1].moved_bytes_total == 0
