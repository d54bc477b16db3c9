"""Structures passed to the kernel, and the ioctl numbers that carry their sizes.

The size of each is part of its ioctl number, so a wrong layout would be refused with ENOTTY; it is checked at
import so that the mistake is found before the call.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_uint64

_IOC_WRITE = 1
_IOC_READ = 2


def _ioc(direction: int, type_: int, number: int, size: int) -> int:
    """An ioctl number. Source: include/uapi/asm-generic/ioctl.h (x86_64 and aarch64 use it)."""
    return direction << 30 | size << 16 | type_ << 8 | number


class PmScanArg(Structure):
    """`struct pm_scan_arg`. Source: include/uapi/linux/fs.h."""

    _fields_ = [
        ("size", c_uint64),
        ("flags", c_uint64),
        ("start", c_uint64),
        ("end", c_uint64),
        ("walk_end", c_uint64),
        ("vec", c_uint64),
        ("vec_len", c_uint64),
        ("max_pages", c_uint64),
        ("category_inverted", c_uint64),
        ("category_mask", c_uint64),
        ("category_anyof_mask", c_uint64),
        ("return_mask", c_uint64),
    ]


class PageRegion(Structure):
    """`struct page_region`: one entry of a PAGEMAP_SCAN answer. As numpy: one row of uint64[k, 3]."""

    _fields_ = [("start", c_uint64), ("end", c_uint64), ("categories", c_uint64)]


class UffdioApi(Structure):
    """`struct uffdio_api`. Source: include/uapi/linux/userfaultfd.h."""

    _fields_ = [("api", c_uint64), ("features", c_uint64), ("ioctls", c_uint64)]


class UffdioRange(Structure):
    """`struct uffdio_range`."""

    _fields_ = [("start", c_uint64), ("len", c_uint64)]


class UffdioRegister(Structure):
    """`struct uffdio_register`."""

    _fields_ = [("range", UffdioRange), ("mode", c_uint64), ("ioctls", c_uint64)]


class UffdioWriteprotect(Structure):
    """`struct uffdio_writeprotect`."""

    _fields_ = [("range", UffdioRange), ("mode", c_uint64)]


class Iovec(Structure):
    """`struct iovec` of a 64-bit kernel. As numpy: one row of uint64[n, 2]."""

    _fields_ = [("iov_base", c_uint64), ("iov_len", c_uint64)]


SIZES: dict[type[Structure], int] = {
    PmScanArg: 96,
    PageRegion: 24,
    UffdioApi: 24,
    UffdioRange: 16,
    UffdioRegister: 32,
    UffdioWriteprotect: 24,
    Iovec: 16,
}
"""Bytes of each structure in the kernel's headers."""

for _struct, _size in SIZES.items():
    if ctypes.sizeof(_struct) != _size:
        raise ImportError(f"{_struct.__name__} is {ctypes.sizeof(_struct)} bytes, the kernel's is {_size}")

PAGEMAP_SCAN = _ioc(_IOC_READ | _IOC_WRITE, ord("f"), 16, SIZES[PmScanArg])
UFFDIO_API = _ioc(_IOC_READ | _IOC_WRITE, 0xAA, 0x3F, SIZES[UffdioApi])
UFFDIO_REGISTER = _ioc(_IOC_READ | _IOC_WRITE, 0xAA, 0x00, SIZES[UffdioRegister])
UFFDIO_UNREGISTER = _ioc(_IOC_READ, 0xAA, 0x01, SIZES[UffdioRange])
UFFDIO_WRITEPROTECT = _ioc(_IOC_READ | _IOC_WRITE, 0xAA, 0x06, SIZES[UffdioWriteprotect])
