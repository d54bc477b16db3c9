"""Trackers and movers at work with a given set of capabilities, each trial in a child process of its own.

`python -m support.trials` reads a JSON object per line and answers with one: {"works": bool, "errors": [...]}. The
parent loads everything once and forks, so that a trial costs milliseconds. It runs on the host and in the test VM.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from loguru import logger

from memtier_engine.abi.constants import Capability
from memtier_engine.engine.loop import Engine, EngineConfig
from memtier_engine.errors import MemtierError
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.hostfs.privileges import MOVERS, TRACKERS, Need, least
from memtier_engine.model import SWAP_NODE, MoveTask, Spans
from memtier_engine.mover.mover import Mover, MoverConfig
from memtier_engine.reclaim.reclaimer import CgroupReclaimer
from memtier_engine.targets.pids import PidsTarget
from memtier_engine.trackers.mglru import MglruTracker
from memtier_engine.trackers.registry import create_tracker
from support.confine import keep_capabilities
from support.guards import OWN_GUARDS

NOBODY = 65534
HELD_BYTES = 16 << 20
_PART_BYTES = 1 << 20
_YOUNG_MS = 20


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a trial."""

    works: bool
    errors: tuple[str, ...]


@dataclass
class Trials:
    """The parent of the trials, and a process of another user that they work on."""

    server: subprocess.Popen[str]
    victim: subprocess.Popen[str]
    address: int
    cgroup: str | None = None
    done: int = 0

    def run(self, component: str, capabilities: Collection[Capability], *, node: int = 0) -> Answer:
        """Try a tracker or mover with no capability but these."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.done += 1
        first = self.address + self.done % (HELD_BYTES // _PART_BYTES) * _PART_BYTES
        question = {
            "component": component,
            "capabilities": [each.name for each in capabilities],
            "pid": self.victim.pid,
            "address": first,
            "node": node,
            "cgroup": self.cgroup,
        }
        self.server.stdin.write(json.dumps(question) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        return Answer(answer["works"], tuple(answer["errors"]))


@contextlib.contextmanager
def trials(cgroup: Path | None = None) -> Iterator[Trials]:
    """Ready to be asked; `cgroup` is one with the memory controller, and the process is put into it."""
    command = [sys.executable, "-m", "support.trials"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    victim = subprocess.Popen(
        [*command, "victim"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert victim.stdin is not None
        assert victim.stdout is not None
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text(str(victim.pid))
        victim.stdin.write("begin\n")
        victim.stdin.flush()
        address = int(victim.stdout.readline())
        yield Trials(server, victim, address, None if cgroup is None else str(cgroup))
    finally:
        for each in (server, victim):
            each.kill()
            each.communicate()


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a component did with exactly what the table says, and without each of it."""

    exactly: Answer
    without: dict[str, Answer]


def judge(scene: Trials, component: str, *, node: int = 0) -> Verdict:
    """Try a component with exactly its capabilities, then with each of them taken away."""
    wanted = set(least(needs_of(component)))
    return Verdict(
        scene.run(component, wanted, node=node),
        {each.name: scene.run(component, wanted - {each}, node=node) for each in sorted(wanted)},
    )


def needs_of(component: str) -> tuple[Need, ...]:
    """The row of the table."""
    return TRACKERS[component] if component in TRACKERS else MOVERS[component]


def complaints(component: str, verdict: Verdict) -> list[str]:
    """What is wrong with a verdict, in words; nothing if the table is exact and every error names what is missing.

    On kernels where something broader that the component has anyway does as well, a capability may be absent.
    """
    found = []
    if not verdict.exactly.works:
        found.append(f"{component} does not work with what the table says: {verdict.exactly.errors}")
    needs = needs_of(component)
    held = {need.capability for need in needs}
    for need in needs:
        name = need.capability.name
        if name not in verdict.without:  # a broader one that is needed anyway stands for it
            continue
        answer = verdict.without[name]
        spared = held.intersection(need.newer_instead)
        if answer.works and not spared:
            found.append(f"{component} works without {name}")
        if not answer.works and not any(name in error for error in answer.errors):
            found.append(f"{component} without {name} does not name it: {answer.errors}")
    return found


