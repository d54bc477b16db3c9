"""What can go wrong on a node while memory is paged out, each for real. Runs in the test VM, where swap is ours alone.

Usage: guard_scenarios.py [NAME ...]. A JSON line per scenario; one that fails says so and the next one goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from saying import say
from scene import CGROUPS, daemon_log, meme, memtierd, swap_used, wait_for

from memtier_engine.engine.loop import Engine, EngineConfig, StepReport
from memtier_engine.guards.base import Thresholds
from memtier_engine.guards.config import GuardsConfig
from memtier_engine.guards.guardset import GuardSet
from memtier_engine.hostfs.cgroup import Cgroup
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.psi import read_pressure
from memtier_engine.model import MoveOutcome
from memtier_engine.mover.mover import MoverConfig
from memtier_engine.policies.age import AgePolicyConfig
from memtier_engine.reclaim.reclaimer import CgroupReclaimer
from memtier_engine.stats.observer import Observer
from memtier_engine.targets.cgroups import CgroupsTarget
from memtier_engine.trackers.mglru import MglruTracker
from support.kill_storm import storm
from support.trials import complaints, judge, trials

MIB = 1 << 20
LIMITS = Thresholds(close_at=15.0, open_at=14.0, hold_s=1.0)
QUIET = GuardsConfig(
    memory_psi_node=None, io_psi_node=None, memory_psi_cgroup=None, io_psi_cgroup=None, start_grace_s=0
)
"""The emulated machine waits for everything: pressure counts only where a scenario is about it."""
_HOLDER = """
import mmap, os, sys, time
open(sys.argv[3] + "/cgroup.procs", "w").write("0")
kind, size = sys.argv[1], int(sys.argv[2]) << 20
held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
noise = os.urandom(1 << 20)
if kind == "noise":
    for at in range(0, size, 1 << 20):
        held[at:at + (1 << 20)] = noise
else:
    for at in range(0, size, 4096):
        held[at:at + 8] = at.to_bytes(8, "little")
print("ready", flush=True)
while kind == "busy":
    for at in range(0, size, 4096):
        held[at + 9] = 1
for _ in sys.stdin:
    if kind == "noise":
        good = all(held[at:at + (1 << 20)] == noise for at in range(0, size, 1 << 20))
    else:
        good = all(held[at:at + 8] == at.to_bytes(8, "little") for at in range(0, size, 4096))
    print("intact" if good else "damaged", flush=True)
