"""Policies `avoid-oom` and `demote-idle`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from memtier_engine.engine.oom_facts import HostOomFacts
from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveTask, ProcessId
from memtier_engine.pages.ages import AgeClock, ProcessPages
from memtier_engine.policies.avoid_oom import (
    AvoidOomPolicy,
    AvoidOomPolicyConfig,
    Candidate,
    NodeMemory,
    NodeSet,
    first_bytes,
)
from memtier_engine.policies.demote_idle import DemoteIdlePolicy, DemoteIdlePolicyConfig
from support.fakes import PROCESS, pages_of, spans
from support.hostfolder import HostFolder

MIB = 1 << 20
A, B = ProcessId(1001, 100), ProcessId(1002, 100)
FULL, MEDIUM, ROOMY = 50, 120, 500  # of 1000 MiB: below 8 %, between, above 16 %


class Facts:
    """A machine as the test says: available MiB by node, of 1000 each."""

    def __init__(
        self, available: dict[int, int], sets: Sequence[NodeSet] = (), candidates: Sequence[Candidate] = ()
    ) -> None:
        self.available = available
        self.sets = sets
        self.found = candidates
        self.totals: dict[int, int] = {}
        self.asked: list[tuple[frozenset[int], frozenset[int]]] = []

    def nodes(self) -> list[NodeMemory]:
        return [NodeMemory(node, self.totals.get(node, 1000) * MIB, mib * MIB) for node, mib in self.available.items()]

    def node_sets(self) -> Sequence[NodeSet]:
        return self.sets

    def candidates(self, pids: frozenset[int], nodes: frozenset[int], least_bytes: int) -> list[Candidate]:
        self.asked.append((pids, nodes))
        return [each for each in self.found if each.process.pid in pids and each.node in nodes]


def candidate(process: ProcessId, node: int, mib: int, score: int = 1, own: frozenset[int] | None = None) -> Candidate:
    pages = mib * MIB // PAGE_BYTES
    return Candidate(process, node, spans((0, pages)), score, own if own is not None else frozenset({node}))


def bound(*nodes: int, pids: Sequence[int] = (1001,)) -> NodeSet:
    return NodeSet(frozenset(nodes), frozenset(pids))


def decide(facts: Facts, budget: int | None = None, **config: str) -> tuple[str, list[tuple[int, int, int]]]:
    """(status, [(pid, MiB, to node)])."""
    policy = AvoidOomPolicy(AvoidOomPolicyConfig(**config), facts)  # type: ignore[arg-type]
    tasks = policy.decide({}, AgeClock(), budget)
    return policy.status, [(task.process.pid, task.spans.total_bytes // MIB, task.to_node) for task in tasks]


@pytest.mark.parametrize(
    ("available", "sets", "status"),
    [
        ({0: ROOMY, 1: ROOMY}, [bound(0)], "no pressure"),
        ({0: MEDIUM, 1: ROOMY}, [bound(0)], "no pressure"),
        ({0: FULL, 1: FULL}, [bound(0)], "high pressure on all nodes"),
        ({0: FULL, 1: MEDIUM}, [bound(0), bound(1)], "no low pressure nodes"),
        ({0: FULL, 1: ROOMY}, [bound(0)], "pressure on some nodes"),
        ({0: FULL, 1: ROOMY}, [], "no pressure"),
    ],
)
def test_pressure_is_judged_by_the_sets_that_workloads_are_bound_to(
    available: dict[int, int], sets: list[NodeSet], status: str
) -> None:
    """A full node that nobody is bound to is no pressure: the others have room for everybody."""
    assert decide(Facts(available, sets))[0] == status


def test_memory_moves_from_the_full_to_the_roomy_node_until_stop_is_reached() -> None:
    facts = Facts({0: FULL, 1: ROOMY}, [bound(0), bound(0, 1)], [candidate(A, 0, 300)])
    # Node 0 has 50 MiB and should have 160.
    assert decide(facts) == ("pressure on some nodes", [(1001, 110, 1)])


def test_moving_that_takes_several_rounds_goes_on_until_stop_is_reached() -> None:
    """What was not moved by the next decision is forgotten by the mover, so it is asked for again."""
    facts = Facts({0: 50, 1: 500}, [bound(0, 1), bound(0, pids=[])], [candidate(A, 0, 400)])
    policy = AvoidOomPolicy(AvoidOomPolicyConfig(), facts)

    def asked_mib() -> int:
        return sum(task.spans.total_bytes for task in policy.decide({}, AgeClock(), None)) // MIB

    assert asked_mib() == 110
    facts.available = {0: 120, 1: 430}  # above start, below stop
    assert asked_mib() == 40
    facts.available = {0: 160, 1: 390}
    assert asked_mib() == 0
    facts.available = {0: 120, 1: 430}  # a new round begins below start only
    assert asked_mib() == 0


def test_thresholds_may_be_sizes() -> None:
    facts = Facts({0: FULL, 1: ROOMY}, [bound(0), bound(0, 1)], [candidate(A, 0, 300)])
    assert decide(facts, start_freeing_memory="60M", stop_freeing_memory="80M")[1] == [(1001, 30, 1)]
    assert decide(facts, start_freeing_memory="40M", stop_freeing_memory="80M")[0] == "no pressure"


def test_who_would_be_killed_soonest_and_frees_most_moves_first() -> None:
    facts = Facts(
        {0: FULL, 1: ROOMY},
        [bound(0), bound(0, 1, pids=[1001, 1002])],
        [candidate(A, 0, 60, score=5), candidate(B, 0, 60, score=9)],
    )
    assert decide(facts)[1] == [(1002, 60, 1), (1001, 50, 1)]


def test_a_workload_that_is_bound_to_full_nodes_only_cannot_move() -> None:
    assert decide(Facts({0: FULL, 1: ROOMY}, [bound(0)], [candidate(A, 0, 300)]))[1] == []


def test_no_more_moves_than_the_target_has_room_for() -> None:
    """The target keeps what it needs itself to stay above `stop`."""
    own = frozenset({0, 1})
    facts = Facts({0: FULL, 1: 200, 2: 300}, [bound(0), bound(0, 1, 2)], [candidate(A, 0, 150, own=own)])
    assert decide(facts)[1] == [(1001, 40, 1)]


def test_a_target_with_little_room_for_the_candidate_is_passed_over() -> None:
    facts = Facts({0: FULL, 1: 170, 2: ROOMY}, [bound(0), bound(0, 1, 2)], [candidate(A, 0, 100)])
    assert decide(facts)[1] == [(1001, 100, 2)]


def test_a_node_where_the_process_is_already_comes_first() -> None:
    own = frozenset({0, 2})
    facts = Facts({0: FULL, 1: ROOMY, 2: ROOMY}, [bound(0), bound(0, 1, 2)], [candidate(A, 0, 50, own=own)])
    assert decide(facts)[1] == [(1001, 50, 2)]


def test_a_node_between_the_thresholds_is_used_when_no_other_has_room() -> None:
    """The reference never finds room there."""
    facts = Facts({0: FULL, 1: 500, 2: 1500}, [bound(0), bound(2), bound(0, 1, 2)], [candidate(A, 0, 1400)])
    facts.totals = {2: 10_000}
    assert decide(facts)[1] == [(1001, 110, 2)]


def test_the_same_memory_is_never_moved_twice_nor_room_used_twice() -> None:
    facts = Facts(
        {0: FULL, 1: 200, 2: 300},
        [bound(0), bound(0, 1, 2, pids=[1001, 1002])],
        [candidate(A, 0, 30, 2, frozenset({0, 1})), candidate(B, 0, 30, 1, frozenset({0, 1}))],
    )
    assert decide(facts)[1] == [(1001, 30, 1), (1002, 10, 1)]


def test_no_more_is_asked_for_than_the_mover_can_do() -> None:
    facts = Facts({0: FULL, 1: ROOMY}, [bound(0), bound(0, 1)], [candidate(A, 0, 300)])
    assert decide(facts, budget=20 * MIB)[1] == [(1001, 20, 1)]


def test_candidates_are_only_looked_for_under_pressure_and_on_full_nodes() -> None:
    facts = Facts({0: ROOMY, 1: ROOMY}, [bound(0, 1)])
    decide(facts)
    assert facts.asked == []
    facts = Facts({0: FULL, 1: ROOMY}, [bound(0), bound(0, 1)])
    decide(facts)
    assert facts.asked == [(frozenset({1001}), frozenset({0}))]


def test_node_numbers_may_have_gaps() -> None:
    facts = Facts({3: FULL, 70: ROOMY}, [bound(3), bound(3, 70)], [candidate(A, 3, 300)])
    assert decide(facts)[1] == [(1001, 110, 70)]


def test_the_first_bytes_of_spans_are_whole_pages() -> None:
    found = first_bytes(spans((0, 4), (10, 14)), 6 * PAGE_BYTES + 100)
    assert pages_of(found) == [(0, 4), (10, 12)]
    assert pages_of(first_bytes(spans((0, 4)), 100 * PAGE_BYTES)) == [(0, 4)]
    assert pages_of(first_bytes(spans((0, 4), (10, 14)), 4 * PAGE_BYTES)) == [(0, 4)]
    assert pages_of(first_bytes(spans((0, 4)), 100)) == []


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("intervalms", {"interval_ms": 0}),
        ("startfreeingmemory", {"start_freeing_memory": "120%"}),
        ("startfreeingmemory", {"start_freeing_memory": "20%"}),
        ("stopfreeingmemory", {"stop_freeing_memory": "much"}),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(key: str, values: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        AvoidOomPolicyConfig(**values)  # type: ignore[arg-type]
    assert caught.value.key_path == key


def test_facts_of_a_machine(tmp_path: Path) -> None:
    """Two nodes, a cgroup bound to one of them with a process whose pages are on both; frames of 1 MiB blocks."""
    folder = HostFolder(tmp_path)
    nodes = "sys/devices/system/node"
    folder.write(f"{nodes}/online", "0-1\n")
    folder.write(f"{nodes}/has_memory", "0-1\n")
    folder.write("sys/devices/system/memory/block_size_bytes", "100000\n")
    for node in (0, 1):
        folder.write(
            f"{nodes}/node{node}/meminfo",
            f"Node {node} MemTotal: 1000 kB\nNode {node} MemFree: {100 + node} kB\n"
            f"Node {node} Inactive(file): 50 kB\nNode {node} SReclaimable: 10 kB\n",
        )
        folder.write(f"{nodes}/node{node}/memory{node}/state", "online\n")
    folder.cgroup2()
    folder.cgroup("/sys/fs/cgroup/pods", [])
    folder.cgroup("/sys/fs/cgroup/pods/one", [1001, 7777])
    folder.write("sys/fs/cgroup/pods/one/cpuset.mems.effective", "0\n")
    folder.cgroup("/sys/fs/cgroup/pods/empty")
    folder.write("sys/fs/cgroup/pods/empty/cpuset.mems.effective", "1\n")
    start = 0x10000
    folder.process(1001, maps=f"{start:08x}-{start + 4 * PAGE_BYTES:08x} rw-p 00000000 00:00 0 [heap]\n")
    folder.write("proc/1001/oom_score", "7\n")
    frame = (1 << 63) | (1 << 56)
    folder.pagemap(
        1001,
        {
            start: frame | 5,
            start + PAGE_BYTES: frame | 6,
            start + 2 * PAGE_BYTES: frame | 256,
            start + 3 * PAGE_BYTES: frame | 9,
        },
    )
    facts = HostOomFacts(folder.host, ["/sys/fs/cgroup/pods", "/sys/fs/cgroup/absent"])
    assert facts.nodes() == [NodeMemory(0, 1000 << 10, 150 << 10), NodeMemory(1, 1000 << 10, 151 << 10)]
    assert facts.node_sets() == [NodeSet(frozenset({0}), frozenset({1001, 7777}))]
    [found] = facts.candidates(frozenset({1001, 7777}), frozenset({0}), PAGE_BYTES)
    assert (found.process, found.node, found.own_nodes) == (ProcessId(1001, 100), 0, frozenset({0, 1}))
    assert found.spans.starts.tolist() == [start, start + 3 * PAGE_BYTES]
    assert found.score == 7 * 12
    assert facts.candidates(frozenset({1001}), frozenset({0}), 4 * PAGE_BYTES) == []


def demote(ages: list[int], node: int = 3, budget: int | None = None, places: Sequence[int] = ()) -> list[MoveTask]:
    own = ProcessPages(PROCESS, places=True)
    own.set_spans(spans((0, len(ages))))
    own.ages[:] = ages
    for page in places:
        own.set_place(spans((page, page + 1)), node)
    policy = DemoteIdlePolicy(DemoteIdlePolicyConfig(idle_numas=(node,)))
    return policy.decide({PROCESS: own}, AgeClock(), budget)


def test_what_one_whole_scan_interval_left_untouched_is_demoted() -> None:
    [task] = demote([0, 1, 2, 0, 254, 255])
    assert (task.to_node, pages_of(task.spans)) == (3, [(1, 3)])


def test_a_page_is_demoted_once() -> None:
    [task] = demote([1, 1, 1, 1], places=[0, 2])
    assert pages_of(task.spans) == [(1, 2), (3, 4)]


def test_demotion_can_be_to_swap_and_stays_within_the_budget() -> None:
    [task] = demote([1] * 10, node=SWAP_NODE, budget=4 * PAGE_BYTES)
    assert (task.to_node, pages_of(task.spans)) == (SWAP_NODE, [(0, 4)])


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("intervalms", {"interval_ms": 0, "idle_numas": (1,)}),
        ("idlenumas", {"idle_numas": ()}),
        ("idlenumas", {"idle_numas": (-2,)}),
    ],
)
def test_demote_idle_refuses_values_out_of_range(key: str, values: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        DemoteIdlePolicyConfig(**values)  # type: ignore[arg-type]
    assert caught.value.key_path == key
