"""The program nri-memtierd as administrators treat it: signals at any time, logs that nobody reads, odd files."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nri_core import Container, Pod
from nri_core.testing import FakeRuntime

PROGRAM = (sys.executable, "-c", "import sys; from memtier_cli.nri_memtierd.start import main; sys.exit(main())")
CLASS = "class.memtierd.nri.io"
POD = Pod("p1", "web-7f8c9d6b5-abcde", "default", annotations={CLASS: "swap"})


class Program:
    """One run. What it writes is in `log`, or in `pipe` if that was asked for."""

    def __init__(self, base: Path) -> None:
        self.base = base
        (base / "cg").mkdir()
        (base / "cg" / "cgroup.procs").write_text("")
        self.config = base / "c.yaml"
        self.config.write_text("classes:\n- name: swap\n  allowswap: true\n")
        self.process: subprocess.Popen[bytes] | None = None

    def start(
        self, *more: str, stderr: int | None = None, program: tuple[str, ...] = PROGRAM
    ) -> subprocess.Popen[bytes]:
        arguments = [
            "-idx", "45", "-name", "nri-memtierd", "-config", str(self.config), "-run-dir", str(self.base / "run"),
            "-cgroups-dir", str(self.base / "cg"), "-socket", str(self.base / "nri.sock"), *more,
        ]  # fmt: skip
        with (self.base / "log").open("ab") as log:
            self.process = subprocess.Popen([*program, *arguments], stderr=log if stderr is None else stderr)
        return self.process

    @property
    def log(self) -> str:
        return (self.base / "log").read_text()

    def until(self, text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in self.log:
            assert time.monotonic() < deadline, self.log
            assert self.process is not None
            assert self.process.poll() is None, self.log
            time.sleep(0.05)

    def end(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(60)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    made = Program(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


SLOW_START = """
import sys, time, builtins
real = builtins.__import__
def slow(name, *rest):
    if name == {module!r} and not slow.told:
        slow.told = True
        print("importing", file=sys.stderr, flush=True)
        time.sleep({seconds})
    return real(name, *rest)
slow.told = False
builtins.__import__ = slow
from memtier_cli.nri_memtierd.start import main
sys.exit(main())
"""


@pytest.mark.parametrize("module", ["memtier_cli.nri_memtierd.program", "asyncio", "memtier_cli.nri_memtierd.fleet"])
def test_told_to_end_while_it_starts_it_ends_well(program: Program, module: str) -> None:
    """At any point: signals are heard before anything is imported."""
    program.start(program=(sys.executable, "-c", SLOW_START.format(module=module, seconds=60)))
    program.until("importing")
    assert program.end() == 0
    assert "Traceback" not in program.log


@pytest.mark.parametrize("module", ["memtier_cli.nri_memtierd.program", "memtier_cli.nri_memtierd.fleet"])
def test_a_hangup_while_it_starts_does_not_end_it(program: Program, module: str) -> None:
    process = program.start(program=(sys.executable, "-c", SLOW_START.format(module=module, seconds=0.5)))
    program.until("importing")
    process.send_signal(signal.SIGHUP)
    program.until("configuration read from")  # it is done once it serves
    assert program.end() == 0


def test_a_storm_of_signals_ends_with_one_orderly_end(program: Program) -> None:
    process = program.start()
    program.until("trying again")
    for _ in range(500):
        process.send_signal(signal.SIGHUP)
    program.until("configuration read from")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)
    assert process.wait(60) == 0
    assert "Traceback" not in program.log


LOCK_HELD = """
import atexit, sys, threading, time
lock = threading.Lock()
def step():
    with lock:
        time.sleep(600)