"""


@contextlib.contextmanager
def cgroup(name: str) -> Iterator[Path]:
    """A cgroup, removed at the end with what is in it."""
    path = CGROUPS / name
    path.mkdir()
    try:
        yield path
    finally:
        remove(path)


def remove(path: Path) -> None:
    """Kill what is in a cgroup and remove it."""
    for _ in range(400):
        with contextlib.suppress(FileNotFoundError):
            (path / "cgroup.kill").write_text("1")
        with contextlib.suppress(OSError):
            path.rmdir()
        if not path.exists():
            return
        time.sleep(0.05)


@dataclass
class Holder:
    """A process that holds memory."""

    popen: subprocess.Popen[str]

    def out_bytes(self) -> int:
        """Of it, in swap."""
        return int(Path(f"/proc/{self.popen.pid}/status").read_text().partition("VmSwap:")[2].split()[0]) << 10

    def intact(self) -> bool:
        """Whether each page has still what was written to it; brings all back."""
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.write("check\n")
        self.popen.stdin.flush()
        return self.popen.stdout.readline() == "intact\n"


@contextlib.contextmanager
def holder(path: Path, mib: int, kind: str = "idle") -> Iterator[Holder]:
    """In the cgroup; `idle`, `noise` (does not compress) or `busy` (writes to all of it all the time)."""
    popen = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, kind, str(mib), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert popen.stdout is not None
    try:
        if kind != "busy":
            popen.stdout.readline()
        yield Holder(popen)
    finally:
        popen.kill()
        popen.communicate()


@dataclass
class Watched(Observer):
    """An engine in a thread of its own, and what it did."""

    engine: Engine
    reports: list[StepReport] = field(default_factory=list)
    moves: list[tuple[float, int]] = field(default_factory=list)
    failure: str | None = None

    def moved(self, outcome: MoveOutcome) -> None:
        """See `Observer.moved`."""
        if outcome.moved_bytes:
            self.moves.append((time.monotonic(), outcome.moved_bytes))

    @property
    def moved_bytes(self) -> int:
        """Since the start."""
        return sum(size for _, size in self.moves)

    def closed(self) -> list[str]:
        """Names of the guards that are closed."""
        return [state.name for state in self.engine.guards.verdict.states if not state.open]

    def errors(self) -> list[str]:
        """Of all reports."""
        return [error for report in self.reports for error in report.errors]

    def work(self, stop: threading.Event) -> None:
        """Body of the thread."""
        try:
            self.reports += self.engine.run(stop=stop)
        except Exception:
            self.failure = traceback.format_exc()


@contextlib.contextmanager
def engine(
    *paths: Path,
    guards: GuardsConfig = QUIET,
    bandwidth: float | None = None,
    tracker: str = "idlepage",
    scan_ms: int = 500,
    out_ms: int = 1500,
) -> Iterator[Watched]:
    """Pages out what the cgroups have not used for `out_ms`."""
    config = EngineConfig(
        tracker=tracker,
        scan_interval_ms=scan_ms,
        policy=AgePolicyConfig(interval_ms=scan_ms, swap_out_ms=out_ms),
        mover=MoverConfig(bandwidth_mib_per_s=bandwidth),
        guards=guards,
        count_swap_ins=False,
    )
    made = Watched(Engine(CgroupsTarget(Host(), paths), config))
    made.engine.observers.append(made)
    stop = threading.Event()
    thread = threading.Thread(target=made.work, args=(stop,))
    thread.start()
    try:
        yield made
    finally:
        stop.set()
        thread.join(30)
    if made.failure is not None or thread.is_alive():
        raise AssertionError(made.failure or "the engine's thread hangs")


def swap_off(device: str) -> None:
    """Take a swap area away; the kernel brings back what is in it."""
    subprocess.run(["swapoff", device], check=True)


@contextlib.contextmanager
def only_zram(mib: int) -> Iterator[Callable[[], None]]:
    """A zram device is all the swap there is; yields what takes it away."""
    disk = Path("/proc/swaps").read_text().splitlines()[1].split()[0]
    subprocess.run(["swapoff", disk], check=True)
    number = (Path("/sys/class/zram-control/hot_add")).read_text().strip()
    device = f"/dev/zram{number}"
    Path(f"/sys/block/zram{number}/disksize").write_text(str(mib * MIB))
    subprocess.run(["mkswap", device], check=True, capture_output=True)
    subprocess.run(["/usr/sbin/swapon", "-p", "5", device], check=True)
    try:
        yield lambda: swap_off(device)
    finally:
        subprocess.run(["/usr/sbin/swapon", "-p", "10", disk], check=True)
        subprocess.run(["swapoff", device], check=False, capture_output=True)
        Path("/sys/class/zram-control/hot_remove").write_text(number)


def pressure() -> None:
    """Another cgroup, held below what it uses, makes the node wait: moving stops, and goes on afterwards."""
    guards = replace(QUIET, memory_psi_node=LIMITS)
    file = Path("/proc/pressure/memory")
    with cgroup("idle") as idle, cgroup("pressed") as pressed, holder(idle, 96) as cold:
        (pressed / "memory.high").write_text(str(20 * MIB))
        with engine(idle, guards=guards, bandwidth=3) as watched:
            started_s = wait_for(lambda: watched.moved_bytes > 0 and not watched.closed(), 60)
            samples: list[tuple[float, int]] = []
            passed_s = closed_s = None
            with holder(pressed, 40, "busy"):
                end_s = time.monotonic() + 30
                while time.monotonic() < end_s and (closed_s is None or time.monotonic() < closed_s + 3):
                    found = read_pressure(Host(), file)
                    assert found is not None
                    now_s = time.monotonic()
                    samples.append((now_s, found.some.total_us))
                    ago = max((total for at_s, total in samples if at_s <= now_s - 1), default=samples[0][1])
                    if passed_s is None and found.some.total_us - ago >= LIMITS.close_at / 100 * 1e6:
                        passed_s = now_s
                    if closed_s is None and watched.closed():
                        closed_s = now_s
                    time.sleep(0.05)
            reasons = list(watched.engine.guards.verdict.reasons)
            moved, last_s = watched.moved_bytes, watched.moves[-1][0]
            resumed_s = wait_for(lambda: watched.moved_bytes > moved, 60)
        say(
            kind="pressure",
            started=started_s is not None,
            closed=closed_s is not None,
            last_move_after_s=None if passed_s is None else last_s - passed_s,
            reasons=reasons,
            resumed_s=resumed_s,
            intact=cold.intact(),
        )


def swap_full() -> None:
    """Less swap than idle memory: the kernel's reserve stays, and with more swap the rest follows."""
    with cgroup("full") as path, holder(path, 64) as cold, only_zram(32), engine(path) as watched:
        closed_s = wait_for(lambda: "swap-fill" in watched.closed(), 40)
        time.sleep(3)
        used, calls = swap_used(), len(watched.moves)
        time.sleep(3)
        calls_while_full = len(watched.moves) - calls
        with more_swap():
            disk_s = wait_for(lambda: cold.out_bytes() > 50 * MIB, 40)
            intact = cold.intact()
        say(
            kind="swap-full",
            closed_s=closed_s,
            used_bytes=used,
            calls_while_full=calls_while_full,
            errors=watched.errors(),
            rest_out_s=disk_s,
            intact=intact,
        )


