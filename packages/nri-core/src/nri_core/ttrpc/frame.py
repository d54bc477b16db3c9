"""ttrpc frames: a 10-byte header and data. Feed bytes, ask for frames; None means "need more".

Source: containerd/ttrpc PROTOCOL.md. Over-long frames are skipped without being stored, so the memory used is
bounded by the limit whatever a header claims.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from nri_core.errors import MessageTooLarge

HEADER = struct.Struct(">IIBB")  # data length, stream id, type, flags
MAX_DATA_BYTES = 4 << 20
"""Largest data of a frame that ttrpc peers accept; the header does not count."""

REQUEST, RESPONSE, DATA = 1, 2, 3
REMOTE_CLOSED, REMOTE_OPEN, NO_DATA = 1, 2, 4
"""Flags: the sender sends no more; will send data; this frame carries no message."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame."""

    stream_id: int
    type: int
    flags: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Oversized:
    """A frame over the limit, whose data is being skipped."""

    stream_id: int
    length: int


def encode_frame(stream_id: int, type_: int, flags: int, data: bytes) -> bytes:
    """The frame's bytes. Raises MessageTooLarge over `MAX_DATA_BYTES`."""
    if len(data) > MAX_DATA_BYTES:
        raise MessageTooLarge(len(data), MAX_DATA_BYTES)
    return HEADER.pack(len(data), stream_id, type_, flags) + data


class FrameDecoder:
    """Takes bytes in any portions and gives frames."""

    def __init__(self, max_data_bytes: int = MAX_DATA_BYTES) -> None:
        """`max_data_bytes`: longer frames are skipped; the buffer never holds more than this and a header."""
        self.max_data_bytes = max_data_bytes
        self._buffer = bytearray()
        self._skip = 0

    @property
    def buffered_bytes(self) -> int:
        """What is held now."""
        return len(self._buffer)

    def receive_data(self, data: bytes) -> None:
        """Bytes from the peer. Call `next_frame` until it gives None before the next portion."""
        if self._skip:
            dropped = min(self._skip, len(data))
            self._skip -= dropped
            data = data[dropped:]
        self._buffer += data

    def next_frame(self) -> Frame | Oversized | None:
        """The next complete frame; an `Oversized` as soon as its header is known."""
        if self._skip:
            dropped = min(self._skip, len(self._buffer))
            del self._buffer[:dropped]
            self._skip -= dropped
        if len(self._buffer) < HEADER.size:
            return None
        length, stream_id, type_, flags = HEADER.unpack_from(self._buffer)
        if length > self.max_data_bytes:
            del self._buffer[: HEADER.size]
            self._skip = length
            return Oversized(stream_id, length)
        end = HEADER.size + length
        if len(self._buffer) < end:
            return None
        with memoryview(self._buffer) as view:
            data = bytes(view[HEADER.size : end])  # of the buffer itself, a slice would be a copy more
        del self._buffer[:end]
        return Frame(stream_id, type_, flags, data)
