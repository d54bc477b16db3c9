"""Engines in this process and engines as processes: what they may still do after the end, and to whom."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from memtier_cli.nri_memtierd.config import PluginConfig
from memtier_cli.nri_memtierd.container_cgroup import ContainerCgroup
from memtier_cli.nri_memtierd.launch import inprocess as inprocess_module
from memtier_cli.nri_memtierd.launch import process as process_module
from memtier_cli.nri_memtierd.launch.base import Job
from memtier_cli.nri_memtierd.launch.inprocess import InProcessLauncher, PinnedTarget
from memtier_cli.nri_memtierd.launch.process import ProcessLauncher, find_leftovers
from memtier_cli.nri_memtierd.rundir import CONFIG_NAME, PID_NAME, ContainerDirectory, Place, RunDirectory
from memtier_engine.hostfs.host import Host
from memtier_engine.model import ProcessId

PLACE = Place("ns", "pod", "c0")
TEXT = """
policy:
  name: age
  config:
    intervalms: 50
    pidwatcher: {{name: cgroups, config: {{cgroups: [{cgroup}]}}}}
    tracker: {{name: refs, config: {{scanintervalms: 50}}}}
"""


WAITS = "import sys; sys.stdin.read()"


def until(what: Callable[[], object]) -> None:
    end_s = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.fixture
def run_directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def cgroup(tmp_path: Path) -> ContainerCgroup:
    path = tmp_path / "cgroup"
    path.mkdir()
    (path / "cgroup.procs").write_text("")
    return ContainerCgroup(path, path.stat().st_ino)


def a_job(run_directory: RunDirectory, cgroup: ContainerCgroup, text: str = TEXT) -> Job:
    return Job("ns/pod:c0", text.format(cgroup=cgroup.path), cgroup, run_directory.create(PLACE))


class Target:
    def __init__(self, during: Callable[[], None] = lambda: None) -> None:
        self.during = during

    def poll(self) -> frozenset[ProcessId]:
        self.during()
        return frozenset({ProcessId(7, 1)})


def replaced(cgroup: ContainerCgroup) -> None:
    """The container ended, and another cgroup was made under its name."""
    cgroup.path.rename(cgroup.path.with_name("gone"))  # kept: its inode must not be handed out again
    cgroup.path.mkdir()


def test_processes_of_a_later_cgroup_of_the_same_name_are_not_touched(cgroup: ContainerCgroup) -> None:
    assert PinnedTarget(Target(), cgroup).poll() == {ProcessId(7, 1)}
    replaced(cgroup)
    assert PinnedTarget(Target(), cgroup).poll() == frozenset()


def test_nor_if_it_is_replaced_while_the_target_reads(cgroup: ContainerCgroup) -> None:
    """The second look: what was read in between may be the other one's."""
    assert PinnedTarget(Target(lambda: replaced(cgroup)), cgroup).poll() == frozenset()


def test_a_target_whose_cgroup_is_gone_is_not_even_read(cgroup: ContainerCgroup) -> None:
    def refuse() -> None:
        raise AssertionError("what is there now is somebody else's")

    replaced(cgroup)
    assert PinnedTarget(Target(refuse), cgroup).poll() == frozenset()


def test_a_pinned_target_tells_the_run_time_where_the_target_knows_it(cgroup: ContainerCgroup) -> None:
    class Timed(Target):
        def run_time_us(self) -> int:
            return 5

    assert PinnedTarget(Timed(), cgroup).run_time_us() == 5
    assert PinnedTarget(Target(), cgroup).run_time_us() is None


def test_an_engine_sees_no_process_of_a_later_cgroup_of_the_same_name(
    run_directory: RunDirectory, cgroup: ContainerCgroup
) -> None:
    launcher = InProcessLauncher(Host(), workers=0)  # no step is taken
    process = subprocess.Popen([sys.executable, "-c", WAITS], stdin=subprocess.PIPE)
    try:
        (cgroup.path / "cgroup.procs").write_text(f"{process.pid}\n")
        engine = launcher.launch(a_job(run_directory, cgroup))
        assert [found.pid for found in engine._engine.target.poll()] == [process.pid]
        replaced(cgroup)
        (cgroup.path / "cgroup.procs").write_text(f"{process.pid}\n")
        assert engine._engine.target.poll() == frozenset()
    finally:
        launcher.close(1.0)
        process.communicate()


@pytest.fixture
def in_process(tmp_path: Path) -> Iterator[InProcessLauncher]:
    made = InProcessLauncher(Host(), debug_output=True)
    yield made
    made.close(1.0)


