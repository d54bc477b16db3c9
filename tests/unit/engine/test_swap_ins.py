"""Swap-ins counted in the kernel, handed to the engines whose processes they are. The counter is a fake here."""

from __future__ import annotations

import numpy as np
import pytest

from memtier_engine.errors import KernelCallError, ProcessGone, TrackerUnavailable, Unavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.taskstats import SwapInDelay
from memtier_engine.model import ProcessId
from memtier_engine.pages.refaults import RefaultLedger
from memtier_engine.trackers.bpf import feed
from memtier_engine.trackers.bpf.faults import FaultTable
from memtier_engine.trackers.bpf.feed import DelayFeed, SwapInFeed, SwapIns, SwapInWatch

A, B, C = (ProcessId(number, 1) for number in (1, 2, 3))
HOST = Host()


def table(*swap_ins: int) -> FaultTable:
    """One region each; half of the swap-ins waited, 1/1024 s each."""
    counts = np.array(swap_ins, np.uint64)
    waited = counts // np.uint64(2)
    regions = np.arange(len(swap_ins), dtype=np.uint64)
    return FaultTable(regions, counts, None, None, counts, counts, waited, waited.astype(np.float64) / 1024)


class FakeCounter:
    """Says what the test put into `found`, once."""

    made: list[FakeCounter]

    def __init__(self, host: Host) -> None:
        self.watched: frozenset[ProcessId] = frozenset()
        self.found: dict[ProcessId, FaultTable] = {}
        self.closed = False
        self.failure: KernelCallError | None = None
        self.made.append(self)

    def watch(self, processes: frozenset[ProcessId]) -> None:
        self.watched = processes

    def read(self) -> dict[ProcessId, FaultTable]:
        if self.failure is not None:
            raise self.failure
        found, self.found = self.found, {}
        return {process: each for process, each in found.items() if process in self.watched}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def shared() -> feed._Shared:
    FakeCounter.made = []
    return feed._Shared(FakeCounter)  # type: ignore[arg-type]


def test_engines_share_one_counter_and_each_gets_what_is_its_processes(shared: feed._Shared) -> None:
    """Read by whom it may be: nothing is lost to the other."""
    first, second = SwapInFeed(HOST, shared=shared), SwapInFeed(HOST, shared=shared)
    (counter,) = FakeCounter.made
    first.watch(frozenset({A, B}))
    second.watch(frozenset({B, C}))
    assert counter.watched == {A, B, C}
    counter.found = {A: table(2, 4), B: table(10), C: table(100)}
    assert first.read() == SwapIns(16, 8, 8 / 1024)
    counter.found = {C: table(1)}
    assert second.read() == SwapIns(111, 55, 55 / 1024)
    assert first.read() == second.read() == SwapIns()


def test_the_first_loads_and_the_last_unloads(shared: feed._Shared) -> None:
    first, second = SwapInFeed(HOST, shared=shared), SwapInFeed(HOST, shared=shared)
    second.watch(frozenset({C}))
    first.watch(frozenset({A}))
    (counter,) = FakeCounter.made
    first.close()
    first.close()
    assert counter.watched == {C}
    assert not counter.closed
    second.close()
    assert counter.closed
    SwapInFeed(HOST, shared=shared).close()
    assert len(FakeCounter.made) == 2


def test_a_feed_that_nobody_holds_any_more_leaves(shared: feed._Shared) -> None:
    SwapInFeed(HOST, shared=shared)
    assert FakeCounter.made[0].closed


def test_where_it_does_not_work_it_is_tried_once() -> None:
    """Loading by a compiler takes seconds: the next engine gets the same answer at once."""
    tries = []

    def refuse(host: Host) -> FakeCounter:
        tries.append(host)
        raise TrackerUnavailable("no BPF here")

    shared = feed._Shared(refuse)  # type: ignore[arg-type]
    for _ in range(3):
        with pytest.raises(TrackerUnavailable, match="no BPF here"):
            SwapInFeed(HOST, shared=shared)
    assert len(tries) == 1


def watch(shared: feed._Shared) -> SwapInWatch:
    return SwapInWatch(HOST, lambda host: SwapInFeed(host, shared=shared))


