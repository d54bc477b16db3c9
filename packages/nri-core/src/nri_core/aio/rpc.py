"""ttrpc calls on asyncio: a client and a server endpoint, each fed with bytes and given a way to send frames."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from nri_core.errors import Code, ConnectionLost, MessageTooLarge, NriError, RpcError
from nri_core.ttrpc.connection import (
    CallEnded,
    CallStarted,
    ClientConnection,
    Ignored,
    Kind,
    MessageReceived,
    ServerConnection,
)
from nri_core.ttrpc.envelope import CallHead, Metadata, status_of
from nri_core.ttrpc.frame import MAX_DATA_BYTES

log = logging.getLogger("nri_core")

SendFrame = Callable[[bytes], None]
STREAM_QUEUE_MESSAGES = 4096
"""Messages of one streaming call that may wait to be read; more ends the call, not the connection. One read of the
socket can bring hundreds of small ones before any handler runs."""
MAX_CALLS_IN_FLIGHT = 100
"""Ours at one time. A Go peer closes an NRI trunk when 256 frames wait, and a call can be two."""
MAX_CALLS_SERVED = 1000
"""The peer's at one time; more are answered with RESOURCE_EXHAUSTED."""
MAX_HELD_BYTES = 64 << 20
"""Payloads of the calls being served and of messages that wait to be read, per endpoint; more is refused likewise."""
MAX_HELD_MESSAGES = 1 << 16
"""The same in pieces: an empty message is not free."""


class Budget:
    """Pieces of the peer's that an endpoint may hold at one time, and their bytes."""

    def __init__(self, limit: int = MAX_HELD_BYTES) -> None:
        self.limit = limit
        self.used = 0
        self.pieces = 0

    def take(self, count: int) -> bool:
        """Account for a piece of `count` bytes; False if that is too much."""
        if self.used + count > self.limit or self.pieces >= MAX_HELD_MESSAGES:
            return False
        self.used += count
        self.pieces += 1
        return True

    def give_back(self, count: int) -> None:
        """It is no longer held."""
        self.used -= count
        self.pieces -= 1


class Stream:
    """The messages of one streaming call, both ways."""

    def __init__(self, send: Callable[[bytes], None], end: Callable[[], None], budget: Budget) -> None:
        self._send_message = send
        self._end_messages = end
        self._budget = budget
        self._queue: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue(STREAM_QUEUE_MESSAGES + 1)
        self._over: BaseException | None = None
        self._discarded = False
        self.result = b""
        """Client-streaming calls: the answer, once `receive` gave None."""

    def send(self, payload: bytes) -> None:
        """Send one message."""
        self._send_message(payload)

    def end(self) -> None:
        """Send no more."""
        self._end_messages()

    async def receive(self) -> bytes | None:
        """The next message; None when the peer sends no more.

        Raises:
            RpcError: the peer ended the call with a status.
            ConnectionLost: the connection ended.
        """
        if self._over is not None and self._queue.empty():
            raise self._over
        found = await self._queue.get()
        if isinstance(found, BaseException):
            self._over = found
            raise found
        if found is None:
            self._over = ConnectionLost("the stream has ended")
        else:
            self._budget.give_back(len(found))
        return found

    def discard(self) -> None:
        """Drop what waits to be read, and what still comes."""
        self._discarded = True
        while not self._queue.empty():
            found = self._queue.get_nowait()
            if isinstance(found, bytes):
                self._budget.give_back(len(found))
        self._over = self._over or ConnectionLost("the stream was dropped")

    def put(self, item: bytes | BaseException | None) -> bool:
        """Hand in what arrived; False if nobody reads and the queue is full."""
        if self._discarded:
            return True
        if isinstance(item, bytes) and (
            self._queue.qsize() >= STREAM_QUEUE_MESSAGES or not self._budget.take(len(item))
        ):
            return False
        try:
            self._queue.put_nowait(item)
        except asyncio.QueueFull:
            return False
        return True