def test_after_a_stop_nothing_is_written_to_a_directory_that_is_somebody_elses_now(
    in_process: InProcessLauncher, run_directory: RunDirectory, cgroup: ContainerCgroup
) -> None:
    """A step that goes on at the stop ends later, when the next container of the name has its files there."""
    engine = in_process.launch(a_job(run_directory, cgroup))
    output = run_directory.directory(PLACE) / "memtierd.output"
    until(lambda: output.exists() and "scan 2" in output.read_text())
    inside, go_on = threading.Event(), threading.Event()
    report = engine._report

    def late(*arguments: object) -> None:
        inside.set()
        assert go_on.wait(60)
        report(*arguments)  # type: ignore[arg-type]
        engine._failed(ZeroDivisionError("late"))
        done.set()

    done = threading.Event()
    entry = next(iter(in_process._runner._entries.values()))
    entry.on_report = late
    assert inside.wait(60)
    engine.stop()
    run_directory.create(PLACE)  # of another container
    go_on.set()
    assert done.wait(60)
    assert list(run_directory.directory(PLACE).iterdir()) == []


def test_a_stopped_engine_is_not_run_again(run_directory: RunDirectory, cgroup: ContainerCgroup) -> None:
    """It would go on with the container's memory, and with its cgroup."""
    launcher = InProcessLauncher(Host(), workers=0)
    engine = launcher.launch(a_job(run_directory, cgroup))
    assert list(launcher._runner._entries) == [engine._engine]
    close, closed = engine._engine.close, threading.Event()

    def note() -> None:
        close()
        closed.set()

    engine._engine.close = note  # type: ignore[method-assign]
    engine.stop()
    assert closed.is_set()
    assert launcher._runner._entries == {}
    assert launcher._runner._queue == []
    launcher.close(1.0)


def test_a_stopped_engine_is_let_go_of_at_once(run_directory: RunDirectory, cgroup: ContainerCgroup) -> None:
    """Its page tables are large, and the garbage collector comes seldom."""
    launcher = InProcessLauncher(Host(), workers=0)
    gc.collect()
    gc.disable()
    try:
        engine = launcher.launch(a_job(run_directory, cgroup))
        gone = weakref.ref(engine), weakref.ref(engine._engine)
        engine.stop()
        del engine
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()
        launcher.close(1.0)


def test_a_stop_waits_for_what_is_being_written(
    run_directory: RunDirectory, cgroup: ContainerCgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory is looked up by name: a moment later that may be the next container's."""
    monkeypatch.setattr(inprocess_module, "LOCK_S", 600.0)
    launcher = InProcessLauncher(Host(), workers=0)
    engine = launcher.launch(a_job(run_directory, cgroup))
    inside, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def slow(files: ContainerDirectory, text: str) -> None:
        inside.set()
        assert go_on.wait(60)
        order.append("written")

    def stop() -> None:
        engine.stop()
        order.append("stopped")

    monkeypatch.setattr(ContainerDirectory, "append_output", slow)
    writing, stopping = threading.Thread(target=engine._write, args=("x",)), threading.Thread(target=stop)
    writing.start()
    assert inside.wait(60)
    stopping.start()
    stopping.join(0.2)  # only if it were wrong would it end
    go_on.set()
    writing.join()
    stopping.join()
    assert order == ["written", "stopped"]
    launcher.close(1.0)


def test_a_stop_does_not_wait_for_a_disk_that_hangs(
    in_process: InProcessLauncher, run_directory: RunDirectory, cgroup: ContainerCgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = in_process.launch(a_job(run_directory, cgroup))
    with engine._lock:  # as a write holds it that does not return
        stopped = threading.Thread(target=engine.stop)
        stopped.start()
        stopped.join(60)
        assert not stopped.is_alive()
        engine.tend()


def test_bandwidth_and_scan_budget_of_the_node_change_with_the_configuration(in_process: InProcessLauncher) -> None:
    moves, scans = in_process._node.moves, in_process._node.scans
    share = moves.join()

    def wait_s() -> float:
        return moves.wait_s(share, 1 << 20)

    in_process.configure(PluginConfig(scan_cpu_share=0.2))
    assert wait_s() == 0
    assert scans.cpu_share == 0.2
    in_process.configure(PluginConfig(bandwidth_mib_per_s=100.0))
    assert wait_s() == pytest.approx(1 / 100)
    in_process.configure(PluginConfig(bandwidth_mib_per_s=7.0))
    assert wait_s() == pytest.approx(1 / 7)
    in_process.configure(PluginConfig())
    assert wait_s() == 0


def test_a_ceiling_that_a_reload_sets_holds_for_engines_that_run(
    run_directory: RunDirectory, cgroup: ContainerCgroup
) -> None:
    launcher = InProcessLauncher(Host(), workers=0)
    engine = launcher.launch(a_job(run_directory, cgroup))._engine
    later_s = engine.clock.now_s() + 1000.0

    def allowed_bytes() -> int:
        return engine.mover.allowed_bytes(later_s) or 0

    assert allowed_bytes() > 1 << 20, "its own ceiling only"
    launcher.configure(PluginConfig(bandwidth_mib_per_s=0.001))
    assert allowed_bytes() < 1 << 20
    launcher.configure(PluginConfig())
    assert allowed_bytes() > 1 << 20
    launcher.close(1.0)


def test_that_processes_share_no_ceiling_is_told_with_the_configuration_that_wants_one() -> None:
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)), format="{message}", level="WARNING")
    try:
        ProcessLauncher().configure(PluginConfig())
        assert lines == []
        ProcessLauncher().configure(PluginConfig(bandwidth_mib_per_s=9))
    finally:
        logger.remove(sink)
    assert len(lines) == 1
    assert "bandwidth" in lines[0]
    assert "has no effect here" in lines[0]


