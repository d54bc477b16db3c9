"""Routine statactions: ticks, triggers, runners and timestamps."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveOutcome, ProcessId
from memtier_engine.routines.base import RoutineThread
from memtier_engine.routines.gotime import NAMED_LAYOUTS, Moment, format_time, stamp
from memtier_engine.routines.statactions import StatActions, StatActionsConfig
from memtier_engine.routines.stub import StubRoutine
from memtier_engine.stats.recorder import Statistics
from support.fakes import spans
from support.waiting import WAIT_S, until

UNIX_NS = 1_795_478_686_865_123_456  # 2026-11-24 00:04:46.865123456 UTC
ZULU = Moment(UNIX_NS, datetime.fromtimestamp(UNIX_NS // 10**9, UTC))
EAST = Moment(UNIX_NS, datetime.fromtimestamp(UNIX_NS // 10**9, timezone(timedelta(hours=5, minutes=30), "IST")))


class Prompt:
    """Remembers what it was asked to run."""

    def __init__(self, status: int = 0) -> None:
        self.ran: list[object] = []
        self.status = status

    def words(self, words: Sequence[str]) -> int:
        self.ran.append(list(words))
        return self.status

    def line(self, line: str) -> int:
        self.ran.append(line)
        if line == "defect":
            raise RuntimeError("defect")
        return self.status


def routine(statistics: Statistics, prompt: Prompt, written: list[str] | None = None, **keys: object) -> StatActions:
    return StatActions(
        StatActionsConfig(**keys),  # type: ignore[arg-type]
        statistics,
        now_s=0.0,
        run_words=prompt.words,
        run_line=prompt.line,
        unix_ns=lambda: UNIX_NS,
        write=(written if written is not None else []).append,
    )


def page_out(statistics: Statistics, mib: int) -> None:
    asked = mib << 20
    statistics.moved(MoveOutcome(ProcessId(1, 1), spans((0, asked // PAGE_BYTES)), SWAP_NODE, asked, 0, 0.1))


def test_the_first_tick_is_after_one_interval_and_missed_ticks_are_not_made_up_for() -> None:
    prompt, statistics = Prompt(), Statistics()
    found = routine(
        statistics, prompt, interval_ms=1000, interval_command=("stats", "-t"), interval_command_runner="memtier"
    )
    assert found.advance(0.0) == 1.0
    assert prompt.ran == []
    assert found.advance(1.0) == 2.0
    assert prompt.ran == [["stats", "-t"]]
    assert found.advance(5.5) == 6.0
    assert len(prompt.ran) == 2
    assert statistics.events["RoutineStatActions.tick"].count == 2
    assert statistics.events["RoutineStatActions.IntervalCommand"].count == 2
    assert statistics.events["RoutineStatActions.command.memtier: stats... status: 0"].count == 2


def test_a_line_of_the_prompt_is_run_as_it_is() -> None:
    prompt, statistics = Prompt(status=1), Statistics()
    found = routine(
        statistics,
        prompt,
        interval_ms=10,
        interval_command=("stats | wc",),
        interval_command_runner="memtier-prompt",
    )
    found.advance(0.01)
    assert prompt.ran == ["stats | wc"]
    assert statistics.events['RoutineStatActions.command.memtier-prompt: "stats | wc" status: 1'].count == 1


def test_the_pageout_command_runs_once_per_step_whoever_paged_out_and_with_what_success() -> None:
    prompt, statistics = Prompt(), Statistics()
    page_out(statistics, 500)  # before the start: does not count
    found = routine(
        statistics,
        prompt,
        interval_ms=1000,
        pageout_command=("p",),
        pageout_command_runner="memtier",
        pageout_mib=10,
    )
    for now_s, more_mib, runs in ((1, 9, 0), (2, 1, 1), (3, 0, 1), (4, 35, 2), (5, 9, 2), (6, 1, 3)):
        page_out(statistics, more_mib)
        found.advance(float(now_s))
        assert len(prompt.ran) == runs, now_s
    assert statistics.events["RoutineStatActions.PageOutCommand"].count == 3


def test_without_a_step_the_pageout_command_runs_at_every_tick() -> None:
    prompt = Prompt()
    found = routine(Statistics(), prompt, interval_ms=1000, pageout_command=("p",), pageout_command_runner="memtier")
    found.advance(1.0)
    found.advance(2.0)
    assert len(prompt.ran) == 2


def test_timestamps_stand_before_and_after_each_command() -> None:
    prompt, written = Prompt(), []  # type: ignore[var-annotated]
    found = routine(
        Statistics(),
        prompt,
        written,
        interval_ms=1500,
        interval_command=("x",),
        interval_command_runner="memtier",
        timestamp="A unix.milli duration.s\n",
        timestamp_after="B duration.milli\n",
    )
    found.advance(1.5)
    assert written == ["A 1795478686.865 2\n", "B 1.500\n"]


def test_a_command_that_fails_does_not_end_the_routine() -> None:
    prompt = Prompt()
    found = routine(
        Statistics(), prompt, interval_ms=1000, interval_command=("defect",), interval_command_runner="memtier-prompt"
    )
    assert found.advance(1.0) == 2.0
    assert found.advance(2.0) == 3.0
    assert len(prompt.ran) == 2


def test_programs_run_only_where_that_was_allowed() -> None:
    config = StatActionsConfig(interval_ms=1000, interval_command=("date",))
    with pytest.raises(ConfigError, match=r"switched off .allow it: -allow-programs"):
        StatActions(config, Statistics(), now_s=0.0, switch="-allow-programs")


def test_a_program_gets_its_words_and_no_shell(tmp_path: Path) -> None:
    file = tmp_path / "out; rm -rf x"
    code = "import sys; open(sys.argv[1], 'a').write(' '.join(sys.argv[2:]))"
    config = StatActionsConfig(
        interval_ms=10, interval_command=(sys.executable, "-S", "-c", code, str(file), "$HOME", "*")
    )
    statistics = Statistics()
    StatActions(config, statistics, now_s=0.0, allow_programs=True).advance(1.0)
    assert file.read_text() == "$HOME *"
    name = f"RoutineStatActions.command.exec: {sys.executable}... status: exit status 0 error: <nil>"
    assert name in statistics.events


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("false",), "exit status 1 error: exit status 1"),
        (("sh", "-c", "kill -9 $$"), "signal: killed error: signal: killed"),
        (("/nonexistent/x",), "<nil> error: no such file or directory"),
        (("/etc/passwd",), "<nil> error: permission denied"),
    ],
)
def test_a_program_that_fails_is_counted_with_its_status(command: tuple[str, ...], status: str) -> None:
    statistics = Statistics()
    config = StatActionsConfig(interval_ms=10, interval_command=command)
    StatActions(config, statistics, now_s=0.0, allow_programs=True).advance(1.0)
    assert f"RoutineStatActions.command.exec: {command[0]}... status: {status}" in statistics.events


def test_stopping_ends_the_program_that_runs() -> None:
    config = StatActionsConfig(interval_ms=1, interval_command=("sleep", "1000"))
    running = StatActions(config, Statistics(), now_s=time.monotonic(), allow_programs=True)
    thread = RoutineThread(running)
    thread.start()
    assert thread.dump() == 'routine "statactions": running=true'
    until(lambda: running._child is not None)
    child = running._child
    assert child is not None
    assert thread.stop(WAIT_S)
    assert child.returncode == -signal.SIGKILL
    assert thread.dump() == 'routine "statactions": running=false'


def test_a_thread_drives_a_routine_and_survives_a_second_start() -> None:
    seen = threading.Semaphore(0)

    class Ticking(StubRoutine):
        def advance(self, now_s: float) -> float:
            seen.release()
            return now_s + 0.005

    thread = RoutineThread(Ticking())
    thread.start()
    thread.start()
    for _ in range(3):
        assert seen.acquire(timeout=WAIT_S)
    assert thread.stop()
    assert StubRoutine().advance(5.0) > 5.0


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("intervalms", {"interval_ms": 0, "interval_command": ("x",)}),
        ("pageoutmb", {"interval_ms": 1, "interval_command": ("x",), "pageout_mib": -1}),
        ("intervalcommand", {"interval_ms": 1}),
        ("intervalcommandrunner", {"interval_ms": 1, "interval_command": ("x",), "interval_command_runner": "sh"}),
        (
            "pageoutcommandrunner",
            {"interval_ms": 1, "pageout_command": ("a", "b"), "pageout_command_runner": "memtier-prompt"},
        ),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(key: str, values: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        StatActionsConfig(**values)  # type: ignore[arg-type]
    assert caught.value.key_path == key


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("2006-01-02T15:04:05Z07:00", "2026-11-24T00:04:46Z"),
        (NAMED_LAYOUTS["ansic"], "Tue Nov 24 00:04:46 2026"),
        (NAMED_LAYOUTS["unixdate"], "Tue Nov 24 00:04:46 UTC 2026"),
        (NAMED_LAYOUTS["rfc850"], "Tuesday, 24-Nov-26 00:04:46 UTC"),
        (NAMED_LAYOUTS["rfc822z"], "24 Nov 26 00:04 +0000"),
        (NAMED_LAYOUTS["rfc1123"], "Tue, 24 Nov 2026 00:04:46 UTC"),
        ("3:04PM 03pm", "12:04AM 12am"),
        ("Jan 2 _2 002 __2", "Nov 24 24 328 328"),
        ("January Monday 1 4 5 06", "November Tuesday 11 4 46 26"),
        (".000 .999999 ,000000000 .9", ".865 .865123 ,865123456 .8"),
        ("Month Janet Monkey", "Month Janet Monkey"),
        ("_2006", "_2026"),
        ("-07 -0700 -07:00 -070000 -07:00:00", "+00 +0000 +00:00 +000000 +00:00:00"),
        ("Z07 Z0700 Z070000 Z07:00:00", "Z Z Z Z"),
    ],
)
def test_layouts_are_replaced_as_in_go(layout: str, expected: str) -> None:
    assert format_time(layout, ZULU) == expected


def test_other_time_zones_and_afternoons() -> None:
    assert format_time("15:04 3PM MST -0700 Z07:00", EAST) == "05:34 5AM IST +0530 +05:30"
    noon = Moment(0, datetime(2026, 1, 5, 13, 0, 0, tzinfo=UTC))
    assert format_time("3PM _2 02 .999 002", noon) == "1PM  5 05  005"


def test_a_timestamp_takes_names_layouts_and_numbers() -> None:
    assert stamp("B unix.milli duration.s rfc3339\n", ZULU, 0) == "B 1795478686.865 0 2026-11-24T00:04:46Z\n"
    assert stamp("unix unix.s unix.micro unix.nano", ZULU, 0) == (
        "1795478687 1795478687 1795478686.865123 1795478686.865123456"
    )
    assert stamp("duration.nano duration.micro duration", ZULU, 1_500_000_000) == "1.500000000 1.500000 2"
    assert stamp("rfc3339nano rfc822", ZULU, 0) == "2026-11-24T00:04:46.865123456Z 24 Nov 26 00:04 UTC"
    for word in ("unixdate", "rfc", "nano", "duration"):
        assert word not in stamp(" ".join([*NAMED_LAYOUTS, "unix.nano", "duration.nano"]), ZULU, 7)
