"""ttrpc endpoints on asyncio: streaming, time limits, and what a peer can make us hold."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from nri_core.aio import rpc
from nri_core.aio.rpc import Call, ClientEndpoint, ServerEndpoint, Services, Stream
from nri_core.aio.transport import Wire
from nri_core.errors import Code, ConnectionLost, RemoteProtocolError, RpcError
from nri_core.ttrpc import frame as wire
from nri_core.ttrpc.connection import Kind
from nri_core.ttrpc.envelope import CallHead, decode_response, encode_request
from nri_core.ttrpc.frame import Frame, FrameDecoder, encode_frame


async def echo(call: Call) -> bytes:
    return call.head.payload


async def total(call: Call) -> bytes:
    assert call.stream is not None
    count = 0
    while (message := await call.stream.receive()) is not None:
        count += len(message)
    return str(count).encode()


async def count_down(call: Call) -> None:
    assert call.stream is not None
    for number in range(int(call.head.payload), 0, -1):
        call.stream.send(str(number).encode())


async def double(call: Call) -> None:
    assert call.stream is not None
    while (message := await call.stream.receive()) is not None:
        call.stream.send(message * 2)


async def never(call: Call) -> None:
    await asyncio.Event().wait()


async def refuse(call: Call) -> bytes:
    raise RpcError(Code.NOT_FOUND, "nothing here")


SERVICES: Services = {
    "s": {
        "echo": (Kind.UNARY, echo),
        "total": (Kind.CLIENT_STREAM, total),
        "count_down": (Kind.SERVER_STREAM, count_down),
        "double": (Kind.BIDIRECTIONAL, double),
        "never": (Kind.UNARY, never),
        "deaf": (Kind.BIDIRECTIONAL, never),
        "refuse": (Kind.UNARY, refuse),
    }
}


def pair(play: Callable[[ClientEndpoint, Wire], Awaitable[None]]) -> None:
    """A client and a server joined by a socket, without the mux."""

    async def main() -> None:
        left, right = socket.socketpair()
        client_wire = await Wire.over(left, lambda data: client.feed(data))
        server_wire = await Wire.over(right, lambda data: server.feed(data))
        client, server = ClientEndpoint(client_wire.send), ServerEndpoint(SERVICES, server_wire.send)
        try:
            await asyncio.wait_for(play(client, server_wire), 20)
        finally:
            client_wire.close()
            await server_wire.wait_closed()
            server.lose(ConnectionLost("over"))
            await server.drain()

    asyncio.run(main())


def test_calls_of_every_kind_go_both_ways() -> None:
    async def play(client: ClientEndpoint, server: Wire) -> None:
        assert await client.call("s", "echo", b"x" * 100_000) == b"x" * 100_000
        up = client.stream("s", "total", Kind.CLIENT_STREAM)
        for _ in range(200):
            up.send(b"12345")
            await asyncio.sleep(0)
        up.end()
        assert await up.receive() is None
        assert up.result == b"1000"
        down = client.stream("s", "count_down", Kind.SERVER_STREAM, b"3")
        assert [await down.receive() for _ in range(4)] == [b"3", b"2", b"1", None]
        both = client.stream("s", "double", Kind.BIDIRECTIONAL)
        both.send(b"")
        assert await both.receive() == b""
        both.send(b"a")
        assert await both.receive() == b"aa"
        both.end()
        assert await both.receive() is None
        with pytest.raises(ConnectionLost, match="ended"):
            await both.receive()

    pair(play)


def test_many_calls_at_once_are_answered_to_the_right_caller() -> None:
    async def play(client: ClientEndpoint, server: Wire) -> None:
        payloads = [str(number).encode() * number for number in range(300)]
        assert await asyncio.gather(*(client.call("s", "echo", each) for each in payloads)) == payloads

    pair(play)


def test_a_call_ends_at_its_time_limit_on_both_sides() -> None:
    """Nothing tells the server that we gave up but its own timer."""

    async def play(client: ClientEndpoint, server: Wire) -> None:
        with pytest.raises((TimeoutError, RpcError)):
            await client.call("s", "never", b"", timeout_s=0.05)
        assert await client.call("s", "echo", b"still") == b"still"

    pair(play)


def test_a_status_is_an_error_and_a_lost_connection_fails_every_call() -> None:
    async def play(client: ClientEndpoint, server: Wire) -> None:
        with pytest.raises(RpcError, match="nothing here") as caught:
            await client.call("s", "refuse", b"")
        assert caught.value.code == Code.NOT_FOUND
        waiting = asyncio.create_task(client.call("s", "never", b""))
        stream = client.stream("s", "double", Kind.BIDIRECTIONAL)
        await asyncio.sleep(0)
        client.lose(ConnectionLost("gone"))
        with pytest.raises(ConnectionLost):
            await waiting
        with pytest.raises(ConnectionLost):
            await stream.receive()
        with pytest.raises(ConnectionLost):
            await client.call("s", "echo", b"")

    pair(play)


def test_a_stream_that_nobody_reads_is_ended_and_the_others_go_on() -> None:
    async def play(client: ClientEndpoint, server: Wire) -> None:
        deaf = client.stream("s", "deaf", Kind.BIDIRECTIONAL)
        for _ in range(rpc.STREAM_QUEUE_MESSAGES + 1):
            deaf.send(b"x")
        with pytest.raises(RpcError, match="stream buffer full"):
            await deaf.receive()
        assert await client.call("s", "echo", b"ok") == b"ok"

    pair(play)


class Answers:
    """A server endpoint fed by hand, and what it said."""

    def __init__(self) -> None:
        self.decoder = FrameDecoder()
        self.endpoint = ServerEndpoint(SERVICES, self.decoder.receive_data)

    def codes(self) -> dict[int, int]:
        found: dict[int, int] = {}
        while (frame := self.decoder.next_frame()) is not None:
            assert isinstance(frame, Frame)
            try:
                decode_response(frame.data)
                found[frame.stream_id] = 0
            except RpcError as error:
                found[frame.stream_id] = error.code
        return found


def test_calls_that_hold_too_much_are_refused_and_room_comes_back() -> None:
    """The most a peer can make us hold is documented: MAX_HELD_BYTES, and MAX_CALLS_SERVED calls."""

    async def main() -> None:
        server = Answers()
        large = (4 << 20) - 100
        fitting = rpc.MAX_HELD_BYTES // large
        for number in range(fitting + 3):
            call = encode_request(CallHead("s", "never", bytes(large), 0))
            server.endpoint.feed(encode_frame(2 * number + 1, wire.REQUEST, 0, call))
        assert server.codes() == {2 * number + 1: Code.RESOURCE_EXHAUSTED for number in range(fitting, fitting + 3)}
        server.endpoint.lose(ConnectionLost("over"))
        await server.endpoint.drain()
        await asyncio.sleep(0)
        server.endpoint.feed(encode_frame(999, wire.REQUEST, 0, encode_request(CallHead("s", "echo", bytes(large), 0))))
        await asyncio.sleep(0.01)
        assert server.codes() == {999: 0}

    asyncio.run(main())


def test_too_many_calls_at_one_time_are_refused() -> None:
    async def main() -> None:
        server = Answers()
        for number in range(rpc.MAX_CALLS_SERVED + 5):
            call = encode_request(CallHead("s", "never", b"", 0))
            server.endpoint.feed(encode_frame(2 * number + 1, wire.REQUEST, 0, call))
        assert len(server.codes()) == 5
        server.endpoint.lose(ConnectionLost("over"))
        await server.endpoint.drain()

    asyncio.run(main())


def test_messages_of_a_dropped_stream_are_not_held() -> None:
    async def main() -> None:
        budget = rpc.Budget(10)
        stream = Stream(lambda payload: None, lambda: None, budget)
        assert stream.put(b"12345678")
        assert not stream.put(b"123")
        stream.discard()
        assert budget.used == 0
        assert stream.put(b"123456789012345")
        assert budget.used == 0
        with pytest.raises(ConnectionLost):
            await stream.receive()

    asyncio.run(main())


def test_a_peer_that_never_reads_is_given_up_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from nri_core.aio import transport

    monkeypatch.setattr(transport, "MAX_UNSENT_BYTES", 1 << 20)

    async def main() -> None:
        left, right = socket.socketpair()
        with right:
            ours = await Wire.over(left, lambda data: None)
            sent = 0
            while not ours.closed.done():
                ours.send(bytes(1 << 16))
                sent += 1
                assert sent < 100
            error = await ours.wait_closed()
            assert isinstance(error, RemoteProtocolError)
            assert "unread" in str(error)

    asyncio.run(main())
