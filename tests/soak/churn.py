"""nri-memtierd in a node full of change: 20 containers that come and go, processes that start and exit in them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from memtier_cli.nri_memtierd.health import STATUS_NAME
from memtier_cli.nri_memtierd.rundir import MARKER_NAME
from memtier_engine.hostfs.host import Host
from nri_core import Container, Pod
from nri_core.testing import FakeRuntime, PluginConnection
from soak.nursery import Nursery
from soak.verdict import Sample
from support.cgroups import temporary_cgroup
from support.nri_program import NriMemtierd
from support.swap import temporary_zram_swap

CONTAINERS = 20
BIRTHS_PER_S = 3.0
LIFE_S = (1.0, 15.0)
MIB = (1, 6)
CONTAINER_LIFE_S = (8.0, 60.0)
SAMPLE_S = 2.0
TELL_S = 30.0
_ENGINE = """
    policy:
      name: age
      config:
        intervalms: 1000
        swapoutms: 2500
        pidwatcher: {name: cgroups, config: {cgroups: [$CGROUP2_ABS_PATH]}}
        tracker: {name: %s, config: {scanintervalms: 1000}}
        mover: {intervalms: 20, bandwidth: 100}
    guards: {psimemorynode: null, psiionode: null, startgracems: 0, skip: {rssleast: 1M}}
"""
CONFIG = f"""
classes:
- name: swap
  allowswap: true
  memtierdconfig:{_ENGINE % "auto"}
- name: mappings
  allowswap: true
  memtierdconfig:{_ENGINE % "refs"}
- name: track
  memtierdconfig:{_ENGINE % "auto"}
    routines:
    - name: statactions
      config:
        intervalms: 2000
        intervalcommand: [policy, -dump, accessed, "0,1s,1m,0"]
        intervalcommandrunner: memtier
"""
CLASSES = ("swap", "swap", "mappings", "track")


@dataclass
class Run:
    """What a soak saw."""

    samples: list[Sample] = field(default_factory=list)
    idle: list[Sample] = field(default_factory=list)
    """Without containers: before, after."""
    containers: int = 0
    births: int = 0
    paged_out: bool = False
    leftovers: tuple[str, ...] = ()
    log_errors: tuple[str, ...] = ()


@dataclass
class _Node:
    nri: NriMemtierd
    connection: PluginConnection
    cgroup: Path
    nursery: Nursery
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def sample(self) -> Sample:
        return sample(self.nri.pid)

    async def container(self, life_s: float) -> None:
        """One container's life."""
        number = next(self.numbers)
        pod = Pod(
            f"p{number}",
            f"pod{number % (2 * CONTAINERS)}",  # names come again
            "default",
            annotations={"class.memtierd.nri.io": CLASSES[number % len(CLASSES)]},
        )
        directory = self.cgroup / f"c{number}"
        directory.mkdir()
        relative = directory.relative_to(Host().cgroup2_root)
        container = Container(f"id-{number}", pod.id, "main", cgroups_path=f"/{relative}")
        await self.connection.create_container(pod, container)
        await self.connection.notify("StartContainer", pod, container)
        end_s = time.monotonic() + life_s
        while (left_s := end_s - time.monotonic()) > 0:
            self.nursery.bear(directory, random.randint(*MIB), random.uniform(*LIFE_S))
            await asyncio.sleep(min(left_s, random.expovariate(BIRTHS_PER_S / CONTAINERS)))
        if number % 3:  # else it dies before the runtime says so
            await self.connection.stop_container(pod, container)
        while directory.exists():
            with contextlib.suppress(OSError):
                (directory / "cgroup.kill").write_text("1")
                directory.rmdir()
            await asyncio.sleep(0.05)
        await self.connection.stop_container(pod, container)
        await self.connection.notify("RemoveContainer", pod, container)

    async def place(self, until_s: float) -> None:
        """One of the places for containers, taken again and again."""
        while (left_s := until_s - time.monotonic()) > 0:
            await self.container(min(left_s, random.uniform(*CONTAINER_LIFE_S)))

    async def empty(self) -> Sample:
        """The program when nothing is left to do."""
        await self.nri.until(lambda: not self.nri.namespaces(), 30)
        await asyncio.sleep(3)  # a step that was going on ends, and its engine is closed
        return self.sample()


def sample(pid: int) -> Sample:
    """A process now."""
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    memory_kib = sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap"))
    return Sample(time.monotonic(), memory_kib << 10, len(list((process / "fd").iterdir())), int(status["Threads"]))


def soak(minutes: float, tell: Callable[[str], None] = print) -> Run:
    """Run the churn. `tell` gets a line now and then."""
    return asyncio.run(_soak(minutes, tell))


async def _soak(minutes: float, tell: Callable[[str], None]) -> Run:
    found = Run()
    with (
        tempfile.TemporaryDirectory() as base,
        temporary_zram_swap(512 << 20),
        temporary_cgroup("soak") as cgroup,
        Nursery() as nursery,
    ):
        async with FakeRuntime(Path(base) / "nri.sock") as runtime:
            nri = NriMemtierd(Path(base), runtime.path, Host().cgroup2_root)
            nri.arguments[-1] = "-v"
            nri.config.write_text(CONFIG)
            nri.start()
            try:
                node = _Node(nri, await runtime.connected(20), cgroup, nursery)
                # What is made once and kept is made now.
                await asyncio.gather(*(node.container(6.0) for _ in CLASSES))
                found.idle.append(await node.empty())
                end_s = time.monotonic() + minutes * 60
                places = asyncio.gather(*(node.place(end_s) for _ in range(CONTAINERS)))
                told_s = 0.0
                while not places.done():
                    await asyncio.sleep(SAMPLE_S)
                    now = node.sample()
                    found.paged_out = found.paged_out or _paged_out(cgroup)
                    if now.at_s < end_s:
                        found.samples.append(now)
                    if now.at_s - told_s >= TELL_S:
                        told_s = now.at_s
                        tell(f"{now.memory_bytes / 2**20:.1f} MiB, {now.fds} fds, {now.threads} threads")
                await places
                found.idle.append(await node.empty())
                found.containers, found.births = next(node.numbers), nursery.births
                own = {MARKER_NAME, STATUS_NAME}  # the program's, as long as it runs
                found.leftovers = tuple(path.name for path in nri.runs.rglob("*") if path.name not in own)
                found.log_errors = tuple(
                    line for line in nri.log.splitlines() if "Traceback" in line or "| ERROR" in line
                )
            finally:
                nri.close()
    return found


def _paged_out(cgroup: Path) -> bool:
    """Whether any process in the containers has memory in swap."""
    for path in cgroup.glob("*/cgroup.procs"):
        with contextlib.suppress(OSError):
            for pid in path.read_text().split():
                text = Path(f"/proc/{pid}/status").read_text()
                if int(text.partition("VmSwap:")[2].split()[0]) > 0:
                    return True
    return False
