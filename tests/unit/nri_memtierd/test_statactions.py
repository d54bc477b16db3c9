"""The routine that writes the table "time since last access"."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from memtier_cli.accessed import AccessedDump, accessed_table, parse_times
from memtier_cli.nri_memtierd.launch.routines import EngineRoutines, check_routines
from memtier_engine.config.files import parse
from memtier_engine.config.routines import RoutineSpec
from memtier_engine.engine.loop import Engine, EngineConfig
from memtier_engine.errors import ConfigError
from memtier_engine.model import ProcessId
from memtier_engine.pages.ages import PAGED_OUT, AgeClock
from memtier_engine.policies.age import AgePolicyConfig
from memtier_engine.routines.statactions import StatActionsConfig

GIB_PAGES = 1 << 18


class Pages:
    def __init__(self, **by_age: int) -> None:
        self._histogram = np.zeros(256, np.int64)
        for age, pages in by_age.items():
            self._histogram[int(age[1:])] = pages

    def histogram(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return self._histogram


def engine(**processes: Pages) -> Engine:
    """Scanned 100 times, 10 s apart; processes p1, p2, ..."""
    clock = AgeClock()
    for scan in range(100):
        clock.begin_scan(10.0 * scan)
    pages = {ProcessId(int(name[1:]), 1): each for name, each in processes.items()}
    return cast(Engine, SimpleNamespace(pages=pages, age_clock=clock))


def test_the_table_has_the_references_columns() -> None:
    table = accessed_table(engine(p15915=Pages(a0=GIB_PAGES, a3=GIB_PAGES)), (0, 20, 60, 0))
    assert table == (
        "table: time since last access\n"
        "     pid lastaccs>=[s] lastaccs<[s]    pages   mem[G] pidmem[%]\n"
        "   15915         0.000       20.000   262144    1.000     50.00\n"
        "   15915        20.000       60.000   262144    1.000     50.00\n"
        "   15915        60.000        0.000        0    0.000      0.00\n"
    )


def test_several_processes_are_also_summed_up_and_can_be_chosen() -> None:
    both = engine(p7=Pages(a0=1), p12=Pages(a0=2))
    rows = [line.split() for line in accessed_table(both, (0, 0)).splitlines()[2:]]
    assert [(row[0], row[3]) for row in rows] == [("all", "3"), ("7", "1"), ("12", "2")]
    rows = [line.split() for line in accessed_table(both, (0, 0), [12]).splitlines()[2:]]
    assert [(row[0], row[3]) for row in rows] == [("12", "2")]


def test_what_we_paged_out_has_no_upper_bound() -> None:
    table = accessed_table(engine(p1=Pages(**{f"a{PAGED_OUT}": 3})), (0, 60, 0))
    assert [line.split()[3] for line in table.splitlines()[2:]] == ["0", "3"]


def test_a_process_without_pages_has_no_percentage() -> None:
    assert accessed_table(engine(p1=Pages()), (0, 0)).splitlines()[2].split()[-1] == "NaN"


def test_times_have_units_and_seconds_are_the_default() -> None:
    assert parse_times("0,1m,30m, 2h,1.5, 500ms") == (0, 60, 1800, 7200, 1.5, 0.5)


@pytest.mark.parametrize("text", ["", "1", "1,x", "0,5d", "0,nan", "0,inf"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_times(text)


def dump_routine(times: str) -> RoutineSpec:
    command = ("policy", "-dump", "accessed", times)
    config = StatActionsConfig(interval_ms=60_000, interval_command=command, interval_command_runner="memtier")
    return RoutineSpec("statactions", config)


def test_a_command_runs_after_each_interval_and_missed_ones_are_left_out() -> None:
    written: list[str] = []
    spec = dump_routine("0,0")
    routine = EngineRoutines([spec], written.append, now_s=0.0)
    ran = []
    for now_s in (0, 59, 60, 100, 121, 500, 520, 560):
        before = len(written)
        routine.run_due(engine(p1=Pages()), now_s)
        if len(written) > before:
            ran.append(now_s)
    assert ran == [60, 121, 500, 560]


def test_routines_go_at_once_when_nobody_has_them() -> None:
    """Not when the garbage collector comes: they keep the engine's files."""
    gc.disable()
    try:
        routine = EngineRoutines([dump_routine("0,0")], lambda text: None, now_s=0.0)
        gone = weakref.ref(routine)
        routine.run_due(engine(p1=Pages()), 60)
        del routine
        assert gone() is None
    finally:
        gc.enable()


