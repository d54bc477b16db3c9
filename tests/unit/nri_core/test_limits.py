"""What a peer can make us hold: the README's table is this file. Entries count as well as bytes."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from nri_core import Adjustment, Backoff, Container, MessageTooLarge, Plugin, Pod, RpcError, Stub, mux, session, wire
from nri_core.aio import hooks, rpc, transport
from nri_core.aio.dispatch import PLUGIN_SERVICE_NAME
from nri_core.aio.rpc import Call, ServerEndpoint, Services
from nri_core.aio.transport import Trunk, Wire
from nri_core.api import model
from nri_core.api.model import Allowance, container_from_bytes
from nri_core.errors import Code, ConnectionLost, RemoteProtocolError
from nri_core.mux import PLUGIN_SERVICE
from nri_core.pb import nri_pb2, ttrpc_pb2
from nri_core.testing import FakeRuntime, PluginConnection
from nri_core.ttrpc import connection, envelope, frame
from nri_core.ttrpc.connection import ClientConnection, Kind, ServerConnection
from nri_core.ttrpc.envelope import CallHead, decode_request, decode_response, encode_request
from nri_core.ttrpc.frame import Frame, FrameDecoder, encode_frame

README = Path(__file__).parents[3] / "packages/nri-core/README.md"
POD, CONTAINER = Pod("p1", "web", "default"), Container("c1", "p1", "main")


def mib(count: int) -> str:
    return f"{count >> 20} MiB"


TABLE = {
    "one message sent": mib(frame.MAX_DATA_BYTES),
    "one message received": f"{mib(mux.MAX_PAYLOAD_BYTES)} in a call, {mib(frame.MAX_DATA_BYTES)} in an answer",
    "parts under 8 bytes of one message": str(wire.MAX_SMALL_PARTS),
    "metadata of one call": f"{envelope.MAX_METADATA} pairs",
    "one mux frame": f"{mib(mux.MAX_PAYLOAD_BYTES)} + 8",
    "calls of the peer at one time": f"{rpc.MAX_CALLS_SERVED}, {mib(rpc.MAX_HELD_BYTES)} of payloads",
    "messages of streams that wait": (
        f"{rpc.STREAM_QUEUE_MESSAGES} of one, {rpc.MAX_HELD_MESSAGES} of all, in the same {mib(rpc.MAX_HELD_BYTES)}"
    ),
    "methods at one time, late ones too": f"{hooks.MAX_RUNNING}, {mib(hooks.MAX_RUNNING_WEIGHT)} of decoded messages",
    "a Synchronize, also a split one": (
        f"{mib(session.MAX_SYNCHRONIZED_BYTES)}, {session.MAX_SYNCHRONIZED} pods and containers"
    ),
    "what methods look at of one Synchronize": (
        f"{model.MAX_CONVERTED_PARTS} labels, words, mounts; {mib(model.MAX_RAW_WEIGHT)} in `raw`"
    ),
    "bytes that the peer does not read": mib(transport.MAX_UNSENT_BYTES),
    "the text of a status": f"{connection.MAX_STATUS_CHARACTERS} characters",
    "our calls at one time": str(rpc.MAX_CALLS_IN_FLIGHT),
}


def test_the_table_of_the_readme_is_what_the_code_does() -> None:
    text = README.read_text()
    section = text[text.index("## Limits") :].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert {row[0]: re.sub(r" \(.*\)", "", row[1]) for row in rows[2:]} == TABLE


class Quiet(Plugin):
    name, index = "quiet", "50"

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.ended: list[BaseException | None] = []

    async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> None:
        self.counts.append(len(pods) + len(containers))

    async def create_container(self, pod: Pod, container: Container) -> Adjustment | None:
        return None

    async def disconnected(self, error: BaseException | None) -> None:
        self.ended.append(error)


def scene(tmp_path: Path, plugin: Plugin, play: Callable[[PluginConnection], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with FakeRuntime(
            tmp_path / "nri.sock", **{"request_timeout_s": 60, "registration_timeout_s": 60, **options}
        ) as runtime:
            stub = Stub(plugin, socket_path=runtime.path, backoff=Backoff(least_s=0.01, most_s=0.05))
            task = asyncio.create_task(stub.run())
            try:
                await play(await runtime.connected(120))
            finally:
                stub.stop()
                await asyncio.wait_for(task, 120)

    asyncio.run(main())


def field(number: int, content: bytes) -> bytes:
    """One length-delimited field."""
    length, at = b"", len(content)
    while at > 0x7F:
        length += bytes([at & 0x7F | 0x80])
        at >>= 7
    return bytes([number << 3 | 2]) + length + bytes([at]) + content


EMPTY_POD, EMPTY_CONTAINER = field(1, b""), field(2, b"")


@pytest.mark.parametrize("entry", [EMPTY_POD, EMPTY_CONTAINER])
@pytest.mark.parametrize("split", [False, True])
def test_a_synchronize_of_empty_entries_ends_the_connection_before_they_are_made(
    tmp_path: Path, entry: bytes, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 bytes each on the wire: 1 MiB became 594 MiB."""
    plugin, made = Quiet(), list[bytes]()
    for name in ("pod_from_bytes", "container_from_bytes"):
        monkeypatch.setattr(f"nri_core.aio.dispatch.{name}", lambda data, allowance: made.append(data))

    async def play(peer: PluginConnection) -> None:
        made.clear()
        part = entry * 30_000 + b"\x18\x01" if split else entry * 500_000

        async def send() -> None:
            for _ in range(3 if split else 1):
                await peer.client.call(PLUGIN_SERVICE_NAME, "Synchronize", part, timeout_s=60)

        with pytest.raises((RpcError, ConnectionLost), match=r"65536 pods and containers|closed the connection|broke"):
            await send()
        await asyncio.wait_for(peer.wait_closed(), 120)
        assert made == []

    scene(tmp_path, plugin, play)
    assert plugin.counts == [0] * len(plugin.counts)
    assert isinstance(plugin.ended[0], RemoteProtocolError)


