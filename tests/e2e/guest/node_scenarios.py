"""Many containers under one node's engines, on a kernel with the idle page bitmap."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from saying import say
from scene import cgroup, main, share_out, wait_for

from memtier_engine.engine.loop import Engine, EngineConfig
from memtier_engine.engine.node import Node, NodeConfig
from memtier_engine.engine.runner import Runner
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.page_idle import IdleBitmap
from memtier_engine.mover.mover import MoverConfig
from memtier_engine.policies.age import AgePolicyConfig
from memtier_engine.targets.cgroups import CgroupsTarget

CONTAINERS = 30
COLD_MIB = 3
INTERVAL_S = 12
SHARE = 0.4
"""Of an emulated CPU, which is some thirty times slower than a real one."""


class Load:
    """A forked child with 3 MiB of cold memory and a hot set of its own size, in a cgroup of its own."""

    def __init__(self, directory: Path, hot_pages: int) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._work(directory, hot_pages, writing)
            finally:
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            self.cold, self.hot = (tuple(each) for each in json.loads(pipe.readline()))

    def _work(self, directory: Path, hot_pages: int, writing: int) -> None:
        (directory / "cgroup.procs").write_text("0")
        areas = []
        for size in (COLD_MIB << 20, hot_pages * 4096):
            area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            area.madvise(mmap.MADV_NOHUGEPAGE)
            for at in range(0, size, 4096):
                area[at : at + 8] = at.to_bytes(8, "little")
            start = ctypes.addressof(ctypes.c_char.from_buffer(area))
            areas.append((area, (start, start + size)))
        os.write(writing, (json.dumps([where for _, where in areas]) + "\n").encode())
        hot = areas[1][0]
        while True:
            for at in range(0, len(hot), 4096):
                hot[at] = 1
            time.sleep(0.3)

    def cold_out(self) -> float:
        return share_out(self.pid, [self.cold])

    def hot_out(self) -> float:
        return share_out(self.pid, [self.hot])


def counted(calls: dict[str, int], name: str, method: Callable[..., object]) -> Callable[..., object]:
    def call(self: IdleBitmap, numbers: np.ndarray) -> object:
        calls[name] += 1
        calls[f"{name}_words"] += len(numbers)
        return method(self, numbers)

    return call


def thirty() -> None:
    """All cold parts out, no hot part; the bitmap is read in one pass for all, within the scan budget."""
    calls = {"read": 0, "read_words": 0}
    IdleBitmap.read_words = counted(calls, "read", IdleBitmap.read_words)  # type: ignore[method-assign,assignment]
    host = Host()
    with contextlib.ExitStack() as stack:
        directories = [stack.enter_context(cgroup(f"thirty-{number}")) for number in range(CONTAINERS)]
        loads = [Load(directory, 40 + 10 * number) for number, directory in enumerate(directories)]
        node = Node(NodeConfig(bandwidth_mib_per_s=200, scan_cpu_share=SHARE), host=host)
        runner = Runner(workers=1)
        reports: dict[int, int] = dict.fromkeys(range(CONTAINERS), 0)
        policy = AgePolicyConfig(interval_ms=INTERVAL_S * 1000, swap_out_ms=2 * INTERVAL_S * 1000)
        config = EngineConfig(
            tracker="idlepage",
            scan_interval_ms=INTERVAL_S * 1000,
            policy=policy,
            mover=MoverConfig(bandwidth_mib_per_s=50),
        )
        runner.start()
        engines = [Engine(CgroupsTarget(host, [directory]), config, host=host) for directory in directories]
        began_s = time.monotonic()
        for number, engine in enumerate(engines):

            def on_report(report: object, number: int = number) -> None:
                reports[number] += 1

            node.run(runner, engine, cgroups=[directories[number]], on_report=on_report)
        out_s = wait_for(lambda: min(load.cold_out() for load in loads) >= 0.95, 150)
        calls_before, rounds_before, scans_before = dict(calls), node.shared["idlepage"].rounds, dict(reports)
        cpu_before, then_s = time.process_time(), time.monotonic()
        time.sleep(2.5 * INTERVAL_S * node.scans.factor)
        cpu_share = (time.process_time() - cpu_before) / (time.monotonic() - then_s)
        say(
            kind="thirty",
            out_s=out_s,
            cold_out=[round(load.cold_out(), 3) for load in loads],
            hot_out=[round(load.hot_out(), 3) for load in loads],
            rounds=node.shared["idlepage"].rounds - rounds_before,
            scans=[reports[number] - scans_before[number] for number in range(CONTAINERS)],
            reads=calls["read"] - calls_before["read"],
            words=calls["read_words"] - calls_before["read_words"],
            cpu_share=cpu_share,
            budget=SHARE,
            factor=node.scans.factor,
            seconds=time.monotonic() - began_s,
        )
        runner.stop()
        node.close()
        for load in loads:
            os.kill(load.pid, signal.SIGKILL)
            os.waitpid(load.pid, 0)


main({"thirty": thirty})
