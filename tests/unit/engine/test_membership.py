"""Whose processes are left to another observer: said once, in a line per observer, however many they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from memtier_engine.engine.membership import Membership
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.observers import Claim, Holder, Observers
from memtier_engine.model import ProcessId
from memtier_engine.pages.ages import ProcessPages
from memtier_engine.pages.space import Spaces
from support.hostfolder import HostFolder
from support.messages import messages


class Occupied(Observers):
    """A list in which others are there already."""

    def __init__(self, host: Host, directory: HostFolder) -> None:
        super().__init__(host, directory=directory.root / "memtier/observers")
        self.others: dict[int, Holder] = {}

    def claim(self, *processes: ProcessId, layout: bytes = b"") -> Claim | Holder:
        for process in processes:
            if process.pid in self.others:
                return self.others[process.pid]
        return super().claim(*processes, layout=layout)


@pytest.fixture
def said() -> Iterator[list[str]]:
    with messages("INFO") as lines:
        yield lines


@pytest.fixture
def folder(tmp_path: Path) -> HostFolder:
    return HostFolder(tmp_path)


def test_a_line_per_observer_and_one_when_they_are_free(folder: HostFolder, said: list[str]) -> None:
    observers = Occupied(folder.host, folder)
    spaces = Spaces(ProcessPages)
    membership = Membership(folder.host, spaces, said.append, observers=observers)
    processes = [ProcessId(pid, 5) for pid in range(1000, 1040)]
    for process in processes:
        folder.process(process.pid, start_ticks=5)
    for process in processes[1:]:
        who = (77, "memtier run --cgroup a") if process.pid < 1030 else (88, "memtierd")
        observers.others[process.pid] = Holder(process, *who)
    for _ in range(3):
        membership.follow(processes)
    assert said == [
        "29 processes (1001, 1002, 1003, 1004, 1005, ...) are observed already by `memtier run --cgroup a` (pid 77): "
        "they are left alone, since two observers blind each other",
        "10 processes (1030, 1031, 1032, 1033, 1034, ...) are observed already by `memtierd` (pid 88): "
        "they are left alone, since two observers blind each other",
    ]
    assert len(spaces) == 1
    said.clear()
    for process in processes[1:30]:
        del observers.others[process.pid]
    processes = processes[:-1]  # one of the others ended: that is nobody's matter
    for _ in range(2):
        membership.follow(processes)
    assert said == ["29 of the processes that had another observer are observed from now on"]
    assert len(spaces) == 30
    said.clear()
    observers.others[1035] = Holder(processes[35], 99, "another")
    membership.follow(processes)
    assert said == [], "who it is now is not worth a line"
    membership.close()


def test_what_the_target_does_not_mean_any_more_is_free_for_others(folder: HostFolder) -> None:
    processes = [ProcessId(pid, 5) for pid in (1000, 1001)]
    for process in processes:
        folder.process(process.pid, start_ticks=5)
    ours, theirs = (Observers(folder.host, directory=folder.root / "memtier/observers") for _ in range(2))
    membership = Membership(folder.host, Spaces(ProcessPages), lambda text: None, observers=ours)
    membership.follow(processes)
    assert isinstance(theirs.claim(processes[1]), Holder)
    membership.follow(processes[:1])
    assert isinstance(theirs.claim(processes[1]), Claim)
    assert isinstance(theirs.claim(processes[0]), Holder)
    membership.close()
    theirs.close()


def test_who_executes_a_program_is_claimed_with_its_new_layout(folder: HostFolder) -> None:
    """What had its parent's memory at the time of the claim has its own after that, and may share it with others."""
    claimed: list[bytes] = []

    class Noting(Observers):
        def claim(self, *processes: ProcessId, layout: bytes = b"") -> Claim | Holder:
            claimed.append(layout)
            return super().claim(*processes, layout=layout)

    def executes(text_begin: int) -> None:
        folder.process(1000, start_ticks=5)
        stat = (folder.root / "proc/1000/stat").read_text().rstrip()
        folder.write("proc/1000/stat", f"{stat} {text_begin} 9000 {' '.join(['7'] * 24)}\n")  # fields 26 to 51

    theirs = Observers(folder.host, directory=folder.root / "memtier/observers")
    membership = Membership(
        folder.host,
        Spaces(ProcessPages),
        lambda text: None,
        observers=Noting(folder.host, directory=folder.root / "memtier/observers"),
    )
    for begin in (4096, 4096, 8192, 8192):
        executes(begin)
        membership.follow([ProcessId(1000, 5)])
    assert len(claimed) == 2
    assert len(set(claimed)) == 2
    assert isinstance(theirs.claim(ProcessId(1000, 5)), Holder)
    membership.close()
    assert isinstance(theirs.claim(ProcessId(1000, 5)), Claim)
    theirs.close()
