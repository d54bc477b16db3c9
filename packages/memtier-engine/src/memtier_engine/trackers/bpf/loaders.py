"""Two ways from the one C source to loaded programs: a compiled object by libbpf, or text by bcc.

`libbpf` (compile-free) needs libbpf and the kernel's BTF; `bcc` needs python3-bpfcc, its compiler and kernel headers,
and BTF for the offsets. `auto` prefers the first: no compiler in memory, and loaded in milliseconds.
"""

from __future__ import annotations

import errno
import os
import pkgutil
import re
import sys
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from memtier_engine.abi.libbpf import BpfObject, available
from memtier_engine.errors import KernelCallError, MemtierError, Unavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.trackers.bpf.btf import Btf

SOURCE = "access.bpf.c"
OBJECT = "access.bpf.elf"
BTF_FILE = "sys/kernel/btf/vmlinux"
KERNEL_HEADERS = "sys/kernel/kheaders.tar.xz"
DISTRIBUTION_PACKAGES = "/usr/lib/python3/dist-packages"
"""Where Debian's python3-bpfcc is, which a virtual environment does not see."""

LOADERS = ("libbpf", "bcc")
_BPF_PROG_TYPE_RAW_TRACEPOINT = 17
_BPF_PROG_TYPE_PERF_EVENT = 7
_FIELD = re.compile(r"\bAT\((\w+), [^()]*(?:\([^()]*\))?[^()]*, (\w+)\)")
_PROGRAM = re.compile(r'^PROGRAM\("([a-z_]+)', re.M)

_OPTIONAL = (("mm_struct", "notifier_subscriptions"),)
"""Fields that some kernels are built without; the source copes."""


class Loaded(Protocol):
    """Programs and maps in the kernel."""

    loader: str

    def program_fd(self, name: str) -> int:
        """File descriptor of a program; it belongs to this object."""

    def map_fd(self, name: str) -> int:
        """File descriptor of a map; it belongs to this object."""

    def close(self) -> None:
        """Unload all. Safe to call twice."""


def read_resource(name: str) -> bytes:
    """A file of this package."""
    data = pkgutil.get_data(__package__, name)  # importlib.resources takes tempfile and more with it
    assert data is not None
    return data


def load(
    host: Host, programs: Collection[str], loader: str = "auto", sizes: Mapping[str, int] = MappingProxyType({})
) -> Loaded:
    """Load `programs` of the C source.

    Args:
        sizes: entries of the hash maps that these programs use; others have one.
        loader: "libbpf", "bcc", or "auto": the first of them that works.
    Raises:
        AccessDenied: this process may not load BPF programs.
        Unavailable, KernelCallError: why it does not work; with "auto" the reasons of all.
    """
    if loader != "auto":
        return _LOAD[loader](host, programs, sizes)
    _need_btf(host)  # no loader does without: a missing bcc, say, would be beside the point
    failures: list[MemtierError] = []
    for name in LOADERS:
        try:
            return _LOAD[name](host, programs, sizes)
        except MemtierError as failure:
            if isinstance(failure, KernelCallError) and failure.errno == errno.EPERM:
                raise  # the other loader would be refused as well
            failures.append(failure)
    first = failures[0]
    reasons = "; ".join(f"{name}: {failure.message}" for name, failure in zip(LOADERS, failures, strict=True))
    raise Unavailable(reasons, hint=first.hint)


class _Object(BpfObject):
    loader = "libbpf"


def load_by_libbpf(host: Host, programs: Collection[str], sizes: Mapping[str, int]) -> Loaded:
    """Load the compiled object that comes with this package."""
    _need_btf(host)
    available()
    return _Object(read_resource(OBJECT), programs, sizes)


def _need_btf(host: Host) -> Path:
    path = host.path(BTF_FILE)
    if not path.exists():
        raise Unavailable(f"/{BTF_FILE} does not exist", hint="a kernel with CONFIG_DEBUG_INFO_BTF=y")
    return path


class _ByBcc:
    """What bcc loaded. bcc frees its maps and programs with its BPF object."""

    loader = "bcc"

    def __init__(self, bpf: Any, functions: dict[str, Any], maps: dict[str, int]) -> None:
        self._bpf = bpf
        self._functions = functions
        self._maps = maps

    def program_fd(self, name: str) -> int:
        return int(self._functions[name].fd)

    def map_fd(self, name: str) -> int:
        return self._maps[name]

    def close(self) -> None:
        if self._bpf is not None:
            self._bpf.cleanup()
            self._bpf = None


