"""Policy `avoid-oom`: when nodes run short, move memory to nodes that have room, before the kernel kills.

Workloads are bound to nodes by their cpuset: the smallest sets of nodes run short first. Between `start` and
`stop` a set is left alone; below `start` memory moves until `stop` is reached again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES, MoveTask, ProcessId, Spans
from memtier_engine.pages.ages import AgeClock, ProcessPages
from memtier_engine.policies.base import BasePolicy, check_interval
from memtier_engine.units import parse_share

PROCESS_BYTES_MIN = 16 << 20
"""A process with less on the nodes under pressure is not worth the disturbance."""
ROOM_SHARE = 4
"""A target must have room for at least this fraction of a candidate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AvoidOomPolicyConfig:
    """The keys of the reference's `avoid-oom` policy, with units in their names."""

    interval_ms: int = 5000
    """Time between looks at the nodes (`intervalms`)."""
    start_freeing_memory: str = "8%"
    """Available memory of each node below which moving starts: a share of the node, or a size."""
    stop_freeing_memory: str = "16%"
    """Available memory of each node at which moving stops."""

    def __post_init__(self) -> None:
        check_interval(self.interval_ms)
        gib = 1 << 30
        start = parse_share(self.start_freeing_memory, gib, key_path="startfreeingmemory")
        stop = parse_share(self.stop_freeing_memory, gib, key_path="stopfreeingmemory")
        both_shares = self.start_freeing_memory.strip().endswith("%") == self.stop_freeing_memory.strip().endswith("%")
        if both_shares and start > stop:
            raise ConfigError(
                f"{self.start_freeing_memory} is more than stopfreeingmemory, {self.stop_freeing_memory}",
                key_path="startfreeingmemory",
                hint="start below where you stop",
            )


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """One node now."""

    node: int
    total_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class NodeSet:
    """The nodes that some cgroups are bound to, and the processes in these."""

    nodes: frozenset[int]
    pids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Candidate:
    """The pages of one mapping of one process that are on one node."""

    process: ProcessId
    node: int
    spans: Spans
    score: int
    """The kernel's oom_score times the size in KiB: who would be killed soonest, and frees most."""
    own_nodes: frozenset[int]
    """Nodes on which the process has memory."""

    @property
    def size_bytes(self) -> int:
        """What is there to move."""
        return self.spans.total_bytes


class OomFacts(Protocol):
    """Knows the machine. Errors of single processes and cgroups are its own business: they are left out."""

    def nodes(self) -> Sequence[NodeMemory]:
        """All nodes that have memory."""

    def node_sets(self) -> Sequence[NodeSet]:
        """One per different set of nodes that watched cgroups are bound to."""

    def candidates(self, pids: frozenset[int], nodes: frozenset[int], least_bytes: int) -> Sequence[Candidate]:
        """What these processes have on these nodes, of processes that have `least_bytes` there or more."""


class AvoidOomPolicy(BasePolicy):
    """Needs no tracker and no target: it looks at nodes, not at accesses."""

    name = "avoid-oom"

    def __init__(
        self, config: AvoidOomPolicyConfig, facts: OomFacts, *, on_event: Callable[[str], None] | None = None
    ) -> None:
        """`on_event`: told of each decision, by the reference's event names."""
        self.config = config
        self._interval_ms = config.interval_ms
        self.status = ""
        """What the last decision found, in the reference's words; "" before the first."""
        self.evaluated: tuple[Candidate, ...] = ()
        """The candidates of the last set that was looked at, best first."""
        self._freeing: frozenset[frozenset[int]] = frozenset()
        self._facts = facts
        self._on_event = on_event or (lambda name: None)

    def decide(
        self, pages: Mapping[ProcessId, ProcessPages], clock: AgeClock, budget_bytes: int | None
    ) -> list[MoveTask]:
        """See `Policy.decide`; `pages` are not looked at."""
        nodes = {each.node: each for each in self._facts.nodes()}
        plan = _Plan(self.config, nodes, self._facts.node_sets(), self._freeing)
        self._freeing = plan.freeing
        self.status = plan.status
        self._on_event(f"PolicyAvoidOom.balance: {plan.status}")
        tasks: list[MoveTask] = []
        left = budget_bytes
        for node_set in plan.sets_in_need():
            if not plan.may_go_on() or left == 0:
                break
            found = self._facts.candidates(node_set.pids, plan.high & node_set.nodes, PROCESS_BYTES_MIN)
            self.evaluated = tuple(sorted(found, key=lambda each: -each.score))
            for candidate in self.evaluated:
                if not plan.may_go_on() or left == 0:
                    break
                task = plan.move(candidate, node_set, left)
                if task is not None:
                    tasks.append(task)
                    left = None if left is None else max(0, left - task.spans.total_bytes)
        return tasks


