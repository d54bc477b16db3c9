"""Who shares an address space with whom, of real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from memtier_engine.abi import syscalls
from memtier_engine.errors import AccessDenied, MemtierError
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.hostfs.mm import AddressSpaces, Compare
from support.odd_processes import FORKS, LEADER_ENDED, SHARED_MM, VFORK, running

HOST = Host()


@pytest.fixture(autouse=True)
def _kernel_tells() -> None:
    try:
        assert syscalls.kcmp_vm(os.getpid(), os.getpid()) == 0
    except MemtierError as error:
        pytest.skip(f"needs kcmp(2), CONFIG_KCMP=y and no seccomp filter against it: {error}")


class Counting:
    """kcmp, counted."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, one: int, other: int) -> int:
        self.calls += 1
        return syscalls.kcmp_vm(one, other)


def refused(one: int, other: int) -> int:
    raise AccessDenied("kcmp: Operation not permitted [EPERM]", 1)


def pids_of(spaces: AddressSpaces, pids: list[int]) -> list[set[int]]:
    return [{process.pid for process in group.processes} for group in spaces.groups(process_id(HOST, p) for p in pids)]


@pytest.mark.parametrize("compare", [syscalls.kcmp_vm, refused])
def test_two_processes_made_by_clone_vm_are_one_address_space(compare: Compare) -> None:
    with running(SHARED_MM) as (_, [parent, child]):
        spaces = AddressSpaces(HOST, compare=compare)
        (group,) = spaces.groups([process_id(HOST, child), process_id(HOST, parent)])
        assert [process.pid for process in group.processes] == [parent, child], "the oldest first"
        assert group.certain is (compare is not refused)
        assert (spaces.why_uncertain is None) is (compare is not refused)


def test_a_child_of_vfork_shares_until_it_executes_something() -> None:
    with running(VFORK) as (_, pids):
        assert len(pids) == 2
        assert pids_of(AddressSpaces(HOST), pids) == [set(pids)]


def test_forks_look_alike_and_are_apart_and_cost_few_calls() -> None:
    count = 300
    with running(FORKS, str(count)) as (_, pids):
        compare = Counting()
        spaces = AddressSpaces(HOST, compare=compare)
        processes = [process_id(HOST, pid) for pid in pids]
        assert [len(group.processes) for group in spaces.groups(processes)] == [1] * (count + 1)
        assert compare.calls <= 12 * count, "n times log n at first"
        compare.calls = 0
        assert len(spaces.groups(processes)) == count + 1
        assert compare.calls == 0, "what is apart stays so"
        assert len(spaces.groups(processes[:-1])) == count
        assert len(spaces.groups(processes)) == count + 1
        assert compare.calls <= count + 12, "one that is new: the order is checked, and its place found"


def test_threads_are_not_processes_and_a_process_whose_first_thread_ended_has_its_memory() -> None:
    with running(LEADER_ENDED) as (_, [pid, _, _]):
        (group,) = AddressSpaces(HOST).groups([process_id(HOST, pid)])
        assert group.layout, "as one of its threads has it"


def test_two_whose_first_threads_ended_are_not_one(  # kcmp calls two tasks without memory equal
) -> None:
    with (
        running(LEADER_ENDED, setup=("setarch", "-R")) as (_, [one, *_]),
        running(LEADER_ENDED, setup=("setarch", "-R")) as (_, [two, *_]),
    ):
        assert pids_of(AddressSpaces(HOST), [one, two]) == [{one}, {two}]


def test_one_that_executes_a_program_leaves_its_group() -> None:
    program = "import os, sys; sys.stdin.readline(); os.execvp('sleep', ['sleep', '1000'])"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, text=True) as child:
        try:
            spaces = AddressSpaces(HOST)
            process = process_id(HOST, child.pid)
            (before,) = spaces.groups([process])
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
            while (after := spaces.groups([process])) == [before]:
                time.sleep(0.01)
            assert after[0].processes == before.processes
            assert after[0].layout != before.layout
        finally:
            child.kill()


def test_the_same_program_without_randomisation_is_still_told_apart() -> None:
    """`setarch -R`, as databases and debuggers are started: all of them lie at the same addresses."""
    with (
        running(SHARED_MM, setup=("setarch", "-R")) as (_, one),
        running(SHARED_MM, setup=("setarch", "-R")) as (
            _,
            two,
        ),
    ):
        spaces = AddressSpaces(HOST)
        assert pids_of(spaces, one + two) == [set(one), set(two)]
        assert pids_of(spaces, one + two) == [set(one), set(two)], "and again, from what is known"


def test_without_kcmp_forks_of_other_sizes_are_told_apart_and_say_that_it_is_not_certain() -> None:
    with running(FORKS, "1") as (_, pids):
        assert pids_of(AddressSpaces(HOST, compare=refused), pids) == [{pids[0]}, {pids[1]}]


def test_those_that_are_gone_and_kernel_threads_do_no_harm() -> None:
    with running(SHARED_MM) as (parent, pids):
        spaces = AddressSpaces(HOST)
        processes = [process_id(HOST, pid) for pid in pids]
        assert len(spaces.groups(processes)) == 1
        os.kill(pids[1], 9)
        parent.kill()
        parent.wait()
        while any(os.path.exists(f"/proc/{pid}") for pid in pids):
            time.sleep(0.01)
        assert spaces.groups(processes) == []
        kthread = process_id(HOST, 2)
        assert [group.layout for group in spaces.groups([kthread])] == [b""]
