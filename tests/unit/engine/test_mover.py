"""The mover: order, budget, accounting and errors, with the kernel call replaced."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtier_engine.errors import ConfigError, KernelCallError, ProcessGone
from memtier_engine.hostfs.host import Host
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveOutcome, MoveTask, ProcessId, Spans
from memtier_engine.mover.backends import BatchResult, ProcessHandle
from memtier_engine.mover.bucket import MIB, TokenBucket
from memtier_engine.mover.mover import Mover, MoverConfig, take
from support.fakes import PROCESS, pages_of, spans

OTHER = ProcessId(5151, 9)


class Kernel:
    """Counts calls; `answer` decides what a call does."""

    def __init__(self, answer: Callable[[ProcessHandle, Spans, int], BatchResult] | None = None) -> None:
        self.calls: list[tuple[int, list[tuple[int, int]], int]] = []
        self.answer = answer

    def __call__(self, handle: ProcessHandle, part: Spans, node: int) -> BatchResult:
        self.calls.append((handle.process.pid, pages_of(part), node))
        if self.answer is not None:
            return self.answer(handle, part, node)
        return BatchResult(moved_bytes=part.total_bytes)


class NoHandle:
    """A handle that opens nothing."""

    def __init__(self, host: Host, process: ProcessId) -> None:
        self.process = process
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def _no_handles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtier_engine.mover.mover.ProcessHandle", NoHandle)


def mover(kernel: Kernel, bandwidth_mib_per_s: float | None = None, interval_ms: int = 10) -> Mover:
    config = MoverConfig(interval_ms=interval_ms, bandwidth_mib_per_s=bandwidth_mib_per_s)
    return Mover(config, Host(), now_s=0.0, backend=kernel)


def task(*page_ranges: tuple[int, int], process: ProcessId = PROCESS, reason: str = "") -> MoveTask:
    return MoveTask(process, spans(*page_ranges), SWAP_NODE, reason)


def pump_all(mover: Mover, now_s: float = 0.0) -> list[MoveOutcome]:
    outcomes: list[MoveOutcome] = []
    for _ in range(1000):
        found = mover.pump(now_s)
        if not found:
            return outcomes
        outcomes += found
    raise AssertionError("the mover does not come to an end")


@pytest.mark.parametrize("mib_per_s", [10, 50, 200])
@pytest.mark.parametrize("interval_ms", [1, 10, 100, 200])
def test_the_rate_stays_within_five_percent_of_the_limit_over_ten_seconds(mib_per_s: int, interval_ms: int) -> None:
    kernel = Kernel()
    moving = mover(kernel, mib_per_s, interval_ms)
    moving.add(task((0, 1_000_000)))
    now_s, moved = 0.0, 0
    while now_s < 10.0:
        moved += sum(outcome.moved_bytes for outcome in moving.pump(now_s))
        wait_s = moving.wait_s()
        assert wait_s is not None
        now_s += wait_s
    assert 0.95 <= moved / (10 * mib_per_s * MIB) <= 1.05


def test_a_long_interval_keeps_the_rate_too() -> None:
    """Also when a whole interval's share is more than one short call can move."""
    moving = mover(Kernel(), 50, 1000)
    moving.add(task((0, 10_000_000)))
    now_s, moved = 0.0, 0
    while now_s < 100.0:
        moved += sum(outcome.moved_bytes for outcome in moving.pump(now_s))
        now_s += moving.wait_s() or 0.01
    assert 0.95 <= moved / (100 * 50 * MIB) <= 1.05


