"""Policies `ratio` and `stub`."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from memtier_engine.errors import ConfigError, ProcessGone
from memtier_engine.model import NOT_OURS, NOWHERE, PAGE_BYTES, SWAP_NODE, ProcessId, Spans
from memtier_engine.pages.ages import AgeClock, ProcessPages
from memtier_engine.pages.regions import RegionCounters
from memtier_engine.policies.ratio import RatioPolicy, RatioPolicyConfig
from memtier_engine.policies.stub import StubPolicy
from support.fakes import PROCESS, chunk, pages_of, spans


class Places:
    """Where the test says the pages of the process are."""

    def __init__(self, nodes: list[int] | None) -> None:
        self.answer = nodes

    def nodes(self, process: ProcessId, spans: Spans) -> NDArray[np.int16]:
        if self.answer is None:
            raise ProcessGone(f"process {process.pid} exited", 3)
        return np.array(self.answer, np.int16)


def decide(
    ratio: float,
    nodes: list[int] | None,
    scans: list[list[int]],
    *,
    target: int = SWAP_NODE,
    budget_pages: int | None = None,
    mappings: Spans | None = None,
) -> list[tuple[int, int]]:
    """The page ranges that are moved after scans (0/1 per page) with regions of 4 pages."""
    policy = RatioPolicy(
        RatioPolicyConfig(ratio=ratio, ratio_targets=(target,)), Places(nodes), regions=RegionCounters(4)
    )
    own, clock = ProcessPages(PROCESS), AgeClock()
    own.set_spans(mappings if mappings is not None else spans((0, len(scans[0]))))
    for number, touched in enumerate(scans):
        clock.begin_scan(float(number))
        table = clock.step_table()
        policy.begin(PROCESS, own.spans)
        at = 0
        for first, last in pages_of(own.spans):
            seen = chunk(first, touched[at : at + last - first])
            own.update(seen, table)
            policy.observe(PROCESS, seen)
            at += last - first
    tasks = policy.decide({PROCESS: own}, clock, None if budget_pages is None else budget_pages * PAGE_BYTES)
    assert all(task.to_node == target for task in tasks)
    return [pair for task in tasks for pair in pages_of(task.spans)]


BUSY, MEDIUM, IDLE = [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]


def test_the_least_used_regions_go_until_the_share_is_reached() -> None:
    assert decide(0.5, [0] * 16, [BUSY + IDLE + BUSY + MEDIUM]) == [(4, 8), (12, 16)]


def test_the_share_is_met_to_the_page() -> None:
    """Of the last region only what is still missing goes."""
    assert decide(0.375, [0] * 16, [BUSY + IDLE + BUSY + MEDIUM]) == [(4, 8), (12, 14)]


def test_what_is_on_the_target_already_counts_and_is_not_asked_for_again() -> None:
    nodes = [0] * 4 + [SWAP_NODE] * 4 + [0] * 8
    assert decide(0.5, nodes, [BUSY + IDLE + BUSY + MEDIUM]) == [(12, 16)]
    assert decide(0.25, nodes, [BUSY + IDLE + BUSY + MEDIUM]) == []


def test_a_node_can_be_the_target() -> None:
    nodes = [0] * 4 + [3] * 4 + [0] * 4 + [SWAP_NODE] * 4
    assert decide(0.5, nodes, [BUSY + IDLE + MEDIUM + IDLE], target=3) == [(8, 12)]


def test_memory_that_was_never_touched_or_is_shared_does_not_count() -> None:
    nodes = [0] * 4 + [NOWHERE] * 4 + [NOT_OURS] * 4 + [0] * 4
    assert decide(0.5, nodes, [BUSY + IDLE + IDLE + MEDIUM]) == [(12, 16)]


def test_accesses_count_since_tracking_began_and_ties_go_to_the_longest_idle() -> None:
    """Both were touched once; the first one longer ago."""
    assert decide(0.5, [0] * 8, [MEDIUM + IDLE, IDLE + IDLE, IDLE + MEDIUM]) == [(0, 4)]
    assert decide(0.5, [0] * 8, [MEDIUM + MEDIUM, MEDIUM + IDLE, MEDIUM + IDLE]) == [(4, 8)]


def test_no_more_is_asked_for_than_the_mover_can_do() -> None:
    assert decide(1.0, [0] * 16, [IDLE * 4], budget_pages=6) == [(0, 6)]


def test_runs_do_not_cross_mappings() -> None:
    assert decide(1.0, [0] * 8, [IDLE + IDLE], mappings=spans((0, 4), (50, 54))) == [(0, 4), (50, 54)]


def test_a_process_that_exited_is_passed_over() -> None:
    assert decide(0.5, None, [IDLE]) == []


def test_a_process_without_memory_is_passed_over() -> None:
    assert decide(0.5, [], [[]], mappings=Spans.empty()) == []


def test_the_stub_moves_nothing() -> None:
    own = ProcessPages(PROCESS)
    own.set_spans(spans((0, 4)))
    assert StubPolicy().decide({PROCESS: own}, AgeClock(), None) == []


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("intervalms", {"interval_ms": 0, "ratio": 0.5}),
        ("ratio", {"ratio": 0.0}),
        ("ratio", {"ratio": 1.5}),
        ("ratiotargets", {"ratio": 0.5, "ratio_targets": ()}),
        ("ratiotargets", {"ratio": 0.5, "ratio_targets": (-2,)}),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(key: str, values: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        RatioPolicyConfig(**values)  # type: ignore[arg-type]
    assert caught.value.key_path == key