class _Plan:
    """What is short of memory, what has room, and how much of both is left."""

    def __init__(
        self,
        config: AvoidOomPolicyConfig,
        nodes: Mapping[int, NodeMemory],
        node_sets: Sequence[NodeSet],
        freeing: frozenset[frozenset[int]],
    ) -> None:
        """`freeing`: sets that were below `start` and have not come up to `stop` since: moving takes its time."""

        def threshold(text: str) -> dict[int, int]:
            return {number: parse_share(text, node.total_bytes) for number, node in nodes.items()}

        start, stop = threshold(config.start_freeing_memory), threshold(config.stop_freeing_memory)
        everything = frozenset(nodes)
        sets = [NodeSet(each.nodes & everything, each.pids) for each in node_sets]
        self._available = {number: node.available_bytes for number, node in nodes.items()}
        high: set[int] = set()
        medium: set[int] = set()
        still: set[frozenset[int]] = set()
        for each in (NodeSet(everything), *sets):
            available = sum(self._available[node] for node in each.nodes)
            limit = stop if each.nodes in freeing else start
            if available < sum(limit[node] for node in each.nodes):
                still.add(each.nodes)
                high |= each.nodes
            elif available < sum(stop[node] for node in each.nodes):
                medium |= each.nodes
        self.high = frozenset(high)
        self.freeing = frozenset(still)
        self._none = everything - high - medium
        self._medium = frozenset(medium) - self.high
        self._sets = sets
        self._need = {node: max(0, stop[node] - self._available[node]) for node in self.high}
        self._room = {node: self._available[node] - stop[node] for node in self._none}
        self._room |= {node: self._available[node] - start[node] for node in self._medium}
        if not self.high:
            self.status = "no pressure"
        elif self.high == everything:
            self.status = "high pressure on all nodes"
        elif not self._none:
            self.status = "no low pressure nodes"
        else:
            self.status = "pressure on some nodes"

    def sets_in_need(self) -> list[NodeSet]:
        """Sets with processes that reach from full to roomy nodes, the fullest first."""
        if self.status != "pressure on some nodes":
            return []
        found = [each for each in self._sets if each.pids and each.nodes & self.high and each.nodes & self._none]
        return sorted(found, key=lambda each: sum(self._available[node] for node in each.nodes))

    def may_go_on(self) -> bool:
        """Whether something is short and something has room."""
        return any(need >= PAGE_BYTES for need in self._need.values()) and any(
            room >= PAGE_BYTES for room in self._room.values()
        )

    def move(self, candidate: Candidate, node_set: NodeSet, limit_bytes: int | None) -> MoveTask | None:
        """A task for as much of the candidate as is needed and fits; None if nothing is."""
        need = self._need.get(candidate.node, 0)
        target = self._target(candidate, node_set)
        if target is None or need < PAGE_BYTES:
            return None
        amount = min(need, self._room[target], candidate.size_bytes)
        if limit_bytes is not None:
            amount = min(amount, max(PAGE_BYTES, limit_bytes))
        spans = first_bytes(candidate.spans, amount)
        if not len(spans):
            return None
        self._need[candidate.node] -= spans.total_bytes
        self._room[target] -= spans.total_bytes
        return MoveTask(candidate.process, spans, target, "avoid oom")

    def _target(self, candidate: Candidate, node_set: NodeSet) -> int | None:
        roomy = self._none | self._medium
        for nodes in (
            candidate.own_nodes & node_set.nodes & self._none,
            node_set.nodes & self._none,
            candidate.own_nodes & node_set.nodes & roomy,
            node_set.nodes & roomy,
        ):
            for node in sorted(nodes):
                room = self._room[node]
                if node != candidate.node and room >= PAGE_BYTES and room >= candidate.size_bytes // ROOM_SHARE:
                    return node
        return None


def first_bytes(spans: Spans, amount: int) -> Spans:
    """The first whole pages of `spans` that make up `amount` bytes at most."""
    total = np.cumsum(spans.ends - spans.starts)
    budget = np.uint64(amount // PAGE_BYTES * PAGE_BYTES)
    count = int(np.searchsorted(total, budget, side="left"))
    if count == len(spans):
        return spans
    starts, ends = spans.starts[: count + 1], spans.ends[: count + 1].copy()
    ends[-1] -= total[count] - budget
    keep = ends > starts
    return Spans(starts[keep], ends[keep])
