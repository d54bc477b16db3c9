"""kill -9 for nri-memtierd at random points of its life, and what became of the containers each time.

No pytest here: the same storm runs on the host and, with the memory controller, in the test VM.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from memtier_engine.hostfs.host import Host
from nri_core import Container, ContainerState, NriError, Pod
from nri_core.testing import FakeRuntime, PluginConnection
from support.cgroups import removed
from support.nri_program import NriMemtierd, swap_class
from support.waiting import WAIT_S, until

CONTAINERS = ("c0", "c1", "c2")
SWAP_MAX = {"c0": "max", "c1": "max", "c2": "0"}
"""As the classes say: what the runtime sets when the plugin asks for it."""
CONFIG = (
    swap_class(interval_ms=100, swap_out_ms=300, bandwidth=20, anchor="engine")
    + """\
    guards: {psimemorynode: null, psiionode: null, startgracems: 0, refaults: null, skip: {rssleast: 1M}}
- name: kept
  allowswap: false
  memtierdconfig: *engine
"""
)
_CLASS = "class.memtierd.nri.io"
POD = Pod("p1", "pod", "default", annotations={_CLASS: "swap", f"{_CLASS}/c2": "kept"})
_KEEPER = """
import mmap, sys, time
size = 6 << 20
held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
held.madvise(mmap.MADV_NOHUGEPAGE)
for at in range(0, size, 4096):
    held[at:at + 8] = (at ^ 0x5a5a5a5a).to_bytes(8, "little")
print("ready", flush=True)
while True:
    time.sleep(0.9)
    for at in range(0, size, 4096):
        if held[at:at + 8] != (at ^ 0x5a5a5a5a).to_bytes(8, "little"):
            sys.exit(3)
"""
"""Leaves its memory alone for a while, so that it is paged out, then reads all of it and checks each page."""


@dataclass
class Storm:
    """What a storm showed."""

    kills: Counter[str] = field(default_factory=Counter)
    """By what the program was doing."""
    adoptions: int = 0
    """Engines of containers that ran already when the program started."""
    swapped_out: int = 0
    """How often something was in swap when the program was killed."""
    complaints: list[str] = field(default_factory=list)


@dataclass
class _Scene:
    nri: NriMemtierd
    runtime: FakeRuntime
    cgroup: Path
    engine: str
    found: Storm = field(default_factory=Storm)
    keepers: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)
    extra: int = 0

    def container(self, name: str, state: ContainerState = ContainerState.RUNNING) -> Container:
        relative = (self.cgroup / name).relative_to(Host().cgroup2_root)
        return Container(f"id-{name}", "p1", name, state, cgroups_path=f"/{relative}")

    def complain(self, text: str) -> None:
        self.found.complaints.append(f"after {self.found.kills.total()} kills: {text}")

    async def life(self, rng: random.Random, start_s: float) -> float:
        """Start it, kill it; returns how long the start took, or `start_s` if it was not to get that far."""
        phase = "starting" if self.found.kills.total() % 3 else "working"
        log_before = len(self.nri.log)
        await self.forget_connections()
        began_s = time.monotonic()
        self.nri.start(f"--engine={self.engine}")
        try:
            if phase == "starting":
                await asyncio.sleep(rng.uniform(0, start_s))
                return start_s
            connection = await self.adopted(log_before)
            took_s = time.monotonic() - began_s
            worker = asyncio.ensure_future(self.churn(connection, rng))
            await asyncio.sleep(rng.uniform(0, 0.5))
            worker.cancel()
            await asyncio.wait({worker})
            return took_s
        finally:
            self.found.swapped_out += any(_swapped(keeper.pid) for keeper in self.keepers.values())
            self.nri.signal(signal.SIGKILL)
            await self.nri.ended()
            self.found.kills[phase] += 1
            self.inspect()

    async def adopted(self, log_before: int) -> PluginConnection:
        """Wait until it is connected and all containers have an engine."""
        connection = await self.runtime.connected(WAIT_S)
        while await _is_closed(connection):  # of a life that ended just when it was connected
            connection = await self.runtime.connected(WAIT_S)
        await self.nri.until(
            lambda: all(f"pod:{name}: engine started" in self.nri.log[log_before:] for name in CONTAINERS)
        )
        self.found.adoptions += len(CONTAINERS)
        if connection.updates:  # they have their values already
            self.complain(f"it wants to set {connection.updates} again")
        return connection

    async def forget_connections(self) -> None:
        """Those of lives that ended just when they were connected: nothing of them comes any more."""
        await asyncio.sleep(0)
        with contextlib.suppress(TimeoutError):
            while True:
                await (await self.runtime.connected(0.01)).wait_closed()

    async def churn(self, connection: PluginConnection, rng: random.Random) -> None:
        """Containers that come and go while it is killed."""
        with contextlib.suppress(NriError):
            while True:
                self.extra += 1
                name = f"extra{self.extra}"
                container = self.container(name, ContainerState.CREATED)
                (self.cgroup / name).mkdir()
                await connection.create_container(POD, container)
                await connection.notify("StartContainer", POD, container)
                await asyncio.sleep(rng.uniform(0, 0.1))
                await connection.stop_container(POD, container)
                (self.cgroup / name).rmdir()

    def inspect(self) -> None:
        """Whether the containers are as they were; their processes check their memory themselves."""
        for name, keeper in self.keepers.items():
            if (status := keeper.poll()) is not None:
                self.complain(f"the process of {name} ended with {status}")
                continue
            lines = Path(f"/proc/{keeper.pid}/status").read_text().splitlines()
            facts = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            if facts["State"][0] not in "SRD" or facts["TracerPid"] != "0":
                self.complain(f"the process of {name} is {facts['State']}, traced by {facts['TracerPid']}")
        after = self.settings()
        for path in sorted(self.before.keys() | after.keys()):
            if self.before.get(path) != after.get(path):
                self.complain(f"{path} is {after.get(path)!r}, was {self.before.get(path)!r}")

    def settings(self) -> dict[str, str]:
        """What can be set in the containers' cgroups, and which processes are in them."""
        found = {}
        for name in CONTAINERS:
            for path in (self.cgroup / name).iterdir():
                if path.is_file() and path.stat().st_mode & 0o200 and path.stat().st_mode & 0o400:
                    if path.name.endswith((".pressure", ".peak")):
                        continue
                    with contextlib.suppress(OSError):
                        found[f"{name}/{path.name}"] = path.read_text()
        return found

    async def end(self) -> None:
        """One more start, adoption, engines at work, and the containers stop."""
        await self.forget_connections()
        log_before = len(self.nri.log)
        self.nri.start(f"--engine={self.engine}")
        connection = await self.adopted(log_before)
        if self.engine == "process":
            await self.nri.until(lambda: len(self.nri.children()) == len(CONTAINERS))
        elif self.nri.children():
            self.complain("an engine in a process of its own")
        await self.nri.until(lambda: any(_swapped(keeper.pid) for keeper in self.keepers.values()))
        names = {Path(name).parts[2] for name in self.nri.files()}
        if names != set(CONTAINERS):
            self.complain(f"the run directory has files of {sorted(names)}")
        for name in CONTAINERS:
            await connection.stop_container(POD, self.container(name))
        await self.nri.until(lambda: not self.nri.namespaces())
        await self.nri.until(lambda: self.nri.children() == [])
        self.nri.signal(signal.SIGTERM)
        if await self.nri.ended() != 0:
            self.complain("it did not end well in the end")
        self.inspect()


