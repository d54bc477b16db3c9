"""Flags and bit positions of the kernel's interfaces, under the kernel's names.

Each group cites its header. The numbers are the same on x86_64 and aarch64.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag


class Madvise(IntEnum):
    """Advice for madvise and process_madvise. Source: include/uapi/asm-generic/mman-common.h."""

    MADV_NORMAL = 0
    MADV_WILLNEED = 3
    MADV_DONTNEED = 4
    MADV_HUGEPAGE = 14
    MADV_NOHUGEPAGE = 15
    MADV_COLD = 20
    MADV_PAGEOUT = 21
    MADV_POPULATE_READ = 22
    MADV_POPULATE_WRITE = 23
    MADV_COLLAPSE = 25


MADV_WILLNEED = Madvise.MADV_WILLNEED
MADV_HUGEPAGE = Madvise.MADV_HUGEPAGE
MADV_NOHUGEPAGE = Madvise.MADV_NOHUGEPAGE
MADV_COLD = Madvise.MADV_COLD
MADV_PAGEOUT = Madvise.MADV_PAGEOUT
MADV_COLLAPSE = Madvise.MADV_COLLAPSE


class Mpol(IntFlag):
    """Flags of move_pages and mbind. Source: include/uapi/linux/mempolicy.h."""

    MPOL_MF_STRICT = 1 << 0
    MPOL_MF_MOVE = 1 << 1
    MPOL_MF_MOVE_ALL = 1 << 2


MPOL_MF_STRICT = Mpol.MPOL_MF_STRICT
MPOL_MF_MOVE = Mpol.MPOL_MF_MOVE
MPOL_MF_MOVE_ALL = Mpol.MPOL_MF_MOVE_ALL

UIO_MAXIOV = 1024
"""Most iovecs a call takes (process_madvise). Source: include/uapi/linux/uio.h."""


class PageIs(IntFlag):
    """Categories of PAGEMAP_SCAN. Source: include/uapi/linux/fs.h (Linux 6.7; SOFT_DIRTY 6.9, GUARD 6.15)."""

    PAGE_IS_WPALLOWED = 1 << 0
    PAGE_IS_WRITTEN = 1 << 1
    PAGE_IS_FILE = 1 << 2
    PAGE_IS_PRESENT = 1 << 3
    PAGE_IS_SWAPPED = 1 << 4
    PAGE_IS_PFNZERO = 1 << 5
    PAGE_IS_HUGE = 1 << 6
    PAGE_IS_SOFT_DIRTY = 1 << 7
    PAGE_IS_GUARD = 1 << 8


PAGE_IS_WPALLOWED = PageIs.PAGE_IS_WPALLOWED
PAGE_IS_WRITTEN = PageIs.PAGE_IS_WRITTEN
PAGE_IS_FILE = PageIs.PAGE_IS_FILE
PAGE_IS_PRESENT = PageIs.PAGE_IS_PRESENT
PAGE_IS_SWAPPED = PageIs.PAGE_IS_SWAPPED
PAGE_IS_PFNZERO = PageIs.PAGE_IS_PFNZERO
PAGE_IS_HUGE = PageIs.PAGE_IS_HUGE
PAGE_IS_SOFT_DIRTY = PageIs.PAGE_IS_SOFT_DIRTY
PAGE_IS_GUARD = PageIs.PAGE_IS_GUARD


class PmScan(IntFlag):
    """Flags of PAGEMAP_SCAN. Source: include/uapi/linux/fs.h."""

    PM_SCAN_WP_MATCHING = 1 << 0
    PM_SCAN_CHECK_WPASYNC = 1 << 1


PM_SCAN_WP_MATCHING = PmScan.PM_SCAN_WP_MATCHING
PM_SCAN_CHECK_WPASYNC = PmScan.PM_SCAN_CHECK_WPASYNC

# Words of /proc/PID/pagemap. Source: fs/proc/task_mmu.c, Documentation/admin-guide/mm/pagemap.rst.
PM_PFRAME_BITS = 55
PM_PFRAME_MASK = (1 << PM_PFRAME_BITS) - 1
PM_SOFT_DIRTY = 1 << 55
PM_MMAP_EXCLUSIVE = 1 << 56
PM_UFFD_WP = 1 << 57
PM_FILE = 1 << 61
PM_SWAP = 1 << 62
PM_PRESENT = 1 << 63


class Kpf(IntFlag):
    """Words of /proc/kpageflags. Source: include/uapi/linux/kernel-page-flags.h."""

    KPF_LOCKED = 1 << 0
    KPF_REFERENCED = 1 << 2
    KPF_UPTODATE = 1 << 3
    KPF_DIRTY = 1 << 4
    KPF_LRU = 1 << 5
    KPF_ACTIVE = 1 << 6
    KPF_SLAB = 1 << 7
    KPF_WRITEBACK = 1 << 8
    KPF_RECLAIM = 1 << 9
    KPF_BUDDY = 1 << 10
    KPF_MMAP = 1 << 11
    KPF_ANON = 1 << 12
    KPF_SWAPCACHE = 1 << 13
    KPF_SWAPBACKED = 1 << 14
    KPF_COMPOUND_HEAD = 1 << 15
    KPF_COMPOUND_TAIL = 1 << 16
    KPF_HUGE = 1 << 17
    KPF_UNEVICTABLE = 1 << 18
    KPF_HWPOISON = 1 << 19
    KPF_NOPAGE = 1 << 20
    KPF_KSM = 1 << 21
    KPF_THP = 1 << 22
    KPF_OFFLINE = 1 << 23
    KPF_ZERO_PAGE = 1 << 24
    KPF_IDLE = 1 << 25
    KPF_PGTABLE = 1 << 26


KPF_LRU = Kpf.KPF_LRU
KPF_UNEVICTABLE = Kpf.KPF_UNEVICTABLE
KPF_COMPOUND_HEAD = Kpf.KPF_COMPOUND_HEAD
KPF_COMPOUND_TAIL = Kpf.KPF_COMPOUND_TAIL
KPF_HUGE = Kpf.KPF_HUGE
KPF_THP = Kpf.KPF_THP
KPF_ZERO_PAGE = Kpf.KPF_ZERO_PAGE
KPF_IDLE = Kpf.KPF_IDLE

# userfaultfd. Source: include/uapi/linux/userfaultfd.h.
UFFD_API = 0xAA
UFFD_USER_MODE_ONLY = 1
"""Flag of userfaultfd(2): no faults from kernel mode; allowed without privilege (Linux 5.11)."""


class UffdFeature(IntFlag):
    """Features asked for with UFFDIO_API."""

    UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
    UFFD_FEATURE_WP_UNPOPULATED = 1 << 13
    UFFD_FEATURE_WP_ASYNC = 1 << 15


UFFD_FEATURE_PAGEFAULT_FLAG_WP = UffdFeature.UFFD_FEATURE_PAGEFAULT_FLAG_WP
UFFD_FEATURE_WP_HUGETLBFS_SHMEM = UffdFeature.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
UFFD_FEATURE_WP_UNPOPULATED = UffdFeature.UFFD_FEATURE_WP_UNPOPULATED
UFFD_FEATURE_WP_ASYNC = UffdFeature.UFFD_FEATURE_WP_ASYNC

UFFDIO_REGISTER_MODE_MISSING = 1 << 0
UFFDIO_REGISTER_MODE_WP = 1 << 1
UFFDIO_REGISTER_MODE_MINOR = 1 << 2
UFFDIO_WRITEPROTECT_MODE_WP = 1 << 0
UFFDIO_WRITEPROTECT_MODE_DONTWAKE = 1 << 1


class Capability(IntEnum):
    """Bits of CapEff in /proc/PID/status. Source: include/uapi/linux/capability.h."""

    CAP_DAC_OVERRIDE = 1
    CAP_DAC_READ_SEARCH = 2
    CAP_KILL = 5
    CAP_NET_ADMIN = 12
    CAP_SYS_PTRACE = 19
    CAP_SYS_ADMIN = 21
    CAP_SYS_NICE = 23
    CAP_SYS_RESOURCE = 24
    CAP_PERFMON = 38
    CAP_BPF = 39


KCMP_VM = 1
"""What kcmp(2) compares: whether two tasks have one address space. Source: include/uapi/linux/kcmp.h."""
