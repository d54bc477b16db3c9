"""What the tracker and the watcher of the current policy have in common: they can be asked, the policy steers them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memtier_cli.memtierd.prompt.errors import CommandError

if TYPE_CHECKING:
    from memtier_cli.memtierd.prompt.policy_part import PolicyPart


class PolicyOwned:
    """Refuses to be steered, and says which command does it."""

    kind = ""

    def __init__(self, policy: PolicyPart) -> None:
        self._policy = policy
        self.config_text: str | None = None

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
