"""`memtierd` as a program: -c, -f, -prompt and -config together, ends and signals, and a person at a terminal."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random

import pytest

from memtier_cli.memtierd.prompt.commands import COMMANDS
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.model import PAGE_BYTES
from support.cgroups import removed
from support.prompt import DEADLINE_S, MEMTIERD, PROMPT, Reader, memtierd
from support.swap import temporary_zram_swap
from support.toucher import Toucher, toucher
from support.waiting import until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")
STUB = "policy:\n  name: stub\n"
GUARDS_OFF = (
    "guards: {psimemorynode: null, psimemorycgroup: null, psiionode: null, psiiocgroup: null, swapfill: null, "
    "compression: null, refaults: null, swapwritesperday: null, startgracems: 0, skip: {rssleast: 0}}\n"
)


def run(*words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [str(MEMTIERD), *map(str, words)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=DEADLINE_S)


def test_c_then_f_then_standard_input_each_with_a_session_of_its_own(tmp_path: Path) -> None:
    """Stopwatches show that they share one prompt; `q` ends only the session it is in."""
    file = tmp_path / "commands"
    file.write_text("time -elapsed a | grep -c .\nq\nfoo\n")
    done = run("-c", "time -start a | cut -c1-14\nq", "-f", file, "-prompt", stdin="time -stop b\nlost")
    assert done.returncode == 0
    assert done.stdout == (
        'memtierd> stopwatch "a" \nmemtierd> quit.\n'
        "memtierd> 1\nmemtierd> quit.\n"
        'memtierd> stopwatch "b" not started\nmemtierd> quit: EOF\nquit.\n'
    )
    assert done.stderr == ""


def test_echo_prints_what_is_run() -> None:
    assert run("-echo", "-c", "nop x").stdout == "memtierd> nop x\nmemtierd> quit: EOF\nquit.\n"


def test_a_command_file_that_is_not_there_is_found_out_when_its_turn_comes() -> None:
    done = run("-c", "nop", "-f", "/nonexistent/x")
    assert (done.returncode, done.stdout) == (1, "memtierd> memtierd> quit: EOF\nquit.\n")
    assert done.stderr == "memtierd: -f /nonexistent/x: No such file or directory\n"


def test_without_anything_to_do_it_says_so() -> None:
    done = run("-echo", "-c", "", "-f", "")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "memtierd: nothing to do; give -config FILE, -c STRING, -f FILE or -prompt\n"


def test_log_f_ends_the_program_with_1_and_its_bare_message(tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = run("-l", log, "-c", "log -i 'one 100%'\nlog -d two\nlog -f three\nfoo")
    assert done.returncode == 1
    assert "foo" not in done.stdout
    assert log.read_text() == "INFO: one 100%\nthree\n"
    assert run("-l", log, "-debug", "-c", "log -d two").returncode == 0
    assert log.read_text().endswith("three\nDEBUG: two\n")


def test_output_that_nobody_reads_any_more_ends_it_quietly(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    wait = f"nop | until [ -e {gone} ]; do sleep 0.05; done"
    line = f"{MEMTIERD} -c '{wait}\nhelp\nhelp' | (exec <&-; touch {gone}); exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


@needs_root
def test_with_the_prompt_the_end_of_input_ends_a_running_policy_too(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(STUB)
    done = run("-config", path, "-prompt", stdin="policy -start\ntracker\n")
    assert done.returncode == 0
    assert done.stdout.splitlines()[:3] == [
        "memtierd> start failed: already started",
        "memtierd> no tracker, create one with -create NAME [-config CONFIG]",  # a stub policy has none
        "memtierd> quit: EOF",
    ]


@needs_root
def test_without_the_prompt_a_policy_runs_on_after_the_commands_until_a_signal(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(STUB)
    daemon = subprocess.Popen([MEMTIERD, "-config", path, "-c", "q"], stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    Reader(daemon.stdout.fileno()).until("quit.\n")
    with pytest.raises(subprocess.TimeoutExpired):
        daemon.wait(0.5)
    daemon.terminate()
    assert daemon.wait(DEADLINE_S) == 0
    daemon.stdout.close()


@pytest.mark.parametrize(
    ("number", "line"),
    [(signal.SIGTERM, "time -sleep 1000"), (signal.SIGINT, "nop | sleep 1000"), (signal.SIGHUP, None)],
)
def test_a_signal_ends_a_script_in_whatever_it_does_with_0(number: signal.Signals, line: str | None) -> None:
    with memtierd() as daemon:
        if line is not None:
            daemon.tell(line)
            time.sleep(0.2)  # wherever it is by then, the signal must end it
        daemon.popen.send_signal(number)
        status, errors = daemon.end()
        assert (status, errors) == (0, "")


@needs_root
def test_a_routine_of_a_configuration_runs_no_programs_unless_it_is_told_that_it_may(tmp_path: Path) -> None:
    path, made = tmp_path / "m.yaml", tmp_path / "made"
    path.write_text(
        f"{STUB}routines:\n  - name: statactions\n    config: |\n      intervalms: 20\n"
        f"      intervalcommand: [touch, {made}]\n"
    )
    done = run("-config", path, "-c", "nop")
    assert (done.returncode, done.stdout) == (1, "")
    assert "-allow-programs" in done.stderr
    with memtierd("-config", path, "-allow-programs") as daemon:
        daemon.ask_until("stats -t events", "RoutineStatActions.command.exec: touch... status: exit status 0")
    assert made.exists()


@needs_root
def test_a_line_of_a_configuration_has_no_pipe_and_one_of_the_operator_has(tmp_path: Path) -> None:
    path, made = tmp_path / "m.yaml", tmp_path / "made"
    config = (
        f'{{"IntervalMs": 20, "IntervalCommand": ["nop | touch {made}"], "IntervalCommandRunner": "memtier-prompt"}}'
    )
    path.write_text(f"{STUB}routines:\n  - name: statactions\n    config: '{config}'\n")
    with memtierd("-config", path) as daemon:
        event = f'RoutineStatActions.command.memtier-prompt: "nop | touch {made}" status: '
        daemon.ask_until("stats -t events", event + "2")
        assert not made.exists()
        daemon.ask("routines -stop")
        # Typed by a person, the same may. Its `|` would cut the line, so it comes from a file.
        (tmp_path / "routine").write_text(config)
        daemon.ask(f"routines -create statactions -config-file {tmp_path}/routine -start")
        daemon.ask_until("stats -t events", event + "0")
        assert made.exists()


@needs_root
def test_a_routine_prints_with_its_timestamps_and_knows_the_policy(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(
        f"{STUB}routines:\n  - name: statactions\n    config: |\n      intervalms: 20\n"
        "      intervalcommand: [policy, -config-dump]\n      intervalcommandrunner: memtier\n"
        '      timestamp: "before unix.s\\n"\n      timestampafter: "after\\n"\n'
    )
    with memtierd("-config", path) as daemon:
        daemon.reader.until("after\n")  # the first one may stand on both sides of the first prompt
        shown = daemon.reader.until("after\n")
        assert shown.startswith("before ")
        assert shown.endswith("\n\n")  # the stub's empty configuration
        assert '"IntervalCommand":["policy","-config-dump"]' in daemon.ask("routines -use 0 -config-dump")


@needs_root
def test_a_policy_of_a_file_pages_out_beside_the_prompt_and_tells(tmp_path: Path) -> None:
    """The whole way: file, tracker, policy, mover, swap, statistics; paused and continued by hand."""
    with temporary_zram_swap(64 << 20), toucher("anonymous", 4096, tmp_path) as child:
        child.write(range(4096))
        path = tmp_path / "m.yaml"
        path.write_text(
            f"{GUARDS_OFF}policy:\n  name: age\n  config: |\n    intervalms: 200\n    swapoutms: 600\n"
            "    mover: {intervalms: 10, bandwidth: 400}\n"
            f"    pidwatcher:\n      name: pidlist\n      config: 'pids: [{child.process.pid}]'\n"
            "    tracker:\n      name: refs\n      config: 'scanintervalms: 200'\n"
        )

        def out_pages() -> int:
            with Pagemap(Host(), child.process.pid) as pagemap:
                return pagemap.swapped_bytes(child.spans.starts, child.spans.ends) // PAGE_BYTES

        with memtierd("-config", path) as daemon:
            assert daemon.ask("mover -config-dump") == '{"IntervalMs":10,"Bandwidth":400}\n'
            until(lambda: out_pages() >= 4096 - 256, lambda: daemon.ask("policy -dump accessed 0,1s,0"))
            assert f"{child.process.pid:8d} " in daemon.ask("stats -t process_madvise")
            daemon.ask("mover -pause")
            child.read(range(4096))  # all comes back, and stays while the mover is held
            daemon.ask_until("mover -tasks", "dest: [swap]")
            assert out_pages() == 0
            daemon.ask("mover -continue")
            until(lambda: out_pages() >= 4096 - 256, lambda: daemon.ask("mover -tasks"))
            daemon.tell("q")
            status, _ = daemon.end()
            assert status == 0


@needs_root
def test_commands_beside_a_policy_whose_processes_are_killed_neither_fail_nor_hang(tmp_path: Path) -> None:
    """150 commands in random order and a kill between some of them; each answers, none shows a defect."""
    random = Random(5)
    root = Host().cgroup2_root / f"memtier-kills-{os.getpid()}"
    root.mkdir()
    config = (
        "{intervalms: 20, swapoutms: 40, mover: {intervalms: 1, bandwidth: 1000}, "
        f"pidwatcher: {{name: cgroups, config: {{cgroups: [{root}]}}}}, "
        "tracker: {name: refs, config: {scanintervalms: 20}}}"
    )
    lines = [
        *("policy -dump accessed 0,1s,0", "tracker -counters", "tracker -heat", "tracker -reset", "pidwatcher -dump"),
        *("mover -tasks", "mover -pause", "mover -continue", "mover -config 'bandwidth: 500'", "mover -pages-to 0"),
        *("policy -stop", "policy -start", "stats", "pages", "tracker -dump raw start", "tracker -dump raw new"),
        *("pages -pid PID", "arange -pid PID", "swap -pid PID -status", "swap -pid PID -out", "swap -pid PID -in"),
    ]
    try:
        with memtierd() as daemon, ExitStack() as children:

            def child() -> Toucher:
                made = children.enter_context(toucher("anonymous", 512, tmp_path))
                (root / "cgroup.procs").write_text(str(made.process.pid))
                made.write(range(512))
                return made

            alive = [child() for _ in range(3)]
            daemon.ask(f"policy -create age -config '{config}' -start")
            for number in range(150):
                victim = random.choice(alive)
                if number % 30 == 29:
                    victim.popen.kill()
                    victim.popen.wait()
                    alive[alive.index(victim)] = child()
                shown = daemon.ask(random.choice(lines).replace("PID", str(victim.process.pid)))
                assert not re.search(rf"^({'|'.join(COMMANDS)}) failed: ", shown, re.M), shown
            daemon.tell("q")
            status, errors = daemon.end()
            assert status == 0
            assert "Traceback" not in errors
    finally:
        until(lambda: removed(root))  # its processes were killed; the kernel lets it go when they are gone


class Terminal:
    """The program at a terminal of its own."""

    def __init__(self, home: Path, *words: str) -> None:
        self.master, slave = os.openpty()
        environment = {**os.environ, "HOME": str(home), "TERM": "xterm", "XDG_STATE_HOME": "", "INPUTRC": "/dev/null"}
        self.popen = subprocess.Popen(
            [MEMTIERD, "-prompt", *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)
        self.reader = Reader(self.master)
        self.reader.until(PROMPT)

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def ask(self, keys: str, answer: str) -> None:
        """Type, and wait for a text and the next prompt. The line itself is shown with the terminal's codes in it."""
        self.type(keys)
        self.reader.until(answer)
        self.reader.until(PROMPT)

    def interrupt(self) -> None:
        """Ctrl-C, and the new prompt."""
        self.type("\x03")
        self.reader.until(f"\r\n{PROMPT}")


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def terminal(home: Path, *words: str) -> Iterator[Terminal]:
    made = Terminal(home, *words)
    try:
        yield made
    finally:
        made.popen.kill()
        made.popen.wait()
        os.close(made.master)


