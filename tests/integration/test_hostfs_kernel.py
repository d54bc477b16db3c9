"""The readers of kernel files against the kernel: two ways to the same fact must agree."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from memtier_engine.abi import constants as c
from memtier_engine.abi.syscalls import move_pages, process_madvise
from memtier_engine.errors import ProcessGone
from memtier_engine.hostfs import numa, proc, psi
from memtier_engine.hostfs import pagemap as pm
from memtier_engine.hostfs.cgroup import Cgroup
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.kpageflags import KpageFlags
from memtier_engine.hostfs.maps import process_id, read_mappings
from memtier_engine.hostfs.page_idle import IdleBitmap
from memtier_engine.hostfs.probe import probe
from memtier_engine.hostfs.probe_base import TrialPages
from memtier_engine.model import PAGE_BYTES, PAGE_SHIFT, U64
from support.swap import temporary_zram_swap
from support.waiting import until
from support.workload import workload

HOST = Host()
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")


def need(*features: str) -> None:
    for name in features:
        feature = probe()[name]
        if not feature.works:
            pytest.skip(f"{name}: {feature.why}; {feature.fix}; `make e2e` runs it in the test VM")


def pages_from(start: int, end: int, *, step: int = 1) -> U64:
    return np.array(range(start, end, step * PAGE_BYTES), np.uint64)


def test_maps_agree_with_what_the_kernel_counts() -> None:
    """The mappings add up to VmSize, but for [vsyscall], which is the kernel's own."""
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(b"up\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"up\n"
        mappings = read_mappings(HOST, child.pid)
        listed = sum(
            int(end - start)
            for start, end, name in zip(mappings.starts, mappings.ends, mappings.names, strict=True)
            if name != "[vsyscall]"
        )
        assert listed == proc.read_status(HOST, child.pid).vm_size
        assert "[heap]" in mappings.names
        assert mappings.tierable().total_bytes < listed
    finally:
        child.kill()
        child.communicate()


def test_bulk_pagemap_is_word_for_word_what_single_reads_give() -> None:
    need("pagemap")
    with workload(1, 3) as load, pm.Pagemap(HOST, load.pid) as pages:
        start, end = int(load.cold.starts[0]), int(load.cold.ends[0])
        words = pages.read(start, end)
        with open(f"/proc/{load.pid}/pagemap", "rb", buffering=0) as file:
            single = [
                os.pread(file.fileno(), 8, (address >> PAGE_SHIFT) * 8) for address in range(start, end, PAGE_BYTES)
            ]
        assert words.tobytes() == b"".join(single)
        assert pm.present(words).all()


@needs_root
def test_pagemap_scan_agrees_with_pagemap_words_on_every_page() -> None:
    """Present and swapped, on a process of which a part is paged out page by page."""
    need("pagemap-scan", "process-madvise")
    with temporary_zram_swap(256 << 20), workload(1, 8) as load:
        start, end = int(load.cold.starts[0]), int(load.cold.ends[0])
        fd = os.pidfd_open(load.pid)
        every_third = pages_from(start, end, step=3)
        process_madvise(fd, every_third, np.full(len(every_third), PAGE_BYTES, np.uint64), c.MADV_PAGEOUT)
        os.close(fd)
        with pm.Pagemap(HOST, load.pid) as pages:
            words = pages.read(start, end)
            for category, decode in ((c.PAGE_IS_PRESENT, pm.present), (c.PAGE_IS_SWAPPED, pm.swapped)):
                runs = pages.scan_runs(start, end, mask=category)
                found = np.zeros(len(words), np.bool_)
                for first, last in (runs[:, :2] - np.uint64(start)) >> np.uint64(PAGE_SHIFT):
                    found[int(first) : int(last)] = True
                np.testing.assert_array_equal(found, decode(words))
            swapped_pages = int(np.count_nonzero(pm.swapped(words)))
            assert swapped_pages > 0.9 * len(every_third)
            assert pages.swapped_bytes(load.cold.starts, load.cold.ends) == swapped_pages * PAGE_BYTES
            # Many small spans: still to the page.
            starts = pages_from(start, end, step=2)
            even = int(np.count_nonzero(pm.swapped(words)[::2])) * PAGE_BYTES
            assert pages.swapped_bytes(starts, starts + np.uint64(PAGE_BYTES)) == even
        status = proc.read_status(HOST, load.pid)
        table = proc.read_smaps(HOST, load.pid)
        assert status.vm_swap == int(table.swap_bytes.sum())
        assert proc.smaps_rollup(HOST, load.pid)["Swap"] == status.vm_swap


def test_a_range_may_go_beyond_the_end_of_what_programs_have() -> None:
    """As the 2 MiB around the end of a stack that is where it is without address randomization."""
    need("pagemap-scan")
    child = subprocess.Popen(["setarch", "-R", "cat"], stdin=subprocess.PIPE)
    try:
        stack = 0

        def runs_cat() -> bool:
            nonlocal stack
            mappings = read_mappings(HOST, child.pid)
            stack = next(
                (int(end) for end, name in zip(mappings.ends, mappings.names, strict=True) if name == "[stack]"), 0
            )
            return os.readlink(f"/proc/{child.pid}/exe").endswith("/cat") and stack > 0

        until(runs_cat)
        block = 2 << 20
        with pm.Pagemap(HOST, child.pid) as pages:
            runs = pages.scan_runs((stack - 1) // block * block, -(-stack // block) * block, mask=c.PAGE_IS_PRESENT)
            assert len(runs)
            assert int(runs[-1, 1]) <= stack
            assert len(pages.scan_runs(stack - PAGE_BYTES, 1 << 57, mask=c.PAGE_IS_PRESENT)) <= 1
    finally:
        child.communicate()


def test_an_exited_process_is_gone_for_every_reader() -> None:
    with workload(1, 1) as load, pm.Pagemap(HOST, load.pid) as pages:
        start, end = int(load.cold.starts[0]), int(load.cold.ends[0])
        assert pages.resident(start, end).all()
        load.popen.kill()
        load.popen.wait()
        with pytest.raises(ProcessGone):
            pages.read(start, end)
        with pytest.raises(ProcessGone):
            pages.scan_runs(start, end, mask=c.PAGE_IS_PRESENT)
        for read in (read_mappings, proc.read_smaps, proc.read_status, process_id):
            with pytest.raises(ProcessGone):
                read(HOST, load.pid)
        with pytest.raises(ProcessGone):
            proc.clear_refs(HOST, load.pid, proc.CLEAR_REFS_REFERENCED)


def test_a_zombie_is_gone_though_its_directory_is_still_there() -> None:
    with workload(1, 1) as load, pm.Pagemap(HOST, load.pid) as pages:
        load.popen.kill()
        os.waitid(os.P_PID, load.pid, os.WEXITED | os.WNOWAIT)
        assert HOST.proc(load.pid).exists()
        with pytest.raises(ProcessGone):
            pages.read(int(load.cold.starts[0]), int(load.cold.ends[0]))


def test_an_open_pagemap_follows_its_process_over_an_exec() -> None:
    """The file belongs to the memory of before; an empty answer must not pass for an empty process."""
    program = "import os,sys; sys.stdin.readline(); os.execvp('sleep', ['sleep', '1000'])"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    assert child.stdin is not None
    try:
        with pm.Pagemap(HOST, child.pid) as pages:
            child.stdin.write(b"\n")
            child.stdin.flush()
            until(lambda: HOST.read_text(HOST.proc(child.pid, "comm")) == "sleep\n")
            until(lambda: "[stack]" in read_mappings(HOST, child.pid).names)
            mappings = read_mappings(HOST, child.pid)
            stack = mappings.names.index("[stack]")
            start, end = int(mappings.starts[stack]), int(mappings.ends[stack])
            assert pages.resident(start, end).any()
        with pm.Pagemap(HOST, child.pid) as pages:
            assert len(pages.scan_runs(start, end, mask=c.PAGE_IS_PRESENT))
    finally:
        child.kill()
        child.wait()
        child.stdin.close()


def test_referenced_is_what_was_touched_since_clear_refs() -> None:
    """The hot mapping of a running process is referenced, its cold one is not."""
    need("smaps-referenced")
    with workload(4, 4) as load:
        proc.clear_refs(HOST, load.pid, proc.CLEAR_REFS_REFERENCED)

        def referenced(start: int) -> int:
            table = proc.read_smaps(HOST, load.pid)
            at = int(np.flatnonzero(table.starts == np.uint64(start))[0])
            return int(table.referenced_bytes[at])

        until(lambda: referenced(int(load.hot.starts[0])) >= 4 << 20)
        assert referenced(int(load.cold.starts[0])) == 0


def test_soft_dirty_is_what_was_written_since_clear_refs() -> None:
    need("soft-dirty")
    with workload(4, 4, write=True) as load, pm.Pagemap(HOST, load.pid) as pages:
        proc.clear_refs(HOST, load.pid, proc.CLEAR_REFS_SOFT_DIRTY)
        until(lambda: pm.soft_dirty(pages.read(int(load.hot.starts[0]), int(load.hot.ends[0]))).all())
        assert not pm.soft_dirty(pages.read(int(load.cold.starts[0]), int(load.cold.ends[0]))).any()


def test_frames_marked_idle_stay_so_until_touched_and_neighbours_are_left_alone() -> None:
    """Every other frame of our own pages is marked; the others must not read as idle."""
    need("idle-bitmap")
    trial = TrialPages(256)
    with pm.Pagemap(HOST, os.getpid()) as pages, IdleBitmap(HOST) as bitmap:
        frames = pm.pfns(pages.read(trial.start, trial.end))
        trial.touch(0, 256)
        bitmap.set_idle(frames[::2])
        idle = bitmap.is_idle(frames)
        assert np.count_nonzero(idle[::2]) > 64  # some may wait in a per-CPU batch, off the LRU lists
        assert not idle[1::2].any()
    trial.close()


@needs_root
def test_every_page_of_a_huge_page_has_the_same_head() -> None:
    """On a process with transparent huge pages, if the kernel gave it one."""
    need("kpageflags", "pagemap-pfns")
    program = (
        "import mmap,sys\nm=mmap.mmap(-1, 16<<20, mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS)\n"
        "m.madvise(mmap.MADV_HUGEPAGE)\nfor at in range(0, 16<<20, 4096): m[at]=1\n"
        "print(flush=True); sys.stdin.readline()"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdout.readline()
        huge_bytes = proc.smaps_rollup(HOST, child.pid)["AnonHugePages"]
        if not huge_bytes:
            pytest.skip("no transparent huge page: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled")
        spans = read_mappings(HOST, child.pid).tierable()
        with pm.Pagemap(HOST, child.pid) as pages, KpageFlags(HOST) as flags:
            words = np.concatenate([pages.read(int(a), int(b)) for a, b in zip(spans.starts, spans.ends, strict=True)])
            frames = pm.pfns(words[pm.present(words)])
            heads = flags.compound_heads(frames)
            tails = heads != frames
            # Small files of the same process may be compound too; every huge page has 511 tails.
            assert np.count_nonzero(tails) >= huge_bytes // PAGE_BYTES // 512 * 511
            assert (heads <= frames).all()
            kinds = flags.read(np.unique(heads[tails]))
            assert (kinds & np.uint64(c.KPF_COMPOUND_HEAD)).all()
            of_first = frames[(heads == heads[tails][0])]
            assert len(of_first) in {1 << order for order in range(1, 10)}
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def test_cpu_seconds_are_those_of_getrusage() -> None:
    begin = time.process_time()
    while time.process_time() - begin < 0.05:
        sum(range(1000))
    before = time.process_time()
    counted = proc.cpu_seconds(HOST, os.getpid())
    # The file counts in ticks, user and system time each.
    assert before - 0.05 <= counted <= time.process_time() + 0.05


def test_nodes_hold_memory_but_no_more_than_the_machine() -> None:
    """Not all of it on every machine: memory that a hypervisor adds later may count for the machine only."""
    total = proc.meminfo(HOST)["MemTotal"]
    nodes = numa.memory_nodes(HOST)
    assert nodes
    assert 0 < sum(numa.node_meminfo(HOST, node)["MemTotal"] for node in nodes) <= total * 1.01
    assert set(numa.node_distances(HOST)) == set(numa.online_nodes(HOST))


@needs_root
def test_our_own_frames_are_on_a_node_that_exists() -> None:
    need("pagemap-pfns", "move-pages")
    trial = TrialPages(16)
    with pm.Pagemap(HOST, os.getpid()) as pages:
        frames = pm.pfns(pages.read(trial.start, trial.end))
    addresses = pages_from(trial.start, trial.end)
    np.testing.assert_array_equal(numa.frame_nodes(HOST).of(frames), move_pages(0, addresses, None))
    trial.close()


@needs_root
def test_a_pressure_trigger_registers_and_stays_silent_on_an_idle_file() -> None:
    need("psi")
    path = Path("/proc/pressure/io")
    assert psi.read_pressure(HOST, path) is not None
    with psi.PsiTrigger(HOST, path, stall_us=1_999_000, full=True) as trigger:
        assert trigger.fileno() >= 0
        assert not trigger.wait(0.01)
    trigger.close()


@needs_root
def test_a_cgroup_of_ours_lists_its_process_and_is_known_by_its_inode() -> None:
    """The inode is the identity: a directory of the same name made later is another cgroup."""
    need("cgroup2")
    path = HOST.cgroup2_root / f"memtier-test-{os.getpid()}"
    child = subprocess.Popen(["sleep", "1000"])
    try:
        path.mkdir()
        (path / "inner").mkdir()
        cgroup = Cgroup(path, HOST)
        first = cgroup.inode
        Cgroup(path / "inner", HOST).write("cgroup.procs", child.pid)
        assert cgroup.pids() == {child.pid}
        assert cgroup.pids(recursive=False) == frozenset()
        assert cgroup.stat("cgroup.events")["populated"] == 1
        child.kill()
        child.wait()
        (path / "inner").rmdir()
        path.rmdir()
        assert cgroup.pids() == frozenset()
        path.mkdir()
        assert cgroup.inode not in (None, first)
    finally:
        child.kill()
        child.wait()
        for directory in (path / "inner", path):
            if directory.exists():
                directory.rmdir()
