"""The two roles of a ttrpc connection as pure objects: bytes and calls in, frames and events out.

Bytes of the peer can only raise RemoteProtocolError, and so far none does: whatever a frame holds, ttrpc has an
answer that keeps the connection. Our own misuse raises LocalProtocolError. `frames_to_send` gives whole frames,
because the NRI mux must not join two of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from nri_core.errors import Code, LocalProtocolError, MessageTooLarge, RpcError
from nri_core.ttrpc import frame as wire
from nri_core.ttrpc.envelope import (
    CallHead,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
    encode_status,
)
from nri_core.ttrpc.frame import Frame, FrameDecoder, Oversized, encode_frame
from nri_core.wire import TooManyParts

MAX_STREAM_ID = (1 << 32) - 1
LAST_USEFUL_STREAM_ID = (1 << 31) - 1
"""Go does not handle ids that wrap: a connection that made this many calls must be replaced."""

MAX_STATUS_CHARACTERS = 1 << 16
"""Of the text of a status; what is longer is cut."""


class Kind(Enum):
    """How many messages go each way."""

    UNARY = "unary"
    SERVER_STREAM = "server stream"
    CLIENT_STREAM = "client stream"
    BIDIRECTIONAL = "bidirectional"

    @property
    def client_streams(self) -> bool:
        """Whether the client sends Data frames."""
        return self in (Kind.CLIENT_STREAM, Kind.BIDIRECTIONAL)

    @property
    def server_streams(self) -> bool:
        """Whether the server sends Data frames."""
        return self in (Kind.SERVER_STREAM, Kind.BIDIRECTIONAL)


@dataclass(frozen=True, slots=True)
class CallStarted:
    """Server: a new call."""

    stream_id: int
    head: CallHead
    kind: Kind


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A message of a streaming call; `payload` None: the peer sends no more."""

    stream_id: int
    payload: bytes | None


@dataclass(frozen=True, slots=True)
class CallEnded:
    """Client: the server's Response; `error` None: success."""

    stream_id: int
    payload: bytes
    error: RpcError | None


@dataclass(frozen=True, slots=True)
class Ignored:
    """Something that the protocol says to ignore; worth a debug message."""

    stream_id: int
    what: str


Event = CallStarted | MessageReceived | CallEnded | Ignored
Methods = Mapping[str, Mapping[str, Kind]]
"""Kind by method by service."""


class _Connection:
    """What both roles share."""

    def __init__(self, max_receive_bytes: int) -> None:
        self._decoder = FrameDecoder(max_receive_bytes)
        self._events: deque[Event] = deque()
        self._out: list[bytes] = []

    @property
    def buffered_bytes(self) -> int:
        """Received bytes that do not make a frame yet."""
        return self._decoder.buffered_bytes

    def receive_data(self, data: bytes) -> None:
        """Bytes from the peer, in any portions, and all that follows from them."""
        self.take_data(data)
        while self.advance():
            pass

    def take_data(self, data: bytes) -> None:
        """Bytes from the peer. Then `advance` until it gives False."""
        self._decoder.receive_data(data)

    def advance(self) -> bool:
        """Handle one frame; False if there is no whole one. A portion can hold thousands: send what each calls for."""
        found = self._decoder.next_frame()
        if found is None:
            return False
        if isinstance(found, Oversized):
            self._oversized(found)
        else:
            self._frame(found)
        return True

    def next_event(self) -> Event | None:
        """The next thing that happened, or None."""
        return self._events.popleft() if self._events else None

    def frames_to_send(self) -> list[bytes]:
        """Whole frames, in order, since the last call."""
        frames, self._out = self._out, []
        return frames

    def _send(self, stream_id: int, type_: int, flags: int, data: bytes) -> None:
        self._out.append(encode_frame(stream_id, type_, flags, data))

    def _ignore(self, stream_id: int, what: str) -> None:
        self._events.append(Ignored(stream_id, what))

    def _oversized(self, found: Oversized) -> None:
        raise NotImplementedError

    def _frame(self, frame: Frame) -> None:
        raise NotImplementedError


@dataclass(slots=True)
class _Stream:
    kind: Kind
    local_open: bool
    remote_open: bool


