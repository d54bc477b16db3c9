"""Targets on live cgroups: processes that fork, move and exit while they are polled."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memtier_engine.errors import Unavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.targets import CgroupsTarget, PidsTarget

HOST = Host()

_STORM = """
import os, sys, time
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
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
    deadline = time.monotonic() + 10
    for directory in sorted([path, *path.rglob("*/")], reverse=True):
        while directory.exists() and time.monotonic() < deadline:
            try:
                directory.rmdir()
            except OSError:
                time.sleep(0.02)


def start_in(cgroup: Path, *command: str) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(command)
    (cgroup / "cgroup.procs").write_text(str(child.pid))
    return child


def test_processes_of_all_cgroups_below_are_found_until_they_exit(cgroup: Path) -> None:
    inner = cgroup / "inner"
    inner.mkdir()
    one, two = start_in(cgroup, "sleep", "60"), start_in(inner, "sleep", "60")
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
    """Polls stay quick and always contain the process that was there all along."""
    stay = start_in(cgroup, "sleep", "60")
    storm = start_in(cgroup, sys.executable, "-c", _STORM, "1.0")
    target = CgroupsTarget(HOST, [cgroup])
    slowest_s, polls = 0.0, 0
    while storm.poll() is None:
        short = cgroup / f"short-{polls}"
        short.mkdir()
        begin = time.perf_counter()
        found = {process.pid for process in target.poll()}
        slowest_s = max(slowest_s, time.perf_counter() - begin)
        short.rmdir()
        polls += 1
        assert stay.pid in found
    stay.kill()
    stay.wait()
    assert polls >= 5
    assert slowest_s < 0.5


def test_a_pid_list_loses_those_that_exit() -> None:
    child = subprocess.Popen(["sleep", "60"])
    target = PidsTarget(HOST, [child.pid, 2, os.getpid()])
    assert {process.pid for process in target.poll()} <= {child.pid, 2}
    assert child.pid in {process.pid for process in target.poll()}
    child.kill()
    child.wait()
    assert child.pid not in {process.pid for process in target.poll()}
