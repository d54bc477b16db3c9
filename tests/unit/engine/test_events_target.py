"""EventsTarget with events that the test makes up: what it asks the source, and what it makes of the answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest

from memtier_engine.config.files import parse_target
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.proc_events import ProcEvents, ProcEventSocket
from memtier_engine.model import ProcessId
from memtier_engine.targets.base import innermost
from memtier_engine.targets.events import EventsTarget
from memtier_engine.targets.pids import PidsTarget
from support.waiting import until

ONE, TWO, THREE = ProcessId(1001, 1), ProcessId(1002, 1), ProcessId(1003, 1)


class Events:
    """Hands out what `happen` is given."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._lock = threading.Lock()
        self._seen = ProcEvents(frozenset(), frozenset(), lost=False)

    def happen(self, *, started: tuple[int, ...] = (), exited: tuple[int, ...] = (), lost: bool = False) -> None:
        with self._lock:
            self._seen = ProcEvents(frozenset(started), frozenset(exited), lost=lost)
            self._ready.set()

    def wait(self, timeout_s: float) -> bool:
        return self._ready.wait(timeout_s)

    def read(self) -> ProcEvents:
        with self._lock:
            self._ready.clear()
            return self._seen

    def close(self) -> None:
        pass


class Source:
    """A target that counts how it is asked."""

    def __init__(self, *processes: ProcessId) -> None:
        self.processes = set(processes)
        self.polls = 0
        self.asked: list[set[int]] = []

    def poll(self) -> frozenset[ProcessId]:
        self.polls += 1
        return frozenset(self.processes)


class Selective(Source):
    def those_of(self, pids: Collection[int]) -> frozenset[ProcessId]:
        self.asked.append(set(pids))
        return frozenset(process for process in self.processes if process.pid in pids)


@contextmanager
def following(source: Source) -> Iterator[tuple[EventsTarget, Events]]:
    events = Events()
    target = EventsTarget(source, refresh_s=3600, open_events=lambda: cast(ProcEventSocket, events))
    try:
        # By its own thread, which is the only one that is to ask.
        until(lambda: target._asked_s is not None)
        assert target.poll() == source.processes
        yield target, events
    finally:
        target.close()


def test_only_the_processes_that_started_are_asked_for() -> None:
    source = Selective(ONE)
    with following(source) as (target, events):
        source.processes |= {TWO}
        events.happen(started=(TWO.pid, 4444))
        until(lambda: target.poll() == {ONE, TWO})
        assert source.asked == [{TWO.pid, 4444}]
        assert source.polls == 1


def test_an_exit_is_believed_without_asking_and_a_pid_that_was_taken_anew_is_another_process() -> None:
    source = Selective(ONE, TWO)
    with following(source) as (target, events):
        source.processes = {ONE}
        events.happen(exited=(TWO.pid,))
        until(lambda: target.poll() == {ONE})
        later = ProcessId(ONE.pid, 99)
        source.processes = {later}
        events.happen(started=(ONE.pid,))
        until(lambda: target.poll() == {later})
        assert source.polls == 1


def test_after_lost_events_and_with_a_source_that_looks_at_all_it_is_asked_anew() -> None:
    source = Selective(ONE)
    with following(source) as (target, events):
        source.processes = {TWO}
        events.happen(lost=True)
        until(lambda: target.poll() == {TWO})
        assert source.polls == 2
    plain = Source(ONE)
    with following(plain) as (target, events):
        plain.processes |= {THREE}
        events.happen(started=(THREE.pid,))
        until(lambda: target.poll() == {ONE, THREE})
        assert plain.polls == 2


def test_listeners_are_told_of_changes_only() -> None:
    source, told = Selective(ONE), []
    with following(source) as (target, events):
        target.listen(lambda: told.append(target.poll()))
        events.happen(started=(4444,))
        until(lambda: len(source.asked) == 1)
        source.processes |= {TWO}
        events.happen(started=(TWO.pid,))
        until(lambda: told == [{ONE, TWO}])


@pytest.mark.parametrize(
    ("watcher", "seconds"),
    [
        ('{"name": "cgroups", "config": "intervalms: 700\\ncgroups: [/sys/fs/cgroup/none]"}', 0.7),
        ('{"name": "proc", "config": "intervalms: 900"}', 0.9),
        (
            '{"name": "filter", "config": "source: {name: proc, config: \'intervalms: 800\'}\\n'
            'filters: [{minvmsizekb: 1}]"}',
            0.8,
        ),
    ],
)
def test_a_watcher_by_events_still_looks_at_its_interval(watcher: str, seconds: float, tmp_path: Path) -> None:
    block = json.loads(watcher)
    spec = parse_target(block["name"], block["config"])
    (tmp_path / "proc").mkdir()
    target = spec.build(Host(tmp_path), events=True)
    try:
        assert isinstance(target, EventsTarget)
        assert target.refresh_s == seconds
        assert not isinstance(innermost(target), EventsTarget)
    finally:
        if isinstance(target, EventsTarget):
            target.close()
    assert not isinstance(spec.build(Host(tmp_path)), EventsTarget)


def test_a_list_of_pids_needs_no_events(tmp_path: Path) -> None:
    assert isinstance(parse_target("pidlist", "pids: [1]").build(Host(tmp_path), events=True), PidsTarget)
