"""`memtier run` as an operator uses it: it says what goes on, and ends when there is nothing left to do."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memtier_engine.trackers.registry import AUTO_ORDER
from support.cgroups import temporary_cgroup
from support.waiting import WAIT_S
from support.workload import workload

MEMTIER = Path(sys.executable).parent / "memtier"
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")


def start(*words: object, output: int = subprocess.PIPE) -> subprocess.Popen[str]:
    command = [str(MEMTIER), "run", *map(str, words)]
    return subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, text=True)


def would_move_mib(line: str) -> float:
    found = re.search(r"would move ([0-9.]+) MiB", line)
    return float(found[1]) if found else 0.0


def test_it_ends_when_all_processes_given_have_ended() -> None:
    with workload(1, 8, write=True) as first, workload(1, 8, write=True) as second:
        words = ["--pid", first.pid, "--pid", second.pid, "--dry-run", "--idle-after", "1s"]
        run = start(*words)
        assert run.stdout is not None
        for line in run.stdout:
            if "2 processes" in line and would_move_mib(line) >= 15:
                break
        first.popen.kill()
        for line in run.stdout:
            if "1 processes" in line:
                break
        assert run.poll() is None
        second.popen.kill()
        output, messages = run.communicate(timeout=WAIT_S)
        assert run.returncode == 0, messages
        # The summary tells of the whole run, not of its empty end.
        found = re.search(r"; ([0-9.]+) MiB would have been", output.splitlines()[-1])
        assert found is not None
        assert float(found[1]) >= 15


def test_it_says_on_stderr_why_better_trackers_are_out() -> None:
    with workload(1, 1) as load:
        run = start("--pid", load.pid, "--dry-run", "--duration", "1s")
        output, messages = run.communicate(timeout=WAIT_S)
        assert run.returncode == 0, messages
        chosen = output.split("[")[1].split("]")[0]
        assert f"INFO: tracker {chosen} chosen" in messages
        for name in AUTO_ORDER[: AUTO_ORDER.index(chosen)]:
            assert f"INFO: tracker {name} is out: " in messages


def test_a_reader_that_goes_away_is_told_once_and_does_not_end_the_work() -> None:
    with workload(1, 1) as load:
        run = start("--pid", load.pid, "--dry-run", "--idle-after", "1s")
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.readline()
        run.stdout.close()
        messages = ""
        for line in run.stderr:
            messages += line
            if "standard output takes no more" in line:
                break
        assert run.poll() is None
        run.terminate()
        messages += run.stderr.read()
        run.stderr.close()
        assert run.wait(WAIT_S) == 0, messages
        assert messages.count("standard output takes no more") == 1
        assert "Traceback" not in messages
        assert "Exception ignored" not in messages


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_outputs_that_are_closed_from_the_start_do_not_matter(closed: str) -> None:
    with workload(1, 1) as load:
        command = f"exec {MEMTIER} run --pid {load.pid} --dry-run --duration 1s {closed}"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (" processes, resident" in done.stdout) == (closed == "2>&-")


def test_at_a_terminal_the_state_changes_in_place() -> None:
    with workload(1, 1) as load:
        words = [MEMTIER, "run", "--pid", str(load.pid), "--dry-run", "--idle-after", "1s"]
        pid, terminal = pty.fork()
        if pid == 0:
            environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
            os.execve(MEMTIER, [str(word) for word in words], environment)
        shown, told = b"", False
        try:
            while part := os.read(terminal, 65536):
                shown += part
                if not told and shown.count(b"processes, resident") >= 4:
                    os.kill(pid, signal.SIGTERM)
                    told = True
        except OSError:  # EIO: it has ended
            pass
        finally:
            os.close(terminal)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        states = [part for part in shown.decode().split("\r") if "processes" in part]
        assert len(states) >= 4
        assert not any(state.rstrip("\x1b[K").count("\n") > 1 for state in states[:-1])
        assert shown.decode().count("processes, resident") == len(states)
        assert shown.decode().rstrip().endswith("would have been")


def test_nohup_keeps_it_running_after_a_hangup() -> None:
    with workload(1, 1) as load:
        command = ["nohup", str(MEMTIER), "run", "--pid", str(load.pid), "--dry-run", "--idle-after", "1s"]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert run.stdout is not None
        run.stdout.readline()
        run.send_signal(signal.SIGHUP)
        for _ in range(3):
            assert "processes" in run.stdout.readline()
        run.terminate()
        run.communicate(timeout=WAIT_S)
        assert run.returncode == 0


def test_a_configuration_file_that_moves_nothing_tracks_only(tmp_path: Path) -> None:
    path = tmp_path / "track.yaml"
    with workload(1, 8, write=True) as load:
        path.write_text(
            'policy: {name: age, config: \'{"IntervalMs": 200,'
            f' "PidWatcher": {{"Name": "pidlist", "Config": "{{\\"Pids\\": [{load.pid}]}}"}},'
            ' "Tracker": {"Name": "auto", "Config": "scanintervalms: 200"}}\'}\n'
        )
        run = start("--config", path, "--duration", "2s")
        output, messages = run.communicate(timeout=WAIT_S)
        assert run.returncode == 0, messages
        assert output.splitlines()[-1].startswith("moved 0.0 MiB")
        assert load.swapped_share(load.cold) == 0


def first_lines(run: subprocess.Popen[str]) -> str:
    """Its messages, once it has told of a scan and was ended."""
    assert run.stdout is not None
    for line in run.stdout:
        if "] 1 processes" in line:  # one just started is left alone at first
            break
    run.terminate()
    _, messages = run.communicate(timeout=WAIT_S)
    assert run.returncode == 0, messages
    return messages


@pytest.mark.parametrize("shared", [True, False])
def test_shared_memory_which_is_missing_in_resident_is_told_once(shared: bool) -> None:
    kind = "SHARED" if shared else "PRIVATE"
    program = (
        f"import mmap; m = mmap.mmap(-1, 24 << 20, mmap.MAP_{kind} | mmap.MAP_ANONYMOUS); m[:] = bytes(24 << 20)\n"
        "print(flush=True); input()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as popen:
        assert popen.stdout is not None
        popen.stdout.readline()
        messages = first_lines(start("--pid", popen.pid, "--dry-run", "--interval", "1s"))
        popen.communicate("\n", timeout=WAIT_S)
    assert messages.count(f"pid {popen.pid}: 24 MiB of it in RAM are shared memory") == int(shared)


def assert_refused(why: str, *words: object) -> None:
    run = start(*words, "--dry-run", "--duration", "1s")
    output, messages = run.communicate(timeout=WAIT_S)
    assert (run.returncode, output) == (1, "")
    assert why in messages
    assert messages.count("\n") == 1


def test_pids_that_can_never_be_observed_are_refused_with_the_reason() -> None:
    assert_refused("there is no process", "--pid", (1 << 22) - 3)
    assert_refused("is a thread of the kernel", "--pid", 2)
    program = "import threading; t = threading.Thread(target=input); t.start(); print(t.native_id, flush=True)"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as popen:
        assert popen.stdout is not None
        assert_refused(f"is a thread of process {popen.pid}", "--pid", int(popen.stdout.readline()))
        popen.communicate("\n", timeout=WAIT_S)


@pytest.mark.parametrize("name", ["", ".", "/", "/sys/fs/cgroup"])
def test_the_root_of_all_cgroups_is_refused(name: str) -> None:
    with temporary_cgroup("root"):  # skips where there is no tree
        assert_refused("every process of the machine is in it", "--cgroup", name)


def test_a_cgroup_without_a_process_is_an_error_and_one_that_is_a_process_s_own_is_not() -> None:
    with temporary_cgroup("nobody") as cgroup:
        assert_refused("there is no process", "--cgroup", cgroup)
        program = "import ctypes; ctypes.CDLL(None).prctl(15, b'kubelet', 0, 0, 0); print(flush=True); input()"
        command = [sys.executable, "-c", program]  # PR_SET_NAME
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as popen:
            assert popen.stdout is not None
            popen.stdout.readline()
            (cgroup / "inner").mkdir()
            (cgroup / "inner" / "cgroup.procs").write_text(str(popen.pid))
            run = start("--cgroup", cgroup, "--dry-run", "--duration", "1s")
            _, messages = run.communicate(timeout=WAIT_S)
            assert run.returncode == 1
            assert "there is no process but what is left alone unless named: kubelet" in messages
            run = start("--cgroup", cgroup / "inner", "--dry-run")
            first_lines(run)
            popen.communicate("\n", timeout=WAIT_S)


def test_states_are_objects_if_they_are_to_be_and_none_if_it_is_to_be_quiet() -> None:
    with workload(1, 1) as load:
        words = ["--pid", load.pid, "--dry-run", "--duration", "2s", "--interval", "1s", "--log-format", "json"]
        run = start(*words, "--json")
        output, messages = run.communicate(timeout=WAIT_S)
        states = [json.loads(line) for line in output.splitlines()]
        assert [state["event"] for state in states] == ["scan"] * (len(states) - 1) + ["end"]
        assert len(states) >= 2
        assert any(json.loads(line)["message"].endswith("chosen") for line in messages.splitlines())
        run = start(*words, "--quiet")
        output, messages = run.communicate(timeout=WAIT_S)
        assert (run.returncode, output) == (0, "dry run: nothing was moved; 0.0 MiB would have been\n")
        assert '"INFO"' not in messages


def test_a_process_that_is_left_alone_is_told_with_the_reason_and_promised_by_no_dry_run() -> None:
    with workload(1, 16, write=True) as load:
        os.sched_setscheduler(load.pid, os.SCHED_RR, os.sched_param(1))
        run = start("--pid", load.pid, "--dry-run", "--idle-after", "1s")
        assert run.stdout is not None
        lines = []
        for line in run.stdout:
            lines.append(line)
            if "leaves alone" in line:
                break
        run.terminate()
        output, messages = run.communicate(timeout=WAIT_S)
    assert f"pid {load.pid}: has a real-time thread" in lines[-1]
    assert f"pid {load.pid} is left alone: it has a real-time thread" in messages
    assert not any(would_move_mib(line) for line in [*lines, *output.splitlines()])
    assert "; 0.0 MiB would have been" in output
