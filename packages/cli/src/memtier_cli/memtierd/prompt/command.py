"""What a command is, and what most of them need of the prompt that runs them.

Each command's module says in a protocol of its own what it needs; none knows the prompt itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from memtier_cli.flags import Flag, Parsed

if TYPE_CHECKING:
    from memtier_engine.hostfs.host import Host
    from memtier_engine.stats.recorder import Statistics

Needs_contra = TypeVar("Needs_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class Command(Generic[Needs_contra]):
    """One command of the prompt, for prompts that have what it needs."""

    name: str
    run: Callable[[Needs_contra, Parsed], None]
    flags: tuple[Flag, ...] = ()
    any_words: bool = False
    """Whatever stands behind it is not looked at, flags neither."""


class Console(Protocol):
    """Takes a command's output."""

    def write(self, text: str) -> None:
        """Output as it is."""

    def say(self, line: str) -> None:
        """A line of output."""

    def say_all(self, lines: Sequence[str]) -> None:
        """Lines of output in one piece."""


class OnHost(Protocol):
    """Knows what is worked on."""

    @property
    def host(self) -> Host:
        """The machine."""


class Counted(Protocol):
    """Knows where it is counted."""

    @property
    def statistics(self) -> Statistics:
        """What engines have done."""


class Machine(OnHost, Counted, Protocol):
    """What is worked on, and where it is counted."""