def test_as_many_as_the_limit_says_are_taken(tmp_path: Path) -> None:
    plugin = Quiet()

    async def play(peer: PluginConnection) -> None:
        half = session.MAX_SYNCHRONIZED // 2
        for part in (EMPTY_POD * half + b"\x18\x01", EMPTY_CONTAINER * half):
            await peer.client.call(PLUGIN_SERVICE_NAME, "Synchronize", part, timeout_s=60)

    scene(tmp_path, plugin, play, request_timeout_s=60)
    assert plugin.counts == [0, session.MAX_SYNCHRONIZED]


MANY = wire.MAX_SMALL_PARTS + 1
SMALL = {
    "mounts": field(9, b"") * MANY,
    "mount options": field(9, field(4, b"") * MANY),
    "labels": field(5, field(1, b"k")) * MANY,
    "words": field(8, b"x") * MANY,
    "hooks": field(10, field(1, b"") * MANY),
    "devices, three levels down": field(11, field(2, field(5, b"")) * MANY),
    "system calls, four levels down": field(11, field(8, field(7, field(1, b"a")) * MANY)),
    "behind much that is long": field(8, b"long enough") * 100_000 + field(9, b"") * MANY,
}


@pytest.mark.parametrize("kind", SMALL)
def test_small_parts_are_counted_at_every_depth(tmp_path: Path, kind: str) -> None:
    """An empty mount is two bytes on the wire, and 80 in memory before anybody looks at it."""
    request = field(1, b"") + field(2, SMALL[kind])
    with pytest.raises(wire.TooManyParts, match="more than 65536 parts"):
        wire.decoded(nri_pb2.CreateContainerRequest(), request)

    async def play(peer: PluginConnection) -> None:
        with pytest.raises(RpcError, match="more than 65536 parts") as caught:
            await peer.client.call(PLUGIN_SERVICE_NAME, "CreateContainer", request, timeout_s=60)
        assert caught.value.code == Code.RESOURCE_EXHAUSTED
        await peer.create_container(POD, CONTAINER)

    scene(tmp_path, Quiet(), play)


@pytest.mark.parametrize(
    "text", ["\x01" * 300_000, "\x00" * 300_000, "\x12\x00" * 150_000], ids=["one", "NUL", "like a container"]
)
def test_text_that_looks_like_many_small_parts_is_not_taken_for_them(text: str) -> None:
    """Any tenant can write such an annotation: it must not keep the plugin out."""
    message = nri_pb2.CreateContainerRequest(pod=nri_pb2.PodSandbox(annotations={"k": text}))
    data = message.SerializeToString()
    assert wire.may_be_small(data) > wire.MAX_SMALL_PARTS
    assert wire.decoded(nri_pb2.CreateContainerRequest(), data) == message


