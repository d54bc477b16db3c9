"""Process events from the kernel's proc connector, and targets that follow by them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from memtier_engine.errors import Unavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.proc_events import ProcEventSocket
from memtier_engine.model import ProcessId
from memtier_engine.targets.events import SETTLE_S, SHARE_OF_TIME, EventsTarget
from memtier_engine.targets.filter import FilterTarget, ProcessFilter
from memtier_engine.targets.proc import ProcTarget
from memtier_engine.targets.regexp import compile_re2
from support.fakes import FakeTarget
from support.waiting import until

HOST = Host()
_STORM = """
import os, sys, time
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    if os.fork() == 0:
        os._exit(0)
    os.wait()
"""


@pytest.fixture
def events() -> Iterator[ProcEventSocket]:
    try:
        found = ProcEventSocket()
    except Unavailable as missing:
        pytest.skip(f"needs the proc connector: {missing}")
    yield found
    found.close()


def read_until(events: ProcEventSocket, pid: int) -> tuple[set[int], set[int]]:
    """(started, exited) up to the exit of `pid`."""
    started: set[int] = set()
    exited: set[int] = set()

    def over() -> bool:
        events.wait(0.1)
        seen = events.read()
        started.update(seen.started)
        exited.update(seen.exited)
        return pid in exited

    until(over, f"no exit of {pid}")
    return started, exited


def test_a_process_is_reported_when_it_starts_and_when_it_exits(events: ProcEventSocket) -> None:
    child = subprocess.Popen(["sleep", "1000"])
    started: set[int] = set()

    def seen() -> bool:
        events.wait(0.1)
        found = events.read()
        started.update(found.started)
        assert child.pid not in found.exited
        return child.pid in started

    until(seen, f"no start of {child.pid}")
    child.kill()
    child.wait()
    _, exited = read_until(events, child.pid)
    assert child.pid in exited


def test_threads_are_no_processes(events: ProcEventSocket) -> None:
    """The filter in the kernel drops them: not even a message arrives."""
    ids: list[int] = []

    def note() -> None:
        ids.append(threading.get_native_id())

    threads = [threading.Thread(target=note) for _ in range(20)]
    for thread in threads:
        thread.start()
        thread.join()
    child = subprocess.Popen(["true"])
    child.wait()
    started, exited = read_until(events, child.pid)
    assert child.pid in exited
    assert not (started | exited) & set(ids)


def test_reading_without_events_returns_at_once_and_closing_twice_is_fine(events: ProcEventSocket) -> None:
    assert not os.get_blocking(events.fileno())
    events.read()
    events.close()
    events.close()


class Changes:
    """Remembers which process was added or removed."""

    def __init__(self) -> None:
        self.added: set[int] = set()
        self.removed: set[int] = set()

    def __call__(self, added: frozenset[ProcessId], removed: frozenset[ProcessId]) -> None:
        self.added |= {process.pid for process in added}
        self.removed |= {process.pid for process in removed}

    def wait_added(self, pid: int) -> None:
        until(lambda: pid in self.added, "never seen")

    def wait_removed(self, pid: int) -> None:
        until(lambda: pid in self.removed, "never seen to go")


SLEEPERS = [ProcessFilter(exe_regexp=compile_re2(r"/(sleep|coreutils|busybox)$"))]


def test_a_new_process_and_its_exit_are_told_by_events_and_not_found_by_polling(events: ProcEventSocket) -> None:
    """The source is asked for all processes once, at the start: an hour lies between two such looks."""
    asked = 0

    class Counting(FilterTarget):
        def poll(self) -> frozenset[ProcessId]:
            nonlocal asked
            asked += 1
            return super().poll()

    changes = Changes()
    source = Counting(HOST, ProcTarget(HOST), SLEEPERS)
    target = EventsTarget(source, refresh_s=3600, on_change=changes)
    try:
        assert target.by_events
        until(lambda: target._asked_s is not None, "no first answer")
        for _ in range(10):
            child = subprocess.Popen(["sleep", "1000"])
            changes.wait_added(child.pid)
            assert child.pid in {process.pid for process in target.poll()}
            child.kill()
            child.wait()
            changes.wait_removed(child.pid)
        assert asked == 1
    finally:
        target.close()


def test_a_storm_of_processes_does_not_keep_it_busy(events: ProcEventSocket) -> None:
    """Events are batched: asking the source takes a small part of the time, and what stays is still found."""
    spent: list[float] = []  # CPU seconds of each time it was asked

    class Whole:
        """It cannot be asked about some processes only, which is dear."""

        def poll(self) -> frozenset[ProcessId]:
            began = time.thread_time()
            found = ProcTarget(HOST).poll()
            spent.append(time.thread_time() - began)
            return found

    target = EventsTarget(Whole(), refresh_s=60)
    try:
        began = time.monotonic()
        storm = subprocess.Popen([sys.executable, "-S", "-c", _STORM, "1.5"])
        storm.wait()
        seconds = time.monotonic() - began
        # Both hold however slow the machine is: after each time it rests, for longer the more CPU time it took.
        assert 0 < len(spent) <= 2 + seconds / SETTLE_S
        assert sum(spent) - max(spent) < 2 * SHARE_OF_TIME * seconds
        stay = subprocess.Popen(["sleep", "1000"])
        until(lambda: stay.pid in {process.pid for process in target.poll()})
        stay.kill()
        stay.wait()
    finally:
        target.close()


def test_without_the_connector_the_source_is_polled() -> None:
    def none() -> ProcEventSocket:
        raise Unavailable("proc connector: not here")

    one, two = ProcessId(1001, 1), ProcessId(1002, 1)
    source, changes = FakeTarget(one), Changes()
    target = EventsTarget(source, refresh_s=0.05, on_change=changes, open_events=none)
    try:
        assert not target.by_events
        changes.wait_added(1001)
        source.processes = frozenset({two})
        changes.wait_added(1002)
        changes.wait_removed(1001)
        assert target.poll() == {two}
    finally:
        target.close()
    target.close()


def test_polling_a_closed_target_still_answers() -> None:
    source = FakeTarget(ProcessId(1001, 1))
    target = EventsTarget(source, refresh_s=0.01)
    target.close()
    source.processes = frozenset()
    time.sleep(0.02)
    assert target.poll() == frozenset()


def test_without_rights_the_error_says_what_is_needed() -> None:
    """In a process without CAP_NET_ADMIN; the kernel either refuses or does not answer."""
    if os.geteuid() != 0:
        pytest.skip("needs root to give up rights: run the tests as root")
    program = (
        "import os, sys\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "from memtier_engine.hostfs.proc_events import ProcEventSocket\n"
        "from memtier_engine.errors import Unavailable\n"
        "try:\n    ProcEventSocket()\n"
        "except Unavailable as error:\n    print(error)\n"
        "else:\n    print('allowed')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # Since Linux 6.6 anybody may listen in the first namespaces.
    assert "run as root" in result.stdout or result.stdout == "allowed\n"
