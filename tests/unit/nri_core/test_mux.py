"""The mux: sizes that a Go peer survives, and streams taken apart whatever the portions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nri_core.errors import LocalProtocolError, RemoteProtocolError
from nri_core.mux import HEADER, MAX_PAYLOAD_BYTES, MuxDecoder, wrap


def mux_frames(data: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at < len(data):
        connection, length = HEADER.unpack_from(data, at)
        at += HEADER.size
        found.append((connection, data[at : at + length]))
        at += length
    return found


def go_reader_accepts(frames: list[bytes]) -> bool:
    """A Go peer: offers 4096 bytes, or mid-message what is missing if that is more; a larger frame fails it."""
    missing = 0
    header = b""
    for frame in frames:
        offered = missing if missing >= 4096 else 4096
        if len(frame) > offered:
            return False
        while frame:
            if missing:
                taken = min(missing, len(frame))
                missing, frame = missing - taken, frame[taken:]
                continue
            need = 10 - len(header)
            header, frame = header + frame[:need], frame[need:]
            if len(header) == 10:
                missing, header = int.from_bytes(header[:4], "big"), b""
    return missing == 0


@pytest.mark.parametrize(
    "size", [0, 1, 4085, 4086, 4087, 4095, 4096, 4097, 8181, 8182, 8183, 8192, 100_000, (4 << 20) - 1, 4 << 20]
)
def test_messages_of_every_critical_size_can_be_read_by_a_go_peer(size: int) -> None:
    message = size.to_bytes(4, "big") + bytes(6) + bytes(size)
    frames = mux_frames(wrap(1, message))
    assert all(connection == 1 for connection, _ in frames)
    payloads = [payload for _, payload in frames]
    assert b"".join(payloads) == message
    assert len(payloads) <= 2
    assert all(payloads)
    assert go_reader_accepts(payloads)


def test_the_model_of_the_go_reader_refuses_what_go_refuses() -> None:
    """Else the test above would prove nothing."""
    assert not go_reader_accepts([(4087).to_bytes(4, "big") + bytes(6) + bytes(4087)])
    two = [(3000).to_bytes(4, "big") + bytes(6) + bytes(3000)] * 2
    assert not go_reader_accepts([b"".join(two)])


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 4), st.binary(min_size=1, max_size=50)), max_size=12), st.integers(1, 40))
def test_each_connection_s_bytes_come_out_whole_and_others_are_dropped(
    frames: list[tuple[int, bytes]], portion: int
) -> None:
    data = b"".join(HEADER.pack(connection, len(payload)) + payload for connection, payload in frames)
    decoder = MuxDecoder()
    found: dict[int, bytes] = {}
    for at in range(0, len(data), portion):
        decoder.receive_data(data[at : at + portion])
        while (chunk := decoder.next_chunk()) is not None:
            found[chunk[0]] = found.get(chunk[0], b"") + chunk[1]
    for connection in (1, 2):
        assert found.get(connection, b"") == b"".join(payload for number, payload in frames if number == connection)
    assert set(found) <= {1, 2}


def test_a_frame_that_claims_too_much_ends_the_connection_before_it_is_read() -> None:
    decoder = MuxDecoder()
    decoder.receive_data(HEADER.pack(1, MAX_PAYLOAD_BYTES + 1))
    with pytest.raises(RemoteProtocolError, match="is the peer an NRI runtime"):
        decoder.next_chunk()


@given(st.lists(st.binary(max_size=40), max_size=10))
def test_garbage_raises_only_the_remote_protocol_error(portions: list[bytes]) -> None:
    decoder = MuxDecoder()
    for portion in portions:
        decoder.receive_data(portion)
        try:
            while decoder.next_chunk() is not None:
                pass
        except RemoteProtocolError:
            return


def test_our_own_misuse_is_told() -> None:
    with pytest.raises(LocalProtocolError):
        wrap(0, b"x")
    with pytest.raises(LocalProtocolError):
        wrap(1, b"")
