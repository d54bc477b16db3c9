"""Command lines in Go's manner."""

from __future__ import annotations

import pytest

from memtier_cli.flags import Flag, HelpWanted, Parsed, UsageError, parse, usage

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


@pytest.mark.parametrize("word", ["-h", "--help", "-help"])
def test_help_is_built_in(word: str) -> None:
    with pytest.raises(HelpWanted):
        parse(FLAGS, ["-debug", word])


def test_usage_lists_every_flag() -> None:
    text = usage("memtierd", FLAGS)
    assert text.splitlines()[0] == "Usage of memtierd:"
    for flag in FLAGS:
        assert f"  -{flag.name}" in text
