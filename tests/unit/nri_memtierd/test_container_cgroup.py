"""From what the runtime says about a container to its cgroup directory."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtier_cli.nri_memtierd import container_cgroup
from memtier_cli.nri_memtierd.container_cgroup import (
    BadCgroupsPath,
    CgroupNotFound,
    CgroupTree,
    ContainerCgroup,
    expand_slice,
    find_container_cgroup,
    names_container,
    relative_path,
)

ID = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
UID = "1b4e28ba_2fa1_11d2_883f_0016d3cca427"
SLICES = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + UID + ".slice"


@pytest.mark.parametrize(
    ("cgroups_path", "directory"),
    [
        (f"kubepods-burstable-pod{UID}.slice:cri-containerd:{ID}", f"{SLICES}/cri-containerd-{ID}.scope"),
        (f"kubepods-burstable-pod{UID}.slice:crio:{ID}", f"{SLICES}/crio-{ID}.scope"),
        (f"kubepods-pod{UID}.slice:crio:{ID}", f"kubepods.slice/kubepods-pod{UID}.slice/crio-{ID}.scope"),
        (f"/kubepods/burstable/pod1-2/{ID}", f"kubepods/burstable/pod1-2/{ID}"),
        (f"/kubepods/besteffort/pod1-2/crio-{ID}", f"kubepods/besteffort/pod1-2/crio-{ID}"),
        (f"kubepods/pod1/{ID}", f"kubepods/pod1/{ID}"),
        (f"//a//{ID}/", f"a/{ID}"),
        (":cri-containerd:x", "system.slice/cri-containerd-x.scope"),
        ("a.slice::x", "a.slice/x.scope"),
        ("-.slice:p:x", "p-x.scope"),
        ("a.slice:p:a-b.slice", "a.slice/a-b.slice"),
        (
            "kubelet-kubepods.slice:cri-containerd:x",
            "kubelet.slice/kubelet-kubepods.slice/cri-containerd-x.scope",
        ),
    ],
)
def test_both_drivers_and_both_runtimes_are_understood(cgroups_path: str, directory: str) -> None:
    assert relative_path(cgroups_path) == PurePosixPath(directory)


@pytest.mark.parametrize(
    "cgroups_path",
    ["", "/", "..", "/a/../b", "/..", "a/./b", "a.slice:p:", "a:p:x", "a--b.slice:p:x", "-a.slice:p:x", "a-.slice:p:x",
     ".slice:p:x", "a.slice:p:..", "a\0b/c"],
)  # fmt: skip
def test_a_path_that_no_runtime_makes_is_refused(cgroups_path: str) -> None:
    with pytest.raises(BadCgroupsPath):
        relative_path(cgroups_path)


def test_slices_expand_as_systemd_says() -> None:
    assert expand_slice("a-b-c.slice") == PurePosixPath("a.slice/a-b.slice/a-b-c.slice")
    assert expand_slice("-.slice") == PurePosixPath()


@given(st.text(max_size=40))
def test_no_text_leads_out_of_the_tree(text: str) -> None:
    try:
        path = relative_path(text)
    except BadCgroupsPath:
        return
    assert not path.is_absolute()
    assert ".." not in path.parts
    assert path.parts


@pytest.mark.parametrize(
    "name", [ID, f"crio-{ID}", f"cri-containerd-{ID}.scope", f"{ID}.scope", f"pod.slice:crio:{ID}"]
)
def test_the_names_that_runtimes_give_are_known(name: str) -> None:
    assert names_container(name, ID)


@pytest.mark.parametrize(
    "name", [f"crio-conmon-{ID}", f"crio-conmon-{ID}.scope", f"x{ID}", f"{ID}0", f"{ID}.slice", ""]
)
def test_a_name_that_only_has_the_id_in_it_is_not_the_containers(name: str) -> None:
    assert not names_container(name, ID)
    assert not names_container(name, "")


class Node:
    """A cgroup tree and a /proc in a folder."""

    def __init__(self, base: Path) -> None:
        self.root = base / "cgroup"
        self.root.mkdir()
        self.proc = base / "proc"

    def make(self, path: str) -> Path:
        made = self.root / path
        made.mkdir(parents=True)
        return made

    def process(self, pid: int, cgroup: str) -> None:
        (self.proc / str(pid)).mkdir(parents=True)
        (self.proc / str(pid) / "cgroup").write_text(f"1:name=systemd:/x\n0::{cgroup}\n")

    def find(self, cgroups_path: str, pid: int | None = None, container_id: str = ID) -> ContainerCgroup:
        return find_container_cgroup(
            self.root, container_id=container_id, cgroups_path=cgroups_path, pid=pid, proc=self.proc
        )


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_the_runtimes_word_comes_first(node: Node) -> None:
    node.make(f"kubepods/pod1/crio-conmon-{ID}")
    made = node.make(f"kubepods/pod1/crio-{ID}")
    found = node.find(f"/kubepods/pod1/crio-{ID}")
    assert found == ContainerCgroup(made, made.stat().st_ino)


def test_the_containers_process_is_asked_next_and_cruns_inner_cgroup_is_left(node: Node) -> None:
    """crun runs the processes in SCOPE/container; the engine reads everything below the scope."""
    made = node.make(f"kind/kubepods.slice/cri-containerd-{ID}.scope")
    (made / "container").mkdir()
    node.process(7, f"/kind/kubepods.slice/cri-containerd-{ID}.scope/container")
    assert node.find(f"kubepods.slice:cri-containerd:{ID}", pid=7).path == made


@pytest.mark.parametrize("cgroup", ["/", "/system.slice/x.service", f"/../../pod/{ID}"])
def test_a_process_elsewhere_does_not_count(node: Node, cgroup: str) -> None:
    """Its pid may belong to another process by now; and the root would be the whole node."""
    node.make("system.slice/x.service")
    node.process(7, cgroup)
    with pytest.raises(CgroupNotFound):
        node.find(f"/kubepods/{ID}", pid=7)


def test_at_last_the_tree_is_searched_by_the_last_name_only(node: Node) -> None:
    node.make(f"a/crio-conmon-{ID}/inner")
    node.make(f"b/prefix-{ID}-suffix")
    made = node.make(f"c/pod/crio-{ID}.scope")
    assert node.find("").path == made


def test_without_a_cgroup_there_is_an_error_and_never_another_cgroup(node: Node) -> None:
    node.make("kubepods/pod1/other")
    with pytest.raises(CgroupNotFound, match="does not exist"):
        node.find(f"/kubepods/pod1/{ID}")
    with pytest.raises(CgroupNotFound, match="no container id"):
        node.find("/kubepods/pod1/other", container_id="")
    with pytest.raises(CgroupNotFound):
        node.find("/")


def test_a_link_out_of_the_tree_is_not_followed(node: Node, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (node.root / "pod").symlink_to(tmp_path / "outside")
    with pytest.raises(CgroupNotFound):
        node.find("/pod")


def test_a_cgroup_made_again_under_the_same_name_is_another(node: Node) -> None:
    made = node.make(f"pod/{ID}")
    found = node.find(f"/pod/{ID}")
    assert found.is_there()
    another = node.make("another")  # first: an inode that is free may be handed out again at once
    made.rmdir()
    another.rename(made)
    assert not found.is_there()


@pytest.mark.parametrize("ups", [1, 2, 5])
@pytest.mark.parametrize("inner", ["", "/container", "/container/deeper"])
def test_a_process_is_found_from_within_a_cgroup_namespace(node: Node, ups: int, inner: str) -> None:
    """A pod has one on cgroup v2: the kernel then gives paths from that pod's own cgroup."""
    node.make(f"elsewhere/other/{ID}")  # the same name, another place
    made = node.make(f"kubepods/burstable/pod1/{ID}")
    (made / "container" / "deeper").mkdir(parents=True)
    node.process(7, f"{'/..' * ups}/burstable/pod1/{ID}{inner}")
    assert node.find("/not/there", pid=7).path == made