def _victim() -> None:
    """16 MiB of a user without any capability; it does nothing with it."""
    sys.stdin.readline()
    held = mmap.mmap(-1, HELD_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held.madvise(mmap.MADV_NOHUGEPAGE)
    for at in range(0, HELD_BYTES, 4096):
        held[at : at + 8] = at.to_bytes(8, "little")
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: else its files in /proc stay root's
    print(ctypes.addressof(ctypes.c_char.from_buffer(held)), flush=True)
    sys.stdin.readline()


def _try(question: dict[str, Any]) -> Answer:
    component = question["component"]
    keep_capabilities([Capability[name] for name in question["capabilities"]])
    try:
        if component in MOVERS:
            return _try_mover(question)
        if component == "mglru":
            tracker = MglruTracker(Host(), Path(question["cgroup"]))
            return Answer(tracker.scan() > 0, ())
        if component == "userfault":
            return _try_own_memory(component)
        config = EngineConfig(
            tracker=component,
            scan_interval_ms=_YOUNG_MS,
            guards=OWN_GUARDS,
            dry_run=component != "softdirty",  # which a dry run does without; the policy moves nothing anyway
            count_swap_ins=False,
        )
        engine = Engine(PidsTarget(Host(), [question["pid"]]), config)
        time.sleep(2 * _YOUNG_MS / 1000)  # younger processes are left alone
        reports = [engine.step(), engine.step()]
        engine.close()
        seen = reports[-1].processes == 1 and (component == "stub" or reports[-1].resident_bytes > 0)
        return Answer(seen, tuple(error for report in reports for error in report.errors))
    except MemtierError as failure:
        return Answer(False, (str(failure),))


def _try_own_memory(tracker_name: str) -> Answer:
    tracker = create_tracker(tracker_name, Host()).tracker
    held = mmap.mmap(-1, _PART_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held[0] = 1
    start = np.array([ctypes.addressof(ctypes.c_char.from_buffer(held))], np.uint64)
    own = process_id(Host(), os.getpid())
    tracker.watch(frozenset([own]))
    chunks = list(tracker.scan(own, Spans(start, start + np.uint64(_PART_BYTES))))
    return Answer(any(chunk.accessed.any() for chunk in chunks), ())


def _try_mover(question: dict[str, Any]) -> Answer:
    host, now_s = Host(), time.monotonic()
    config = MoverConfig(bandwidth_mib_per_s=None)
    if question["component"] == "memory-reclaim":
        reclaimer = CgroupReclaimer(Path(question["cgroup"]), config, host, now_s=now_s)
        reclaimer.replace(_PART_BYTES)
        reclaimed, errors = 0, []
        while reclaimer.wait_s() is not None:
            outcome = reclaimer.pump(time.monotonic())
            if outcome is not None:
                reclaimed += outcome.reclaimed_bytes
                errors += [outcome.error] if outcome.error else []
            time.sleep(0.01)
        return Answer(reclaimed > 0, tuple(errors))
    start = np.array([question["address"]], np.uint64)
    spans = Spans(start, start + np.uint64(_PART_BYTES))
    to_node = SWAP_NODE if question["component"] == "page-out" else question["node"]
    mover = Mover(config, host, now_s=now_s)
    mover.add(MoveTask(process_id(host, question["pid"]), spans, to_node))
    outcomes = []
    while mover.has_work:
        outcomes += mover.pump(time.monotonic())
    mover.close()
    errors_of = tuple(outcome.error for outcome in outcomes if outcome.error)
    moved = sum(outcome.moved_bytes for outcome in outcomes)
    # On one node, memory that is there already: the call is made, and has nothing to do.
    return Answer(not errors_of and (moved > 0 or to_node == 0), errors_of)


def _serve() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                answer = _try(json.loads(line))
            except BaseException as failure:
                answer = Answer(False, (f"{type(failure).__name__}: {failure}",))
            print(json.dumps({"works": answer.works, "errors": answer.errors}), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    logger.remove()
    _victim() if sys.argv[1:] == ["victim"] else _serve()