@contextlib.contextmanager
def more_swap() -> Iterator[None]:
    """Another zram device of 128 MiB."""
    number = Path("/sys/class/zram-control/hot_add").read_text().strip()
    device = f"/dev/zram{number}"
    Path(f"/sys/block/zram{number}/disksize").write_text(str(128 * MIB))
    subprocess.run(["mkswap", device], check=True, capture_output=True)
    subprocess.run(["/usr/sbin/swapon", "-p", "4", device], check=True)
    try:
        yield
    finally:
        subprocess.run(["swapoff", device], check=True)
        Path("/sys/class/zram-control/hot_remove").write_text(number)


def swap_removed() -> None:
    """The only swap device is taken away while it is written to, and comes back."""
    guards = replace(QUIET, refaults=None)  # what the kernel brings back for a swapoff counts as come back
    with (
        cgroup("removed") as path,
        holder(path, 64) as cold,
        only_zram(256) as take_away,
        engine(path, guards=guards, bandwidth=8) as watched,
    ):
        began = wait_for(lambda: cold.out_bytes() > 16 * MIB, 60) is not None
        take_away()
        left, moved = cold.out_bytes(), watched.moved_bytes
        time.sleep(3)
        moved_without = watched.moved_bytes - moved
        off = {state.name: state.reason for state in watched.engine.guards.verdict.states if not state.active}
        with more_swap():
            again_s = wait_for(lambda: cold.out_bytes() > 40 * MIB, 60)
            intact = cold.intact()
        say(
            kind="swap-removed",
            began=began,
            left_bytes=left,
            moved_without_bytes=moved_without,
            off=off.get("swap-fill"),
            errors=watched.errors(),
            again_s=again_s,
            intact=intact,
        )


def incompressible() -> None:
    """Random data in zram takes as much memory as it frees: paging out stops once that shows."""
    with cgroup("noise") as path, holder(path, 160, "noise") as cold, only_zram(256):
        with engine(path, bandwidth=24) as watched:
            closed_s = wait_for(lambda: "compression" in watched.closed(), 60)
            time.sleep(2)
            moved = watched.moved_bytes
            time.sleep(3)
            more = watched.moved_bytes - moved
            reasons = list(watched.engine.guards.verdict.reasons)
        say(
            kind="incompressible",
            closed_s=closed_s,
            moved_bytes=moved,
            moved_after_bytes=more,
            reasons=reasons,
            intact=cold.intact(),
        )


def recreated() -> None:
    """A cgroup is removed, and made anew under the same name with another process in it."""
    path = CGROUPS / "again"
    path.mkdir()
    guards = replace(QUIET, memory_psi_cgroup=LIMITS)
    with engine(path, guards=guards) as watched:
        with holder(path, 32) as first:
            first_s = wait_for(lambda: first.out_bytes() > 24 * MIB, 40)
        inode = path.stat().st_ino
        remove(path)
        gone_s = wait_for(lambda: watched.reports[-1].processes == 0, 20)
        path.mkdir()
        with holder(path, 48) as second:
            second_s = wait_for(lambda: second.out_bytes() > 36 * MIB, 40)
            last = watched.reports[-1]
            active = {state.name: state.active for state in last.guards}
            say(
                kind="recreated",
                another_inode=path.stat().st_ino != inode,
                first_s=first_s,
                gone_s=gone_s,
                second_s=second_s,
                processes=last.processes,
                paged_out_bytes=last.paged_out_bytes,
                guard_active=active["psi-memory-cgroup"],
                errors=watched.errors(),
                intact=second.intact(),
            )
    remove(path)


