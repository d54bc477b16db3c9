"""Many movers under one ceiling: equal parts for all that want to move, and nothing lost."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from memtier_engine.hostfs.host import Host
from memtier_engine.model import PAGE_BYTES, MoveTask, ProcessId, Spans
from memtier_engine.mover.backends import BatchResult, ProcessHandle
from memtier_engine.mover.fair import FairBudget, FairMover, Share
from memtier_engine.mover.mover import MoverConfig
from support.fakes import spans

MIB = 1 << 20


def jain(amounts: list[float]) -> float:
    """1: all the same; 1/n: one has everything."""
    return sum(amounts) ** 2 / (len(amounts) * sum(amount * amount for amount in amounts))


class Worker:
    """Asks at its own pace and moves at most `batch` at a time."""

    def __init__(self, budget: FairBudget, every_s: float, batch_bytes: int) -> None:
        self.share: Share = budget.join()
        self.every_s = every_s
        self.batch_bytes = batch_bytes
        self.next_s = 0.0
        self.moved = 0


def simulate(budget: FairBudget, workers: list[Worker], begin_s: float, end_s: float, seed: int = 1) -> None:
    rng = random.Random(seed)
    now_s = begin_s
    while now_s < end_s:
        for worker in rng.sample(workers, len(workers)):
            if worker.next_s <= now_s:
                worker.next_s = now_s + worker.every_s
                allowed = budget.allowed(worker.share, now_s)
                moved = min(allowed or 0, worker.batch_bytes)
                moved -= moved % PAGE_BYTES
                budget.charge(worker.share, moved)
                worker.moved += moved
        now_s += 0.005


def test_a_hundred_engines_of_very_different_pace_get_equal_parts() -> None:
    """Some ask every 5 ms for 64 MiB, others every 200 ms."""
    budget = FairBudget(100, now_s=0)
    workers = [Worker(budget, every_s=0.005 + 0.002 * number, batch_bytes=64 * MIB) for number in range(100)]
    simulate(budget, workers, 0, 10)
    assert jain([worker.moved for worker in workers]) >= 0.95
    total = sum(worker.moved for worker in workers)
    assert 0.9 * 1000 * MIB <= total <= 1.02 * 1000 * MIB


def test_one_that_wants_little_leaves_the_rest_to_the_others() -> None:
    budget = FairBudget(100, now_s=0)
    small = Worker(budget, 0.01, PAGE_BYTES)
    others = [Worker(budget, 0.01, 64 * MIB) for _ in range(4)]
    simulate(budget, [small, *others], 0, 10)
    assert small.moved >= 0.95 * 1000 * PAGE_BYTES
    assert jain([worker.moved for worker in others]) >= 0.99
    assert sum(worker.moved for worker in others) >= 0.9 * 1000 * MIB


def test_one_that_comes_late_gets_its_part_at_once_and_no_more() -> None:
    budget = FairBudget(100, now_s=0)
    early, late = Worker(budget, 0.01, 64 * MIB), Worker(budget, 0.01, 64 * MIB)
    simulate(budget, [early], 0, 5)
    before = early.moved
    late.next_s = 5.0
    simulate(budget, [early, late], 5, 7)
    assert late.moved == pytest.approx(100 * MIB, rel=0.1)
    assert early.moved - before == pytest.approx(100 * MIB, rel=0.3)


def test_what_a_leaving_or_sleeping_engine_is_owed_goes_to_the_others() -> None:
    budget = FairBudget(100, now_s=0)
    workers = [Worker(budget, 0.01, 64 * MIB) for _ in range(2)]
    simulate(budget, workers, 0, 2)
    budget.leave(workers[1].share)
    budget.leave(workers[1].share)
    before = workers[0].moved
    simulate(budget, workers[:1], 2, 12)
    assert workers[0].moved - before == pytest.approx(1000 * MIB, rel=0.05)


def test_one_that_moved_too_much_waits_until_the_others_have_caught_up() -> None:
    budget = FairBudget(100, now_s=0)
    greedy, modest = Worker(budget, 0.01, 64 * MIB), Worker(budget, 0.01, 64 * MIB)
    budget.charge(greedy.share, 50 * MIB)
    simulate(budget, [greedy, modest], 0, 5)
    assert greedy.moved + 50 * MIB == pytest.approx(modest.moved, rel=0.05)


def test_without_a_ceiling_nobody_waits() -> None:
    budget = FairBudget(None, now_s=0)
    share = budget.join()
    assert budget.allowed(share, 0) is None
    budget.charge(share, 1 << 40)
    assert budget.allowed(share, 1) is None
    assert budget.wait_s(share, 1 << 40) == 0


def test_the_ceiling_can_be_changed() -> None:
    budget = FairBudget(10, now_s=0)
    worker = Worker(budget, 0.01, 64 * MIB)
    simulate(budget, [worker], 0, 2)
    before = worker.moved
    budget.set_bandwidth(100, now_s=2)
    simulate(budget, [worker], 2, 4)
    assert worker.moved - before == pytest.approx(200 * MIB, rel=0.1)


def test_a_huge_task_of_one_engine_does_not_starve_a_small_one_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real movers on a fake kernel: 2 GiB against 8 MiB under 50 MiB/s."""
    moved: dict[int, int] = {1: 0, 2: 0}

    def backend(handle: ProcessHandle, part: Spans, node: int) -> BatchResult:
        moved[handle.process.pid] += part.total_bytes
        return BatchResult(moved_bytes=part.total_bytes)

    class Handle:
        def __init__(self, host: Host, process: ProcessId) -> None:
            self.process = process

        def close(self) -> None:
            pass

    monkeypatch.setattr("memtier_engine.mover.mover.ProcessHandle", Handle)
    host, budget = Host(tmp_path), FairBudget(50, now_s=0)
    movers = []
    for pid, pages in ((1, 1 << 19), (2, 1 << 11)):
        mover = FairMover(MoverConfig(bandwidth_mib_per_s=None), host, budget=budget, now_s=0)
        mover._backend = backend
        mover.replace([MoveTask(ProcessId(pid, 1), spans((0, pages)))])
        movers.append(mover)
    done_s = None
    for step in range(400):
        now_s = step * 0.01
        for mover in movers:
            mover.pump(now_s)
        if done_s is None and not movers[1].has_work:
            done_s = now_s
    assert done_s is not None
    assert done_s <= 0.5
    assert sum(moved.values()) == pytest.approx(4 * 50 * MIB, rel=0.05)
    for mover in movers:
        mover.close()
    assert movers[0].wait_s() is None


def test_members_that_move_more_than_they_are_owed_do_so_in_turn() -> None:
    """A batch is 2 MiB whatever is owed: 50 members under 10 MiB/s keep to the ceiling, and nobody waits for ever."""
    budget = FairBudget(10, now_s=0)
    shares = [budget.join() for _ in range(50)]
    moved = [0.0] * 50
    now_s = 0.0
    while now_s < 31:
        for number, share in enumerate(shares):
            if budget.allowed(share, now_s, 2 * MIB):
                budget.charge(share, 2 * MIB)
                moved[number] += 2 * MIB
        now_s += 0.01
        assert sum(moved) <= 10 * MIB * now_s + 6 * MIB
    assert sum(moved) >= 0.9 * 300 * MIB
    assert jain(moved) >= 0.9
