"""All parts of a VM, ready to boot: what is cached is used, what is missing is built."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vm.harness import accel, host, kernel, layer, rootfs
from vm.harness.cache import Cache, default_root
from vm.harness.disks import ensure_root_image, ensure_scratch
from vm.harness.distribution import ensure_distribution
from vm.harness.errors import VmError

REPO = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Files and programs that a run needs. `rootfs`, `layer` and `scratch` are disk images."""

    repo: Path
    kernel: Path
    initramfs: Path
    rootfs: Path
    layer: Path
    scratch: Path
    qemu: str
    accelerator: str


def default_seed(repo: Path, environ: Mapping[str, str] = os.environ) -> Path | None:
    """$MEMTIER_VM_SEED, else shared/vm beside the checkout: a folder that may hold a ready kernel."""
    if chosen := environ.get("MEMTIER_VM_SEED"):
        return Path(chosen)
    beside = repo.parent / "shared/vm"
    return beside if beside.is_dir() else None


def prepare(repo: Path = REPO, cache: Cache | None = None, seed: Path | None = None) -> Parts:
    """Everything for a boot: a fraction of a second when nothing is missing, many minutes at the first time.

    Raises: VmError.
    """
    if platform.machine() != "x86_64":
        raise VmError(f"the test VM is x86-64 only, this host is {platform.machine()}")
    cache = cache or Cache(default_root())
    seed = seed or default_seed(repo)
    host.require({"qemu-system-x86_64": "qemu-system-x86", "setpriv": "util-linux"})
    qemu = host.which("qemu-system-x86_64")
    assert qemu is not None
    root = rootfs.ensure_rootfs(cache)
    image = kernel.ensure_kernel(cache, repo / "tests/vm/kernel.config", seed)
    over = layer.ensure_layer(cache, repo, root)
    return Parts(
        repo=repo,
        kernel=image,
        initramfs=over / "initramfs",
        rootfs=ensure_root_image(cache, root),
        layer=over / "layer.img",
        scratch=ensure_scratch(cache),
        qemu=qemu,
        accelerator=accel.choose(cache, qemu, image, over / "initramfs"),
    )


def with_distribution_kernel(parts: Parts, into: Path, cache: Cache | None = None) -> Parts:
    """The same machine with Debian's own kernel; its initramfs is written into the folder `into`.

    Raises: VmError.
    """
    found = ensure_distribution(cache or Cache(default_root()))
    initramfs = into / "initramfs"
    # The kernel unpacks one archive after the other; each is a multiple of four bytes long.
    initramfs.write_bytes(parts.initramfs.read_bytes() + found.modules.read_bytes())
    return replace(parts, kernel=found.kernel, initramfs=initramfs)
