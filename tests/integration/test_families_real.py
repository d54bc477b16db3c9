"""A master and its workers: what they share after fork is counted once, and is no candidate."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from memtier_engine import Engine, EngineConfig
from memtier_engine.hostfs.host import Host
from memtier_engine.model import PAGE_BYTES, Why
from memtier_engine.policies.age import AgePolicyConfig
from memtier_engine.targets.pids import PidsTarget

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: trackers read other processes' page tables")

MIB = 1 << 20
MASTER = """
import mmap, os, sys
shared = mmap.mmap(-1, 24 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(shared), 4096):
    shared[at] = 1
pids = []
for _ in range(3):
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        own = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for at in range(0, len(own), 4096):
            own[at] = 1
        os.write(write, b"x")
        sys.stdin.buffer.raw.read(1)
        os._exit(0)
    os.read(read, 1)
    pids.append(pid)
print(*pids, flush=True)
sys.stdin.buffer.raw.read(1)
"""


@contextmanager
def prefork() -> Iterator[list[int]]:
    with subprocess.Popen(
        [sys.executable, "-c", MASTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as master:
        assert master.stdout is not None
        try:
            yield [master.pid, *map(int, master.stdout.readline().split())]
        finally:
            master.kill()
            assert master.stdin is not None
            master.stdin.close()  # the workers end with it


def engine_on(pids: list[int], *, swap_out_ms: int = 3_600_000) -> Engine:
    host = Host()
    policy = AgePolicyConfig(interval_ms=200, swap_out_ms=swap_out_ms)
    config = EngineConfig(scan_interval_ms=200, policy=policy, dry_run=True)
    return Engine(PidsTarget(host, pids), config, host=host)


def test_what_a_family_shares_is_counted_once_and_promised_by_nobody() -> None:
    with prefork() as pids:
        time.sleep(1.2)  # younger processes are left alone
        engine = engine_on(pids, swap_out_ms=400)
        try:
            for _ in range(6):
                report = engine.step()
                time.sleep(0.25)
            singles = [int(space.pages.histogram()[:254].sum()) * PAGE_BYTES for space in engine.spaces]
            assert report.processes == 4
            assert set(report.sharers) == set(pids)
            assert set(report.sharers.values()) == {4}
            shared = [report.kept[pid][Why.SHARED] for pid in pids]
            assert min(shared) >= 24 * MIB
            assert sum(singles) - report.resident_bytes == pytest.approx(sum(shared) - max(shared), abs=2 * MIB)
            assert report.candidate_bytes < sum(singles) - sum(shared) + 2 * MIB
        finally:
            engine.close()


def test_strangers_share_nothing_and_are_not_asked() -> None:
    with prefork() as (first, *_), prefork() as (second, *_):
        time.sleep(1.2)
        engine = engine_on([first, second])
        try:
            report = engine.step()
            assert report.sharers == {}
            assert [space.shared_s for space in engine.spaces] == [float("-inf")] * 2
            assert report.processes == 2
        finally:
            engine.close()
