"""Traces and their replay: what is written is read, and a policy's savings and refaults are those of the trace."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from memtier_engine.lab.simulate import Simulation, simulate
from memtier_engine.lab.trace import TraceError, TraceRecorder, TraceScan, read_trace
from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, MoveTask, PageChunk, ProcessId, Spans
from memtier_engine.pages.ages import AgeClock, ProcessPages
from memtier_engine.pages.regions import RegionCounters
from memtier_engine.policies.age import AgePolicy, AgePolicyConfig
from memtier_engine.policies.base import BasePolicy
from memtier_engine.policies.heat import HeatPolicy, HeatPolicyConfig
from memtier_engine.policies.heatmap import HeatmapConfig
from memtier_engine.policies.ratio import RatioPolicy, RatioPolicyConfig
from memtier_engine.policies.stub import StubPolicy
from support.fakes import BASE, PROCESS, pages_of, spans

OTHER = ProcessId(4343, 8)


def scan(
    time_s: float,
    accessed: list[int],
    resident: list[int] | None = None,
    process: ProcessId = PROCESS,
    where: Spans | None = None,
) -> TraceScan:
    touched = np.array(accessed, np.bool_)
    return TraceScan(
        time_s,
        process,
        where if where is not None else spans((0, len(touched))),
        touched,
        np.ones(len(touched), np.bool_) if resident is None else np.array(resident, np.bool_),
        None,
    )


def record(path: Path, *scans: TraceScan) -> None:
    with TraceRecorder(path) as recorder:
        for each in scans:
            recorder.scan_began(each.process, each.spans, each.time_s)
            at = 0
            for start, pages in zip(each.spans.starts.tolist(), each.spans.pages.tolist(), strict=True):
                for first in range(0, pages, CHUNK_PAGES):
                    part = slice(at + first, at + min(first + CHUNK_PAGES, pages))
                    written = None if each.written is None else each.written[part]
                    recorder.chunk(
                        each.process,
                        PageChunk(start + first * PAGE_BYTES, each.accessed[part], each.resident[part], written),
                    )
                at += pages
            recorder.scan_ended(each.process, 0.1)


def test_what_is_recorded_is_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    pages = CHUNK_PAGES + 100
    big = TraceScan(
        2.5,
        OTHER,
        spans((0, pages), (pages, pages + 8)),
        rng.random(pages + 8) < 0.5,
        rng.random(pages + 8) < 0.9,
        rng.random(pages + 8) < 0.1,
    )
    given = [scan(1.25, [1, 0, 1], [1, 1, 0]), big, scan(3.0, [], where=Spans.empty())]
    record(tmp_path / "trace", *given)
    found = list(read_trace(tmp_path / "trace"))
    assert len(found) == 3
    for one, two in zip(given, found, strict=True):
        assert (one.time_s, one.process, pages_of(one.spans)) == (two.time_s, two.process, pages_of(two.spans))
        assert np.array_equal(one.accessed, two.accessed)
        assert np.array_equal(one.resident, two.resident)
        assert (one.written is None) == (two.written is None)
    assert big.written is not None
    assert found[1].written is not None
    assert np.array_equal(big.written, found[1].written)


def test_a_trace_is_small(tmp_path: Path) -> None:
    """1 GiB, of which a twentieth is in use, scanned 20 times: kilobytes, not megabytes."""
    touched = np.zeros(1 << 18, np.bool_)
    touched[1000:14000] = True
    everything = np.ones(len(touched), np.bool_)
    where = spans((0, len(touched)))
    record(tmp_path / "t", *(TraceScan(float(n), PROCESS, where, touched, everything, None) for n in range(20)))
    assert (tmp_path / "t").stat().st_size < 20_000


def test_a_recording_that_was_cut_off_keeps_its_whole_scans(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    record(path, scan(1.0, [1, 0]), scan(2.0, [0, 1]))
    whole = path.read_bytes()
    for cut in (1, 5, 20):
        path.write_bytes(whole[:-cut])
        assert [each.time_s for each in read_trace(path)] == [1.0]


def test_every_damaged_byte_is_an_error_or_harmless_but_never_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    record(path, scan(1.0, [1, 0, 1, 1]), scan(2.0, [0, 1, 0, 0]))
    whole = path.read_bytes()
    refused = 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            list(read_trace(path))
        except TraceError:
            refused += 1
    assert refused > len(whole) // 2


@pytest.mark.parametrize(
    ("head", "numbers"),
    [
        ({"spans": 1, "runs": {"accessed": 0, "resident": 0}}, [BASE, BASE]),
        ({"spans": 1, "runs": {"accessed": 0, "resident": 0}}, [BASE + 1, BASE + PAGE_BYTES]),
        ({"spans": 1, "runs": {"accessed": 0, "resident": 0}}, [0, 1 << 63]),
        ({"spans": 1, "runs": {"accessed": 1, "resident": 0}}, [BASE, BASE + PAGE_BYTES, 0, 2]),
        ({"spans": 1, "runs": {"accessed": 1, "resident": 0}}, [BASE, BASE + PAGE_BYTES, 1, 1]),
        ({"spans": 1, "runs": {"accessed": 0}}, [BASE, BASE + PAGE_BYTES]),
        ({"spans": 1, "runs": {"accessed": -1, "resident": 1}}, [BASE, BASE + PAGE_BYTES]),
        ({"spans": 9, "runs": {"accessed": 0, "resident": 0}}, [BASE, BASE + PAGE_BYTES]),
        ({"spans": "x", "runs": {}}, []),
        ([], []),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(head: object, numbers: list[int], tmp_path: Path) -> None:
    if isinstance(head, dict):
        head = {"time_s": 0.0, "pid": 1, "start_ticks": 1} | head
    body = json.dumps(head).encode() + b"\n" + struct.pack(f"<{len(numbers)}Q", *numbers)
    packed = zlib.compress(body)
    path = tmp_path / "trace"
    record(path)
    path.write_bytes(path.read_bytes() + struct.pack("<II", len(packed), len(body)) + packed)
    with pytest.raises(TraceError, match="damaged"):
        list(read_trace(path))


@pytest.mark.parametrize("content", [b"", b"hello\n", b"{}\n", b'{"memtier-trace": 9, "page_bytes": 4096}\n'])
def test_a_file_that_is_no_trace_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(TraceError):
        list(read_trace(tmp_path / "x"))


def age(idle_s: float) -> AgePolicy:
    return AgePolicy(AgePolicyConfig(interval_ms=1000, swap_out_ms=int(idle_s * 1000)))


def test_idle_memory_is_saved_from_when_the_policy_would_have_paged_it_out() -> None:
    """Page 1 is idle from the scan at 1 s on; after 2 s idle, at 3 s, it goes."""
    trace = [scan(0, [1, 1]), scan(1, [1, 1]), scan(2, [1, 0]), scan(3, [1, 0]), scan(4, [1, 0]), scan(5, [1, 0])]
    report = simulate(trace, age(2))
    assert [each.paged_out_bytes // PAGE_BYTES for each in report.rounds] == [0, 0, 0, 1, 1, 1]
    assert report.moved_bytes == PAGE_BYTES
    assert report.refault_bytes == 0
    assert report.saved_bytes == pytest.approx(2 / 5 * PAGE_BYTES)
    assert report.saved_share == pytest.approx(1 / 5)
    assert report.duration_s == 5


def test_a_page_that_is_touched_after_it_went_is_a_refault_and_begins_anew() -> None:
    trace = [scan(0, [1]), scan(1, [0]), scan(2, [1]), scan(3, [0]), scan(4, [0])]
    report = simulate(trace, age(1))
    assert [each.paged_out_bytes // PAGE_BYTES for each in report.rounds] == [0, 1, 0, 1, 1]
    assert [each.refault_bytes // PAGE_BYTES for each in report.rounds] == [0, 0, 1, 0, 0]
    assert report.moved_bytes == 2 * PAGE_BYTES


def test_freed_memory_is_not_saved_memory() -> None:
    trace = [scan(0, [1, 0]), scan(1, [0, 0]), scan(2, [0, 0], [0, 1]), scan(3, [0, 0], [0, 1])]
    assert [each.paged_out_bytes // PAGE_BYTES for each in simulate(trace, age(1)).rounds] == [0, 2, 1, 1]


def test_memory_of_a_process_that_exits_or_unmaps_is_not_saved_memory() -> None:
    trace = [
        *(scan(float(n), [0, 0], process=who) for n in range(2) for who in (PROCESS, OTHER)),
        scan(2.0, [0], process=PROCESS, where=spans((1, 2))),
    ]
    assert [each.paged_out_bytes // PAGE_BYTES for each in simulate(trace, age(1)).rounds] == [0, 4, 1]


def test_bandwidth_limits_what_is_moved_between_two_rounds() -> None:
    pages = 1024  # 4 MiB
    trace = [scan(float(n), [0] * pages) for n in range(7)]
    report = simulate(trace, age(1), bandwidth_mib_per_s=1)
    assert [each.paged_out_bytes >> 20 for each in report.rounds] == [0, 1, 2, 3, 4, 4, 4]


def test_a_policy_decides_no_more_often_than_it_says() -> None:
    class Counting(StubPolicy):
        decided = 0

        @property
        def interval_ms(self) -> int | None:
            return 3000

        def decide(
            self, pages: Mapping[ProcessId, ProcessPages], clock: AgeClock, budget_bytes: int | None
        ) -> list[MoveTask]:
            self.decided += 1
            return []

    policy = Counting()
    simulate([scan(float(n), [1]) for n in range(10)], policy)
    assert policy.decided == 4


def test_policies_that_ask_where_pages_are_get_the_simulated_places() -> None:
    simulation = Simulation()
    policy = RatioPolicy(RatioPolicyConfig(interval_ms=1000, ratio=0.5), simulation, regions=RegionCounters(1))
    trace = [scan(float(n), [1, 0, 1, 0]) for n in range(4)]
    report = simulation.run(trace, policy)
    assert [each.paged_out_bytes // PAGE_BYTES for each in report.rounds] == [2, 2, 2, 2]
    assert report.moved_bytes == 2 * PAGE_BYTES


def test_moves_to_other_nodes_are_told_apart_from_swap() -> None:
    simulation = Simulation()
    config = HeatPolicyConfig(
        interval_ms=1000, heatmap=HeatmapConfig(heat_retention=0.0, heat_classes=2), heat_numas={0: (2,), 1: (0,)}
    )
    policy = HeatPolicy(config, simulation, regions=RegionCounters(1))
    report = simulation.run([scan(0, [1, 0]), scan(1, [0, 1])], policy)
    assert [each.moved_away_bytes // PAGE_BYTES for each in report.rounds] == [1, 1]
    assert [each.moved_bytes // PAGE_BYTES for each in report.rounds] == [1, 2]
    assert report.saved_bytes == 0


def test_the_report_says_it_in_one_line() -> None:
    mib = [0] * 256
    report = simulate([scan(0, mib), scan(1, mib), scan(2, mib)], age(1))
    assert report.text() == "age: saved 0.5 MiB (50.0 %) on average, refaults 0.0 MiB, moved 1.0 MiB in 2 s"
    assert simulate([], age(1)).text().startswith("age: saved 0.0 MiB (0.0 %)")


def test_what_a_policy_asks_for_twice_or_that_is_absent_moves_once_or_not() -> None:
    class Everything(BasePolicy):
        name = "everything"

        def decide(
            self, pages: Mapping[ProcessId, ProcessPages], clock: AgeClock, budget_bytes: int | None
        ) -> list[MoveTask]:
            return [MoveTask(process, own.spans) for process, own in pages.items()]

    report = simulate([scan(0, [0, 0], [1, 0]), scan(1, [0, 0], [1, 0])], Everything())
    assert report.moved_bytes == PAGE_BYTES
