"""What paging out brought, on a machine dressed with swap of each kind."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtier_engine.errors import KernelCallError
from memtier_engine.hostfs.cgroup import Cgroup
from memtier_engine.hostfs.handles import ProcessFiles
from memtier_engine.hostfs.proc import SwapArea, read_swaps
from memtier_engine.hostfs.swapkind import Swap, in_words, kind_of, no_room, read_swap_kinds
from memtier_engine.model import ProcessId
from memtier_engine.mover.effects import (
    LEFT_BYTES_PER_CPU,
    RECLAIM_S_MAX,
    STEP_BYTES,
    STEP_BYTES_LEAST,
    Effect,
    Effects,
    Held,
)
from support.hostfolder import HostFolder

MIB = 1 << 20
PROCESS = ProcessId(4242, 100)
HEAD = "Filename\tType\tSize\tUsed\tPriority\n"


@pytest.mark.parametrize(
    ("path", "kind", "found"),
    [
        ("/dev/zram0", "partition", Swap.ZRAM),
        ("/dev/ram1", "partition", Swap.MEMORY),
        ("/dev/pmem0", "partition", Swap.MEMORY),
        ("/dev/nvme0n1p2", "partition", Swap.DISK),
        ("/dev/dm-0", "partition", Swap.DISK),
        ("/zram0", "file", Swap.FILE),
        ("/swap\\040file", "file", Swap.FILE),
    ],
)
def test_kinds_of_swap(path: str, kind: str, found: Swap) -> None:
    assert kind_of(SwapArea(path, kind, 1 << 20, 0, -2)) is found


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(-80, 80)), max_size=30))
def test_what_is_held_is_never_more_than_we_moved_nor_than_there_is(events: list[tuple[int, int]]) -> None:
    """Others' pages in the swap cache come and go too."""
    held, cached, moved, freed = Held(50), 50, 0, 0
    for ours, others in events:
        cached = max(0, cached + ours + others)
        moved += ours
        freed += held.moved(ours, cached)
        assert 0 <= held.ours <= min(moved, cached)
        assert freed + held.ours == moved == held.written


class Machine:
    """A process in a v2 cgroup that swaps to a file; what is asked of memory.reclaim is done as the test wants."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *, swap: str) -> None:
        self.folder = HostFolder(root)
        self.folder.process(PROCESS.pid)
        self.folder.write("proc/swaps", HEAD + swap)
        self.folder.write(f"proc/{PROCESS.pid}/cgroup", "0::/pod/box\n")
        self.folder.cgroup2()
        self.cached = self.writeback = self.zram = self.others = 0
        self.asked: list[str] = []
        self.refuses: tuple[str, ...] = ()
        monkeypatch.setattr(Cgroup, "write", lambda cgroup, name, value: self.reclaim(cgroup, name, value))
        self.effects = Effects(self.folder.host, cpus=1)
        self.now_s = 0.0

    def show(self) -> None:
        self.folder.cgroup(
            "/sys/fs/cgroup/pod",
            memory_current="0",
            memory_reclaim="",
            memory_stat=f"file {100 * MIB}\nswapcached {self.cached}\nfile_writeback {self.writeback}\n",
        )
        self.folder.write("sys/fs/cgroup/pod/memory.swap.current", str(self.others))
        self.folder.cgroup("/sys/fs/cgroup/pod/box", [PROCESS.pid])
        self.folder.write("proc/meminfo", f"SwapCached: {self.cached >> 10} kB\nZswap: 0 kB\n")
        self.folder.write("sys/block/zram0/mm_stat", f"1000 {self.zram} 2000 0 0 0 0 0 0\n")

    def reclaim(self, cgroup: Cgroup, name: str, value: str | int) -> None:
        assert (cgroup.path.name, name) == ("pod", "memory.reclaim")
        size, _, argument = str(value).partition(" ")
        if argument in self.refuses:
            raise KernelCallError.from_errno("write", errno.EINVAL)
        self.asked.append(str(value))
        self.cached -= min(self.cached, int(size))
        self.show()

    def batch(self, moved: int) -> Effect:
        self.show()
        with ProcessFiles(self.folder.host, PROCESS) as files:
            self.effects.begin(files, self.now_s)
            self.show()
            return self.effects.end(files, moved)


FILE = "/swapfile\tfile\t1048576\t0\t-2\n"


def test_on_zram_all_is_free_at_once_and_its_price_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch, swap="/dev/zram0\tpartition\t1048576\t0\t-2\n")
    machine.show()
    with ProcessFiles(machine.folder.host, PROCESS) as files:
        machine.effects.begin(files, 0.0)
        machine.zram += MIB
        machine.show()
        assert machine.effects.end(files, 2 * MIB) == Effect(2 * MIB, MIB)
    assert machine.effects.wait_s() is None


def test_on_a_file_nothing_is_free_until_it_is_written_and_reclaimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much as is ours, step by step, and only what is written by then."""
    machine = Machine(tmp_path, monkeypatch, swap=FILE)
    machine.cached = 7 * MIB  # of others
    machine.batch(0)
    machine.cached += 40 * MIB
    machine.writeback = 40 * MIB
    assert machine.batch(40 * MIB) == Effect(0, 0)
    assert machine.effects.not_yet_freed_bytes == 40 * MIB
    assert machine.effects.free(1.0) == 0
    assert machine.asked == []
    machine.writeback = 0
    machine.show()
    freed = sum(machine.effects.free(2.0 + second) for second in range(50))  # on a slow machine, a step each time
    assert freed == 40 * MIB - LEFT_BYTES_PER_CPU, "what a CPU may hold is left: asked for it, the kernel takes others"
    sizes = [int(each.split()[0]) for each in machine.asked]
    assert sum(sizes) == freed
    assert max(sizes) <= STEP_BYTES
    assert machine.cached == 7 * MIB + LEFT_BYTES_PER_CPU
    assert machine.effects.wait_s() is None


