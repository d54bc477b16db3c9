"""libbpf by ctypes: a compiled BPF object becomes loaded programs and maps, without a compiler on the node.

Source: libbpf's src/libbpf.h, of which versions 0.6 to 1.x (`libbpf.so.0`, `libbpf.so.1`) have all calls used.
Everything is freed with the object: the kernel drops a program or map when the last file descriptor goes, so also
when the process dies.
"""

from __future__ import annotations

import ctypes
import errno
import threading
from collections.abc import Collection, Mapping
from ctypes import CFUNCTYPE, c_bool, c_char_p, c_int, c_long, c_size_t, c_uint32, c_void_p
from functools import cache

from memtier_engine.errors import KernelCallError, Unavailable

SONAMES = ("libbpf.so.1", "libbpf.so.0")
_LIBBPF_WARN = 0
_LOG_LINES = 40
_NAMED = {
    errno.EPERM: "the process may not load BPF programs",
    errno.EACCES: "the kernel's verifier refused the program",
}

_PRINT_FUNCTION = CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)
_log = threading.local()


def _keep_warning(level: int, form: bytes, arguments: int) -> int:
    """libbpf's printing, kept for the error that will follow instead of written to stderr."""
    lines = getattr(_log, "lines", None)
    if lines is not None and level == _LIBBPF_WARN:
        buffer = ctypes.create_string_buffer(4096)
        # On x86_64 and aarch64 a va_list parameter is passed as one pointer.
        _libc.vsnprintf(buffer, c_size_t(len(buffer)), c_char_p(form), c_void_p(arguments))
        lines.append(buffer.value.decode("utf-8", "replace").strip())
        del lines[:-_LOG_LINES]
    return 0


_keep_warning_pointer = _PRINT_FUNCTION(_keep_warning)  # libbpf keeps it: never collected
_libc = ctypes.CDLL(None)


@cache
def _library() -> ctypes.CDLL:
    for soname in SONAMES:
        try:
            library = ctypes.CDLL(soname, use_errno=True)
        except OSError:
            continue
        prototypes: dict[str, tuple[type | None, list[type]]] = {
            "libbpf_set_print": (c_void_p, [_PRINT_FUNCTION]),
            "libbpf_get_error": (c_long, [c_void_p]),
            "bpf_object__open_mem": (c_void_p, [c_void_p, c_size_t, c_void_p]),
            "bpf_object__load": (c_int, [c_void_p]),
            "bpf_object__close": (None, [c_void_p]),
            "bpf_object__find_map_fd_by_name": (c_int, [c_void_p, c_char_p]),
            "bpf_object__find_map_by_name": (c_void_p, [c_void_p, c_char_p]),
            "bpf_object__find_program_by_name": (c_void_p, [c_void_p, c_char_p]),
            "bpf_map__set_max_entries": (c_int, [c_void_p, c_uint32]),
            "bpf_object__next_program": (c_void_p, [c_void_p, c_void_p]),
            "bpf_program__name": (c_char_p, [c_void_p]),
            "bpf_program__fd": (c_int, [c_void_p]),
            "bpf_program__set_autoload": (c_int, [c_void_p, c_bool]),
        }
        for name, (result, arguments) in prototypes.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise Unavailable(
                    f"{soname} is too old: it has no {name}", hint="install libbpf 0.6 or later (Debian: libbpf1)"
                ) from None
            function.restype = result
            function.argtypes = arguments
        library.libbpf_set_print(_keep_warning_pointer)
        return library
    raise Unavailable(f"{SONAMES[0]} is not installed", hint="install libbpf (Debian and Ubuntu: apt install libbpf1)")


def available() -> None:
    """Raises Unavailable if there is no usable libbpf."""
    _library()


class BpfObject:
    """An object file's programs and maps in the kernel."""

    def __init__(self, image: bytes, programs: Collection[str], sizes: Mapping[str, int] | None = None) -> None:
        """Load `programs` (by function name) of the ELF file `image`, and all its maps.

        Args:
            sizes: number of entries of maps, where it differs from the file's.
        Raises:
            Unavailable: no libbpf on this machine.
            AccessDenied: this process may not load BPF programs.
            KernelCallError: anything else; the message ends with libbpf's own words.
        """
        self._handle: int | None = None
        self._lib = _library()
        self._pointers: dict[str, int] = {}
        _log.lines = []
        try:
            self._load(image, programs, sizes or {})
        except BaseException:
            self.close()
            raise
        finally:
            del _log.lines

    def _load(self, image: bytes, programs: Collection[str], sizes: Mapping[str, int]) -> None:
        ctypes.set_errno(0)
        handle = self._lib.bpf_object__open_mem(ctypes.c_char_p(image), len(image), None)
        failure = -self._lib.libbpf_get_error(handle) if handle else ctypes.get_errno() or errno.EINVAL
        if failure:
            raise self._failed("read the BPF object", failure)
        self._handle = handle
        program = self._lib.bpf_object__next_program(handle, None)
        while program:
            name = self._lib.bpf_program__name(program).decode()
            self._lib.bpf_program__set_autoload(program, name in programs)
            self._pointers[name] = program
            program = self._lib.bpf_object__next_program(handle, program)
        absent = set(programs) - self._pointers.keys()
        if absent:
            raise KernelCallError(f"the BPF object has no program {', '.join(sorted(absent))}", errno.ENOENT)
        for name, entries in sizes.items():
            self._lib.bpf_map__set_max_entries(self._lib.bpf_object__find_map_by_name(handle, name.encode()), entries)
        result = self._lib.bpf_object__load(handle)
        if result < 0:
            raise self._failed("load the BPF object", -result)

    def _failed(self, what: str, number: int) -> KernelCallError:
        error = KernelCallError.from_errno(what, number)
        words = [line for line in _log.lines if "Error in bpf_object__probe_loading" not in line]
        if number == errno.EPERM:
            words = []  # advice on ulimits that does not fit
        if number in _NAMED:
            words.insert(0, _NAMED[number])
        return type(error)(f"{error.message}: {'; '.join(words)}" if words else error.message, number)

    def program_fd(self, name: str) -> int:
        """File descriptor of a loaded program; it belongs to the object."""
        return self._fd(self._lib.bpf_program__fd(self._pointers[name]), f"program {name}")

    def map_fd(self, name: str) -> int:
        """File descriptor of a map; it belongs to the object."""
        return self._fd(self._lib.bpf_object__find_map_fd_by_name(self._handle, name.encode()), f"map {name}")

    def _fd(self, fd: int, what: str) -> int:
        if fd < 0:
            raise KernelCallError.from_errno(f"BPF {what}", -fd)
        return int(fd)

    def close(self) -> None:
        """Unload everything. Safe to call twice."""
        if self._handle is not None:
            self._lib.bpf_object__close(self._handle)
            self._handle = None
