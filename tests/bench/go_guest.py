"""Guest side of `bench go`: one daemon at a time, ours or Go's, beside a program that uses a part of its memory.

The program and the daemon have a CPU each. First the daemon only scans; then what was idle for long enough goes out.
Each daemon prints one JSON object per round and tracker; `bench_go` makes ratios of them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.go_memtierd import go_memtierd, memtierd

TOUCHED_MIB, IDLE_MIB = 96, 160
WORKLOAD_CPU, DAEMON_CPU = 0, 1
ROUNDS = 3
INTERVAL_MS = 4000
SCANS = 4
"""Measured, after the first two, which set up what the others use."""
SWAP_OUT_MS = (SCANS + 5) * INTERVAL_MS
MOST_S = 120.0
ALMOST_ALL = 0.95
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROGRAM = """
import mmap, os, sys, time
os.sched_setaffinity(0, {int(sys.argv[3])})
areas = []
block = os.urandom(2048) + bytes(2048)
for size in (int(sys.argv[1]) << 20, int(sys.argv[2]) << 20):
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    for at in range(0, size, 4096):
        area[at:at + 4096] = block
    areas.append(area)
print("ready", flush=True)
value = 0
while True:
    value = value + 1 & 255
    areas[0][::4096] = bytes((value,)) * (len(areas[0]) // 4096)
    time.sleep(0.2)
"""
CONFIG = """
policy:
  name: age
  config: |
    intervalms: {interval_ms}
    swapoutms: {swap_out_ms}
    pidwatcher:
      name: pidlist
      config: |
        pids: [{pid}]
    tracker:
      name: {tracker}
      config: |
        pagesinregion: 512
        maxcountperregion: 1
        scanintervalms: {interval_ms}
    mover:
      intervalms: 20
      bandwidth: {bandwidth}
"""


@contextmanager
def workload(touched_mib: int = TOUCHED_MIB, idle_mib: int = IDLE_MIB) -> Iterator[int]:
    """Its pid: it writes to a part of its memory again and again."""
    arguments = (str(each) for each in (touched_mib, idle_mib, WORKLOAD_CPU))
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
    finally:
        process.kill()
        process.wait()


class Daemon:
    """A memtierd with a prompt, on a CPU of its own."""

    def __init__(self, program: str | Path, config: str, cpu: int | None = DAEMON_CPU) -> None:
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "config.yaml"
        path.write_text(config)
        self._log = (Path(self._folder.name) / "log").open("w+b")
        command: list[str | Path] = [program, "-config", path, "-prompt"]
        if cpu is not None:
            command = ["taskset", "-c", str(cpu), *command]
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT)
        self.pid = self._popen.pid

    def ask(self, command: str, pattern: str) -> re.Match[str] | None:
        """The match in what comes after the command; None: none within some seconds."""
        assert self._popen.stdin is not None
        at = os.fstat(self._log.fileno()).st_size
        self._popen.stdin.write(command.encode() + b"\n")
        self._popen.stdin.flush()
        end_s = time.monotonic() + 5
        while time.monotonic() < end_s:
            text = os.pread(self._log.fileno(), 1 << 20, at).decode(errors="replace")
            if found := re.search(pattern, text, re.MULTILINE):
                return found
            if self._popen.poll() is not None:
                raise RuntimeError(f"the daemon ended: {text[-500:]}")
            time.sleep(0.05)
        return None

    def cpu_s(self) -> tuple[float, float]:
        """(user, system)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) / _TICKS_PER_S, int(fields[12]) / _TICKS_PER_S

    def status_mib(self, key: str) -> float:
        """VmRSS, VmHWM."""
        return memory_mib(Path(f"/proc/{self.pid}/status"), key)

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait()
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        self._log.close()
        self._folder.cleanup()


def memory_mib(path: Path, key: str) -> float:
    """A line `KEY: N kB` of a file in /proc."""
    for line in path.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no {key} in {path}")


def scans_of(daemon: Daemon, pid: int) -> tuple[int, int, float]:
    """(scans, pages, seconds of all) by the daemon's own account; none yet: zeros."""
    row = daemon.ask("stats -t memory_scans -f csv", rf"^(?:.*> )?{pid},(\d+),(\d+),([\d.]+),")
    return (0, 0, 0.0) if row is None else (int(row[1]), int(row[2]), int(row[1]) * float(row[3]))


def until_scans(daemon: Daemon, pid: int, least: int) -> tuple[tuple[int, int, float], float]:
    """The account as soon as there were so many scans, and when that was."""
    end_s = time.monotonic() + MOST_S
    while time.monotonic() < end_s:
        found = scans_of(daemon, pid)
        if found[0] >= least:
            return found, time.monotonic()
        time.sleep(0.05)
    raise RuntimeError(f"no {least} scans within {MOST_S:.0f} s")


def beside(program: str | Path, tracker: str) -> dict[str, float]:
    """One daemon, one round."""
    with workload() as pid:
        config = CONFIG.format(interval_ms=INTERVAL_MS, swap_out_ms=SWAP_OUT_MS, pid=pid, tracker=tracker, bandwidth=50)
        daemon = Daemon(program, config)
        try:
            first, began_s = until_scans(daemon, pid, 2)
            cpu_s = sum(daemon.cpu_s())
            last, ended_s = until_scans(daemon, pid, first[0] + SCANS)
            scans = last[0] - first[0]
            found = {
                "pages": (last[1] - first[1]) / scans,
                "wall_s": (last[2] - first[2]) / scans,
                "interval_s": (ended_s - began_s) / scans,
                "cpu_s": (sum(daemon.cpu_s()) - cpu_s) / scans,
            }
            return found | moves(daemon, pid, IDLE_MIB) | {"end_mib": daemon.status_mib("VmRSS")}
        finally:
            daemon.close()


def moves(daemon: Daemon, pid: int, idle_mib: int) -> dict[str, float]:
    """From the first page that goes out to nearly the last of `idle_mib`."""
    status, end_s = Path(f"/proc/{pid}/status"), time.monotonic() + MOST_S
    while not (before_mib := memory_mib(status, "VmSwap")):
        if time.monotonic() > end_s:
            raise RuntimeError("nothing went out")
        time.sleep(0.02)
    began_s, (user_s, system_s) = time.monotonic(), daemon.cpu_s()
    while (out_mib := memory_mib(status, "VmSwap")) < ALMOST_ALL * idle_mib and time.monotonic() < end_s:
        time.sleep(0.02)
    took_s, (user_end_s, system_end_s) = time.monotonic() - began_s, daemon.cpu_s()
    moved_mib = out_mib - before_mib
    return {
        "mib_per_s": moved_mib / took_s,
        "user_s_per_gib": (user_end_s - user_s) * 1024 / moved_mib,
        "system_s_per_gib": (system_end_s - system_s) * 1024 / moved_mib,
        "peak_mib": daemon.status_mib("VmHWM"),
    }


def main() -> None:
    """Three rounds, in turns."""
    theirs = go_memtierd()
    assert theirs is not None
    programs = {"go": theirs, "ours": Path(memtierd())}
    for tracker in ("softdirty", "idlepage"):
        for turn in range(ROUNDS):
            for name in programs if turn % 2 == 0 else reversed(programs):
                found = beside(programs[name], tracker)
                print(json.dumps({"kind": "daemon", "name": name, "tracker": tracker, **found}), flush=True)


if __name__ == "__main__":
    main()
