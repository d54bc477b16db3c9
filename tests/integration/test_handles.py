"""Open files of processes: bounded in number, and never those of another process that has the pid by now."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from memtier_engine.errors import ProcessGone
from memtier_engine.hostfs.handles import OpenProcesses, ProcessFiles
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.model import ProcessId


@contextmanager
def sleepers(count: int) -> Iterator[list[ProcessId]]:
    children = [subprocess.Popen(["sleep", "1000"]) for _ in range(count)]
    try:
        yield [process_id(Host(), child.pid) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_so_many_stay_open_and_no_more() -> None:
    before = open_files()
    with sleepers(6) as processes, OpenProcesses(Host(), most=2) as opened:
        for process in [*processes, *processes]:
            with opened.of(process) as files:
                assert files.pagemap.pid == process.pid
                assert files.pidfd >= 0
            assert len(opened) <= 2
        assert open_files() <= before + 2 * 3
    assert open_files() == before


def test_what_is_in_use_is_not_closed_for_another() -> None:
    with sleepers(3) as (first, second, third), OpenProcesses(Host(), most=1) as opened:
        with opened.of(first) as files, opened.of(second), opened.of(third):
            assert not files.exited()
            files.pagemap.read(0x1000, 0x2000)
        with opened.of(second) as files:
            assert not files.exited()


def test_dropped_while_in_use_it_is_closed_by_its_last_user() -> None:
    before = open_files()
    with sleepers(1) as (process,), OpenProcesses(Host()) as opened:
        with opened.of(process) as files:
            opened.drop(process)
            assert not files.exited()
        assert len(opened) == 0
        assert open_files() == before


def test_another_process_of_the_pid_is_refused() -> None:
    with sleepers(1) as (process,), pytest.raises(ProcessGone, match="new process"):
        ProcessFiles(Host(), ProcessId(process.pid, process.start_ticks - 1))


def test_one_that_exited_before_is_gone() -> None:
    """And no error to tell of: processes exit at any time."""
    with sleepers(1) as (process,):
        pass
    with pytest.raises(ProcessGone):
        ProcessFiles(Host(), process)


def test_the_directory_of_one_that_exited_says_so_and_is_nobody_elses() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    files = ProcessFiles(Host(), process_id(Host(), child.pid))
    child.kill()
    child.wait()
    for attempt in (
        files.check,
        lambda: files.read("maps"),
        lambda: files.pagemap,
        lambda: files.write("clear_refs", "1"),
    ):
        with pytest.raises(ProcessGone):
            attempt()
    files.close()


def test_threads_share_it() -> None:
    with sleepers(8) as processes, OpenProcesses(Host(), most=3) as opened:
        failures: list[BaseException] = []

        def work(offset: int) -> None:
            try:
                for turn in range(100):
                    with opened.of(processes[(offset + turn) % len(processes)]) as files:
                        assert files.read("stat")
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
