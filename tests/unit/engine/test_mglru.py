"""Generations of the kernel's LRU as ages of a cgroup, on recorded text and dressed folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from memtier_engine.errors import TrackerUnavailable
from memtier_engine.model import PAGE_BYTES
from memtier_engine.trackers.mglru import MglruTracker, parse_lru_gen
from support.hostfolder import HostFolder

TEXT = """memcg     1 /
 node     0
          0      10000          5          7 
          1       2000         11         13 
memcg    39 /kubepods/pod 7
 node     0
         12      60000        100        200x
         13      30000         10         20 
         14      10000          1          2 
         15       1000          3          4 
 node     1
          3      45000         50          0 
          4       5000          5          6 
"""  # noqa: W291


@pytest.fixture
def machine(tmp_path: Path) -> HostFolder:
    folder = HostFolder(tmp_path)
    folder.cgroup2()
    folder.write("sys/kernel/mm/lru_gen/enabled", "0x0007\n")
    folder.write("sys/kernel/debug/lru_gen", TEXT)
    return folder


def tracker(machine: HostFolder, name: str = "kubepods/pod 7") -> MglruTracker:
    return MglruTracker(machine.host, machine.host.cgroup2_root / name)


def test_the_kernels_text_becomes_one_record_per_cgroup_and_node() -> None:
    found = list(parse_lru_gen(TEXT))
    assert [(each.memcg_id, each.path, each.node) for each in found] == [
        (1, "/", 0),
        (39, "/kubepods/pod 7", 0),
        (39, "/kubepods/pod 7", 1),
    ]
    assert found[1].numbers.tolist() == [12, 13, 14, 15]
    assert found[1].anon_pages.tolist() == [100, 10, 1, 3]
    assert found[1].file_pages.tolist() == [200, 20, 2, 4]


def test_pages_are_idle_since_the_next_generation_began() -> None:
    """The newest generation's may have been touched just now."""
    assert list(parse_lru_gen(TEXT))[1].idle_s.tolist() == [30.0, 10.0, 1.0, 0.0]


def test_text_that_is_not_the_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="surprise"):
        list(parse_lru_gen("memcg 1 /\n node 0\n surprise\n"))


def test_a_cgroups_ages_are_those_of_all_nodes(machine: HostFolder) -> None:
    ages = tracker(machine).ages()
    assert ages.idle_s.tolist() == [30.0, 10.0, 5.0, 1.0, 0.0, 0.0]
    assert ages.idle_bytes(10) == (300 + 30) * PAGE_BYTES
    assert ages.idle_bytes(5, files=False) == (100 + 10 + 50) * PAGE_BYTES
    assert ages.idle_bytes(0) == (111 + 3 + 226 + 50 + 5 + 6) * PAGE_BYTES


def test_a_cgroup_that_is_not_there_has_no_ages(machine: HostFolder) -> None:
    ages = tracker(machine, "gone").ages()
    assert ages.idle_bytes(0) == 0
    assert tracker(machine, "gone").scan() == 0


def test_a_scan_asks_for_a_new_generation_on_every_node(machine: HostFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(type(machine.host), "write", lambda self, path, text: written.append(text))
    assert tracker(machine).scan() == 2
    assert written == ["+ 39 0 15 1 1", "+ 39 1 4 1 1"]


@pytest.mark.parametrize(
    ("missing", "hint"), [("sys/kernel/mm/lru_gen/enabled", "CONFIG_LRU_GEN"), ("sys/kernel/debug/lru_gen", "debugfs")]
)
def test_what_is_missing_is_said_with_what_to_do(machine: HostFolder, missing: str, hint: str) -> None:
    (machine.root / missing).unlink()
    with pytest.raises(TrackerUnavailable) as caught:
        tracker(machine)
    assert hint in (caught.value.hint or "")


def test_one_that_is_switched_off_says_how_to_switch_it_on(machine: HostFolder) -> None:
    machine.write("sys/kernel/mm/lru_gen/enabled", "0x0000\n")
    with pytest.raises(TrackerUnavailable, match="switched off"):
        tracker(machine)
