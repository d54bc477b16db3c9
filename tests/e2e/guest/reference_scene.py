"""What the scenarios of the reference's suite share: loads, the daemon at its prompt, where pages are, side by side.

As in scene.py, a load and the daemon that watches it share a vCPU. An emulated CPU takes seconds to import Python's
larger modules, so daemons are forked from a process that has them all, and loads need none.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from saying import say

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.locate import PageLocator
from memtier_engine.hostfs.maps import process_id, read_mappings
from memtier_engine.model import SWAP_NODE, Spans

MIB = 1 << 20
ANSWER_S = 60.0
_MARK = "time -now"
# The reference has none; ours would act on a process that stops and goes on, and on how slow an emulated node is.
UNGUARDED = (
    "guards: {refaults: null, swapfill: null, psimemorynode: null, psimemorycgroup: null,"
    " psiionode: null, psiiocgroup: null}\n"
)
_numbers = itertools.count()
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [
        "reference_scene",
        "memtier_cli.memtierd.program",
        "memtier_cli.memtierd.prompt.session",
        "memtier_cli.memtierd.prompt.policy_part",
        "memtier_cli.memtierd.prompt.routine_part",
        "memtier_engine.trackers.idlepage",
        "memtier_engine.trackers.softdirty",
    ]
)


def _be_memtierd(arguments: list[str], cpu: int, stdin: str, stdout: str, stderr: str) -> None:
    os.sched_setaffinity(0, {cpu})
    for number, path, flags in ((0, stdin, os.O_RDONLY), (1, stdout, os.O_WRONLY), (2, stderr, os.O_WRONLY)):
        fd = os.open(path, flags)
        os.dup2(fd, number)
        os.close(fd)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1)
    from memtier_cli.memtierd import program as memtierd

    sys.argv = ["memtierd", *arguments]
    status = memtierd.main()
    sys.stdout.flush()
    os._exit(status)


class Daemon:
    """`memtierd -prompt -echo`, with or without a configuration file. A context manager."""

    def __init__(self, config: str = "", *options: str, cpu: int = 0) -> None:
        base = f"/tmp/e2e-{os.getpid()}-{next(_numbers)}"
        arguments = ["-prompt", "-echo", *options]
        if config:
            Path(f"{base}.yaml").write_text(config)
            arguments += ["-config", f"{base}.yaml"]
        self.log = Path(f"{base}.log")
        self.log.touch()
        os.mkfifo(f"{base}.in")
        os.mkfifo(f"{base}.out")
        self.process = _forks.Process(
            target=_be_memtierd, args=(arguments, cpu, f"{base}.in", f"{base}.out", str(self.log)), daemon=True
        )
        self.process.start()
        self._stdin = open(f"{base}.in", "w")  # noqa: SIM115
        self._stdout = open(f"{base}.out")  # noqa: SIM115
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.output: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):
            self._send("q")
        self.process.join(ANSWER_S)
        if self.process.exitcode is None:
            os.kill(self.process.pid or 0, signal.SIGUSR1)  # where it hangs
            time.sleep(1)
            self.process.kill()
            self.process.join()
        text = "".join(self.output) + self.log.read_text()
        if os.environ.get("E2E_LOGS"):
            print(text, flush=True)
        if self.process.exitcode != 0 or "Traceback" in text:
            say(kind="problem", text=f"memtierd ended with {self.process.exitcode}: {text[-3000:]}")

    def ask(self, line: str) -> str:
        """Send a command; returns what it printed."""
        while not self._lines.empty():
            self._lines.get_nowait()
        self._send(line)
        self._send(_MARK)
        self._until(f"memtierd> {line}")
        answer = self._until(f"memtierd> {_MARK}")
        self._until("")  # what the mark printed
        return "".join(answer)

    def _send(self, line: str) -> None:
        self._stdin.write(line + "\n")
        self._stdin.flush()

    def _until(self, wanted: str) -> list[str]:
        """The lines before the one that is `wanted`, a routine's output perhaps between the prompt and the command.

        Any line will do if it is empty.
        """
        found: list[str] = []
        deadline_s = time.monotonic() + ANSWER_S
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                line = None
            if line is None:
                text = "".join(self.output)[-2000:] + self.log.read_text()[-2000:]
                raise AssertionError(f"no {wanted!r} in:\n{text}")
            if not wanted or line.rstrip("\n") in (wanted, wanted.removeprefix("memtierd> ")):
                return found
            found.append(line)

    def _read(self) -> None:
        for line in self._stdout:
            self.output.append(line)
            self._lines.put(line)
        self._lines.put(None)


_LOAD = """
import ctypes, mmap, sys, time
size, hot, pause = int(sys.argv[1]) << 20, int(sys.argv[2]) << 20, float(sys.argv[3])
area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
if sys.argv[5] == "small":
    area.madvise(mmap.MADV_NOHUGEPAGE)
