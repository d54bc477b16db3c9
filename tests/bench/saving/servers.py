"""The three measured programs: `servers.py kv|web MIB SOCKET`, or `servers.py compile MIB SECONDS`.

kv       a key-value server with 1000-byte records; its clients ask for few keys often and for most hardly ever
web      an HTTP server with a warm cache of rendered pages, of which a handful are wanted
compile  a build: one short-lived process after the other compiles modules of the standard library, and the driver
         keeps all sources it has read, as build servers do

Each prints "ready" once it is warm; `compile` prints the seconds of each unit of work from then on.
"""

from __future__ import annotations

import http.server
import random
import selectors
import socket
import socketserver
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

RECORD_BYTES = 1000
PAGE_BYTES = 16 << 10
MODULES_PER_UNIT = 6
_FIELDS = b'{"id":%010d,"kind":"session","state":"open","flags":["a","b","c"],"seen":"2024-05-01T12:00:00Z","data":"'


def record(number: int, size: int, source: random.Random) -> bytes:
    """Text as programs keep it: two fifths of it random, the rest the same in every record."""
    head = _FIELDS % number
    body = source.randbytes(size // 5).hex().encode()
    return (head + body + head * (size // len(head)))[:size]


def records(mib: int, size: int) -> list[bytes]:
    """As many as fit."""
    source = random.Random(1)
    return [record(number, size, source) for number in range((mib << 20) // size)]


def serve_kv(mib: int, path: str) -> None:
    """A line with a number in, a line with the length and the record out."""
    table = dict(enumerate(records(mib, RECORD_BYTES)))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    chooser = selectors.DefaultSelector()
    chooser.register(listener, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in chooser.select():
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            if connection is listener:
                chooser.register(listener.accept()[0], selectors.EVENT_READ)
                continue
            try:
                line = connection.recv(64)
            except ConnectionResetError:
                line = b""
            if not line:
                chooser.unregister(connection)
                connection.close()
                continue
            found = table[int(line) % len(table)]
            connection.sendall(b"%d\n" % len(found) + found)


def serve_web(mib: int, path: str) -> None:
    """GET /NUMBER: a page of the cache."""
    cache = records(mib, PAGE_BYTES)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one write per answer

        def do_GET(self) -> None:
            page = cache[int(self.path[1:]) % len(cache)]
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

        def address_string(self) -> str:
            return "local"

    with socketserver.UnixStreamServer(path, Handler) as server:
        print("ready", flush=True)
        server.serve_forever()


_COMPILE = "import sys\nfor name in sys.argv[1:]:\n    compile(open(name, 'rb').read(), name, 'exec', optimize=2)\n"


def build(mib: int, seconds: float) -> None:
    """Compile all modules over and over."""
    files = [str(path) for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    held = records(mib, RECORD_BYTES)  # the driver's own: what was read and may be wanted again
    units = [files[first : first + MODULES_PER_UNIT] for first in range(0, len(files), MODULES_PER_UNIT)]
    print("ready", flush=True)
    end_s = time.monotonic() + seconds
    while held and time.monotonic() < end_s:
        for unit in units:
            began_s = time.monotonic()
            subprocess.run([sys.executable, "-S", "-c", _COMPILE, *unit], check=False, stderr=subprocess.DEVNULL)
            print(time.monotonic() - began_s, flush=True)


if __name__ == "__main__":
    kind, size_mib, argument = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if kind == "compile":
        build(size_mib, float(argument))
    else:
        {"kv": serve_kv, "web": serve_web}[kind](size_mib, argument)
