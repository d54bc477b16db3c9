"""Statistics: what is counted, the reference's tables to the byte, raw events, and bounds on memory."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from memtier_engine.clock import FakeClock
from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveOutcome, PageChunk, ProcessId
from memtier_engine.pages.regions import RegionCounters
from memtier_engine.stats import raw_events, recorder
from memtier_engine.stats.observer import event_prefix
from memtier_engine.stats.raw_events import RawEvents
from memtier_engine.stats.recorder import OTHER_EVENTS, Statistics, move_text
from memtier_engine.stats.tables import tables_text
from support.fakes import BASE, PROCESS, chunk, spans

PAGES_PER_GIB = (1 << 30) // PAGE_BYTES


def outcome(
    pid: int = 100, node: int = SWAP_NODE, asked: int = 4, moved: int = 4, errors: dict[int, int] | None = None
) -> MoveOutcome:
    return MoveOutcome(
        ProcessId(pid, 1),
        spans((0, asked)),
        node,
        asked * PAGE_BYTES,
        moved * PAGE_BYTES,
        0.01,
        page_errors=errors or {},
    )


def scan(statistics: Statistics, pid: int, seconds: float, *chunks: PageChunk) -> None:
    process = ProcessId(pid, 1)
    statistics.scan_began(process, spans((0, 10)), 0.0)
    for each in chunks:
        statistics.chunk(process, each)
    statistics.scan_ended(process, seconds)


def table(statistics: Statistics, name: str, form: str = "txt") -> list[str]:
    return tables_text(statistics, [name], form).split("\n")


def test_events_have_a_count_a_mean_interval_and_an_age() -> None:
    clock = FakeClock()
    statistics = Statistics(clock)
    for _ in range(3):
        statistics.event("mover.AddTask")
        clock.advance(2.0)
    statistics.event("PolicyAge.loop")
    clock.advance(0.5)
    assert table(statistics, "events") == [
        "table: events",
        "   count timeint[s] latest[s ago] name",
        "       1      0.000         0.500 PolicyAge.loop",
        "       3      2.000         2.500 mover.AddTask",
        "",
    ]
    assert table(statistics, "events", "csv") == [
        "table: events",
        "count,timeint[s],latest[s ago],name",
        "1,0.000000,0.500000,PolicyAge.loop",
        "3,2.000000,2.500000,mover.AddTask",
        "",
    ]


def test_paging_out_is_counted_as_asked_and_as_done() -> None:
    statistics = Statistics()
    statistics.moved(outcome(200, asked=PAGES_PER_GIB, moved=PAGES_PER_GIB // 2))
    statistics.moved(outcome(200, asked=PAGES_PER_GIB, moved=0))
    statistics.moved(outcome(100, asked=8, moved=8))
    assert table(statistics, "process_madvise") == [
        "table: process_madvise syscalls",
        "     pid    calls req[pages]  ok[pages]    ok[G] PAGEOUT[G]",
        "     100        1          8          8    0.000 0.000",
        "     200        2     524288     131072    0.500 2.000",
        "",
    ]
    assert table(statistics, "process_madvise", "csv")[1:] == [
        "pid,calls,req[pages],ok[pages],ok[G],PAGEOUT[G]",
        "100,1,8,8,0.000031,0.000031",
        "200,2,524288,131072,0.500000,2.000000",
        "",
    ]
    assert statistics.paged_out_pages_total == 2 * PAGES_PER_GIB + 8


def test_moves_are_counted_by_node_and_errors_by_errno() -> None:
    statistics = Statistics()
    statistics.moved(outcome(100, 3, PAGES_PER_GIB, PAGES_PER_GIB // 2, {12: 5, 2: 7}))
    statistics.moved(outcome(100, 1, PAGES_PER_GIB // 4, PAGES_PER_GIB // 4))
    assert table(statistics, "move_pages")[1:] == [
        "     pid    calls req[pages]  ok[pages] moved[G] targetnode:moved[G]",
        "     100        2     327680     196608    0.750 1:0.250;3:0.500",
        "",
    ]
    assert table(statistics, "move_pages", "csv")[1:] == [
        "pid,calls,req[pages],ok[pages],moved[G],targetnode:moved[G]",
        "100,2,327680,196608,0.750000,1:0.250;3:0.500",
        "",
    ]
    assert table(statistics, "move_pages_errors") == [
        "table: move_pages syscall errors in page statuses",
        "     pid    pages  size[G]    errno error",
        "     100        7    0.000        2 no such file or directory",
        "     100        5    0.000       12 cannot allocate memory",
        "",
    ]
    assert table(statistics, "move_pages_errors", "csv")[2] == "100,7,0.000027,2,no such file or directory"


@pytest.mark.parametrize(
    ("node", "error", "name"),
    [
        (
            SWAP_NODE,
            "process_madvise(pidfd=8, spans=2): Operation not permitted [EPERM]: this process lacks CAP_X (be root)",
            "process_madvise(...) error: operation not permitted",
        ),
        (1, "move_pages(pid=1, pages=21, node=1): No such device [ENODEV]", "move_pages(...) error: no such device"),
        (1, "node 1: it has no room", "move_pages(...) error: it has no room"),
    ],
)
def test_a_call_that_fails_is_an_event_with_the_kernels_reason(node: int, error: str, name: str) -> None:
    statistics = Statistics()
    statistics.moved(replace(outcome(node=node, moved=0), error=error))
    assert set(statistics.events) == {name}


def test_scans_count_movable_resident_pages_and_the_share_that_was_touched() -> None:
    statistics = Statistics()
    scan(statistics, 100, 0.2, chunk(0, [1, 1, 0, 0], [1, 1, 1, 0], movable=[1, 0, 1, 1]), chunk(4, [0, 0]))
    written = replace(chunk(0, [0, 1, 0, 0]), written=np.array([1, 1, 0, 0], np.bool_))
    scan(statistics, 100, 0.1, written)
    assert table(statistics, "memory_scans") == [
        "table: memory scans",
        "     pid    scans   tot[pages] avg[s]   last max[s]   avg[G]  last[G] a+w[%]  last",
        "",
        "     100        2            8  0.150  0.100  0.200    0.000    0.000 37.50 50.00",
        "",
    ]
    assert table(statistics, "memory_scans", "csv")[1:] == [
        "pid,scans,tot[pages],avg[s],last,max[s],avg[G],last[G],a+w[%],last",
        "",
        "100,2,8,0.150000,0.100000,0.200000,0.000015,0.000015,37.500000 50.000000",
        "",
    ]


def test_a_share_of_nothing_is_NaN_as_go_prints_it() -> None:  # noqa: N802
    statistics = Statistics()
    scan(statistics, 100, 0.0)
    assert table(statistics, "memory_scans")[3].endswith("   NaN   NaN")
    assert table(statistics, "memory_scans", "csv")[3].endswith("NaN NaN")


def test_swap_ins_are_a_table_of_their_own_that_is_shown_when_asked_for() -> None:
    """The reference has no such table: what it prints by default stays as it is."""
    statistics = Statistics()
    other = ProcessId(9, 1)
    statistics.swapped_in(ProcessId(7, 1), 100, 80, 0.25)
    statistics.swapped_in(ProcessId(7, 1), 20, 20, 0.15)
    statistics.swapped_in(other, 3, 0, 0.0)
    assert "swap-ins" not in tables_text(statistics)
    assert tables_text(statistics, ["swap_ins"]) == (
        "table: swap-ins\n"
        "     pid   swapins     waits   tot[s]  avg[ms]\n"
        "       7       120       100    0.400    4.000\n"
        "       9         3         0    0.000      NaN\n"
    )
    assert "\n7,120,100,0.400000,4.000000\n" in tables_text(statistics, ["swap_ins"], "csv")


def test_tables_are_separated_by_an_empty_line_and_all_shown_by_default() -> None:
    text = tables_text(Statistics()).rstrip("\n")
    assert [part.split("\n")[0] for part in text.split("\n\n")] == [
        "table: events",
        "table: process_madvise syscalls",
        "table: move_pages syscalls",
        "table: move_pages syscall errors in page statuses",
        "table: memory scans",
    ]


def test_unknown_tables_and_formats_are_told_in_the_reference_s_words() -> None:
    """A table that is none costs the others nothing."""
    unknown = (
        'unknown table "help", available: "events", "process_madvise", "move_pages", "move_pages_errors", '
        '"memory_scans"\n'
    )
    assert tables_text(Statistics(), ["help"]) == unknown
    events = tables_text(Statistics(), ["events"])
    assert tables_text(Statistics(), ["help", "events"]) == f"{unknown}\n{events}"
    with pytest.raises(ConfigError) as caught:
        tables_text(Statistics(), form="xml")
    assert str(caught.value) == 'unknown format "xml", txt and csv expected'


def test_a_percent_sign_in_an_event_name_is_kept() -> None:
    statistics = Statistics()
    statistics.event("100%d done\nnext line")
    assert table(statistics, "events")[2].endswith(" 100%d done next line")


def test_processes_that_come_and_go_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one heard of longest ago is dropped; totals stay."""
    monkeypatch.setattr(recorder, "PIDS_MAX", 10)
    statistics = Statistics()
    for pid in range(1, 101):
        scan(statistics, pid, 0.1, chunk(0, [1]))
        statistics.moved(outcome(pid))
        statistics.moved(outcome(pid, node=1))
        statistics.moved(outcome(1))  # heard of all the time
    assert len(statistics.scans) == len(statistics.moves) == 10
    assert sorted(statistics.scans) == list(range(91, 101))
    assert sorted(statistics.advice) == [1, *range(92, 101)]
    assert statistics.advice[1].calls == 101
    assert statistics.paged_out_pages_total == 200 * 4


