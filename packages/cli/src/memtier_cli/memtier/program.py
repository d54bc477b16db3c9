"""Program `memtier`: the only file that turns errors into a line on stderr and an exit status.

Exit status: 0 done, 1 a configuration or kernel call failed, 2 wrong usage, 3 (`check`) nothing works here,
128 + N ended by signal N (130: Ctrl-C) before there was a result.
"""

from __future__ import annotations

import errno
import sys
from importlib import import_module

import click

from memtier_cli import standard_files

COMMANDS = {
    "check": "Show what this kernel offers and how to get what is missing.",
    "demo": "Page out the idle memory of a real process and show it.",
    "run": "Run the engine on a cgroup or on processes.",
}


class LazyGroup(click.Group):
    """Imports a command's module when it is called: `--version` and `--help` stay fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"memtier_cli.memtier.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click, with a suggestion for a name that is misspelt."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
            others = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(COMMANDS))}"
            ctx.fail(f"no command is named {name!r}: {others}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Names and help texts, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="memtier-cli", prog_name="memtier")
def memtier() -> None:
    """Find memory that is not used, and page it out or move it to another NUMA node."""


def main() -> None:
    """Entry point of `memtier`."""
    standard_files.occupy()
    try:
        status = memtier.main(standalone_mode=False)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except Exception as error:
        from memtier_engine.errors import MemtierError  # here: importing it costs `--version` a third

        if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # of the output: files have errors of ours
            from memtier_cli.front import output_is_full

            output_is_full("memtier", error)
        if not isinstance(error, MemtierError):
            raise
        print(f"memtier: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)