class ServerConnection(_Connection):
    """The side that accepted: calls come in, answers go out."""

    def __init__(self, methods: Methods, *, max_receive_bytes: int = wire.MAX_DATA_BYTES) -> None:
        super().__init__(max_receive_bytes)
        self._methods = methods
        self._streams: dict[int, _Stream] = {}
        self._last_id = 0

    @property
    def open_streams(self) -> int:
        """Calls that are not answered yet."""
        return len(self._streams)

    @property
    def streams(self) -> frozenset[int]:
        """Ids of the calls that are not answered yet."""
        return frozenset(self._streams)

    def respond(self, stream_id: int, payload: bytes) -> None:
        """End a unary or client-streaming call with success.

        A payload over the limit is answered with RESOURCE_EXHAUSTED instead, and MessageTooLarge raised.
        """
        self._stream(stream_id)
        try:
            self._send(stream_id, wire.RESPONSE, 0, encode_response(payload))
        except MessageTooLarge as error:
            self._send(stream_id, wire.RESPONSE, 0, encode_status(error.code, error.message))
            raise
        finally:
            self._streams.pop(stream_id, None)

    def fail(self, stream_id: int, code: int, text: str) -> None:
        """End any call with a status."""
        self._stream(stream_id)
        self._streams.pop(stream_id)
        self._answer(stream_id, code, text)

    def send_message(self, stream_id: int, payload: bytes) -> None:
        """One message of a server-streaming call. Raises MessageTooLarge; the call goes on then."""
        if not self._stream(stream_id).kind.server_streams:
            raise LocalProtocolError(f"stream {stream_id} is not a server stream: use respond")
        self._send(stream_id, wire.DATA, 0, payload)

    def end_messages(self, stream_id: int) -> None:
        """End a server-streaming call with success."""
        if not self._stream(stream_id).kind.server_streams:
            raise LocalProtocolError(f"stream {stream_id} is not a server stream: use respond")
        self._send(stream_id, wire.DATA, wire.REMOTE_CLOSED | wire.NO_DATA, b"")
        del self._streams[stream_id]

    def _stream(self, stream_id: int) -> _Stream:
        try:
            return self._streams[stream_id]
        except KeyError:
            raise LocalProtocolError(f"stream {stream_id} is not open: it was answered before") from None

    def _answer(self, stream_id: int, code: int, text: str) -> None:
        # The text may be the peer's own, such as the name of a service that nobody has.
        self._send(stream_id, wire.RESPONSE, 0, encode_status(code, text[:MAX_STATUS_CHARACTERS]))

    def _oversized(self, found: Oversized) -> None:
        error = MessageTooLarge(found.length, self._decoder.max_data_bytes)
        if found.stream_id % 2:
            self._last_id = max(self._last_id, found.stream_id)
        self._answer(found.stream_id, error.code, error.message)

    def _frame(self, frame: Frame) -> None:
        if frame.stream_id % 2 == 0:
            text = "StreamID must be odd for client initiated streams"
            self._answer(frame.stream_id, Code.INVALID_ARGUMENT, text)
        elif frame.type == wire.REQUEST:
            self._request(frame)
        elif frame.type == wire.DATA:
            self._data(frame)
        else:
            self._ignore(frame.stream_id, f"frame type {frame.type}")

    def _request(self, frame: Frame) -> None:
        if frame.stream_id <= self._last_id:
            text = "StreamID cannot be re-used and must increment"
            self._answer(frame.stream_id, Code.INVALID_ARGUMENT, text)
            return
        self._last_id = frame.stream_id
        try:
            head = decode_request(frame.data)
        except TooManyParts as error:
            self._answer(frame.stream_id, Code.RESOURCE_EXHAUSTED, str(error))
            return
        except ValueError as error:
            self._answer(frame.stream_id, Code.INVALID_ARGUMENT, f"unmarshal request error: {error}")
            return
        if head.service not in self._methods:
            self._answer(frame.stream_id, Code.UNIMPLEMENTED, f"service {head.service}")
            return
        kind = self._methods[head.service].get(head.method)
        if kind is None:
            self._answer(frame.stream_id, Code.UNIMPLEMENTED, f"method {head.method}")
            return
        self._streams[frame.stream_id] = _Stream(kind, True, kind.client_streams)
        self._events.append(CallStarted(frame.stream_id, head, kind))

    def _data(self, frame: Frame) -> None:
        stream = self._streams.get(frame.stream_id)
        if stream is None:
            self._answer(frame.stream_id, Code.INVALID_ARGUMENT, "StreamID is no longer active")
            return
        if not stream.remote_open:
            self._streams.pop(frame.stream_id)
            self._answer(frame.stream_id, Code.INVALID_ARGUMENT, "data handling error: the stream takes no more data")
            self._events.append(MessageReceived(frame.stream_id, None))
            return
        if not frame.flags & wire.NO_DATA:
            self._events.append(MessageReceived(frame.stream_id, frame.data))
        if frame.flags & wire.REMOTE_CLOSED:
            stream.remote_open = False
            self._events.append(MessageReceived(frame.stream_id, None))


