"""The mover on a kernel that is imitated page by page: what it asks for, in which pieces, and when it lets go."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from memtier_engine.abi import syscalls
from memtier_engine.abi.constants import PM_MMAP_EXCLUSIVE, PM_PRESENT, PM_SWAP
from memtier_engine.errors import KernelCallError, ProcessGone
from memtier_engine.hostfs.handles import OpenProcesses
from memtier_engine.hostfs.host import Host
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, U64, Bools, MoveOutcome, MoveTask, ProcessId, Spans, Why
from memtier_engine.mover.backends import ProcessHandle
from memtier_engine.mover.edge import HUGE_BYTES, addresses_of
from memtier_engine.mover.mover import BATCH_BYTES_MAX, BY_HAND, FIRST_BYTES, Mover, MoverConfig
from support.fakes import BASE, PROCESS, pages_of, spans
from support.hostfolder import HostFolder

MIB = 1 << 20
MIB_PAGES = MIB // PAGE_BYTES
OURS = PM_PRESENT | PM_MMAP_EXCLUSIVE


class Kernel:
    """A process of so many MiB, by the words of its pagemap."""

    def __init__(self, mib: int) -> None:
        self.words = np.full(mib * MIB_PAGES, OURS, np.uint64)
        self.calls: list[list[tuple[int, int]]] = []
        self.gone = False
        self.nodes: dict[int, int] = {}

    def _rows(self, start: int, end: int) -> slice:
        return slice((start - BASE) // PAGE_BYTES, (end - BASE) // PAGE_BYTES)

    def advise(self, pidfd: int, starts: U64, lengths: U64, advice: int) -> int:
        self.calls.append(pages_of(Spans(starts, starts + lengths)))
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            words = self.words[self._rows(start, start + length)]
            words[words == OURS] = PM_SWAP
        return int(lengths.sum())

    def move_pages(self, pid: int, addresses: U64, node: int | None, **flags: int) -> NDArray[np.int32]:
        if node is not None:
            self.nodes.update(dict.fromkeys(addresses.tolist(), node))
        return np.array([self.nodes.get(address, 0) for address in addresses.tolist()], np.int32)

    def read(self, start: int, end: int) -> U64:
        if self.gone:
            raise ProcessGone("read pagemap", errno.ESRCH)
        return self.words[self._rows(start, end)].copy()

    def open(self, host: Host, process: ProcessId) -> ProcessHandle:
        pagemap = SimpleNamespace(read=self.read, scan_runs=lambda *args, **rest: np.zeros((0, 3), np.uint64))
        files = SimpleNamespace(
            process=process,
            pidfd=3,
            pagemap=pagemap,
            read=lambda name: b"0::/\n",
            exited=lambda: self.gone,
            close=lambda: None,
        )
        return cast(ProcessHandle, files)

    @property
    def out_bytes(self) -> int:
        return int(np.count_nonzero(self.words == PM_SWAP)) * PAGE_BYTES


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel(320)
    monkeypatch.setattr(syscalls, "process_madvise", made.advise)
    monkeypatch.setattr(syscalls, "move_pages", made.move_pages)
    return made


@pytest.fixture
def host(tmp_path: object) -> Host:
    folder = HostFolder(tmp_path)  # type: ignore[arg-type]
    folder.write("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n/dev/zram0\tpartition\t1048576\t0\t-2\n")
    return folder.host


def mover(kernel: Kernel, host: Host, bandwidth_mib_per_s: float | None = None) -> Mover:
    config = MoverConfig(bandwidth_mib_per_s=bandwidth_mib_per_s)
    return Mover(config, host, now_s=0.0, files=OpenProcesses(host, opening=kernel.open))


def task(first_mib: int, end_mib: int, *, reason: str = "swap out", node: int = SWAP_NODE) -> MoveTask:
    return MoveTask(PROCESS, spans((first_mib * MIB_PAGES, end_mib * MIB_PAGES)), node, reason)


def moved(outcomes: list[MoveOutcome]) -> int:
    return sum(outcome.moved_bytes for outcome in outcomes)


@pytest.mark.parametrize("mib_per_s", [10, 50, 200])
def test_the_rate_holds_with_batches_of_2_mib_and_more(kernel: Kernel, host: Host, mib_per_s: int) -> None:
    """The first 100 MiB are shared: they cost nothing of it."""
    kernel.words = np.full(4096 * MIB_PAGES, OURS, np.uint64)
    kernel.words[: 100 * MIB_PAGES] = PM_PRESENT
    moving = mover(kernel, host, mib_per_s)
    moving.add(task(0, 4096))
    now_s, total = 0.0, 0
    while now_s < 10.0:
        total += moved(moving.pump(now_s))
        now_s += max(0.001, moving.wait_s() or 0.0)
    assert 0.95 <= total / (10 * mib_per_s * MIB) <= 1.05
    assert all((end - first) % (HUGE_BYTES // PAGE_BYTES) == 0 for call in kernel.calls for first, end in call)


@pytest.mark.parametrize(
    ("mib_per_s", "reached"), [(10, 10), (50, 50), (200, 200), (500, 500), (800, 800), (1000, 900)]
)
def test_the_rate_holds_where_calls_take_their_time_too(
    kernel: Kernel, host: Host, mib_per_s: int, reached: int
) -> None:
    """The kernel takes a second for 930 MiB: a pause as long as the call would halve what can be reached."""
    kernel.words = np.full(4096 * MIB_PAGES, OURS, np.uint64)
    moving = mover(kernel, host, mib_per_s)
    now_s, total = 0.0, 0
    while now_s < 10.0:
        if not moving.has_work:
            kernel.words[:] = OURS
            moving.add(task(0, 4096, reason=BY_HAND))
        done = moved(moving.pump(now_s))
        total += done
        now_s += done / (930 * MIB) + (moving.wait_s() or 0.0)
    assert 0.95 <= total / (10 * reached * MIB) <= 1.05


def test_what_was_busy_is_not_asked_for_again_at_once(
    kernel: Kernel, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def later(*arguments: object) -> int:
        raise KernelCallError.from_errno("process_madvise", errno.EAGAIN)

    monkeypatch.setattr(syscalls, "process_madvise", later)
    moving = mover(kernel, host, 1000)
    moving.add(task(0, 1))
    moving.pump(10.0)
    assert moving.has_work
    assert (moving.wait_s() or 0.0) >= 0.005


def test_what_cannot_go_costs_no_pump_of_its_own(kernel: Kernel, host: Host) -> None:
    """256 MiB in front, found by ever larger looks; the words of all 320 MiB are read a few times at most."""
    kernel.words[: 256 * MIB_PAGES] = PM_PRESENT
    moving = mover(kernel, host)
    moving.add(task(0, 320))
    outcomes: list[MoveOutcome] = []
    for pump in range(40):
        outcomes += moving.pump(float(pump))
    assert kernel.out_bytes == 64 * MIB == moved(outcomes)
    assert sum(1 for each in outcomes if not each.moved_bytes) <= 8
    shared = sum(each.spans.total_bytes for outcome in outcomes for each in outcome.kept if each.why is Why.SHARED)
    assert shared == 256 * MIB


def test_where_nobody_looks_batches_begin_small_and_grow(kernel: Kernel, host: Host) -> None:
    moving = mover(kernel, host)
    moving.add(task(0, 64))
    sizes = [moved(moving.pump(float(pump))) for pump in range(6)]
    assert sizes[0] == FIRST_BYTES
    assert sizes == sorted(sizes)
    assert sizes[-1] == BATCH_BYTES_MAX
    moving.replace([task(64, 128)])
    assert moved(moving.pump(7.0)) == FIRST_BYTES, "another decision"


def test_what_comes_back_at_once_ends_the_decision(kernel: Kernel, host: Host) -> None:
    moving = mover(kernel, host)
    moving.add(task(128, 129, reason=BY_HAND))
    moving.pump(0.0)
    moving.add(task(0, 64))
    moving.pump(0.0)
    assert kernel.out_bytes == FIRST_BYTES + MIB
    kernel.words[:] = OURS  # awake
    moving.add(task(256, 257, reason=BY_HAND))
    for pump in range(5):
        moving.pump(1.0 + pump)
    assert kernel.out_bytes == MIB, "only what a person asked for"
    assert not moving.has_work


def test_one_that_is_known_to_be_idle_is_not_held_up(kernel: Kernel, host: Host) -> None:
    moving = mover(kernel, host)
    looked: list[int] = []

    def look(process: ProcessId, where: Spans) -> Bools:
        looked.append(where.total_bytes)
        return np.zeros(int(where.pages.sum()), np.bool_)

    moving.look = look
    moving.add(task(0, 64))
    for pump in range(20):
        moving.pump(float(pump))
    assert kernel.out_bytes == 64 * MIB
    assert sum(looked) == 64 * MIB, "each page once, just before it goes"


def test_one_that_woke_up_keeps_all(kernel: Kernel, host: Host) -> None:
    """A batch is all in use, and so is a sample of the rest: nothing of the decision holds."""
    moving = mover(kernel, host)
    looked: list[int] = []

    def look(process: ProcessId, where: Spans) -> Bools:
        looked.append(where.total_bytes)
        return np.ones(int(where.pages.sum()), np.bool_)

    moving.look = look
    moving.add(task(0, 64))
    moving.add(task(64, 128))
    outcomes = moving.pump(0.0)
    assert moved(outcomes) == 0
    assert kernel.calls == []
    assert not moving.has_work
    assert len(looked) == 2
    assert sum(looked) <= 2 * FIRST_BYTES, "the second task is not looked at any more"


def test_a_hot_spot_in_idle_memory_stays_and_the_rest_goes(kernel: Kernel, host: Host) -> None:
    moving = mover(kernel, host)
    hot = np.uint64(BASE + 4 * MIB)
    moving.look = lambda process, where: addresses_of(where) < hot
    moving.add(task(0, 64))
    for pump in range(20):
        moving.pump(float(pump))
    assert kernel.out_bytes == 60 * MIB
    assert (kernel.words[: 4 * MIB_PAGES] == OURS).all()


def test_between_nodes_what_was_touched_stays_too_unless_it_is_promoted(kernel: Kernel, host: Host) -> None:
    moving = mover(kernel, host)
    moving.look = lambda process, where: np.arange(int(where.pages.sum())) < 3
    moving.add(task(0, 1, reason="idle", node=2))
    [outcome] = moving.pump(0.0)
    assert [(each.why, pages_of(each.spans)) for each in outcome.kept] == [(Why.TOUCHED, [(0, 3)])]
    assert len(kernel.nodes) == MIB_PAGES - 3
    moving.add(task(1, 2, reason="active", node=3))
    [outcome] = moving.pump(0.0)
    assert outcome.kept == ()


def test_a_process_that_is_over_is_not_asked_by_number(kernel: Kernel, host: Host) -> None:
    """move_pages knows only numbers, and the number may be another's already."""
    moving = mover(kernel, host)
    kernel.gone = True
    moving.add(task(0, 1, reason="idle", node=2))
    [outcome] = moving.pump(0.0)
    assert outcome.error == "process exited"
    assert kernel.nodes == {}


