"""The guest's disks: an empty swap area made per run; read-only file systems and a scratch one made once."""

from __future__ import annotations

import struct
import uuid
from pathlib import Path

from vm.harness import host
from vm.harness.cache import Cache, digest

PAGE_BYTES = 4096
SCRATCH_MIB = 3072


def make_swap(path: Path, mib: int) -> None:
    """A sparse file with the header of an empty swap area, as mkswap writes it.

    Source: union swap_header in include/linux/swap.h: 1024 bytes of boot block, version, last page,
    count of bad pages, uuid; the magic ends the first page.
    """
    pages = mib * (1 << 20) // PAGE_BYTES
    with path.open("wb") as file:
        file.truncate(pages * PAGE_BYTES)
        file.seek(1024)
        file.write(struct.pack("<III16s", 1, pages - 1, 0, uuid.uuid4().bytes))
        file.seek(PAGE_BYTES - 10)
        file.write(b"SWAPSPACE2")


def ensure_scratch(cache: Cache) -> Path:
    """An empty ext4 image for containerd's state. Runs write to a throw-away overlay (QEMU's snapshot=on)."""

    def build(into: Path) -> None:
        host.require({"mkfs.ext4": "e2fsprogs"})
        image = into / "scratch.img"
        with image.open("wb") as file:
            file.truncate(SCRATCH_MIB << 20)
        features = "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0"
        host.run(["mkfs.ext4", "-q", "-F", "-E", features, "-m", "0", image], log=into / "build.log")

    return cache.entry("scratch", digest("1", str(SCRATCH_MIB)), build) / "scratch.img"


def ensure_root_image(cache: Cache, rootfs: Path) -> Path:
    """The unpacked root filesystem as a read-only ext4 image."""

    def build(into: Path) -> None:
        pack_ext4(rootfs, into / "root.img", into / "build.log")

    return cache.entry("rootimage", rootfs.parent.name.removeprefix("rootfs-"), build) / "root.img"


def pack_ext4(folder: Path, image: Path, log: Path) -> None:
    """Make an ext4 image, with little room to spare and no journal, of a folder and all that is in it."""
    host.require({"mkfs.ext4": "e2fsprogs"})
    inodes, blocks = 0, 0
    for path in [folder, *folder.rglob("*")]:
        inodes += 1
        blocks += 1 + path.lstat().st_size // PAGE_BYTES
    size_mib = 16 + (blocks + blocks // 10) * PAGE_BYTES // (1 << 20) + inodes * 256 // (1 << 20)
    with image.open("wb") as file:
        file.truncate(size_mib << 20)
    command = ["mkfs.ext4", "-q", "-F", "-b", str(PAGE_BYTES), "-N", str(inodes + 64), "-m", "0"]
    command += ["-O", "^has_journal,^resize_inode", "-E", "root_owner=0:0", "-d", str(folder), str(image)]
    host.run(command, log=log)
