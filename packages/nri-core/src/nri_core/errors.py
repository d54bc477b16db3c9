"""The error tree: our fault, the peer's fault, the transport's fault, and what the peer answered.

NriError
├── LocalProtocolError       we asked for something the protocol does not allow
├── RemoteProtocolError      the peer's bytes do not follow the protocol
├── ConnectionLost           the connection ended; pending calls fail with this
│   └── ConnectError         it could not be made: carries a hint
├── RpcError                 the peer answered with a status: carries code and message
│   └── MessageTooLarge      status 8, also when we refuse to send
└── SessionError             connected, but the runtime and we cannot work together
    ├── RegistrationRefused
    ├── ConfigurationRefused
    └── PluginAlreadyRunning
"""

from __future__ import annotations

from enum import IntEnum


class Code(IntEnum):
    """gRPC status codes, as ttrpc uses them."""

    OK = 0
    CANCELED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class NriError(Exception):
    """Base of everything this library raises on purpose."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class LocalProtocolError(NriError):
    """We asked for something the protocol does not allow."""


class RemoteProtocolError(NriError):
    """The peer's bytes do not follow the protocol: the connection is of no more use."""


class ConnectionLost(NriError):
    """The connection ended."""


class ConnectError(ConnectionLost):
    """No connection could be made; the hint says what to do."""


class RpcError(NriError):
    """A call ended with a status. `code` is the number sent, also if it is none of `Code`."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __str__(self) -> str:
        name = Code(self.code).name if self.code in Code.__members__.values() else "?"
        return f"{self.message} [{name} {self.code}]"


class MessageTooLarge(RpcError):
    """A message over the size limit; nothing of it was sent."""

    def __init__(self, length: int, limit: int) -> None:
        super().__init__(Code.RESOURCE_EXHAUSTED, f"message length {length} exceed maximum message size of {limit}")
        self.length = length
        self.limit = limit


class SessionError(NriError):
    """Connected, but the runtime and the plugin cannot work together."""


class RegistrationRefused(SessionError):
    """The runtime does not take the plugin's name or index."""


class ConfigurationRefused(SessionError):
    """The runtime does not take the plugin's subscription, or is too old for what the plugin requires."""


class PluginAlreadyRunning(SessionError):
    """Another plugin of the same index and name is connected: the two would conflict at every container."""
