"""The page-table walk, loaded once per process and shared: asked block addresses in, page table words out."""

from __future__ import annotations

import mmap
import os
import re
import struct
import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from memtier_engine.abi import syscalls
from memtier_engine.closing import Closing
from memtier_engine.errors import MemtierError, TrackerUnavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap, pfns, present
from memtier_engine.model import PAGE_BYTES, PAGE_SHIFT, U64
from memtier_engine.trackers.bpf import paging, rights
from memtier_engine.trackers.bpf.loaders import Loaded, load

MAX_BLOCKS = 160
"""2 MiB blocks in one run; `BLOCKS` in the source."""
_CANDIDATES = 256
_PROGRAMS = ("walk", "locate")
_BPF_PROG_RUN = 10  # include/uapi/linux/bpf.h: BPF_PROG_TEST_RUN, since 5.10 also for raw tracepoints
_TABLE_BYTES = 4096
_BLOCK_WORDS = 3
_TRIAL_PAGES = 8
_PHYSICAL_BITS = re.compile(r"^address sizes\s*: (\d+) bits physical", re.M)
_FLAGS = re.compile(r"^flags\s*:(.*)$", re.M)


class Walk(NamedTuple):
    """What one run of the walk saw."""

    states: U64  # uint64[n]: `paging.STATE_...` of each block
    words: U64  # uint64[n, 512]: one per page, see `paging.fill_blocks`
    other_mmu: bool
    """A KVM guest or a device accesses this memory without a trace in these words."""


