"""A process that maps memory of a kind and touches exactly the pages it is told to."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.model import PAGE_BYTES, ProcessId, Spans, Tracker

KINDS = ("anonymous", "huge", "shared", "file-private", "file-shared")
"""On every machine. "high": anonymous, above 128 TiB, where only five levels of page tables reach. "gigantic": pages of
1 GiB, of which the machine must have set some aside."""

_PROGRAM = """
import ctypes, mmap, os, signal, sys
kind, pages, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
size, block = pages * 4096, 2 << 20
libc = ctypes.CDLL(None, use_errno=True)
if kind == "huge":
    area = mmap.mmap(-1, size + block, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    skip = -ctypes.addressof(ctypes.c_char.from_buffer(area)) % block
    area.madvise(mmap.MADV_HUGEPAGE, skip, size)
elif kind in ("high", "gigantic"):
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_long] * 4
    # MAP_HUGETLB | MAP_HUGE_1GB; an address above 128 TiB is given to those who ask for it.
    hint, flags = (1 << 52, 0) if kind == "high" else (None, 0x40000 | 30 << 26)
    flags |= mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = libc.mmap(hint, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert address != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
    libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.MADV_NOHUGEPAGE)  # refused for hugetlb
    area, skip = memoryview((ctypes.c_char * size).from_address(address)).cast("B"), 0
elif kind == "anonymous":
    area, skip = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0
elif kind == "shared":
    area, skip = mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS), 0
else:
    file = open(path, "w+b")
    file.write(bytes(size))
    file.flush()
    os.fsync(file.fileno())
    flags = mmap.MAP_PRIVATE if kind == "file-private" else mmap.MAP_SHARED
    area, skip = mmap.mmap(file.fileno(), size, flags=flags), 0
if kind not in ("huge", "high", "gigantic"):
    area.madvise(mmap.MADV_NOHUGEPAGE)  # some file systems map 2 MiB of a file at once
address = ctypes.addressof(ctypes.c_char.from_buffer(area)) + skip
print(address, flush=True)
for line in sys.stdin:
    verb, *numbers = line.split()
    if verb == "fork":
        parent, child = os.getpid(), os.fork()
        if child == 0:
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: go with the parent
            if os.getppid() != parent: os._exit(0)  # it was gone before that
            signal.pause()
        print(child, flush=True)
        continue
    if verb == "unmap":
        libc.munmap(ctypes.c_void_p(address + int(numbers[0]) * 4096), ctypes.c_size_t(int(numbers[1]) * 4096))
    elif verb == "hide":
        libc.mprotect(ctypes.c_void_p(address + int(numbers[0]) * 4096), ctypes.c_size_t(int(numbers[1]) * 4096), 0)
    else:
        for number in map(int, numbers):
            at = skip + number * 4096
            if verb == "write":
                area[at] = number & 127 | 1
            else:
                area[at]
    print("done", flush=True)
"""


@dataclass
class Toucher:
    """The process, and where its memory is."""

    popen: subprocess.Popen[str]
    process: ProcessId
    address: int
    pages: int

    @property
    def spans(self) -> Spans:
        return Spans(np.array([self.address], np.uint64), np.array([self.address + self.pages * PAGE_BYTES], np.uint64))

    def ask(self, line: str) -> str:
        """One command; returns when it is done."""
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()
        answer = self.popen.stdout.readline().strip()
        assert answer, "the toucher died"
        return answer

    def read(self, pages: Iterable[int]) -> None:
        self.ask("read " + " ".join(map(str, pages)))

    def write(self, pages: Iterable[int]) -> None:
        self.ask("write " + " ".join(map(str, pages)))


@contextlib.contextmanager
def toucher(kind: str, pages: int, folder: Path, *, command: Sequence[str] = ()) -> Iterator[Toucher]:
    """`command` goes before the interpreter: ("taskset", "-c", "0")."""
    popen = subprocess.Popen(
        [*command, sys.executable, "-c", _PROGRAM, kind, str(pages), str(folder / f"toucher-{kind}")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert popen.stdin is not None
    assert popen.stdout is not None
    try:
        first = popen.stdout.readline()
        assert first, f"no {kind} memory to be had"
        address = int(first)
        yield Toucher(popen, process_id(Host(), popen.pid), address, pages)
    finally:
        popen.kill()
        popen.wait()
        popen.stdin.close()
        popen.stdout.close()


@dataclass
class Window:
    """What a scan saw, over all chunks."""

    accessed: NDArray[np.int64]  # numbers of pages
    written: NDArray[np.int64]
    resident: NDArray[np.int64]


def scan(tracker: Tracker, load: Toucher) -> Window:
    """One scan of the toucher's memory."""
    columns: dict[str, list[NDArray[np.int64]]] = {"accessed": [], "written": [], "resident": []}
    for chunk in (part for seen in tracker.scan(load.process, load.spans) for part in seen.parts()):
        first = (chunk.start - load.address) // PAGE_BYTES
        for name, parts in columns.items():
            found = getattr(chunk, name)
            if found is not None:
                parts.append(np.flatnonzero(found) + first)
    none = [np.zeros(0, np.int64)]
    return Window(*(np.concatenate(columns[name] or none) for name in ("accessed", "written", "resident")))
