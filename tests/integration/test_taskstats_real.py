"""Swap-in delays from the kernel's own accounting, of real processes on a real swap."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from memtier_engine.engine.loop import Engine, EngineConfig
from memtier_engine.errors import ProcessGone, TrackerUnavailable, Unavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.hostfs.taskstats import TaskStats
from memtier_engine.model import PAGE_BYTES
from memtier_engine.mover.backends import ProcessHandle, page_out
from memtier_engine.policies.age import AgePolicyConfig
from memtier_engine.stats.recorder import Statistics
from memtier_engine.stats.tables import tables_text
from memtier_engine.targets.pids import PidsTarget
from memtier_engine.trackers.bpf.feed import SwapInFeed, SwapInWatch
from support.guards import OWN_GUARDS
from support.swap import temporary_zram_swap
from support.toucher import toucher
from support.waiting import WAIT_S

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")
SWITCH = Path("/proc/sys/kernel/task_delayacct")
PAGES = 1024


@pytest.fixture
def stats() -> Iterator[TaskStats]:
    """With delay accounting on, for processes that are started meanwhile."""
    if not SWITCH.exists():
        pytest.skip(f"{SWITCH} does not exist: run on Linux 5.14 or newer with CONFIG_TASK_DELAY_ACCT=y")
    before = SWITCH.read_text()
    try:
        SWITCH.write_text("1")
        opened = TaskStats(Host())
    except (OSError, Unavailable) as error:
        pytest.skip(f"needs to ask for taskstats, as root in the host's network namespace: {error}")
    try:
        yield opened
    finally:
        opened.close()
        SWITCH.write_text(before)


def test_pages_read_from_swap_and_the_wait_for_them_are_counted_by_process(stats: TaskStats, tmp_path: Path) -> None:
    """As many as were out, and nothing for who did not touch any."""
    with (
        temporary_zram_swap(64 << 20),
        toucher("anonymous", PAGES, tmp_path) as load,
        toucher("anonymous", PAGES, tmp_path) as other,
    ):
        for each in (load, other):
            each.write(range(PAGES))
            assert stats.swap_in(each.process.pid).count <= 64  # of its program's own start, under pressure of others
        with closing(ProcessHandle(Host(), load.process)) as handle:
            page_out(handle, load.spans)
        with Pagemap(Host(), load.process.pid) as pagemap:
            out = pagemap.swapped_bytes(load.spans.starts, load.spans.ends) // PAGE_BYTES
        assert out >= PAGES - 64
        before = stats.swap_in(load.process.pid)
        load.read(range(PAGES))
        after = stats.swap_in(load.process.pid)
        assert out <= after.count - before.count <= out + 64
        assert 0 < (after.seconds - before.seconds) / out < 0.1
        assert stats.swap_in(other.process.pid).count <= 64


def test_a_process_that_exited_is_gone(stats: TaskStats, tmp_path: Path) -> None:
    with toucher("anonymous", 1, tmp_path) as load:
        pid = load.process.pid
        stats.swap_in(pid)
    with pytest.raises(ProcessGone):
        stats.swap_in(pid)


def _no_bpf(host: Host) -> SwapInFeed:
    raise TrackerUnavailable("not in this test")


def test_without_bpf_an_engine_has_the_delays_in_its_report_and_in_the_table(stats: TaskStats, tmp_path: Path) -> None:
    statistics = Statistics()
    config = EngineConfig(
        guards=OWN_GUARDS,
        scan_interval_ms=200,
        policy=AgePolicyConfig(interval_ms=200, swap_out_ms=400),
    )
    with temporary_zram_swap(64 << 20), toucher("anonymous", PAGES, tmp_path) as load:
        load.write(range(PAGES))
        engine = Engine(PidsTarget(Host(), [load.process.pid]), config, observers=[statistics])
        engine._swap_ins = SwapInWatch(Host(), _no_bpf)
        asked = False
        for report in engine.run(duration_s=WAIT_S):
            if not asked and report.paged_out_bytes >= 0.9 * PAGES * PAGE_BYTES:
                assert report.refaults.swap_ins is not None
                load.read(range(PAGES))
                asked = True
            elif asked and (report.refaults.swap_ins or 0) >= 0.8 * PAGES:
                break
        assert asked, "the memory did not go out"
        assert report.refaults.swap_ins is not None
        assert report.refaults.swap_ins >= 0.8 * PAGES
        assert report.refaults.mean_swap_in_wait_s is not None
        assert 0 < report.refaults.mean_swap_in_wait_s < 0.1
        text = tables_text(statistics, ["swap_ins"], "csv").splitlines()
        assert text[:2] == ["table: swap-ins", "pid,swapins,waits,tot[s],avg[ms]"]
        assert text[2].startswith(f"{load.process.pid},{report.refaults.swap_ins},")
