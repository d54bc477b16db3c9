"""Policy `age`: who goes where, when, and in which order."""

from __future__ import annotations

import numpy as np
import pytest

from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveTask
from memtier_engine.pages.ages import AgeClock, ProcessPages
from memtier_engine.policies.age import AgePolicy, AgePolicyConfig
from support.fakes import PROCESS, pages_of, spans

UNLIMITED = None


def state(ages: list[int], *, places: bool = False, streaks: list[int] | None = None) -> ProcessPages:
    pages = ProcessPages(PROCESS, places=places, streaks=streaks is not None)
    pages.set_spans(spans((0, len(ages))))
    pages.ages[:] = ages
    if streaks is not None:
        assert pages.streaks is not None
        pages.streaks[:] = streaks
    return pages


def clock_of(scans: int, interval_s: float = 1.0) -> AgeClock:
    clock = AgeClock()
    for number in range(scans):
        clock.begin_scan(number * interval_s)
    return clock


def decide(config: AgePolicyConfig, pages: ProcessPages, clock: AgeClock, budget: int | None = None) -> list[MoveTask]:
    return AgePolicy(config).decide({PROCESS: pages}, clock, budget)


def test_memory_idle_for_swapoutms_is_paged_out_and_younger_memory_is_not() -> None:
    config = AgePolicyConfig(interval_ms=1000, swap_out_ms=5000)
    [task] = decide(config, state([0, 4, 5, 6, 5, 1]), clock_of(10))
    assert task.to_node == SWAP_NODE
    assert pages_of(task.spans) == [(2, 5)]


def test_before_the_threshold_can_be_reached_nothing_is_decided() -> None:
    config = AgePolicyConfig(interval_ms=1000, swap_out_ms=5000)
    assert decide(config, state([3, 3]), clock_of(5)) == []


def test_without_a_duration_a_rule_is_off() -> None:
    assert decide(AgePolicyConfig(interval_ms=1000), state([0, 9]), clock_of(20)) == []
    assert decide(AgePolicyConfig(interval_ms=1000, swap_out_ms=0), state([0, 9]), clock_of(20)) == []


def test_idle_memory_goes_to_the_first_idle_node_and_what_swaps_out_does_not_go_twice() -> None:
    config = AgePolicyConfig(interval_ms=1000, swap_out_ms=8000, idle_duration_ms=3000, idle_numas=(3, 2))
    out, idle = decide(config, state([0, 3, 4, 8, 9], places=True), clock_of(12))
    assert (out.to_node, pages_of(out.spans)) == (SWAP_NODE, [(3, 5)])
    assert (idle.to_node, pages_of(idle.spans)) == (3, [(1, 3)])


def test_memory_already_put_on_the_idle_node_is_not_asked_for_again() -> None:
    config = AgePolicyConfig(interval_ms=1000, idle_duration_ms=3000, idle_numas=(3,))
    pages = state([5, 5, 5], places=True)
    pages.set_place(spans((0, 2)), 3)
    [task] = decide(config, pages, clock_of(10))
    assert pages_of(task.spans) == [(2, 3)]


def test_active_memory_is_promoted_first() -> None:
    """Active: touched in each of the last r + 1 scans, r = activedurationms // interval."""
    config = AgePolicyConfig(
        interval_ms=1000,
        idle_duration_ms=3000,
        idle_numas=(3,),
        active_duration_ms=2000,
        active_numas=(1,),
    )
    first, second = decide(config, state([0, 0, 0, 5], places=True, streaks=[2, 3, 9, 0]), clock_of(10))
    assert (first.to_node, pages_of(first.spans), first.reason) == (1, [(1, 3)], "active")
    assert (second.to_node, pages_of(second.spans)) == (3, [(3, 4)])


def test_no_more_is_asked_for_than_the_mover_can_do() -> None:
    config = AgePolicyConfig(interval_ms=1000, swap_out_ms=2000)
    [task] = decide(config, state([9] * 100), clock_of(20), budget=10 * PAGE_BYTES)
    assert pages_of(task.spans) == [(0, 10)]


def test_pages_out_of_ram_are_never_candidates() -> None:
    config = AgePolicyConfig(interval_ms=1000, swap_out_ms=1000)
    assert decide(config, state([254, 255]), clock_of(20)) == []


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("intervalms", {"interval_ms": 0}),
        ("swapoutms", {"swap_out_ms": -1}),
        ("idledurationms", {"idle_duration_ms": -5}),
        ("activedurationms", {"active_duration_ms": -5}),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(key: str, values: dict[str, int]) -> None:
    with pytest.raises(ConfigError) as caught:
        AgePolicyConfig(**values)  # type: ignore[arg-type]
    assert caught.value.key_path == key


def test_deciding_costs_little_for_a_large_process() -> None:
    """1 GiB with every second page idle: one array pass, no loop over pages."""
    pages = state([0])
    pages.set_spans(spans((0, 1 << 18)))
    pages.ages[:] = np.tile(np.array([0, 9], np.uint8), 1 << 17)
    config = AgePolicyConfig(interval_ms=1000, swap_out_ms=2000)
    [task] = decide(config, pages, clock_of(20))
    assert len(task.spans) == 1 << 17
