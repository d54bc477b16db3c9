"""The programs as a person runs them: output, exit status, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memtier_engine.hostfs.host import Host
from support.cgroups import temporary_cgroup
from support.swap import swap_is_on, temporary_zram_swap
from support.workload import workload

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")


def run(*words: object, timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / str(words[0])), *map(str, words[1:])]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=timeout_s, stdin=subprocess.DEVNULL
    )


def leftovers() -> tuple[list[str], str]:
    return sorted(path.name for path in Host().cgroup2_root.glob("memtier-demo-*")), Path("/proc/swaps").read_text()


@needs_root
def test_the_demo_pages_out_the_cold_memory_and_leaves_nothing_behind() -> None:
    before = leftovers()
    done = run("memtier", "demo", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["passed"]
    assert verdict["cold_out_share"] >= 0.95
    assert verdict["hot_wrongly_out_share"] <= 0.02
    assert verdict["saved_bytes"] >= 0.95 * (384 << 20)
    assert 0 < verdict["engine_cpu_s"] < verdict["duration_s"]
    assert leftovers() == before


@needs_root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_takes_everything_back(number: signal.Signals) -> None:
    before = leftovers()
    demo = subprocess.Popen([BIN / "memtier", "demo"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert demo.stdout is not None
    for line in demo.stdout:
        if "swapped out" in line and "swapped out: 0 MiB" not in line:
            break  # in the middle of moving
    demo.send_signal(number)
    output = demo.stdout.read()
    assert demo.wait(20) == 128 + number, output
    demo.stdout.close()
    assert "Traceback" not in output
    assert leftovers() == before


@needs_root
def test_a_run_on_a_cgroup_pages_out_what_is_idle_and_says_so() -> None:
    with temporary_zram_swap(512 << 20), temporary_cgroup("run") as cgroup, workload(8, 24, write=True) as load:
        (cgroup / "cgroup.procs").write_text(str(load.pid))
        done = run(
            "memtier", "run", "--cgroup", cgroup, "--idle-after", "1s", "--bandwidth", "200MiB/s", "--duration", "5s"
        )
        assert done.returncode == 0, done.stderr
        assert load.swapped_share(load.cold) >= 0.95, done.stdout
        assert load.swapped_share(load.hot) <= 0.02
        last_line = done.stdout.splitlines()[-1]
        moved = re.search(r"moved ([0-9.]+) MiB", last_line)
        assert moved is not None
        assert float(moved[1]) >= 0.95 * 24


@needs_root
def test_a_dry_run_moves_nothing_and_says_how_much_it_would_have() -> None:
    with workload(4, 24, write=True) as load:
        done = run("memtier", "run", "--pid", load.pid, "--idle-after", "1s", "--dry-run", "--duration", "4s")
        assert done.returncode == 0, done.stderr
        assert load.swapped_share(load.cold) == 0
        found = re.search(r"nothing was moved; ([0-9.]+) MiB would have been", done.stdout)
        assert found is not None
        assert float(found[1]) >= 0.95 * 24


@needs_root
def test_sigterm_ends_a_run_cleanly() -> None:
    with workload(4, 4) as load:
        command = [str(BIN / "memtier"), "run", "--pid", str(load.pid), "--dry-run", "--idle-after", "2s"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        assert any("processes" in line for line in process.stdout)  # the first report
        began_s = time.monotonic()
        process.terminate()
        output = process.stdout.read()
        assert process.wait(10) == 0
        assert time.monotonic() - began_s < 5
        assert "dry run: nothing was moved" in output
        process.stdout.close()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["run"], 2, "give one of --cgroup, --pid and --config"),
        (["run", "--pid", "0"], 2, "--pid"),
        (["run", "--pid", "1", "--idle-after", "10"], 2, "write it like 500ms"),
        (["run", "--pid", "1", "--bandwidth", "fast"], 2, "write it like 50MiB/s"),
        (["run", "--pid", str((1 << 22) - 3)], 1, "exited"),
        (["run", "--cgroup", "/sys/fs/cgroup/there-is-no-such-group"], 1, "no such cgroup"),
        (["run", "--config", "/nonexistent.yaml"], 1, "/nonexistent.yaml: cannot be read"),
        (["run", "--pid", str(os.getpid()), "--dry-run", "--tracker", "nothing"], 1, "no tracker is named 'nothing'"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_wrong_input_gets_one_clear_error_and_its_exit_status(words: list[str], status: int, message: str) -> None:
    done = run("memtier", *words)
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_check_tells_what_works_and_exits_3_if_nothing_can_be_moved() -> None:
    done = run("memtier", "check", "--json")
    found = json.loads(done.stdout)
    works = found["auto"] is not None and found["swap"]
    assert done.returncode == (0 if works else 3)
    for feature in [*found["features"].values(), *found["trackers"].values()]:
        assert feature["works"] or feature["why"]
    if os.geteuid() == 0:
        assert found["auto"] is not None
        with temporary_zram_swap(64 << 20):
            assert run("memtier", "check", "--json").returncode == 0
    table = run("memtier", "check").stdout
    assert "idlepage" in table
    assert "<- auto" in table or found["auto"] is None


CONFIG = """\
policy:
  name: age
  config: |
    intervalms: 250
    swapoutms: 1000
    pidwatcher:
      name: pidlist
      config: |
        pids: [{pid}]
    tracker:
      name: auto
      config: |
        scanintervalms: 250
    mover:
      intervalms: 20
      bandwidth: 200
