"""The demo's workload lies where it says, and its verdict follows from the kernel's numbers alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from memtier_cli.memtier.demo import scan_interval_s
from memtier_cli.memtier.demo_scene.scene import Memory, readahead_pages
from memtier_cli.memtier.demo_scene.verdict import judge
from memtier_cli.memtier.demo_scene.workload import MIB, PAGE, lay_out
from support.hostfolder import HostFolder

HOT, COLD = 128 * MIB, 384 * MIB


def memory(*, cold_out: float = 1.0, hot_out: float = 0.0, refaults: float = 0.0) -> Memory:
    """Shares of cold, hot and hot memory."""
    return Memory(HOT, COLD, int(hot_out * HOT), int(cold_out * COLD), int(refaults * HOT))


def passed(found: Memory) -> bool:
    return judge(found, tracker="refs", engine_cpu_s=1.0, duration_s=8.0).passed


@pytest.mark.parametrize(
    ("found", "good"),
    [
        (memory(), True),
        (memory(cold_out=0.951), True),
        (memory(cold_out=0.949), False),
        (memory(cold_out=0.0), False),
        (memory(hot_out=0.019), True),
        (memory(hot_out=0.021), False),
        (memory(refaults=0.021), False),
        (memory(hot_out=0.011, refaults=0.011), False),
        (memory(refaults=3.0), False),
    ],
)
def test_the_verdict_asks_for_95_percent_of_the_cold_and_at_most_2_of_the_hot(found: Memory, good: bool) -> None:
    """A hot page that went out and came back counts as wrongly out, too."""
    assert passed(found) is good


@pytest.mark.parametrize("layout", ["mappings", "pages"])
def test_hot_and_cold_memory_have_the_sizes_asked_for_and_do_not_overlap(layout: str) -> None:
    views, hot, cold, _areas = lay_out(4, 12, layout)
    assert sum(end - start for start, end in hot) == 4 * MIB
    assert sum(end - start for start, end in cold) == 12 * MIB
    assert sum(len(view) for view in views) == 4 * MIB
    every = sorted([*hot, *cold])
    assert all(before[1] <= after[0] for before, after in pairwise(every))
    addresses = sorted(view.__array_interface__["data"][0] for view in views)
    assert addresses == sorted(start for start, _ in hot)


def test_in_layout_mappings_every_piece_is_a_mapping_of_its_own() -> None:
    """A tracker that only sees whole mappings must be able to tell them apart."""
    _views, hot, cold, _areas = lay_out(2, 6, "mappings")
    areas = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines()]
    for start, end in [*hot, *cold]:
        assert f"{start:x}-{end:x}" in areas


def test_in_layout_pages_hot_and_cold_pages_share_one_mapping() -> None:
    _views, hot, cold, areas = lay_out(2, 6, "pages")
    mixed = areas[-1]
    inside = [(start, end) for start, end in hot if mixed.address <= start < mixed.address + len(mixed.view)]
    assert len(inside) == 1 * MIB // (4 * PAGE)
    assert any(mixed.address <= start < mixed.address + len(mixed.view) for start, _ in cold)


def test_every_page_of_the_workload_is_filled_and_different() -> None:
    """Pages of zeros would cost no swap, and equal pages could be merged."""
    _views, _hot, _cold, areas = lay_out(1, 3, "mappings")
    pages = areas[0].view.reshape(-1, PAGE)
    assert len(np.unique(pages[:, :8], axis=0)) == len(pages)
    assert (pages.astype(bool).mean(axis=1) > 0.4).all()


def test_slow_machines_are_scanned_more_rarely() -> None:
    """Else scanning takes all the time, and memory in use looks idle because its user is slower than the scans."""
    assert scan_interval_s(scan_s=0.02, round_s=0.06) == 0.5
    assert scan_interval_s(scan_s=0.35, round_s=0.06) == pytest.approx(2.8)
    assert scan_interval_s(scan_s=0.02, round_s=0.5) == pytest.approx(2.0)


def test_a_fault_brings_in_one_page_from_zram_and_a_cluster_from_a_disk(tmp_path: Path) -> None:
    folder = HostFolder(tmp_path)
    folder.write("proc/sys/vm/page-cluster", "3\n")
    head = "Filename\tType\tSize\tUsed\tPriority\n"
    folder.write("proc/swaps", head + "/dev/zram1 partition 1024 0 -2\n")
    assert readahead_pages(folder.host) == 1
    folder.write("proc/swaps", head + "/dev/zram1 partition 1024 0 -2\n/dev/vda partition 1024 0 -3\n")
    assert readahead_pages(folder.host) == 8