def import_bcc() -> Any:
    """The module `bcc` of the distribution's python3-bpfcc.

    Raises:
        Unavailable: it is not there. PyPI's `bcc` is something else and is told from it.
    """
    hint = "apt install python3-bpfcc (PyPI's bcc is another project); of the container image, the variant -bcc"
    try:
        module = import_module("bcc")
    except ImportError:
        sys.path.append(DISTRIBUTION_PACKAGES)
        try:
            module = import_module("bcc")
        except (ImportError, OSError) as failure:
            raise Unavailable(f"bcc cannot be imported: {failure}", hint=hint) from None
        finally:
            sys.path.remove(DISTRIBUTION_PACKAGES)
    if not hasattr(module, "BPF"):
        raise Unavailable("the module bcc is not the BPF Compiler Collection", hint=hint)
    return module


def fields_in(source: str) -> list[tuple[str, str]]:
    """(structure, field) of every AT() in the source, sorted."""
    body = source[source.index("#define BLOCKS") :]
    return sorted(set(_FIELD.findall(body)))


def load_by_bcc(host: Host, programs: Collection[str], sizes: Mapping[str, int]) -> Loaded:
    """Compile the source on this machine. Headers of another version do no harm: the offsets are the kernel's own."""
    bcc = import_bcc()
    source = read_resource(SOURCE).decode()
    btf = Btf(host.read_bytes(_need_btf(host)))
    flags = ["-DMEMTIER_BCC"]
    for kind, field in fields_in(source):
        try:
            flags.append(f"-DOFFSET_{kind}_{field}={btf.offset(kind, field)}")
        except Unavailable:
            if (kind, field) not in _OPTIONAL:
                raise
    flags += [f"-DENTRIES_{name}={sizes.get(name, 1)}" for name in _maps_of(source)]
    _need_headers(host)
    with _stderr_kept() as said:
        try:
            bpf = bcc.BPF(text=source.encode(), cflags=flags)
            functions = {name: bpf.load_func(name.encode(), _kind_of(source, name)) for name in programs}
        except Exception as failure:  # bcc raises plain Exception
            words = said() or str(failure)
            number = errno.EPERM if "Operation not permitted" in f"{words} {failure}" else errno.EINVAL
            message = f"bcc: {failure}: {words[-600:]}"
            raise KernelCallError.from_errno(message, number) from None
    return _ByBcc(bpf, functions, {name: int(bpf[name.encode()].map_fd) for name in _maps_of(source)})


def _kind_of(source: str, program: str) -> int:
    found = re.search(rf'PROGRAM\("([a-z_]+)[^\n]*\n\w+ {program}\(', source)
    if found is None:
        raise KernelCallError(f"the BPF source has no program {program}", errno.ENOENT)
    return {"raw_tp": _BPF_PROG_TYPE_RAW_TRACEPOINT, "perf_event": _BPF_PROG_TYPE_PERF_EVENT}[found[1]]


def _maps_of(source: str) -> list[str]:
    return re.findall(r"^MAP_\w+\((\w+),", source, re.M)


def _need_headers(host: Host) -> None:
    release = host.read_text(host.path("proc/sys/kernel/osrelease")).strip()
    modules = host.path("lib/modules", release)
    places = [host.path(KERNEL_HEADERS), modules / "build", modules / "source"]
    if "BCC_KERNEL_SOURCE" in os.environ or any(place.exists() for place in places):
        return
    raise Unavailable(
        f"bcc needs kernel headers: neither /lib/modules/{release}/build nor /{KERNEL_HEADERS} exists",
        hint="apt install linux-headers-$(uname -r), or modprobe kheaders",
    )


class _stderr_kept:  # noqa: N801
    """clang writes to file descriptor 2: keep it for the error message."""

    def __enter__(self) -> Any:
        self._file = os.memfd_create("memtier-bcc")
        self._saved = os.dup(2)
        os.dup2(self._file, 2)
        return lambda: os.pread(self._file, 1 << 16, 0).decode("utf-8", "replace").strip()

    def __exit__(self, *_: object) -> None:
        os.dup2(self._saved, 2)
        os.close(self._saved)
        os.close(self._file)


def need(loader: str, host: Host) -> None:
    """Return if what `loader` needs of this machine is there. Nothing is loaded.

    Raises:
        Unavailable: it is not, and how to get it.
    """
    _need_btf(host)
    if loader == "libbpf":
        available()
    else:
        import_bcc()
        _need_headers(host)


_LOAD = {"libbpf": load_by_libbpf, "bcc": load_by_bcc}
