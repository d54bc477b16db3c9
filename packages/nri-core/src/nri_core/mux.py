"""The NRI mux: several byte streams over one trunk. No IO.

A frame is an 8-byte header (connection id, length; big-endian) and payload. Source: containerd/nri
pkg/net/multiplex. A Go peer hands one whole mux frame to each read and fails if the frame is larger than the
4096-byte buffer that ttrpc offers there, or, mid-message, than what is missing of the message: hence `wrap`.
"""

from __future__ import annotations

import struct

from nri_core.errors import LocalProtocolError, RemoteProtocolError
from nri_core.ttrpc.frame import HEADER as TTRPC_HEADER

HEADER = struct.Struct(">II")  # connection id, payload length
PLUGIN_SERVICE = 1
"""The plugin serves on this connection."""
RUNTIME_SERVICE = 2
"""The runtime serves on this connection."""

PEER_BUFFER_BYTES = 4096
MAX_PAYLOAD_BYTES = (16 << 20) + 8
"""Runtimes with NRI up to 0.6.1 send frames of up to 16 MiB."""
PEER_QUEUE_FRAMES = 256
"""A Go peer closes the trunk when so many frames of a connection wait unread."""


def wrap(connection: int, message: bytes) -> bytes:
    """One whole ttrpc frame as mux frames that every Go peer can read.

    Up to 4096 bytes: one mux frame. More: the ttrpc header in one, the rest in another. Never two ttrpc frames in
    one mux frame, which can make a Go peer fail or even panic.
    """
    if connection <= 0:
        raise LocalProtocolError(f"mux connection {connection} is reserved")
    if not message:
        raise LocalProtocolError("an empty mux frame must not be sent")
    if len(message) <= PEER_BUFFER_BYTES:
        return HEADER.pack(connection, len(message)) + message
    cut = TTRPC_HEADER.size
    return b"".join(
        (
            HEADER.pack(connection, cut),
            message[:cut],
            HEADER.pack(connection, len(message) - cut),
            message[cut:],
        )
    )


class MuxDecoder:
    """Takes bytes of the trunk and gives those of each connection, without waiting for whole frames."""

    def __init__(self, connections: frozenset[int] = frozenset((PLUGIN_SERVICE, RUNTIME_SERVICE))) -> None:
        """`connections`: open ones; payload of others is dropped."""
        self._open = connections
        self._header = b""
        self._connection = 0
        self._left = 0
        self._data = memoryview(b"")

    @property
    def buffered_bytes(self) -> int:
        """What is held between portions: part of a header at most."""
        return len(self._header) + len(self._data)

    def receive_data(self, data: bytes) -> None:
        """Bytes from the trunk. Call `next_chunk` until it gives None before the next portion."""
        # A view: a portion can hold thousands of small frames, and copying the rest for each would be quadratic.
        self._data = memoryview(bytes(self._data) + data if self._data else data)

    def next_chunk(self) -> tuple[int, bytes] | None:
        """(connection, bytes of it), or None.

        Raises:
            RemoteProtocolError: a frame claims more than `MAX_PAYLOAD_BYTES`.
        """
        while self._data:
            if self._left == 0:
                wanted = HEADER.size - len(self._header)
                self._header += bytes(self._data[:wanted])
                self._data = self._data[wanted:]
                if len(self._header) < HEADER.size:
                    return None
                self._connection, self._left = HEADER.unpack(self._header)
                self._header = b""
                if self._left > MAX_PAYLOAD_BYTES:
                    raise RemoteProtocolError(
                        f"a mux frame of {self._left} bytes on connection {self._connection}; "
                        f"the most is {MAX_PAYLOAD_BYTES}",
                        hint="is the peer an NRI runtime?",
                    )
                continue
            chunk, self._data = self._data[: self._left], self._data[self._left :]
            self._left -= len(chunk)
            if self._connection in self._open:
                return self._connection, bytes(chunk)
        return None