def test_pages_of_files_are_asked_to_stay_in_the_words_that_this_kernel_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, monkeypatch, swap=FILE)
    machine.batch(0)
    machine.refuses = ("swappiness=max",)
    machine.cached = MIB
    machine.batch(MIB)
    machine.effects.free(1.0)
    assert machine.asked == [f"{MIB - LEFT_BYTES_PER_CPU} swappiness=200"]


def test_where_reclaim_takes_others_memory_it_is_left_alone_for_longer_and_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, monkeypatch, swap=FILE)
    machine.batch(0)
    machine.cached = 40 * MIB
    machine.batch(40 * MIB)

    def takes_others(cgroup: Cgroup, name: str, value: str | int) -> None:
        machine.asked.append(str(value))
        machine.others += int(str(value).split()[0])
        machine.cached -= int(str(value).split()[0])
        machine.show()

    monkeypatch.setattr(Cgroup, "write", takes_others)
    machine.effects.free(0.0)
    assert len(machine.asked) == 1, "no further step of the same slice"
    assert machine.others <= STEP_BYTES
    looks: list[str] = []
    stat = Cgroup.stat

    def counted(cgroup: Cgroup, name: str = "memory.stat") -> dict[str, int]:
        looks.append(name)
        return stat(cgroup, name)

    monkeypatch.setattr(Cgroup, "stat", counted)
    for tenth in range(100):
        machine.effects.free(tenth / 10)
    assert (machine.effects.wait_s() or 0.0) > 1.0
    machine.now_s = 10.0
    machine.cached += 4 * MIB
    machine.batch(4 * MIB)
    assert machine.effects.wait_s() == 0.0, "more went out: another look"
    for tenth in range(100, 36_000):
        machine.effects.free(tenth / 10)
    assert len(machine.asked) <= 10 + 3600 / RECLAIM_S_MAX
    assert len(looks) <= 5 * len(machine.asked), "nor is it looked at meanwhile"


def test_without_a_v2_cgroup_it_is_written_and_not_yet_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch, swap=FILE)
    machine.folder.write(f"proc/{PROCESS.pid}/cgroup", "4:memory:/box\n0::/\n")
    machine.batch(0)
    machine.cached = 40 * MIB
    assert machine.batch(40 * MIB).freed_bytes == 0
    assert machine.effects.not_yet_freed_bytes == 40 * MIB
    assert machine.effects.wait_s() is None
    assert machine.effects.free(10.0) == 0
    assert machine.asked == []
    machine.cached = 30 * MIB  # the kernel reclaimed
    machine.show()
    assert machine.effects.look() == 30 * MIB, "also between two batches"
    machine.cached = 10 * MIB
    assert machine.batch(0).freed_bytes == 20 * MIB


