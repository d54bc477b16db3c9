"""The text of a file of /proc piece by piece in, all of it out, without the length that a process can give its lines.

Whoever is looked at decides how long some of them are: 65 530 mappings of a file whose path is 4 KiB of newlines, each
written as \\012, make a /proc/PID/maps of 1 GB; an argument area set by prctl(PR_SET_MM_MAP) makes a command line of
terabytes.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable

from memtier_engine.errors import KernelCallError

STEP_BYTES = 1 << 20
"""Less is taken as it is."""
LINE_BYTES = 128
"""Of longer lines so much stays, where the mean is above it: a mapping up to the first 55 bytes of its name."""
DROPPED_BYTES_MOST = 128 << 20
"""Reading so much more takes 0.3 s: it is not worth it."""

_LONG = re.compile(rb"^([^\n]{%d})[^\n]+" % LINE_BYTES, re.M)


def gathered(parts: Iterable[bytes], what: str) -> bytes:
    """All `parts` in one, of `what`.

    Raises:
        KernelCallError: EFBIG: more than `DROPPED_BYTES_MOST` of it would have to be dropped.
    """
    done: list[bytes] = []
    fresh: list[bytes] = []
    size = dropped = 0
    for part in parts:
        fresh.append(part)
        size += len(part)
        if size >= STEP_BYTES:
            text = b"".join(fresh)
            short = _shortened(text)
            dropped += len(text) - len(short)
            if dropped > DROPPED_BYTES_MOST:
                raise KernelCallError(f"read {what}: more than {DROPPED_BYTES_MOST >> 20} MiB of names", errno.EFBIG)
            whole, newline, rest = short.rpartition(b"\n")
            done.append(whole + newline)
            fresh, size = [rest], len(rest)
    if not done:
        return fresh[0] if len(fresh) == 1 else b"".join(fresh)
    return b"".join((*done, _shortened(b"".join(fresh))))


def _shortened(text: bytes) -> bytes:
    return text if (text.count(b"\n") + 1) * LINE_BYTES >= len(text) else _LONG.sub(rb"\1", text)
