"""Command `policy`: create, configure, start and look into the policy."""

from __future__ import annotations

from typing import Protocol

from memtier_cli.flags import Flag, Parsed
from memtier_cli.memtierd.prompt import configs
from memtier_cli.memtierd.prompt.command import Command, Console, Machine
from memtier_cli.memtierd.prompt.policy_dumps import dump
from memtier_cli.memtierd.prompt.policy_part import PolicyPart
from memtier_engine.config.policies import POLICIES

_NONE = "no policy, create one with -create NAME"


class PolicyNeeds(Console, Machine, Protocol):
    """What `policy` needs of a prompt."""

    policy: PolicyPart | None

    def attach(self, policy: PolicyPart) -> None:
        """Make a policy the current one, with its tracker and its watcher."""


def _policy(prompt: PolicyNeeds, flags: Parsed) -> None:
    if flags.boolean("ls"):
        prompt.say_all(sorted(POLICIES))
    policy = prompt.policy
    if "create" in flags.texts:
        policy = PolicyPart(prompt, flags.text("create"))
        prompt.say("policy created")
        if prompt.policy is None:
            prompt.attach(policy)  # also if its configuration, which comes next, is refused
    policy = configs.there(policy, flags, _NONE)
    if policy is None:
        return
    configs.configure_as_told(policy, flags)
    prompt.attach(policy)
    configs.start_as_told(policy, flags)
    if flags.boolean("config-dump"):
        prompt.say(configs.dump("policy", policy.name, policy.config_text))
    if flags.boolean("stop"):
        policy.stop()
        prompt.say("policy stopped")
    if flags.boolean("dump"):
        prompt.write(dump(prompt.host, policy, flags.rest) + "\n")


POLICY = Command(
    "policy",
    _policy,
    (
        *configs.part_flags("policies", "the policy"),
        Flag("start", "start it"),
        Flag("stop", "stop it"),
        Flag("dump", "print its state; what follows says what (age: accessed [TIMES [PIDS]])"),
    ),
)