threading.Thread(target=step, daemon=True).start()
atexit.register(lock.acquire)
from memtier_cli.nri_memtierd.start import main
sys.exit(main())
"""


def test_a_thread_in_the_middle_of_a_step_with_a_lock_does_not_hold_up_the_end(program: Program) -> None:
    program.start(program=(sys.executable, "-c", LOCK_HELD))
    program.until("trying again")
    assert program.end() == 0


@contextmanager
def full_pipe() -> Iterator[int]:
    """A pipe that nobody reads and that holds nothing more."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"." * 4096)
    except BlockingIOError:
        os.set_blocking(write, True)
    try:
        yield write
    finally:
        os.close(read)
        os.close(write)


def test_a_log_that_nobody_reads_holds_nothing_up(program: Program) -> None:
    """Hooks are answered, the configuration is read, and SIGTERM ends it."""

    async def body(stderr: int) -> None:
        async with FakeRuntime(program.base / "nri.sock", request_timeout_s=60) as runtime:
            process = program.start("-vv", stderr=stderr)
            connection = await runtime.connected(60)
            for number in range(300):
                answer = await connection.create_container(POD, Container(f"c{number}", "p1", "app"))
                assert dict(answer.adjust.linux.resources.unified) == {"memory.swap.max": "max"}
            connection.close()
            connection = await runtime.connected(60)
            await connection.create_container(POD, Container("c", "p1", "app"))
            process.terminate()
            assert await asyncio.to_thread(process.wait, 60) == 0

    with full_pipe() as stderr:
        asyncio.run(body(stderr))


CLOSED = """
import os, sys
for fd in (0, 1, 2):
    os.close(fd)
os.execv(sys.executable, [sys.executable, "-c", {code!r}, *sys.argv[1:]])
"""