async def storm(base: Path, cgroup: Path, points: int, *, engine: str = "in-process", seed: int = 7) -> Storm:
    """Kill it `points` times.

    Args:
        base: an empty directory for its files.
        cgroup: an empty one, for the containers; with the memory controller on for its children, or without.
        engine: in-process, or process.
        seed: of the random points.
    """
    rng = random.Random(seed)
    async with FakeRuntime(base / "nri.sock", pods=[POD], request_timeout_s=WAIT_S) as runtime:
        nri = NriMemtierd(base, runtime.path, Host().cgroup2_root)
        nri.config.write_text(CONFIG)
        scene = _Scene(nri, runtime, cgroup, engine)
        try:
            with _keepers(scene):
                runtime.containers = [scene.container(name) for name in CONTAINERS]
                fds_before = len(os.listdir("/proc/self/fd"))
                start_s = 2.0
                for _ in range(points):
                    start_s = await scene.life(rng, start_s)
                await scene.end()
                await nri.until(lambda: len(os.listdir("/proc/self/fd")) <= fds_before)
        finally:
            nri.close()
    return scene.found


@contextlib.contextmanager
def _keepers(scene: _Scene) -> Iterator[None]:
    try:
        for name in CONTAINERS:
            (scene.cgroup / name).mkdir()
            limit = scene.cgroup / name / "memory.swap.max"
            if limit.exists():  # as the runtime would, asked by the plugin at its creation
                limit.write_text(SWAP_MAX[name])
            keeper = subprocess.Popen([sys.executable, "-c", _KEEPER], stdout=subprocess.PIPE, text=True)
            scene.keepers[name] = keeper
            (scene.cgroup / name / "cgroup.procs").write_text(str(keeper.pid))
        for keeper in scene.keepers.values():
            assert keeper.stdout is not None
            keeper.stdout.readline()
        scene.before = scene.settings()
        yield
    finally:
        for keeper in scene.keepers.values():
            keeper.kill()
            keeper.communicate()
        for inner in scene.cgroup.iterdir():
            if inner.is_dir():
                until(partial(removed, inner), f"{inner} is still in use")


async def _is_closed(connection: PluginConnection) -> bool:
    try:
        await asyncio.wait_for(connection.wait_closed(), 0.05)
    except TimeoutError:
        return False
    return True


def _swapped(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/status").read_text().partition("VmSwap:")[2].split()[0]) > 0
    return False
