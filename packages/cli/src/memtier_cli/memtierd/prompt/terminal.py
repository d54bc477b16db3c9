"""Line editing, history and completion at a terminal, by the standard library's readline."""

from __future__ import annotations

import os
import readline
from pathlib import Path

from memtier_cli.libraries import logger
from memtier_cli.memtierd.prompt.commands import COMMANDS
from memtier_cli.memtierd.prompt.output import Output

HISTORY_LINES = 1000


class TerminalLines:
    """Lines that a person types."""

    interactive = True

    def __init__(self, history: Path | None) -> None:
        """`history`: read now, appended to with each line, mode 0600; None: lines are remembered in memory only."""
        self._history = history
        readline.set_history_length(HISTORY_LINES)
        readline.set_auto_history(False)
        readline.set_completer(complete)
        readline.set_completer_delims(" \t")
        readline.parse_and_bind("tab: complete")
        if history is not None:
            self._load(history)

    def read(self, prompt: str, output: Output) -> str | None:
        """See `Lines.read`. None after Ctrl-D on an empty line."""
        try:
            line = input(prompt if output.to_stream else "")
        except EOFError:
            return None
        count = readline.get_current_history_length()
        if line.strip() and (not count or readline.get_history_item(count) != line):
            readline.add_history(line)
            self._save()
        return line

    def _load(self, history: Path) -> None:
        try:
            history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(history, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            readline.read_history_file(history)
        except OSError as failure:
            logger().debug("history {}: {}", history, failure.strerror)
            self._history = None

    def _save(self) -> None:
        if self._history is None:
            return
        try:
            readline.append_history_file(1, self._history)
        except OSError as failure:
            logger().debug("history {}: {}", self._history, failure.strerror)
            self._history = None


def complete(text: str, number: int) -> str | None:
    """The completion of that number: of a command at the start of the line, after it of its flags."""
    found = candidates(readline.get_line_buffer()[: readline.get_begidx()], text)
    return found[number] if number < len(found) else None


def candidates(before: str, text: str) -> list[str]:
    """What `text` may become when `before` stands in front of it on the line."""
    words = before.split()
    if not words:
        return [f"{name} " for name in sorted(COMMANDS) if name.startswith(text)]
    command = COMMANDS.get(words[0])
    if command is None or not text.startswith("-"):
        return []
    return [
        f"-{flag.name} "
        for flag in sorted(command.flags, key=lambda flag: flag.name)
        if f"-{flag.name}".startswith(text)
    ]
