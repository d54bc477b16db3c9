"""nri-memtierd with many containers: how fast it answers, what a node pays for 1, 10 and 100 engines.

The program runs as a process of its own, with a FakeRuntime at its socket; each container is a real cgroup with a
small process in it, scanned every 10 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.bench_nri import synchronize
from bench.measure import ratio_line
from memtier_engine.hostfs.host import Host
from nri_core import Container, Pod
from nri_core.testing import FakeRuntime, PluginConnection
from support.cgroups import temporary_cgroup
from support.nri_program import NriMemtierd, swap_class

CALLS = 300
MANAGED = (0, 50, 500)
ENGINES = (1, 10, 100)
RSS_LIMIT_MIB = 80
CPU_LIMIT = 0.02
CPU_WINDOW_S = 30.0
HOOK_LIMIT_MS = 100.0
CONFIG = swap_class(interval_ms=10_000, swap_out_ms=60_000_000, mover_interval_ms=20, bandwidth=50)
POD = Pod("p1", "pod", "default", annotations={"class.memtierd.nri.io": "swap"})


@dataclass
class Node:
    """The program, connected, and the containers it manages."""

    program: NriMemtierd
    connection: PluginConnection
    cgroup: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def make(self, name: str) -> Container:
        """A container that runs."""
        directory = self.cgroup / name
        directory.mkdir()
        process = subprocess.Popen(["sleep", "3600"])
        self.processes.append(process)
        (directory / "cgroup.procs").write_text(str(process.pid))
        relative = directory.relative_to(Host().cgroup2_root)
        return Container(f"id-{name}", "p1", name, cgroups_path=f"/{relative}")

    async def manage(self, count: int) -> None:
        """Have `count` engines."""
        while len(self.processes) < count:
            await self.connection.notify("StartContainer", POD, self.make(f"n{len(self.processes)}"))
        await self.program.until(lambda: self.program.log.count("engine started") >= count, 120)

    def rss_mib(self) -> float:
        """Resident memory of the program."""
        for line in Path(f"/proc/{self.program.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmRSS")

    def cpu_s(self) -> float:
        """CPU time of the program so far, user and system."""
        fields = Path(f"/proc/{self.program.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.asynccontextmanager
async def node(request_timeout_s: float = 2.0) -> AsyncIterator[Node]:
    """The program and a runtime; everything is taken away at the end."""
    with tempfile.TemporaryDirectory() as base, temporary_cgroup("bench-nri") as cgroup:
        async with FakeRuntime(Path(base) / "nri.sock", request_timeout_s=request_timeout_s) as runtime:
            program = NriMemtierd(Path(base), runtime.path, Host().cgroup2_root)
            program.arguments[-1] = "-v"  # as deployed
            program.config.write_text(CONFIG)
            program.start()
            made = Node(program, await runtime.connected(20), cgroup)
            try:
                yield made
            finally:
                program.close()
                for process in made.processes:
                    process.kill()
                    process.wait()
                for directory in cgroup.iterdir():
                    if directory.is_dir():
                        directory.rmdir()


def run() -> bool:
    """Print all lines; True if all limits hold."""
    return asyncio.run(_run())


async def _run() -> bool:
    results = []
    async with node(request_timeout_s=10) as made:
        results.append(await synchronize(made.connection, lambda number: POD.annotations if number % 50 == 0 else {}))
    baseline_ms = 0.0
    async with node() as made:
        for count in ENGINES:
            await made.manage(count)
            await asyncio.sleep(12)  # each has scanned
            rss = made.rss_mib()
            results.append(ratio_line(f"resident memory, {count} engines", f"{rss:.1f} MiB", rss / RSS_LIMIT_MIB, 1.0))
        before_s, began_s = made.cpu_s(), time.monotonic()
        await asyncio.sleep(CPU_WINDOW_S)
        share = (made.cpu_s() - before_s) / (time.monotonic() - began_s)
        results.append(ratio_line("CPU of 100 engines at 10 s", f"{share * 100:.2f} % of a core", share, CPU_LIMIT))
    async with node() as made:
        for count in MANAGED:
            await made.manage(count)
            times_ms = sorted([await _hook_ms(made, number) for number in range(CALLS)])
            p50, p99 = times_ms[CALLS // 2], times_ms[CALLS * 99 // 100]
            baseline_ms = baseline_ms or p50
            results.append(
                ratio_line(
                    f"CreateContainer and StartContainer, {count} managed",
                    f"p50 {p50:.2f} ms ({p50 / baseline_ms:.2f} x none), p99 {p99:.2f} ms",
                    p99 / HOOK_LIMIT_MS,
                    1.0,
                )
            )
    return all(results)


async def _hook_ms(made: Node, number: int) -> float:
    """The slower of both hooks, for a container that has no cgroup: no engine comes of it."""
    container = Container(f"id-x{number}", "p1", f"x{number}", cgroups_path=f"/absent/x{number}")
    slowest_s = 0.0
    for call in (
        made.connection.create_container(POD, container),
        made.connection.notify("StartContainer", POD, container),
    ):
        began_s = time.perf_counter()
        await call
        slowest_s = max(slowest_s, time.perf_counter() - began_s)
    await made.connection.stop_container(POD, container)
    return slowest_s * 1000
