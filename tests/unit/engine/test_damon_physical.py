"""From regions of physical memory to pages of a process, and the files that tell DAMON to watch it."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from memtier_engine.errors import KernelCallError
from memtier_engine.hostfs.damon import DamonRegions, Kdamond
from memtier_engine.hostfs.host import Host
from memtier_engine.model import PAGE_BYTES, Spans
from memtier_engine.trackers.damon import DamonConfig, spread_by_frame

PRESENT = 1 << 63


def regions(*frames: tuple[int, int]) -> DamonRegions:
    table = np.array(frames, np.uint64).reshape(-1, 2) * np.uint64(PAGE_BYTES)
    zeros = np.zeros(len(table), np.int64)
    return DamonRegions(table[:, 0].copy(), table[:, 1].copy(), zeros, zeros)


def words(*frames: int | None) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array([0 if frame is None else PRESENT | frame for frame in frames], np.uint64)


def test_a_page_is_what_the_region_over_its_frame_is() -> None:
    """Neighbouring pages may lie in far frames, in any order."""
    found = regions((100, 200), (200, 300), (1000, 2000))
    hot = np.array([True, False, True])
    seen = spread_by_frame(found, hot, words(1500, 250, 100, 199, 200), outside=False)
    assert seen.tolist() == [True, False, True, True, False]


def test_pages_without_a_frame_and_frames_outside_all_regions_are_outside() -> None:
    found = regions((100, 200), (300, 400))
    heat = np.array([1.5, 2.5], np.float32)
    seen = spread_by_frame(found, heat, words(None, 99, 150, 200, 399, 400), outside=0.0)
    assert seen.tolist() == [0.0, 0.0, 1.5, 0.0, 2.5, 0.0]


def test_without_regions_everything_is_outside() -> None:
    assert spread_by_frame(regions(), np.zeros(0, np.bool_), words(1, 2), outside=True).tolist() == [True, True]


@pytest.fixture
def kdamond(tmp_path: Path) -> Kdamond:
    base = tmp_path / "sys/kernel/mm/damon/admin/kdamonds"
    context = base / "0/contexts/0"
    files = {
        "nr_kdamonds": "1",
        "0/state": "off",
        "0/contexts/nr_contexts": "0",
        "0/contexts/0/operations": "vaddr",
        "0/contexts/0/avail_operations": "paddr\n",
        "0/contexts/0/targets/nr_targets": "0",
        "0/contexts/0/targets/0/regions/nr_regions": "0",
        "0/contexts/0/targets/0/regions/0/start": "0",
        "0/contexts/0/targets/0/regions/0/end": "0",
        "0/contexts/0/targets/0/regions/1/start": "0",
        "0/contexts/0/targets/0/regions/1/end": "0",
        "0/contexts/0/schemes/nr_schemes": "0",
        "0/contexts/0/schemes/0/action": "",
    }
    for name in ("intervals/sample_us", "intervals/aggr_us", "intervals/update_us", "nr_regions/min", "nr_regions/max"):
        files[f"0/contexts/0/monitoring_attrs/{name}"] = "0"
    for name in ("sz", "nr_accesses", "age"):
        for end in ("min", "max"):
            files[f"0/contexts/0/schemes/0/access_pattern/{name}/{end}"] = "0"
    for name, text in files.items():
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert context.is_dir()
    return Kdamond(Host(tmp_path))


def test_while_the_kernel_does_somebody_s_command_it_is_asked_again(
    kdamond: Kdamond, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files are EBUSY then. Another error, or one that stays, is told."""
    read, times = Host.read_text, iter([errno.EBUSY] * 3 + [0] + [errno.EBUSY] * 1000)
    pauses: list[float] = []

    def busy(host: Host, path: Path) -> str:
        if number := next(times):
            raise KernelCallError(f"read {path}", number)
        return read(host, path)

    monkeypatch.setattr(Host, "read_text", busy)
    monkeypatch.setattr("memtier_engine.hostfs.damon.time.sleep", pauses.append)
    assert not kdamond.running()
    assert len(pauses) == 3
    with pytest.raises(KernelCallError):
        kdamond.running()
    assert 1.5 <= sum(pauses) <= 3
    times = iter([errno.EIO])
    with pytest.raises(KernelCallError):
        kdamond.running()


def test_physical_memory_is_one_target_with_the_areas_and_one_scheme_for_all(kdamond: Kdamond, tmp_path: Path) -> None:
    context = tmp_path / "sys/kernel/mm/damon/admin/kdamonds/0/contexts/0"
    assert kdamond.operations() == {"paddr"}
    kdamond.configure(DamonConfig().attributes(None), "paddr")
    kdamond.watch_memory(Spans(np.array([4096, 1 << 30], np.uint64), np.array([1 << 29, 1 << 31], np.uint64)))
    read = {
        name: (context / name).read_text()
        for name in (
            "operations",
            "targets/nr_targets",
            "targets/0/regions/nr_regions",
            "targets/0/regions/1/start",
            "targets/0/regions/1/end",
            "schemes/nr_schemes",
            "schemes/0/action",
        )
    }
    assert list(read.values()) == ["paddr", "1", "2", str(1 << 30), str(1 << 31), "1", "stat"]
    assert not (context / "targets/0/pid_target").exists()
    assert (context.parents[1] / "state").read_text().startswith("on")  # a plain file keeps the rest of "off"
