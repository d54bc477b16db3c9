"""`memtierd` as its users' scripts start it: flags, log destinations, exit statuses, nothing started on errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memtier_engine.hostfs.host import Host
from memtier_engine.trackers.registry import why_not
from support.swap import swap_is_on
from support.waiting import WAIT_S, until
from support.workload import workload

MEMTIERD = Path(sys.executable).parent / "memtierd"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")
CONFIG = """\
policy:
  name: age
  config: |
    intervalms: 200
    swapoutms: 60000
    pidwatcher:
      name: pidlist
      config: |
        pids: [{pid}]
    tracker:
      name: {tracker}
      config: |
        scanintervalms: 200
"""


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [str(MEMTIERD), *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=WAIT_S, stdin=subprocess.DEVNULL
    )


@needs_root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0_and_double_dashes_and_equals_are_taken(tmp_path: Path, number: int) -> None:
    path = tmp_path / "m.yaml"
    with workload(1, 1) as load:
        path.write_text(CONFIG.format(pid=load.pid, tracker="auto"))
        command = [str(MEMTIERD), f"--config={path}", "--debug=true", "-version=false", "-l", "-"]
        had_swap = swap_is_on()
        daemon = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert daemon.stdout is not None
        lines = []
        for line in daemon.stdout:
            lines.append(line)
            if line.startswith("DEBUG: 1 processes"):
                break
        daemon.send_signal(number)
        _, messages = daemon.communicate(timeout=WAIT_S)
        assert daemon.returncode == 0
        assert messages == ""
        assert all(line.split(": ")[0] in ("DEBUG", "INFO", "WARN") for line in lines)
        if not had_swap and not swap_is_on():
            assert any(line.startswith("WARN: there is no swap") for line in lines)


@needs_root
def test_a_log_file_is_appended_to(tmp_path: Path) -> None:
    path, log = tmp_path / "m.yaml", tmp_path / "log"
    log.write_text("before\n")
    with workload(1, 1) as load:
        path.write_text(CONFIG.format(pid=load.pid, tracker="auto"))
        daemon = subprocess.Popen([MEMTIERD, "-config", path, "-l", log])
        until(lambda: "policy age" in log.read_text() or daemon.poll() is not None)
        assert daemon.poll() is None
        daemon.terminate()
        assert daemon.wait(WAIT_S) == 0
    assert log.read_text().startswith("before\n")


def test_a_tracker_that_does_not_work_here_is_a_start_error(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    missing = [name for name in ("idlepage", "softdirty") if why_not(name, Host()) is not None]
    if not missing:
        pytest.skip("every tracker works on this kernel; one without CONFIG_MEM_SOFT_DIRTY shows the error")
    path.write_text(CONFIG.format(pid=1, tracker=missing[0]))
    done = run("-config", path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"memtierd: tracker {missing[0]}: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["-debug=maybe", "-config", "x"], 2, 'invalid boolean value "maybe" for -debug'),
        (["-config", "x", "-l", "/nonexistent/log"], 1, "memtierd: -l /nonexistent/log: No such file or directory"),
        (["word", "-config", "x"], 1, "give -config FILE"),
        (["-config", "/"], 1, "memtierd: /: cannot be read: Is a directory"),
    ],
)
def test_what_is_wrong_is_one_line_and_the_status_tells_usage_from_the_rest(
    words: list[str], status: int, message: str
) -> None:
    done = run(*words)
    assert done.returncode == status
    assert message in done.stderr
    assert status == 2 or len(done.stderr.splitlines()) == (2 if "word" in words else 1)
    assert done.stdout == ""


def test_errors_in_nested_text_name_the_line_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(CONFIG.format(pid="x", tracker="auto"))
    assert run("-config", path).stderr == (
        f"memtierd: {path}:9: policy.config.pidwatcher.config.pids[0]: 'x' is text (use a number from 1 to 4194304)\n"
    )
