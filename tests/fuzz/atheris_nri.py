"""Coverage-guided fuzzing of the wire protocol, for as long as you like. Not part of `make test`.

    .venv/bin/pip install atheris            (optional; no wheel for some Python versions)
    .venv/bin/python tests/fuzz/atheris_nri.py -max_total_time=600 [CORPUS_FOLDER]

Each input goes through mux and ttrpc in both roles, once whole and once in small portions; both must say the same,
nothing but RemoteProtocolError may be raised, and no buffer may exceed its limit.
"""

import sys

try:
    import atheris
except ImportError:
    sys.exit("atheris is not installed: .venv/bin/pip install atheris")

with atheris.instrument_imports(include=["nri_core"]):
    from nri_core.api.model import Allowance, container_from_bytes, container_from_message, pod_from_message
    from nri_core.api.resources import resources_from_message
    from nri_core.errors import RemoteProtocolError
    from nri_core.mux import MuxDecoder
    from nri_core.pb import nri_pb2
    from nri_core.session import Session, State
    from nri_core.ttrpc.connection import CallStarted, ClientConnection, Kind, ServerConnection
    from nri_core.ttrpc.envelope import CallHead
    from nri_core.ttrpc.frame import MAX_DATA_BYTES

from google.protobuf.message import DecodeError

METHODS = {"s": {"m": Kind.UNARY, "b": Kind.BIDIRECTIONAL, "u": Kind.CLIENT_STREAM, "d": Kind.SERVER_STREAM}}


def heard(data, portion):
    """What both roles make of the bytes: (events, frames sent, whether the mux gave up)."""
    mux, server, client = MuxDecoder(), ServerConnection(METHODS), ClientConnection()
    for kind, method in ((Kind.UNARY, "m"), (Kind.BIDIRECTIONAL, "b"), (Kind.SERVER_STREAM, "d")):
        client.start_call(CallHead("s", method, b"", 0), kind)
    events, sent = [], []
    for at in range(0, len(data), portion):
        mux.receive_data(data[at : at + portion])
        try:
            while (chunk := mux.next_chunk()) is not None:
                core = server if chunk[0] == 1 else client
                core.receive_data(chunk[1])
                while (event := core.next_event()) is not None:
                    events.append((chunk[0], event))
                    if isinstance(event, CallStarted):
                        messages(event.head.payload)
                sent.extend((chunk[0], frame) for frame in core.frames_to_send())
        except RemoteProtocolError:
            return repr((events, sent, True))
        assert mux.buffered_bytes < 16
        assert max(server.buffered_bytes, client.buffered_bytes) <= MAX_DATA_BYTES + 10
    return repr((events, sent, False))


def messages(payload):
    """A payload as the NRI messages with the most in them, and as a list of containers that nobody decoded."""
    session = Session()
    session.state = State.CONFIGURED
    try:
        for encoded in (session.synchronized_bytes(payload) or ((), ()))[1]:
            repr(container_from_bytes(encoded, Allowance()))
    except (ValueError, RemoteProtocolError):
        pass
    try:
        request = nri_pb2.UpdateContainerRequest.FromString(payload)
    except DecodeError:
        return
    repr((pod_from_message(request.pod), container_from_message(request.container)))
    resources_from_message(request.linux_resources)


def one_input(data):
    """The entry point of atheris."""
    messages(data)
    assert heard(data, max(1, len(data))) == heard(data, 3)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
