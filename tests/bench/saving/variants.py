"""The ways to take memory that are compared, each as a context: it works on one cgroup while the context is open."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from memtier_engine.hostfs.host import Host

HERE = Path(__file__).parent
IDLE_S = 10
"""Age policy and DAMON_RECLAIM take what was idle for so long. All times here are a tenth of usual ones."""
REFAULT_GOAL = "2%/min"
"""A tenth of the time means ten times the rate: 0.2 %/min is the default."""
DAMON = Path("/sys/module/damon_reclaim/parameters")


@dataclass(frozen=True, slots=True)
class Scene:
    """What a variant works on."""

    cgroup: Path
    folder: Path
    """For its files."""


CpuSeconds = Callable[[], float]
"""CPU time that the variant has used so far."""
Open = Callable[[Scene], AbstractContextManager[CpuSeconds]]


def process_cpu_s(pid: int) -> float:
    """User and system time of a process or kernel thread."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def has_memory_controller(host: Host | None = None) -> bool:
    """Whether cgroups of the cgroup v2 tree can have memory.reclaim."""
    host = host or Host()
    return "memory" in (host.cgroup2_root / "cgroup.controllers").read_text().split()


def _needs_controller() -> str | None:
    if has_memory_controller():
        return None
    return "the memory controller is not on cgroup v2 here, so there is no memory.reclaim"


def _needs_damon_reclaim() -> str | None:
    return None if DAMON.exists() else "the kernel is built without CONFIG_DAMON_RECLAIM"


@contextmanager
def _nothing(scene: Scene) -> Iterator[CpuSeconds]:
    yield lambda: 0.0


@contextmanager
def _program(command: list[str], log: Path) -> Iterator[CpuSeconds]:
    with log.open("wb") as output:
        popen = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield lambda: process_cpu_s(popen.pid)
        if popen.poll() is not None:
            raise RuntimeError(f"{command[0]} ended: {log.read_text()[-2000:]}")
    finally:
        popen.terminate()
        try:
            popen.wait(10)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()


def _indented(text: str, columns: int) -> str:
    return "".join(f"{' ' * columns}{line}\n" for line in text.splitlines())


def engine_config(policy: str, own: str, cgroup: str) -> str:
    """A configuration file of memtierd. Guards on the whole node are off: it does other work meanwhile."""
    guards = "guards:\n  psimemorynode: null\n  psiionode: null\n"
    if policy == "reclaim":
        own += f"cgroups: [{cgroup}]\nmover:\n  bandwidth: 100\n"
        return f"policy:\n  name: reclaim\n  config: |\n{_indented(own, 4)}{guards}"
    target = f"pidwatcher:\n  name: cgroups\n  config: |\n    intervalms: 1000\n    cgroups: [{cgroup}]\n"
    tracker = "tracker:\n  name: auto\n  config: |\n    scanintervalms: 1000\n"
    mover = "mover:\n  intervalms: 10\n  bandwidth: 100\n"
    return f"policy:\n  name: {policy}\n  config: |\n{_indented(own + target + tracker + mover, 4)}{guards}"


def _engine(policy: str, own: str) -> Open:
    @contextmanager
    def variant(scene: Scene) -> Iterator[CpuSeconds]:
        file = scene.folder / f"{policy}.yaml"
        relative = scene.cgroup.relative_to(Host().cgroup2_root)
        file.write_text(engine_config(policy, own, f"/sys/fs/cgroup/{relative}"))
        with _program([memtierd(), "-config", str(file)], scene.folder / f"{policy}.log") as cpu:
            yield cpu

    return variant


def memtierd() -> str:
    """The program, beside this Python or on the path."""
    beside = Path(sys.executable).with_name("memtierd")
    found = str(beside) if beside.exists() else shutil.which("memtierd")
    if found is None:
        raise FileNotFoundError("memtierd is not installed; run `make setup`")
    return found


@contextmanager
def _senpai(scene: Scene) -> Iterator[CpuSeconds]:
    with _program([sys.executable, str(HERE / "senpai.py"), str(scene.cgroup)], scene.folder / "senpai.log") as cpu:
        yield cpu


@contextmanager
def _damon_reclaim(scene: Scene) -> Iterator[CpuSeconds]:
    """It knows no cgroups: it works on the whole machine, whatever the free memory."""
    values = {
        "min_age": IDLE_S * 1_000_000,
        "quota_ms": 100,
        "quota_sz": 100 << 20,
        "quota_reset_interval_ms": 1000,
        "wmarks_interval": 1_000_000,
        "wmarks_high": 1000,
        "wmarks_mid": 999,
        "wmarks_low": 0,
        "sample_interval": 5000,
        "aggr_interval": 100_000,
        "min_nr_regions": 100,
        "max_nr_regions": 1000,
    }
    for name, value in values.items():
        (DAMON / name).write_text(str(value))
    (DAMON / "enabled").write_text("Y")
    try:
        thread = _wait_for_thread()
        yield lambda: process_cpu_s(thread)
    finally:
        (DAMON / "enabled").write_text("N")


def _wait_for_thread() -> int:
    for _ in range(100):
        pid = int((DAMON / "kdamond_pid").read_text())
        if pid > 0:
            return pid
        time.sleep(0.05)
    raise RuntimeError("DAMON_RECLAIM did not start")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way."""

    title: str
    run: Open
    why_not: Callable[[], str | None] = lambda: None
    """Why it cannot run here."""


VARIANTS: Mapping[str, Variant] = {
    "none": Variant("no engine", _nothing),
    "age": Variant(f"policy age, {IDLE_S} s", _engine("age", f"intervalms: 1000\nswapoutms: {IDLE_S * 1000}\n")),
    "auto": Variant(
        f"policy auto, refaults: {REFAULT_GOAL}",
        _engine("auto", f'goal: "refaults: {REFAULT_GOAL}"\nintervalms: 1000\nwindowms: 6000\nidleleastms: 3000\n'),
    ),
    "reclaim": Variant(
        f"policy reclaim, refaults: {REFAULT_GOAL}",
        _engine(
            "reclaim",
            f'goal: "refaults: {REFAULT_GOAL}"\nintervalms: 1000\nwindowms: 6000\nidleleastms: {IDLE_S * 1000}\n',
        ),
        _needs_controller,
    ),
    "senpai": Variant("senpai loop", _senpai, _needs_controller),
    "damon-reclaim": Variant("DAMON_RECLAIM", _damon_reclaim, _needs_damon_reclaim),
}
