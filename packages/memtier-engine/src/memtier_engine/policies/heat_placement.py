"""Where ranges of each heat class go: a plan over all processes under the nodes' size limits. No IO.

Python loops run over classes, nodes and processes; ranges and pages are array columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memtier_engine.model import NOT_OURS, PAGE_SHIFT, SWAP_NODE, Bools, MoveTask, ProcessId, Spans
from memtier_engine.pages.regions import F64, I64
from memtier_engine.policies.heatmap import Heats, clipped
from memtier_engine.policies.pagemask import flagged_in, flagged_spans, inside, page_indexes

UNLIMITED = np.inf


@dataclass(frozen=True, slots=True)
class ProcessMap:
    """The pages of one process and where each is."""

    process: ProcessId
    spans: Spans
    offsets: I64  # [spans + 1] index of each span's first page
    nodes: NDArray[np.int16]  # [pages] node, SWAP_NODE, NOWHERE or NOT_OURS


@dataclass(slots=True)
class _Rows:
    """The ranges of one process [n]."""

    where: ProcessMap
    firsts: I64  # index of the first page
    lasts: I64  # index after the last page
    heat: F64
    classes: I64


class Placement:
    """Collects ranges, then says who moves where."""

    def __init__(
        self, class_nodes: Mapping[int, tuple[int, ...]], size_bytes: Mapping[int, int], heat_classes: int
    ) -> None:
        """`class_nodes`: heat class to nodes; `size_bytes`: limits of nodes; `heat_classes`: how many there are."""
        self._class_nodes = class_nodes
        self._size_pages = {node: size >> PAGE_SHIFT for node, size in size_bytes.items()}
        self._heat_classes = heat_classes
        self._rows: list[_Rows] = []
        self.used_pages: dict[int, int] = {}
        """Pages of all processes on each node, swap included."""

    def add(self, where: ProcessMap, heats: Heats, heat: F64, classes: I64) -> None:
        """Take in one process; `heat` and `classes` are columns of `heats`. What is not mapped is left out."""
        counts = np.bincount((where.nodes - NOT_OURS).view(np.uint16))
        for index in range(SWAP_NODE - NOT_OURS, len(counts)):
            node = index + NOT_OURS
            self.used_pages[node] = self.used_pages.get(node, 0) + int(counts[index])
        mapped = clipped(heats, where.spans)
        if len(mapped) != len(heats):
            row = np.maximum(np.searchsorted(heats.starts, mapped.starts, side="right") - 1, 0)
            heat, classes = heat[row], classes[row]
        if not len(mapped):
            return
        firsts, lasts = page_indexes(where.spans, where.offsets, mapped.starts, mapped.ends)
        self._rows.append(_Rows(where, firsts, lasts, heat, classes))

    def tasks(self, budget_pages: int | None) -> list[MoveTask]:
        """Moves of misplaced pages, hottest class first, no more than `budget_pages`."""
        if not self._rows:
            return []
        used = self.used_pages
        room: dict[int, float] = {}
        for nodes in self._class_nodes.values():
            for node in nodes:
                limit = self._size_pages.get(node)
                room[node] = UNLIMITED if limit is None else max(0, limit - used.get(node, 0))
        left = UNLIMITED if budget_pages is None else float(budget_pages)
        tasks: list[MoveTask] = []
        for number in range(self._heat_classes - 1, -1, -1):
            if left > 0 and self._class_nodes.get(number):
                left = self._place(number, room, left, tasks)
        return tasks

    def _place(self, number: int, room: dict[int, float], left: float, tasks: list[MoveTask]) -> float:
        """Place one class; what finds no room goes to the nodes of the next colder class. Returns the budget left."""
        chosen = [np.flatnonzero(rows.classes == number) for rows in self._rows]
        accepted: tuple[int, ...] = ()
        for level in range(number, -1, -1):
            nodes = tuple(node for node in self._class_nodes.get(level, ()) if node not in accepted)
            if level < number:
                # Swap is no place for what is merely too much for its node: that would be hot data out of RAM.
                nodes = tuple(node for node in nodes if node != SWAP_NODE)
            if not nodes:
                continue
            accepted += nodes
            masks = [_away(rows.where.nodes, accepted) for rows in self._rows]
            needs = [
                flagged_in(mask, rows.firsts[which], rows.lasts[which])
                for mask, rows, which in zip(masks, self._rows, chosen, strict=True)
            ]
            owner = np.repeat(np.arange(len(self._rows)), [len(which) for which in chosen])
            heat = np.concatenate([rows.heat[which] for rows, which in zip(self._rows, chosen, strict=True)])
            need = np.concatenate(needs) if needs else np.zeros(0, np.int64)
            index = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
            order = np.argsort(-heat, kind="stable")
            order = order[need[order] > 0]
            if not len(order):
                return left
            inside_budget = np.cumsum(need[order]) <= left
            if not inside_budget[0]:
                inside_budget[0] = True  # a range larger than the budget must move some day
            order = order[inside_budget]
            target = _assign(need[order], nodes, room)
            for node in nodes:
                mine = order[target == node]
                room[node] -= int(need[mine].sum())
                left -= int(need[mine].sum())
                for position in np.flatnonzero(np.bincount(owner[mine])).tolist():
                    rows = self._rows[position]
                    which = index[mine[owner[mine] == position]]
                    wanted = masks[position] & inside(len(masks[position]), rows.firsts[which], rows.lasts[which])
                    spans = flagged_spans(rows.where.spans, rows.where.offsets, wanted)
                    tasks.append(MoveTask(rows.where.process, spans, node, f"heat class {number}"))
            if left <= 0 or (target != _NO_NODE).all():
                return max(0.0, left)
            rest = order[target == _NO_NODE]
            chosen = [np.sort(index[rest[owner[rest] == position]]) for position in range(len(self._rows))]
        return max(0.0, left)


_NO_NODE = -9


def _away(nodes: NDArray[np.int16], accepted: tuple[int, ...]) -> Bools:
    """bool[pages]: in RAM, ours, and on none of the accepted nodes."""
    if not len(nodes):
        return np.zeros(0, np.bool_)
    table = np.zeros(max(int(nodes.max()), 0) - NOT_OURS + 1, np.bool_)
    table[-NOT_OURS:] = True  # nodes from 0 on: what is in RAM
    for node in accepted:
        if node - NOT_OURS < len(table):
            table[node - NOT_OURS] = False
    away: Bools = table[nodes - NOT_OURS]
    return away


def _assign(need: I64, nodes: tuple[int, ...], room: Mapping[int, float]) -> I64:
    """int64[n]: the node of each range, `_NO_NODE` where there is no room. Fullest nodes get the least.

    The reference gives each range to the node with the most room at that moment, which in the end leaves all
    nodes with the same room. The same is computed here at once: the level to which nodes fill up.
    """
    target = np.full(len(need), _NO_NODE, np.int64)
    without_limit = [node for node in nodes if room[node] == UNLIMITED]
    if without_limit:
        target[:] = without_limit[0]
        return target
    ranked = sorted((node for node in nodes if room[node] > 0), key=lambda node: -room[node])
    if not ranked:
        return target
    rooms = np.array([room[node] for node in ranked])
    quotas = rooms - _level(rooms, float(need.sum()))
    ends = np.cumsum(np.maximum(quotas, 0))
    done = np.cumsum(need)
    rank = np.searchsorted(ends, done - need / 2, side="left")
    for position, node in enumerate(ranked):
        mine = np.flatnonzero((rank == position) & (need <= rooms[position]))
        fits = np.cumsum(need[mine]) <= rooms[position]
        target[mine[fits]] = node
    return target


def _level(rooms: F64, wanted: float) -> float:
    """The room that is left on each node when `wanted` is spread over nodes of `rooms` (descending)."""
    if wanted >= rooms.sum():
        return 0.0
    for count in range(1, len(rooms) + 1):
        level = (rooms[:count].sum() - wanted) / count
        if count == len(rooms) or level >= rooms[count]:
            return float(max(0.0, level))
    return 0.0
