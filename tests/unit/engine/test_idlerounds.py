"""Trackers that look together: every frame is asked for once a round, and nothing that was seen is lost."""

from __future__ import annotations

import numpy as np
import pytest

from memtier_engine.abi.constants import PM_MMAP_EXCLUSIVE, PM_PRESENT
from memtier_engine.errors import ProcessGone
from memtier_engine.hostfs.host import Host
from memtier_engine.model import U64, Bools, ProcessId, Spans
from memtier_engine.trackers.idlerounds import IdleRounds
from support.fakes import BASE, spans

A, B, C = (ProcessId(pid, 1) for pid in (101, 102, 103))


class Machine(IdleRounds):
    """Frames of process P are P * 1000 + page; the test says what was touched."""

    def __init__(self, round_pages: int = 1000) -> None:
        self.time_s = 0.0
        self.asked: list[list[int]] = []
        self.touched: set[int] = set()
        self.gone: set[ProcessId] = set()
        self.closed = 0
        super().__init__(Host(), lambda host: self, now_s=lambda: self.time_s, round_pages=round_pages)

    def touched_and_marked(self, frames: U64) -> Bools:
        self.asked.append(sorted(frames.tolist()))
        found = np.isin(frames, np.array(sorted(self.touched), np.uint64))
        self.touched -= set(frames.tolist())
        return found

    def close(self) -> None:
        self.closed += 1

    def _words(self, process: ProcessId, where: Spans) -> U64:
        if process in self.gone:
            raise ProcessGone("gone", 3)
        pages = [np.arange(int(start), int(end), 4096) for start, end in zip(where.starts, where.ends, strict=True)]
        numbers = (np.concatenate(pages) - BASE) // 4096
        return (numbers + process.pid * 1000).astype(np.uint64) | np.uint64(PM_PRESENT | PM_MMAP_EXCLUSIVE)

    def touch(self, process: ProcessId, *pages: int) -> None:
        self.touched |= {process.pid * 1000 + page for page in pages}

    def look(self, tracker: str, process: ProcessId, mapped: Spans) -> list[int]:
        """Pages that the tracker hears were touched, counted from `BASE`."""
        found = []
        for chunk in self.scan(tracker, process, mapped):
            for part in chunk.parts():
                found += [(part.start - BASE) // 4096 + int(page) for page in np.flatnonzero(part.accessed)]
        return found


@pytest.fixture
def machine() -> Machine:
    made = Machine()
    for tracker in "ab":
        made.join(tracker, 10.0)
    return made


def settle(machine: Machine, mapped: Spans) -> None:
    """The first looks: all counts as touched."""
    for tracker, process in (("a", A), ("b", B)):
        assert machine.look(tracker, process, mapped) == [0, 1, 2, 3]
    machine.asked.clear()
    machine.touched.clear()
    machine.time_s = 10.0


def test_one_round_serves_all_that_are_due(machine: Machine) -> None:
    mapped = spans((0, 4))
    settle(machine, mapped)
    machine.touch(A, 1)
    machine.touch(B, 2, 3)
    assert machine.look("a", A, mapped) == [1]
    machine.time_s += 0.1
    assert machine.look("b", B, mapped) == [2, 3]
    assert machine.asked == [[101000, 101001, 101002, 101003, 102000, 102001, 102002, 102003]]


def test_the_next_interval_is_a_round_of_its_own(machine: Machine) -> None:
    mapped = spans((0, 4))
    settle(machine, mapped)
    for _ in range(3):
        machine.touch(B, 0)
        assert machine.look("a", A, mapped) == []
        assert machine.look("b", B, mapped) == [0]
        machine.time_s += 10
    assert len(machine.asked) == 3


def test_a_sleeper_is_not_looked_at_and_hears_of_everything_when_it_scans_again(machine: Machine) -> None:
    """B's tracker leaves scans out; what the one round after its last scan saw is added to what comes later."""
    mapped = spans((0, 4))
    settle(machine, mapped)
    machine.touch(B, 1)
    machine.look("a", A, mapped)
    for _ in range(3):
        machine.time_s += 10
        machine.look("a", A, mapped)
    assert machine.asked[-1] == [101000, 101001, 101002, 101003]
    machine.touch(B, 3)
    machine.time_s += 10
    assert machine.look("b", B, mapped) == [1, 3]


def test_mappings_that_changed_since_the_round_are_followed(machine: Machine) -> None:
    """What is new is not known to be in RAM; at the next look it counts as touched, as the bit says."""
    settle(machine, spans((0, 4)))
    machine.touch(B, 2)
    machine.look("a", A, spans((0, 4)))
    (chunk,) = machine.scan("b", B, spans((1, 6)))
    assert chunk.accessed.tolist() == [False, True, False, False, False]
    assert chunk.resident.tolist() == [True, True, True, False, False]
    machine.time_s += 10
    machine.touch(B, 4, 5)
    assert machine.look("b", B, spans((1, 6))) == [4, 5]


def test_a_process_with_new_mappings_at_its_own_round_has_them_touched(machine: Machine) -> None:
    settle(machine, spans((0, 4)))
    assert machine.look("a", A, spans((0, 4), (8, 10))) == [8, 9]


def test_who_exits_costs_the_others_nothing(machine: Machine) -> None:
    mapped = spans((0, 4))
    settle(machine, mapped)
    machine.gone = {B}
    assert machine.look("a", A, mapped) == []
    with pytest.raises(ProcessGone):
        machine.look("b", B, mapped)


def test_a_round_is_bounded_but_never_leaves_out_who_began_it() -> None:
    machine = Machine(round_pages=3)
    for tracker in "ab":
        machine.join(tracker, 10.0)
    settle(machine, spans((0, 4)))
    machine.look("a", A, spans((0, 4)))
    assert [len(asked) for asked in machine.asked] == [4]
    machine.look("b", B, spans((0, 4)))
    assert [len(asked) for asked in machine.asked] == [4, 4]


def test_the_last_to_leave_closes_the_bitmap(machine: Machine) -> None:
    machine.leave("a")
    machine.leave("a")
    assert machine.closed == 0
    machine.leave("b")
    assert machine.closed == 1


def test_forgotten_processes_are_new_when_they_return(machine: Machine) -> None:
    settle(machine, spans((0, 4)))
    machine.keep("a", frozenset({C}))
    assert machine.look("a", A, spans((0, 4))) == [0, 1, 2, 3]
