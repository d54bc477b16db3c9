"""The wrappers against this machine's kernel, on memory of this process and of a child."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
import time

import numpy as np
import pytest

from memtier_engine.abi import constants as c
from memtier_engine.abi import syscalls
from memtier_engine.errors import KernelCallError, ProcessGone
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.hostfs.probe import probe
from memtier_engine.hostfs.probe_base import TrialPages
from memtier_engine.model import PAGE_BYTES
from support.swap import temporary_zram_swap
from support.workload import workload

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")


def need(*features: str) -> None:
    for name in features:
        feature = probe()[name]
        if not feature.works:
            pytest.skip(f"{name}: {feature.why}; {feature.fix}; `make e2e` runs it in the test VM")


def test_a_pidfd_signals_its_process_and_knows_when_it_is_gone() -> None:
    child = subprocess.Popen(["sleep", "60"])
    fd = syscalls.pidfd_open(child.pid)
    try:
        assert not os.get_inheritable(fd)
        syscalls.pidfd_send_signal(fd, 0)
        syscalls.pidfd_send_signal(fd, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        with pytest.raises(ProcessGone):
            syscalls.pidfd_send_signal(fd, 0)
        with pytest.raises(ProcessGone):
            syscalls.process_madvise(fd, np.zeros(1, np.uint64), np.zeros(1, np.uint64), c.MADV_COLD)
    finally:
        os.close(fd)


def test_move_pages_tells_the_node_and_what_is_not_in_memory() -> None:
    need("move-pages")
    trial = TrialPages(2)
    untouched = TrialPages(2)
    untouched._map.madvise(4)  # MADV_DONTNEED
    status = syscalls.move_pages(0, np.array([trial.start, untouched.start], np.uint64), None)
    assert status[0] >= 0
    assert status[1] in (-errno.ENOENT, -errno.EFAULT)


def test_moving_pages_to_the_node_they_are_on_is_no_error() -> None:
    need("move-pages")
    trial = TrialPages(4)
    addresses = np.array(range(trial.start, trial.end, PAGE_BYTES), np.uint64)
    here = int(syscalls.move_pages(0, addresses, None)[0])
    assert (syscalls.move_pages(os.getpid(), addresses, here) == here).all()
    with pytest.raises(KernelCallError) as caught:
        syscalls.move_pages(0, addresses, 10_000)
    assert caught.value.errno in (errno.ENODEV, errno.EACCES, errno.EINVAL)


def test_write_protection_reports_exactly_the_pages_written() -> None:
    """userfaultfd WP_ASYNC with PAGEMAP_SCAN, which also protects anew what it reports."""
    need("userfaultfd-wp-async")
    trial = TrialPages(32)
    fd = syscalls.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK | c.UFFD_USER_MODE_ONLY)
    try:
        features, _ = syscalls.uffdio_api(fd, c.UFFD_FEATURE_WP_ASYNC | c.UFFD_FEATURE_WP_UNPOPULATED)
        assert features & c.UFFD_FEATURE_WP_ASYNC
        length = trial.end - trial.start
        ioctls = syscalls.uffdio_register(fd, trial.start, length, c.UFFDIO_REGISTER_MODE_WP)
        assert ioctls >> 6 & 1  # UFFDIO_WRITEPROTECT is allowed
        syscalls.uffdio_writeprotect(fd, trial.start, length, c.UFFDIO_WRITEPROTECT_MODE_WP)
        with Pagemap(Host(), os.getpid()) as pages:

            def written() -> list[tuple[int, int]]:
                flags = c.PM_SCAN_WP_MATCHING | c.PM_SCAN_CHECK_WPASYNC
                runs = pages.scan_runs(trial.start, trial.end, mask=c.PAGE_IS_WRITTEN, flags=flags)
                at = (runs[:, :2] - np.uint64(trial.start)) // np.uint64(PAGE_BYTES)
                return [(int(first), int(last)) for first, last in at]

            assert written() == []
            trial.touch(3, 2)
            trial.touch(9, 1)
            assert written() == [(3, 5), (9, 10)]
            assert written() == []
        syscalls.uffdio_unregister(fd, trial.start, length)
    finally:
        os.close(fd)
        trial.close()


@pytest.mark.parametrize("row_count", [1, 5, 511, 512, 513, 600, 1024, 5000])
def test_pagemap_scan_reports_every_run_once_whatever_the_room(row_count: int) -> None:
    """Every other page is a hole: 1024 runs, while the kernel itself walks in steps of 512."""
    need("pagemap-scan")
    trial = TrialPages(2048)
    for page in range(0, 2048, 2):
        trial._map.madvise(4, page * PAGE_BYTES, PAGE_BYTES)  # MADV_DONTNEED
    rows = np.zeros((row_count, 3), np.uint64)
    found: list[int] = []
    with Pagemap(Host(), os.getpid()) as pages:
        at = trial.start
        while at < trial.end:
            filled, at = syscalls.pagemap_scan(
                pages.fileno(),
                at,
                trial.end,
                category_mask=c.PAGE_IS_PRESENT,
                return_mask=c.PAGE_IS_PRESENT,
                vec=rows,
            )
            found += rows[:filled, 0].tolist()
    assert found == [trial.start + page * PAGE_BYTES for page in range(1, 2048, 2)]
    trial.close()


@needs_root
def test_paging_out_another_process_moves_what_it_says() -> None:
    """MADV_PAGEOUT over a pidfd: the cold span leaves, its neighbour stays."""
    need("process-madvise")
    with temporary_zram_swap(256 << 20), workload(4, 16, write=True) as load:
        fd = syscalls.pidfd_open(load.pid)
        try:
            lengths = load.cold.ends - load.cold.starts
            assert syscalls.process_madvise(fd, load.cold.starts, lengths, c.MADV_PAGEOUT) == 16 << 20
        finally:
            os.close(fd)
        assert load.swapped_share(load.cold) >= 0.95
        assert load.swapped_share(load.hot) <= 0.02


@needs_root
def test_a_call_lets_other_threads_run() -> None:
    """The GIL is released: a Python thread counts on while the kernel pages out 64 MiB."""
    need("process-madvise")
    with temporary_zram_swap(256 << 20), workload(1, 64) as load:
        fd = syscalls.pidfd_open(load.pid)
        seconds: list[float] = []

        def page_out() -> None:
            begin = time.perf_counter()
            lengths = load.cold.ends - load.cold.starts
            syscalls.process_madvise(fd, load.cold.starts, lengths, c.MADV_PAGEOUT)
            seconds.append(time.perf_counter() - begin)

        thread = threading.Thread(target=page_out)
        thread.start()
        ticks = 0
        while thread.is_alive():
            time.sleep(0.001)
            ticks += 1
        os.close(fd)
    # With the GIL held the loop would wake once, after the call.
    assert seconds[0] > 0.01
    assert ticks >= 3