def test_without_any_standard_file_it_works_and_logs_into_nobodys_file(program: Program) -> None:
    """A closed number is given to the next file that is opened, such as a container's output."""
    process = program.start(program=(sys.executable, "-c", CLOSED.format(code=PROGRAM[2])))
    status = program.base / "run" / "status.json"
    deadline = time.monotonic() + 60
    while not status.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    assert {os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    assert program.end() == 0
    assert list((program.base / "run").iterdir()) == []


def test_a_log_on_a_full_disk_holds_nothing_up(program: Program) -> None:
    with open("/dev/full", "wb") as disk:
        program.start(stderr=disk.fileno())
    status = program.base / "run" / "status.json"
    deadline = time.monotonic() + 60
    while not (status.exists() and json.loads(status.read_text())["log_lines_lost"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert program.end() == 0


def test_an_error_at_start_with_a_log_that_nobody_reads_still_ends_it(program: Program) -> None:
    program.config.write_text("klasses: []")
    with full_pipe() as stderr:
        assert program.start(stderr=stderr).wait(60) == 1


def test_what_is_wrong_with_the_configuration_is_said_and_outlived(program: Program) -> None:
    program.start()
    program.until("trying again")
    for count, text in enumerate(("classes:\n- name: a\n  memtierdconfig: {policy: {name: 2024-99-99}}\n", "", "[")):
        (program.base / "new").write_text(text)
        (program.base / "new").rename(program.config)
        program.until("the configuration in force stays")
        deadline = time.monotonic() + 60
        while program.log.count("the configuration in force stays") <= count and time.monotonic() < deadline:
            time.sleep(0.05)
    assert program.log.count("the configuration in force stays") == 3
    program.config.write_text("classes: [{name: x}, {name: y}]")
    program.until("2 classes")
    assert program.end() == 0
    assert "Traceback" not in program.log


@pytest.mark.parametrize("how", ["fifo", "directory", "missing", "value"])
def test_a_configuration_that_cannot_be_used_at_start_is_one_line(program: Program, how: str) -> None:
    program.config.unlink()
    if how == "fifo":
        os.mkfifo(program.config)
    elif how == "directory":
        program.config.mkdir()
    elif how == "value":
        program.config.write_text("classes:\n- name: a\n  memtierdconfig: {policy: {name: 2024-99-99}}\n")
    assert program.start().wait(60) == 1
    assert program.log.startswith("nri-memtierd: ")
    assert program.log.count("\n") == 1
    assert not (program.base / "run").exists(), "nothing was touched"


def test_a_name_that_no_runtime_takes_is_one_line_and_nothing_is_touched(program: Program) -> None:
    assert program.start("-name", "a b").wait(60) == 1
    assert program.log.count("\n") == 1
    assert not (program.base / "run").exists()


def test_the_log_can_be_read_by_machines(program: Program) -> None:
    program.start("-log-format", "json")
    program.until("trying again")
    assert program.end() == 0
    for line in program.log.splitlines():
        found = json.loads(line)
        assert {"time", "level", "message"} <= found.keys()
        assert not any(isinstance(value, (dict, list)) for value in found.values())


def test_templates_for_processes_may_run_programs(program: Program) -> None:
    """--engine=process starts a whole memtierd per container: it is checked for what that can do."""
    program.config.write_text(
        """
classes:
- name: a
  memtierdconfig: |
    allowprograms: true
    policy:
      name: age
      config:
        intervalms: 10000
        tracker: {name: refs, config: {scanintervalms: 10000}}
        pidwatcher: {name: cgroups, config: {cgroups: [$CGROUP2_ABS_PATH]}}
    routines:
    - name: statactions
      config: {intervalms: 60000, intervalcommand: [sh, -c, date], intervalcommandrunner: exec}
"""
    )
    assert program.start().wait(60) == 1
    assert "supported here" in program.log
    program.start("-engine", "process")
    program.until("trying again")
    assert program.end() == 0


IMPATIENT = (
    sys.executable,
    "-c",
    "import sys; from memtier_cli.nri_memtierd import health; health.FRESH_S = 7.0\n"
    "from memtier_cli.nri_memtierd.start import main; sys.exit(main())",
)
"""For a probe: a status is fresh for 7 s instead of 20; one is written every 5 s."""


def probe(program: Program, *flags: str, command: tuple[str, ...] = PROGRAM) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *flags, "-run-dir", str(program.base / "run")], capture_output=True, text=True, check=False
    )


def test_a_probe_tells_a_program_that_works_from_one_that_does_not(program: Program) -> None:
    """Without the runtime it is healthy, as a restart would change nothing, and not ready, with the reason."""
    found = probe(program, "--healthy")
    assert found.returncode == 1
    assert "the program does not run" in found.stdout

    async def body() -> None:
        program.start()
        status = program.base / "run" / "status.json"
        program.until("trying again")
        await until(status.exists)
        healthy, ready = probe(program, "--healthy"), probe(program, "--ready")
        assert (healthy.returncode, ready.returncode) == (0, 1), healthy.stdout + ready.stdout
        assert "No such file or directory" in ready.stdout
        async with FakeRuntime(program.base / "nri.sock") as runtime:
            await runtime.connected(60)
            await until(lambda: probe(program, "--ready").returncode == 0)
            assert "connected to containerd v2.3.0, 0 engines" in probe(program, "--ready").stdout
            assert program.process is not None
            program.process.send_signal(signal.SIGSTOP)  # all of it hangs
            await until(lambda: probe(program, "--healthy", command=IMPATIENT).returncode == 1)
            program.process.send_signal(signal.SIGCONT)
            await until(lambda: probe(program, "--healthy").returncode == 0)

    asyncio.run(body())
    assert program.end() == 0
    assert probe(program, "--healthy").returncode == 1


def test_systemd_hears_of_the_start_the_state_and_the_end(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(program.base / "notify"))
        listening.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(program.base / "notify"))
        program.start()
        assert listening.recv(4096) == b"READY=1"
        while not (heard := listening.recv(4096)).startswith(b"WATCHDOG=1"):
            pass
        assert b"STATUS=connecting" in heard
        assert program.end() == 0
        while listening.recv(4096) != b"STOPPING=1":
            pass


async def until(what: Callable[[], object]) -> None:
    async with asyncio.timeout(120):
        while not await asyncio.to_thread(what):  # noqa: ASYNC110  # what another process does
            await asyncio.sleep(0.2)