def test_timestamps_are_written_around_each_table() -> None:
    config = StatActionsConfig(
        interval_ms=60_000,
        interval_command=("policy", "-dump", "accessed", "0,0"),
        interval_command_runner="memtier",
        timestamp="after duration.s s\n",
        timestamp_after="done\n",
    )
    written: list[str] = []
    routine = EngineRoutines([RoutineSpec("stub"), RoutineSpec("statactions", config)], written.append, now_s=0.0)
    routine.run_due(engine(p1=Pages()), 60)
    assert written == ["after 60 s\n", accessed_table(engine(p1=Pages()), (0, 0)), "done\n"]


def test_without_times_the_limits_are_those_of_the_policy_and_are_said() -> None:
    """As `policy -dump accessed` does at the prompt."""
    made = engine(p1=Pages(a0=1), p2=Pages(a0=1))
    made.config = cast(EngineConfig, SimpleNamespace(policy=AgePolicyConfig(idle_duration_ms=30_000)))
    config = StatActionsConfig(
        interval_ms=1, interval_command=("policy", "-dump", "accessed"), interval_command_runner="memtier"
    )
    written: list[str] = []
    EngineRoutines([RoutineSpec("statactions", config)], written.append, now_s=0.0).run_due(made, 1)
    assert written == [
        "using limits from configuration: active 0 ms, idle 30000 ms, swapout 0 ms\n"
        + accessed_table(made, (0, 0, 30, 0, 0))
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0"], 'too few TIMESPECs in "0", expected two or more'),
        (["0,5d"], "invalid TIMESPEC \"0,5d\": '5d' is no duration"),
        (["0,1", "1,x"], 'invalid pid: "x"'),
        (["0,1", "9" * 5000], f'invalid pid: "{"9" * 5000}"'),
    ],
)
def test_what_a_dump_cannot_show_is_told_in_the_references_words(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AccessedDump.of(words)
    assert caught.value.message == message


CONFIG = """
policy: {name: age, config: {pidwatcher: {name: pidlist, config: {pids: [1]}}, tracker: {name: auto}}}
routines:
- name: statactions
  config: |
    intervalms: 60000
    intervalcommand: ["policy", "-dump", "accessed", "0,1m,30m,2h,24h,0"]
    intervalcommandrunner: memtier
"""


def test_the_reference_samples_routine_is_read() -> None:
    routines = parse(CONFIG).routines
    assert routines == (dump_routine("0,1m,30m,2h,24h,0"),)
    check_routines(routines)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("intervalms: 60000", "intervalms: 0", "intervalms"),
        ("    intervalms: 60000\n", "", "intervalms: is missing"),
        ("intervalcommandrunner: memtier", "intervalcommandrunner: exec", "runs the program 'policy'"),
        ("    intervalcommandrunner: memtier\n", "", "-allow-programs"),
        ('["policy", "-dump", "accessed", "0,1m,30m,2h,24h,0"]', "[rm, -rf]", "'rm -rf' is not supported"),
        ("name: statactions", "name: exec", "statactions"),
        ("    intervalms: 60000\n", "    interval: 5\n", "routines[0].config.interval"),
    ],
)
def test_a_routine_that_cannot_run_is_refused_before_anything_starts(old: str, new: str, words: str) -> None:
    assert old in CONFIG
    with pytest.raises(ConfigError) as caught:
        check_routines(parse(CONFIG.replace(old, new)).routines)
    assert words in str(caught.value)
