"""Bytes of a hostile runtime against a whole plugin: mux, ttrpc, NRI messages, over a real socket pair.

The sans-IO parts are fuzzed in tests/unit/nri_core too; here nothing may raise but our own errors, reach the event
loop's exception handler, hang, or make the plugin hold more than the documented limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nri_core import Adjustment, Container, NriError, Plugin, Pod, Stub, Update
from nri_core.aio.dispatch import PLUGIN_SERVICE_NAME
from nri_core.mux import HEADER, PLUGIN_SERVICE, RUNTIME_SERVICE, MuxDecoder, wrap
from nri_core.pb import nri_pb2
from nri_core.ttrpc import frame as wire
from nri_core.ttrpc.envelope import CallHead, encode_request, encode_response, encode_status
from nri_core.ttrpc.frame import Frame, FrameDecoder, encode_frame

METHODS = [method.name for method in nri_pb2.DESCRIPTOR.services_by_name["Plugin"].methods]
REQUESTS = {
    method.name: getattr(nri_pb2, method.input_type.name)
    for method in nri_pb2.DESCRIPTOR.services_by_name["Plugin"].methods
}
LIMIT_S = 120.0


class Everything(Plugin):
    """Subscribes to all, touches what it gets."""

    name, index = "everything", "50"

    async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> list[Update]:
        repr((pods, containers, [pod.raw for pod in pods], [container.raw for container in containers]))
        return [Update(container.id).unified("memory.high", "1") for container in containers]

    async def run_pod_sandbox(self, pod: Pod) -> None:
        repr(pod)

    async def create_container(self, pod: Pod, container: Container) -> Adjustment:
        return Adjustment().annotation("name", repr(container))

    async def update_container(self, pod: Pod, container: Container, resources: Any) -> list[Update]:
        return [Update(container.id, resources)]

    async def stop_container(self, pod: Pod, container: Container) -> None:
        repr((pod, container))

    async def validate_container_adjustment(self, validation: Any) -> None:
        repr(validation)


async def serve(data: Sequence[bytes]) -> tuple[bytes, list[dict[str, Any]]]:
    """Feed portions to a plugin, then close; returns what it wrote and what reached the loop's handler."""
    loop, troubles = asyncio.get_running_loop(), list[dict[str, Any]]()
    loop.set_exception_handler(lambda _, context: troubles.append(context))
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    stub = Stub(Everything(), reconnect=False)
    os.environ["NRI_PLUGIN_SOCKET"] = str(theirs.detach())
    task = asyncio.ensure_future(stub.run())
    await asyncio.sleep(0)
    del os.environ["NRI_PLUGIN_SOCKET"]
    written = bytearray()

    async def read() -> None:
        with contextlib.suppress(OSError):
            while chunk := await loop.sock_recv(ours, 1 << 16):
                written.extend(chunk)

    reader = asyncio.ensure_future(read())
    with contextlib.suppress(OSError):  # it may hang up on us
        for portion in data:
            await loop.sock_sendall(ours, portion)
            await asyncio.sleep(0)
    for _ in range(20):  # let handlers run
        await asyncio.sleep(0)
    with contextlib.suppress(OSError):
        ours.shutdown(socket.SHUT_WR)
    with contextlib.suppress(NriError):
        await asyncio.wait_for(task, LIMIT_S)
    await asyncio.wait_for(reader, LIMIT_S)
    ours.close()
    return bytes(written), troubles


def answers(data: bytes) -> list[Frame]:
    """The frames that the plugin wrote as a server; all must be well-formed."""
    mux, decoder, found = MuxDecoder(), FrameDecoder(), list[Frame]()
    mux.receive_data(data)
    while (chunk := mux.next_chunk()) is not None:
        if chunk[0] == PLUGIN_SERVICE:
            decoder.receive_data(chunk[1])
            while (frame := decoder.next_frame()) is not None:
                assert isinstance(frame, Frame)
                found.append(frame)
    return found


