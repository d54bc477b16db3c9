"""The base class of plugins: override what you handle, sync or async; the subscription follows."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Awaitable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from nri_core.api.adjust import Adjustment, Update
from nri_core.api.events import HANDLERS, EventMask
from nri_core.api.model import Container, Pod, Runtime
from nri_core.api.resources import Resources
from nri_core.driver import Driver
from nri_core.errors import LocalProtocolError
from nri_core.pb import nri_pb2

Updates = Sequence[Update] | None
Nothing = None | Awaitable[None]
Creation = Adjustment | tuple[Adjustment | None, Sequence[Update]] | None
"""An adjustment, or one with updates of other containers."""

_INDEX = re.compile(r"[0-9]{2}")
_NAME = re.compile(r"[A-Za-z0-9_.+-]+")


class Rejected(Exception):
    """Raised in `validate_container_adjustment`: the container is not created; the text is the reason."""


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """What the runtime shall do when this plugin does not answer (NRI v0.12.4; older runtimes drop it and go on)."""

    fail_request: bool = False
    """Fail the request. So do we, then, when a method is late. False: it goes on without us."""
    keep_connected: bool = False
    """Keep a plugin that was too late; each of its requests then takes the whole time limit."""

    def to_message(self) -> nri_pb2.FailurePolicy:
        """The message."""
        return nri_pb2.FailurePolicy(fail_request=self.fail_request, keep_connected=self.keep_connected)


@dataclass(frozen=True, slots=True)
class Validation:
    """What there is to judge: the container as asked for, and what all plugins together make of it."""

    pod: Pod
    container: Container
    raw: nri_pb2.ValidateContainerAdjustmentRequest

    @property
    def plugins(self) -> tuple[tuple[str, str], ...]:
        """(index, name) of every plugin that was asked, ours among them."""
        return tuple((each.index, each.name) for each in self.raw.plugins)


class Plugin:
    """Override the methods for the events you want. Each may be `def` or `async def`.

    A plain method runs in a thread of its own; an async one in the event loop and must not block it. The runtime
    waits for every answer, by default at most 2 s, and drops a plugin that is late: queue work, answer at once.
    An exception fails the request it was raised in (for CreateContainer: the container is not created).
    """

    name: str | None = None
    index: str | None = None
    """Two digits; plugins are called in the order of their index."""
    required: EventMask = EventMask(0)
    """Events without which the plugin is of no use: a runtime that does not know them is an error, not a warning."""
    exclusive: str | None = None
    """A kind, such as `memtierd`, of which only one plugin may be connected to a node, whatever index and name."""
    rivals: Collection[str] = ()
    """Programs that are of this kind and know nothing of `exclusive`, such as one written in Go. One that can be seen
    to be connected (as root, with the host's processes and sockets) keeps this plugin out as well."""
    failure_policy: FailurePolicy | None = None
    """None: the runtime's own, which is to go on without a plugin that does not answer, and to drop it."""
    stub: Driver | None = None
    """What runs it (a `Stub`): `await self.stub.update_containers([...])` while connected, not in a handler."""

    def configure(self, config: str, runtime: Runtime) -> Nothing:
        """Connected and registered. `config` is the administrator's text, for pre-launched plugins only."""

    def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> Updates | Awaitable[Updates]:
        """All that is there, at each connection. May return updates.

        Both are decoded when the first of them is looked at, which may be after the answer: see `nri_core.aio.records`.
        """
        return None

    def disconnected(self, error: BaseException | None) -> Nothing:
        """The connection ended; another attempt follows unless the plugin was told to stop."""

    def late(self, method: str, seconds: float) -> None:
        """`method` was about to exceed the time limit and was answered with nothing; it runs on."""

    def run_pod_sandbox(self, pod: Pod) -> Nothing:
        """A pod is being started; an exception fails it."""

    def update_pod_sandbox(self, pod: Pod, overhead: Resources, resources: Resources) -> Nothing:
        """A pod's resources are about to change (NRI v0.10)."""

    def post_update_pod_sandbox(self, pod: Pod) -> Nothing:
        """They changed (NRI v0.10)."""

    def stop_pod_sandbox(self, pod: Pod) -> Nothing:
        """A pod was stopped."""

    def remove_pod_sandbox(self, pod: Pod) -> Nothing:
        """A pod was removed."""

    def create_container(self, pod: Pod, container: Container) -> Creation | Awaitable[Creation]:
        """A container is about to be created. Return an adjustment, or (adjustment, updates of others)."""
        return None

    def post_create_container(self, pod: Pod, container: Container) -> Nothing:
        """It was created."""

    def start_container(self, pod: Pod, container: Container) -> Nothing:
        """It is about to start: its cgroup exists, none of its code ran."""

    def post_start_container(self, pod: Pod, container: Container) -> Nothing:
        """It started."""

    def update_container(self, pod: Pod, container: Container, resources: Resources) -> Updates | Awaitable[Updates]:
        """Its resources are about to change. May return updates, also of this container."""
        return None

    def post_update_container(self, pod: Pod, container: Container) -> Nothing:
        """They changed."""

    def stop_container(self, pod: Pod, container: Container) -> Updates | Awaitable[Updates]:
        """It stopped. May return updates of others."""
        return None

    def remove_container(self, pod: Pod, container: Container) -> Nothing:
        """It was removed."""

    def validate_container_adjustment(self, validation: Validation) -> Nothing:
        """Raise `Rejected` to refuse what the plugins together asked for (NRI v0.10)."""

    def events(self) -> EventMask:
        """The subscription: the events whose methods are overridden."""
        mask = EventMask(0)
        for event, method in HANDLERS.items():
            if getattr(type(self), method) is not getattr(Plugin, method):
                mask |= event
        return mask


def identity(plugin: Plugin, *, argv0: str | None = None) -> tuple[str, str]:
    """(name, index) of a plugin: its own, else NRI_PLUGIN_NAME and NRI_PLUGIN_IDX, else the program's `NN-name`.

    Raises:
        LocalProtocolError: there is none, or it is not well-formed.
    """
    name = plugin.name or os.environ.get("NRI_PLUGIN_NAME")
    index = plugin.index or os.environ.get("NRI_PLUGIN_IDX")
    program = Path(sys.argv[0] if argv0 is None else argv0).name
    if index is None:
        head, dash, tail = program.partition("-")
        if not dash or not _INDEX.fullmatch(head):
            raise LocalProtocolError(
                f"the plugin has no index: it is not set, NRI_PLUGIN_IDX is not, and {program!r} is not NN-name",
                hint="set `index` to two digits, such as '50'",
            )
        index, name = head, name or tail
    name = name or program
    if not _INDEX.fullmatch(index):
        raise LocalProtocolError(f"plugin index {index!r} is not two digits", hint="use 00 to 99, such as '50'")
    if not _NAME.fullmatch(name):
        raise LocalProtocolError(f"plugin name {name!r} is not well-formed", hint="use letters, digits and _ . + -")
    return name, index