@given(st.binary(max_size=300), st.integers(0, 3))
def test_what_is_counted_is_never_less_than_what_there_is(data: bytes, kind: int) -> None:
    """The quick bound against the slow count, on garbage too, which may only be a ValueError."""
    message = (nri_pb2.Container, nri_pb2.PodSandbox, nri_pb2.StateChangeEvent, ttrpc_pb2.Request)[kind]
    counts = [0, 0]
    try:
        wire._count(memoryview(data), message.DESCRIPTOR, counts)
    except ValueError:
        return
    # Every small part has its length as a byte of its own, below 8.
    assert counts[1] <= len(data.translate(None, wire._LONG)) <= len(data)
    assert counts[1] <= wire.may_be_small(data)


@given(st.binary(max_size=120))
def test_fields_are_those_that_protobuf_finds(data: bytes) -> None:
    """Whatever protobuf takes for a SynchronizeRequest, we take for the same one."""
    try:
        theirs = nri_pb2.SynchronizeRequest.FromString(data)
    except Exception:
        return
    ours = session.Session()
    ours.state = session.State.CONFIGURED
    try:
        found = ours.synchronized_bytes(data)
    except ValueError:
        assert re.search(rb"[\x03\x04\x0b\x0c\x13\x14\x1b\x1c]", data) or b"\x80" in data  # groups, long numbers
        return
    assert (found is None) == theirs.more
    if found is not None:
        assert [nri_pb2.PodSandbox.FromString(each) for each in found[0]] == list(theirs.pods)
        assert [nri_pb2.Container.FromString(each) for each in found[1]] == list(theirs.containers)


def test_a_method_that_looks_at_millions_of_words_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one Synchronize, all records together: each alone is within its limits."""
    data = nri_pb2.Container(id="c", env=["x"] * 1000, mounts=[nri_pb2.Mount(options=["o"] * 10)]).SerializeToString()
    allowance = Allowance(2500)
    records = [container_from_bytes(data, allowance) for _ in range(5)]
    assert len(records[0].env) == len(records[1].env) == 1000
    assert len(records[0].env) == 1000  # kept: not converted twice
    assert len(records[0].mounts[0].options) == 10
    assert allowance.parts == 500 - 11
    with pytest.raises(RemoteProtocolError, match="more than 1048576 parts"):
        _ = records[2].env
    assert records[2].id == "c"


def test_a_method_that_looks_at_raw_of_all_is_stopped_when_they_are_more_than_real_ones() -> None:
    mounts = nri_pb2.Container(id="c", mounts=[nri_pb2.Mount()] * 1000).SerializeToString()
    allowance = Allowance(weight=3 * wire.weight(mounts))
    records = [container_from_bytes(mounts, allowance) for _ in range(4)]
    for record in records[:3]:
        assert record.raw is not None
        assert len(record.raw.mounts) == 1000
    with pytest.raises(RemoteProtocolError, match="more than 536870912 bytes as messages"):
        _ = records[3].raw
    real = nri_pb2.Container(id="c" * 64, env=["A=" + "x" * 30] * 20, args=["sh", "-c", "true"], labels={"a": "b" * 20})
    assert model.MAX_RAW_WEIGHT / wire.weight(real.SerializeToString()) > 20_000


def test_metadata_is_counted() -> None:
    """A pair is two bytes on the wire, and a tuple of two strings for us."""
    pairs = envelope.MAX_METADATA
    data = encode_request(CallHead("s", "m", b"", 0, (("k", "v"),) * pairs))
    assert len(decode_request(data).metadata) == pairs
    server = ServerConnection({"s": {"m": Kind.UNARY}})
    data = ttrpc_pb2.Request(service="s", method="m").SerializeToString() + field(5, b"") * (pairs + 1)
    server.receive_data(encode_frame(1, frame.REQUEST, 0, data))
    assert status_codes(b"".join(server.frames_to_send())) == [Code.RESOURCE_EXHAUSTED]
    assert server.next_event() is None


PAIR = ttrpc_pb2.KeyValue(key="k", value="v")


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        ttrpc_pb2.Request(service="s", method="m", timeout_nano=-5).SerializeToString(),
        ttrpc_pb2.Request(
            timeout_nano=1 << 62, metadata=[ttrpc_pb2.KeyValue(key="k", value="v")] * 3
        ).SerializeToString(),
        ttrpc_pb2.Request(service="first").SerializeToString() + field(1, b"last") + field(13, b"unknown"),
        b"\x08\x05" + b"\x22\x01x" + b"\x9d\x01abcd" + b"\x20\x83\x80\x80\x80\x80\x80\x80\x80\x80\x7f",
    ],
)
def test_a_large_request_means_what_protobuf_says_it_means(rest: bytes) -> None:
    """Other wire types than the schema's are unknown fields; of several, the last counts."""
    payload = b"p" * (envelope.LARGE_BYTES + 1)
    for data in (rest + field(3, payload), field(3, b"first") + field(3, payload) + rest):
        found, theirs = decode_request(data), ttrpc_pb2.Request.FromString(data)
        assert found.payload == theirs.payload == payload
        assert (found.service, found.method, found.timeout_ns) == (theirs.service, theirs.method, theirs.timeout_nano)
        assert found.metadata == tuple((pair.key, pair.value) for pair in theirs.metadata)


