"""How the prompt cuts a line: words, quotes, backslashes, the pipe. Vectors: what the reference does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtier_cli.memtierd.prompt.words import QuotingError, split_pipe, split_words


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("policy -config '{\"A\": 1}' -start", ["policy", "-config", '{"A": 1}', "-start"]),
        (r"""a\ b "c \"d\" e" 'f \' g'""", ["a b", 'c "d" e', "f ' g"]),
        ('x"y z"w', ["xy zw"]),
        ("""\"it's" 'say "hi"'""", ["it's", 'say "hi"']),
        ("\"\" ''", []),
        ("-config '' -poll", ["-config", "-poll"]),
        ("  a\t b\r", ["a", "b"]),
        ("", []),
    ],
)
def test_words_are_those_of_the_reference(line: str, words: list[str]) -> None:
    assert split_words(line) == words


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("one 'two", "unterminated quoted (') string"),
        ('one "two', 'unterminated quoted (") string'),
        ("end\\", "missing escaped character"),
        ("'end\\", "missing escaped character"),
    ],
)
def test_an_unfinished_line_is_an_error(line: str, message: str) -> None:
    with pytest.raises(QuotingError) as caught:
        split_words(line)
    assert str(caught.value) == message


@given(st.lists(st.text(min_size=1).filter(lambda word: word.strip()), max_size=5))
def test_words_with_a_backslash_before_every_character_come_back_as_they_were(words: list[str]) -> None:
    line = " ".join("".join(f"\\{character}" for character in word) for word in words)
    assert split_words(line) == words


@pytest.mark.parametrize(
    ("line", "command", "shell"),
    [
        ("pages -pid 1", "pages -pid 1", ""),
        ("stats | grep a | wc -l", "stats ", "grep a | wc -l"),
        ("log -i 'a|b'", "log -i 'a", "b'"),
        ("nop |  ", "nop ", ""),
        ("| echo x", "", "echo x"),
    ],
)
def test_a_line_is_cut_at_its_first_bar_in_quotes_or_not(line: str, command: str, shell: str) -> None:
    assert split_pipe(line) == (command, shell)
