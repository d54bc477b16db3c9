"""The ways to take memory that are compared, each as a context: it works on one cgroup while the context is open."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.go_memtierd import memtierd
from memtier_engine.errors import TrackerUnavailable
from memtier_engine.hostfs.damon import KDAMONDS, DamonAttributes, Kdamond
from memtier_engine.hostfs.host import Host

HERE = Path(__file__).parent
IDLE_S = 10
"""Age policy and DAMON take what was idle for so long. All times here are a tenth of usual ones."""
REFAULT_GOAL = "2%/min"
"""A tenth of the time means ten times the rate: 0.2 %/min is the default."""
DAMON_RECLAIM = Path("/sys/module/damon_reclaim/parameters")


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


def _needs_damon() -> str | None:
    """Of the module only whether it is there: a kernel without it is not set up to let DAMON take memory."""
    if not DAMON_RECLAIM.exists():
        return "the kernel is built without CONFIG_DAMON_RECLAIM"
    try:
        kdamond = Kdamond(Host())
    except TrackerUnavailable as unavailable:
        return str(unavailable)
    try:
        return None if "paddr" in kdamond.operations() else "the kernel is built without CONFIG_DAMON_PADDR"
    finally:
        kdamond.close()


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


@contextmanager
def _senpai(scene: Scene) -> Iterator[CpuSeconds]:
    with _program([sys.executable, str(HERE / "senpai.py"), str(scene.cgroup)], scene.folder / "senpai.log") as cpu:
        yield cpu


@contextmanager
def _damon_pageout(scene: Scene) -> Iterator[CpuSeconds]:
    """What DAMON_RECLAIM does, set up by DAMON's own files. It knows no cgroups: it works on the whole machine.

    Not the module itself: in Linux 6.12 it never has a scheme. `damon_reclaim_apply_parameters()` in
    mm/damon/reclaim.c puts the scheme into the context that is going to run, and then commits a second context
    without schemes over it, which removes it.
    """
    host = Host()
    kdamond = Kdamond(host)
    base = host.path(KDAMONDS) / str(kdamond.number)
    attributes = DamonAttributes(
        sample_us=5_000, aggregation_us=100_000, update_us=1_000_000, regions_min=100, regions_max=1000
    )
    start, end = biggest_memory(Path("/proc/iomem").read_text())
    ages = IDLE_S * 1_000_000 // attributes.aggregation_us
    values: dict[str, object] = {
        "targets/nr_targets": 1,
        "targets/0/regions/nr_regions": 1,
        "targets/0/regions/0/start": start,
        "targets/0/regions/0/end": end,
        "schemes/nr_schemes": 1,
        # From here as in damon_reclaim_new_scheme(), but for the age, and without watermarks: always active.
        "schemes/0/action": "pageout",
        "schemes/0/access_pattern/sz/min": 4096,
        "schemes/0/access_pattern/sz/max": 2**64 - 1,
        "schemes/0/access_pattern/nr_accesses/min": 0,
        "schemes/0/access_pattern/nr_accesses/max": 0,
        "schemes/0/access_pattern/age/min": ages,
        "schemes/0/access_pattern/age/max": 2**32 - 1,
        # Ten times the module's, as times here are a tenth. All memory that is tried counts, free memory, too.
        "schemes/0/quotas/ms": 100,
        "schemes/0/quotas/bytes": 1280 << 20,
        "schemes/0/quotas/reset_interval_ms": 1000,
        "schemes/0/quotas/weights/age_permil": 1,
    }
    try:
        kdamond.configure(attributes, "paddr")
        for name, value in values.items():
            (base / "contexts/0" / name).write_text(str(value))
        (base / "state").write_text("on")
        thread = int((base / "pid").read_text())
        yield lambda: process_cpu_s(thread)
        if not kdamond.running():
            raise RuntimeError("the kernel ended the kdamond")
    finally:
        kdamond.close()


def biggest_memory(iomem: str) -> tuple[int, int]:
    """(start, end) of the largest System RAM in the text of /proc/iomem, which DAMON_RECLAIM watches, too."""
    found = [line.split(" : ")[0].split("-") for line in iomem.splitlines() if line.endswith(" : System RAM")]
    return max(((int(start, 16), int(end, 16) + 1) for start, end in found), key=lambda span: span[1] - span[0])


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
    "damon": Variant(f"DAMON pageout, {IDLE_S} s", _damon_pageout, _needs_damon),
}
