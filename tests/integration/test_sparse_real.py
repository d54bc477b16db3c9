"""Programs that map far more than they use: cost and memory follow what they use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from memtier_engine import Engine, EngineConfig
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.occupied import occupied
from memtier_engine.policies.age import AgePolicyConfig
from memtier_engine.targets.pids import PidsTarget

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: trackers read other processes' page tables")

GIB = 1 << 30
SPARSE = """
import ctypes, sys, time
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
size = int(sys.argv[1])
at = None
if size:
    at = libc.mmap(None, size, 3, 0x4022, -1, 0)  # MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
    assert at not in (None, 2**64 - 1)
    for place in (0, size // 3, size - (1 << 20)):
        ctypes.memset(at + place, 1, 1 << 20)
used = ctypes.create_string_buffer(8 << 20)
print(at or 0, flush=True)
time.sleep(1000)
"""


@contextmanager
def sparse(size: int) -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", SPARSE, str(size)], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline()
            yield child.pid
        finally:
            child.kill()


def engine_on(pid: int, tracker: str = "auto") -> Engine:
    host = Host()
    config = EngineConfig(
        tracker=tracker, scan_interval_ms=1000, policy=AgePolicyConfig(interval_ms=1000, swap_out_ms=3_600_000)
    )
    return Engine(PidsTarget(host, [pid]), config, host=host)


def grown(pid: int) -> None:
    """Until it is no longer too young to be looked at."""
    time.sleep(1.2)


@pytest.mark.parametrize("tib", [14, 60, 120])
@pytest.mark.parametrize("tracker", ["auto", "refs"])
def test_a_reservation_of_terabytes_costs_what_is_used_of_it(tib: int, tracker: str) -> None:
    """Counted in what is kept of pages, not in seconds: those are in the benchmark."""
    with sparse(0) as plain, sparse(tib << 40) as pid:
        grown(pid)
        reports, kept = [], []
        for each in (plain, pid):
            engine = engine_on(each, tracker)
            try:
                reports.append([engine.step() for _ in range(2)][-1])
                kept.append(sum(len(pages.ages) for pages in engine.pages.values()))
            finally:
                engine.close()
        without, with_it = reports
        assert with_it.resident_bytes - without.resident_bytes == pytest.approx(3 << 20, abs=1 << 20)
        assert kept[1] - kept[0] < (4 * 4 << 20) / 4096, "a few blocks more"
        assert len(occupied(Host(), pid)) < 1000
        assert occupied(Host(), pid).total_bytes < GIB


def test_memory_used_anew_in_a_reservation_is_found_by_the_next_scan() -> None:
    code = SPARSE.replace(
        "time.sleep(1000)",
        "sys.stdin.readline(); ctypes.memset(at + size // 2, 1, 4 << 20); print('more', flush=True); time.sleep(1000)",
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(60 << 40)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        at = int(child.stdout.readline())
        grown(child.pid)
        engine = engine_on(child.pid)
        try:
            before = engine.step()
            print("go", file=child.stdin, flush=True)
            assert child.stdout.readline() == "more\n"
            after = engine.step()
            assert after.resident_bytes - before.resident_bytes == pytest.approx(4 << 20, abs=1 << 18)
            (pages,) = engine.pages.values()
            assert pages.ages[pages.index_of(at + (60 << 40) // 2)] == 0
        finally:
            engine.close()
            child.kill()


def test_an_engine_stops_in_the_middle_of_a_scan() -> None:
    """Counted in chunks: told to stop at the first one, it does not look at the rest."""
    with sparse(0) as pid:
        grown(pid)
        engine = engine_on(pid)
        stop, seen = threading.Event(), []

        class Stopper:
            name = engine.tracker.name
            page_exact = True

            def watch(self, processes: object) -> None:
                pass

            def scan(self, process: object, spans: object) -> Iterator[object]:
                from memtier_engine.model import PageChunk

                for number in range(1000):
                    seen.append(number)
                    stop.set()
                    (pages,) = [space.pages for space in engine.spaces]
                    flags = np.ones(1, np.bool_)
                    yield PageChunk(int(pages.spans.starts[0]), flags, flags)

            def close(self) -> None:
                pass

        engine.tracker.close()
        engine.tracker = Stopper()  # type: ignore[assignment]
        engine._scanner._tracker = engine.tracker
        assert list(engine.run(stop=stop)) == []
        assert len(seen) == 1


ASAN = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int main(void)
{
	char *cold = malloc(48 << 20);
	memset(cold, 1, 48 << 20);
	puts("ready");
	fflush(stdout);
	for (;;)
		sleep(1);
}
"""


@pytest.fixture(scope="module")
def asan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc: apt-get install gcc")
    folder = tmp_path_factory.mktemp("asan")
    (folder / "app.c").write_text(ASAN)
    built = subprocess.run(
        ["gcc", "-fsanitize=address", "-O0", "-o", "app", "app.c"], cwd=folder, capture_output=True, text=True
    )
    if built.returncode:
        pytest.skip(f"needs gcc's AddressSanitizer: apt-get install libasan8 ({built.stderr[:100]})")
    return folder / "app"


def test_a_program_under_address_sanitizer_is_looked_at_for_what_it_uses(asan: Path) -> None:
    with subprocess.Popen([asan], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            grown(child.pid)
            engine = engine_on(child.pid)
            try:
                report = [engine.step() for _ in range(2)][-1]
                assert 48 << 20 < report.resident_bytes < 128 << 20
                assert sum(len(pages.ages) for pages in engine.pages.values()) * 4096 < GIB
            finally:
                engine.close()
        finally:
            child.kill()
