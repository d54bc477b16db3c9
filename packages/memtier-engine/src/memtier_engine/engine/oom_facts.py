"""What policy avoid-oom wants to know, from the kernel's files: nodes, cpusets, and whose pages are where."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from memtier_engine.errors import KernelCallError, Unavailable
from memtier_engine.hostfs.cgroup import Cgroup, check_cgroup_name, find_cgroup
from memtier_engine.hostfs.held import held_of
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.locate import PageLocator
from memtier_engine.hostfs.maps import read_mappings
from memtier_engine.hostfs.numa import memory_nodes, node_meminfo, parse_id_list
from memtier_engine.model import PAGE_BYTES, PAGE_SHIFT, ProcessId, Spans
from memtier_engine.pages.ages import true_runs
from memtier_engine.policies.avoid_oom import Candidate, NodeMemory, NodeSet
from memtier_engine.targets.base import identify

FILE_SHARE = 0.8
"""Of inactive file pages this part is taken to be free when needed."""


class HostOomFacts:
    """This machine's answers."""

    def __init__(self, host: Host, cgroups: Iterable[str]) -> None:
        """`cgroups`: watched with everything below them. Raises ConfigError for a name with `..` in it."""
        self._host = host
        self._names = tuple(cgroups)
        for name in self._names:
            check_cgroup_name(name)
        self._locator = PageLocator(host)

    def nodes(self) -> list[NodeMemory]:
        """See `OomFacts.nodes`."""
        found = []
        for node in memory_nodes(self._host):
            try:
                info = node_meminfo(self._host, node)
            except KernelCallError:
                continue  # taken offline meanwhile
            available = info.get("MemFree", 0) + info.get("SReclaimable", 0)
            available += int(info.get("Inactive(file)", 0) * FILE_SHARE)
            found.append(NodeMemory(node, info.get("MemTotal", 0), available))
        return found

    def node_sets(self) -> list[NodeSet]:
        """See `OomFacts.node_sets`."""
        everything = frozenset(memory_nodes(self._host))
        found: dict[frozenset[int], set[int]] = {}
        for name in self._names:
            try:
                root = Cgroup(find_cgroup(self._host, name), self._host)
                for directory in root.directories():
                    cgroup = Cgroup(directory, self._host)
                    pids = cgroup.pids(recursive=False)
                    text = cgroup.read_text("cpuset.mems.effective")
                    if pids and text is not None:
                        nodes = frozenset(parse_id_list(text)) or everything
                        found.setdefault(nodes, set()).update(pids)
            except (KernelCallError, Unavailable):
                continue
        return [NodeSet(nodes, frozenset(pids)) for nodes, pids in found.items()]

    def candidates(self, pids: frozenset[int], nodes: frozenset[int], least_bytes: int) -> list[Candidate]:
        """See `OomFacts.candidates`."""
        found: list[Candidate] = []
        for process in identify(self._host, pids):
            try:
                found.extend(self._of_process(process, nodes, least_bytes))
            except KernelCallError:
                continue  # it exited, or hides
        return found

    def _of_process(self, process: ProcessId, nodes: frozenset[int], least_bytes: int) -> list[Candidate]:
        spans = held_of(self._host, process.pid, read_mappings(self._host, process.pid).tierable())
        where = self._locator.nodes(process, spans)
        counts = np.bincount(where[where >= 0], minlength=max(nodes, default=0) + 1)
        if sum(int(counts[node]) for node in nodes) * PAGE_BYTES < least_bytes:
            return []
        badness = self._host.read_int(self._host.proc(process.pid, "oom_score"))
        own_nodes = frozenset(np.flatnonzero(counts).tolist())
        offsets = np.concatenate(([0], np.cumsum(spans.pages)))
        found = []
        for node in nodes & own_nodes:
            on_node = where == node
            per_mapping = np.add.reduceat(on_node.view(np.uint8), offsets[:-1], dtype=np.int64)
            for index in np.flatnonzero(per_mapping).tolist():
                runs = true_runs(on_node[offsets[index] : offsets[index + 1]]).astype(np.uint64)
                addresses = spans.starts[index] + (runs << np.uint64(PAGE_SHIFT))
                part = Spans(addresses[:, 0].copy(), addresses[:, 1].copy())
                score = badness * (part.total_bytes // 1024)
                found.append(Candidate(process, node, part, score, own_nodes))
        return found
