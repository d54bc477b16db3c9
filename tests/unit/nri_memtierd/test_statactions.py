"""The routine that writes the table "time since last access"."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from memtier_cli.accessed import StatActions, accessed_table, check_routines, parse_times
from memtier_engine.config.files import parse
from memtier_engine.config.routines import RoutineSpec
from memtier_engine.engine.loop import Engine
from memtier_engine.errors import ConfigError
from memtier_engine.model import ProcessId
from memtier_engine.pages.ages import PAGED_OUT, AgeClock
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
    routine = StatActions([spec], written.append, now_s=0.0)
    ran = []
    for now_s in (0, 59, 60, 100, 121, 500, 520, 560):
        before = len(written)
        routine.run_due(engine(p1=Pages()), now_s)
        if len(written) > before:
            ran.append(now_s)
    assert ran == [60, 121, 500, 560]


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
