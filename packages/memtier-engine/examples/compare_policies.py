"""Record what a process touches, then ask what policies would have saved. No root: it watches itself.

Run it: python compare_policies.py [SECONDS]
"""

import mmap
import sys
import tempfile
import threading
import time
from pathlib import Path

from new_policy import KeepPolicy

from memtier_engine import Engine, EngineConfig
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.lab.simulate import Simulation
from memtier_engine.lab.trace import TraceRecorder, read_trace
from memtier_engine.policies.age import AgePolicy, AgePolicyConfig
from memtier_engine.policies.ratio import RatioPolicy, RatioPolicyConfig

HOT_MIB, COLD_MIB = 4, 60


class Own:
    """This process as a target; the targets of the engine leave it out."""

    def poll(self):  # type: ignore[no-untyped-def]
        return frozenset({process_id(Host(), Host().own_pid)})


def write(area: mmap.mmap, mib: int) -> None:
    for at in range(0, mib << 20, mmap.PAGESIZE):
        area[at] = 1


seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
hot, cold = mmap.mmap(-1, HOT_MIB << 20, private), mmap.mmap(-1, COLD_MIB << 20, private)
write(cold, COLD_MIB)
stop = threading.Event()


def work() -> None:
    while not stop.wait(0.02):
        write(hot, HOT_MIB)


threading.Thread(target=work, daemon=True).start()
time.sleep(1.1)  # the engine leaves processes alone that are younger than a second
interval_ms = int(seconds * 1000 / 20)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "own.trace"
    with TraceRecorder(path) as recorder:
        config = EngineConfig(tracker="userfault", scan_interval_ms=interval_ms, dry_run=True)
        for _ in Engine(Own(), config, observers=[recorder]).run(duration_s=seconds):
            pass
    stop.set()
    for idle_scans in (2, 5, 10):
        idle_ms = idle_scans * interval_ms
        age = AgePolicy(AgePolicyConfig(interval_ms=interval_ms, swap_out_ms=idle_ms))
        print(f"idle for {idle_ms} ms:", Simulation().run(read_trace(path), age).text())
    print("keep 20 MiB:", Simulation().run(read_trace(path), KeepPolicy(20 << 20)).text())
    simulation = Simulation()
    half = RatioPolicy(RatioPolicyConfig(interval_ms=interval_ms, ratio=0.5), simulation)
    print("half:", simulation.run(read_trace(path), half).text())
