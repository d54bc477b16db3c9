"""Targets on a dressed folder: who is meant, and that what vanishes costs only itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from loguru import logger

from memtier_engine.model import ProcessId
from memtier_engine.targets import CgroupsTarget, PidsTarget, Target
from support.hostfolder import PF_KTHREAD, HostFolder


@pytest.fixture
def folder(tmp_path: Path) -> HostFolder:
    made = HostFolder(tmp_path)
    made.cgroup2()
    for pid in (10, 11, 12, 13):
        made.process(pid, start_ticks=pid * 100)
    made.cgroup("/sys/fs/cgroup/a", [10])
    made.cgroup("/sys/fs/cgroup/a/inner", [11])
    made.cgroup("/sys/fs/cgroup/b", [12])
    return made


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Messages logged by the library, which is silent unless enabled."""
    messages: list[str] = []
    logger.enable("memtier_engine")
    sink = logger.add(lambda message: messages.append(str(message)), level="WARNING", format="{message}")
    yield messages
    logger.remove(sink)
    logger.disable("memtier_engine")


def pids(target: Target) -> set[int]:
    return {process.pid for process in target.poll()}


def test_cgroups_are_a_union_and_include_those_below(folder: HostFolder) -> None:
    target = CgroupsTarget(folder.host, ["/sys/fs/cgroup/a", "/b"])
    assert target.poll() == {ProcessId(10, 1000), ProcessId(11, 1100), ProcessId(12, 1200)}


def test_processes_that_come_and_go_are_followed(folder: HostFolder) -> None:
    target = CgroupsTarget(folder.host, ["/a"])
    assert pids(target) == {10, 11}
    folder.cgroup("/sys/fs/cgroup/a/new", [13])
    folder.cgroup("/sys/fs/cgroup/a/inner", [])
    assert pids(target) == {10, 13}


def test_one_vanished_cgroup_never_costs_the_others_and_is_reported_once(
    folder: HostFolder, warnings: list[str]
) -> None:
    target = CgroupsTarget(folder.host, ["/a", "/b"])
    shutil.rmtree(folder.root / "sys/fs/cgroup/a")
    for _ in range(3):
        assert pids(target) == {12}
    assert len(warnings) == 1
    assert "/a: does not exist" in warnings[0]
    folder.cgroup("/sys/fs/cgroup/a", [10])
    assert pids(target) == {10, 12}
    shutil.rmtree(folder.root / "sys/fs/cgroup/a")
    assert pids(target) == {12}
    assert len(warnings) == 2


def test_a_cgroup_that_is_made_later_is_found(folder: HostFolder) -> None:
    target = CgroupsTarget(folder.host, ["/later"])
    assert pids(target) == set()
    folder.cgroup("/sys/fs/cgroup/later", [13])
    assert pids(target) == {13}


def test_a_machine_without_cgroup_v2_has_no_processes_and_says_so_once(tmp_path: Path, warnings: list[str]) -> None:
    target = CgroupsTarget(HostFolder(tmp_path).host, ["/a"])
    assert pids(target) == set()
    assert pids(target) == set()
    assert len(warnings) == 1
    assert "no cgroup v2" in warnings[0]


def test_kernel_threads_zombies_ourselves_and_the_vanished_are_left_out(folder: HostFolder) -> None:
    folder.process(20, flags=PF_KTHREAD | 0x40)
    folder.process(21, state="Z")
    folder.process(os.getpid())
    folder.cgroup("/sys/fs/cgroup/b", [12, 20, 21, 22, os.getpid()])
    assert pids(CgroupsTarget(folder.host, ["/b"])) == {12}


def test_a_pid_means_the_process_that_had_it_first(folder: HostFolder) -> None:
    target = PidsTarget(folder.host, [10, 11])
    assert pids(target) == {10, 11}
    folder.process(10, start_ticks=5000)
    assert pids(target) == {11}


def test_a_pid_that_means_nobody_is_told_once_with_the_reason(folder: HostFolder, warnings: list[str]) -> None:
    folder.process(3, flags=PF_KTHREAD)
    folder.process(4, state="Z")
    target = PidsTarget(folder.host, [3, 4, 10, 999, os.getpid()])
    for _ in range(3):
        assert pids(target) == {10}
    assert target.missing() == {
        3: "process 3 is a thread of the kernel: it has no memory of its own",
        4: "process 4 exited, and its parent has not waited for it",
        999: "there is no process 999",
        os.getpid(): f"process {os.getpid()} is this program itself",
    }
    assert warnings == [", ".join(target.missing().values()) + "\n"]
    shutil.rmtree(folder.root / "proc/10")
    assert pids(target) == set()
    assert target.missing()[10] == "process 10 exited"
    assert len(warnings) == 1, "that one exits is no news"


def test_many_pids_that_mean_nobody_make_a_short_line(folder: HostFolder, warnings: list[str]) -> None:
    PidsTarget(folder.host, range(5000, 6000)).poll()
    assert len(warnings) == 1
    assert warnings[0].startswith("there is no process 5000, ")
    assert warnings[0].endswith(", and 995 more\n")


def test_a_pid_that_nobody_has_yet_is_waited_for(folder: HostFolder) -> None:
    target = PidsTarget(folder.host, [50])
    assert pids(target) == set()
    folder.process(50)
    assert pids(target) == {50}