def test_an_output_is_cut_when_there_is_less_room_for_each(
    in_process: InProcessLauncher, run_directory: RunDirectory, cgroup: ContainerCgroup
) -> None:
    engine = in_process.launch(a_job(run_directory, cgroup))
    (run_directory.directory(PLACE) / "memtierd.output.1").write_bytes(b"x" * 100_000)
    run_directory.output_bytes_max = 5000
    engine.tend()
    assert (run_directory.directory(PLACE) / "memtierd.output.1").stat().st_size == 5000


SCRIPT = """#!{python}
import signal, sys, time
{handler}
print("up", flush=True)
time.sleep(600)
"""


def program(base: Path, name: str, handler: str = "") -> str:
    path = base / name
    path.write_text(SCRIPT.format(python=sys.executable, handler=handler))
    path.chmod(0o755)
    return str(path)


IGNORES = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
CLEANS_UP = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))"


def test_a_stopped_process_is_waited_for(tmp_path: Path, run_directory: RunDirectory, cgroup: ContainerCgroup) -> None:
    """It would be a zombie for as long as the plugin lives."""
    launcher = ProcessLauncher(program=program(tmp_path, "ends"))
    engine = launcher.launch(a_job(run_directory, cgroup))
    pid = engine._process.pid
    assert (run_directory.directory(PLACE) / PID_NAME).read_text() == f"{pid}\n"
    engine.stop()
    until(lambda: not launcher.tend())
    assert not Path(f"/proc/{pid}").exists(), "reaped"


@pytest.mark.parametrize("end", ["tend", "close"])
def test_a_process_gets_the_time_to_end_in_its_own_way(
    tmp_path: Path, run_directory: RunDirectory, cgroup: ContainerCgroup, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(process_module, "TERMINATE_S", 600.0)
    launcher = ProcessLauncher(program=program(tmp_path, "cleans-up", CLEANS_UP))
    engine = launcher.launch(a_job(run_directory, cgroup))
    output = run_directory.directory(PLACE) / "memtierd.output"
    until(lambda: output.read_text() == "up\n")
    engine.stop()
    if end == "tend":
        until(lambda: not launcher.tend())
    else:
        launcher.close(600.0)
    assert engine._process.returncode == 7


def test_a_process_that_does_not_end_is_killed(
    tmp_path: Path, run_directory: RunDirectory, cgroup: ContainerCgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "TERMINATE_S", 0.05)
    launcher = ProcessLauncher(program=program(tmp_path, "stays", IGNORES))
    engine = launcher.launch(a_job(run_directory, cgroup))
    output = run_directory.directory(PLACE) / "memtierd.output"
    until(lambda: output.read_text() == "up\n")
    engine.stop()
    until(lambda: not launcher.tend())
    assert engine._process.returncode == -signal.SIGKILL


def test_the_end_waits_for_processes_and_kills_those_that_stay(
    tmp_path: Path, run_directory: RunDirectory, cgroup: ContainerCgroup
) -> None:
    launcher = ProcessLauncher(program=program(tmp_path, "stays", IGNORES))
    engine = launcher.launch(a_job(run_directory, cgroup))
    output = run_directory.directory(PLACE) / "memtierd.output"
    until(lambda: output.read_text() == "up\n")
    engine.stop()
    launcher.close(0.1)
    assert engine._process.returncode == -signal.SIGKILL


@pytest.fixture
def leftover(tmp_path: Path, run_directory: RunDirectory) -> Iterator[subprocess.Popen[bytes]]:
    config = run_directory.create(PLACE).path / CONFIG_NAME
    made = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)", "-c", "", "-config", str(config)],
        stdout=subprocess.DEVNULL,
    )
    until(lambda: find_leftovers(run_directory.path) == [made.pid])
    yield made
    made.kill()
    made.wait()


