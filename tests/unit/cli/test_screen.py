"""What a long run says: a line that fits, messages that do not break it, and outputs that take nothing."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from memtier_cli.memtier.screen import fit
from memtier_cli.memtier.states import Told
from memtier_engine.engine.report import StepReport
from memtier_engine.engine.settings import EngineConfig
from memtier_engine.guards.base import GuardState, Scope
from memtier_engine.pages.ages import AGE_MAX
from support.waiting import WAIT_S

REASON = "waits for memory_psi_node: 12.5 % of the time somebody waits for memory, more than 5 %"


def report(*, processes: int = 45, reason: str = "") -> StepReport:
    closed = GuardState(
        name="memory_psi_node",
        open=False,
        active=True,
        reason=reason.partition(": ")[2],
        value=12.5,
        close_at=5.0,
        open_at=2.5,
        unit="%",
        since_s=0.0,
        scope=Scope.DEMOTION,
    )
    return StepReport(
        time_s=1.0,
        scans=7,
        tracker="bpf",
        processes=processes,
        tracked_bytes=1 << 40,
        resident_bytes=1294 << 20,
        paged_out_bytes=384 << 20,
        candidate_bytes=1 << 20,
        requested_bytes_total=0,
        moved_bytes_total=400 << 20,
        refault_bytes_total=1 << 20,
        scan_seconds=0.135,
        cpu_seconds_total=0.12,
        age_pages=np.zeros(256, np.int64),
        idle_s=np.zeros(AGE_MAX + 1),
        errors=(),
        guards=(closed,) if reason else (),
    )


def told(*, dry_run: bool = False) -> Told:
    return Told(EngineConfig(), dry_run=dry_run)


@pytest.mark.parametrize("reason", ["", REASON, REASON * 5])
def test_a_state_fits_whatever_the_width_and_keeps_its_reason(reason: str) -> None:
    state = report(reason=reason)
    for width in range(1, 400):
        line = told().line(state, width)
        assert len(line) <= width
        if reason and width >= 20:
            assert "waits for me" in line
        if width >= 50:
            assert "paged out 384.0 MiB" in line or reason
        if width >= 19 and not reason:
            assert "paged out 384.0 MiB" in line
    whole = told().line(state, 1000)
    assert whole.startswith("[bpf] 45 processes, resident 1294.0 MiB, idle 0.0 MiB, paged out 384.0 MiB, refaults")
    assert whole.endswith(reason or "CPU 0.12 s")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[0-9:.]+Z " + re.escape(whole), told().line(state, None))


def test_what_goes_first_goes_first() -> None:
    parts = ["aaaa", "bbbb", "cccc"]
    assert fit(parts, (1, 0, 2), "", 16) == "aaaa, bbbb, cccc"
    assert fit(parts, (1, 0, 2), "", 15) == "aaaa, cccc"
    assert fit(parts, (1, 0, 2), "", 9) == "cccc"
    assert fit(parts, (1, 0, 2), "why", 9) == "cccc, why"
    assert fit(parts, (1, 0, 2), "a long reason", 9) == "a long..."


def test_a_run_that_looked_at_nobody_has_a_reason() -> None:
    run = told()
    run.add(replace(report(processes=0), errors=("process 7 is observed already",)))
    assert run.nothing_seen(ended=False)
    assert run.why_nothing == "no process could be looked at: process 7 is observed already"
    young = told()
    young.add(report(processes=0))
    assert not young.nothing_seen(ended=False)
    assert young.nothing_seen(ended=True)
    young.add(report())
    assert not young.nothing_seen(ended=True)


def test_states_and_result_as_json_have_bytes_and_reasons() -> None:
    run = told(dry_run=True)
    run.add(report(reason=REASON))
    state = run.as_dict(report(reason=REASON))
    assert (state["event"], state["resident_bytes"], state["held_back_by"]) == (
        "scan",
        1294 << 20,
        [REASON.removeprefix("waits for ")],
    )
    assert (run.result()["event"], run.result()["would_move_bytes"], run.result()["scans"]) == ("end", 1 << 20, 7)


PROGRAM = """
import sys
from memtier_cli.logs import configure_console
from memtier_cli.memtier.screen import Screen
from loguru import logger
with Screen(as_json=sys.argv[1] == "lines") as screen:
    configure_console(screen.message)
    while sys.argv[1] == "gone" and not screen._out.lost_total:
        screen.state("a state that nobody takes")
    for number in range(3):
        screen.state(f"state {number} \\u00e9\\x1b[31m")
        logger.warning("message {}", number)
    screen.result("the end")
