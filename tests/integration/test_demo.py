"""The demo at a terminal: whatever ends it, the machine is as it was before."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memtier_engine.hostfs.host import Host

MEMTIER = Path(sys.executable).parent / "memtier"
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")


def traces() -> tuple[list[str], str, list[str]]:
    return (
        sorted(path.name for path in Host().cgroup2_root.glob("memtier-demo-*")),
        Path("/proc/swaps").read_text(),
        sorted(path.name for path in Path("/sys/block").glob("zram*")),
    )


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
    before = traces()
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
    assert traces() == before


def test_a_terminal_that_goes_away_ends_it_too() -> None:
    before = traces()
    demo = subprocess.Popen([MEMTIER, "demo", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not any(Host().cgroup2_root.glob(f"memtier-demo-{demo.pid}")):
        assert demo.poll() is None
        time.sleep(0.02)
    demo.send_signal(signal.SIGHUP)
    output, messages = demo.communicate(timeout=30)
    assert demo.returncode == 128 + signal.SIGHUP, messages
    assert output == ""
    assert "taken away again" in messages
    assert traces() == before


def test_a_demo_that_ends_too_early_is_not_good() -> None:
    """The verdict comes from the kernel's numbers: before anything was moved it must fail."""
    before = traces()
    done = subprocess.run(
        [MEMTIER, "demo", "--duration", "1s"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "verdict: 0.0% of the cold memory is out" in done.stdout
    assert "NOT GOOD" in done.stdout
    assert traces() == before


def test_without_root_it_says_what_it_needs() -> None:
    done = subprocess.run(
        ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", MEMTIER, "demo"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if "Permission denied" in done.stderr and "memtier:" not in done.stderr:
        pytest.skip(f"needs a checkout that others can read: {done.stderr.strip()}")
    assert done.returncode == 1
    assert "run as root" in done.stderr
    assert "Traceback" not in done.stderr
