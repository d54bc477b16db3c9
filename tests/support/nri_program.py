"""Runs the program nri-memtierd as a child process against a FakeRuntime, and waits for what it does."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from support.waiting import WAIT_S

PROGRAM = (sys.executable, "-c", "import sys; from memtier_cli.nri_memtierd.program import main; sys.exit(main())")


def swap_class(
    *, interval_ms: int, swap_out_ms: int, mover_interval_ms: int = 10, bandwidth: int, anchor: str = ""
) -> str:
    """A configuration's first class, `swap`: policy age pages out after `swap_out_ms`, at `bandwidth` MiB/s.

    `anchor` names what the class sets, for other classes to use. More lines may follow, of the class or of others.
    """
    return f"""
classes:
- name: swap
  allowswap: true
  memtierdconfig:{anchor and f" &{anchor}"}
    policy:
      name: age
      config:
        intervalms: {interval_ms}
        swapoutms: {swap_out_ms}
        pidwatcher: {{name: cgroups, config: {{cgroups: [$CGROUP2_ABS_PATH]}}}}
        tracker: {{name: auto, config: {{scanintervalms: {interval_ms}}}}}
        mover: {{intervalms: {mover_interval_ms}, bandwidth: {bandwidth}}}
"""


class NriMemtierd:
    """One run of the program. Its log is `log`."""

    def __init__(self, base: Path, socket: Path, cgroup_root: Path, *, program: Sequence[str] = PROGRAM) -> None:
        self.base = base
        self.program = program
        self.runs = base / "run"
        self.log_path = base / "log"
        self.config = base / "config.yaml"
        self.arguments = [
            "-idx", "45", "-name", "nri-memtierd", "-config", str(self.config), "-run-dir", str(self.runs),
            "-cgroups-dir", str(cgroup_root), "--socket", str(socket), "-vv",
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str, env: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()) -> None:
        """Start it; the log is appended to."""
        # memtierd of the same environment, for --engine=process
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.program, *self.arguments, *more],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": path, **(env or {})},
                pass_fds=pass_fds,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        """What it wrote so far, all runs together."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    def files(self) -> list[str]:
        """All files of containers in the run directory, by their path below it."""
        return sorted(str(path.relative_to(self.runs)) for path in self.runs.glob("*/**/*") if path.is_file())

    def namespaces(self) -> list[str]:
        """What is in the run directory besides the program's own files."""
        return sorted(path.name for path in self.runs.iterdir() if path.is_dir())

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    async def until(self, what: Callable[[], object], timeout_s: float = WAIT_S) -> None:
        """Wait for a condition; fails with the log."""
        end_s = time.monotonic() + timeout_s
        while not what():
            if time.monotonic() > end_s:
                raise AssertionError(f"not within {timeout_s:g} s; log:\n{self.log[-6000:]}")
            await asyncio.sleep(0.05)

    async def ended(self, timeout_s: float = WAIT_S) -> int:
        """Wait for its end; returns the exit status."""
        process = self.process
        assert process is not None
        await self.until(lambda: process.poll() is not None, timeout_s)
        assert process.returncode is not None
        return process.returncode

    def close(self) -> None:
        """End it, and what it launched."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pid in self.children():
            os.kill(pid, signal.SIGKILL)

    def children(self) -> list[int]:
        """memtierd processes with a file in the run directory, whoever their parent is."""
        found = []
        needle = os.fsencode(self.runs) + b"/"
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != self.process_id():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if b"-config" in words and any(
                    word.startswith(needle) and word.endswith(b"memtierd.config.yaml") for word in words
                ):
                    found.append(int(entry.name))
        return sorted(found)

    def process_id(self) -> int | None:
        """The program's own pid, if it was started."""
        return None if self.process is None else self.process.pid
