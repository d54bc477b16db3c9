"""Our memtierd beside the Go one, with the same configurations: scans and moves in the test VM, memory here.

An emulated machine has no absolute times worth a word: each round has both daemons, in turns, and the median of the
rounds' ratios counts. The Go daemon is a `memtierd` on PATH that is no script, linked statically: it runs in the VM.
Its account of a scan is the reading of pages alone; ours has ages, statistics and the clearing of the bits in it, so
the CPU time of all that a daemon does between two scans is compared too.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

from bench.bench_nri_memtierd import node
from bench.go_guest import CONFIG, INTERVAL_MS, ROUNDS, Daemon, memory_mib, moves, workload
from bench.go_memtierd import go_memtierd, memtierd
from bench.measure import ratio_line
from support.swap import temporary_zram_swap
from support.vm import VmSession

NODES = "3072:0-1"
LIMIT_S = 2400
WALL_LIMITS = {"softdirty": 1.0, "idlepage": 0.7}
INTERVAL_OFF = 0.05
CONTAINERS = (6, 20)
SETTLE_S = 12.0
CONTAINERS_INTERVAL_MS = 10_000
HOST_MIB, HOST_MIB_PER_S = 384, 100


def run() -> bool:
    """Print all lines; True if all limits hold."""
    program = go_memtierd()
    if program is None:
        print("against Go's memtierd: skipped: there is no such program on PATH (a script, as ours is, does not count)")
        return True
    return all([*in_vm(program), *on_host(program), *containers(program)])


def in_vm(program: Path) -> list[bool]:
    """Scans and moves."""
    with ExitStack() as stack:
        out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shutil.copy(program, out / "memtierd")
        result = stack.enter_context(VmSession()).run(
            ["env", "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/out", "python3", "-u", "-m", "bench.go_guest"],
            timeout_s=LIMIT_S,
            nodes=NODES,
            env={"PYTHONPATH": "/host/tests", "PYTHONDONTWRITEBYTECODE": "1"},
            out=out,
        )
    rounds: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for record in result.records():
        rounds[record.pop("tracker"), record.pop("name")].append(record)
    held = [result.status == 0]
    if result.status:
        print(f"the guest ended with status {result.status}: {result.output[-2000:]}", file=sys.stderr)
    for tracker, wall_limit in WALL_LIMITS.items():
        held += lines(tracker, rounds[tracker, "ours"], rounds[tracker, "go"], wall_limit)
    return held


def lines(tracker: str, ours: list[dict[str, float]], theirs: list[dict[str, float]], wall_limit: float) -> list[bool]:
    """One per figure."""
    if not ours or len(ours) != len(theirs):
        print(f"{tracker}: {len(ours)} rounds of ours, {len(theirs)} of Go's")
        return [False]

    def line(name: str, key: str, limit: float, *, unit: str, scale: float = 1.0, at_least: bool = False) -> bool:
        ratio = statistics.median(a[key] / max(b[key], 1e-9) for a, b in zip(ours, theirs, strict=True))
        a, b = (statistics.median(each[key] for each in daemon) * scale for daemon in (ours, theirs))
        return ratio_line(f"{tracker}, {name}", f"{a:.3g} {unit}, Go {b:.3g}", ratio, limit, at_least=at_least)

    off = statistics.median(abs(each["interval_s"] * 1000 / INTERVAL_MS - 1) for each in ours)
    pages = [statistics.median(each["pages"] for each in daemon) for daemon in (ours, theirs)]
    print(f"{tracker}: pages in the account of a scan: {pages[0]:.0f}, Go {pages[1]:.0f}")
    return [
        line("wall time of a scan", "wall_s", wall_limit, unit="ms", scale=1e3),
        line("CPU time of a scan and what comes with it", "cpu_s", 1.0, unit="ms", scale=1e3),
        ratio_line(f"{tracker}, interval off by", f"{off:.1%}", off, INTERVAL_OFF),
        line("moved", "mib_per_s", 1.0, unit="MiB/s", at_least=True),
        line("user CPU per GiB moved", "user_s_per_gib", 1.0, unit="s"),
        line("system CPU per GiB moved", "system_s_per_gib", 1.1, unit="s"),
        line("memory of one process, at the end", "end_mib", 4.0, unit="MiB"),
        line("memory of one process, peak", "peak_mib", 4.0, unit="MiB"),
    ]


def on_host(program: Path) -> list[bool]:
    """What it costs to page out to zram at a rate: without an emulator, and whatever the kernel has for trackers.

    Where the kernel has no soft-dirty bits, Go's tracker of them finds everything idle, which it is but for one MiB.
    """
    spent: dict[str, list[dict[str, float]]] = {"ours": [], "go": []}
    with temporary_zram_swap(1 << 30):
        for turn in range(ROUNDS):
            for name in spent if turn % 2 == 0 else reversed(spent):
                with workload(1, HOST_MIB) as pid:
                    config = CONFIG.format(
                        interval_ms=4000,
                        swap_out_ms=5000,
                        pid=pid,
                        tracker="auto" if name == "ours" else "softdirty",
                        bandwidth=HOST_MIB_PER_S,
                    )
                    daemon = Daemon(memtierd() if name == "ours" else program, config)
                    try:
                        spent[name].append(moves(daemon, pid, HOST_MIB))
                    finally:
                        daemon.close()
    held = []
    for key, name in (("user_s_per_gib", "user"), ("system_s_per_gib", "system")):
        ours, theirs = ([each[key] for each in spent[who]] for who in ("ours", "go"))
        ratio = statistics.median(a / max(b, 1e-9) for a, b in zip(ours, theirs, strict=True))
        value = f"{statistics.median(ours):.2f} s, Go {statistics.median(theirs):.2f}"
        held.append(ratio_line(f"host, {HOST_MIB_PER_S} MiB/s to zram, {name} CPU per GiB", value, ratio, 1.1))
    return held


def containers(program: Path) -> list[bool]:
    """PSS of one Go daemon per container against that of one nri-memtierd for all."""
    held = []
    ours = asyncio.run(_ours_mib())
    for count in CONTAINERS:
        with ExitStack() as stack:
            sleepers = [subprocess.Popen(["sleep", "3600"]) for _ in range(count)]
            for sleeper in sleepers:
                stack.callback(sleeper.wait)
                stack.callback(sleeper.kill)
            daemons = [Daemon(program, _sleepers(sleeper.pid), cpu=None) for sleeper in sleepers]
            for daemon in daemons:
                stack.callback(daemon.close)
            time.sleep(SETTLE_S)
            theirs = sum(_pss_mib(daemon.pid) for daemon in daemons)
        what = f"PSS for {count} containers: one nri-memtierd, {count} Go daemons"
        held.append(ratio_line(what, f"{ours[count]:.1f} MiB, Go {theirs:.1f}", ours[count] / theirs, 1.0))
    return held


def _sleepers(pid: int) -> str:
    """The configuration of a daemon for one container: as that of ours for all, with a tracker that any kernel has."""
    return CONFIG.format(
        interval_ms=CONTAINERS_INTERVAL_MS, swap_out_ms=60_000_000, pid=pid, tracker="softdirty", bandwidth=50
    )


async def _ours_mib() -> dict[int, float]:
    found = {}
    async with node() as made:
        for count in CONTAINERS:
            await made.manage(count)
            await asyncio.sleep(SETTLE_S)
            found[count] = _pss_mib(made.program.pid)
    return found


def _pss_mib(pid: int) -> float:
    return memory_mib(Path(f"/proc/{pid}/smaps_rollup"), "Pss")
