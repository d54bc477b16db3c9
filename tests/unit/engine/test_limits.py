"""The limit of open files, raised once at a program's start; and what the targets need of it."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from memtier_engine.hostfs import limits


def in_a_process_with(soft: int, hard: int, program: str, *arguments: str) -> str:
    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, preexec_fn=lower, stdout=subprocess.PIPE, text=True, check=True).stdout


RAISE = """
import resource
from memtier_engine.hostfs.limits import raise_open_files
print(raise_open_files(), raise_open_files(), resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "said"),
    [
        (64, 200, "(64, 200) (200, 200) (200, 200)\n"),
        (200, 200, "(200, 200) (200, 200) (200, 200)\n"),
    ],
)
def test_soft_becomes_hard_and_twice_is_once(soft: int, hard: int, said: str) -> None:
    assert in_a_process_with(soft, hard, RAISE) == said


def test_where_it_may_not_be_raised_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(which: int, to: tuple[int, int]) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, 200))
    monkeypatch.setattr(resource, "setrlimit", refused)
    assert limits.raise_open_files() == (100, 100)


MANY = """
import os, signal, sys
from pathlib import Path
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import MappingsCache
from memtier_engine.hostfs.mm import AddressSpaces
from memtier_engine.hostfs.observers import Claim, Observers
from memtier_engine.targets import PidsTarget
count = int(sys.argv[1])
kids = []
for _ in range(count):
    kid = os.fork()
    if not kid:
        signal.pause()
    kids.append(kid)
try:
    host = Host()
    found = PidsTarget(host, kids).poll()
    groups = AddressSpaces(host).groups(found)
    cache = MappingsCache()
    mapped = [len(cache.read(host, process)) > 0 for process in found]
    observers = Observers(host, directory=Path(sys.argv[2]) / "a" / "b")
    claimed = [isinstance(observers.claim(process), Claim) for process in found]
    print(len(found), len(groups), sum(mapped), sum(claimed), len(os.listdir("/proc/self/fd")) < 16)
finally:
    for kid in kids:
        os.kill(kid, signal.SIGKILL)
"""


def test_two_thousand_processes_are_found_grouped_read_and_claimed_with_few_files(tmp_path: object) -> None:
    assert in_a_process_with(32, 32, MANY, "2000", str(tmp_path)) == "2000 2000 2000 2000 True\n"