view = memoryview(area)
view[::4096] = b"1" * (size >> 12)
start = ctypes.addressof(ctypes.c_char.from_buffer(area))
print(start, flush=True)
used, content = view[:hot:4096], b"2" * (hot >> 12)
while True:
    if sys.argv[4] == "write":
        used[:] = content
    elif hot:
        used.tobytes()
    time.sleep(pause)
"""


class Load:
    """A process with one array, of which a part at the beginning is read or written in rounds. A context manager."""

    def __init__(
        self,
        size_mib: int,
        hot_mib: int,
        *,
        write: bool = False,
        cgroup: Path | None = None,
        cpu: int = 0,
        pause_ms: int = 200,
        huge: bool = False,
    ) -> None:
        arguments = [str(size_mib), str(hot_mib), str(pause_ms / 1000), "write" if write else "read"]
        arguments.append("huge" if huge else "small")
        command = ["taskset", "-c", str(cpu), sys.executable, "-S", "-E", "-s", "-c", _LOAD, *arguments]
        self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.popen.stdout is not None
        start = int(self.popen.stdout.readline())
        middle, end = start + hot_mib * MIB, start + size_mib * MIB
        self.hot = [(start, middle)] if hot_mib else []
        self.cold = [(middle, end)]
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text(str(self.pid))

    @property
    def pid(self) -> int:
        return self.popen.pid

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *exc: object) -> None:
        self.popen.kill()
        self.popen.wait()


_locator = threading.local()


def places(pid: int, ranges: list[tuple[int, int]]) -> dict[int, float]:
    """Share of the address ranges on each node; -1 is swap."""
    starts = np.array([start for start, _ in ranges], np.uint64)
    ends = np.array([end for _, end in ranges], np.uint64)
    return _shares(_nodes(pid, Spans(starts, ends)))


def process_places(pid: int) -> dict[int, float]:
    """Share of a process's own memory on each node; -1 is swap. What it shares with others does not count."""
    nodes = _nodes(pid, read_mappings(Host(), pid).tierable())
    return _shares(nodes[nodes >= SWAP_NODE])


def _nodes(pid: int, spans: Spans) -> NDArray[np.int16]:
    if not hasattr(_locator, "value"):
        _locator.value = PageLocator(Host())
    found: NDArray[np.int16] = _locator.value.nodes(process_id(Host(), pid), spans)
    return found


def _shares(nodes: NDArray[np.int16]) -> dict[int, float]:
    values, counts = np.unique(nodes, return_counts=True)
    return {int(value): int(count) / len(nodes) for value, count in zip(values, counts, strict=True)}


def share_on(node: int, load: Load, part: str = "all") -> float:
    """Share of the `hot`, the `cold` or `all` memory of a load that is on `node`; -1 is swap."""
    ranges = {"hot": load.hot, "cold": load.cold, "all": load.hot + load.cold}[part]
    return places(load.pid, ranges).get(node, 0.0)


def together(jobs: Mapping[str, Callable[[], Mapping[str, Any]]]) -> None:
    """Run the jobs side by side; each one's measurements are a JSON line with its name as the kind.

    One that fails says so as a problem, and does not stop the others.
    """

    def run(item: tuple[str, Callable[[], Mapping[str, Any]]]) -> None:
        name, job = item
        began_s = time.monotonic()
        try:
            say(kind=name, **job(), seconds=round(time.monotonic() - began_s, 1))
        except Exception as failure:
            say(kind="problem", text=f"{name}: {type(failure).__name__}: {failure}")

    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(run, jobs.items()))


@contextlib.contextmanager
def setting(path: str, value: str) -> Iterator[None]:
    """A kernel setting for as long as the block lasts."""
    file = Path(path)
    before = file.read_text()
    words = [word for word in before.split() if word.startswith("[")]
    file.write_text(value)
    try:
        yield
    finally:
        file.write_text(words[0].strip("[]") if words else before)


def block(name: str, config: str) -> str:
    """A `name` and `config` mapping in flow style, as values of `tracker:` and `pidwatcher:` are written."""
    return json.dumps({"name": name, "config": config})
