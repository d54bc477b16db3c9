"""The examples of the library are run as a reader would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memtier_engine.errors import MemtierError
from memtier_engine.hostfs.host import Host
from memtier_engine.trackers.registry import create_tracker
from support.swap import temporary_zram_swap
from support.waiting import WAIT_S

EXAMPLES = Path(__file__).resolve().parents[2] / "packages/memtier-engine/examples"
_HOLD = """
import mmap, sys, time
area = mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, 64 << 20, 4096):
    area[at] = 1
print("ready", flush=True)
time.sleep(1000)
"""


def test_a_new_policy_takes_less_than_50_lines() -> None:
    assert len((EXAMPLES / "new_policy.py").read_text().splitlines()) < 50


def test_the_new_policy_says_what_it_wants() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "new_policy.py")], capture_output=True, text=True, timeout=WAIT_S
    )
    assert (done.returncode, done.stderr) == (1, "usage: new_policy.py PID MIB [SECONDS]\n")


def test_the_new_policy_keeps_a_process_within_its_size() -> None:
    """64 MiB held, 20 MiB allowed: the rest goes out."""
    if os.geteuid() != 0:
        pytest.skip("needs root to page out another process: run the tests as root")
    try:
        create_tracker("auto", Host()).tracker.close()
    except MemtierError as missing:
        pytest.skip(f"needs a tracker: {missing}")
    with temporary_zram_swap(256 << 20):
        holder = subprocess.Popen([sys.executable, "-S", "-c", _HOLD], stdout=subprocess.PIPE)
        try:
            assert holder.stdout is not None
            holder.stdout.readline()
            command = [sys.executable, str(EXAMPLES / "new_policy.py"), str(holder.pid), "20", str(WAIT_S)]
            lines = []
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as example:
                assert example.stdout is not None
                for line in example.stdout:
                    lines.append(line)
                    found = re.fullmatch(r"(\d+) MiB in RAM, (\d+) MiB out\n", line)
                    assert found is not None, line
                    if int(found[1]) <= 21 and int(found[2]) >= 40:
                        break
                else:
                    pytest.fail("".join(lines))
                example.kill()
        finally:
            holder.kill()
            holder.wait()


def test_policies_are_compared_without_root() -> None:
    """The process writes 4 of its 64 MiB all the time. Who waits longer has fewer refaults and saves less."""
    try:
        create_tracker("userfault", Host()).tracker.close()
    except MemtierError as missing:
        pytest.skip(f"needs userfaultfd with asynchronous write protection, Linux 6.7: {missing}")
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "compare_policies.py"), "5"],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    )
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[-2:]] == ["keep 20 MiB", "half"]
    saved = [float(found) for found in re.findall(r"saved ([\d.]+) MiB", result.stdout)]
    refaults = [float(found) for found in re.findall(r"refaults ([\d.]+) MiB", result.stdout)]
    assert len(saved) == len(refaults) == 5
    assert saved[0] > saved[1] > saved[2] > 20
    assert refaults[2] <= refaults[0]
    assert refaults[2] < 4
