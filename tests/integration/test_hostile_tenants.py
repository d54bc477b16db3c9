"""Processes made to keep the engine busy, or to hide from it: what they may cost, and what is said of them."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from memtier_engine import Engine, EngineConfig
from memtier_engine.engine.report import StepReport
from memtier_engine.hostfs.handles import ProcessFiles
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.model import MoveTask, Spans, Why
from memtier_engine.mover.backends import move_to_node
from memtier_engine.mover.mover import Mover, MoverConfig
from memtier_engine.policies.age import AgePolicyConfig
from memtier_engine.targets.pids import PidsTarget
from support.odd_processes import LEADER_ENDED, running

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: trackers read other processes' page tables")

HOST = Host()
MIB = 1 << 20


def engine_on(pids: list[int], tracker: str = "auto") -> Engine:
    policy = AgePolicyConfig(interval_ms=100, swap_out_ms=100)
    config = EngineConfig(scan_interval_ms=100, policy=policy, dry_run=True, tracker=tracker)
    return Engine(PidsTarget(HOST, pids), config, host=HOST)


def reports(engine: Engine, count: int) -> list[StepReport]:
    found: list[StepReport] = []
    stop = threading.Event()
    for report in engine.run(stop=stop):
        if report.processes:
            found.append(report)
        if len(found) == count:
            stop.set()
    return found


@pytest.mark.parametrize("tracker", ["auto", "refs"])
def test_a_process_without_its_first_thread_is_seen_and_nothing_of_it_is_promised(tracker: str) -> None:
    with running(LEADER_ENDED) as (_, [pid, _, _]):
        last = reports(engine_on([pid], tracker), 6)[-1]
    assert last.resident_bytes >= 8 * MIB
    assert last.kept[pid][Why.HEADLESS] == last.resident_bytes
    assert last.candidate_bytes == 0
    assert not last.errors


def test_the_mover_says_why_nothing_of_it_goes_out() -> None:
    with running(LEADER_ENDED) as (_, [pid, address, _]):
        process = process_id(HOST, pid)
        memory = Spans(np.array([address], np.uint64), np.array([address + 8 * MIB], np.uint64))
        mover = Mover(MoverConfig(bandwidth_mib_per_s=None), HOST, now_s=0.0)
        mover.add(MoveTask(process, memory))
        outcomes = mover.pump(1.0)
        assert outcomes
        assert {kept.why for outcome in outcomes for kept in outcome.kept} == {Why.HEADLESS}
        assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
        mover.close()
        with ProcessFiles(HOST, process) as files:
            result = move_to_node(files, memory, 0)
        assert [kept.why for kept in result.kept] == [Why.HEADLESS]
