"""Memory that a daemon does not need any more goes back to the system: it lives for months, its engines come and go.

glibc raises the size from which it maps blocks on their own each time such a block is freed, up to 32 MiB; from then
on the arrays of large scans come from its arenas, where small blocks between them keep them from being given back.
Under churn that took some 20 MiB more than was in use. Other C libraries do without.
"""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

MMAP_THRESHOLD_BYTES = 256 << 10
ARENAS_MAX = 2
# Source: malloc.h
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_MADV_DONTNEED = 4
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ([r-][w-][x-][ps]) [0-9a-f]+ [0-9a-f:]+ (\d+)")


def settle() -> None:
    """At the start, before threads: a fixed threshold, few arenas, and what start-up left is collected."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        libc.mallopt(_M_ARENA_MAX, ARENAS_MAX)
    gc.collect()
    gc.freeze()  # modules and classes live as long as the program: no collection needs to look at them again


def release() -> None:
    """Now and then: give back free pages within the arenas. Takes about a millisecond, without Python's lock."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def unmap_idle_code() -> None:
    """Once, when all is imported: let go of the pages of programs and libraries, which come back as they are used.

    Most of what is mapped of numpy, its linear algebra, Python and libc was needed while they were loaded. The pages
    stay in the page cache as long as there is room, so one that is used again costs a minor fault. Mappings that
    anybody has written to (relocations, a debugger) are left alone: nothing would bring that back. For the same reason
    no other thread may load a library meanwhile: before engines are started.
    """
    libc = ctypes.CDLL(None)
    try:
        lines = Path("/proc/self/smaps").read_text(errors="replace").splitlines()
    except OSError:
        return
    code: re.Match[str] | None = None
    for line in lines:
        if mapping := _MAPPING.match(line):
            code = mapping if mapping[3] in ("r-xp", "r--p") and mapping[4] != "0" else None
        elif code is not None and line.startswith("Anonymous:") and line.split()[1] == "0":
            start, end = int(code[1], 16), int(code[2], 16)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
