"""The options this kernel was built with, where it or its distribution says so."""

from __future__ import annotations

import re

from memtier_engine.errors import KernelCallError
from memtier_engine.hostfs.host import Host

_SET = re.compile(r"^(CONFIG_\w+)=(.*)$", re.M)


class KernelConfig:
    """CONFIG_ options; `known` is False where nobody tells."""

    def __init__(self, options: dict[str, str] | None, source: str | None) -> None:
        """`options`: those that are set, by name; None: not known."""
        self._options = options
        self.source = source
        self.known = options is not None

    def has(self, option: str) -> bool | None:
        """Whether `option` is set (y or m); None: not known."""
        return None if self._options is None else self._options.get(option, "n") in ("y", "m")

    def is_module(self, option: str) -> bool:
        """Whether `option` is known to be built as a module."""
        return (self._options or {}).get(option) == "m"

    def missing(self, *options: str) -> str:
        """Words for a person: which of `options` this kernel lacks, or (not known) needs."""
        absent = [option for option in options if self.has(option) is False]
        if absent:
            return f"the kernel is built without {', '.join(absent)} ({self.source})"
        if not self.known:
            return f"the kernel lacks it; {', '.join(options)} would be needed"
        return "the kernel does not offer it"


def read_kernel_config(host: Host) -> KernelConfig:
    """From /proc/config.gz (CONFIG_IKCONFIG_PROC), or the distribution's file for the running release."""
    try:
        release = host.read_text(host.path("proc/sys/kernel/osrelease")).strip()
    except KernelCallError:
        release = ""
    names = ["proc/config.gz"]
    if release and "/" not in release:
        names += [
            f"boot/config-{release}",
            f"lib/modules/{release}/config",
            f"lib/modules/{release}/build/.config",
        ]
    for name in names:
        path = host.path(name)
        try:
            data = host.read_bytes(path)
            text = (_unpacked(data) if name.endswith(".gz") else data).decode("utf-8", "replace")
        except (KernelCallError, OSError, EOFError):
            continue
        return KernelConfig(dict(_SET.findall(text)), host.kernel_file(path))
    return KernelConfig(None, None)


def _unpacked(data: bytes) -> bytes:
    import gzip

    return gzip.decompress(data)
