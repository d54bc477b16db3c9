"""What the checks of `probe` share: their answer, and a few pages of this process to try things on."""

from __future__ import annotations

import ctypes
import errno
import mmap
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Self

from memtier_engine.abi.constants import Capability
from memtier_engine.errors import KernelCallError
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.kernel_config import KernelConfig, read_kernel_config
from memtier_engine.hostfs.proc import effective_capabilities
from memtier_engine.model import PAGE_BYTES

TRIAL_PAGES = 64
"""More than the per-CPU batches (31) in which new pages wait before they join an LRU list."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing the kernel may offer."""

    name: str
    works: bool
    why: str | None  # it does not
    fix: str | None  # what would give it
    detail: str | None = None  # worth showing when it works


class Failed(Exception):
    """A check's negative answer."""

    def __init__(self, why: str, fix: str | None = None) -> None:
        super().__init__(why)
        self.why = why
        self.fix = fix


class TrialPages:
    """Private anonymous pages of this process, touched, never merged into a huge page."""

    def __init__(self, pages: int = TRIAL_PAGES) -> None:
        """Map and touch them."""
        self.pages = pages
        self._map = mmap.mmap(-1, pages * PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            try:
                self._map.madvise(mmap.MADV_NOHUGEPAGE)
            except OSError:  # a kernel without huge pages
                pass
        anchor = ctypes.c_char.from_buffer(self._map)
        self.start = ctypes.addressof(anchor)
        del anchor
        self.end = self.start + pages * PAGE_BYTES
        self.touch(0, pages)

    def touch(self, first: int, count: int) -> None:
        """Write to `count` pages from page `first` on."""
        for page in range(first, first + count):
            self._map[page * PAGE_BYTES] = 1 + self._map[page * PAGE_BYTES] % 255

    def close(self) -> None:
        """Unmap them."""
        self._map.close()


class Scene:
    """The machine, this process in it, and how to explain a refusal."""

    def __init__(self, host: Host) -> None:
        """Nothing is read yet."""
        self.host = host
        self.pid = host.own_pid
        self.trial = TrialPages()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.trial.close()

    @cached_property
    def config(self) -> KernelConfig:
        """The kernel's options."""
        return read_kernel_config(self.host)

    @cached_property
    def capabilities(self) -> int | None:
        """CapEff of this process; None where /proc does not say."""
        try:
            return effective_capabilities(self.host)
        except KernelCallError:
            return None

    def lacks(self, capability: Capability) -> bool:
        """Whether this process is known not to have `capability`."""
        return self.capabilities is not None and not self.capabilities >> capability & 1

    def need_file(self, *names: str, options: tuple[str, ...], fix: str | None = None) -> None:
        """Raise `Failed` unless the file is there."""
        path = self.host.path(*names)
        if not path.exists():
            why = f"{self.host.kernel_file(path)} does not exist: {self.config.missing(*options)}"
            raise Failed(why, fix or f"a kernel with {', '.join(f'{option}=y' for option in options)}")

    def refused(self, error: KernelCallError, *capabilities: Capability, fix: str | None = None) -> Failed:
        """`error` with what would have allowed it."""
        if error.errno not in (errno.EPERM, errno.EACCES):
            return Failed(error.message, fix or error.hint)
        absent = [capability.name for capability in capabilities if self.lacks(capability)]
        if absent:
            return Failed(f"{error.message}: this process lacks {', '.join(absent)}", fix or "run as root")
        wanted = ", ".join(capability.name for capability in capabilities)
        hint = f"allow it in the seccomp profile, or run with {wanted} outside a user namespace"
        return Failed(error.message, fix or hint)