"""


def at_a_terminal(how: str = "in_place", **environment: str) -> bytes:
    pid, terminal = pty.fork()
    if pid == 0:
        words = [sys.executable, "-c", PROGRAM, how]
        os.execve(sys.executable, words, {**os.environ, "TERM": "xterm", "PYTHONUTF8": "1", **environment})
    shown = b""
    try:
        while part := os.read(terminal, 65536):
            shown += part
    except OSError:  # EIO: it has ended
        pass
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown
    return shown


def seen(shown: bytes) -> list[str]:
    """The lines that stand on the terminal at the end."""
    lines = [""]
    for part in re.split(r"(\r|\n|\x1b\[K)", shown.decode().replace("\r\n", "\n")):
        if part == "\n":
            lines.append("")
        elif part == "\r":
            lines[-1] = ""  # what follows is as long, or the rest is cleared
        elif part != "\x1b[K":
            lines[-1] += part
    return [re.sub(r"^[-0-9T:.]+Z ", "", line) for line in lines]


def test_on_a_terminal_messages_stand_above_the_state_which_stays_the_last_line() -> None:
    shown = at_a_terminal()
    assert seen(shown) == [
        *(f"WARN: message {number}" for number in range(3)),
        "state 2 \u00e9\\x1b[31m",
        "the end",
        "",
    ]
    assert shown.count(b"\r\x1b[K20") == 3  # the state is cleared before each message, then shown again below it


@pytest.mark.parametrize(("how", "environment"), [("in_place", {"TERM": "dumb"}), ("lines", {})])
def test_a_terminal_that_cannot_go_back_gets_one_line_after_the_other(how: str, environment: dict[str, str]) -> None:
    shown = at_a_terminal(how, **environment)
    assert b"\x1b" not in shown
    assert sorted(seen(shown)) == sorted(
        [
            *(f"WARN: message {number}" for number in range(3)),
            *(f"state {number} \u00e9\\x1b[31m" for number in range(3)),
            *("the end", ""),
        ]
    )


def test_a_terminal_that_takes_ascii_only_gets_nothing_else() -> None:
    shown = at_a_terminal(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii")
    assert shown.isascii()
    assert "state 2 \\xe9\\x1b[31m" in seen(shown)


@pytest.mark.parametrize("output", ["/dev/full", "a reader that is gone"])
def test_an_output_that_takes_nothing_is_told_once_and_ends_nothing(output: str) -> None:
    if output == "/dev/full":
        target = os.open(output, os.O_WRONLY)
    else:
        reader, target = os.pipe()
        os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, "gone"],
            stdout=target,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=WAIT_S,
        )
    finally:
        os.close(target)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("standard output takes no more") == 1
    assert "message 2" in done.stderr


OBJECTS = """
import resource
from memtier_cli import logqueue
from memtier_cli.memtier.screen import Screen
logqueue._AGAIN_S = 0.01
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))  # as a disk that is full, and then is not
with Screen(as_json=True) as screen:
    for _ in range(6):
        screen.state('{"event": "scan"}')
    with screen._out._changed:
        screen._out._changed.wait_for(lambda: screen._out.lost_total)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    screen.result('{"event": "end"}')
    assert screen._out.flush(60)
"""


def test_states_as_json_stay_so_where_some_are_lost(tmp_path: Path) -> None:
    """Each but the one that was cut off where the disk was full."""
    path = tmp_path / "states"
    with path.open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-c", OBJECTS], stdout=file, stderr=subprocess.PIPE, check=False, timeout=WAIT_S
        )
    assert done.returncode == 0, done.stderr
    *scans, cut, one, other = path.read_text().splitlines()
    assert [json.loads(line) for line in scans] == [{"event": "scan"}] * 5
    assert cut == '{"event": "scan"}'[:10]
    assert sorted(map(json.loads, (one, other)), key=str) == [{"event": "end"}, {"event": "lost", "lines": 1}]
