"""Writes a cpio archive in the "newc" format, which the kernel unpacks as its initramfs.

Source: Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One member: `mode` with the type bits of stat.h, `device` as (major, minor) for device nodes."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def folder(name: str) -> Entry:
    """A folder everyone may read."""
    return Entry(name, stat.S_IFDIR | 0o755)


def program(name: str, data: bytes) -> Entry:
    """An executable file."""
    return Entry(name, stat.S_IFREG | 0o755, data)


def char_device(name: str, major: int, minor: int) -> Entry:
    """A character device node, for root only."""
    return Entry(name, stat.S_IFCHR | 0o600, device=(major, minor))


def pack(entries: Iterable[Entry]) -> bytes:
    """The archive, uncompressed: unpacking costs more than reading under emulation."""
    out = bytearray()
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], start=1):
        name = entry.name.encode() + b"\0"
        fields = (
            number,  # inode
            entry.mode,
            0,  # uid
            0,  # gid
            1,  # links
            0,  # mtime
            len(entry.data),
            0,  # major and minor of the file system the file came from
            0,
            *entry.device,
            len(name),
            0,  # checksum, not used by this variant
        )
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        out += b"\0" * (-len(out) % 4) + entry.data
        out += b"\0" * (-len(out) % 4)
    return bytes(out)