@pytest.mark.parametrize("cgroup", ["/..", "/../..", f"/../pod/../{ID}", f"/../elsewhere/{ID}", f"/pod1/../{ID}"])
def test_dots_that_lead_to_no_directory_of_that_path_do_not_count(node: Node, cgroup: str) -> None:
    node.make(f"kubepods/crio-conmon-{ID}")
    node.make("kubepods/pod1/other")
    node.process(7, cgroup)
    with pytest.raises(CgroupNotFound):
        node.find("/not/there", pid=7)


@pytest.mark.parametrize(
    "text", ["/a\0b", "a.slice:p:x\0y", "a.slice:p\0:x", "\0", "/\ud800", "/a\nb", "/" + "x" * 5000]
)
def test_whatever_a_path_holds_only_that_container_is_not_found(node: Node, text: str) -> None:
    tree = CgroupTree(node.root)
    with pytest.raises(CgroupNotFound):
        tree.find(container_id=ID, cgroups_path=text)
    made = node.make(f"pod/{ID}")
    assert tree.find(container_id=ID, cgroups_path=f"/pod/{ID}").path == made


@given(st.text(max_size=30), st.text(max_size=10))
def test_any_words_of_a_runtime_find_a_directory_inside_or_none(cgroups_path: str, container_id: str) -> None:
    with TemporaryDirectory() as base:
        root = Path(base) / "cg"
        (root / "a.slice" / "p-x.scope").mkdir(parents=True)
        try:
            found = CgroupTree(root).find(container_id=container_id, cgroups_path=cgroups_path)
        except CgroupNotFound:
            return
        assert found.path.resolve().is_relative_to(root.resolve())
        assert found.path.resolve() != root.resolve()


