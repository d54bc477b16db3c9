"""ttrpc without IO: known bytes, every portioning, and what a peer's mistakes lead to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nri_core.errors import Code, LocalProtocolError, MessageTooLarge, RpcError
from nri_core.mux import wrap
from nri_core.pb import nri_pb2, ttrpc_pb2
from nri_core.ttrpc import frame as wire
from nri_core.ttrpc.connection import (
    CallEnded,
    CallStarted,
    ClientConnection,
    Ignored,
    Kind,
    MessageReceived,
    ServerConnection,
)
from nri_core.ttrpc.envelope import CallHead, decode_request, encode_request, encode_response, encode_status, status_of
from nri_core.ttrpc.frame import MAX_DATA_BYTES, Frame, FrameDecoder, Oversized, encode_frame

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "ttrpc_vectors.json").read_text())
PLUGIN, RUNTIME = "nri.pkg.api.v1alpha1.Plugin", "nri.pkg.api.v1alpha1.Runtime"
METHODS = {"s": {"m": Kind.UNARY, "st": Kind.BIDIRECTIONAL, "up": Kind.CLIENT_STREAM, "down": Kind.SERVER_STREAM}}


def vector(name: str) -> bytes:
    [found] = [each for each in VECTORS if each["name"].split(" ")[0] == name]
    return bytes.fromhex(found["ttrpc"])


def frames_of(data: bytes, portion: int | None = None) -> list[Frame | Oversized]:
    decoder = FrameDecoder()
    found = []
    portion = portion or max(1, len(data))
    for at in range(0, len(data), portion):
        decoder.receive_data(data[at : at + portion])
        while (frame := decoder.next_frame()) is not None:
            found.append(frame)
    return found


@pytest.mark.parametrize("each", VECTORS, ids=lambda each: each["name"].split(" ")[0])
@pytest.mark.parametrize("portion", [None, 1, 7])
def test_every_known_message_is_decoded_and_encoded_again(each: dict[str, Any], portion: int | None) -> None:
    data = bytes.fromhex(each["ttrpc"])
    [frame] = frames_of(data, portion)
    assert isinstance(frame, Frame)
    assert encode_frame(frame.stream_id, frame.type, frame.flags, frame.data) == data
    if frame.type == wire.REQUEST:
        assert encode_request(decode_request(frame.data)) == frame.data
    elif frame.type == wire.RESPONSE:
        assert ttrpc_pb2.Response.FromString(frame.data).SerializeToString() == frame.data
    if each["mux"] is not None:
        assert wrap(each["mux_connection"], data) == bytes.fromhex(each["mux"])


def test_the_known_messages_are_what_we_send() -> None:
    """Built from our own calls, not only re-encoded."""
    register = nri_pb2.RegisterPluginRequest(plugin_name="memtierd", plugin_idx="45").SerializeToString()
    client = ClientConnection()
    client.start_call(CallHead(RUNTIME, "RegisterPlugin", register, 5_000_000_000))
    assert client.frames_to_send() == [vector("A1")]
    configured = nri_pb2.ConfigureResponse(events=0x228).SerializeToString()
    assert encode_frame(1, wire.RESPONSE, 0, encode_response(configured)) == vector("A4")
    assert encode_frame(1, wire.RESPONSE, 0, encode_response(b"")) == vector("A2")
    error = encode_status(Code.UNIMPLEMENTED, "method RunPodSandbox")
    assert encode_frame(7, wire.RESPONSE, 0, error) == vector("A8")
    head = CallHead("s", "m", b"", 0, (("Foo", "a"), ("foo", "b")))
    assert encode_frame(1, wire.REQUEST, 0, encode_request(head)) == vector("T1")


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 255), st.integers(0, 255), st.binary(max_size=80))),
    st.integers(1, 60),
)
def test_frames_come_out_as_they_went_in_whatever_the_portions(
    made: list[tuple[int, int, int, bytes]], portion: int
) -> None:
    data = b"".join(encode_frame(*each) for each in made)
    assert frames_of(data, portion) == [Frame(*each) for each in made]


def test_an_over_long_frame_is_skipped_without_being_stored() -> None:
    decoder = FrameDecoder()
    decoder.receive_data(bytes.fromhex("00400001000000010100"))
    assert decoder.next_frame() == Oversized(1, MAX_DATA_BYTES + 1)
    for _ in range(MAX_DATA_BYTES // 65536):
        decoder.receive_data(bytes(65536))
        assert decoder.next_frame() is None
        assert decoder.buffered_bytes < 65536
    decoder.receive_data(b"\0" + vector("A2"))
    assert decoder.next_frame() == frames_of(vector("A2"))[0]


def test_a_message_of_exactly_the_limit_passes_and_one_byte_more_is_refused() -> None:
    assert len(encode_frame(1, 1, 0, bytes(MAX_DATA_BYTES))) == MAX_DATA_BYTES + 10
    with pytest.raises(MessageTooLarge, match="message length 4194305 exceed maximum message size of 4194304"):
        encode_frame(1, 1, 0, bytes(MAX_DATA_BYTES + 1))


class Server:
    """A server connection and what it answered."""

    def __init__(self) -> None:
        self.core = ServerConnection(METHODS)

    def give(self, *frames: bytes) -> list[tuple[int, int, str]]:
        """Answers as (stream id, code, text)."""
        for frame in frames:
            self.core.receive_data(frame)
        found = []
        for data in self.core.frames_to_send():
            [answer] = frames_of(data)
            assert isinstance(answer, Frame)
            status = ttrpc_pb2.Response.FromString(answer.data).status
            found.append((answer.stream_id, status.code, status.message))
        return found


def request(stream_id: int, method: str = "m", service: str = "s", flags: int = 0, payload: bytes = b"") -> bytes:
    return encode_frame(stream_id, wire.REQUEST, flags, encode_request(CallHead(service, method, payload, 0)))


def data(stream_id: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return encode_frame(stream_id, wire.DATA, flags, payload)


def test_mistakes_of_a_client_get_the_answers_that_go_gives_and_keep_the_connection() -> None:
    server = Server()
    assert server.give(request(2)) == [(2, 3, "StreamID must be odd for client initiated streams")]
    assert server.give(request(1)) == []
    assert server.give(request(1)) == [(1, 3, "StreamID cannot be re-used and must increment")]
    [(stream, code, text)] = server.give(encode_frame(3, wire.REQUEST, 0, b"\xff"))
    assert (stream, code) == (3, 3)
    assert text.startswith("unmarshal request error: ")
    assert server.give(request(5, service="Not")) == [(5, 12, "service Not")]
    assert server.give(request(7, method="x")) == [(7, 12, "method x")]
    assert server.give(data(9)) == [(9, 3, "StreamID is no longer active")]
    assert server.give(encode_frame(11, 0x09, 0, b"")) == []
    assert server.give(encode_frame(13, wire.RESPONSE, 0, b"")) == []
    assert server.give(request(15)) == []
    started = []
    while (event := server.core.next_event()) is not None:
        started.append(event)
    assert [event.stream_id for event in started if isinstance(event, CallStarted)] == [1, 15]


def test_the_known_answers_to_mistakes_are_given_byte_for_byte() -> None:
    core = ServerConnection(METHODS)
    core.receive_data(request(2))
    assert core.frames_to_send() == [vector("T6")]
    core.receive_data(request(1, service="Not"))
    assert core.frames_to_send() == [vector("T7")]
    fresh = ServerConnection(METHODS)
    fresh.receive_data(bytes.fromhex("00400001000000010100"))
    fresh.receive_data(bytes(MAX_DATA_BYTES + 1))
    assert fresh.frames_to_send() == [vector("T8")]


def test_a_unary_call_is_answered_once() -> None:
    server = Server()
    server.give(request(1, payload=b"in"))
    event = server.core.next_event()
    assert isinstance(event, CallStarted)
    assert event.head.payload == b"in"
    server.core.respond(1, b"out")
    assert server.core.frames_to_send() == [encode_frame(1, wire.RESPONSE, 0, encode_response(b"out"))]
    with pytest.raises(LocalProtocolError, match="answered before"):
        server.core.respond(1, b"again")


def test_an_answer_over_the_limit_becomes_a_status_and_the_connection_lives() -> None:
    server = Server()
    server.give(request(1))
    with pytest.raises(MessageTooLarge):
        server.core.respond(1, bytes(MAX_DATA_BYTES))
    assert [code for _, code, _ in server.give()] == [8]
    assert server.give(request(3)) == []
    assert server.core.open_streams == 1


def test_data_on_a_unary_call_fails_it() -> None:
    server = Server()
    server.give(request(1))
    [(stream, code, text)] = server.give(data(1, b"x"))
    assert (stream, code) == (1, 3)
    assert text.startswith("data handling error")


def test_streaming_in_both_directions() -> None:
    """An empty message is a message; a closing frame without data is none."""
    server, client = ServerConnection(METHODS), ClientConnection()
    stream = client.start_call(CallHead("s", "st", b"", 0), Kind.BIDIRECTIONAL)
    client.send_message(stream, b"one")
    client.send_message(stream, b"")
    client.end_messages(stream)
    sent = client.frames_to_send()
    assert sent[3] == data(1, b"", wire.REMOTE_CLOSED | wire.NO_DATA)
    server.receive_data(b"".join(sent))
    assert isinstance(server.next_event(), CallStarted)
    received = [server.next_event() for _ in range(3)]
    assert received == [MessageReceived(1, b"one"), MessageReceived(1, b""), MessageReceived(1, None)]
    server.send_message(1, b"answer")
    server.end_messages(1)
    client.receive_data(b"".join(server.frames_to_send()))
    assert [client.next_event() for _ in range(2)] == [MessageReceived(1, b"answer"), MessageReceived(1, None)]
    assert (client.open_streams, server.open_streams) == (0, 0)
    with pytest.raises(LocalProtocolError):
        client.send_message(stream, b"late")


def test_a_client_accepts_a_last_message_in_the_closing_frame() -> None:
    client = ClientConnection()
    stream = client.start_call(CallHead("s", "down", b"", 0), Kind.SERVER_STREAM)
    client.receive_data(data(stream, b"last", wire.REMOTE_CLOSED))
    assert [client.next_event() for _ in range(2)] == [MessageReceived(1, b"last"), MessageReceived(1, None)]


def test_client_ids_are_odd_increase_and_are_spent_by_a_refused_message() -> None:
    client = ClientConnection()
    assert client.start_call(CallHead("s", "m", b"", 0)) == 1
    with pytest.raises(MessageTooLarge):
        client.start_call(CallHead("s", "m", bytes(MAX_DATA_BYTES), 0))
    assert client.start_call(CallHead("s", "m", b"", 0)) == 5


def test_answers_that_make_no_sense_fail_only_their_call() -> None:
    client = ClientConnection()
    for _ in range(3):
        client.start_call(CallHead("s", "m", b"", 0))
    client.receive_data(encode_frame(1, wire.RESPONSE, 0, b"\xff"))
    client.receive_data(data(3, b"x"))
    client.receive_data(encode_frame(99, wire.RESPONSE, 0, b""))
    client.receive_data(encode_frame(5, wire.RESPONSE, 0, encode_response(b"fine")))
    first, second, third, fourth = (client.next_event() for _ in range(4))
    assert isinstance(first, CallEnded)
    assert first.error is not None
    assert isinstance(second, CallEnded)
    assert second.error is not None
    assert "protocol error" in second.error.message
    assert isinstance(third, Ignored)
    assert fourth == CallEnded(5, b"fine", None)


def test_an_answer_over_the_limit_fails_only_its_call() -> None:
    client = ClientConnection()
    client.start_call(CallHead("s", "m", b"", 0))
    client.receive_data(bytes.fromhex("00400001000000010200") + bytes(MAX_DATA_BYTES + 1))
    event = client.next_event()
    assert isinstance(event, CallEnded)
    assert isinstance(event.error, MessageTooLarge)


def test_a_status_keeps_its_number_and_text() -> None:
    client = ClientConnection()
    client.start_call(CallHead("s", "m", b"", 0))
    client.receive_data(encode_frame(1, wire.RESPONSE, 0, encode_status(99, "odd")))
    event = client.next_event()
    assert isinstance(event, CallEnded)
    assert event.error is not None
    assert (event.error.code, event.error.message) == (99, "odd")
    assert str(event.error) == "odd [? 99]"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TimeoutError(), 4),
        (FileNotFoundError("x"), 5),
        (FileExistsError("x"), 6),
        (PermissionError("x"), 7),
        (BrokenPipeError(), 9),
        (EOFError(), 11),
        (ValueError("x"), 3),
        (RpcError(8, "full"), 8),
        (KeyError("x"), 2),
        (NotImplementedError("x"), 2),
    ],
)
def test_exceptions_of_handlers_become_the_statuses_that_go_uses(error: Exception, code: int) -> None:
    """Not UNIMPLEMENTED for NotImplementedError: it would switch the runtime to older calls."""
    found, text = status_of(error)
    assert found == code
    assert text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=20))
def test_no_bytes_of_a_peer_raise_anything_or_grow_the_buffers(portions: list[bytes]) -> None:
    """Garbage is answered, ignored or waited on; what is held stays below the limit."""
    server, client = ServerConnection(METHODS), ClientConnection()
    client.start_call(CallHead("s", "st", b"", 0), Kind.BIDIRECTIONAL)
    for portion in portions:
        for core in (server, client):
            core.receive_data(portion)
            while core.next_event() is not None:
                pass
            core.frames_to_send()
            assert core.buffered_bytes <= MAX_DATA_BYTES + 10


_FRAMES = st.builds(
    encode_frame,
    st.integers(0, 12),
    st.sampled_from([1, 2, 3, 3, 9]),
    st.integers(0, 7),
    st.one_of(
        st.binary(max_size=20),
        st.builds(
            lambda service, method, payload: encode_request(CallHead(service, method, payload, 0)),
            st.sampled_from(["s", "t"]),
            st.sampled_from(["m", "st", "up", "down", "x"]),
            st.binary(max_size=9),
        ),
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_FRAMES, max_size=25), st.randoms(use_true_random=False))
def test_frames_in_any_order_doubled_or_cut_short_raise_nothing(frames: list[bytes], chance: Any) -> None:
    frames = frames + [each for each in frames if chance.random() < 0.3]
    chance.shuffle(frames)
    stream = b"".join(each if chance.random() < 0.9 else each[: len(each) // 2] for each in frames)
    server, client = ServerConnection(METHODS), ClientConnection()
    for kind, method in ((Kind.UNARY, "m"), (Kind.BIDIRECTIONAL, "st"), (Kind.SERVER_STREAM, "down")):
        client.start_call(CallHead("s", method, b"", 0), kind)
    for core in (server, client):
        core.receive_data(stream)
        while core.next_event() is not None:
            pass
        assert all(frames_of(sent) for sent in core.frames_to_send())