def test_event_names_without_end_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "EVENTS_MAX", 10)
    statistics = Statistics()
    for number in range(100):
        statistics.event(f"error {number} " + "x" * 1000)
    assert len(statistics.events) == 11
    assert statistics.events[OTHER_EVENTS].count == 90
    assert max(map(len, statistics.events)) <= recorder.EVENT_NAME_MAX


def test_moves_can_be_recorded_and_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "MOVES_RECORDED_MAX", 3)
    statistics = Statistics()
    assert statistics.recorded_moves() is None
    statistics.record_moves(True)
    for pid in range(5):
        statistics.moved(outcome(pid, node=1))
    found = statistics.recorded_moves()
    assert found is not None
    assert [each.process.pid for each in found] == [2, 3, 4]
    assert statistics.recorded_moves() == []
    statistics.record_moves(False)
    assert statistics.recorded_moves() is None


def test_the_latest_move_and_the_latest_with_errors_are_kept() -> None:
    statistics = Statistics()
    statistics.moved(outcome(100, 1, 8, 5, {14: 2, 2: 1}))
    statistics.moved(outcome(100, 1, 4, 4))
    own = statistics.moves[100]
    assert own.last_with_errors is not None
    assert move_text(own.last_with_errors) == (
        f"move_pages(pid=100, pagecount=8, firstpage={BASE:x} dest=1)"
        " => (return=0 on_dest=5 on_other=0 [errno:pagecount]=map[2:1 14:2])"
    )
    assert own.last is not None
    assert own.last.page_errors == {}