def test_a_process_that_ends_in_the_middle_of_a_move_is_not_reported(
    kernel: Kernel, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(pid: int, addresses: U64, node: int | None, **flags: int) -> NDArray[np.int32]:
        kernel.gone = node is not None
        return np.full(len(addresses), 0 if node is None else node, np.int32)

    monkeypatch.setattr(syscalls, "move_pages", dies)
    moving = mover(kernel, host)
    moving.add(task(0, 1, reason="idle", node=2))
    [outcome] = moving.pump(0.0)
    assert (outcome.error, outcome.moved_bytes) == ("process exited", 0)


def test_without_the_right_the_task_ends_and_says_so(
    kernel: Kernel, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*arguments: object) -> int:
        raise KernelCallError.from_errno("process_madvise", errno.EPERM)

    monkeypatch.setattr(syscalls, "process_madvise", refuses)
    moving = mover(kernel, host)
    moving.add(task(0, 64))
    [outcome] = moving.pump(0.0)
    assert "EPERM" in (outcome.error or "")
    assert not moving.has_work


@pytest.mark.parametrize(("most", "out"), [(64 * PAGE_BYTES, 64 * PAGE_BYTES), (3 * MIB, 3 * MIB)])
def test_a_task_that_has_enough_ends_wherever_it_found_it(kernel: Kernel, host: Host, most: int, out: int) -> None:
    """A probe is 64 pages of those that can go; what is locked in front is passed over."""
    kernel.words[: 256 * MIB_PAGES] = PM_PRESENT
    moving = mover(kernel, host)
    moving.add(MoveTask(PROCESS, spans((0, 320 * MIB_PAGES)), most_bytes=most))
    for pump in range(20):
        moving.pump(float(pump))
    assert kernel.out_bytes == out
    assert not moving.has_work


@pytest.mark.parametrize("areas", ["", "/dev/zram0\tpartition\t1048576\t1048576\t-2\n"])
def test_where_swap_has_no_room_that_is_the_reason_and_nothing_more_is_asked_for(
    kernel: Kernel, host: Host, monkeypatch: pytest.MonkeyPatch, areas: str
) -> None:
    monkeypatch.setattr(syscalls, "process_madvise", lambda pidfd, starts, lengths, advice: int(lengths.sum()))
    monkeypatch.setattr("memtier_engine.mover.mover.SLICE_S", 0.0)  # one task a pump, however fast this machine is
    moving = mover(kernel, host)
    moving.add(task(0, 64))
    moving.add(task(100, 164))
    (outcome,) = moving.pump(0.0)
    assert [kept.why for kept in outcome.kept] == [Why.BUSY], "there is room"
    assert moving.has_work
    host.path("proc/swaps").write_text("Filename\tType\tSize\tUsed\tPriority\n" + areas)
    outcomes = moving.pump(1.0)
    assert [[kept.why for kept in outcome.kept] for outcome in outcomes] == [[Why.NO_ROOM]]
    assert moved(outcomes) == 0
    assert not moving.has_work


@pytest.mark.parametrize(
    ("area", "most"), [("/swapfile\tfile\t1048576\t0\t-2\n", 64), ("/dev/zram0\tpartition\t1048576\t0\t-2\n", 1024)]
)
def test_to_a_disk_it_goes_in_small_pieces(kernel: Kernel, host: Host, area: str, most: int) -> None:
    """What the kernel has written before it puts a piece back is where its own reclaim looks last."""
    host.path("proc/meminfo").write_text("SwapCached: 0 kB\n")
    host.path("proc/swaps").write_text("Filename\tType\tSize\tUsed\tPriority\n" + area)
    moving = mover(kernel, host)
    moving.add(task(0, 4))
    moving.pump(0.0)
    assert max(end - first for call in kernel.calls for first, end in call) <= most
    assert kernel.out_bytes >= 2 * MIB
    assert len(kernel.calls) == 1, "in one call all the same"
