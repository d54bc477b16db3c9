"""Kernel headers for bcc: the running kernel's, or those of another version that the distribution installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

from memtier_engine.errors import Unavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.trackers.bpf import loaders

VARIABLE = "BCC_KERNEL_SOURCE"


def source_for_bcc(folder: Path) -> Path | None:
    """What to put into `VARIABLE`; None: nothing, bcc finds the running kernel's headers by itself.

    Args:
        folder: for links, if it takes any.
    Raises:
        Unavailable: no bcc, or no headers of any version.
    """
    loaders.import_bcc()
    try:
        loaders.need("bcc", Host())
        return None
    except Unavailable as failure:
        if "kernel headers" not in failure.message:
            raise
    builds = sorted(Path("/usr/src").glob("linux-headers-*-amd64"))
    if not builds:
        raise Unavailable("bcc needs kernel headers of any version", hint="apt install linux-headers-amd64")
    common = Path(str(builds[-1]).removesuffix("-amd64") + "-common")
    tree = folder / "headers"  # Debian splits them in two; the build's own files win
    tree.mkdir()
    for source in (common, builds[-1]):
        subprocess.run(["cp", "-asf", source / "include", source / "arch", tree], check=True)
    return tree