class Walker(Closing):
    """Loaded programs and a place for their answers. One caller at a time: `walking()` takes the turn."""

    def __init__(self, host: Host, loader: str = "auto") -> None:
        """Load, find where the kernel maps physical memory, and check the answers against pagemap.

        Raises:
            TrackerUnavailable: it cannot work here, and why.
        """
        self._host = host
        self._turn = threading.Lock()
        self._maps: list[mmap.mmap] = []
        try:
            self.mask, self.top_shift = _paging_of(host)
            self._loaded: Loaded = load(host, _PROGRAMS, loader)
        except MemtierError as failure:
            raise rights.explained(host, failure) from None
        self.loader = self._loaded.loader
        try:
            blocks = self._mapped("blocks", MAX_BLOCKS * _BLOCK_WORDS * 8)
            self._blocks: U64 = blocks[: MAX_BLOCKS * _BLOCK_WORDS].reshape(MAX_BLOCKS, _BLOCK_WORDS)
            tables = self._mapped("tables", MAX_BLOCKS * _TABLE_BYTES)
            self._tables: U64 = tables.reshape(MAX_BLOCKS, paging.BLOCK_PAGES)
            self._walk_fd = self._loaded.program_fd("walk")
            self.base = 0
            self._verify()
        except BaseException as failure:
            self.close()
            if isinstance(failure, MemtierError):
                raise rights.explained(host, failure) from None
            raise

    def _mapped(self, name: str, size: int) -> U64:
        area = mmap.mmap(self._loaded.map_fd(name), -(-size // mmap.PAGESIZE) * mmap.PAGESIZE, mmap.MAP_SHARED)
        self._maps.append(area)
        return np.frombuffer(area, np.uint64)

    def walk(self, pagemap_fd: int, addresses: U64, out: U64 | None = None) -> Walk:
        """Read the page tables of some blocks of one process.

        Args:
            pagemap_fd: its open /proc/PID/pagemap.
            addresses: uint64[n], n at most `MAX_BLOCKS`: 2 MiB aligned, below the kernel's half; `HEAD_ONLY` may be
                added: then the block's words mean nothing if its state is STATE_TABLE.
            out: uint64[>= n, 512] to copy into. None: a new array.
        """
        count = len(addresses)
        if count > MAX_BLOCKS:
            raise ValueError(f"at most {MAX_BLOCKS} blocks a run, got {count}")
        words = np.empty((count, paging.BLOCK_PAGES), np.uint64) if out is None else out[:count]
        wanted = (addresses & np.uint64(paging.HEAD_ONLY)) == 0
        with self._turn:
            self._blocks[:count, 0] = addresses
            self._blocks[:count, 1] = 0
            self._blocks[:count, 2] = paging.STATE_GONE
            _prog_run(self._walk_fd, (pagemap_fd, count, self.base, self.mask, self.top_shift))
            states = self._blocks[:count, 2].copy()
            entries = self._blocks[:count, 1].copy()
            if wanted.all():
                words[...] = self._tables[:count]
            else:
                words[wanted] = self._tables[:count][wanted]
        other_mmu = bool(count and states[0] & np.uint64(paging.OTHER_MMU))
        if other_mmu:
            states[0] -= np.uint64(paging.OTHER_MMU)
        paging.fill_blocks(states, entries, words)
        return Walk(states, words, other_mmu)

    def _verify(self) -> None:
        """Find the direct map by a page of ours with known contents, then compare a walk with pagemap.

        Raises:
            TrackerUnavailable: there is no such place, or pagemap contradicts the walk.
        """
        trial = mmap.mmap(-1, _TRIAL_PAGES * PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        held = np.frombuffer(trial, np.uint64)
        try:
            address = int(held.ctypes.data)
            for page in range(_TRIAL_PAGES):
                trial[page * PAGE_BYTES : page * PAGE_BYTES + 16] = os.urandom(16)
            with Pagemap(self._host, self._host.own_pid) as pagemap:
                frames = self._frames(pagemap, address)
                self.base = self._locate(pagemap.fileno(), int(frames[0]), int(held[0]), int(held[1]))
                at = np.uint64(address)
                block = at & ~np.uint64(paging.BLOCK_BYTES - 1)
                blocks = np.array([block, block + np.uint64(paging.BLOCK_BYTES)], np.uint64)
                words = self.walk(pagemap.fileno(), blocks).words
                first = int(at - block) >> PAGE_SHIFT
                own = words.reshape(-1)[first : first + _TRIAL_PAGES]
                seen = paging.frames(own, self.mask)
                if not (paging.resident(own).all() and paging.accessed(own).all() and (seen == frames).all()):
                    frames = self._frames(pagemap, address)  # migrated meanwhile?
                    if not (seen == frames).all():
                        raise TrackerUnavailable(
                            "the page table walk contradicts pagemap: this kernel's page tables are not understood",
                            hint="use another tracker (`memtier check` lists them)",
                        )
        finally:
            del held
            try:
                trial.close()
            except BufferError:  # an error's traceback still refers to the array
                pass

    def _frames(self, pagemap: Pagemap, address: int) -> U64:
        words = pagemap.read(address, address + _TRIAL_PAGES * PAGE_BYTES)
        frames = pfns(words)
        if not present(words).all() or not frames.any():
            raise rights.lacking(self._host, "pagemap shows no frame numbers", rights.FOR_FRAMES)
        return frames

    def _locate(self, fd: int, frame: int, low: int, high: int) -> int:
        physical = frame << PAGE_SHIFT
        first = 0
        while True:
            _prog_run(self._loaded.program_fd("locate"), (fd, first, physical, low, high))
            directory, base, found = (int(word) for word in self._blocks[0])
            if not directory:
                raise TrackerUnavailable(
                    "BPF programs cannot read kernel memory here", hint="boot with lockdown=integrity or none"
                )
            if found:
                return base
            first += _CANDIDATES
            # The page directory lies inside the direct map, so its base is at most all physical memory below it.
            if first << 30 > self.mask:
                raise TrackerUnavailable(
                    "where the kernel maps physical memory could not be verified",
                    hint="use another tracker (`memtier check` lists them)",
                )

    def close(self) -> None:
        """Unload. Safe to call twice."""
        for name in ("_blocks", "_tables"):
            if hasattr(self, name):
                setattr(self, name, np.zeros((0, 1), np.uint64))
        for area in self._maps:
            try:
                area.close()
            except BufferError:  # an error's traceback still refers to a view; it goes with that
                pass
        self._maps.clear()
        self._loaded.close()


def _prog_run(program_fd: int, arguments: tuple[int, ...]) -> None:
    """Run a raw tracepoint program once, here and now, with `arguments` as the tracepoint's."""
    context = np.array(arguments, np.uint64)
    # union bpf_attr, test: prog_fd, retval, data_size_in, data_size_out, data_in, data_out, repeat, duration,
    # ctx_size_in, ctx_size_out, ctx_in, ctx_out, flags, cpu, batch_size.
    attributes = struct.pack(
        "<IIIIQQIIIIQQIIII", program_fd, 0, 0, 0, 0, 0, 0, 0, context.nbytes, 0, context.ctypes.data, 0, 0, 0, 0, 0
    )
    syscalls.bpf(_BPF_PROG_RUN, attributes)


def _paging_of(host: Host) -> tuple[int, int]:
    """(mask of the physical address bits of an entry, shift of the top level).

    The kernel takes the bits that memory encryption uses off the count it prints; with no5lvl it takes la57 off the
    flags.
    """
    machine = os.uname().machine
    text = host.read_text(host.path("proc/cpuinfo"))
    bits, flags = _PHYSICAL_BITS.search(text), _FLAGS.search(text)
    if machine != "x86_64" or bits is None or flags is None:
        raise TrackerUnavailable(
            f"page tables of {machine} are not known here", hint="use another tracker (`memtier check` lists them)"
        )
    mask = (1 << int(bits[1])) - PAGE_BYTES
    five = "la57" in flags[1].split()
    return mask, paging.TOP_SHIFT_5_LEVELS if five else paging.TOP_SHIFT_4_LEVELS


class _Shared:
    """The walkers in use, by host and loader, with the number of their users."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # the garbage collector may give one back in the middle of `take`
        self._walkers: dict[tuple[Host, str], tuple[Walker, int]] = {}

    def take(self, host: Host, loader: str) -> tuple[Walker, Callable[[], None]]:
        with self._lock:
            walker, users = self._walkers.get((host, loader)) or (Walker(host, loader), 0)
            self._walkers[host, loader] = walker, users + 1
        return walker, lambda: self._give_back(host, loader)

    def _give_back(self, host: Host, loader: str) -> None:
        with self._lock:
            walker, users = self._walkers[host, loader]
            if users > 1:
                self._walkers[host, loader] = walker, users - 1
            else:
                del self._walkers[host, loader]
                walker.close()


_shared = _Shared()


class SharedWalker:
    """A user's hold on the one walker of this process: loaded by the first, unloaded by the last."""

    def __init__(self, host: Host, loader: str = "auto") -> None:
        """Raises TrackerUnavailable."""
        self.walker, give_back = _shared.take(host, loader)
        self._finalizer = weakref.finalize(self, give_back)

    def close(self) -> None:
        """Give it back. Safe to call twice."""
        self._finalizer()