def memory_high() -> None:
    """A cgroup throttled at its memory.high is left alone, though another process of it is idle; then it goes on."""
    guards = replace(QUIET, memory_psi_cgroup=LIMITS)
    with cgroup("high") as path, holder(path, 48) as cold, engine(path, guards=guards, bandwidth=2) as watched:
        started_s = wait_for(lambda: watched.moved_bytes > 0, 30)
        with holder(path, 40, "busy"):
            (path / "memory.high").write_text(str(28 * MIB))
            closed_s = wait_for(lambda: "psi-memory-cgroup" in watched.closed(), 40)
            time.sleep(2)
            moved = watched.moved_bytes
            time.sleep(3)
            while_closed = watched.moved_bytes - moved
            reasons = list(watched.engine.guards.verdict.reasons)
            (path / "memory.high").write_text("max")
        with holder(path, 24):  # all else that was idle has been swapped out by the kernel
            resumed_s = wait_for(lambda: watched.moved_bytes > moved, 60)
        say(
            kind="memory-high",
            started=started_s is not None,
            closed_s=closed_s,
            reasons=reasons,
            moved_while_closed_bytes=while_closed,
            resumed_s=resumed_s,
            intact=cold.intact(),
        )


def oom_kill() -> None:
    """A target is killed for want of memory while it is paged out; the next one in its cgroup is taken care of."""
    with cgroup("oom") as path, engine(path, bandwidth=8) as watched:
        (path / "memory.max").write_text(str(48 * MIB))
        (path / "memory.swap.max").write_text(str(24 * MIB))
        with holder(path, 36) as first:
            began_s = wait_for(lambda: watched.moved_bytes > 0, 30)
            with holder(path, 96) as hog:
                wait_for(lambda: hog.popen.poll() is not None or first.popen.poll() is not None, 60)
                kills = Cgroup(path).stat("memory.events").get("oom_kill")
                hog.popen.kill()
            first.popen.kill()
        gone_s = wait_for(lambda: watched.reports[-1].processes == 0, 20)
        with holder(path, 24) as second:
            moved = watched.moved_bytes
            second_s = wait_for(lambda: second.out_bytes() > 12 * MIB, 40)
            say(
                kind="oom-kill",
                began=began_s is not None,
                kills=kills,
                gone_s=gone_s,
                second_s=second_s,
                moved_bytes=watched.moved_bytes - moved,
                errors=watched.errors(),
                intact=second.intact(),
            )


def clock_jumps() -> None:
    """The wall clock goes a day ahead and back again: nobody's memory looks a day older."""
    with (
        cgroup("clock") as path,
        meme(48, 16, write=True, cgroup=path) as load,
        engine(path, scan_ms=1000, out_ms=4000) as watched,
    ):
        cold_s = wait_for(lambda: load.cold_out() > 0.9, 60)
        hot_worst = 0.0
        scans = watched.reports[-1].scans
        for jump_s in (86400, -2 * 86400, 86400):
            time.clock_settime(time.CLOCK_REALTIME, time.time() + jump_s)
            for _ in range(3):
                time.sleep(1)
                hot_worst = max(hot_worst, load.hot_out())
        say(
            kind="clock-jumps",
            cold_s=cold_s,
            hot_out_worst=hot_worst,
            scans=watched.reports[-1].scans - scans,
            cold_out=load.cold_out(),
        )


STOPPED_S = 60


def stopped() -> None:
    """SIGSTOP for a minute, SIGCONT: the daemon takes up its work, and what was in use then stays."""
    with (
        cgroup("stopped") as path,
        meme(48, 16, write=True, cgroup=path) as load,
        memtierd("idlepage", cgroups=[path]) as daemon,
    ):
        cold_s = wait_for(lambda: load.cold_out() > 0.9, 90)
        os.kill(daemon.pid, signal.SIGSTOP)
        with holder(path, 24) as late:
            time.sleep(STOPPED_S)
            out_meanwhile = late.out_bytes()
            os.kill(daemon.pid, signal.SIGCONT)
            hot_worst = 0.0
            for _ in range(6):
                time.sleep(0.5)
                hot_worst = max(hot_worst, load.hot_out())
            late_s = wait_for(lambda: late.out_bytes() > 16 * MIB, 150)  # a guard may close for half a minute
            hot_worst = max(hot_worst, load.hot_out())
            say(
                kind="stopped",
                cold_s=cold_s,
                out_meanwhile_bytes=out_meanwhile,
                hot_out_worst=hot_worst,
                late_s=late_s,
                alive=daemon.poll() is None,
                intact=late.intact(),
                log=daemon_log(),
            )


