"""The protobuf messages around calls: requests with service, method, time limit and metadata; statuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nri_core.errors import Code, RpcError
from nri_core.pb import ttrpc_pb2
from nri_core.wire import BYTES, VARINT, TooManyParts, decoded, fields

Metadata = tuple[tuple[str, str], ...]
"""(key, value) pairs; a key may stand several times, and is compared without case."""
MAX_METADATA = 128
"""Pairs of one call; runtimes send two or three."""
LARGE_BYTES = 128 << 10
_SERVICE, _METHOD, _PAYLOAD, _TIMEOUT, _METADATA = (
    ttrpc_pb2.Request.DESCRIPTOR.fields_by_name[name].number
    for name in ("service", "method", "payload", "timeout_nano", "metadata")
)


@dataclass(frozen=True, slots=True)
class CallHead:
    """What a Request frame says."""

    service: str
    method: str
    payload: bytes
    timeout_ns: int
    """Relative to its arrival; 0: none. May be negative: over before it came."""
    metadata: Metadata = ()

    def values(self, key: str) -> tuple[str, ...]:
        """All metadata values of `key`."""
        return tuple(value for name, value in self.metadata if name.lower() == key.lower())


def encode_request(head: CallHead) -> bytes:
    """Data of a Request frame; metadata keys go out in lower case."""
    message = ttrpc_pb2.Request(
        service=head.service, method=head.method, payload=head.payload, timeout_nano=head.timeout_ns
    )
    for key, value in head.metadata:
        message.metadata.add(key=key.lower(), value=value)
    return message.SerializeToString()


def decode_request(data: bytes) -> CallHead:
    """The inverse. Raises ValueError; TooManyParts with more than `MAX_METADATA` pairs."""
    if len(data) > LARGE_BYTES:
        return _decode_large_request(data)
    message = decoded(ttrpc_pb2.Request(), data, few=True)
    if len(message.metadata) > MAX_METADATA:
        raise TooManyParts(f"{len(message.metadata)} pairs of metadata; the most is {MAX_METADATA}")
    metadata = tuple((pair.key, pair.value) for pair in message.metadata)
    return CallHead(message.service, message.method, message.payload, message.timeout_nano, metadata)


def _decode_large_request(data: bytes) -> CallHead:
    """The same with one copy of the payload instead of two. Memory for some MiB is new at each of them."""
    service = method = payload = b""
    timeout_ns = 0
    pairs: list[bytes] = []
    for number, kind, value in fields(data):
        if kind == BYTES:
            if number == _SERVICE:
                service = value
            elif number == _METHOD:
                method = value
            elif number == _PAYLOAD:
                payload = value
            elif number == _METADATA:
                pairs.append(value)
                if len(pairs) > MAX_METADATA:
                    raise TooManyParts(f"more than {MAX_METADATA} pairs of metadata")
        elif number == _TIMEOUT and kind == VARINT:
            value &= (1 << 64) - 1
            timeout_ns = value - (1 << 64) if value >> 63 else value  # an int64
    found = [decoded(ttrpc_pb2.KeyValue(), pair) for pair in pairs]
    metadata = tuple((pair.key, pair.value) for pair in found)
    return CallHead(service.decode(), method.decode(), payload, timeout_ns, metadata)


def encode_response(payload: bytes) -> bytes:
    """Data of a Response frame that means success."""
    return ttrpc_pb2.Response(payload=payload).SerializeToString()


def encode_status(code: int, text: str) -> bytes:
    """Data of a Response frame that means failure."""
    return ttrpc_pb2.Response(status=ttrpc_pb2.Status(code=code, message=text)).SerializeToString()


def decode_response(data: bytes) -> bytes:
    """The payload. Raises ValueError if it is no Response, RpcError if it carries a status that is not OK."""
    message = decoded(ttrpc_pb2.Response(), data, few=True)
    if message.HasField("status") and message.status.code != Code.OK:
        raise RpcError(message.status.code, message.status.message)
    return message.payload


_CODES: Sequence[tuple[type[BaseException], Code]] = (
    (TimeoutError, Code.DEADLINE_EXCEEDED),
    (FileExistsError, Code.ALREADY_EXISTS),
    (FileNotFoundError, Code.NOT_FOUND),
    (PermissionError, Code.PERMISSION_DENIED),
    (BrokenPipeError, Code.FAILED_PRECONDITION),
    (EOFError, Code.OUT_OF_RANGE),
    (ValueError, Code.INVALID_ARGUMENT),
)


def status_of(error: BaseException) -> tuple[int, str]:
    """(code, text) that tells the peer of an exception in a handler.

    NotImplementedError is not UNIMPLEMENTED: that code makes runtimes switch to older calls.
    """
    if isinstance(error, RpcError):
        return error.code, error.message
    if type(error).__name__ == "CancelledError":  # asyncio's; this layer does not import it
        return Code.CANCELED, "cancelled"
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, str(error) or kind.__name__
    return Code.UNKNOWN, str(error) or type(error).__name__
