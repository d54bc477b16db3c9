"""What the scenarios in the guest share: workloads, cgroups, engines, and looking at pagemap.

Runs in the test VM with the installed wheels. Workload and engine share a vCPU: an emulated CPU keeps its TLB
until a context switch, and an access through a stale entry leaves no trace in the page table.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from saying import say

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap

CGROUPS = Path("/sys/fs/cgroup")


def share_out(pid: int, ranges: list[tuple[int, int]]) -> float:
    """Share of the address ranges that is swapped out."""
    starts = np.array([start for start, _ in ranges], np.uint64)
    ends = np.array([end for _, end in ranges], np.uint64)
    with Pagemap(Host(), pid) as pagemap:
        return pagemap.swapped_bytes(starts, ends) / float((ends - starts).sum())


def wait_for(condition: Callable[[], bool], timeout_s: float) -> float | None:
    """Seconds until `condition` held; None if it did not in time."""
    began_s = time.monotonic()
    while time.monotonic() - began_s < timeout_s:
        if condition():
            return time.monotonic() - began_s
        time.sleep(0.5)
    return None


@dataclass
class Meme:
    """A memory exerciser: hot is what it reads or writes all the time, cold the rest of its array."""

    popen: subprocess.Popen[str]
    hot: list[tuple[int, int]] = field(default_factory=list)
    cold: list[tuple[int, int]] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def hot_out(self) -> float:
        return share_out(self.pid, self.hot)

    def cold_out(self) -> float:
        return share_out(self.pid, self.cold)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


@contextlib.contextmanager
def meme(
    size_mib: int, hot_mib: int, *, write: bool = False, cgroup: Path | None = None, cpu: int = 0
) -> Iterator[Meme]:
    """`memtier-meme` with one array of `size_mib`, `hot_mib` of it in use, pinned to a CPU."""
    kind = "w" if write else "r"
    other = "r" if write else "w"
    command = ["taskset", "-c", str(cpu), "memtier-meme", "-bs", f"{size_mib}M", "-ttl", "1h"]
    command += [f"-b{kind}c", "1", f"-b{kind}s", f"{hot_mib}M", f"-b{kind}i", "400ms", f"-b{other}c", "0"]
    command += [f"-b{other}s", "0"]
    popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=_joiner(cgroup))
    made = Meme(popen)
    assert popen.stdout is not None
    try:
        array: tuple[int, int] | None = None
        for line in popen.stdout:
            if found := re.match(r"\s*array: ([0-9a-f]+)-([0-9a-f]+) ", line):
                array = int(found[1], 16), int(found[2], 16) + 1
            if found := re.match(r"start exerciser \d+: \w+ ([0-9a-f]+)-([0-9a-f]+) ", line):
                made.hot = [(int(found[1], 16) & ~4095, (int(found[2], 16) + 1 + 4095) & ~4095)]
                break
        assert array is not None, "memtier-meme did not tell its array"
        if made.hot:
            made.cold = [(made.hot[0][1], array[1] & ~4095)]
        # Each round writes a line: unread, the pipe would fill and stop the exerciser.
        threading.Thread(target=popen.stdout.read, daemon=True).start()
        yield made
    finally:
        with contextlib.suppress(ProcessLookupError):
            popen.kill()
        popen.wait()


def _joiner(cgroup: Path | None) -> Callable[[], None] | None:
    if cgroup is None:
        return None
    return lambda: (cgroup / "cgroup.procs").write_text("0") and None  # type: ignore[return-value]


@contextlib.contextmanager
def cgroup(name: str) -> Iterator[Path]:
    """A cgroup that is removed afterwards; its processes must be gone by then."""
    path = CGROUPS / name
    path.mkdir()
    try:
        yield path
    finally:
        (path / "cgroup.kill").write_text("1")
        wait_for(lambda: not (path / "cgroup.procs").read_text(), 10)
        path.rmdir()


AGE_CONFIG = """
policy:
  name: age
  config: |
    intervalms: {interval_ms}
    swapoutms: {swap_out_ms}
    pidwatcher:
      name: {watcher}
      config: |
        {watcher_config}
    tracker:
      name: {tracker}
      config: |
        pagesinregion: 512
        maxcountperregion: 1
        scanintervalms: {interval_ms}
    mover:
      intervalms: 20
      bandwidth: 100
"""


@contextlib.contextmanager
def memtierd(
    tracker: str, *, pids: list[int] | None = None, cgroups: list[Path] | None = None, cpu: int = 0
) -> Iterator[subprocess.Popen[str]]:
    """The daemon with a configuration file in the reference's form."""
    watched = f"pids: {pids}" if pids else f"cgroups: {json.dumps([str(path) for path in cgroups or []])}"
    text = AGE_CONFIG.format(
        interval_ms=1000,
        swap_out_ms=4000,
        watcher="pidlist" if pids else "cgroups",
        watcher_config=watched if pids else "intervalms: 1000\n        " + watched,
        tracker=tracker,
    )
    path = Path(f"/tmp/memtierd-{os.getpid()}-{time.monotonic_ns()}.yaml")
    path.write_text(text)
    log = open(f"{path}.log", "w")  # noqa: SIM115
    popen = subprocess.Popen(
        ["taskset", "-c", str(cpu), "memtierd", "-config", str(path)],
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield popen
    finally:
        if popen.poll() is None:
            popen.terminate()
            try:
                popen.wait(60)
            except subprocess.TimeoutExpired:
                popen.kill()
                say(kind="problem", text="memtierd did not end within 60 s of SIGTERM")
        popen.wait()
        log.close()
        output = Path(log.name).read_text()
        if popen.returncode not in (0, -signal.SIGKILL) or "Traceback" in output:
            say(kind="problem", text=f"memtierd ended with {popen.returncode}: {output[-2000:]}")


def daemon_log(last: int = 1500) -> str:
    """The end of what the `memtierd` that was started last has logged."""
    return max(Path("/tmp").glob("memtierd-*.log"), key=lambda path: path.stat().st_mtime).read_text()[-last:]


def swap_used() -> int:
    """Bytes in use on all swap areas."""
    rows = Path("/proc/swaps").read_text().splitlines()[1:]
    return sum(int(row.split()[3]) * 1024 for row in rows)


def main(scenarios: dict[str, Callable[[], None]]) -> None:
    """Run the scenarios named on the command line; exit 1 at the first that raises."""
    os.sched_setaffinity(0, {0})
    for name in sys.argv[1:] or list(scenarios):
        print(f"SCENARIO {name}", flush=True)
        scenarios[name]()