def mglru_reclaim() -> None:
    """Idle memory shows in the generations, and is what memory.reclaim takes."""
    with cgroup("mglru") as path, holder(path, 64):
        tracker = MglruTracker(Host(), path)
        begun = 0
        for _ in range(3):
            begun += tracker.scan()
            time.sleep(1.5)
        ages = tracker.ages()
        reclaimer = CgroupReclaimer(path, MoverConfig(bandwidth_mib_per_s=None), Host(), now_s=time.monotonic())
        reclaimer.replace(32 * MIB)
        reclaimed = swapped = 0
        while (wait_s := reclaimer.wait_s()) is not None:
            outcome = reclaimer.pump(time.monotonic())
            if outcome is not None:
                reclaimed += outcome.reclaimed_bytes
                swapped += outcome.swapped_bytes or 0
            time.sleep(wait_s)
        say(
            kind="mglru-reclaim",
            begun=begun,
            idle_bytes=ages.idle_bytes(1.0, files=False),
            reclaimed_bytes=reclaimed,
            swapped_bytes=swapped,
            swap_current_bytes=Cgroup(path).read_int("memory.swap.current"),
        )


def protection() -> None:
    """memory.low of the real kernel is the headroom's floor."""
    with cgroup("low") as path, holder(path, 48):
        (path / "memory.low").write_text(str(32 * MIB))
        guards = GuardSet(replace(QUIET), host=Host(), cgroups=[path])
        current = Cgroup(path).read_int("memory.current")
        headroom = guards.check(0).out_bytes_max
        (path / "memory.low").write_text("max")
        verdict = guards.check(10)
        guards.close()
        say(
            kind="protection",
            current_bytes=current,
            headroom_bytes=headroom,
            closed=[state.name for state in verdict.states if not state.open],
        )


PRIVILEGED = (
    "idlepage", "softdirty", "damon", "refs", "finder", "mglru", "page-out", "move-pages", "memory-reclaim"
)  # fmt: skip


def privileges() -> None:
    """With exactly the capabilities of the table, and without each of them."""
    found: dict[str, list[str]] = {}
    with cgroup("rights") as path, trials(path) as scene:
        for component in PRIVILEGED:
            found[component] = complaints(component, judge(scene, component, node=1))
    say(kind="privileges", complaints=found)


def kills() -> None:
    """kill -9 for nri-memtierd where memory.swap.max is real."""
    with cgroup("kills") as path, tempfile.TemporaryDirectory() as base:
        (path / "cgroup.subtree_control").write_text("+memory")
        found = asyncio.run(storm(Path(base), path, 2))
        say(
            kind="kills",
            kills=found.kills.total(),
            adoptions=found.adoptions,
            swapped_out=found.swapped_out,
            complaints=found.complaints,
        )


SCENARIOS: dict[str, Callable[[], None]] = {
    "pressure": pressure,
    "memory-high": memory_high,
    "swap-full": swap_full,
    "swap-removed": swap_removed,
    "incompressible": incompressible,
    "recreated": recreated,
    "oom-kill": oom_kill,
    "clock-jumps": clock_jumps,
    "stopped": stopped,
    "mglru-reclaim": mglru_reclaim,
    "protection": protection,
    "privileges": privileges,
    "kills": kills,
}


def run(names: list[str]) -> None:
    """The named scenarios, or all."""
    os.sched_setaffinity(0, {0})
    for name in names or list(SCENARIOS):
        began_s = time.monotonic()
        try:
            SCENARIOS[name]()
        except BaseException:
            problem: dict[str, Any] = {"kind": name, "problem": traceback.format_exc()}
            say(**problem)
        print(f"{name}: {time.monotonic() - began_s:.1f} s", flush=True)


if __name__ == "__main__":
    run(sys.argv[1:])
