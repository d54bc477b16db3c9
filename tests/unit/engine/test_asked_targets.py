"""What a person asks for is checked first; and what a machine is lost by is left out of what nobody named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memtier_engine.errors import MemtierError
from memtier_engine.model import ProcessId
from memtier_engine.targets import CgroupsTarget
from memtier_engine.targets.asked import check_cgroup, check_pid, check_processes
from memtier_engine.targets.sparing import SparingTarget
from support.hostfolder import PF_KTHREAD, HostFolder

ROOTS = ["", ".", "/", "./", "/sys/fs/cgroup", "/sys/fs/cgroup/", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/memory"]


@pytest.fixture
def folder(tmp_path: Path) -> HostFolder:
    made = HostFolder(tmp_path)
    made.cgroup2("/sys/fs/cgroup/unified")
    made.cgroup("/sys/fs/cgroup/memory")  # a v1 hierarchy
    made.cgroup("/sys/fs/cgroup/memory/old")
    names = {1: "tini", 10: "work", 11: "kubelet", 12: "containerd-shim", 13: "sshd"}
    for pid, name in names.items():
        made.process(pid, name=name)
        made.write(f"proc/{pid}/comm", f"{name}\n")
    made.cgroup("/sys/fs/cgroup/unified/a", [10])
    made.cgroup("/sys/fs/cgroup/unified/a/kubelet", [11, 12])
    made.cgroup("/sys/fs/cgroup/unified/init", [1, 13])
    made.cgroup("/sys/fs/cgroup/unified/empty")
    return made


@pytest.mark.parametrize("name", ROOTS)
def test_the_root_of_a_hierarchy_is_refused_unless_it_is_asked_for(folder: HostFolder, name: str) -> None:
    with pytest.raises(MemtierError, match="root of a hierarchy"):
        check_cgroup(folder.host, name)
    assert check_cgroup(folder.host, name, root_allowed=True).is_dir()


def test_a_link_is_what_it_leads_to(folder: HostFolder) -> None:
    (folder.root / "link").symlink_to(folder.root / "sys/fs/cgroup/unified")
    (folder.root / "inner").symlink_to(folder.root / "sys/fs/cgroup/unified/a")
    with pytest.raises(MemtierError, match="root of a hierarchy"):
        check_cgroup(folder.host, "/link")
    assert check_cgroup(folder.host, "/inner") == folder.root / "inner"


@pytest.mark.parametrize("name", ["a", "/a", "a/", "/sys/fs/cgroup/a", "/sys/fs/cgroup/unified/a/kubelet"])
def test_what_is_below_a_root_is_taken(folder: HostFolder, name: str) -> None:
    assert check_cgroup(folder.host, name).is_relative_to(folder.root / "sys/fs/cgroup/unified/a")
    assert check_cgroup(folder.host, "/sys/fs/cgroup/memory/old").name == "old"


@pytest.mark.parametrize(
    ("name", "why"),
    [("nosuch", "no such cgroup"), ("/proc", "no such cgroup"), ("dir", "is no cgroup"), ("..", r"\.\.")],
)
def test_what_is_no_cgroup_is_refused_with_the_reason(folder: HostFolder, name: str, why: str) -> None:
    (folder.root / "sys/fs/cgroup/unified/dir").mkdir()
    with pytest.raises(MemtierError, match=why):
        check_cgroup(folder.host, name)


def test_a_pid_that_nothing_can_come_of_is_refused_with_the_reason(folder: HostFolder) -> None:
    folder.process(20, flags=PF_KTHREAD)
    folder.process(21, state="Z")
    folder.process(22)
    folder.write("proc/22/status", "Name:\twork\nTgid:\t10\nPid:\t22\n")
    folder.process(23)
    (folder.root / "proc/23/maps").unlink()  # as one that may not be read
    reasons = {
        9: "there is no process 9",
        20: "thread of the kernel",
        21: "exited",
        22: "22 is a thread of process 10",
        23: "process 23 cannot be looked at: open /proc/23/maps",
    }
    for pid, reason in reasons.items():
        with pytest.raises(MemtierError, match=reason):
            check_pid(folder.host, pid)
    check_pid(folder.host, 10)


def test_none_or_none_that_may_be_looked_at_is_an_error_and_one_of_many_is_enough(folder: HostFolder) -> None:
    hidden, seen = ProcessId(11, 100), ProcessId(10, 100)
    (folder.root / "proc/11/maps").unlink()
    with pytest.raises(MemtierError, match="there is no process"):
        check_processes(folder.host, [])
    with pytest.raises(MemtierError, match="process 11 cannot be looked at"):
        check_processes(folder.host, [hidden])
    check_processes(folder.host, [hidden, seen])


def pids(target: SparingTarget) -> set[int]:
    return {process.pid for process in target.poll()}


def test_init_logins_and_the_container_runtime_are_left_alone_unless_their_own_cgroup_is_named(
    folder: HostFolder,
) -> None:
    host = folder.host
    everything = SparingTarget(host, CgroupsTarget(host, ["/a", "/init"]))
    assert pids(everything) == {10}
    assert everything.spared == {"tini", "sshd", "kubelet", "containerd-shim"}
    above = SparingTarget(host, CgroupsTarget(host, ["/a"]), named=[check_cgroup(host, "/a")])
    assert pids(above) == {10}
    itself = SparingTarget(host, CgroupsTarget(host, ["/a/kubelet"]), named=[check_cgroup(host, "/a/kubelet")])
    assert pids(itself) == {11, 12}
    assert itself.spared == set()


def test_a_process_that_becomes_another_program_is_judged_anew(folder: HostFolder) -> None:
    target = SparingTarget(folder.host, CgroupsTarget(folder.host, ["/a"]))
    assert pids(target) == {10}
    folder.write("proc/10/comm", "runc\n")
    folder.write("proc/11/comm", "sh\n")
    assert pids(target) == {11}


def test_engines_of_the_library_refuse_what_nothing_would_come_of() -> None:
    from memtier_engine import Engine

    for pid in ((1 << 22) - 3, os.getpid()):
        with pytest.raises(MemtierError, match=str(pid)):
            Engine.for_pid(pid, idle_after_s=10)
    for name in ("", "/nosuch-cgroup"):
        with pytest.raises(MemtierError, match="cgroup"):  # where there is no v2 tree as well
            Engine.for_cgroup(name, idle_after_s=10)
