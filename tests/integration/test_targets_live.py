"""Targets on live cgroups: processes that fork, move and exit while they are polled."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memtier_engine.errors import Unavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.targets import CgroupsTarget, PidsTarget
from support.cgroups import removed
from support.waiting import until

HOST = Host()

_STORM = """
import os
while True:
    if os.fork() == 0:
        os._exit(0)
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        pass
"""


@pytest.fixture
def cgroup() -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root to make a cgroup: run the tests as root")
    try:
        path = HOST.cgroup2_root / f"memtier-targets-{os.getpid()}"
    except Unavailable as error:
        pytest.skip(f"needs cgroup v2: {error}")
    path.mkdir()
    yield path
    kill = path / "cgroup.kill"
    if kill.exists():
        kill.write_text("1")
    until(lambda: removed(path), f"{path} is still in use")


def start_in(cgroup: Path, *command: str) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(command)
    (cgroup / "cgroup.procs").write_text(str(child.pid))
    return child


def test_processes_of_all_cgroups_below_are_found_until_they_exit(cgroup: Path) -> None:
    inner = cgroup / "inner"
    inner.mkdir()
    one, two = start_in(cgroup, "sleep", "1000"), start_in(inner, "sleep", "1000")
    target = CgroupsTarget(HOST, [cgroup])
    assert {process.pid for process in target.poll()} == {one.pid, two.pid}
    one.kill()
    os.waitid(os.P_PID, one.pid, os.WEXITED | os.WNOWAIT)
    assert {process.pid for process in target.poll()} == {two.pid}, "a zombie is not a process with memory"
    one.wait()
    two.kill()
    two.wait()
    inner.rmdir()
    assert target.poll() == frozenset()


def test_a_fork_storm_and_directories_that_come_and_go_never_fail_a_poll(cgroup: Path) -> None:
    """Each of 300 polls contains the process that was there all along."""
    stay = start_in(cgroup, "sleep", "1000")
    storm = start_in(cgroup, sys.executable, "-S", "-c", _STORM)
    target = CgroupsTarget(HOST, [cgroup])
    seen: set[int] = set()
    for number in range(300):
        short = cgroup / f"short-{number}"
        short.mkdir()
        found = {process.pid for process in target.poll()}
        short.rmdir()
        assert stay.pid in found
        seen |= found
    for each in (stay, storm):
        each.kill()
        each.wait()
    assert storm.pid in seen


def test_a_pid_list_loses_those_that_exit() -> None:
    child = subprocess.Popen(["sleep", "1000"])
    target = PidsTarget(HOST, [child.pid, 2, os.getpid()])
    assert {process.pid for process in target.poll()} <= {child.pid, 2}
    assert child.pid in {process.pid for process in target.poll()}
    child.kill()
    child.wait()
    assert child.pid not in {process.pid for process in target.poll()}
