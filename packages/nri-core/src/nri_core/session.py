"""The life of a plugin's connection as a table, and what is learnt on the way. No IO, no clock."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from nri_core.api.events import EventMask, known_events, pretty
from nri_core.api.model import Runtime
from nri_core.errors import ConfigurationRefused, LocalProtocolError, RemoteProtocolError
from nri_core.pb import nri_pb2

DEFAULT_REGISTRATION_TIMEOUT_S = 5.0
DEFAULT_REQUEST_TIMEOUT_S = 2.0
MAX_SYNCHRONIZED_BYTES = 128 << 20
"""Collected from a split Synchronize, as encoded; 2 000 containers make about 10 MiB. More is an attack."""


NOTHING = EventMask(0)


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
        self._pods: list[nri_pb2.PodSandbox] = []
        self._containers: list[nri_pb2.Container] = []
        self._bytes = 0

    def step(self, step: Step) -> None:
        """Move on.

        Raises:
            LocalProtocolError: one of our own steps does not fit here.
            RemoteProtocolError: one of the runtime's does not.
        """
        if step is Step.CLOSE:
            self.state = State.CLOSED
            self._pods, self._containers, self._bytes = [], [], 0
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
        self.step(Step.SYNCHRONIZE_PART if request.more else Step.SYNCHRONIZE)
        self._bytes += request.ByteSize()
        if self._bytes > MAX_SYNCHRONIZED_BYTES:
            self._pods, self._containers = [], []
            raise RemoteProtocolError(f"Synchronize with more than {MAX_SYNCHRONIZED_BYTES} bytes")
        self._pods.extend(request.pods)
        self._containers.extend(request.containers)
        if request.more:
            return None
        everything = self._pods, self._containers
        self._pods, self._containers, self._bytes = [], [], 0
        return everything


def _seconds(milliseconds: int, default_s: float) -> float:
    return milliseconds / 1000 if milliseconds > 0 else default_s