def test_only_what_really_moved_is_charged() -> None:
    """Half of each batch sticks: twice as much is tried, the same amount moves."""
    kernel = Kernel(lambda handle, part, node: BatchResult(moved_bytes=part.total_bytes // 2))
    moving = mover(kernel, 10, 10)
    moving.add(task((0, 1_000_000)))
    now_s = moved = tried = 0.0
    while now_s < 10.0:
        for outcome in moving.pump(now_s):
            moved += outcome.moved_bytes
            tried += outcome.requested_bytes
        now_s += moving.wait_s() or 0.01
    assert 0.9 <= moved / (100 * MIB) <= 1.05
    assert tried == 2 * moved


def test_promotions_go_before_demotions() -> None:
    kernel = Kernel()
    moving = mover(kernel)
    moving.replace([task((0, 1), reason="swap out"), task((5, 6), process=OTHER, reason="active")])
    pump_all(moving)
    assert [pid for pid, _, _ in kernel.calls] == [OTHER.pid, PROCESS.pid]


def test_a_huge_task_takes_turns_with_a_small_one() -> None:
    kernel = Kernel()
    moving = mover(kernel)
    moving.add(task((0, 1_000_000)))
    moving.add(task((5, 6), process=OTHER))
    moving.pump(0.0)
    moving.pump(0.0)
    assert [pid for pid, _, _ in kernel.calls[:2]] == [PROCESS.pid, OTHER.pid]


def test_a_new_decision_replaces_what_is_pending() -> None:
    kernel = Kernel()
    moving = mover(kernel)
    moving.replace([task((0, 10))])
    moving.replace([task((20, 30))])
    pump_all(moving)
    assert [ranges for _, ranges, _ in kernel.calls] == [[(20, 30)]]


def test_a_process_that_exits_costs_only_its_own_tasks() -> None:
    def exits(handle: ProcessHandle, part: Spans, node: int) -> BatchResult:
        if handle.process == PROCESS:
            raise ProcessGone("process_madvise", errno.ESRCH)
        return BatchResult(moved_bytes=part.total_bytes)

    kernel = Kernel(exits)
    moving = mover(kernel)
    for process in (PROCESS, OTHER, PROCESS):
        moving.add(task((0, 4), process=process))
    outcomes = pump_all(moving)
    assert [pid for pid, _, _ in kernel.calls] == [PROCESS.pid, OTHER.pid]
    assert sum(outcome.moved_bytes for outcome in outcomes) == 4 * PAGE_BYTES


def test_a_refusal_ends_the_task_and_is_told() -> None:
    def refuses(handle: ProcessHandle, part: Spans, node: int) -> BatchResult:
        raise KernelCallError.from_errno("process_madvise(pid=4242)", errno.EPERM)

    kernel = Kernel(refuses)
    moving = mover(kernel)
    moving.add(task((0, 1_000_000)))
    [outcome] = pump_all(moving)
    assert outcome.error is not None
    assert "EPERM" in outcome.error
    assert outcome.moved_bytes == 0


def test_eagain_is_tried_again_but_not_for_ever() -> None:
    kernel = Kernel(lambda handle, part, node: BatchResult(stuck=part, busy=part))
    moving = mover(kernel)
    moving.add(task((0, 4)))
    pump_all(moving)
    assert 2 <= len(kernel.calls) <= 10


def test_only_the_busy_pages_of_a_batch_are_tried_again() -> None:
    """Page 2 is in use by the kernel twice, page 3 cannot move at all."""
    answers = iter([(spans((2, 4)), spans((2, 3))), (spans((2, 3)), spans((2, 3))), (Spans.empty(), Spans.empty())])

    def answer(handle: ProcessHandle, part: Spans, node: int) -> BatchResult:
        stuck, busy = next(answers)
        return BatchResult(moved_bytes=part.total_bytes - stuck.total_bytes, stuck=stuck, busy=busy)

    kernel = Kernel(answer)
    moving = mover(kernel)
    moving.add(task((0, 4)))
    outcomes = pump_all(moving)
    assert [pages for _, pages, _ in kernel.calls] == [[(0, 4)], [(2, 3)], [(2, 3)]]
    assert [pages_of(outcome.later) for outcome in outcomes] == [[(2, 3)], [(2, 3)], []]
    assert sum(outcome.moved_bytes for outcome in outcomes) == 3 * PAGE_BYTES


def test_a_full_node_ends_the_task_and_its_pages_may_be_asked_for_later() -> None:
    def full(handle: ProcessHandle, part: Spans, node: int) -> BatchResult:
        return BatchResult(stuck=part, full=True, error="node 2 is full")

    kernel = Kernel(full)
    moving = mover(kernel)
    moving.add(MoveTask(PROCESS, spans((0, 1_000_000)), 2))
    [outcome] = pump_all(moving)
    assert outcome.later.total_bytes == outcome.requested_bytes
    assert not moving.has_work


def test_dropping_a_process_closes_its_handle() -> None:
    moving = mover(Kernel())
    moving.add(task((0, 1_000_000)))
    moving.pump(0.0)
    with moving._files.of(PROCESS) as handle:
        pass
    moving.drop(PROCESS)
    assert moving.pending_bytes == 0
    assert handle.closed == 1  # type: ignore[attr-defined]


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5)), min_size=1, max_size=30), st.integers(1, 400))
def test_a_batch_is_a_prefix_and_the_rest_is_what_follows(shape: list[tuple[int, int]], pages: int) -> None:
    at, ranges = 0, []
    for length, gap in shape:
        ranges.append((at, at + length))
        at += length + gap
    part, rest = take(spans(*ranges), pages * PAGE_BYTES)

    def flat(found: Spans) -> list[int]:
        return [page for first, last in pages_of(found) for page in range(first, last)]

    wanted = [page for first, last in ranges for page in range(first, last)]
    assert flat(part) == wanted[:pages]
    assert flat(rest) == wanted[pages:]


