"""Cgroups that are odd but legal: threaded, deeper than a path may be long, with a directory nobody may read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from loguru import logger

from memtier_engine.errors import KernelCallError, Unavailable
from memtier_engine.hostfs import cgroup as hostfs_cgroup
from memtier_engine.hostfs.cgroup import Cgroup
from memtier_engine.hostfs.host import Host
from memtier_engine.targets import CgroupsTarget

HOST = Host()
Start = Callable[..., subprocess.Popen[str]]

THREADS = """
import sys, threading, time
for _ in range(int(sys.argv[1])):
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
print("ready", *(thread.native_id for thread in threading.enumerate()), flush=True)
time.sleep(1000)
"""


def _v1_memory() -> Path | None:
    found = Path("/sys/fs/cgroup/memory")
    return found if (found / "cgroup.procs").exists() and not (found / "cgroup.controllers").exists() else None


@pytest.fixture(params=["v2", "v1"])
def root(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A new cgroup, removed afterwards with all below it, however deep."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make a cgroup: run the tests as root")
    try:
        mount = HOST.cgroup2_root if request.param == "v2" else _v1_memory()
    except Unavailable as error:
        pytest.skip(f"needs cgroup v2: {error}")
    if mount is None:
        pytest.skip("needs a cgroup v1 hierarchy: boot with systemd.unified_cgroup_hierarchy=0")
    path = mount / f"memtier-odd-{os.getpid()}"
    path.mkdir()
    yield path
    for _, names, _, fd in os.fwalk(path, topdown=False):
        for name in names:
            os.rmdir(name, dir_fd=fd)
    path.rmdir()


@pytest.fixture
def start(root: Path) -> Iterator[Start]:
    """Starts `sleep`, or a program, in a cgroup below `root`; all are ended before it is removed."""
    children = []

    def started(
        program: str = "import time; print('ready', flush=True); time.sleep(1000)", *arguments: str
    ) -> subprocess.Popen[str]:
        child = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
        children.append(child)
        return child

    yield started
    for child in children:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def deep(root: Path, levels: int, pid: int | None = None, name: str = "d" * 200) -> None:
    """Directories one in the other, below `root`; `pid` goes into the last."""
    fd = os.open(root, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    if pid is not None:
        procs = os.open("cgroup.procs", os.O_WRONLY, dir_fd=fd)
        os.write(procs, str(pid).encode())
        os.close(procs)
    os.close(fd)


def poll(path: Path) -> tuple[set[int], list[str]]:
    """(the pids that a target finds, what it warns of) in two polls."""
    messages: list[str] = []
    logger.enable("memtier_engine")
    sink = logger.add(lambda message: messages.append(str(message)), level="WARNING", format="{message}")
    try:
        target = CgroupsTarget(HOST, [path])
        target.poll()
        return {process.pid for process in target.poll()}, messages
    finally:
        logger.remove(sink)
        logger.disable("memtier_engine")


def test_processes_deeper_than_a_path_may_be_long_are_found(root: Path, start: Start) -> None:
    """A tenant who may make cgroups can nest them so; whoever sits beside must not vanish from the target."""
    beside, lowest, between = start(), start(), start()
    (root / "z").mkdir()
    (root / "a").mkdir()
    (root / "a" / "cgroup.procs").write_text(str(beside.pid))
    deep(root, 30, lowest.pid)
    (root / ("d" * 200) / "e").mkdir()
    (root / ("d" * 200) / "e" / "cgroup.procs").write_text(str(between.pid))
    assert poll(root) == ({beside.pid, lowest.pid, between.pid}, [])
    assert Cgroup(root, HOST).pids() == {beside.pid, lowest.pid, between.pid}
    told: list[KernelCallError] = []
    listed = list(Cgroup(root, HOST).directories(told.append))
    assert len(listed) + len(told) == 34
    assert all((path / "cgroup.procs").exists() for path in listed), "each can be used as a path"
    assert "ENAMETOOLONG" in str(told[0])
    assert "levels below" in str(told[0])
    assert len(str(told[0])) < 2500


def test_what_lies_beside_something_deep_is_found_on_the_way_back(root: Path, start: Start) -> None:
    """At each level two directories; one of them goes on, the other has a process at some levels."""
    children = {}
    fd = os.open(root, os.O_RDONLY)
    for level in range(40):
        for name in ("aside", "b", "zaside"):
            os.mkdir(name, dir_fd=fd)
        if level % 13 == 0:
            for name in ("aside", "zaside"):
                children[level, name] = start()
                procs = os.open(f"{name}/cgroup.procs", os.O_WRONLY, dir_fd=fd)
                os.write(procs, str(children[level, name].pid).encode())
                os.close(procs)
        below = os.open("b", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    assert Cgroup(root, HOST).pids() == {child.pid for child in children.values()}
    assert len(list(Cgroup(root, HOST).directories())) == 121


def test_few_files_are_open_however_deep_it_goes(root: Path) -> None:
    deep(root, 100, name="x")
    deep(root, 40, name="y")
    before = len(os.listdir("/proc/self/fd"))
    most = 0
    for _ in Cgroup(root, HOST).directories():
        most = max(most, len(os.listdir("/proc/self/fd")))
    assert most - before <= hostfs_cgroup._LEVELS_OPEN + 2
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(list(Cgroup(root, HOST).directories())) == 141


def test_an_abandoned_walk_leaves_no_file_open(root: Path) -> None:
    deep(root, 3)
    before = len(os.listdir("/proc/self/fd"))
    walk = Cgroup(root, HOST).directories()
    next(walk)
    next(walk)
    del walk
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("root", ["v2"], indirect=True)
def test_a_threaded_cgroup_means_the_processes_that_have_threads_in_it(root: Path, start: Start) -> None:
    """Its cgroup.procs cannot be read (EOPNOTSUPP): memory is its domain's, but a person may name it all the same."""
    threaded = root / "threaded"
    (threaded / "below").mkdir(parents=True)
    child, other = start(THREADS, "200"), start(THREADS, "1")
    for each in (child, other):
        (root / "cgroup.procs").write_text(str(each.pid))
    (threaded / "cgroup.type").write_text("threaded")
    (threaded / "below" / "cgroup.type").write_text("threaded")
    assert child.stdout is not None
    assert other.stdout is not None
    threads = child.stdout.readline().split()[1:]
    for thread in threads[1:]:
        (threaded / "cgroup.threads").write_text(thread)
    (threaded / "below" / "cgroup.threads").write_text(other.stdout.readline().split()[2])
    assert poll(threaded) == ({child.pid, other.pid}, [])
    assert poll(threaded / "below") == ({other.pid}, [])
    assert poll(root) == ({child.pid, other.pid}, []), "the domain's list has them anyway"
    assert Cgroup(threaded, HOST).pids(recursive=False) == frozenset()


def test_a_directory_that_cannot_be_read_costs_only_itself_and_is_told_once(
    root: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a security module, or a limit of open files, may have it."""
    outside, inside = start(), start()
    (root / "cgroup.procs").write_text(str(outside.pid))
    for name in ("one", "two", "three"):
        (root / name / "in").mkdir(parents=True)
    (root / "three" / "in" / "cgroup.procs").write_text(str(inside.pid))
    real_open = os.open

    def refusing(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path in ("one", "two"):
            raise PermissionError(13, "Permission denied")
        return real_open(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refusing)
    pids, messages = poll(root)
    assert pids == {outside.pid, inside.pid}
    assert len(messages) == 1, "two polls, two directories, one line"
    assert "EACCES" in messages[0]
    assert "and 1 more" in messages[0]
    with pytest.raises(KernelCallError, match="EACCES"):
        Cgroup(root, HOST).pids()