@pytest.mark.parametrize("rest", [b"\x0a", b"\x0a\x02\xff\xff", b"\x2a\x01\x0a", b"\x0b", b"\x20" + b"\xff" * 11])
def test_a_large_request_that_is_none_is_refused(rest: bytes) -> None:
    data = field(3, b"p" * (envelope.LARGE_BYTES + 1)) + rest
    with pytest.raises(ValueError):  # of several kinds
        decode_request(data)
    with pytest.raises(DecodeError):
        ttrpc_pb2.Request.FromString(data)


def test_metadata_of_a_large_request_is_counted() -> None:
    data = field(3, b"p" * (envelope.LARGE_BYTES + 1)) + field(5, b"") * (envelope.MAX_METADATA + 1)
    with pytest.raises(wire.TooManyParts):
        decode_request(data)


def test_details_of_a_status_are_counted() -> None:
    client = ClientConnection()
    stream = client.start_call(CallHead("s", "m", b"", 0))
    status = field(1, b"\x08\x05" + field(3, b"") * MANY)
    client.receive_data(encode_frame(stream, frame.RESPONSE, 0, status))
    event = client.next_event()
    assert isinstance(event, connection.CallEnded)
    assert "more than 65536 parts" in str(event.error)


def status_codes(data: bytes) -> list[int]:
    """Codes of all Response frames."""
    decoder, found = FrameDecoder(), list[int]()
    decoder.receive_data(data)
    while (each := decoder.next_frame()) is not None:
        assert isinstance(each, Frame)
        found.append(ttrpc_pb2.Response.FromString(each.data).status.code)
    return found


@pytest.mark.parametrize("what", ["service", "method"])
def test_a_name_that_nobody_has_is_not_sent_back_whole(what: str) -> None:
    """Frames of 16 MiB are taken, none over 4 MiB is sent: the answer used to break the connection."""
    server = ServerConnection({"s": {"m": Kind.UNARY}}, max_receive_bytes=mux.MAX_PAYLOAD_BYTES)
    long = "n" * (5 << 20)
    head = CallHead(long if what == "service" else "s", long, b"", 0)
    # Larger than we would send ourselves.
    data = encode_request(head)
    server.receive_data(frame.HEADER.pack(len(data), 1, frame.REQUEST, 0) + data)
    [answer] = server.frames_to_send()
    with pytest.raises(RpcError, match="n" * 1000) as caught:
        decode_response(answer[frame.HEADER.size :])
    assert caught.value.code == Code.UNIMPLEMENTED
    assert len(answer) < connection.MAX_STATUS_CHARACTERS + 100


async def echo(call: Call) -> bytes:
    return call.head.payload


async def never(call: Call) -> None:
    await asyncio.Event().wait()


SERVICES: Services = {"s": {"echo": (Kind.UNARY, echo), "deaf": (Kind.BIDIRECTIONAL, never)}}


def test_answers_are_sent_as_they_come() -> None:
    """A portion of 256 KiB can hold 26 000 frames, each with an answer seven times as long."""
    frame_bytes = encode_frame(2, frame.DATA, 0, b"")
    left: list[int] = []

    async def main() -> None:
        server = ServerEndpoint(SERVICES, lambda data: left.append(server._core.buffered_bytes))
        server.feed(frame_bytes * 26_000)

    asyncio.run(main())
    # Each was sent before the next frame was looked at.
    assert left == [len(frame_bytes) * count for count in reversed(range(26_000))]


