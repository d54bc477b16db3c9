"""A process whose first thread has ended while others work: alive, though /proc calls it a zombie."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from memtier_engine.errors import KernelCallError, ProcessGone
from memtier_engine.hostfs import proc
from memtier_engine.hostfs.handles import ProcessFiles
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import MappingsCache, live_thread, process_id, read_mappings
from memtier_engine.hostfs.pagemap import Pagemap, present
from memtier_engine.model import ProcessId, Spans
from memtier_engine.targets import PidsTarget
from memtier_engine.targets.filter import ProcessFilter
from memtier_engine.targets.proc import ProcTarget
from support.odd_processes import LEADER_ENDED, running

HOST = Host()
BYTES = 8 << 20


class Headless:
    """The program of `LEADER_ENDED`."""

    def __init__(self, popen: subprocess.Popen[str], numbers: list[int]) -> None:
        self.popen = popen
        pid, self.address, self.thread = numbers
        self.process = process_id(HOST, pid)

    def touch_all(self) -> None:
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()
        assert self.popen.stdout.readline() == "0\n"


@pytest.fixture
def headless() -> Iterator[Headless]:
    with running(LEADER_ENDED) as (popen, numbers):
        yield Headless(popen, numbers)


def covered(spans: Spans, start: int) -> bool:
    return bool(((spans.starts <= start) & (spans.ends >= start + BYTES)).any())


def test_it_is_alive_for_every_target(headless: Headless) -> None:
    assert PidsTarget(HOST, [headless.process.pid]).poll() == {headless.process}
    assert headless.process in ProcTarget(HOST).poll()
    assert live_thread(HOST, headless.process.pid) == headless.thread


def test_filters_see_its_program_and_its_size(headless: Headless) -> None:
    program = re.compile(re.escape(os.path.realpath(sys.executable)))
    for wanted in (
        ProcessFilter(exe_regexp=program),
        ProcessFilter(min_vm_rss_kib=BYTES >> 10),
        ProcessFilter(min_private_dirty_kib=BYTES >> 10),
    ):
        assert wanted.passes(HOST, headless.process.pid)


def test_its_mappings_and_pages_are_those_of_its_threads(headless: Headless) -> None:
    process, start = headless.process, headless.address
    assert covered(read_mappings(HOST, process.pid).tierable(), start)
    assert covered(MappingsCache().read(HOST, process).tierable(), start)
    smaps = proc.read_smaps(HOST, process.pid)
    assert smaps.rss_bytes[(smaps.starts <= start) & (smaps.ends > start)].sum() >= BYTES
    assert proc.smaps_rollup(HOST, process.pid)["Rss"] >= BYTES
    with Pagemap(HOST, process.pid) as pagemap:
        assert present(pagemap.read(start, start + BYTES)).all()


def test_its_open_files_are_those_of_its_threads(headless: Headless) -> None:
    process, start = headless.process, headless.address
    with ProcessFiles(HOST, process) as files:
        assert b"-" in files.read("maps")
        assert present(files.pagemap.read(start, start + BYTES)).all()
        assert b"Rss:" in files.read("smaps_rollup")
        assert not files.exited()
        files.check()
        assert files.why_not_by_pidfd() is not None
        with pytest.raises(KernelCallError):
            files.open("nothing")


@pytest.mark.parametrize("by_files", [False, True])
def test_its_accessed_bits_are_really_cleared(headless: Headless, by_files: bool) -> None:
    """/proc/PID/clear_refs takes the write and does nothing: everything would look used for ever."""

    def referenced() -> int:
        smaps = proc.read_smaps(HOST, headless.process.pid)
        return int(smaps.referenced_bytes[(smaps.starts <= headless.address) & (smaps.ends > headless.address)].sum())

    headless.touch_all()
    assert referenced() >= BYTES
    if by_files:
        with ProcessFiles(HOST, headless.process) as files:
            files.write("clear_refs", "1")
    else:
        proc.clear_refs(HOST, headless.process.pid, proc.CLEAR_REFS_REFERENCED)
    assert referenced() < BYTES // 2
    headless.touch_all()


def test_files_opened_before_its_first_thread_ended_go_on() -> None:
    program = LEADER_ENDED.replace("libc.syscall(", "sys.stdin.readline()\nlibc.syscall(").replace(
        "threading.Thread(target=stay)", "say(os.getpid(), memory)\nthreading.Thread(target=stay)"
    )
    with running(program) as (popen, [pid, start]), ProcessFiles(HOST, process_id(HOST, pid)) as files:
        before = files.read("maps")
        assert present(files.pagemap.read(start, start + BYTES)).all()
        assert files.why_not_by_pidfd() is None
        assert popen.stdin is not None
        assert popen.stdout is not None
        popen.stdin.write("\n")
        popen.stdin.flush()
        popen.stdout.readline()  # said by the other thread when the first is over
        assert live_thread(HOST, pid) is not None
        assert len(files.read("maps")) > len(before) // 2
        assert present(files.pagemap.read(start, start + BYTES)).all()


def test_threads_that_come_and_go_do_not_make_it_look_gone() -> None:
    """Each starts the next one and ends: whoever goes by one of them has to find another."""
    program = LEADER_ENDED.replace(
        "    time.sleep(1000)\nthreading",
        """    while True:
        time.sleep(1000)
def relay():
    threading.Thread(target=relay).start()
threading.Thread(target=relay).start()
threading""",
    ).replace("threading.Thread(target=stay)", "threading.Thread(target=stay, daemon=True)")
    program = program.replace("threading.get_native_id())", "threading.get_native_id())\n    libc.syscall(EXIT, 0)")
    program = program.replace("EXIT", '60 if os.uname().machine == "x86_64" else 93')
    with running(program) as (_, [pid, start, _]), ProcessFiles(HOST, process_id(HOST, pid)) as files:
        seen = set()
        for _ in range(500):
            files.check()
            assert b"-" in files.read("maps")
            files.write("clear_refs", "1")
            os.close(files.open("pagemap"))
            seen.add(files._thread)
        assert len(seen) > 1
        assert present(files.pagemap.read(start, start + BYTES)).all()


def test_a_true_zombie_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    process = process_id(HOST, child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    try:
        assert live_thread(HOST, child.pid) is None
        assert PidsTarget(HOST, [child.pid]).poll() == frozenset()
        with pytest.raises(ProcessGone):
            process_id(HOST, child.pid)
        with pytest.raises(ProcessGone):
            ProcessFiles(HOST, process)
    finally:
        child.wait()


def test_it_is_gone_when_its_last_thread_is(headless: Headless) -> None:
    with ProcessFiles(HOST, headless.process) as files:
        assert not files.exited()
        headless.popen.kill()
        while live_thread(HOST, headless.process.pid) is not None:
            time.sleep(0.01)
        while not files.exited():
            time.sleep(0.01)
        with pytest.raises(ProcessGone):
            files.check()
        with pytest.raises(ProcessGone):
            files.open("pagemap")
    assert PidsTarget(HOST, [headless.process.pid]).poll() == frozenset[ProcessId]()
