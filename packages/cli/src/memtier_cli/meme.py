"""Program `memtier-meme`: a memory exerciser with the reference's flags and output.

It allocates byte arrays, touches every page once, then reads or writes parts of them in rounds, one thread per
exerciser. Each array is one anonymous mapping, so nothing but the exercised bytes is ever touched.
Exit status: 0 at the end of -ttl or at Enter, 1 a bad value, 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memtier_cli import standard_files
from memtier_cli.flags import Flag, Parsed
from memtier_cli.front import output_is_full, read_flags
from memtier_engine.errors import ConfigError
from memtier_engine.units import Durations, Sizes

FLAGS = (
    Flag("bc", "number of byte arrays", "int", "1"),
    Flag("bs", "size of each array, SIZE[k|M|G]", "string", "1G"),
    Flag("bcd", "changes of the number of arrays, DELTA/TIME[,...]", "string"),
    Flag("brc", "how many arrays are read", "int", "1"),
    Flag("bwc", "how many arrays are written", "int", "1"),
    Flag("brs", "bytes read in a round", "string", "1G"),
    Flag("bws", "bytes written in a round", "string", "1G"),
    Flag("brsd", "change of the read size each round", "string", "0k"),
    Flag("bwsd", "change of the write size each round", "string", "0k"),
    Flag("bro", "offset of the read area", "string", "0M"),
    Flag("bwo", "offset of the write area", "string", "0M"),
    Flag("brod", "change of the read offset each round", "string", "0k"),
    Flag("bwod", "change of the write offset each round", "string", "0k"),
    Flag("bri", "least duration of a read round, TIME[ns|us|ms|s|m|h]", "string", "0"),
    Flag("bwi", "least duration of a write round", "string", "0"),
    Flag("brp", "portions of the read area, interleaved byte by byte", "int", "1"),
    Flag("bwp", "portions of the write area, interleaved byte by byte", "int", "1"),
    Flag("p", "print the average seconds per round every TIME", "string", "0"),
    Flag("ttl", "run for TIME; empty: until Enter", "string"),
    Flag("version", "print the version and exit"),
)
_libc = ctypes.CDLL(None, use_errno=True)
_SIZES = Sizes(
    hint="write an integer and k, M or G, such as 64M",
    prefixes="kMG",
    any_case=False,
    i=False,
    b=False,
    signed=True,
    whole=True,
    blanks=False,
)
_TIMES = Durations(hint="write an integer and ns, us, ms, s, m or h, such as 20s", bare="ns", days=False, whole=True)


def say(text: str) -> None:
    """A line at once and as one: print() writes the text and its end apart, and another thread's line gets between."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class BadValue(Exception):
    """A flag's value cannot be used; exit status 1."""


def size_bytes(text: str) -> int:
    """`64M` to bytes. Raises BadValue."""
    try:
        return _SIZES.to_bytes(text)
    except ConfigError as failure:
        raise BadValue(f"invalid size {text!r}: {failure.hint}") from None


def time_ns(text: str) -> int:
    """`20s` to nanoseconds. Raises BadValue."""
    try:
        return _TIMES.nanoseconds(text)
    except ConfigError as failure:
        raise BadValue(f"invalid time {text!r}: {failure.hint}") from None


def changes(text: str) -> list[tuple[int, int]]:
    """`1/20s,-6/2m` to [(delta, time in ns)]. Raises BadValue."""
    found = []
    for part in text.split(",") if text else []:
        delta, slash, when = part.partition("/")
        if not slash or not re.fullmatch(r"[+-]?[0-9]+", delta):
            raise BadValue(f"invalid change {part!r}: write DELTA/TIME, such as 1/20s")
        found.append((int(delta), time_ns(when)))
    return found


class ByteArray:
    """One anonymous private mapping, every page touched once."""

    def __init__(self, size: int) -> None:
        if size <= 0:
            raise BadValue(f"invalid size {size} of an array: it must be more than 0")
        # Guard pages at both ends: the kernel would make one area of neighbours.
        held = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, held + 2 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.address = start + mmap.PAGESIZE
        for guard in (start, self.address + held):
            if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(mmap.PAGESIZE), ctypes.c_int(0)) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.bytes: NDArray[np.uint8] = np.frombuffer(self.memory, np.uint8, size, mmap.PAGESIZE)
        self.bytes[:: mmap.PAGESIZE] = 1

    def describe(self) -> str:
        """`START-LAST (SIZE bytes)`, LAST being the last byte's own address."""
        return self.describe_part(0, len(self.bytes))

    def describe_part(self, offset: int, size: int) -> str:
        """The same for a part."""
        return f"{self.address + offset:x}-{self.address + offset + size - 1:x} ({size} bytes)"


