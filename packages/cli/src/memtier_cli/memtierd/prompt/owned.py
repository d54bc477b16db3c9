"""What the tracker and the watcher of the current policy have in common: they can be asked, the policy steers them."""

from __future__ import annotations

from typing import Protocol

from memtier_cli.memtierd.prompt.configs import part_text
from memtier_cli.memtierd.prompt.errors import CommandError
from memtier_engine.config.files import Spec
from memtier_engine.hostfs.host import Host
from memtier_engine.stats.counts import AccessCounts
from memtier_engine.stats.raw_events import RawEvents


class Policy(Protocol):
    """The policy that they belong to, as far as they ask it."""

    name: str
    spec: Spec | None
    config_text: str | None
    counts: AccessCounts
    raw: RawEvents

    @property
    def host(self) -> Host:
        """The machine."""

    def pids(self) -> list[int]:
        """The processes it follows now."""


class PolicyOwned:
    """Refuses to be steered, and says which command does it."""

    kind = ""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @property
    def config_text(self) -> str | None:
        """As it was given with the policy's; None: not at all."""
        return part_text(self._policy.name, self._policy.config_text, self.kind)

    def configure(self, text: str, file: str | None = None) -> None:
        """Refused."""
        raise self._refusal("use policy -config")

    def stop(self) -> None:
        """Refused."""
        raise self._refusal("use policy -stop")

    def close(self) -> None:
        """Nothing: the policy closes it."""

    def _refusal(self, instead: str) -> CommandError:
        return CommandError(f'the {self.kind} belongs to policy "{self._policy.name}", {instead}')
