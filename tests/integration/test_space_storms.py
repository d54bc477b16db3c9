"""Processes that change while they are looked at: exec, fork, vfork, threads and mappings that come and go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memtier_engine.errors import KernelCallError
from memtier_engine.hostfs.cgroup import Cgroup
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import MappingsCache, read_stat_fields
from memtier_engine.hostfs.mm import AddressSpaces
from memtier_engine.hostfs.observers import Claim, Observers
from memtier_engine.model import ProcessId
from memtier_engine.targets.base import identify

HOST = Host()
ROUNDS = 50
BUSY_S = 0.5
"""CPU time that the program has to have used before it may end: it starts, then it changes."""

EXECS = """
import os, sys
count = int(sys.argv[1])
if count:
    os.execv(sys.executable, [sys.executable, "-S", "-E", "-c", os.environ["PROGRAM"], str(count - 1)])
"""
"""Executes itself again and again."""

FORKS = """
import os, time
while True:
    kids = []
    for _ in range(20):
        kid = os.fork()
        if not kid:
            os._exit(0)
        kids.append(kid)
    for kid in kids:
        os.waitpid(kid, 0)
"""

VFORKS = """
import os, subprocess
while True:
    subprocess.run(["true"], close_fds=False)
"""

THREADS = """
import threading, time
while True:
    threads = [threading.Thread(target=time.sleep, args=(0.001,)) for _ in range(20)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
"""

MAPPINGS = """
import ctypes, random
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
pages = 2000
base = libc.mmap(None, pages << 12, 3, 0x22, -1, 0)
while True:
    for page in range(0, pages, 2):
        libc.mprotect(base + (page << 12), 4096, 1)
    libc.mprotect(base, pages << 12, 3)
"""
"""A thousand small mappings that become one again, over and over: between two pieces of its maps they merge."""


def tree(pid: int) -> list[int]:
    """`pid` and its children of this moment."""
    try:
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    except (OSError, ValueError):
        return [pid]


def used_s(pid: int) -> float:
    """CPU time of `pid` and of those children that it has waited for."""
    fields = read_stat_fields(HOST, pid)
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    "program", [EXECS, FORKS, VFORKS, THREADS, MAPPINGS], ids=["exec", "fork", "vfork", "threads", "maps"]
)
def test_what_changes_meanwhile_is_seen_whole_or_not_at_all(program: str, tmp_path: Path) -> None:
    """No error but `KernelCallError` of one process, no process in two groups, no mapping that overlaps another."""
    child = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", program, "100000"],
        env={**os.environ, "PROGRAM": program},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    spaces, cache, observers = AddressSpaces(HOST), MappingsCache(), Observers(HOST, directory=tmp_path / "a" / "b")
    claims: dict[ProcessId, Claim] = {}
    try:
        rounds = 0
        while rounds < ROUNDS or used_s(child.pid) < BUSY_S:
            rounds += 1
            found = identify(HOST, tree(child.pid))
            groups = spaces.groups(found)
            members = [process for group in groups for process in group.processes]
            assert len(members) == len(set(members))
            assert set(members) <= found
            for process in members:
                try:
                    mappings = cache.read(HOST, process)
                except KernelCallError:
                    continue
                spans = mappings.tierable()
                assert (spans.ends > spans.starts).all()
                assert (spans.starts[1:] >= spans.ends[:-1]).all()
            cache.retain(found)
            assert len(cache) <= len(found)
            for process in [process for process in claims if process not in found]:
                claims.pop(process).release()
            for process in found - claims.keys():
                claim = observers.claim(process)
                assert isinstance(claim, Claim)
                claims[process] = claim
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        observers.close()
    assert any(process.pid == child.pid for process in claims), "the one that stays was there all the time"


def test_a_frozen_cgroup_is_read_like_any_other(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to make a cgroup: run the tests as root")
    path = HOST.cgroup2_root / f"memtier-frozen-{os.getpid()}"
    path.mkdir()
    child = subprocess.Popen(["sleep", "1000"])
    try:
        (path / "cgroup.procs").write_text(str(child.pid))
        (path / "cgroup.freeze").write_text("1")
        assert Cgroup(path, HOST).pids() == {child.pid}
        (process,) = identify(HOST, [child.pid])
        assert len(AddressSpaces(HOST).groups([process])) == 1
        assert len(MappingsCache().read(HOST, process)) > 5
    finally:
        (path / "cgroup.freeze").write_text("0")
        child.kill()
        child.wait()
        path.rmdir()
