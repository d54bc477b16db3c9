"""ttrpc and the Node Resource Interface: write a container runtime plugin as one class.

from nri_core import Adjustment, Plugin, run

class Swap(Plugin):
    name, index = "swap", "50"

    async def create_container(self, pod, container):
        return Adjustment().unified("memory.swap.max", "max")

run(Swap())
"""

from nri_core.aio.stub import Backoff, Stub, run
from nri_core.api.adjust import Adjustment, Device, Rlimit, Update
from nri_core.api.events import EventMask, parse_events
from nri_core.api.model import Container, ContainerState, Mount, Pod, Runtime
from nri_core.api.resources import Resources
from nri_core.driver import Driver, Outcome
from nri_core.errors import (
    Code,
    ConfigurationRefused,
    ConnectError,
    ConnectionLost,
    LocalProtocolError,
    MessageTooLarge,
    NriError,
    PluginAlreadyRunning,
    RegistrationRefused,
    RemoteProtocolError,
    RpcError,
    SessionError,
)
from nri_core.plugin import FailurePolicy, Plugin, Rejected, Validation

__all__ = [
    "Adjustment",
    "Backoff",
    "Code",
    "ConfigurationRefused",
    "ConnectError",
    "ConnectionLost",
    "Container",
    "ContainerState",
    "Device",
    "Driver",
    "EventMask",
    "FailurePolicy",
    "LocalProtocolError",
    "MessageTooLarge",
    "Mount",
    "NriError",
    "Outcome",
    "Plugin",
    "PluginAlreadyRunning",
    "Pod",
    "RegistrationRefused",
    "Rejected",
    "RemoteProtocolError",
    "Resources",
    "Rlimit",
    "RpcError",
    "Runtime",
    "SessionError",
    "Stub",
    "Update",
    "Validation",
    "parse_events",
    "run",
]