def test_what_an_earlier_run_left_is_ended(leftover: subprocess.Popen[bytes], run_directory: RunDirectory) -> None:
    ProcessLauncher().clean(run_directory)
    assert leftover.wait(60) == -signal.SIGTERM


def test_a_leftover_is_looked_at_again_before_it_is_ended(
    leftover: subprocess.Popen[bytes], run_directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two looks it may have ended, and its number been given to somebody else's process."""
    monkeypatch.setattr(process_module, "find_leftovers", lambda path: [leftover.pid])
    monkeypatch.setattr(process_module, "_is_ours", lambda process, path: False)
    ProcessLauncher().clean(run_directory)
    with pytest.raises(subprocess.TimeoutExpired):
        leftover.wait(0.2)


def test_a_leftover_is_looked_at_once_it_cannot_be_another_any_more(
    leftover: subprocess.Popen[bytes], run_directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look before its pidfd is open says nothing about the process that is then signalled."""
    others: list[subprocess.Popen[bytes]] = []

    def opened(pid: int) -> int:
        """Just before, the number was given to a process of somebody else."""
        others.append(subprocess.Popen([sys.executable, "-c", WAITS], stdin=subprocess.PIPE))
        return pidfd_open(others[0].pid)

    def is_ours(process: Path, path: Path) -> bool:
        return not others

    pidfd_open = os.pidfd_open
    monkeypatch.setattr(os, "pidfd_open", opened)
    monkeypatch.setattr(process_module, "_is_ours", is_ours)
    process_module._kill_leftover(leftover.pid, run_directory.path)
    others[0].communicate()
    assert others[0].returncode == 0, "not ended by us"


def test_a_leftover_that_does_not_end_is_killed(
    tmp_path: Path, run_directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "TERMINATE_S", 0.05)
    config = run_directory.create(PLACE).path / CONFIG_NAME
    words = [program(tmp_path, "stays", IGNORES), "-c", "", "-config", str(config)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as left:
        try:
            assert left.stdout is not None
            assert left.stdout.readline() == b"up\n"
            ProcessLauncher().clean(run_directory)
            assert left.wait(60) == -signal.SIGKILL
        finally:
            left.kill()


def test_a_command_line_of_terabytes_is_not_read_to_its_end(tmp_path: Path, run_directory: RunDirectory) -> None:
    own = tmp_path / "proc" / "7"
    own.mkdir(parents=True)
    with (own / "cmdline").open("wb") as file:
        file.truncate(1 << 42)
    (own / "root").symlink_to("/")
    assert find_leftovers(run_directory.path, tmp_path / "proc") == []


def test_one_of_another_root_is_somebody_elses(
    leftover: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another container's plugin, whose run directory has the same path in there. Seen from /proc of the node."""
    run_directory = RunDirectory(tmp_path / "run")
    proc = tmp_path / "proc"
    own = proc / str(leftover.pid)
    own.mkdir(parents=True)
    (own / "cmdline").write_bytes(Path(f"/proc/{leftover.pid}/cmdline").read_bytes())
    (own / "root").symlink_to("/")
    assert find_leftovers(run_directory.path, proc) == [leftover.pid]
    (proc / str(os.getpid())).symlink_to(own)  # we are none, whatever we were called with
    assert find_leftovers(run_directory.path, proc) == [leftover.pid]
    (own / "root").unlink()
    (own / "root").symlink_to(tmp_path)
    assert find_leftovers(run_directory.path, proc) == []

    opened = Path.open

    def refuse(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.is_relative_to(proc):
            raise AssertionError(f"{path} is read: it may never come to an end")
        return opened(path, *arguments, **more)  # threads of engines of other tests, say

    monkeypatch.setattr(Path, "open", refuse)
    assert find_leftovers(run_directory.path, proc) == []


@pytest.mark.parametrize(
    "words",
    [
        ["memtierd", "-config", "{config}"],
        ["memtierd", "-c", "", "-config", "{config}.other"],
        ["memtierd", "-c", "", "-config", "/elsewhere/memtierd.config.yaml"],
        ["vi", "{config}"],
        ["memtierd", "-c", "", "-config"],
    ],
)
def test_only_what_we_would_have_started_is_a_leftover(tmp_path: Path, words: list[str]) -> None:
    run_directory = RunDirectory(tmp_path / "run")
    own = tmp_path / "proc" / "77"
    own.mkdir(parents=True)
    (own / "root").symlink_to("/")
    config = str(run_directory.directory(PLACE) / CONFIG_NAME)
    (own / "cmdline").write_bytes(b"\0".join(word.format(config=config).encode() for word in words) + b"\0")
    assert find_leftovers(run_directory.path, tmp_path / "proc") == []
