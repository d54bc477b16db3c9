"""The demo at a terminal: whatever ends it, the machine is as it was before."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memtier_cli.memtier.demo_scene.scene import own_cgroup, workload
from memtier_cli.memtier.demo_scene.verdict import judge
from memtier_cli.memtier.demo_scene.zram import swap_for_now
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.model import SWAP_NODE
from memtier_engine.mover.backends import ProcessHandle, move
from support.demo import assert_all_taken_back
from support.waiting import WAIT_S, until

MEMTIER = Path(sys.executable).parent / "memtier"
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")


def read_all(fd: int, until: bytes | None = None) -> bytes:
    """Until `until` was written, or the terminal is closed."""
    found = b""
    while until is None or until not in found:
        try:
            part = os.read(fd, 65536)
        except OSError:  # EIO: the other side is gone
            break
        if not part:
            break
        found += part
    return found


def test_ctrl_c_at_the_terminal_ends_it_without_a_word_from_the_workload() -> None:
    """The terminal sends SIGINT to every process of the foreground group."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(MEMTIER, ["memtier", "demo"])
    try:
        shown = read_all(terminal, b"engine CPU")
        assert b"tracker: " in shown
        os.write(terminal, b"\x03")
        rest = read_all(terminal)
    finally:
        os.close(terminal)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 128 + signal.SIGINT
    assert b"Traceback" not in rest
    assert b"taken away again" in rest
    assert_all_taken_back(shown.decode())


def test_a_terminal_that_goes_away_ends_it_too() -> None:
    demo = subprocess.Popen([MEMTIER, "demo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    cgroup = Host().cgroup2_root / f"memtier-demo-{demo.pid}"
    until(lambda: cgroup.exists() or demo.poll() is not None)
    assert demo.poll() is None
    demo.send_signal(signal.SIGHUP)
    output, messages = demo.communicate(timeout=WAIT_S)
    assert demo.returncode == 128 + signal.SIGHUP, messages
    assert "verdict" not in output
    assert "taken away again" in messages
    assert_all_taken_back(output)


def test_a_demo_that_ends_too_early_is_not_good() -> None:
    """The verdict comes from the kernel's numbers: before anything was moved it must fail."""
    done = subprocess.run(
        [MEMTIER, "demo", "--duration", "1s"], capture_output=True, text=True, check=False, timeout=WAIT_S
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "verdict: 0.0% of the cold memory is out" in done.stdout
    assert "NOT GOOD" in done.stdout
    assert_all_taken_back(done.stdout)


def test_without_root_it_says_what_it_needs() -> None:
    done = subprocess.run(
        ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", MEMTIER, "demo"],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
    )
    if "Permission denied" in done.stderr and "memtier:" not in done.stderr:
        pytest.skip(f"needs a checkout that others can read: {done.stderr.strip()}")
    assert done.returncode == 1
    assert "run as root" in done.stderr
    assert "Traceback" not in done.stderr


def test_hot_memory_that_went_out_and_came_back_is_held_against_the_engine() -> None:
    """The verdict must see a wrong page-out even if the workload has mended it by the time one looks."""
    with swap_for_now(256 << 20), own_cgroup() as cgroup, workload(cgroup, 16, 48, "mappings") as load:
        os.kill(load.pid, signal.SIGSTOP)  # else it takes back what is out before the rest is
        handle = ProcessHandle(Host(), process_id(Host(), load.pid))
        assert move(handle, load.hot, SWAP_NODE).moved_bytes > 0.5 * load.hot.total_bytes
        handle.close()
        os.kill(load.pid, signal.SIGCONT)
        until(lambda: load.memory().hot_out_bytes == 0)
        found = load.memory()
        assert found.cold_out_bytes == 0
        assert found.refault_bytes >= 0.5 * load.hot.total_bytes
        assert judge(found, tracker="none", engine_cpu_s=0.0, duration_s=1.0).hot_wrongly_out_share >= 0.5
