"""The life of a plugin's connection as a table, and what is learnt on the way. No IO, no clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, TypeVar

from nri_core.api.events import EventMask, known_events, pretty
from nri_core.api.model import Runtime
from nri_core.errors import ConfigurationRefused, LocalProtocolError, RemoteProtocolError
from nri_core.pb import nri_pb2
from nri_core.wire import BYTES, VARINT, fields

DEFAULT_REGISTRATION_TIMEOUT_S = 5.0
DEFAULT_REQUEST_TIMEOUT_S = 2.0
MAX_SYNCHRONIZED_BYTES = 128 << 20
"""Collected from a split Synchronize, as encoded; 2 000 containers make about 10 MiB. More is an attack."""
MAX_SYNCHRONIZED = 1 << 16
"""Pods and containers together, in all parts of one Synchronize: an empty one is two bytes on the wire."""

NOTHING = EventMask(0)
_PODS, _CONTAINERS, _MORE = (
    nri_pb2.SynchronizeRequest.DESCRIPTOR.fields_by_name[name].number for name in ("pods", "containers", "more")
)
T = TypeVar("T")
C = TypeVar("C")


class State(Enum):
    """Where the connection is in its life."""

    CONNECTED = "connected"
    REGISTERING = "registering"
    CONFIGURED = "configured"
    SYNCHRONIZING = "synchronizing"
    SERVING = "serving"
    CLOSED = "closed"


class Step(Enum):
    """What happens to a connection."""

    REGISTER = "RegisterPlugin"
    CONFIGURE = "Configure"
    SYNCHRONIZE_PART = "Synchronize with more to come"
    SYNCHRONIZE = "Synchronize"
    EVENT = "an event"
    UPDATE = "UpdateContainers"
    SHUTDOWN = "Shutdown"
    CLOSE = "the end of the connection"


LIFE: dict[State, dict[Step, State]] = {
    State.CONNECTED: {Step.REGISTER: State.REGISTERING},
    # Configure may arrive before the answer to RegisterPlugin.
    State.REGISTERING: {Step.CONFIGURE: State.CONFIGURED},
    # Runtimes before NRI v0.7 do not synchronize plugins that they launched: their first event comes at once.
    State.CONFIGURED: {
        Step.SYNCHRONIZE: State.SERVING,
        Step.SYNCHRONIZE_PART: State.SYNCHRONIZING,
        Step.EVENT: State.SERVING,
        Step.SHUTDOWN: State.CONFIGURED,
    },
    # An event here would be unusual, but to refuse it would fail a pod.
    State.SYNCHRONIZING: {
        Step.SYNCHRONIZE: State.SERVING,
        Step.SYNCHRONIZE_PART: State.SYNCHRONIZING,
        Step.EVENT: State.SYNCHRONIZING,
        Step.SHUTDOWN: State.SYNCHRONIZING,
    },
    # A runtime may configure and synchronize again; events come in between, as they happen.
    State.SERVING: {
        Step.EVENT: State.SERVING,
        Step.UPDATE: State.SERVING,
        Step.CONFIGURE: State.CONFIGURED,
        Step.SYNCHRONIZE: State.SERVING,
        Step.SYNCHRONIZE_PART: State.SYNCHRONIZING,
        Step.SHUTDOWN: State.SERVING,
    },
    State.CLOSED: {},
}
"""The state after each step; a step that is not there is a protocol error. CLOSE leads to CLOSED from anywhere."""

OUR_STEPS = frozenset({Step.REGISTER, Step.UPDATE})


class Session:
    """One connection's life."""

    def __init__(self) -> None:
        self.state = State.CONNECTED
        self.runtime: Runtime | None = None
        self.subscribed = EventMask(0)
        self._pods: list[Any] = []
        self._containers: list[Any] = []
        self._bytes = 0

    def step(self, step: Step) -> None:
        """Move on.

        Raises:
            LocalProtocolError: one of our own steps does not fit here.
            RemoteProtocolError: one of the runtime's does not.
        """
        if step is Step.CLOSE:
            self.state = State.CLOSED
            self._take_synchronized()
            return
        after = LIFE[self.state].get(step)
        if after is None:
            kind: Callable[[str], Exception] = LocalProtocolError if step in OUR_STEPS else RemoteProtocolError
            raise kind(f"{step.value} does not fit a connection that is {self.state.value}")
        self.state = after

    def configured(
        self, request: nri_pb2.ConfigureRequest, wanted: EventMask, required: EventMask = NOTHING
    ) -> EventMask:
        """Take over what Configure tells; returns the events to subscribe to.

        Of `wanted`, only what the runtime knows: it refuses a plugin that names others. Never 0, which would mean
        all: a plugin that wants nothing gets the harmless event RemovePodSandbox.

        Raises:
            ConfigurationRefused: the runtime is too old for one of `required`.
        """
        self.step(Step.CONFIGURE)
        self.runtime = Runtime(
            name=request.runtime_name,
            version=request.runtime_version,
            nri_version=request.NRI_version,
            config=request.config,
            # 0 from runtimes that are too old to tell
            registration_timeout_s=_seconds(request.registration_timeout, DEFAULT_REGISTRATION_TIMEOUT_S),
            request_timeout_s=_seconds(request.request_timeout, DEFAULT_REQUEST_TIMEOUT_S),
        )
        known = known_events(request.runtime_name, request.runtime_version, request.NRI_version)
        if required & ~known:
            raise ConfigurationRefused(
                f"{request.runtime_name} {request.runtime_version} does not know the events "
                f"{pretty(required & ~known)}, without which this plugin cannot work",
                hint="use a newer runtime: containerd 2.2, CRI-O 1.34",
            )
        self.subscribed = (wanted & known) or EventMask.REMOVE_POD_SANDBOX
        return self.subscribed

    def missing_events(self, wanted: EventMask) -> str:
        """What of `wanted` this runtime does not know, for a log message; empty if all is known."""
        return pretty(wanted & ~self.subscribed)

    def synchronized(
        self, request: nri_pb2.SynchronizeRequest
    ) -> tuple[list[nri_pb2.PodSandbox], list[nri_pb2.Container]] | None:
        """Collect a part; returns everything with the last one, None before.

        Raises:
            RemoteProtocolError: it does not fit here, or is too much.
        """
        return self._collected(request.more, request.pods, request.containers, request.ByteSize())

    def synchronized_bytes(self, data: bytes) -> tuple[list[bytes], list[bytes]] | None:
        """As `synchronized`, of an encoded SynchronizeRequest, whose pods and containers stay as they are.

        Raises:
            ValueError: it is no SynchronizeRequest.
        """
        pods: list[bytes] = []
        containers: list[bytes] = []
        more = False
        for number, kind, value in fields(data):
            if number == _PODS and kind == BYTES:
                pods.append(value)
            elif number == _CONTAINERS and kind == BYTES:
                containers.append(value)
            elif number == _MORE and kind == VARINT:
                more = bool(value)
            if len(pods) + len(containers) > MAX_SYNCHRONIZED:
                break
        return self._collected(more, pods, containers, len(data))

    def _collected(
        self, more: bool, pods: Sequence[T], containers: Sequence[C], size: int
    ) -> tuple[list[T], list[C]] | None:
        self.step(Step.SYNCHRONIZE_PART if more else Step.SYNCHRONIZE)
        self._bytes += size
        count = len(self._pods) + len(self._containers) + len(pods) + len(containers)
        if self._bytes > MAX_SYNCHRONIZED_BYTES or count > MAX_SYNCHRONIZED:
            self._take_synchronized()
            raise RemoteProtocolError(
                f"Synchronize with more than {MAX_SYNCHRONIZED_BYTES} bytes, "
                f"or more than {MAX_SYNCHRONIZED} pods and containers"
            )
        self._pods.extend(pods)
        self._containers.extend(containers)
        return None if more else self._take_synchronized()

    def _take_synchronized(self) -> tuple[list[Any], list[Any]]:
        """What was collected, which is not held any more: the next Synchronize begins with nothing."""
        everything = self._pods, self._containers
        self._pods, self._containers, self._bytes = [], [], 0
        return everything


def _seconds(milliseconds: int, default_s: float) -> float:
    return milliseconds / 1000 if milliseconds > 0 else default_s