def test_empty_messages_of_all_streams_are_counted() -> None:
    async def main() -> None:
        answers: list[bytes] = []
        server = ServerEndpoint(SERVICES, answers.append)
        open_stream = encode_request(CallHead("s", "deaf", b"", 0))
        streams = range(1, 2 * (rpc.MAX_HELD_MESSAGES // 4000) + 5, 2)
        for stream in streams:
            server.feed(encode_frame(stream, frame.REQUEST, frame.REMOTE_OPEN, open_stream))
            server.feed(encode_frame(stream, frame.DATA, 0, b"") * 4000)
        assert server._budget.pieces <= rpc.MAX_HELD_MESSAGES
        assert status_codes(b"".join(answers)).count(Code.RESOURCE_EXHAUSTED) >= 2
        server.lose(ConnectionLost("over"))
        await server.drain()
        await asyncio.sleep(0)
        assert (server._budget.pieces, server._budget.used) == (0, 0)

    asyncio.run(main())


def test_one_byte_frames_are_handed_over_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """29 000 of them fit one portion of the socket."""
    fed: list[bytes] = []
    trunk = Trunk()
    trunk.attach(PLUGIN_SERVICE, fed.append)
    trunk.attach(2, lambda data: fed.append(b"2" + data))
    one = mux.HEADER.pack(PLUGIN_SERVICE, 1)
    trunk._receive(b"".join(one + bytes([number % 256]) for number in range(1000)))
    assert fed == [bytes(number % 256 for number in range(1000))]
    fed.clear()
    trunk._receive(one + b"a" + one + b"b" + mux.HEADER.pack(2, 1) + b"c" + one + b"d")
    assert fed == [b"ab", b"2c", b"d"]


def test_small_frames_that_nobody_reads_wait_as_bytes_and_arrive_in_order() -> None:
    """asyncio keeps an object for each write: 64 MiB of small answers would be 250."""

    async def main() -> None:
        left, right = socket.socketpair()
        right.setblocking(False)
        ours = await Wire.over(left, lambda data: None)
        frames = [b"%07d" % number for number in range(200_000)]
        for each in frames:
            ours.send(each)
        assert ours._transport is not None
        assert ours._transport.get_write_buffer_size() < 1 << 20
        assert len(ours._waiting) > 0
        got = bytearray()
        ours.close()  # in an orderly way: what was written is delivered
        while chunk := await asyncio.wait_for(asyncio.get_running_loop().sock_recv(right, 1 << 16), 120):
            got += chunk
        assert bytes(got) == b"".join(frames)
        right.close()

    asyncio.run(main())


def test_methods_that_never_end_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Late ones run on, and hold what they were called with."""
    monkeypatch.setattr(hooks, "MAX_RUNNING", 3)
    monkeypatch.setattr(hooks, "MARGIN_SHARE", 0.995)  # answered 0.3 s after the call, a minute before the limit

    class Stuck(Quiet):
        def __init__(self) -> None:
            super().__init__()
            self.begun = 0
            self.lates: list[float] = []

        def late(self, method: str, seconds: float) -> None:
            self.lates.append(seconds)

        async def create_container(self, pod: Pod, container: Container) -> None:
            self.begun += 1
            await asyncio.Event().wait()

    plugin = Stuck()

    async def play(peer: PluginConnection) -> None:
        for _ in range(5):
            assert not (await peer.create_container(POD, CONTAINER)).HasField("adjust")

    scene(tmp_path, plugin, play, request_timeout_s=60)
    assert plugin.begun == 3
    assert len(plugin.lates) == 5
    assert plugin.lates[3:] == [0.0, 0.0]


def test_what_methods_hold_is_weighed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "MAX_RUNNING_WEIGHT", 1 << 20)
    large = Container("c2", "p1", "large", env=("x" * 200_000,))
    half = Container("c3", "p1", "half", env=("x" * 70_000,))

    class Counting(Quiet):
        names: list[str] = []

        async def create_container(self, pod: Pod, container: Container) -> None:
            self.names.append(container.name)

    plugin = Counting()

    async def play(peer: PluginConnection) -> None:
        await peer.create_container(POD, large)
        for _ in range(3):  # what has ended counts no more
            await peer.create_container(POD, half)

    scene(tmp_path, plugin, play)
    assert plugin.names == ["half"] * 3


def test_an_answer_over_the_limit_is_not_sent() -> None:
    with pytest.raises(MessageTooLarge):
        encode_frame(1, frame.RESPONSE, 0, bytes(frame.MAX_DATA_BYTES + 1))
