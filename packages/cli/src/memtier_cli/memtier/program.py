"""Program `memtier`: the only file that turns errors into a line on stderr and an exit status.

Exit status: 0 done, 1 a configuration or kernel call failed, 2 wrong usage, 3 (`check`) nothing works here,
128 + N ended by signal N (130: Ctrl-C) before there was a result.
"""

from __future__ import annotations

import errno
import sys
from importlib import import_module
from importlib.metadata import version

import click

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

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Names and help texts, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version=version("memtier-cli"), prog_name="memtier")
def memtier() -> None:
    """Find memory that is not used, and page it out or move it to another NUMA node."""


def main() -> None:
    """Entry point of `memtier`."""
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
