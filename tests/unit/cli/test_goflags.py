"""Command lines in Go's manner."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from memtier_cli.flags import Flag, HelpWanted, Parsed, UsageError, parse, usage
from memtier_cli.front import read_flags

FLAGS = (Flag("config", "a file", "FILE"), Flag("c", "commands", "STRING"), Flag("debug", "more messages"))


@pytest.mark.parametrize(
    ("words", "texts", "booleans", "rest"),
    [
        (["-config", "a"], {"config": "a"}, {}, []),
        (["--config", "a"], {"config": "a"}, {}, []),
        (["-config=a=b"], {"config": "a=b"}, {}, []),
        (["-config", "-debug"], {"config": "-debug"}, {}, []),
        (["-c", "", "-debug"], {"c": ""}, {"debug": True}, []),
        (["-debug", "false"], {}, {"debug": True}, ["false"]),
        (["-debug=false"], {}, {"debug": False}, []),
        (["-debug=1", "x", "-c", "y"], {}, {"debug": True}, ["x", "-c", "y"]),
        (["-debug", "--", "-c"], {}, {"debug": True}, ["-c"]),
        (["-"], {}, {}, ["-"]),
        ([], {}, {}, []),
    ],
)
def test_flags_are_read_as_go_reads_them(
    words: list[str], texts: dict[str, str], booleans: dict[str, bool], rest: list[str]
) -> None:
    assert parse(FLAGS, words) == Parsed(texts, booleans, rest)


def test_words_that_are_ignored_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["memtierd", "-debug", "false", "-c", "x"])
    assert read_flags("memtierd", FLAGS) == Parsed({}, {"debug": True}, ["false", "-c", "x"])
    assert capsys.readouterr().err.startswith("memtierd: ignored: false -c x (")
    monkeypatch.setattr("sys.argv", ["memtierd", "-debug=false", "-c", "x"])
    assert read_flags("memtierd", FLAGS) == Parsed({"c": "x"}, {"debug": False})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-x"], "not defined: -x"),
        (["-config"], "needs an argument: -config"),
        (["-debug=maybe"], 'invalid boolean value "maybe"'),
        (["---debug"], "bad flag syntax"),
        (["-=x"], "bad flag syntax"),
    ],
)
def test_a_wrong_word_is_named(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(FLAGS, words)


NUMBERS = (Flag("i", "an integer", "int"), Flag("u", "no sign", "uint"), Flag("f", "a number", "float"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("0", 0), ("-7", -7), ("+7", 7), ("0x1F", 31), ("0X1f", 31), ("010", 8), ("0o10", 8), ("-010", -8)),
        *(("0_10", 8), ("0b101", 5), ("1_000", 1000), ("0x_1f", 31), ("9223372036854775807", (1 << 63) - 1)),
    ],
)
def test_integers_are_written_as_in_go(text: str, value: int) -> None:
    assert parse(NUMBERS, ["-i", text]).integer("i", -1) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *((["-i", text], "parse error") for text in ("", "x", "1_", "_1", "1__0", "0x_", "0x", "09", "1.5", " 1", "٣")),
        (["-i", "9223372036854775808"], "value out of range"),
        (["-i", "-9223372036854775809"], "value out of range"),
        (["-u", "-1"], "parse error"),
        (["-u", "18446744073709551616"], "value out of range"),
        (["-f", "nan"], "parse error"),
    ],
)
def test_what_is_no_number_is_refused_in_go_s_words(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(NUMBERS, words)
    assert str(caught.value) == f'invalid value "{words[1]}" for flag {words[0]}: {message}'


@given(st.sampled_from("iuf"), st.one_of(st.text(), st.text("0123456789+-_xobXOBabef.", max_size=12)))
@example("i", "9" * 5000)
def test_any_text_is_a_number_or_wrong_usage(flag: str, text: str) -> None:
    try:
        parsed = parse(NUMBERS, [f"-{flag}={text}"])
    except UsageError:
        return
    value = parsed.number("f", 0.0) if flag == "f" else parsed.integer(flag, 0)
    assert value == value


@pytest.mark.parametrize("word", ["-h", "--help", "-help"])
def test_help_is_built_in(word: str) -> None:
    with pytest.raises(HelpWanted):
        parse(FLAGS, ["-debug", word])


def test_usage_lists_every_flag() -> None:
    text = usage("memtierd", FLAGS)
    assert text.splitlines()[0] == "Usage of memtierd:"
    for flag in FLAGS:
        assert f"  -{flag.name}" in text
