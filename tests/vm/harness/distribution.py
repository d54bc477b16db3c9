"""The kernel that Debian ships, beside the one we build: what most nodes run, with all that ours leaves out.

Randomized addresses, five-level page tables, kernel lockdown, signed modules. Its drivers are modules, so the initramfs
gets those that the boot needs.
"""

from __future__ import annotations

import lzma
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vm.harness import cpio, host
from vm.harness.cache import Cache, digest
from vm.harness.debian import SUITE, Archive
from vm.harness.errors import VmError

PACKAGE = "linux-image-amd64"
RECIPE = "1"
MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "9p", "9pnet_virtio", "overlay", "ext4", "crc32c_generic")
"""What the guest's init and agent mount and open. crc32c_generic: ext4 asks for it by the name of the algorithm."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Debian's kernel image, and a cpio archive of modules to follow the guest's initramfs."""

    kernel: Path
    modules: Path


def distribution_key() -> str:
    """Cache key: what is asked for. The kernel's version is that of the day it was fetched."""
    return digest(RECIPE, SUITE, PACKAGE, *MODULES)


def ensure_distribution(cache: Cache) -> Distribution:
    """Download the kernel (100 MB) if the cache does not have it.

    Raises: VmError.
    """
    folder = cache.entry("distribution", distribution_key(), _build)
    return Distribution(folder / "vmlinuz", folder / "modules.cpio")


def _build(into: Path) -> None:
    host.say(f"fetching Debian's own kernel: {PACKAGE}")
    log = into / "build.log"
    with tempfile.TemporaryDirectory(prefix="image.", dir=into) as scratch:
        archive = Archive(Path(scratch) / "apt", log)
        files = Path(scratch) / "files"
        files.mkdir()
        version = re.match(r"linux-image-(\S+)", archive.unpack(PACKAGE, files))
        if version is None:
            raise VmError(f"{PACKAGE} depends on no kernel image")
        archive.unpack(version[0], files)
        modules = files / "usr/lib/modules" / version[1]
        (into / "vmlinuz").write_bytes((files / "boot" / f"vmlinuz-{version[1]}").read_bytes())
        (into / "release").write_text(version[1] + "\n")
        entries = [cpio.folder("modules")]
        # depmod is run by the package's script when it is installed, which this is not.
        host.require({"depmod": "kmod"})
        host.run(["depmod", "--basedir", files / "usr", version[1]], log=log)
        builtin = (modules / "modules.builtin").read_text().split()
        needed = load_order((modules / "modules.dep").read_text(), builtin, MODULES)
        for number, name in enumerate(needed):
            data = (modules / name).read_bytes()
            data = lzma.decompress(data) if name.endswith(".xz") else data  # busybox's insmod takes them plain
            entries.append(cpio.Entry(f"modules/{number:02}-{module_name(name)}.ko", 0o100644, data))
        (into / "modules.cpio").write_bytes(cpio.pack(entries))


def module_name(path: str) -> str:
    """The name of a module from its file's path: "kernel/fs/9p/9p.ko.xz" is "9p"."""
    return Path(path).name.partition(".ko")[0].replace("-", "_")


def load_order(dependencies: str, builtin: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Paths of modules, each after those it needs; what is built in is left out.

    Args:
        dependencies: text of modules.dep: "a.ko: b.ko c.ko", where c.ko is to be loaded before b.ko.
    Raises: VmError for a module that is nowhere.
    """
    needs: Mapping[str, tuple[str, list[str]]] = {
        module_name(path): (path, rest.split())
        for path, _, rest in (line.partition(":") for line in dependencies.splitlines())
    }
    inside = {module_name(path) for path in builtin}
    order: list[str] = []
    for name in wanted:
        if name in inside:
            continue
        if name not in needs:
            raise VmError(f"Debian's kernel has no module {name}")
        path, before = needs[name]
        order += [each for each in [*reversed(before), path] if each not in order]
    return order
