"""A line of the prompt into words, and cut at its pipe. No IO."""

from __future__ import annotations


class QuotingError(Exception):
    """A quote that is not closed, or nothing after a backslash; the message is the reference's."""


def split_pipe(line: str) -> tuple[str, str]:
    """(command, shell command): cut at the first `|`, in quotes or not. Without one the second is empty."""
    command, _, shell = line.partition("|")
    return command, shell.strip()


def split_words(line: str) -> list[str]:
    """The words of a command.

    White space separates. '...' and "..." keep it together, also as a part of a word; a backslash takes the next
    character as it is, in quotes too. A word that is empty, quoted or not, is no word.

    Raises:
        QuotingError: the line ends within quotes or after a backslash.
    """
    words: list[str] = []
    word: list[str] = []
    quote = ""
    characters = iter(line)
    for character in characters:
        if character == "\\":
            escaped = next(characters, None)
            if escaped is None:
                raise QuotingError("missing escaped character")
            word.append(escaped)
        elif quote:
            if character == quote:
                quote = ""
            else:
                word.append(character)
        elif character in "'\"":
            quote = character
        elif character.isspace():
            _end(word, words)
        else:
            word.append(character)
    if quote:
        raise QuotingError(f"unterminated quoted ({quote}) string")
    _end(word, words)
    return words


def _end(word: list[str], words: list[str]) -> None:
    if word:
        words.append("".join(word))
        word.clear()
