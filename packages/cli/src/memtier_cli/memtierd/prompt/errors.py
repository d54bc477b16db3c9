"""How a command of the prompt ends other than well."""

from __future__ import annotations


class CommandError(Exception):
    """A command could not do what it was told; the message is its output, the session goes on."""


class Fatal(Exception):
    """`log -f`: write the message to the log and end the program with 1."""