class ClientEndpoint:
    """Makes calls."""

    def __init__(self, send_frame: SendFrame, *, max_receive_bytes: int = MAX_DATA_BYTES) -> None:
        self._core = ClientConnection(max_receive_bytes=max_receive_bytes)
        self._send_frame = send_frame
        self._calls: dict[int, asyncio.Future[bytes]] = {}
        self._streams: dict[int, Stream] = {}
        self._slots = asyncio.Semaphore(MAX_CALLS_IN_FLIGHT)
        self._budget = Budget()
        self._lost: NriError | None = None

    async def call(
        self,
        service: str,
        method: str,
        payload: bytes,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
    ) -> bytes:
        """One unary call; returns the answer's payload.

        Raises:
            RpcError: the peer answered with a status.
            TimeoutError: no answer within `timeout_s`; a late one is dropped.
            ConnectionLost: the connection ended.
            MessageTooLarge: `payload` is over the limit; nothing was sent.
        """
        async with self._slots:
            if self._lost is not None:
                raise self._lost
            timeout_ns = 0 if timeout_s is None else int(timeout_s * 1e9)
            stream_id = self._core.start_call(CallHead(service, method, payload, timeout_ns, metadata))
            future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            self._calls[stream_id] = future
            try:
                self._flush()
                async with asyncio.timeout(timeout_s):
                    return await future
            except TimeoutError:
                if future.done() and not future.cancelled() and future.exception() is not None:
                    raise
                raise TimeoutError(f"{method}: no answer within {timeout_s:g} s") from None
            finally:
                self._calls.pop(stream_id, None)
                self._core.forget(stream_id)

    def stream(self, service: str, method: str, kind: Kind, payload: bytes = b"", metadata: Metadata = ()) -> Stream:
        """Begin a streaming call; `payload` is the one request of a server-streaming call."""
        if self._lost is not None:
            raise self._lost
        stream_id = self._core.start_call(CallHead(service, method, payload, 0, metadata), kind)

        def send(message: bytes) -> None:
            if self._lost is not None:
                raise self._lost
            self._core.send_message(stream_id, message)
            self._flush()

        def end() -> None:
            self._core.end_messages(stream_id)
            self._flush()

        self._streams[stream_id] = made = Stream(send, end, self._budget)
        self._flush()
        return made

    def feed(self, data: bytes) -> None:
        """Bytes from the peer."""
        self._core.take_data(data)
        while self._core.advance():
            while (event := self._core.next_event()) is not None:
                if isinstance(event, CallEnded):
                    self._ended(event)
                elif isinstance(event, MessageReceived):
                    self._message(event)
                elif isinstance(event, Ignored):
                    log.debug("ignored on stream %d: %s", event.stream_id, event.what)
            self._flush()

    def lose(self, error: NriError) -> None:
        """The connection ended: every call fails."""
        self._lost = self._lost or error
        for future in self._calls.values():
            if not future.done():
                future.set_exception(error)
        for stream in self._streams.values():
            stream.put(error)
        self._streams.clear()

    def _ended(self, event: CallEnded) -> None:
        future = self._calls.get(event.stream_id)
        if future is not None and not future.done():
            if event.error is None:
                future.set_result(event.payload)
            else:
                future.set_exception(event.error)
        stream = self._streams.pop(event.stream_id, None)
        if stream is not None:
            stream.result = event.payload
            stream.put(event.error)

    def _message(self, event: MessageReceived) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is None:
            return
        if event.payload is None:
            del self._streams[event.stream_id]
        if not stream.put(event.payload):
            self._streams.pop(event.stream_id, None)
            self._core.forget(event.stream_id)
            stream.put(RpcError(Code.RESOURCE_EXHAUSTED, "stream buffer full"))

    def _flush(self) -> None:
        for frame in self._core.frames_to_send():
            self._send_frame(frame)


@dataclass(frozen=True, slots=True)
class Call:
    """A call being served."""

    head: CallHead
    stream: Stream | None = None
    """For streaming calls."""
    arrived_s: float = field(default_factory=time.monotonic)

    @property
    def timeout_s(self) -> float | None:
        """The caller's time limit; None: it told none."""
        return self.head.timeout_ns / 1e9 if self.head.timeout_ns else None