def test_the_tree_is_walked_once_for_all(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty containers of a runtime that says other paths than it makes: sixty walks took too long."""
    made = [node.make(f"kubepods/pod{number}/crio-{number:064x}.scope") for number in range(60)]
    looks = 0
    scandir = os.scandir

    def counted(path: str) -> object:
        nonlocal looks
        looks += 1
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    tree = CgroupTree(node.root)
    for number, path in enumerate(made):
        assert tree.find(container_id=f"{number:064x}", cgroups_path=f"/kata/{number}").path == path
    with pytest.raises(CgroupNotFound):
        tree.find(container_id="f" * 64, cgroups_path="/kata/gone")
    assert looks == 1 + 1 + 60 + 60, "the root, kubepods, its pods, their containers"


def test_no_tree_is_walked_for_those_that_are_where_the_runtime_says(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = node.make(f"pod/{ID}")
    monkeypatch.setattr(os, "scandir", None)
    assert CgroupTree(node.root).find(container_id=ID, cgroups_path=f"/pod/{ID}").path == made


@pytest.mark.parametrize("pid", [None, 0, 1, 7, 8])
def test_a_process_that_is_not_seen_has_ended_only_where_all_of_the_node_are_seen(
    tmp_path: Path, pid: int | None
) -> None:
    (tmp_path / "7").mkdir()
    assert not CgroupTree(tmp_path, tmp_path).has_ended(pid), "no namespace can be told"
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").symlink_to("/proc/self/ns/pid")
    of_node = os.stat("/proc/self/ns/pid").st_ino == 0xEFFFFFFC
    assert CgroupTree(tmp_path, tmp_path).has_ended(pid) == (of_node and pid in (1, 8))
    (tmp_path / "self/ns/pid").unlink()
    (tmp_path / "self/ns/pid").write_text("of a pod")
    assert not CgroupTree(tmp_path, tmp_path).has_ended(pid)


def test_names_of_directories_that_a_tenant_likes_take_little_memory_and_hide_nothing(node: Node) -> None:
    """A cgroup's name may have 255 bytes, all of them where an id could begin."""
    made = node.make(f"kubepods/pod1/crio-{ID}.scope")
    for number in range(1000):
        node.make(f"kubepods/pod2/{'-:' * 120}{number:06d}")
    tree = CgroupTree(node.root)
    tracemalloc.start()
    try:
        assert tree.find(container_id=ID, cgroups_path="/kata").path == made
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("container_id", ["a-b", "a:b-c", "-", "a-", ":a"])
@pytest.mark.parametrize("form", ["{}", "crio-{}", "crio-{}.scope", "x:crio:{}", "{}.scope"])
def test_an_id_may_have_what_stands_before_ids(node: Node, container_id: str, form: str) -> None:
    made = node.make(f"pod/{form.format(container_id)}")
    assert CgroupTree(node.root).find(container_id=container_id, cgroups_path="/kata").path == made


def test_so_many_directories_are_looked_at_and_no_more(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_cgroup, "_SEARCH_DIRECTORIES_MAX", 10)
    made = node.make(f"{ID}")
    tree = CgroupTree(node.root)
    assert tree.named(ID) == [made]
    for number in range(100):
        node.make(f"{ID}/{number}")
    tree = CgroupTree(node.root)
    assert tree.named(ID) == [made]
    assert sum(bool(tree.named(str(number))) for number in range(100)) == 9
