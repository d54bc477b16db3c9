"""What asks the servers: `clients.py kv|web SOCKET RATE KEYS`. Prints the seconds of each answer, a line each.

kv   one key in 128 is popular, by rank ** -0.8 among these, spread all over the key space; each 2000th request is
     for any key
web  five pages in turn, and each 1000th request one of any
"""

from __future__ import annotations

import http.client
import itertools
import random
import socket
import sys
import time
from bisect import bisect
from collections.abc import Callable, Iterator

POPULAR_SHARE = 1 / 128
SKEW = 0.8
ANY_KEY_EVERY = 2000
PAGES_WANTED = 5
ANY_PAGE_EVERY = 1000


def skewed_keys(keys: int, source: random.Random) -> Iterator[int]:
    """Keys without end."""
    popular = source.sample(range(keys), max(1, int(keys * POPULAR_SHARE)))
    weights = list(itertools.accumulate((rank + 1) ** -SKEW for rank in range(len(popular))))
    for number in itertools.count(1):
        if number % ANY_KEY_EVERY == 0:
            yield source.randrange(keys)
        else:
            yield popular[min(bisect(weights, source.random() * weights[-1]), len(popular) - 1)]


def web_pages(pages: int, source: random.Random) -> Iterator[int]:
    """Pages without end."""
    for number in itertools.count(1):
        yield source.randrange(pages) if number % ANY_PAGE_EVERY == 0 else number % PAGES_WANTED * 97


def kv(path: str) -> Callable[[int], None]:
    """Asks for one key."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    reader = connection.makefile("rb")

    def ask(key: int) -> None:
        connection.sendall(b"%d\n" % key)
        size = int(reader.readline())
        if len(reader.read(size)) != size:
            raise ConnectionError("the server went away in the middle of an answer")

    return ask


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def web(path: str) -> Callable[[int], None]:
    """Asks for one page over a connection that stays open."""
    connection = _Connection(path)

    def ask(page: int) -> None:
        connection.request("GET", f"/{page}")
        answer = connection.getresponse()
        if answer.status != 200 or not answer.read():
            raise ConnectionError(f"answer {answer.status}")

    return ask


def main(kind: str, path: str, rate: float, keys: int) -> None:
    """Ask `rate` times per second until killed."""
    source = random.Random(7)
    ask, wanted = (kv(path), skewed_keys(keys, source)) if kind == "kv" else (web(path), web_pages(keys, source))
    due_s = time.monotonic()
    for key in wanted:
        due_s = max(due_s + 1 / rate, time.monotonic() - 1.0)  # after a long stall, no burst of more than a second
        time.sleep(max(0.0, due_s - time.monotonic()))
        began_s = time.monotonic()
        ask(key)
        print(time.monotonic() - began_s, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
