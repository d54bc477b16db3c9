"""One address space has one observer: whoever shares it is one, and a second engine is told who is there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memtier_engine import Engine, EngineConfig
from memtier_engine.hostfs.host import Host
from memtier_engine.policies.age import AgePolicyConfig
from memtier_engine.targets.pids import PidsTarget
from support.swap import temporary_zram_swap

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: trackers read other processes' page tables")

MIB = 1 << 20
RUN = Path(sys.executable).parent / "memtier"
SHARED_MM = r"""
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>
static int idle(void *unused) { for (;;) sleep(1000); return 0; }
int main(void)
{
	char *own = malloc(32 << 20), *stack = malloc(65536);
	memset(own, 1, 32 << 20);
	printf("%d\n", clone(idle, stack + 65536, CLONE_VM | SIGCHLD, 0));
	fflush(stdout);
	idle(0);
}
"""


def engine_on(*pids: int, tracker: str = "auto") -> Engine:
    host = Host()
    policy = AgePolicyConfig(interval_ms=200, swap_out_ms=3_600_000)
    return Engine(PidsTarget(host, pids), EngineConfig(tracker=tracker, scan_interval_ms=200, policy=policy), host=host)


@contextmanager
def sleeper() -> Iterator[int]:
    with subprocess.Popen(["sleep", "1000"]) as child:
        try:
            time.sleep(1.2)  # younger processes are left alone
            yield child.pid
        finally:
            child.kill()


@pytest.fixture(scope="module")
def shared_mm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc: apt-get install gcc")
    folder = tmp_path_factory.mktemp("shared-mm")
    (folder / "app.c").write_text(SHARED_MM)
    subprocess.run(["gcc", "-O0", "-o", "app", "app.c"], cwd=folder, check=True)
    return folder / "app"


def test_two_processes_of_one_mm_are_one_address_space(shared_mm: Path) -> None:
    with subprocess.Popen([shared_mm], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        kid = int(child.stdout.readline())
        try:
            time.sleep(1.2)
            engine = engine_on(child.pid, kid)
            try:
                report = engine.step()
                assert report.processes == 1, "scanned once: the second scan would only see what the first cleared"
                assert 32 * MIB < report.resident_bytes < 48 * MIB
                (space,) = engine.spaces
                assert {process.pid for process in space.members} == {child.pid, kid}
                os.kill(child.pid, signal.SIGKILL)
                child.wait()
                report = engine.step()
                assert report.processes == 1, "it lives on in the other one"
                assert report.resident_bytes > 32 * MIB
            finally:
                engine.close()
        finally:
            os.kill(kid, signal.SIGKILL)


def test_two_processes_of_one_mm_have_one_observer_also_where_each_engine_knows_one_of_them(shared_mm: Path) -> None:
    with subprocess.Popen([shared_mm], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        kid = int(child.stdout.readline())
        first, second = engine_on(child.pid), engine_on(kid)
        try:
            time.sleep(1.2)
            assert first.step().processes == 1
            report = second.step()
            assert report.processes == 0
            assert f"process {kid} has the address space of process {child.pid}" in report.errors[0]
            command = [str(RUN), "run", "--pid", str(kid), "--idle-after", "1h", "--dry-run", "--duration", "1s"]
            told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
            assert f"process {kid} has the address space of process {child.pid}" in told.stdout + told.stderr
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            first.step()
            assert second.step().processes == 1
        finally:
            first.close()
            second.close()
            os.kill(kid, signal.SIGKILL)


def test_a_second_engine_leaves_it_alone_until_the_first_is_gone() -> None:
    with sleeper() as pid:
        first, second = engine_on(pid), engine_on(pid)
        try:
            assert first.step().processes == 1
            report = second.step()
            assert report.processes == 0
            (error,) = report.errors
            assert f"process {pid} is observed already by another engine" in error
            assert second.step().errors == (), "said once"
            first.close()
            assert second.step().processes == 1
        finally:
            first.close()
            second.close()


def test_a_tracker_that_clears_nothing_may_look_on() -> None:
    with sleeper() as pid:
        first, second = engine_on(pid), engine_on(pid, tracker="finder")
        try:
            assert first.step().processes == 1
            assert second.step().processes == 1
        finally:
            first.close()
            second.close()


@pytest.mark.parametrize("dry", [True, False])
def test_another_program_is_named_and_its_death_by_sigkill_frees_the_process(dry: bool) -> None:
    with temporary_zram_swap(64 << 20), sleeper() as pid:
        command = [str(RUN), "run", "--pid", str(pid), "--idle-after", "1h", *(["--dry-run"] if dry else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as other:
            try:
                assert other.stdout is not None
                for line in other.stdout:  # its first scan is over once it tells of it
                    if "resident" in line:
                        break
                engine = engine_on(pid)
                try:
                    report = engine.step()
                    assert report.processes == 0
                    assert f"(pid {other.pid})" in report.errors[0]
                    assert "memtier" in report.errors[0]
                    other.kill()
                    other.wait()
                    assert engine.step().processes == 1
                finally:
                    engine.close()
            finally:
                other.kill()