class ClientConnection(_Connection):
    """The side that connected: calls go out, answers come in."""

    def __init__(self, *, max_receive_bytes: int = wire.MAX_DATA_BYTES) -> None:
        super().__init__(max_receive_bytes)
        self._streams: dict[int, _Stream] = {}
        self._next_id = 1

    @property
    def open_streams(self) -> int:
        """Calls without an answer yet."""
        return len(self._streams)

    @property
    def exhausted(self) -> bool:
        """Whether the connection should be replaced before ids run out."""
        return self._next_id > LAST_USEFUL_STREAM_ID

    def start_call(self, head: CallHead, kind: Kind = Kind.UNARY) -> int:
        """Begin a call; returns its stream id. Raises MessageTooLarge: nothing was sent, the id is spent."""
        if self._next_id > MAX_STREAM_ID:
            raise LocalProtocolError("the connection has no stream ids left", hint="reconnect")
        stream_id = self._next_id
        self._next_id += 2
        flags = 0 if kind is Kind.UNARY else wire.REMOTE_OPEN if kind.client_streams else wire.REMOTE_CLOSED
        self._send(stream_id, wire.REQUEST, flags, encode_request(head))
        self._streams[stream_id] = _Stream(kind, kind.client_streams, True)
        return stream_id

    def send_message(self, stream_id: int, payload: bytes) -> None:
        """One message of a client-streaming call."""
        stream = self._streams.get(stream_id)
        if stream is None or not stream.local_open:
            raise LocalProtocolError(f"stream {stream_id} takes no more messages")
        self._send(stream_id, wire.DATA, 0, payload)

    def end_messages(self, stream_id: int) -> None:
        """No more messages from us. A frame of its own: Go servers refuse a last message in the closing frame."""
        stream = self._streams.get(stream_id)
        if stream is None or not stream.local_open:
            raise LocalProtocolError(f"stream {stream_id} takes no more messages")
        stream.local_open = False
        self._send(stream_id, wire.DATA, wire.REMOTE_CLOSED | wire.NO_DATA, b"")

    def forget(self, stream_id: int) -> None:
        """Nobody waits for this call any more: its late answer is dropped. There is no way to tell the server."""
        self._streams.pop(stream_id, None)

    def _oversized(self, found: Oversized) -> None:
        error = MessageTooLarge(found.length, self._decoder.max_data_bytes)
        if self._streams.pop(found.stream_id, None) is None:
            self._ignore(found.stream_id, error.message)
        else:
            self._events.append(CallEnded(found.stream_id, b"", error))

    def _frame(self, frame: Frame) -> None:
        stream = self._streams.get(frame.stream_id)
        if stream is None:
            self._ignore(frame.stream_id, f"frame type {frame.type} for a call that nobody waits for")
        elif frame.type == wire.RESPONSE:
            del self._streams[frame.stream_id]
            self._events.append(_ended(frame))
        elif frame.type == wire.DATA and stream.kind.server_streams:
            self._data(frame)
        elif frame.type == wire.DATA:
            del self._streams[frame.stream_id]
            error = RpcError(Code.INTERNAL, "protocol error: data on a call that has one answer")
            self._events.append(CallEnded(frame.stream_id, b"", error))
        else:
            self._ignore(frame.stream_id, f"frame type {frame.type}")

    def _data(self, frame: Frame) -> None:
        if not frame.flags & wire.NO_DATA:
            self._events.append(MessageReceived(frame.stream_id, frame.data))
        if frame.flags & wire.REMOTE_CLOSED:
            del self._streams[frame.stream_id]
            self._events.append(MessageReceived(frame.stream_id, None))


def _ended(frame: Frame) -> CallEnded:
    try:
        return CallEnded(frame.stream_id, decode_response(frame.data), None)
    except RpcError as error:
        return CallEnded(frame.stream_id, b"", error)
    except ValueError as error:
        text = f"the answer cannot be decoded: {error}"
        return CallEnded(frame.stream_id, b"", RpcError(Code.INTERNAL, text))
