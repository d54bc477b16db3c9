"""The probe on dressed folders: what is missing is named, and nothing makes it fail as a whole."""

from __future__ import annotations

import gzip
import mmap
import os
from pathlib import Path

import pytest

from memtier_engine.hostfs import probe as probing
from memtier_engine.hostfs.probe import CHECKS, probe
from memtier_engine.hostfs.probe_base import Scene, TrialPages
from memtier_engine.model import PAGE_BYTES
from support.hostfolder import HostFolder

WITHOUT = "CONFIG_SWAP=y\nCONFIG_MEMCG=y\n# CONFIG_PSI is not set\n# CONFIG_ZRAM is not set\n"


@pytest.fixture
def folder(tmp_path: Path) -> HostFolder:
    return HostFolder(tmp_path)


def test_an_empty_machine_offers_nothing_and_every_refusal_has_a_reason(folder: HostFolder) -> None:
    """Only what is asked by system call may work: those do not go through the folder."""
    result = probe(folder.host)
    assert [feature.name for feature in result] == list(CHECKS)
    by_call = {"pidfd", "process-madvise", "move-pages", "userfaultfd-wp-async", "bpf"}
    for feature in result:
        if feature.name not in by_call:
            assert not feature.works, feature
        if not feature.works:
            assert feature.why, feature


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("idle-bitmap", "CONFIG_IDLE_PAGE_TRACKING"),
        ("psi", "CONFIG_PSI"),
        ("zram", "CONFIG_ZRAM"),
        ("damon", "CONFIG_DAMON_SYSFS"),
        ("mglru", "CONFIG_LRU_GEN"),
        ("btf", "CONFIG_DEBUG_INFO_BTF"),
        ("pagemap", "CONFIG_PROC_PAGE_MONITOR"),
    ],
)
def test_a_missing_option_is_named_with_the_file_that_says_so(folder: HostFolder, name: str, option: str) -> None:
    folder.write("proc/config.gz", gzip.compress(WITHOUT.encode()))
    feature = probe(folder.host)[name]
    assert not feature.works
    assert feature.why is not None
    assert option in feature.why
    assert "(/proc/config.gz)" in feature.why
    assert option in (feature.fix or "")


def test_memory_on_cgroup_v1_is_told_from_a_kernel_without_the_controller(folder: HostFolder) -> None:
    folder.cgroup2("/sys/fs/cgroup/unified", controllers="cpu")
    mounts = folder.root / "proc/self/mounts"
    only_v2 = mounts.read_text()
    mounts.write_text(only_v2 + "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n")
    hybrid = probe(folder.host)
    assert hybrid.works("cgroup2")
    assert hybrid["cgroup2"].detail == "/sys/fs/cgroup/unified"
    assert "cgroup v1 (/sys/fs/cgroup/memory)" in (hybrid["memory-controller"].why or "")
    assert "unified_cgroup_hierarchy" in (hybrid["memory-controller"].fix or "")

    mounts.write_text(only_v2)
    folder.write("proc/config.gz", gzip.compress(WITHOUT.encode()))
    assert "cgroup_enable=memory" in (probe(folder.host)["memory-controller"].fix or "")


def test_reclaim_is_tried_with_nothing_to_reclaim(folder: HostFolder) -> None:
    """A write of 0 bytes: the kernel takes it and does nothing."""
    folder.cgroup2()
    assert "5.19" in (probe(folder.host)["memory-reclaim"].fix or "")
    path = folder.write("sys/fs/cgroup/system.slice/memory.reclaim", "")
    assert probe(folder.host).works("memory-controller", "memory-reclaim")
    assert path.read_text() == "0"


def test_swap_counts_only_with_room_in_it(folder: HostFolder) -> None:
    head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    folder.write("proc/swaps", head)
    assert "no swap area" in (probe(folder.host)["swap"].why or "")
    folder.write("proc/swaps", f"{head}/dev/zram0 partition 2048 2048 5\n")
    assert "full" in (probe(folder.host)["swap"].why or "")
    folder.write("proc/swaps", f"{head}/dev/zram0 partition 2048 1024 5\n")
    assert probe(folder.host)["swap"].detail == "/dev/zram0: 1 of 2 MiB free; zram: frees at once"


def test_pressure_built_in_but_off_wants_a_boot_option(folder: HostFolder) -> None:
    folder.write("proc/config.gz", gzip.compress(b"CONFIG_PSI=y\n"))
    assert probe(folder.host)["psi"].fix == "boot with psi=1"
    folder.write("proc/pressure/memory", "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    assert probe(folder.host).works("psi")


@pytest.mark.parametrize(("enabled", "works"), [("0x0007\n", True), ("0x0000\n", False)])
def test_mglru_must_be_switched_on(folder: HostFolder, enabled: str, works: bool) -> None:
    folder.write("sys/kernel/mm/lru_gen/enabled", enabled)
    assert probe(folder.host)["mglru"].works is works


def test_damon_operations_come_from_a_context_that_is_there_or_from_the_options(folder: HostFolder) -> None:
    kdamonds = "sys/kernel/mm/damon/admin/kdamonds"
    folder.write(f"{kdamonds}/nr_kdamonds", "1\n")
    assert not probe(folder.host).works("damon-vaddr")
    folder.write("proc/config.gz", gzip.compress(b"CONFIG_DAMON_PADDR=y\n"))
    result = probe(folder.host)
    assert result["damon"].detail == "1 kdamond(s) set up; operations: paddr"
    assert "CONFIG_DAMON_VADDR" in (result["damon-vaddr"].why or "")
    folder.write(f"{kdamonds}/0/contexts/0/avail_operations", "vaddr\nfvaddr\npaddr\n")
    assert probe(folder.host).works("damon", "damon-vaddr")


def test_a_missing_capability_is_named(folder: HostFolder) -> None:
    """Pages are there, their frame numbers are not: an unprivileged process."""
    folder.write("proc/self/status", "Name:\tx\nCapEff:\t0000000000000000\n")
    pid = os.getpid()
    folder.process(pid)
    with Scene(folder.host) as scene:
        start = scene.trial.start
        words = {start + page * PAGE_BYTES: 1 << 63 for page in range(scene.trial.pages)}
        folder.pagemap(pid, words)
        feature = probing._try("pagemap-pfns", CHECKS["pagemap-pfns"], scene)
    assert feature.why == "pagemap shows no frame numbers: this process lacks CAP_SYS_ADMIN"
    assert feature.fix == "run as root"


def test_trial_pages_are_page_aligned_and_written() -> None:
    pages = TrialPages(3)
    assert pages.start % mmap.PAGESIZE == 0
    assert pages.end - pages.start == 3 * PAGE_BYTES
    pages.touch(1, 2)
    assert [pages._map[page * PAGE_BYTES] for page in range(3)] == [1, 2, 2]
    pages.close()


def test_a_feature_that_does_not_exist_is_a_mistake_of_ours(folder: HostFolder) -> None:
    with pytest.raises(KeyError):
        _ = probe(folder.host)["teleport"]
