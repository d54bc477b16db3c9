"""Who shares an address space, by an invented kernel: its order, its refusals, what changes between two calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from memtier_engine.errors import AccessDenied, ProcessGone
from memtier_engine.hostfs.mm import AddressSpaces
from memtier_engine.model import ProcessId
from support.hostfolder import HostFolder


class Kernel:
    """Processes with an address space and a layout each."""

    def __init__(self, root: Path) -> None:
        self.folder = HostFolder(root)
        self.mm: dict[int, int] = {}
        self.calls = 0
        self.refuses = False

    def process(self, pid: int, *, mm: int, layout: int = 1, state: str = "S", size: int = 100) -> ProcessId:
        before = " ".join(["1"] * 17)
        fields = [*before.split(), "0", str(pid), *["4096"] * 3, str(1000 + layout), *["7"] * 18, *[str(layout)] * 8]
        # From the third field on: state, then so many that the start time is the 22nd and the code the 26th.
        self.folder.write(f"proc/{pid}/stat", f"{pid} (a) b) {state} {' '.join(fields)}\n")
        self.folder.write(f"proc/{pid}/statm", f"{size} {size} 0 0 0 0 0\n")
        self.mm[pid] = mm
        return ProcessId(pid, pid)

    def compare(self, one: int, other: int) -> int:
        self.calls += 1
        if self.refuses:
            raise AccessDenied("kcmp: Operation not permitted [EPERM]", 1)
        if one not in self.mm or other not in self.mm:
            raise ProcessGone("kcmp: No such process [ESRCH]", 3)
        a, b = self.mm[one], self.mm[other]
        return 0 if a == b else 1 if a < b else 2

    def spaces(self) -> AddressSpaces:
        return AddressSpaces(self.folder.host, compare=self.compare)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def pids(spaces: AddressSpaces, processes: list[ProcessId]) -> list[list[int]]:
    return [[process.pid for process in group.processes] for group in spaces.groups(processes)]


def test_those_that_lie_elsewhere_are_not_asked_about(kernel: Kernel) -> None:
    processes = [kernel.process(pid, mm=pid, layout=pid) for pid in range(1, 50)]
    assert pids(kernel.spaces(), processes) == [[pid] for pid in range(1, 50)]
    assert kernel.calls == 0


def test_groups_are_found_among_those_that_look_alike(kernel: Kernel) -> None:
    processes = [kernel.process(pid, mm=pid % 7, layout=1) for pid in range(1, 50)]
    found = pids(kernel.spaces(), processes)
    assert sorted(found) == sorted([pid for pid in range(1, 50) if pid % 7 == mm] for mm in range(7))


def test_one_of_a_group_that_gets_a_memory_of_its_own_without_another_layout_is_noticed(kernel: Kernel) -> None:
    """execve(2) of the same program where addresses are not random."""
    spaces = kernel.spaces()
    processes = [kernel.process(pid, mm=5) for pid in (1, 2, 3)]
    assert pids(spaces, processes) == [[1, 2, 3]]
    kernel.mm[2] = 4
    assert pids(spaces, processes) == [[1, 3], [2]]


def test_a_new_one_finds_its_group_though_others_have_changed_places(kernel: Kernel) -> None:
    """The kernel's order is by address, and an exec gives another one: what was sorted is not any more."""
    spaces = kernel.spaces()
    processes = [kernel.process(pid, mm=pid * 10) for pid in range(1, 40)]
    assert len(spaces.groups(processes)) == 39
    for pid in range(1, 40):
        kernel.mm[pid] = (pid * 17) % 41 * 10 + 1
    new = [kernel.process(100 + pid, mm=kernel.mm[pid]) for pid in (1, 20, 39)]
    found = pids(spaces, processes + new)
    assert [group for group in found if len(group) > 1] == [[1, 101], [20, 120], [39, 139]]
    assert len(found) == 39


def test_who_vanishes_between_two_looks_does_no_harm(kernel: Kernel) -> None:
    spaces = kernel.spaces()
    processes = [kernel.process(pid, mm=pid % 3) for pid in range(1, 20)]
    del kernel.mm[5], kernel.mm[6]
    found = pids(spaces, processes)
    assert sorted(pid for group in found for pid in group) == list(range(1, 20))
    assert [pid for group in found if 1 in group for pid in group] == [1, 4, 7, 10, 13, 16, 19]


def test_where_the_kernel_does_not_tell_those_that_look_alike_are_one_and_it_says_so(kernel: Kernel) -> None:
    spaces = kernel.spaces()
    kernel.refuses = True
    alike = [kernel.process(pid, mm=pid) for pid in (1, 2)]
    other = kernel.process(3, mm=3, size=101)
    elsewhere = kernel.process(4, mm=4, layout=9)
    groups = spaces.groups([*alike, other, elsewhere])
    assert [([p.pid for p in group.processes], group.certain) for group in groups] == [
        ([1, 2], False),
        ([3], False),
        ([4], True),
    ]
    assert spaces.why_uncertain == "kcmp: Operation not permitted [EPERM]"
    kernel.refuses = False
    assert pids(spaces, [*alike, other]) == [[1], [2], [3]], "asked again when it may be"
    assert spaces.why_uncertain is None


def test_a_zombie_and_one_that_is_gone_are_in_no_group(kernel: Kernel) -> None:
    zombie = kernel.process(1, mm=1, state="Z")
    kernel.folder.process(2, start_ticks=2)  # a stat of few fields, as of a kernel that hides them
    assert pids(kernel.spaces(), [ProcessId(2, 2), ProcessId(9, 9)]) == [[2]]
    assert pids(kernel.spaces(), [ProcessId(9, 9), zombie]) == []
