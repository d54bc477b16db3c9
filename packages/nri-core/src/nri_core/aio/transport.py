"""Sockets: connecting to a runtime, or taking the one it gave us; the trunk with its two connections."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Callable

from nri_core.errors import ConnectError, ConnectionLost, NriError, RemoteProtocolError
from nri_core.mux import MuxDecoder, wrap

DEFAULT_SOCKET = "/var/run/nri/nri.sock"
SOCKET_VARIABLE = "NRI_PLUGIN_SOCKET"
MAX_UNSENT_BYTES = 64 << 20
"""A peer that does not read is given up when so much waits for it."""

Feed = Callable[[bytes], None]

_HINTS = {
    errno.ENOENT: "is the runtime running, with NRI on? containerd 1.7: [plugins.'io.containerd.nri.v1.nri'] "
    "disable = false",
    errno.ECONNREFUSED: "nobody listens there: the runtime has stopped, or left an old socket behind",
    errno.EACCES: "run as root: the runtime gives the socket's directory to root only",
    errno.EPERM: "run as root: the runtime gives the socket's directory to root only",
    errno.ENOTSOCK: "give the path of the runtime's NRI socket",
}


async def connect(path: str | os.PathLike[str]) -> socket.socket:
    """A connected, non-blocking socket.

    Raises:
        ConnectError: says which path, why, and what to do.
    """
    name = os.fspath(path)
    try:
        if not stat.S_ISSOCK(os.stat(name).st_mode):  # one stat of a local file
            raise ConnectError(f"{name} is not a socket", hint=_HINTS[errno.ENOTSOCK])
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            await asyncio.get_running_loop().sock_connect(made, name)
        except BaseException:
            made.close()
            raise
    except OSError as error:
        raise ConnectError(f"{name}: {error.strerror or error}", hint=_HINTS.get(error.errno or 0)) from None
    return made


def inherited() -> socket.socket | None:
    """The socket that a runtime passed to a pre-launched plugin; None if there is none.

    It is closed on exec from now on: children must not hold the trunk open.

    Raises:
        ConnectError: NRI_PLUGIN_SOCKET is set, but is no socket.
    """
    text = os.environ.get(SOCKET_VARIABLE)
    if text is None:
        return None
    try:
        made = socket.socket(fileno=int(text))
        made.set_inheritable(False)
    except (ValueError, OSError) as error:
        raise ConnectError(
            f"{SOCKET_VARIABLE}={text!r} is no open socket: {error}", hint="only a runtime should set it"
        ) from None
    made.setblocking(False)
    return made


class Wire(asyncio.Protocol):
    """A stream socket: bytes in go to `feed`, frames out are written whole."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._transport: asyncio.Transport | None = None
        self._waiting = bytearray()  # asyncio keeps an object for each write: much for the small ones
        self._paused = False
        self.closed: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def over(cls, sock: socket.socket, feed: Feed) -> Wire:
        """Take over a connected socket."""
        _, wire = await asyncio.get_running_loop().create_connection(lambda: cls(feed), sock=sock)
        return wire

    def send(self, frame: bytes) -> None:
        """Write one frame; dropped when the connection has ended."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._paused:
            self._waiting += frame
        else:
            transport.write(frame)
        if len(self._waiting) + transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self.close(RemoteProtocolError(f"the peer leaves more than {MAX_UNSENT_BYTES} bytes unread"))

    def close(self, error: BaseException | None = None) -> None:
        """End the connection; what was written is still delivered unless there is an error."""
        if error is not None and not self.closed.done():
            self.closed.set_result(error)
        if self._transport is not None and not self._transport.is_closing():
            if error is None:
                self._transport.write(bytes(self._waiting))
                self._transport.close()
            else:
                self._transport.abort()
        self._waiting.clear()

    async def wait_closed(self) -> BaseException | None:
        """Wait for the end; None: the peer closed in an orderly way."""
        return await asyncio.shield(self.closed)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def pause_writing(self) -> None:
        """Called by asyncio: the peer does not read for the moment."""
        self._paused = True

    def resume_writing(self) -> None:
        """Called by asyncio."""
        self._paused = False
        if self._transport is not None and self._waiting:
            data = bytes(self._waiting)
            self._waiting.clear()
            self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        try:
            self._feed(data)
        except RemoteProtocolError as error:
            self.close(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        if not self.closed.done():
            self.closed.set_result(exc)


class Trunk:
    """A socket with the mux over it."""

    def __init__(self) -> None:
        self._decoder = MuxDecoder()
        self._feeds: dict[int, Feed] = {}
        self._wire: Wire | None = None

    def attach(self, connection: int, feed: Feed) -> Callable[[bytes], None]:
        """Open a connection: `feed` gets its bytes; the result sends one ttrpc frame on it."""
        self._feeds[connection] = feed

        def send(frame: bytes) -> None:
            if self._wire is not None:
                self._wire.send(wrap(connection, frame))

        return send

    async def start(self, sock: socket.socket) -> None:
        """Begin reading; all connections must be attached before."""
        self._wire = await Wire.over(sock, self._receive)

    def close(self, error: NriError | None = None) -> None:
        """End the trunk and all its connections; `error` is what `wait_closed` gives then."""
        if self._wire is not None:
            self._wire.close(error)

    async def wait_closed(self) -> NriError:
        """Wait for the end and say why it came."""
        assert self._wire is not None
        error = await self._wire.wait_closed()
        if isinstance(error, NriError):
            return error
        return ConnectionLost(f"the connection broke: {error}" if error else "the runtime closed the connection")

    def _receive(self, data: bytes) -> None:
        self._decoder.receive_data(data)
        # What is for one connection is handed over together: a portion can be 29 000 frames of one byte.
        current, chunks = 0, list[bytes]()
        while (found := self._decoder.next_chunk()) is not None:
            if found[0] != current:
                self._feed(current, chunks)
                current, chunks = found[0], []
            chunks.append(found[1])
        self._feed(current, chunks)

    def _feed(self, connection: int, chunks: list[bytes]) -> None:
        feed = self._feeds.get(connection)
        if feed is not None and chunks:
            feed(chunks[0] if len(chunks) == 1 else b"".join(chunks))