def test_nothing_is_loaded_before_memory_went_out(shared: feed._Shared) -> None:
    one = watch(shared)
    assert one.read([A]) is None
    assert FakeCounter.made == []
    one.paged_out(A)
    one.paged_out(A)
    assert FakeCounter.made[0].watched == {A}
    FakeCounter.made[0].found = {A: table(6)}
    assert one.read([A]) == SwapIns(6, 3, 3 / 1024)
    one.close()
    assert one.read([A]) is None


def test_a_process_that_is_gone_is_no_longer_watched(shared: feed._Shared) -> None:
    one = watch(shared)
    one.paged_out(A)
    one.paged_out(B)
    FakeCounter.made[0].found = {A: table(4), B: table(2)}
    assert one.read([B]) == SwapIns(6, 3, 3 / 1024)  # what it waited for counts to the last
    assert FakeCounter.made[0].watched == {B}
    one.close()


def test_a_kernel_that_refuses_later_ends_the_counting_and_nothing_else(shared: feed._Shared) -> None:
    one = watch(shared)
    one.paged_out(A)
    FakeCounter.made[0].failure = KernelCallError("bpf: broken", 5)
    assert one.read([A]) is None
    assert FakeCounter.made[0].closed
    one.paged_out(B)
    assert one.read([A, B]) is None


def no_bpf(host: Host) -> SwapInFeed:
    raise TrackerUnavailable("no BPF here")


def test_without_bpf_and_delay_accounting_the_engine_goes_on_without_these_numbers() -> None:
    def no_delays(host: Host) -> DelayFeed:
        raise Unavailable("delay accounting is off")

    one = SwapInWatch(HOST, no_bpf, no_delays)
    one.paged_out(A)
    assert one.read([A]) is None


class FakeTaskStats:
    """Delays by pid, as the test sets them; processes without are gone."""

    def __init__(self) -> None:
        self.delays: dict[int, SwapInDelay] = {}
        self.closed = False

    def swap_in(self, pid: int) -> SwapInDelay:
        if pid not in self.delays:
            raise ProcessGone("gone", 3)
        return self.delays[pid]

    def close(self) -> None:
        self.closed = True


def test_without_bpf_the_kernel_s_delay_accounting_gives_the_same_numbers() -> None:
    """Counted from when memory went out; what came before is not ours."""
    stats = FakeTaskStats()
    stats.delays = {1: SwapInDelay(1000, 7.0), 2: SwapInDelay(5, 0.5)}
    one = SwapInWatch(HOST, no_bpf, lambda host: DelayFeed(host, lambda host: stats))  # type: ignore[arg-type,return-value]
    one.paged_out(A)
    one.paged_out(B)
    assert one.read([A, B]) == SwapIns()
    stats.delays = {1: SwapInDelay(1010, 7.25), 2: SwapInDelay(6, 0.625)}
    assert one.read_each([A, B]) == {A: SwapIns(10, 10, 0.25), B: SwapIns(1, 1, 0.125)}
    del stats.delays[1]
    stats.delays[2] = SwapInDelay(7, 0.75)
    assert one.read_each([B]) == {B: SwapIns(1, 1, 0.125)}
    one.paged_out(A)  # it is gone before it could be asked
    assert one.read([A, B]) == SwapIns()
    one.close()
    assert stats.closed


def test_the_account_tells_how_long_a_process_waits_for_a_page() -> None:
    """None where nothing is counted: not the same as no swap-in."""
    ledger = RefaultLedger()
    assert ledger.stats(0).swap_ins is None
    assert ledger.stats(0).mean_swap_in_wait_s is None
    ledger.swapped_in(0, 0, 0.0)
    assert ledger.stats(0).swap_ins == 0
    assert ledger.stats(0).mean_swap_in_wait_s is None
    ledger.swapped_in(10, 3, 0.006)
    ledger.swapped_in(5, 1, 0.002)
    stats = ledger.stats(1)
    assert (stats.swap_ins, stats.swap_in_waits) == (15, 4)
    assert stats.mean_swap_in_wait_s == pytest.approx(0.002)
