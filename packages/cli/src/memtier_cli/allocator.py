"""Memory that is free within a daemon goes back to the system: it lives for months, its engines come and go.

glibc raises the size from which it maps blocks on their own each time such a block is freed, up to 32 MiB; from then
on the arrays of large scans come from its arenas, where small blocks between them keep them from being given back.
Under churn that took some 20 MiB more than was in use. Other C libraries do without.
"""

from __future__ import annotations

import ctypes
import gc

MMAP_THRESHOLD_BYTES = 256 << 10
ARENAS_MAX = 2
# Source: malloc.h
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


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