UNKNOWN_FOO = 'unknown command "foo"\r\n'


def test_lines_are_edited_completed_and_remembered(tmp_path: Path) -> None:
    history = tmp_path / ".local/state/memtier/memtierd_history"
    with terminal(tmp_path) as person:
        person.ask("bar\r", 'unknown command "bar"')
        person.ask("oo\x01f\r", UNKNOWN_FOO)  # Ctrl-A: to the start of the line
        person.ask("tim\t-ela\ta\r", 'stopwatch "a" not started')  # Tab twice
        person.ask("\x1b[A\x1b[A\r", UNKNOWN_FOO)  # two lines up
        person.type("\x04")  # Ctrl-D
        assert person.reader.until("quit.").endswith("quit: EOF\r\n")
        assert person.popen.wait(DEADLINE_S) == 0
    assert history.read_text().splitlines() == ["bar", "foo", "time -elapsed a", "foo"]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    with terminal(tmp_path) as person:
        person.ask("\x1b[A\x1b[A\r", 'stopwatch "a" not started')


def test_ctrl_c_ends_what_runs_or_is_typed_and_the_session_goes_on(tmp_path: Path) -> None:
    with terminal(tmp_path) as person:
        person.type("foo")
        person.reader.until("foo")
        person.interrupt()  # the half line is gone
        for line in ("time -sleep 1000", "nop | sleep 1000"):
            person.type(f"{line}\r")
            person.reader.until("\r\n")
            time.sleep(0.2)  # wherever it is by then, it must end
            person.interrupt()
        person.ask("bar\r", 'unknown command "bar"')
        person.type("q\r")
        person.reader.until("quit.")
        assert person.popen.wait(DEADLINE_S) == 0


def test_a_history_that_cannot_be_kept_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".local").write_text("in the way")
    with terminal(tmp_path) as person:
        person.ask("foo\r", UNKNOWN_FOO)
        person.ask("\x1b[A\r", UNKNOWN_FOO)


def test_a_history_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    other, folder = tmp_path / "other", tmp_path / ".local/state/memtier"
    folder.mkdir(parents=True)
    other.write_text("untouched\n")
    (folder / "memtierd_history").symlink_to(other)
    with terminal(tmp_path) as person:
        person.ask("foo\r", UNKNOWN_FOO)
    assert other.read_text() == "untouched\n"


def test_a_terminal_that_goes_away_ends_it(tmp_path: Path) -> None:
    with terminal(tmp_path) as person:
        os.kill(person.popen.pid, signal.SIGHUP)
        assert person.popen.wait(DEADLINE_S) == 0


def test_the_program_starts_without_loading_the_prompt_for_its_usage() -> None:
    code = "import sys; sys.argv = ['memtierd', '-h']; from memtier_cli.memtierd.program import main; main(); "
    code += "print('numpy' in sys.modules, 'readline' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
