"""Swap-ins as the kernel counts them, in the report of an engine with any tracker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memtier_engine.engine.loop import Engine, EngineConfig
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap, swapped
from memtier_engine.model import PAGE_BYTES
from memtier_engine.mover.mover import MoverConfig
from memtier_engine.policies.age import AgePolicyConfig
from memtier_engine.targets.pids import PidsTarget
from memtier_engine.trackers.bpf import feed
from memtier_engine.trackers.registry import why_not
from support.guards import OWN_GUARDS
from support.swap import temporary_zram_swap
from support.toucher import Toucher, toucher
from support.waiting import WAIT_S

_WHY = why_not("bpf", Host())
pytestmark = pytest.mark.skipif(
    _WHY is not None, reason=f"BPF does not work here: {_WHY}; run as root, or `make e2e` in the test VM"
)
PAGES = 4000
TOUCHED = 400


def engine_on(load: Toucher, tracker: str, *, count_swap_ins: bool = True) -> Engine:
    config = EngineConfig(
        guards=OWN_GUARDS,
        tracker=tracker,
        scan_interval_ms=200,
        policy=AgePolicyConfig(interval_ms=200, swap_out_ms=400),
        mover=MoverConfig(bandwidth_mib_per_s=None),
        count_swap_ins=count_swap_ins,
    )
    return Engine(PidsTarget(Host(), [load.process.pid]), config)


def out_pages(load: Toucher) -> list[int]:
    with Pagemap(Host(), load.process.pid) as pagemap:
        words = pagemap.read(load.address, load.address + PAGES * PAGE_BYTES)
    found: list[int] = np.flatnonzero(swapped(words)).tolist()
    return found


def run_until_it_came_back(load: Toucher, engine: Engine) -> tuple[int, int, float] | None:
    """Let the memory go out, read some of it. What the engine then says of swap-ins; None: nothing, for seconds."""
    asked = False
    seen = None
    for report in engine.run(duration_s=WAIT_S):
        stats = report.refaults
        if not asked:
            out = out_pages(load)
            if len(out) < 0.9 * PAGES:
                continue
            # From here on everything that comes back is what the test asks for.
            assert (stats.swap_ins is None) == (not engine.config.count_swap_ins)
            load.read(out[:TOUCHED])
            asked = True
        elif report.refault_bytes_total >= TOUCHED * PAGE_BYTES // 2:
            if stats.swap_ins is not None and stats.swap_in_waits is not None and stats.swap_in_wait_s is not None:
                seen = (stats.swap_ins, stats.swap_in_waits, stats.swap_in_wait_s)
            break
    assert asked, "the memory did not go out"
    return seen


@pytest.mark.parametrize("tracker", ["bpf", "refs"])
def test_swap_ins_and_their_duration_are_in_the_report_whatever_the_tracker(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On zram each of the pages is a fault of its own that waits for the device."""
    monkeypatch.setattr(feed, "_shared", feed._Shared())
    why = why_not(tracker, Host())
    if why is not None:
        pytest.skip(f"tracker {tracker} does not work on this kernel: {why[0]}; `make e2e` has one where it does")
    with temporary_zram_swap(128 << 20), toucher("anonymous", PAGES, tmp_path) as load:
        load.write(range(PAGES))
        seen = run_until_it_came_back(load, engine_on(load, tracker))
        assert seen is not None
        swap_ins, waits, wait_s = seen
        assert swap_ins >= TOUCHED // 2
        assert 0 < waits <= swap_ins
        assert 0 < wait_s / waits < 1
    assert not feed._shared._counters  # the engine closed, and with it the counter


def test_who_does_not_want_it_counts_none(tmp_path: Path) -> None:
    with temporary_zram_swap(128 << 20), toucher("anonymous", PAGES, tmp_path) as load:
        load.write(range(PAGES))
        assert run_until_it_came_back(load, engine_on(load, "bpf", count_swap_ins=False)) is None