def test_a_batch_has_at_most_1024_spans() -> None:
    part, rest = take(spans(*[(2 * n, 2 * n + 1) for n in range(3000)]), 1 << 40)
    assert (len(part), len(rest)) == (1024, 3000 - 1024)


def test_a_clock_that_jumps_gains_no_more_than_the_depth() -> None:
    bucket = TokenBucket(10, least_bytes=PAGE_BYTES, now_s=100.0)
    assert bucket.available_bytes(50.0) == 0
    assert bucket.available_bytes(1e6) == int(10 * MIB * 0.1)


@pytest.mark.parametrize(
    ("key", "values"), [("intervalms", {"interval_ms": 0}), ("bandwidth", {"bandwidth_mib_per_s": 0})]
)
def test_a_value_out_of_range_is_refused_with_its_key(key: str, values: dict[str, int]) -> None:
    with pytest.raises(ConfigError) as caught:
        MoverConfig(**values)
    assert caught.value.key_path == f"mover.{key}"


@pytest.mark.parametrize(("call_s", "sizes_mib"), [(0.001, {2, 4, 8}), (0.5, {2}), (None, {2})])
def test_batches_follow_how_long_the_call_takes_and_not_what_we_do_around_it(
    monkeypatch: pytest.MonkeyPatch, call_s: float | None, sizes_mib: set[int]
) -> None:
    """The call holds the target's lock; the rest of a batch, on a clock where that takes a second, holds up nobody."""
    monkeypatch.setattr("memtier_engine.mover.mover.CALL_TARGET_S", 0.02)
    clock = itertools.count()
    monkeypatch.setattr("memtier_engine.mover.mover.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    kernel = Kernel(lambda handle, part, node: BatchResult(moved_bytes=part.total_bytes, call_s=call_s))
    moving = mover(kernel)
    moving.add(task((0, 40 * MIB // PAGE_BYTES)))
    pump_all(moving)
    moved = [sum(end - first for first, end in pages) * PAGE_BYTES // MIB for _, pages, _ in kernel.calls]
    assert set(moved[:-1]) == sizes_mib


def test_what_was_put_off_of_a_process_that_ends_is_forgotten_too() -> None:
    gone: list[bool] = []

    def answer(handle: ProcessHandle, part: Spans, node: int) -> BatchResult:
        if gone:
            raise ProcessGone("process exited", errno.ESRCH)
        gone.append(True)
        return BatchResult(stuck=part, busy=part)

    moving = mover(Kernel(answer))
    moving.add(task((0, 4)))
    moving.add(task((8, 12)))
    moving.pump(0.0)
    assert len(gone) == 1
    assert not moving.has_work
