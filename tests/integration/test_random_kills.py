"""Two hundred processes killed at random in every phase of an engine: no deadlock, and no survivor is lost."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from memtier_engine.clock import FakeClock
from memtier_engine.config.files import parse
from memtier_engine.engine.loop import Engine
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.model import MoveTask, PageChunk, ProcessId, Spans, Tracker
from memtier_engine.mover.backends import BatchResult, ProcessHandle, move
from memtier_engine.mover.mover import Mover
from memtier_engine.pages.ages import AgeClock, ProcessPages
from memtier_engine.policies.base import Policy
from support.cgroups import temporary_cgroup
from support.configs import text_of
from support.swap import temporary_zram_swap

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root"),
    pytest.mark.timeout(600),  # a deadlock ends here
]

PHASES = ("follow", "scan begins", "within a scan", "decide", "move begins", "move done")
KILLS_PER_POLICY = 50
POLICIES: Mapping[str, dict[str, Any]] = {
    "age": {"swapoutms": 30},
    "heat": {"heatnumas": {0: [-1]}},
    "ratio": {"ratio": 0.9},
    "demote-idle": {"idlenumas": [-1]},
}
NO_NODE_GUARDS = (
    "guards: {psimemorynode: null, psimemorycgroup: null, psiionode: null, psiiocgroup: null, refaults: null,"
)
NO_NODE_GUARDS += " startgracems: 0, skip: {rssleast: 0}}\n"

_NURSERY = """
import mmap, os, signal, sys
SIZE = 256 << 10
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
for line in sys.stdin:
    pids = []
    for _ in range(int(line)):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            area = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            for at in range(0, SIZE, 4096):
                area[at] = 1
            os.write(write, b".")
            signal.pause()
        os.read(read, 1)
        os.close(read)
        os.close(write)
        pids.append(pid)
    print(*pids, flush=True)
"""


class Nursery:
    """Makes processes of 256 KiB in a cgroup. They are nobody's children here: a dead one is gone at once."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self._popen = popen

    def make(self, number: int) -> list[ProcessId]:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(f"{number}\n")
        self._popen.stdin.flush()
        return [process_id(Host(), int(pid)) for pid in self._popen.stdout.readline().split()]


@contextlib.contextmanager
def nursery(cgroup: Path) -> Iterator[Nursery]:
    popen = subprocess.Popen([sys.executable, "-c", _NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    (cgroup / "cgroup.procs").write_text(str(popen.pid))
    try:
        yield Nursery(popen)
    finally:
        popen.kill()
        for pipe in (popen.stdin, popen.stdout):
            assert pipe is not None
            pipe.close()
        popen.wait()  # those it made go with the cgroup


class Killer:
    """Between the stages: kills one of its victims, or just the one that is being worked on, in a phase at a time."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.victims: set[ProcessId] = set()
        self.killed: list[ProcessId] = []
        self.kills: Counter[str] = Counter()
        self.wanted: str | None = None

    def arm(self) -> str:
        """Kill in one of the phases that had the fewest kills."""
        least = min(self.kills[phase] for phase in PHASES)
        self.wanted = self.chance.choice([phase for phase in PHASES if self.kills[phase] == least])
        return self.wanted

    def reach(self, phase: str, process: ProcessId | None = None) -> None:
        if phase != self.wanted or not self.victims or (process is not None and process not in self.victims):
            return
        victim = process or self.chance.choice(sorted(self.victims))
        os.kill(victim.pid, signal.SIGKILL)
        if self.chance.random() < 0.7:  # else it may still be dying in the next stage
            while Path(f"/proc/{victim.pid}/stat").exists():
                time.sleep(0.001)
        self.victims.discard(victim)
        self.killed.append(victim)
        self.kills[phase] += 1
        self.wanted = None


class KillingTracker:
    page_exact = True

    def __init__(self, tracker: Tracker, killer: Killer) -> None:
        self.name = tracker.name
        self._tracker, self._killer = tracker, killer

    def watch(self, processes: frozenset[ProcessId]) -> None:
        self._killer.reach("follow")
        self._tracker.watch(processes)

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        self._killer.reach("scan begins", process)
        for chunk in self._tracker.scan(process, spans):
            self._killer.reach("within a scan", process)
            yield chunk

    def close(self) -> None:
        self._tracker.close()


def watched(engine: Engine, killer: Killer) -> None:
    """Put the killer between the engine's stages."""
    engine.tracker = engine._scanner._tracker = KillingTracker(engine.tracker, killer)
    policy: Policy = engine.policy
    decide = policy.decide

    def killing_decide(
        pages: Mapping[ProcessId, ProcessPages], clock: AgeClock, budget_bytes: int | None
    ) -> list[MoveTask]:
        killer.reach("decide")
        return decide(pages, clock, budget_bytes)

    policy.decide = killing_decide  # type: ignore[method-assign]

    def killing_move(handle: ProcessHandle, spans: Spans, node: int) -> BatchResult:
        killer.reach("move begins", handle.process)
        result = move(handle, spans, node)
        killer.reach("move done", handle.process)
        return result

    engine.mover = Mover(engine.mover.config, engine.host, now_s=engine.clock.now_s(), backend=killing_move)


@pytest.fixture(scope="module", autouse=True)
def swap() -> Iterator[None]:
    with temporary_zram_swap(256 << 20):
        yield


@pytest.mark.parametrize("policy", POLICIES)
def test_processes_killed_in_every_phase_cost_only_their_own_data(policy: str) -> None:
    """Fifty kills each. Whoever lives stays tracked, whoever died is forgotten, with all that was planned for it."""
    killer = Killer(random.Random(POLICIES[policy].__repr__()))
    with temporary_cgroup(f"kills-{policy}") as cgroup, nursery(cgroup) as made:
        config = {
            "intervalms": 10,
            "pidwatcher": {"name": "cgroups", "config": {"cgroups": [str(cgroup)]}},
            "tracker": {"name": "finder", "config": {"scanintervalms": 10}},
            "mover": {"intervalms": 1, "bandwidth": 2000},
            **POLICIES[policy],
        }
        spec = parse(text_of({"policy": {"name": policy, "config": config}}) + NO_NODE_GUARDS)
        engine = spec.build(Host(), clock=FakeClock())
        watched(engine, killer)
        survivors = made.make(3)
        for steps, report in enumerate(engine.run(duration_s=1e9)):
            assert not [error for error in report.errors if "No such process" not in error], report.errors
            if len(killer.killed) >= KILLS_PER_POLICY:
                break
            if killer.wanted is None:
                # Of older ones there may be nothing left to move.
                killer.victims.update(made.make(2 if "move" in killer.arm() else 1))
            assert steps < 3000, f"{killer.wanted} is not reached; phases reached: {killer.kills}"
        engine.closed = False
        killer.wanted = None
        for _ in range(2):
            engine.step()
        tracked = set(engine.pages)
        assert tracked >= {*survivors, *killer.victims}, "whoever lives is tracked"
        assert not tracked & set(killer.killed), "whoever died is forgotten"
        assert not {task.process for task, _ in engine.mover.tasks()} & set(killer.killed)
        engine.close()
    assert sum(killer.kills.values()) == KILLS_PER_POLICY
    assert min(killer.kills[phase] for phase in PHASES) >= KILLS_PER_POLICY // len(PHASES) - 1, killer.kills
