"""Heatmap: golden vectors of the reference, and where ours goes on from there."""

from __future__ import annotations

import numpy as np
import pytest

from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES, ProcessId, Spans
from memtier_engine.pages.regions import Counters
from memtier_engine.policies.heatmap import NS_PER_S, Heatmap, HeatmapConfig, Heats
from support.growth import Work, least_ratio

P = ProcessId(1, 1)
H = HeatmapConfig(heat_max=2.0, heat_retention=0.25, heat_classes=8)
Piece = tuple[int, int, float, float, float, int]
Update = tuple[float, int, int, int]


def counters(*rows: tuple[int, int, int]) -> Counters:
    """Rows of (first page, last page + 1, count), by plain page number."""
    columns = np.array(rows, np.int64).reshape(-1, 3)
    where = columns[:, :2].astype(np.uint64) * np.uint64(PAGE_BYTES)
    return Counters(where[:, 0].copy(), where[:, 1].copy(), columns[:, 2].copy(), np.zeros(len(rows), np.int64))


def after(config: HeatmapConfig, *updates: Update) -> list[Piece]:
    """Pieces as (start, end, heat, created, updated, class) after updates of (time, start, end, count)."""
    heatmap = Heatmap(config)
    for at_s, first, last, count in updates:
        heatmap.update(P, counters((first, last, count)), int(at_s * NS_PER_S))
    return pieces_of(heatmap, heatmap.processes[P])


def pieces_of(heatmap: Heatmap, found: Heats) -> list[Piece]:
    rows = zip(
        (found.starts // np.uint64(PAGE_BYTES)).tolist(),
        (found.ends // np.uint64(PAGE_BYTES)).tolist(),
        found.heat.tolist(),
        (found.created_ns / NS_PER_S).tolist(),
        (found.updated_ns / NS_PER_S).tolist(),
        heatmap.classes(found.heat).tolist(),
        strict=True,
    )
    return list(rows)


@pytest.mark.parametrize(
    ("config", "updates", "expected"),
    [
        (H, [(10, 40, 60, 10), (11, 40, 60, 5)], [(40, 60, 0.375, 10, 11, 1)]),
        (
            H,
            [(10, 40, 60, 10), (10.5, 50, 70, 4)],
            [(40, 50, 0.5, 10, 10, 2), (50, 60, 0.45, 10, 10.5, 1), (60, 70, 0.2, 10.5, 10.5, 0)],
        ),
        (
            H,
            [(10, 40, 60, 10), (12, 30, 80, 25)],
            [(30, 40, 0.5, 12, 12, 2), (40, 60, 0.53125, 10, 12, 2), (60, 80, 0.5, 12, 12, 2)],
        ),
        (H, [(10, 40, 60, 10), (10, 40, 60, 10)], [(40, 60, 1.0, 10, 10, 4)]),
        (
            H,
            [(10, 40, 60, 100), (9, 45, 50, 1)],
            [(40, 45, 2.0, 10, 10, 7), (45, 50, 2.0, 10, 9, 7), (50, 60, 2.0, 10, 10, 7)],
        ),
        (H, [(10, 40, 60, 10), (11, 60, 70, 5)], [(40, 60, 0.5, 10, 10, 2), (60, 70, 0.5, 11, 11, 2)]),
        (
            HeatmapConfig(heat_max=2.0, heat_retention=0.0, heat_classes=8),
            [(10, 40, 60, 10), (13, 44, 48, 1)],
            [(40, 44, 0.5, 10, 10, 2), (44, 48, 0.25, 10, 13, 1), (48, 60, 0.5, 10, 10, 2)],
        ),
        (HeatmapConfig(heat_max=0.0), [(1, 0, 4, 4)], [(0, 4, 0.0, 1, 1, 0)]),
        (HeatmapConfig(), [(0, 0, 100, 10), (60, 0, 100, 0)], [(0, 100, 0.005000919, 0, 60, 0)]),
    ],
)
def test_golden_vectors(config: HeatmapConfig, updates: list[Update], expected: list[Piece]) -> None:
    found = after(config, *updates)
    assert [piece[:2] + piece[3:] for piece in found] == [piece[:2] + piece[3:] for piece in expected]
    assert [piece[2] for piece in found] == pytest.approx([piece[2] for piece in expected], abs=5e-10)


def test_what_nobody_reports_cools_down_when_it_is_read() -> None:
    """Stored heat stays that of the last update; what is left of it at another time is computed."""
    heatmap = Heatmap(H)
    heatmap.update(P, counters((40, 60, 10)), 10 * NS_PER_S)
    heatmap.update(P, counters((60, 70, 5)), 11 * NS_PER_S)
    heats = heatmap.processes[P]
    assert heatmap.now(heats, 11 * NS_PER_S).tolist() == [0.125, 0.5]
    assert heatmap.now(heats, 12 * NS_PER_S).tolist() == [0.03125, 0.125]
    assert heatmap.now(heats, 9 * NS_PER_S).tolist() == [0.5, 0.5], "a clock set back changes nothing"


def test_records_of_one_update_that_overlap_add_up() -> None:
    """As if they came one after the other at the same time."""
    heatmap = Heatmap(H)
    heatmap.update(P, counters((0, 10, 5), (5, 15, 10), (3, 3, 7)), NS_PER_S)
    assert [piece[:3] for piece in pieces_of(heatmap, heatmap.processes[P])] == [
        (0, 5, 0.5),
        (5, 10, 1.5),
        (10, 15, 1.0),
    ]


def test_heat_of_unmapped_memory_is_forgotten() -> None:
    heatmap = Heatmap(H)
    heatmap.update(P, counters((0, 10, 5), (10, 20, 8), (30, 40, 1)), NS_PER_S)
    page = np.uint64(PAGE_BYTES)
    heatmap.clip(P, Spans(np.array([4, 12], np.uint64) * page, np.array([12, 20], np.uint64) * page))
    assert [piece[:3] for piece in pieces_of(heatmap, heatmap.processes[P])] == [
        (4, 10, 0.5),
        (10, 12, 0.8),
        (12, 20, 0.8),
    ]
    heatmap.clip(P, Spans.empty())
    assert len(heatmap.processes[P]) == 0
    heatmap.keep([])
    assert heatmap.processes == {}


def test_updating_many_ranges_costs_the_same_per_range() -> None:
    """8 times the ranges, about 8 times the CPU time (caches cost some); sorting for each record would take 64."""

    def updates(count: int) -> Work:
        edges = np.arange(count, dtype=np.int64) * 8
        rows = Counters(
            edges.astype(np.uint64) * np.uint64(PAGE_BYTES),
            (edges.astype(np.uint64) + np.uint64(8)) * np.uint64(PAGE_BYTES),
            edges % 9,
            np.zeros(count, np.int64),
        )
        shifted = Counters(rows.starts + np.uint64(PAGE_BYTES), rows.ends, rows.accesses, rows.writes)

        heatmap = Heatmap(H)
        heatmap.update(P, rows, 0)

        def work() -> None:
            heatmap.update(P, rows, NS_PER_S)
            heatmap.update(P, shifted, 2 * NS_PER_S)

        return work

    assert least_ratio(lambda: updates(128_000), lambda: updates(16_000)) < 8 * 4


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("heatmap.heatmax", {"heat_max": -1.0}),
        ("heatmap.heatretention", {"heat_retention": 1.5}),
        ("heatmap.heatclasses", {"heat_classes": 0}),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(key: str, values: dict[str, float]) -> None:
    with pytest.raises(ConfigError) as caught:
        HeatmapConfig(**values)  # type: ignore[arg-type]
    assert caught.value.key_path == key