@dataclass
class Exerciser:
    """Reads or writes part of an array, round after round."""

    number: int
    kind: str
    array: ByteArray
    size: int
    size_delta: int
    offset: int
    offset_delta: int
    interval_ns: int
    portions: int
    rounds: int = 0
    busy_s: float = 0.0
    value: int = 0

    def clamp(self) -> None:
        """Keep the area within the array, as the reference does: one byte short of its end."""
        total = len(self.array.bytes)
        self.offset %= total
        if self.size >= total - self.offset:
            self.size = total - self.offset - 1
        self.size = max(0, self.size)

    def start_text(self) -> str:
        """The line that announces it."""
        self.clamp()
        return f"start exerciser {self.number}: {self.kind} {self.array.describe_part(self.offset, self.size)}"

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set."""
        order = list(range(self.portions))
        if self.portions > 1:
            random.shuffle(order)
            say(f"portion order: [{' '.join(map(str, order))}]")
        while not stop.is_set():
            began_ns = time.monotonic_ns()
            self.clamp()
            area = self.array.bytes[self.offset : self.offset + self.size]
            for portion in order:
                self.exercise(area[portion :: self.portions])
            self.rounds += 1
            self.busy_s += (time.monotonic_ns() - began_ns) / 1e9
            left_ns = self.interval_ns - (time.monotonic_ns() - began_ns)
            if left_ns > 0:
                stop.wait(left_ns / 1e9)
            if self.interval_ns >= 10**6:
                part = self.array.describe_part(self.offset, self.size).split(" ")[0]
                say(f"wake exerciser {self.number}: round {self.rounds} range {part}")
            self.size += self.size_delta
            self.offset += self.offset_delta

    def exercise(self, area: NDArray[np.uint8]) -> None:
        """Touch every byte of `area`."""
        if self.kind == "read":
            self.value = int(area.sum(dtype=np.uint64)) if len(area) else 0
        else:
            self.value = (self.value + 1) & 255
            area[:] = self.value


class Meme:
    """The whole program."""

    def __init__(self, flags: Parsed) -> None:
        self.flags = flags
        self.stop = threading.Event()
        self.array_size = size_bytes(self._text("bs"))
        self.period_ns = time_ns(self._text("p"))
        self.ttl_ns = time_ns(self._text("ttl")) if self._text("ttl") else None
        self.reallocations = changes(self._text("bcd"))
        self.readers = self._exercisers("r")
        self.writers = self._exercisers("w")
        self.arrays: list[ByteArray] = []
        self.lock = threading.Lock()

    def run(self) -> None:
        """Work until the end of -ttl, or Enter."""
        count = self._count("bc")
        say(f"memory exerciser\npid: {os.getpid()}\ncreating {count} byte arrays")
        for _ in range(count):
            self._allocate()
        exercisers: list[Exerciser] = []
        for build, wanted in ((self.readers, self._count("brc")), (self.writers, self._count("bwc"))):
            for array in self.arrays[:wanted]:
                exerciser = build(len(exercisers), array)
                say(exerciser.start_text())
                exercisers.append(exerciser)
        for exerciser in exercisers:
            self._thread(lambda exerciser=exerciser: exerciser.run(self.stop))  # type: ignore[misc]
        if self.period_ns:
            self._thread(lambda: self._report(exercisers))
        if self.reallocations:
            say("creating byte array reallocators")
        for delta, period_ns in self.reallocations:
            say(f"    allocate {delta} arrays (every {period_ns / 1e9:g} s)")
            self._thread(lambda delta=delta, period_ns=period_ns: self._reallocate(delta, period_ns))  # type: ignore[misc]
        if self.ttl_ns is None:
            say("press enter to exit...")
            sys.stdin.readline()
        else:
            self.stop.wait(self.ttl_ns / 1e9)
        self.stop.set()

    def _text(self, name: str) -> str:
        return self.flags.text(name, self._default(name))

    @staticmethod
    def _default(name: str) -> str:
        return next(flag.default for flag in FLAGS if flag.name == name)

    def _count(self, name: str) -> int:
        count = self.flags.integer(name, int(self._default(name)))
        if count < 0:
            raise BadValue(f"invalid value {count} for -{name}: write a count of 0 or more")
        return count

    def _exercisers(self, letter: str) -> Callable[[int, ByteArray], Exerciser]:
        prefix, kind = f"b{letter}", "read" if letter == "r" else "write"
        size, size_delta = size_bytes(self._text(f"{prefix}s")), size_bytes(self._text(f"{prefix}sd"))
        offset, offset_delta = size_bytes(self._text(f"{prefix}o")), size_bytes(self._text(f"{prefix}od"))
        interval_ns, portions = time_ns(self._text(f"{prefix}i")), max(1, self._count(f"{prefix}p"))
        self._count(f"{prefix}c")

        def build(number: int, array: ByteArray) -> Exerciser:
            return Exerciser(number, kind, array, size, size_delta, offset, offset_delta, interval_ns, portions)

        return build

    def _thread(self, work: Callable[[], None]) -> None:
        threading.Thread(target=work, daemon=True).start()

    def _allocate(self) -> None:
        array = ByteArray(self.array_size)
        with self.lock:
            self.arrays.append(array)
        say(f"    array: {array.describe()}")

    def _reallocate(self, delta: int, period_ns: int) -> None:
        while not self.stop.wait(period_ns / 1e9):
            for _ in range(abs(delta)):
                if delta > 0:
                    self._allocate()
                    continue
                with self.lock:
                    if self.arrays:
                        say(f"    free array {len(self.arrays) - 1}: {self.arrays.pop().describe()}")

    def _report(self, exercisers: list[Exerciser]) -> None:
        while not self.stop.wait(self.period_ns / 1e9):
            for exerciser in exercisers:
                speed = exerciser.busy_s / exerciser.rounds if exerciser.rounds else 0.0
                say(f"avgspeed exerciser {exerciser.number}: {speed:.6f} s/round")


def main() -> int:
    """Entry point of `memtier-meme`; returns the exit status."""
    standard_files.occupy()
    program = Path(sys.argv[0]).name
    flags = read_flags(program, FLAGS)
    if isinstance(flags, int):
        return flags
    try:
        Meme(flags).run()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nobody reads on: as a program that SIGPIPE ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except BadValue as error:
        return _fail(program, str(error))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            output_is_full(program, error)
        return _fail(program, f"-bs: {(error.strerror or str(error)).lower()}")
    return 0


def _fail(program: str, message: str) -> int:
    print(f"{program}: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
