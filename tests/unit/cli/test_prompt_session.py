"""Sessions of the prompt: what is printed around commands, and that nothing but `q` and the end of input ends one."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loguru import logger

from memtier_cli.memtierd.prompt import session
from memtier_cli.memtierd.prompt.commands import COMMANDS
from memtier_cli.memtierd.prompt.errors import Fatal
from memtier_cli.memtierd.prompt.lines import LINE_BYTES_MAX, StreamLines, TextLines
from memtier_cli.memtierd.prompt.output import Output
from memtier_cli.memtierd.prompt.session import run_line, run_session, run_words
from memtier_cli.memtierd.prompt.state import Prompt
from memtier_engine.hostfs.host import Host


@pytest.fixture
def prompt(tmp_path: Path) -> Iterator[Prompt]:
    """A prompt on a machine without any file."""
    (tmp_path / "proc").mkdir()
    made = Prompt(Output(io.StringIO()), Host(tmp_path))
    yield made
    made.close()


def shown(prompt: Prompt) -> str:
    stream = prompt.output._stream
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def test_a_text_runs_to_its_end_and_says_so(prompt: Prompt) -> None:
    run_session(prompt, TextLines("nop\n\n  \nfoo"))
    assert shown(prompt) == (
        'memtierd> memtierd> memtierd> memtierd> unknown command "foo"\nmemtierd> quit: EOF\nquit.\n'
    )


def test_an_end_of_line_at_the_end_of_a_text_makes_one_more_line(prompt: Prompt) -> None:
    run_session(prompt, TextLines("nop\n"))
    assert shown(prompt) == "memtierd> memtierd> memtierd> quit: EOF\nquit.\n"


def test_echo_prints_each_line_behind_the_prompt(prompt: Prompt) -> None:
    run_session(prompt, TextLines("nop  x\nq"), echo=True)
    assert shown(prompt) == "memtierd> nop  x\nmemtierd> q\nquit.\n"


def test_q_ends_this_session_only(prompt: Prompt) -> None:
    run_session(prompt, TextLines("q\nfoo"))
    run_session(prompt, TextLines("bar"))
    assert shown(prompt) == 'memtierd> quit.\nmemtierd> unknown command "bar"\nmemtierd> quit: EOF\nquit.\n'


def test_q_with_h_prints_usage_and_goes_on(prompt: Prompt, capfd: pytest.CaptureFixture[str]) -> None:
    run_session(prompt, TextLines("q -h\nnop"))
    assert shown(prompt) == "memtierd> memtierd> memtierd> quit: EOF\nquit.\n"
    assert capfd.readouterr().err.startswith("Usage of q:")


def test_a_last_line_without_its_end_is_not_run(prompt: Prompt) -> None:
    """It may be the first half of a command."""
    run_session(prompt, StreamLines(io.BytesIO(b"foo\r\nbar")))
    assert shown(prompt) == 'memtierd> unknown command "foo"\nmemtierd> quit: EOF\nquit.\n'


def test_a_line_that_never_ends_is_skipped_in_bounded_memory(prompt: Prompt) -> None:
    run_session(prompt, StreamLines(io.BytesIO(b"x" * (3 * LINE_BYTES_MAX) + b"\nfoo\n")))
    assert shown(prompt) == (
        f"memtierd> line of more than {LINE_BYTES_MAX} bytes skipped\n"
        'memtierd> unknown command "foo"\nmemtierd> quit: EOF\nquit.\n'
    )


def test_bytes_that_are_no_text_end_nothing(prompt: Prompt) -> None:
    run_session(prompt, StreamLines(io.BytesIO(b"\xff\x00\nnop\n")))
    assert shown(prompt).endswith("memtierd> memtierd> quit: EOF\nquit.\n")


def test_statuses_tell_unknown_commands_and_bad_quoting_and_no_other_failure(prompt: Prompt) -> None:
    assert run_line(prompt, "nop") == 0
    assert run_line(prompt, "") == 0
    assert run_line(prompt, "pages -pid 999999999") == 0
    assert run_line(prompt, "pages -pid x") == 0
    assert run_line(prompt, "foo") == 1
    assert run_line(prompt, "nop 'x") == 4
    assert run_words(prompt, ["foo"]) == 1
    assert "error in command \"nop 'x\": unterminated quoted (') string\n" in shown(prompt)


def test_wrong_flags_go_to_standard_error_with_the_usage(prompt: Prompt, capfd: pytest.CaptureFixture[str]) -> None:
    """A pipe does not get them."""
    run_line(prompt, "time -x | cat")
    assert shown(prompt) == ""
    assert capfd.readouterr().err.startswith("flag provided but not defined: -x\nUsage of time:\n  -elapsed string\n")


def test_help_lists_all_commands_in_the_layout_of_the_reference(prompt: Prompt) -> None:
    run_line(prompt, "help and what follows")
    lines = shown(prompt).splitlines()
    assert lines[0] == "Available commands:"
    assert [line.split()[0] for line in lines[1:15]] == [
        *("arange", "help", "log", "mover", "nop", "pages", "pidwatcher"),
        *("policy", "q", "routines", "stats", "swap", "time", "tracker"),
    ]
    assert all(line[:8] == " " * 8 and line[20] == " " and line[21] != " " for line in lines[1:15])
    assert lines[15] == "Syntax:"
    assert len(lines) == 19


def test_help_and_nop_do_not_look_at_what_stands_behind_them(prompt: Prompt, capfd: pytest.CaptureFixture[str]) -> None:
    for line in ("help -h", "help -x", "help"):
        run_line(prompt, line)
    assert shown(prompt).count("Available commands:") == 3
    before = shown(prompt)
    for line in ("nop -h", "nop -x y"):
        run_line(prompt, line)
    assert shown(prompt) == before
    assert capfd.readouterr().err == ""


def test_a_pipe_gets_the_output_and_its_output_is_ours(prompt: Prompt) -> None:
    assert run_line(prompt, "help | grep -c tracker; echo bad >&2") == 0
    assert shown(prompt) == "1\nbad\n"


def test_further_bars_are_the_shells(prompt: Prompt) -> None:
    run_line(prompt, "help | grep tracker | tr a-z A-Z | cut -c9-15")
    assert shown(prompt) == "TRACKER\n"


def test_without_a_command_the_shell_gets_empty_input(prompt: Prompt) -> None:
    run_line(prompt, "| wc -c")
    assert shown(prompt).strip() == "0"


def test_a_shell_that_does_not_read_ends_nothing(prompt: Prompt) -> None:
    run_session(prompt, TextLines("help | true\nhelp | head -1\nhelp | exit 3"))
    assert shown(prompt) == "memtierd> memtierd> Available commands:\nmemtierd> memtierd> quit: EOF\nquit.\n"


def test_commands_of_a_configuration_file_have_no_pipes(prompt: Prompt, tmp_path: Path) -> None:
    prompt.trusted = False
    assert run_line(prompt, f"nop | touch {tmp_path}/made") == 2
    assert not (tmp_path / "made").exists()
    assert "-allow-programs" in shown(prompt)


def test_a_defect_in_a_command_does_not_end_the_session(prompt: Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(prompt: object, flags: object) -> None:
        raise RuntimeError("oops")

    broken = dict(COMMANDS) | {"nop": replace(COMMANDS["nop"], run=fail)}
    monkeypatch.setattr(session, "COMMANDS", broken)
    run_session(prompt, TextLines("nop\nfoo"))
    assert "nop failed: RuntimeError('oops')\n" in shown(prompt)
    assert shown(prompt).endswith('memtierd> unknown command "foo"\nmemtierd> quit: EOF\nquit.\n')


def test_ctrl_c_ends_what_is_typed_or_running_and_not_the_session(prompt: Prompt) -> None:
    class Typed:
        interactive = True
        left = ["nop", KeyboardInterrupt, "foo"]

        def read(self, banner: str, output: Output) -> str | None:
            if not self.left:
                return None
            found = self.left.pop(0)
            if not isinstance(found, str):
                raise KeyboardInterrupt
            return found

    run_session(prompt, Typed())
    assert shown(prompt) == '\nunknown command "foo"\nquit: EOF\nquit.\n'


def test_output_can_be_copied_to_the_log_or_go_only_there(prompt: Prompt) -> None:
    log: list[str] = []
    handler = logger.add(lambda message: log.append(str(message)), format="{level}: {message}")
    try:
        text = "log -prefix x\nlog -copy -prefix 'p: '\nfoo\nlog -capture\nbar\nlog -i 'a %d' -e b\nlog -copy\nbaz"
        run_session(prompt, TextLines(text))
    finally:
        logger.remove(handler)
    assert log == [
        'INFO: p: unknown command "foo"\n',
        'INFO: p: unknown command "bar"\n',
        "INFO: a %d\n",
        "ERROR: b\n",
        'INFO: p: unknown command "baz"\n',
        "INFO: p: quit: EOF\n",
        "INFO: p: quit.\n",
    ]
    assert "cannot set prefix, output is not copied or captured into log\n" in shown(prompt)
    assert "bar" not in shown(prompt)
    assert '"baz"' in shown(prompt)


def test_log_f_ends_the_program(prompt: Prompt) -> None:
    with pytest.raises(Fatal, match="that is it"):
        run_session(prompt, TextLines("log -f 'that is it'\nfoo"))


_WORDS = st.sampled_from(
    [
        *(name for name in COMMANDS if name != "log"),
        *{f"-{flag.name}" for command in COMMANDS.values() for flag in command.flags if flag.name != "sleep"},
        *(
            "-1",
            "0",
            "1",
            "99999999",
            "0x10",
            "x",
            "age",
            "heat",
            "idlepage",
            "finder",
            "multi",
            "pidlist",
            "stub",
            "[]",
        ),
        *(
            "statactions",
            "raw",
            "new",
            "start",
            "accessed",
            "1000-2000",
            '{"IntervalMs":5}',
            "{",
            "a: b",
            "events",
            "''",
        ),
    ]
)


_HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(deadline=None, max_examples=150, suppress_health_check=_HEALTH)
@given(st.lists(_WORDS, max_size=7))
def test_no_line_whatever_is_in_it_ends_the_session(tmp_path: Path, words: list[str]) -> None:
    """Every combination of commands, flags and values gives text and no traceback."""
    errors: list[str] = []
    handler = logger.add(lambda message: errors.append(str(message)), level="ERROR", filter="memtier_cli")
    prompt = Prompt(Output(io.StringIO()), Host(tmp_path))
    try:
        assert run_line(prompt, " ".join(words)) in (0, 1)
        assert run_line(prompt, "nop") == 0
    finally:
        prompt.close()
        logger.remove(handler)
    assert not errors
    assert not re.search(rf"^({'|'.join(COMMANDS)}) failed: ", shown(prompt), re.MULTILINE)
