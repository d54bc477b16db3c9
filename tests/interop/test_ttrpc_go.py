"""Our ttrpc against containerd/ttrpc: our client calls a Go server, a Go client calls our server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from interop import peers
from interop.peers import Peer, PeerUnavailable
from nri_core.aio.rpc import Call, ClientEndpoint, ServerEndpoint, Services
from nri_core.aio.transport import Wire, connect
from nri_core.errors import Code, ConnectionLost, MessageTooLarge, RpcError
from nri_core.ttrpc.connection import Kind
from nri_core.ttrpc.frame import MAX_DATA_BYTES

SERVICE = "memtier.interop.v1.Probe"
FOREVER = b"1000000000"
"""Milliseconds of sleep that no test waits for."""
CALL_HEAD_BYTES = 64
"""More than what the envelope adds to a payload."""


@pytest.fixture(scope="module", params=peers.TTRPC_RELEASES)
def program(request: pytest.FixtureRequest) -> Path:
    try:
        return peers.build("ttrpc", request.param)
    except PeerUnavailable as reason:
        pytest.skip(str(reason))


def packed(payload: bytes) -> bytes:
    return BytesValue(value=payload).SerializeToString()


def unpacked(data: bytes | None) -> bytes:
    assert data is not None
    return BytesValue.FromString(data).value


# --- our client, Go's server


@contextlib.asynccontextmanager
async def go_server(program: Path, folder: Path) -> AsyncIterator[tuple[ClientEndpoint, Peer]]:
    path = folder / "ttrpc.sock"
    async with Peer(program, "server", str(path)) as peer:
        await peer.event("listening")
        wire: Wire
        client = ClientEndpoint(lambda frame: wire.send(frame))
        wire = await Wire.over(await connect(path), client.feed)
        lost = asyncio.ensure_future(wire.wait_closed())
        lost.add_done_callback(lambda _: client.lose(ConnectionLost("the server has gone")))
        yield client, peer
        wire.close()
        await lost


def with_go_server(
    program: Path,
    folder: Path,
    check: Callable[[Callable[..., Awaitable[bytes]], ClientEndpoint, Peer], Awaitable[None]],
) -> None:
    async def main() -> None:
        async with go_server(program, folder) as (client, peer):

            async def call(method: str, payload: bytes = b"", **options: object) -> bytes:
                answer = await client.call(SERVICE, method, packed(payload), **options)  # type: ignore[arg-type]
                return unpacked(answer)

            await check(call, client, peer)

    asyncio.run(main())


def test_our_calls_are_answered_in_whatever_order_they_finish(program: Path, tmp_path: Path) -> None:
    async def check(call: Callable[..., Awaitable[bytes]], client: ClientEndpoint, peer: Peer) -> None:
        assert await call("Echo", b"hello") == b"hello"
        assert await call("Echo", b"") == b""
        never = asyncio.ensure_future(call("Sleep", FOREVER))
        assert await asyncio.gather(*(call("Sleep", each) for each in (b"40", b"20", b"0"))) == [b"40", b"20", b"0"]
        many = await asyncio.gather(*(call("Echo", str(number).encode()) for number in range(500)))
        assert many == [str(number).encode() for number in range(500)]
        assert not never.done()
        never.cancel()

    with_go_server(program, tmp_path, check)


def test_our_time_limit_reaches_the_server_and_ends_the_call_there(program: Path, tmp_path: Path) -> None:
    async def check(call: Callable[..., Awaitable[bytes]], client: ClientEndpoint, peer: Peer) -> None:
        assert await call("Deadline") == b"none"
        left_ns = int(await call("Deadline", timeout_s=500))
        assert 300e9 < left_ns <= 500e9
        with pytest.raises((TimeoutError, RpcError)) as raised:  # whose clock is faster is open
            await call("Sleep", FOREVER, timeout_s=0.3)
        if isinstance(raised.value, RpcError):
            assert raised.value.code == Code.DEADLINE_EXCEEDED
        assert await call("Echo", b"after") == b"after"

    with_go_server(program, tmp_path, check)


def test_our_metadata_reaches_the_server_with_several_values_of_a_key(program: Path, tmp_path: Path) -> None:
    async def check(call: Callable[..., Awaitable[bytes]], client: ClientEndpoint, peer: Peer) -> None:
        sent = (("Trace", "1"), ("trace", "2"), ("other", ""))
        assert json.loads(await call("Metadata", metadata=sent)) == {"trace": ["1", "2"], "other": [""]}

    with_go_server(program, tmp_path, check)


def test_the_server_s_errors_come_with_code_and_text(program: Path, tmp_path: Path) -> None:
    async def check(call: Callable[..., Awaitable[bytes]], client: ClientEndpoint, peer: Peer) -> None:
        for code in (1, 3, 4, 5, 7, 9, 12, 16, 99):
            with pytest.raises(RpcError) as raised:
                await call("Fail", str(code).encode())
            assert (raised.value.code, raised.value.message) == (code, f"as asked: {code}")
        with pytest.raises(RpcError, match="a plain error") as raised:
            await call("Fail", b"0")
        assert raised.value.code == Code.UNKNOWN
        with pytest.raises(RpcError) as raised:
            await call("NoSuchMethod")
        assert raised.value.code == Code.UNIMPLEMENTED
        with pytest.raises(RpcError) as raised:
            await client.call("no.such.Service", "Echo", b"")
        assert raised.value.code == Code.UNIMPLEMENTED
        with pytest.raises(RpcError):
            await client.call(SERVICE, "Echo", b"\xff\xff no protobuf")

    with_go_server(program, tmp_path, check)


def test_messages_up_to_4_mib_pass_and_larger_ones_are_refused_before_sending(program: Path, tmp_path: Path) -> None:
    async def check(call: Callable[..., Awaitable[bytes]], client: ClientEndpoint, peer: Peer) -> None:
        largest = bytes(MAX_DATA_BYTES - 2 * CALL_HEAD_BYTES)
        assert await call("Echo", largest) == largest
        with pytest.raises(MessageTooLarge):
            await call("Echo", bytes(MAX_DATA_BYTES))
        assert await call("Echo", b"still here") == b"still here"

    with_go_server(program, tmp_path, check)


def test_an_answer_that_is_too_large_leaves_no_call_hanging(program: Path, tmp_path: Path) -> None:
    """ttrpc v1.2.3 sends it, and we drop it; later releases refuse to, and hang up."""

    async def check(call: Callable[..., Awaitable[bytes]], client: ClientEndpoint, peer: Peer) -> None:
        other = asyncio.ensure_future(call("Sleep", FOREVER))
        with pytest.raises((RpcError, ConnectionLost)) as raised:
            await call("Zeros", str(MAX_DATA_BYTES + 1).encode(), timeout_s=peers.WAIT_S)
        if isinstance(raised.value, RpcError):
            assert raised.value.code == Code.RESOURCE_EXHAUSTED
            assert await call("Echo", b"still here") == b"still here"
            assert not other.done()
            other.cancel()
        else:
            with pytest.raises(ConnectionLost):
                await other

    with_go_server(program, tmp_path, check)


def test_we_read_a_server_s_stream_to_its_end_or_its_error(program: Path, tmp_path: Path) -> None:
    async def check(call: Callable[..., Awaitable[bytes]], client: ClientEndpoint, peer: Peer) -> None:
        stream = client.stream(SERVICE, "Count", Kind.SERVER_STREAM, packed(b"50"))
        got = []
        while (message := await stream.receive()) is not None:
            got.append(unpacked(message))
        assert got == [str(number).encode() for number in range(50)]

        stream = client.stream(SERVICE, "Count", Kind.SERVER_STREAM, packed(b"3!"))
        assert [unpacked(await stream.receive()) for _ in range(3)] == [b"0", b"1", b"2"]
        with pytest.raises(RpcError, match="broken off") as raised:
            await stream.receive()
        assert raised.value.code == Code.ABORTED

    with_go_server(program, tmp_path, check)


def test_we_stream_to_a_server_and_get_its_one_answer(program: Path, tmp_path: Path) -> None:
    async def check(call: Callable[..., Awaitable[bytes]], client: ClientEndpoint, peer: Peer) -> None:
        stream = client.stream(SERVICE, "Sum", Kind.CLIENT_STREAM)
        for size in range(100):
            stream.send(packed(bytes(size)))
        stream.end()
        while await stream.receive() is not None:
            pytest.fail("a message where only an answer may come")
        answer = unpacked(stream.result)
        assert (int.from_bytes(answer[:8], "big"), int.from_bytes(answer[8:], "big")) == (100, sum(range(100)))

    with_go_server(program, tmp_path, check)


def test_we_talk_both_ways_on_several_streams_at_once_and_empty_messages_count(program: Path, tmp_path: Path) -> None:
    async def check(call: Callable[..., Awaitable[bytes]], client: ClientEndpoint, peer: Peer) -> None:
        async def chat(number: int) -> None:
            stream = client.stream(SERVICE, "Chat", Kind.BIDIRECTIONAL)
            for turn in range(20):
                said = b"" if turn % 3 == 0 else f"{number}/{turn}".encode()
                stream.send(packed(said))
                assert unpacked(await stream.receive()) == said
            stream.end()
            assert await stream.receive() is None

        await asyncio.gather(*(chat(number) for number in range(5)), call("Sleep", b"100"))

    with_go_server(program, tmp_path, check)


def test_calls_fail_at_once_when_the_server_dies(program: Path, tmp_path: Path) -> None:
    async def check(call: Callable[..., Awaitable[bytes]], client: ClientEndpoint, peer: Peer) -> None:
        pending = asyncio.ensure_future(call("Sleep", FOREVER))
        await call("Echo")
        peer.process.kill()
        with pytest.raises(ConnectionLost):
            await pending
        with pytest.raises(ConnectionLost):
            await call("Echo")

    with_go_server(program, tmp_path, check)


# --- Go's client, our server


ENDED: list[bytes] = []
"""Sleeps that were ended before their time."""


class Probe:
    """The service of the Go server, in Python."""

    def services(self) -> Services:
        return {
            SERVICE: {
                "Echo": (Kind.UNARY, self.echo),
                "Sleep": (Kind.UNARY, self.sleep),
                "Deadline": (Kind.UNARY, self.deadline),
                "Metadata": (Kind.UNARY, self.metadata),
                "Fail": (Kind.UNARY, self.fail),
                "Zeros": (Kind.UNARY, self.zeros),
                "Count": (Kind.SERVER_STREAM, self.count),
                "Sum": (Kind.CLIENT_STREAM, self.sum),
                "Chat": (Kind.BIDIRECTIONAL, self.chat),
            }
        }

    async def echo(self, call: Call) -> bytes:
        return call.head.payload

    async def sleep(self, call: Call) -> bytes:
        try:
            await asyncio.sleep(int(unpacked(call.head.payload)) / 1000)
        except asyncio.CancelledError:
            ENDED.append(unpacked(call.head.payload))
            raise
        return call.head.payload

    async def deadline(self, call: Call) -> bytes:
        return packed(str(call.timeout_s).encode())

    async def metadata(self, call: Call) -> bytes:
        return packed(json.dumps(call.head.metadata).encode())

    async def fail(self, call: Call) -> bytes:
        code = int(unpacked(call.head.payload))
        if code == 0:
            raise KeyError("a plain error")
        raise RpcError(code, f"as asked: {code}")

    async def zeros(self, call: Call) -> bytes:
        return packed(bytes(int(unpacked(call.head.payload))))

    async def count(self, call: Call) -> None:
        assert call.stream is not None
        end = unpacked(call.head.payload).decode()
        for number in range(int(end.removesuffix("!"))):
            call.stream.send(packed(str(number).encode()))
        if end.endswith("!"):
            raise RpcError(Code.ABORTED, "broken off")

    async def sum(self, call: Call) -> bytes:
        assert call.stream is not None
        messages = size = 0
        while (message := await call.stream.receive()) is not None:
            messages, size = messages + 1, size + len(unpacked(message))
        return packed(messages.to_bytes(8, "big") + size.to_bytes(8, "big"))

    async def chat(self, call: Call) -> None:
        assert call.stream is not None
        while (message := await call.stream.receive()) is not None:
            call.stream.send(message)


def with_go_client(program: Path, folder: Path, check: Callable[[Peer, Wire], Awaitable[None]]) -> None:
    async def main() -> None:
        path = folder / "ttrpc.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
            listener.bind(str(path))
            listener.listen()
            async with Peer(program, "client", str(path)) as peer:
                accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
                wire: Wire
                server = ServerEndpoint(Probe().services(), lambda frame: wire.send(frame))
                wire = await Wire.over(accepted, server.feed)
                await check(peer, wire)
                server.lose(ConnectionLost("the test is over"))
                wire.close()

    asyncio.run(main())


def encoded(payload: bytes) -> str:
    return base64.b64encode(payload).decode()


def decoded(record: peers.Record, key: str = "payload") -> bytes:
    assert record["code"] == 0, record
    return base64.b64decode(record.get(key, ""))


def test_its_calls_are_answered_in_whatever_order_they_finish(program: Path, tmp_path: Path) -> None:
    async def check(peer: Peer, wire: Wire) -> None:
        assert decoded(await peer.call(method="Echo", payload=encoded(b"hello"))) == b"hello"
        assert decoded(await peer.call(method="Echo")) == b""
        never = asyncio.ensure_future(peer.call(method="Sleep", payload=encoded(FOREVER), wait_s=1e6))
        assert decoded(await peer.call(method="Sleep", payload=encoded(b"20"))) == b"20"
        many = await asyncio.gather(*(peer.call(method="Echo", payload=encoded(b"%d" % each)) for each in range(300)))
        assert [decoded(each) for each in many] == [b"%d" % each for each in range(300)]
        assert not never.done()
        never.cancel()

    with_go_client(program, tmp_path, check)


def test_its_time_limit_reaches_our_handler_and_ends_it(program: Path, tmp_path: Path) -> None:
    async def check(peer: Peer, wire: Wire) -> None:
        assert decoded(await peer.call(method="Deadline")) == b"None"
        assert 300 < float(decoded(await peer.call(method="Deadline", timeout_ms=500_000))) <= 500
        ENDED.clear()
        late = await peer.call(method="Sleep", payload=encoded(FOREVER), timeout_ms=300)
        assert late["code"] == Code.DEADLINE_EXCEEDED
        async with asyncio.timeout(peers.WAIT_S):
            while not ENDED:  # noqa: ASYNC110  our clock may be behind the client's
                await asyncio.sleep(0.01)
        assert ENDED == [FOREVER]
        assert decoded(await peer.call(method="Echo", payload=encoded(b"after"))) == b"after"

    with_go_client(program, tmp_path, check)


def test_its_metadata_reaches_our_handler(program: Path, tmp_path: Path) -> None:
    async def check(peer: Peer, wire: Wire) -> None:
        got = json.loads(decoded(await peer.call(method="Metadata", metadata={"trace": ["1", "2"], "other": [""]})))
        assert sorted(map(tuple, got)) == [("other", ""), ("trace", "1"), ("trace", "2")]

    with_go_client(program, tmp_path, check)


def test_our_errors_reach_it_with_code_and_text(program: Path, tmp_path: Path) -> None:
    async def check(peer: Peer, wire: Wire) -> None:
        for code in (1, 3, 5, 7, 9, 12, 16, 99):
            failed = await peer.call(method="Fail", payload=encoded(b"%d" % code))
            assert failed["code"] == code
            assert f"as asked: {code}" in failed["error"]
        assert (await peer.call(method="Fail", payload=encoded(b"0")))["code"] == Code.UNKNOWN
        assert (await peer.call(method="NoSuchMethod"))["code"] == Code.UNIMPLEMENTED
        assert (await peer.call(method="Echo", service="no.such.Service"))["code"] == Code.UNIMPLEMENTED

    with_go_client(program, tmp_path, check)


def test_it_exchanges_up_to_4_mib_with_us_and_what_is_larger_fails_alone(program: Path, tmp_path: Path) -> None:
    async def check(peer: Peer, wire: Wire) -> None:
        largest = bytes(MAX_DATA_BYTES - 2 * CALL_HEAD_BYTES)
        assert decoded(await peer.call(method="Echo", payload=encoded(largest))) == largest
        # v1.2.3 sends it: then our server answers. From v1.2.6 on it refuses to send.
        assert (await peer.call(method="Echo", payload=encoded(bytes(MAX_DATA_BYTES))))["code"] == (
            Code.RESOURCE_EXHAUSTED
        )
        answer = await peer.call(method="Zeros", payload=encoded(b"%d" % MAX_DATA_BYTES), timeout_ms=100_000)
        assert answer["code"] == Code.RESOURCE_EXHAUSTED, "we must say so instead of sending too much"
        assert decoded(await peer.call(method="Echo", payload=encoded(b"after"))) == b"after"

    with_go_client(program, tmp_path, check)


def test_it_streams_with_us_in_every_direction(program: Path, tmp_path: Path) -> None:
    async def check(peer: Peer, wire: Wire) -> None:
        down = await peer.call(method="Count", streaming_server=True, payload=encoded(b"50"))
        assert [base64.b64decode(each) for each in down["messages"]] == [b"%d" % number for number in range(50)]
        assert down["code"] == 0
        broken = await peer.call(method="Count", streaming_server=True, payload=encoded(b"3!"))
        assert (broken["code"], len(broken["messages"])) == (Code.ABORTED, 3)

        up = await peer.call(
            method="Sum", streaming_client=True, messages=[encoded(bytes(size)) for size in range(100)]
        )
        assert up["code"] == 0, up
        [answer] = [base64.b64decode(each) for each in up["messages"]]
        assert (int.from_bytes(answer[:8], "big"), int.from_bytes(answer[8:], "big")) == (100, sum(range(100)))

        said = [b"" if turn % 3 == 0 else b"%d" % turn for turn in range(30)]
        both: peers.Record = {"method": "Chat", "streaming_client": True, "streaming_server": True}
        for turns in (True, False):
            chat = await peer.call(**both, messages=[encoded(each) for each in said], in_turn=turns)
            assert (chat["code"], [base64.b64decode(each or "") for each in chat["messages"]]) == (0, said)

    with_go_client(program, tmp_path, check)


def test_it_sees_our_end_of_the_connection_as_closed(program: Path, tmp_path: Path) -> None:
    async def check(peer: Peer, wire: Wire) -> None:
        pending = asyncio.ensure_future(peer.call(method="Sleep", payload=encoded(FOREVER)))
        await peer.call(method="Echo")
        wire.close()
        assert (await pending)["closed"]
        await peer.event("closed")

    with_go_client(program, tmp_path, check)
