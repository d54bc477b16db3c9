"""Scenarios of policy `reclaim` in the test VM: real memory.reclaim, real lru_gen. One JSON line each."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from saying import say
from scene import CGROUPS, cgroup, main, meme

from memtier_engine.config.files import parse
from memtier_engine.engine.loop import StepReport
from memtier_engine.hostfs.host import Host
from memtier_engine.reclaim.engine import ReclaimEngine
from memtier_engine.trackers.mglru import MglruTracker

MIB = 1 << 20
IDLE_LEAST_MS = 4000


def enable_memory() -> None:
    (CGROUPS / "cgroup.subtree_control").write_text("+memory")


def engine(group: Path, goal: str, ages: str, *, window_ms: int = 4000) -> ReclaimEngine:
    """As a file of memtierd gives it; guards on the whole node are off, the guest is small."""
    text = f"""
policy:
  name: reclaim
  config: |
    goal: "{goal}"
    cgroups: [{group}]
    ages: {ages}
    intervalms: 1000
    windowms: {window_ms}
    idleleastms: {IDLE_LEAST_MS}
guards:
  psimemorynode: null
  psimemorycgroup: null
  psiionode: null
  psiiocgroup: null
  refaults: null
"""
    built = parse(text).build()
    assert isinstance(built, ReclaimEngine)
    return built


def until(one: ReclaimEngine, seconds: float, done: Callable[[StepReport], bool]) -> tuple[StepReport, float | None]:
    """(the last report, after how many seconds it was done)."""
    began_s = time.monotonic()
    for report in one.run(duration_s=seconds):
        if done(report):
            return report, time.monotonic() - began_s
    return report, None


def by_ages() -> None:
    """80 MiB, 16 of them hot: the generations tell them apart, the kernel takes the old ones."""
    enable_memory()
    with cgroup("e2e-reclaim") as group, meme(80, 16, write=True, cgroup=group) as load:
        one = engine(group, "refaults: 100%/min", "mglru")
        report, took_s = until(one, 60, lambda report: load.cold_out() >= 0.9)
        say(
            kind="by-ages",
            took_s=took_s,
            tracker=report.tracker,
            cold_out=load.cold_out(),
            hot_out=load.hot_out(),
            moved=report.moved_bytes_total,
            out=report.paged_out_bytes,
            resident=report.resident_bytes,
            errors=list(report.errors),
            states={name: state.reason for name, state in one.reclaim.states.items()},
        )


def generations() -> None:
    """Memory that nobody touches moves to older generations with every scan, memory in use does not."""
    enable_memory()
    with cgroup("e2e-ages") as group, meme(64, 16, write=True, cgroup=group):
        tracker = MglruTracker(Host(), group)
        for _ in range(3):
            tracker.scan()
            time.sleep(2)
        ages = tracker.ages()
        say(kind="generations", idle=ages.idle_bytes(3.5, files=False), whole=ages.idle_bytes(0.0, files=False))


def by_feedback() -> None:
    """Without ages: a small share goes while nobody waits, and none once what comes back is above the goal."""
    enable_memory()
    with cgroup("e2e-feedback") as group, meme(80, 70, write=True, cgroup=group) as load:
        one = engine(group, "refaults: 1%/min", "none")
        moved: list[int] = []
        paused = 0
        for report in one.run(duration_s=45):
            moved.append(report.moved_bytes_total)
            paused += any(state.paused for state in one.reclaim.states.values())
        say(
            kind="by-feedback",
            moved=moved[-1],
            refaults=report.refault_bytes_total,
            paused=paused,
            hot_out=load.hot_out(),
            tracker=report.tracker,
        )


def protected() -> None:
    """What memory.min guarantees stays, however idle."""
    enable_memory()
    with cgroup("e2e-min") as group, meme(80, 4, write=True, cgroup=group) as load:
        (group / "memory.min").write_text(str(60 * MIB))
        one = engine(group, "refaults: 100%/min", "mglru")
        report, _ = until(one, 25, lambda report: False)
        say(kind="protected", resident=report.resident_bytes, moved=report.moved_bytes_total, cold_out=load.cold_out())


def made_anew() -> None:
    """The cgroup goes while the engine runs, and one of the same name is worked on."""
    enable_memory()
    found: list[float] = []
    one = None
    for _ in range(2):
        with cgroup("e2e-anew") as group, meme(48, 8, write=True, cgroup=group) as load:
            one = one or engine(group, "refaults: 100%/min", "mglru")
            end_s = time.monotonic() + 45
            while time.monotonic() < end_s and load.cold_out() < 0.9:
                _, due_s = one.advance(one.clock.now_s())
                time.sleep(max(0.0, min(1.0, due_s - one.clock.now_s())))
            found.append(load.cold_out())
        one.step()
    assert one is not None
    one.close()
    say(kind="made-anew", cold_out=found)


if __name__ == "__main__":
    main(
        {
            "by-ages": by_ages,
            "generations": generations,
            "by-feedback": by_feedback,
            "protected": protected,
            "made-anew": made_anew,
        }
    )