def test_a_cgroup_that_is_gone_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch, swap=FILE)
    machine.batch(0)
    machine.cached = MIB
    machine.batch(MIB)
    (machine.folder.root / "sys/fs/cgroup/pod/memory.stat").unlink()
    machine.effects.free(1.0)
    assert machine.effects.wait_s() is None
    assert machine.effects.not_yet_freed_bytes == 0


def test_the_kinds_in_words(tmp_path: Path) -> None:
    folder = HostFolder(tmp_path)
    folder.write("proc/swaps", HEAD)
    assert in_words(folder.host) == ""
    folder.write("proc/swaps", HEAD + "/dev/zram0\tpartition\t1048576\t0\t5\n" + FILE)
    assert in_words(folder.host) == "zram, file: frees when written and reclaimed (cgroup v2 only)"
    assert [kind.synchronous for kind in read_swap_kinds(folder.host)] == [True, False]
    assert len(read_swaps(folder.host)) == 2
    folder.write("sys/module/zswap/parameters/enabled", "Y\n")
    assert in_words(folder.host) == "zswap before zram, file: frees at once"


def test_whether_swap_has_room(tmp_path: Path) -> None:
    folder = HostFolder(tmp_path)
    assert not no_room(folder.host), "nobody tells"
    folder.write("proc/swaps", HEAD)
    assert no_room(folder.host)
    folder.write("proc/swaps", HEAD + "/dev/zram0\tpartition\t1048576\t1048570\t5\n")
    assert no_room(folder.host), "all but what other CPUs hold on to"
    folder.write("proc/swaps", HEAD + "/dev/zram0\tpartition\t1048576\t1048576\t5\n" + FILE)
    assert not no_room(folder.host)


def test_a_cgroup_with_processes_of_others_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would take their idle memory as well: what is written waits for the kernel's own reclaim."""
    machine = Machine(tmp_path, monkeypatch, swap=FILE)
    known = {PROCESS.pid}
    machine.effects.are_ours = lambda pids: pids <= known
    machine.batch(0)
    machine.folder.cgroup("/sys/fs/cgroup/pod/other", [4711])
    machine.cached += 8 * MIB
    machine.batch(8 * MIB)
    assert [machine.effects.free(1.0 + 100 * turn) for turn in range(3)] == [0, 0, 0]
    assert machine.asked == []
    assert machine.effects.not_yet_freed_bytes == 8 * MIB
    known.add(4711)  # it is one of the target now
    assert sum(machine.effects.free(1000.0 + 100 * turn) for turn in range(9)) == 8 * MIB - LEFT_BYTES_PER_CPU


def test_it_is_asked_from_the_node_where_most_of_it_is_and_where_others_went_another_one_has_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, monkeypatch, swap=FILE)
    machine.folder.write("sys/devices/system/node/has_memory", "0-1\n")
    for node in range(2):
        machine.folder.write(f"sys/devices/system/node/node{node}/cpulist", f"{node},{node + 2}\n")
    on_node = [3 * MIB, 9 * MIB]
    asked: list[int] = []
    here: list[frozenset[int]] = []

    @contextmanager
    def near(cpus: frozenset[int]) -> Iterator[None]:
        here[:] = [cpus]
        yield

    def takes_others_on_node_1(cgroup: Cgroup, name: str, value: str | int) -> None:
        node, size = min(here[0]), int(str(value).split()[0])
        asked.append(node)
        if node:
            machine.others += size
        else:
            on_node[0] -= size
            machine.cached -= size
        show()

    def show() -> None:
        machine.show()
        nodes = " ".join(f"N{node}={size}" for node, size in enumerate(on_node))
        machine.folder.write("sys/fs/cgroup/pod/memory.numa_stat", f"anon N0=1 N1=2\nswapcached {nodes}\n")

    monkeypatch.setattr("memtier_engine.mover.effects.near", near)
    monkeypatch.setattr(Cgroup, "write", takes_others_on_node_1)
    machine.batch(0)
    machine.cached = sum(on_node)
    machine.batch(machine.cached)
    show()
    for tenth in range(20):
        machine.effects.free(tenth / 10)
    assert asked[0] == 1
    assert on_node[0] <= 2 * LEFT_BYTES_PER_CPU + STEP_BYTES_LEAST, "the other node goes on"
    assert 2 <= asked.count(1) <= 4, "ever more rarely"
    assert 0 < (machine.effects.wait_s() or 0) <= RECLAIM_S_MAX