def test_several_threads_may_report_at_once() -> None:
    statistics = Statistics()

    def work(pid: int) -> None:
        for _ in range(200):
            scan(statistics, pid, 0.1, chunk(0, [1, 0]))
            statistics.event("x")

    threads = [threading.Thread(target=work, args=(pid,)) for pid in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statistics.events["x"].count == 600
    assert [own.touched_pages for own in statistics.scans.values()] == [200] * 3


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("Policy", "avoid-oom", "PolicyAvoidOom"),
        ("Policy", "age", "PolicyAge"),
        ("Tracker", "idlepage", "TrackerIdlePage"),
        ("Tracker", "softdirty", "TrackerSoftDirty"),
        ("Tracker", "damon", "TrackerDamon"),
    ],
)
def test_events_are_named_as_in_the_reference(kind: str, name: str, expected: str) -> None:
    assert event_prefix(kind, name) == expected


class TestRawEvents:
    """One row per region and scan."""

    def record(self, events: RawEvents, *touched: int) -> None:
        events.scan_began(PROCESS, spans((0, len(touched))), 0.0)
        events.chunk(PROCESS, chunk(0, list(touched)))
        events.scan_ended(PROCESS, 0.1)

    def test_rows_are_those_of_the_reference(self) -> None:
        events = RawEvents(RegionCounters(4), now_ns=lambda: 1795478560654671674)
        assert events.fetch() is None
        self.record(events, 1, 1, 1, 1)
        events.start()
        self.record(events, 1, 1, 0, 0, 0, 1)
        self.record(events, 0, 0, 0, 0, 0, 1)
        end = BASE + 4 * PAGE_BYTES
        assert events.fetch() == (
            "          timestamp       pid             addr    pages     accs   writes\n"
            f" 1795478560654671674     4242     {BASE:x}        4        2        0\n"
            f" 1795478560654671674     4242     {end:x}        2        1        0\n"
            f" 1795478560654671674     4242     {BASE:x}        4        0        0\n"
            f" 1795478560654671674     4242     {end:x}        2        1        0\n"
        )
        assert events.fetch() == raw_events.HEADER + "\n"

    def test_a_recording_that_nobody_fetches_keeps_the_newest_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(raw_events, "ROWS_MAX", 10)
        ticks = iter(range(100))
        events = RawEvents(RegionCounters(1), now_ns=lambda: next(ticks))
        events.start()
        for _ in range(20):
            self.record(events, 1, 0, 1)
        text = events.fetch()
        assert text is not None
        rows = text.splitlines()[1:]
        assert len(rows) == 9
        assert [int(row.split()[0]) for row in rows[::3]] == [17, 18, 19]

    def test_stopping_drops_what_was_not_fetched(self) -> None:
        events = RawEvents()
        events.start()
        self.record(events, 1)
        events.stop()
        assert events.fetch() is None
        events.start()
        assert events.fetch() == raw_events.HEADER + "\n"

    def test_a_scan_during_which_recording_started_is_not_recorded(self) -> None:
        events = RawEvents()
        events.scan_began(PROCESS, spans((0, 1)), 0.0)
        events.start()
        events.chunk(PROCESS, chunk(0, [1]))
        events.scan_ended(PROCESS, 0.1)
        assert events.fetch() == raw_events.HEADER + "\n"
