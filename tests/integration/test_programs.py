"""The programs as a person runs them: output, exit status, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.cgroups import temporary_cgroup
from support.demo import assert_all_taken_back
from support.swap import temporary_zram_swap
from support.waiting import WAIT_S, until
from support.workload import workload

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")


def run(*words: object, timeout_s: float = WAIT_S) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / str(words[0])), *map(str, words[1:])]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=timeout_s, stdin=subprocess.DEVNULL
    )


@needs_root
def test_the_demo_pages_out_the_cold_memory() -> None:
    """In the best of three: where the machine does not let its process run for three seconds, hot memory is idle."""
    for _ in range(3):
        done = run("memtier", "demo", "--json", timeout_s=300)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["passed"]
    assert verdict["cold_out_share"] >= 0.95
    assert verdict["hot_wrongly_out_share"] <= 0.02
    assert verdict["saved_bytes"] >= 0.95 * (384 << 20)
    assert 0 < verdict["engine_cpu_s"] < verdict["duration_s"]


@needs_root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_takes_everything_back(number: signal.Signals) -> None:
    demo = subprocess.Popen([BIN / "memtier", "demo"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert demo.stdout is not None
    lines = []
    for line in demo.stdout:
        lines.append(line)
        if "swapped out" in line and "swapped out: 0 MiB" not in line:
            break  # in the middle of moving
    demo.send_signal(number)
    output = "".join(lines) + demo.stdout.read()
    assert demo.wait(WAIT_S) == 128 + number, output
    demo.stdout.close()
    assert "Traceback" not in output
    assert_all_taken_back(output)


def run_until(enough: Callable[[str], bool], words: list[str]) -> str:
    """`memtier run` until it says a line of which `enough`, then SIGTERM. Returns its output."""
    process = subprocess.Popen(
        [str(BIN / "memtier"), "run", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:  # one per scan: pytest's own limit ends a test in which it is never enough
        lines.append(line)
        if enough(line):
            break
    process.terminate()
    output = "".join(lines) + process.stdout.read()
    process.stdout.close()
    assert process.wait(WAIT_S) == 0, output
    return output


def would_move_mib(line: str) -> float:
    found = re.search(r"would move ([0-9.]+) MiB", line)
    return float(found[1]) if found else 0.0


@needs_root
def test_a_run_on_a_cgroup_pages_out_what_is_idle_and_says_so() -> None:
    with temporary_zram_swap(512 << 20), temporary_cgroup("run") as cgroup, workload(8, 24, write=True) as load:
        (cgroup / "cgroup.procs").write_text(str(load.pid))
        words = ["--cgroup", str(cgroup), "--idle-after", "1s", "--bandwidth", "200MiB/s"]
        output = run_until(lambda line: load.swapped_share(load.cold) >= 0.95, words)
        assert load.hot_stayed(1)
        moved = re.search(r"moved ([0-9.]+) MiB", output.splitlines()[-1])
        assert moved is not None
        assert float(moved[1]) >= 0.95 * 24


@needs_root
def test_a_dry_run_moves_nothing_and_says_how_much_it_would_have() -> None:
    with workload(4, 24, write=True) as load:
        words = ["--pid", str(load.pid), "--idle-after", "1s", "--dry-run"]
        output = run_until(lambda line: would_move_mib(line) >= 0.95 * 24, words)
        assert load.swapped_share(load.cold) == 0
        found = re.search(r"nothing was moved; ([0-9.]+) MiB would have been", output)
        assert found is not None
        assert float(found[1]) >= 0.95 * 24


@needs_root
def test_sigterm_ends_a_run_cleanly() -> None:
    with workload(4, 4) as load:
        words = ["--pid", str(load.pid), "--dry-run", "--idle-after", "1h", "--interval", "1s"]
        output = run_until(lambda line: "processes" in line, words)  # the first report
        assert "dry run: nothing was moved" in output


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["run"], 2, "give one of --cgroup, --pid, --all and --config"),
        (["run", "--pid", "0"], 2, "--pid"),
        (["run", "--pid", "1", "--idle-after", "10"], 2, "write it like 500ms"),
        (["run", "--pid", "1", "--bandwidth", "fast"], 2, "write it like 50MiB/s"),
        (["run", "--pid", str((1 << 22) - 3)], 1, "there is no process"),
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
            until(lambda: load.swapped_share(load.cold) >= 0.95)
            assert load.hot_stayed(1)
        finally:
            process.terminate()
        assert process.wait(WAIT_S) == 0
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


@pytest.mark.parametrize(
    ("program", "words"),
    [("memtier", ["check"]), ("memtierd", ["-c", "help"]), ("memtier-meme", ["-bs", "1M", "-ttl", "1ms"])],
)
def test_a_full_disk_behind_standard_output_is_one_line(program: str, words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [BIN / program, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=WAIT_S
        )
    assert (done.returncode, done.stderr) == (
        1,
        f"{program}: cannot write to standard output: No space left on device\n",
    )
