"""What programs do around their own work: usage, wrong flags and version before it; a standard output that is full."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from memtier_cli.flags import Flag, HelpWanted, Parsed, UsageError, parse, usage, version_text

BEHIND = "behind a word that is none; true and false are written -FLAG=true"
"""What to know of words that are left over."""


def read_flags(program: str, flags: Sequence[Flag], check: Callable[[Parsed], None] | None = None) -> Parsed | int:
    """The command line, or the exit status if there is nothing more to do: 0 after help and version, 2 wrong usage.

    `check` may raise UsageError for flags that do not go together. Words behind the flags are ignored, as by Go's
    programs, but not in silence: flags behind such a word are lost too.
    """
    try:
        parsed = parse(flags, sys.argv[1:])
        if parsed.boolean("version"):
            print(version_text(program))
            return 0
        if check is not None:
            check(parsed)
    except HelpWanted:
        print(usage(program, flags), file=sys.stderr)
        return 0
    except UsageError as error:
        print(f"{error}\n{usage(program, flags)}", file=sys.stderr)
        return 2
    if parsed.rest:
        print(f"{program}: ignored: {' '.join(parsed.rest)} (no flag is read {BEHIND})", file=sys.stderr)
    return parsed


def output_is_full(program: str, error: OSError) -> NoReturn:
    """End the program, whose standard output takes no more, with one line."""
    print(f"{program}: cannot write to standard output: {error.strerror}", file=sys.stderr)
    os._exit(1)  # the interpreter's own end would try to write once more, and complain