guards:
  psimemorynode: null
  psiionode: null
"""


@needs_root
def test_memtierd_serves_a_configuration_file_until_sigterm(tmp_path: Path) -> None:
    with temporary_zram_swap(512 << 20), workload(8, 24, write=True) as load:
        path = tmp_path / "m.yaml"
        path.write_text(CONFIG.format(pid=load.pid))
        # As the reference's plugin launches it: an empty -c along with -config.
        command = [str(BIN / "memtierd"), "-c", "", "-config", str(path), "-debug", "-l", str(tmp_path / "log")]
        process = subprocess.Popen(command)
        try:
            for _ in range(600):  # a guard may hold it back for a while on a busy machine
                time.sleep(0.1)
                if load.swapped_share(load.cold) >= 0.95:
                    break
            assert load.swapped_share(load.cold) >= 0.95
            assert load.swapped_share(load.hot) <= 0.02
        finally:
            process.terminate()
        assert process.wait(5) == 0
        assert "DEBUG: " in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 1, "give -config FILE"),
        (["-nonsense"], 2, "not defined: -nonsense"),
        (["-config"], 2, "needs an argument"),
        (["-config", "/nonexistent"], 1, "memtierd: /nonexistent: cannot be read: No such file"),
        (["-h"], 0, "Usage of memtierd"),
    ],
)
def test_memtierd_answers_wrong_usage_with_2_and_bad_starts_with_1(words: list[str], status: int, message: str) -> None:
    done = run("memtierd", *words)
    assert done.returncode == status
    assert message in done.stderr


def test_memtierd_starts_nothing_with_a_bad_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(CONFIG.format(pid=1).replace("swapoutms: 1000", "swapoutms: soon"))
    done = run("memtierd", "-config", path)
    assert done.returncode == 1
    assert done.stderr == (f"memtierd: {path}:5: policy.config.swapoutms: 'soon' is text (use a number of 0 or more)\n")


def test_the_version_is_told() -> None:
    assert re.fullmatch(r"memtier, version [0-9.]+\n", run("memtier", "--version").stdout)
    assert run("memtierd", "-version").stdout.startswith("memtierd version information:\n  - version: ")


def test_the_exerciser_tells_its_addresses_and_ends_with_its_ttl() -> None:
    done = run("memtier-meme", "-bs", "8M", "-brc", "1", "-brs", "2M", "-bwc", "1", "-bws", "8M", "-ttl", "300ms")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "memory exerciser"
    assert re.fullmatch(r"pid: \d+", lines[1])
    assert lines[2] == "creating 1 byte arrays"
    array = re.fullmatch(r"    array: ([0-9a-f]+)-([0-9a-f]+) \(8388608 bytes\)", lines[3])
    assert array is not None
    start = int(array[1], 16)
    assert int(array[2], 16) == start + (8 << 20) - 1
    assert lines[4] == f"start exerciser 0: read {start:x}-{start + (2 << 20) - 1:x} (2097152 bytes)"
    # An area as large as the array is cut one byte short, as the reference does.
    assert lines[5] == f"start exerciser 1: write {start:x}-{start + (8 << 20) - 2:x} (8388607 bytes)"


def test_the_exerciser_refuses_bad_values_with_1() -> None:
    done = run("memtier-meme", "-bs", "8X")
    assert done.returncode == 1
    assert done.stderr == "memtier-meme: invalid size '8X': write an integer and k, M or G, such as 64M\n"
    assert run("memtier-meme", "-zz").returncode == 2


def test_swap_state_is_as_before() -> None:
    """Runs last in this file: no swap of ours is left on a machine that had none."""
    assert swap_is_on() or "zram" not in Path("/proc/swaps").read_text()
