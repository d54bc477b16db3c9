"""Cgroups as folders: processes, values, and directories that vanish."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from memtier_engine.errors import ConfigError, KernelCallError
from memtier_engine.hostfs.cgroup import Cgroup, find_cgroup
from support.hostfolder import HostFolder


@pytest.fixture
def folder(tmp_path: Path) -> HostFolder:
    made = HostFolder(tmp_path)
    made.cgroup2()
    made.cgroup("/sys/fs/cgroup/pod", [10], memory_current="4096\n", memory_max="max\n")
    made.cgroup("/sys/fs/cgroup/pod/one", [11, 12])
    made.cgroup("/sys/fs/cgroup/pod/one/deep", [13])
    return made


def test_processes_are_listed_with_those_below_or_without(folder: HostFolder) -> None:
    cgroup = Cgroup(find_cgroup(folder.host, "/pod"), folder.host)
    assert cgroup.pids() == {10, 11, 12, 13}
    assert cgroup.pids(recursive=False) == {10}


def test_a_process_of_a_namespace_we_cannot_see_is_left_out(folder: HostFolder) -> None:
    folder.cgroup("/sys/fs/cgroup/pod", [0, 10])
    assert Cgroup(find_cgroup(folder.host, "/pod"), folder.host).pids(recursive=False) == {10}


def test_absent_values_and_no_limit_are_none(folder: HostFolder) -> None:
    cgroup = Cgroup(find_cgroup(folder.host, "/pod"), folder.host)
    assert cgroup.read_int("memory.current") == 4096
    assert cgroup.read_int("memory.max") is None
    assert cgroup.read_int("memory.swap.current") is None
    assert cgroup.stat("memory.stat") == {}
    assert cgroup.pressure() is None


def test_a_number_that_is_none_is_an_error_with_the_file(folder: HostFolder) -> None:
    folder.cgroup("/sys/fs/cgroup/pod", memory_current="what\n")
    with pytest.raises(KernelCallError, match=r"/sys/fs/cgroup/pod/memory\.current"):
        Cgroup(find_cgroup(folder.host, "/pod"), folder.host).read_int("memory.current")


def test_flat_keyed_files_become_a_dictionary(folder: HostFolder) -> None:
    folder.cgroup("/sys/fs/cgroup/pod", memory_stat="anon 12\nfile 0\npgfault 99\n")
    assert Cgroup(find_cgroup(folder.host, "/pod"), folder.host).stat() == {
        "anon": 12,
        "file": 0,
        "pgfault": 99,
    }


def test_a_removed_cgroup_has_no_processes_values_or_identity(folder: HostFolder) -> None:
    cgroup = Cgroup(find_cgroup(folder.host, "/pod"), folder.host)
    before = cgroup.inode
    shutil.rmtree(cgroup.path)
    assert before is not None
    assert cgroup.inode is None
    assert not cgroup.exists()
    assert cgroup.pids() == frozenset()
    assert cgroup.read_int("memory.current") is None


def test_a_directory_that_vanishes_during_the_walk_costs_only_itself(folder: HostFolder) -> None:
    """Removed after it was seen in its parent, before it is read."""
    cgroup = Cgroup(find_cgroup(folder.host, "/pod"), folder.host)
    folder.cgroup("/sys/fs/cgroup/pod/two", [21])
    walk = cgroup.directories()
    assert next(walk) == cgroup.path
    shutil.rmtree(cgroup.path / "one")
    assert list(walk) == [cgroup.path / "two"]
    assert cgroup.pids() == {10, 21}


def test_those_that_vanish_do_not_mix_up_the_paths_of_the_others(folder: HostFolder) -> None:
    names = [f"c{number}" for number in range(9)]
    for name in names:
        folder.cgroup(f"/sys/fs/cgroup/many/{name}/in", [20])
    cgroup = Cgroup(find_cgroup(folder.host, "/many"), folder.host)
    walk = cgroup.directories()
    next(walk)
    for name in names[::2]:
        shutil.rmtree(cgroup.path / name)
    left = {cgroup.path / name for name in names[1::2]}
    assert set(walk) == left | {path / "in" for path in left}


def test_links_are_not_followed_out_of_the_tree(folder: HostFolder) -> None:
    outside = folder.cgroup("/elsewhere", [666])
    (folder.root / "sys/fs/cgroup/pod/link").symlink_to(outside)
    assert 666 not in Cgroup(find_cgroup(folder.host, "/pod"), folder.host).pids()


@pytest.mark.parametrize("name", ["/sys/fs/cgroup/pod/one", "/pod/one", "pod/one"])
def test_a_cgroup_is_found_by_path_or_by_its_name_below_the_root(folder: HostFolder, name: str) -> None:
    assert find_cgroup(folder.host, name) == folder.root / "sys/fs/cgroup/pod/one"


@pytest.mark.parametrize("name", ["/sys/fs/cgroup/pod", "/sys/fs/cgroup/unified/pod", "/pod"])
def test_in_hybrid_mode_the_usual_path_finds_the_unified_tree(tmp_path: Path, name: str) -> None:
    folder = HostFolder(tmp_path)
    folder.cgroup2("/sys/fs/cgroup/unified")
    path = folder.cgroup("/sys/fs/cgroup/unified/pod", [5])
    assert find_cgroup(folder.host, name) == path
    shutil.rmtree(path)  # the answer is the same before the cgroup is made
    assert find_cgroup(folder.host, name) == path


def test_a_pod_cannot_name_a_cgroup_outside_the_tree(folder: HostFolder) -> None:
    """`..` in a name never leaves the cgroup root."""
    folder.cgroup("/secret", [1])
    with pytest.raises(ConfigError, match=r"\.\."):
        find_cgroup(folder.host, "/pod/../../../../secret")


def test_a_directory_that_one_may_not_look_into_is_not_there(
    folder: HostFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As whoever is not root: it ended the thread that follows processes."""
    real, closed = os.stat, str(folder.host.path("/root"))

    def stat(path: str | os.PathLike[str], *args: Any, **options: Any) -> os.stat_result:
        if os.fspath(path).startswith(closed):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert find_cgroup(folder.host, "/root") == folder.host.cgroup2_root / "root"