TEXT = st.text(max_size=12) | st.sampled_from(["-", "--x", "\0", "/../..", "a" * 300])
BODIES = st.one_of(
    st.binary(max_size=60),
    st.builds(
        lambda pod, container, key, value: nri_pb2.CreateContainerRequest(
            pod=nri_pb2.PodSandbox(id=pod, annotations={key: value}),
            container=nri_pb2.Container(id=container, labels={key: value}, env=[value], args=[key]),
        ).SerializeToString(),
        TEXT,
        TEXT,
        TEXT,
        TEXT,
    ),
    st.builds(
        lambda event, extra: nri_pb2.StateChangeEvent(
            event=nri_pb2.Event.Name(event), pod=nri_pb2.PodSandbox(id=extra)
        ).SerializeToString(),
        st.integers(0, 15),
        TEXT,
    ),
    st.builds(
        lambda more, name: nri_pb2.SynchronizeRequest(
            more=more, pods=[nri_pb2.PodSandbox(name=name)], containers=[nri_pb2.Container(id=name)]
        ).SerializeToString(),
        st.booleans(),
        TEXT,
    ),
)
CALLS = st.builds(
    lambda stream, method, body, timeout, flags: encode_frame(
        stream, wire.REQUEST, flags, encode_request(CallHead(PLUGIN_SERVICE_NAME, method, body, timeout))
    ),
    st.integers(0, 40),
    st.sampled_from([*METHODS, "Nothing"]),
    BODIES,
    st.sampled_from([0, -1, 1, 10**6, 2 * 10**9, 2**63 - 1]),
    st.integers(0, 7),
)
REPLIES = st.builds(
    lambda stream, data: encode_frame(stream, wire.RESPONSE, 0, data),
    st.integers(0, 5),
    st.one_of(st.just(b""), st.just(encode_response(b"\xff")), st.just(encode_status(2, "no")), st.binary(max_size=20)),
)
HANDSHAKE = (
    wrap(RUNTIME_SERVICE, encode_frame(1, wire.RESPONSE, 0, b"")),
    wrap(
        PLUGIN_SERVICE,
        encode_frame(
            1,
            wire.REQUEST,
            0,
            encode_request(
                CallHead(
                    PLUGIN_SERVICE_NAME,
                    "Configure",
                    nri_pb2.ConfigureRequest(runtime_name="containerd", request_timeout=500).SerializeToString(),
                    0,
                )
            ),
        ),
    ),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.one_of(
            CALLS.map(lambda frame: wrap(PLUGIN_SERVICE, frame)),
            REPLIES.map(lambda frame: wrap(RUNTIME_SERVICE, frame)),
            st.tuples(st.integers(0, 5), st.binary(max_size=40)).map(lambda f: HEADER.pack(f[0], len(f[1])) + f[1]),
        ),
        max_size=20,
    ),
    st.booleans(),
    st.sampled_from([1, 7, 1 << 20]),
)
def test_frames_of_every_kind_in_any_order_end_in_answers_or_our_own_errors(
    frames: list[bytes], greeted: bool, portion: int
) -> None:
    stream = b"".join((*HANDSHAKE, *frames) if greeted else frames)
    portions = [stream[at : at + portion] for at in range(0, len(stream), portion)][:4000]
    written, troubles = asyncio.run(serve(portions))
    assert troubles == []
    for frame in answers(written):
        assert frame.type == wire.RESPONSE


RECORDS = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda text, cut: nri_pb2.Container(
            id=text, mounts=[nri_pb2.Mount(options=[text])], linux=nri_pb2.LinuxContainer(cgroups_path=text)
        ).SerializeToString()[cut:],
        TEXT,
        st.integers(0, 3),
    ),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), RECORDS), max_size=8), st.booleans(), st.binary(max_size=3))
def test_records_of_every_kind_in_a_synchronize_end_in_one_answer(
    records: list[tuple[int, bytes]], more: bool, rest: bytes
) -> None:
    """They are looked at after they were listed: what is malformed in one must not come out otherwise."""
    body = b"".join(bytes([number << 3 | 2, len(record) & 0x7F]) + record[:127] for number, record in records)
    body += b"\x18\x01" * more + rest
    call = encode_frame(3, wire.REQUEST, 0, encode_request(CallHead(PLUGIN_SERVICE_NAME, "Synchronize", body, 0)))
    written, troubles = asyncio.run(serve([*HANDSHAKE, wrap(PLUGIN_SERVICE, call)]))
    assert troubles == []
    assert len([frame for frame in answers(written) if frame.stream_id == 3]) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=10))
def test_garbage_ends_in_our_own_errors(portions: list[bytes]) -> None:
    _, troubles = asyncio.run(serve(portions))
    assert troubles == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [0, 1, 3, 17])
def test_a_message_cut_short_is_answered_with_a_status(method: str, size: int) -> None:
    """Never UNIMPLEMENTED: the runtime would switch to older calls for good."""
    body = nri_pb2.CreateContainerRequest(
        pod=nri_pb2.PodSandbox(id="p" * 30), container=nri_pb2.Container(id="c" * 30)
    ).SerializeToString()[:size]
    call = wrap(
        PLUGIN_SERVICE,
        encode_frame(3, wire.REQUEST, 0, encode_request(CallHead(PLUGIN_SERVICE_NAME, method, body, 0))),
    )
    written, troubles = asyncio.run(serve([*HANDSHAKE, call]))
    assert troubles == []
    codes = [_code(frame) for frame in answers(written) if frame.stream_id == 3]
    assert len(codes) == 1
    assert codes[0] != 12


def _code(frame: Frame) -> int:
    from nri_core.pb import ttrpc_pb2

    return ttrpc_pb2.Response.FromString(frame.data).status.code
