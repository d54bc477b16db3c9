"""CPU per GiB of a memtierd daemon that only tracks, ours or the Go one: user and system time over some scans."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.proc import cpu_seconds

_CONFIG = """
policy:
  name: age
  config: |
    intervalms: {interval_ms}
    pidwatcher:
      name: pidlist
      config: |
        pids: [{pid}]
    tracker:
      name: {tracker}
      config: |
        pagesinregion: 512
        maxcountperregion: 0
        scanintervalms: {interval_ms}
"""
INTERVAL_S = 2.0
SCANS = 5
START_S = 6.0
"""Time to start, and for the first scan, which sets up what the others use."""


def memtierd() -> str:
    """Ours, beside this Python or on the path."""
    beside = Path(sys.executable).with_name("memtierd")
    found = str(beside) if beside.exists() else shutil.which("memtierd")
    if found is None:
        raise FileNotFoundError("memtierd is not installed; run `make setup`")
    return found


def go_memtierd() -> Path | None:
    """The Go daemon on PATH: a program of that name that is no script, as ours is. None: there is none."""
    for folder in os.get_exec_path():
        path = Path(folder) / "memtierd"
        if path.is_file() and os.access(path, os.X_OK):
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    return path
    return None


def daemon_cpu_per_gib_s(program: str | Path, tracker: str, pid: int, size_bytes: int) -> float:
    """CPU seconds per GiB and scan that the daemon takes to track `size_bytes` of `pid`.

    Raises:
        RuntimeError: it ended; with its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(_CONFIG.format(interval_ms=int(INTERVAL_S * 1000), pid=pid, tracker=tracker))
        with (Path(folder) / "log").open("w+") as log:
            popen = subprocess.Popen(
                [program, "-config", config, "-prompt"], stdin=subprocess.PIPE, stdout=log, stderr=log
            )
            try:
                time.sleep(START_S)
                before_s = cpu_seconds(Host(), popen.pid)
                time.sleep(INTERVAL_S * SCANS)
                if popen.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"{program} ended with {popen.returncode}: {log.read()[-500:]}")
                return (cpu_seconds(Host(), popen.pid) - before_s) / SCANS / (size_bytes / 2**30)
            finally:
                popen.kill()
                popen.wait()
                assert popen.stdin is not None
                popen.stdin.close()
