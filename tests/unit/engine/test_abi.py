"""The kernel's numbers and layouts, and the wrappers' own checks."""

from __future__ import annotations

import ctypes
import errno
import os

import numpy as np
import pytest

from memtier_engine.abi import constants, numbers, structs, syscalls
from memtier_engine.errors import AccessDenied, KernelCallError, ProcessGone, Unavailable


def test_every_structure_has_the_size_of_the_kernel_headers() -> None:
    assert {struct.__name__: ctypes.sizeof(struct) for struct in structs.SIZES} == {
        "PmScanArg": 96,
        "PageRegion": 24,
        "UffdioApi": 24,
        "UffdioRange": 16,
        "UffdioRegister": 32,
        "UffdioWriteprotect": 24,
        "Iovec": 16,
    }


def test_ioctl_numbers_are_those_a_c_program_prints() -> None:
    """As printed by a C program from linux/fs.h and linux/userfaultfd.h."""
    assert structs.PAGEMAP_SCAN == 0xC0606610
    assert structs.UFFDIO_API == 0xC018AA3F
    assert structs.UFFDIO_REGISTER == 0xC020AA00
    assert structs.UFFDIO_UNREGISTER == 0x8010AA01
    assert structs.UFFDIO_WRITEPROTECT == 0xC018AA06


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_both_architectures_have_every_call(machine: str) -> None:
    assert numbers.syscall_number("process_madvise", machine) == 440
    assert numbers.syscall_number("pidfd_open", machine) == 434
    assert numbers.TABLES[machine].keys() == numbers.TABLES["x86_64"].keys()


def test_an_unknown_architecture_is_unavailable_and_names_the_known_ones() -> None:
    with pytest.raises(Unavailable, match=r"riscv64.*aarch64, x86_64"):
        numbers.syscall_number("pidfd_open", "riscv64")


def test_pagemap_bits_do_not_overlap_the_frame_number() -> None:
    assert constants.PM_PFRAME_MASK == (1 << 55) - 1
    for bit in (
        constants.PM_SOFT_DIRTY,
        constants.PM_MMAP_EXCLUSIVE,
        constants.PM_SWAP,
        constants.PM_PRESENT,
    ):
        assert not bit & constants.PM_PFRAME_MASK


def test_process_madvise_takes_at_most_1024_spans() -> None:
    """The kernel would answer EINVAL; ours says what is wrong."""
    many = np.zeros(1025, np.uint64)
    with pytest.raises(ValueError, match="at most 1024"):
        syscalls.process_madvise(-1, many, many, constants.MADV_PAGEOUT)


def test_process_madvise_wants_as_many_lengths_as_starts() -> None:
    with pytest.raises(ValueError, match="2 starts but 1 lengths"):
        syscalls.process_madvise(-1, np.zeros(2, np.uint64), np.zeros(1, np.uint64), constants.MADV_PAGEOUT)


@pytest.mark.parametrize(
    "vec",
    [
        np.zeros((4, 2), np.uint64),
        np.zeros((4, 3), np.int64),
        np.zeros(12, np.uint64),
        np.zeros((3, 4), np.uint64).T,
    ],
    ids=["two columns", "signed", "flat", "Fortran order"],
)
def test_pagemap_scan_refuses_a_vector_the_kernel_would_misread(vec: np.ndarray) -> None:
    with pytest.raises(ValueError, match="vec must be"):
        syscalls.pagemap_scan(-1, 0, 4096, vec=vec)


def test_a_bad_file_descriptor_is_reported_with_the_kernels_errno() -> None:
    with pytest.raises(KernelCallError, match="EBADF") as caught:
        syscalls.pagemap_scan(-1, 0, 4096)
    assert caught.value.errno == errno.EBADF


def test_a_process_that_does_not_exist_is_gone() -> None:
    """pid_max is at most 2**22."""
    with pytest.raises(ProcessGone) as caught:
        syscalls.pidfd_open((1 << 22) + 1)
    assert caught.value.errno == errno.ESRCH


def test_errno_decides_the_class_of_the_error() -> None:
    assert type(KernelCallError.from_errno("x", errno.EACCES)) is AccessDenied
    assert type(KernelCallError.from_errno("x", errno.ESRCH)) is ProcessGone
    assert type(KernelCallError.from_errno("x", errno.EAGAIN)) is KernelCallError
    assert os.strerror(errno.EAGAIN) in str(KernelCallError.from_errno("x", errno.EAGAIN))