Handler = Callable[[Call], Awaitable[bytes | None]]
"""Gives the answer's payload; a server-streaming handler sends on `call.stream` and gives None."""
Services = Mapping[str, Mapping[str, tuple[Kind, Handler]]]


class ServerEndpoint:
    """Serves calls, each in a task of its own, so that a slow one holds up nothing."""

    def __init__(self, services: Services, send_frame: SendFrame, *, max_receive_bytes: int = MAX_DATA_BYTES) -> None:
        methods = {
            service: {name: kind for name, (kind, _) in handlers.items()} for service, handlers in services.items()
        }
        self._core = ServerConnection(methods, max_receive_bytes=max_receive_bytes)
        self._services = services
        self._send_frame = send_frame
        self._budget = Budget()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._streams: dict[int, Stream] = {}

    def feed(self, data: bytes) -> None:
        """Bytes from the peer."""
        self._core.take_data(data)
        while self._core.advance():
            while (event := self._core.next_event()) is not None:
                if isinstance(event, CallStarted):
                    self._started(event)
                elif isinstance(event, MessageReceived):
                    self._message(event)
            self._flush()

    def lose(self, error: ConnectionLost) -> None:
        """The connection ended: handlers are cancelled."""
        for stream in self._streams.values():
            stream.put(error)
        for task in list(self._tasks.values()):
            task.cancel()

    async def drain(self) -> None:
        """Wait for the calls being served."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()))

    def _started(self, event: CallStarted) -> None:
        size = len(event.head.payload) + sum(len(key) + len(value) for key, value in event.head.metadata)
        if len(self._tasks) >= MAX_CALLS_SERVED or not self._budget.take(size):
            self._core.fail(event.stream_id, Code.RESOURCE_EXHAUSTED, "too many calls at one time")
            return
        stream = None
        if event.kind is not Kind.UNARY:
            stream = self._streams[event.stream_id] = self._stream(event.stream_id)
        _, handler = self._services[event.head.service][event.head.method]
        task = asyncio.ensure_future(self._serve(event, handler, Call(event.head, stream)))
        self._tasks[event.stream_id] = task
        task.add_done_callback(lambda _: self._done(event.stream_id, size))

    def _done(self, stream_id: int, size: int) -> None:
        self._tasks.pop(stream_id, None)
        self._budget.give_back(size)
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            stream.discard()

    def _stream(self, stream_id: int) -> Stream:
        def send(message: bytes) -> None:
            self._core.send_message(stream_id, message)
            self._flush()

        return Stream(send, lambda: None, self._budget)

    def _message(self, event: MessageReceived) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is not None and not stream.put(event.payload):
            self._fail(event.stream_id, Code.RESOURCE_EXHAUSTED, "stream buffer full")
            task = self._tasks.get(event.stream_id)
            if task is not None:
                task.cancel()

    async def _serve(self, event: CallStarted, handler: Handler, call: Call) -> None:
        stream_id = event.stream_id
        try:
            async with asyncio.timeout(call.timeout_s):
                payload = await handler(call)
            if event.kind.server_streams:
                self._core.end_messages(stream_id)
            else:
                self._core.respond(stream_id, payload or b"")
        except MessageTooLarge as error:
            log.error("%s: the answer is too large: %s", event.head.method, error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                return  # the connection ended, or the call was answered already
            self._fail(stream_id, Code.CANCELED, "cancelled")  # by the handler itself: the peer waits for an answer
        except Exception as error:
            code, text = status_of(error)
            log.debug("%s failed: %s", event.head.method, text)
            self._fail(stream_id, code, text)
        self._flush()

    def _fail(self, stream_id: int, code: int, text: str) -> None:
        if stream_id in self._core.streams:
            self._core.fail(stream_id, code, text)

    def _flush(self) -> None:
        for frame in self._core.frames_to_send():
            self._send_frame(frame)
