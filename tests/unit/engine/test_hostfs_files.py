"""Text files of /proc and /sys in a dressed folder: maps, smaps, status, swaps, PSI, NUMA, errors."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from memtier_engine.errors import KernelCallError, ProcessGone, Unavailable
from memtier_engine.hostfs import numa, proc, psi
from memtier_engine.hostfs.kernel_config import read_kernel_config
from memtier_engine.hostfs.maps import process_id, read_mappings, read_start_ticks
from support.hostfolder import HostFolder

MAPS = """\
00400000-00401000 r-xp 00000000 fe:00 1234                               /usr/bin/work
00601000-00602000 rw-p 00001000 fe:00 1234                               /usr/bin/work
01000000-01021000 rw-p 00000000 00:00 0                                  [heap]
7f0000000000-7f0000100000 rw-p 00000000 00:00 0 $
7f0000100000-7f0000200000 ---p 00000000 00:00 0 $
7f0000200000-7f0000300000 rw-s 00000000 00:01 77                         /dev/zero (deleted)
7f0000300000-7f0000400000 rw-p 00000000 00:00 0                          [anon:my arena]
7f0000400000-7f0000500000 r--p 00000000 fe:00 99                         /lib/a file with blanks.so
7f0000500000-7f0000700000 rw-p 00000000 00:10 55                         /anon_hugepage (deleted)
7f0000700000-7f0000701000 rw-p 00000000 00:05 66                         /dev/vfio/1
7f0000800000-7f0000900000 r-xp 00000000 00:00 0 $
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
7ffc00100000-7ffc00104000 r--p 00000000 00:00 0                          [vvar]
7ffc00104000-7ffc00106000 r-xp 00000000 00:00 0                          [vdso]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
""".replace("$", "")  # the kernel ends lines without a name with a blank


@pytest.fixture
def folder(tmp_path: Path) -> HostFolder:
    return HostFolder(tmp_path)


def test_maps_become_columns(folder: HostFolder) -> None:
    folder.process(7, maps=MAPS)
    mappings = read_mappings(folder.host, 7)
    assert len(mappings) == 15
    assert mappings.starts[0] == 0x400000
    assert mappings.ends[-1] == 0xFFFFFFFFFF601000
    assert mappings.names[2] == "[heap]"
    assert mappings.names[7] == "/lib/a file with blanks.so"
    assert mappings.names[3] == ""
    assert mappings.shared.nonzero()[0].tolist() == [5]
    assert mappings.inodes[0] == 1234
    assert not mappings.readable[4]
    assert mappings.writable[1]


def test_only_private_memory_that_can_be_paged_out_is_tierable(folder: HostFolder) -> None:
    """Heap, stack, anonymous, named anonymous, code made at run time, and private writable file mappings."""
    folder.process(7, maps=MAPS)
    spans = read_mappings(folder.host, 7).tierable()
    assert [hex(start) for start in spans.starts] == [
        "0x601000",
        "0x1000000",
        "0x7f0000000000",
        "0x7f0000300000",
        "0x7f0000800000",
        "0x7ffc00000000",
    ]


def test_a_process_without_mappings_has_none(folder: HostFolder) -> None:
    folder.process(7)
    mappings = read_mappings(folder.host, 7)
    assert len(mappings) == 0
    assert len(mappings.tierable()) == 0


def test_a_name_with_blanks_and_parentheses_does_not_shift_the_fields_of_stat(folder: HostFolder) -> None:
    """A process chooses its own name: `) S 0 0` must not forge a start time."""
    folder.process(7, name="a) S 1 (b", start_ticks=4711)
    assert read_start_ticks(folder.host, 7) == 4711
    assert process_id(folder.host, 7) == (7, 4711)
    assert proc.cpu_seconds(folder.host, 7) == pytest.approx(3.0)


@pytest.mark.parametrize("state", ["Z", "X"])
def test_a_zombie_is_gone(folder: HostFolder, state: str) -> None:
    folder.process(7, state=state)
    with pytest.raises(ProcessGone):
        process_id(folder.host, 7)


def test_a_missing_process_is_gone_but_a_missing_file_of_a_living_one_is_not(folder: HostFolder) -> None:
    folder.process(7)
    with pytest.raises(ProcessGone, match="process 8 exited"):
        read_mappings(folder.host, 8)
    with pytest.raises(KernelCallError, match="ENOENT") as caught:
        proc.read_smaps(folder.host, 7)
    assert not isinstance(caught.value, ProcessGone)


SMAPS_ROW = """\
{start:x}-{end:x} rw-p 00000000 00:00 0                          {name}
Size:                 64 kB
KernelPageSize:        4 kB
Rss:                  {rss} kB
Pss:                  {rss} kB
Referenced:           {referenced} kB
Anonymous:            {rss} kB
AnonHugePages:         0 kB
Swap:                 {swap} kB
SwapPss:              99 kB
Locked:                0 kB
THPeligible:           0
VmFlags: rd wr mr mw me ac {flags}
"""


def test_smaps_becomes_one_row_per_mapping(folder: HostFolder) -> None:
    rows = [
        SMAPS_ROW.format(start=0x10000, end=0x20000, name="[heap]", rss=64, referenced=12, swap=0, flags="sd"),
        SMAPS_ROW.format(start=0x30000, end=0x40000, name="", rss=8, referenced=0, swap=56, flags="lo sd"),
        SMAPS_ROW.format(start=0x50000, end=0x60000, name="/x Rss: 1 kB", rss=0, referenced=0, swap=0, flags="ht"),
    ]
    folder.process(7)
    folder.write("proc/7/smaps", "".join(rows))
    table = proc.read_smaps(folder.host, 7)
    assert table.starts.tolist() == [0x10000, 0x30000, 0x50000]
    assert table.rss_bytes.tolist() == [65536, 8192, 0]
    assert table.referenced_bytes.tolist() == [12288, 0, 0]
    assert table.swap_bytes.tolist() == [0, 56 * 1024, 0]
    assert table.anonymous_bytes.tolist() == [65536, 8192, 0]
    assert table.locked.tolist() == [False, True, False]
    assert table.hugetlb.tolist() == [False, False, True]


def test_a_kernel_thread_has_no_sizes(folder: HostFolder) -> None:
    folder.write("proc/7/status", "Name:\tkswapd0\nState:\tS (sleeping)\n")
    assert proc.read_status(folder.host, 7) == proc.ProcessStatus("kswapd0", None, None, None)
    folder.write("proc/8/status", "Name:\twork\nVmSize:\t  20 kB\nVmRSS:\t      12 kB\nVmSwap:\t       4 kB\n")
    assert proc.read_status(folder.host, 8) == proc.ProcessStatus("work", 20480, 12288, 4096)
    folder.write("proc/9/status", "Name:\twork\nVmRSS:\t      12 kB\nRssAnon:\t 2 kB\nRssShmem:\t 8 kB\n")
    assert proc.read_status(folder.host, 9).rss_shmem == 8192


def test_swap_areas_are_read_even_with_blanks_in_a_name(folder: HostFolder) -> None:
    head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    folder.write("proc/swaps", f"{head}/dev/zram0  partition\t1024\t\t24\t\t-2\n/a b  file\t2048\t\t0\t\t5\n")
    zram, file = proc.read_swaps(folder.host)
    assert zram == proc.SwapArea("/dev/zram0", "partition", 1 << 20, 24 << 10, -2)
    assert zram.free_bytes == 1000 << 10
    assert (file.path, file.priority) == ("/a b", 5)
    folder.write("proc/swaps", head)
    assert proc.read_swaps(folder.host) == []


def test_pressure_lines_are_numbers_in_percent_and_microseconds() -> None:
    text = "some avg10=1.50 avg60=0.25 avg300=0.00 total=12345\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=99\n"
    pressure = psi.parse_pressure(text)
    assert pressure.some == psi.PressureLine(1.5, 0.25, 0.0, 12345)
    assert pressure.full is not None
    assert pressure.full.total_us == 99
    assert psi.parse_pressure(text.splitlines()[0]).full is None
    with pytest.raises(ValueError, match="no 'some' line"):
        psi.parse_pressure("")


@pytest.mark.parametrize(
    ("text", "numbers"), [("0\n", (0,)), ("0-3", (0, 1, 2, 3)), ("0,2-3,8", (0, 2, 3, 8)), ("\n", ())]
)
def test_kernel_lists_of_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert numa.parse_id_list(text) == numbers


def test_a_machine_without_numa_has_node_0(folder: HostFolder) -> None:
    assert numa.online_nodes(folder.host) == (0,)
    assert len(numa.frame_nodes(folder.host).of(np.array([5], np.uint64))) == 1


def test_frames_belong_to_the_node_of_their_memory_block(folder: HostFolder) -> None:
    """Blocks of 128 MiB: 0-1 on node 0, 3 on node 1, 2 on none."""
    folder.write("sys/devices/system/memory/block_size_bytes", "8000000\n")
    folder.write("sys/devices/system/node/online", "0-1\n")
    for node, block in ((0, 0), (0, 1), (1, 3)):
        folder.write(f"sys/devices/system/node/node{node}/memory{block}/state", "online")
    folder.write("sys/devices/system/node/node1/meminfo", "Node 1 MemTotal:     131072 kB\nNode 1 MemFree:  4 kB\n")
    folder.write("sys/devices/system/node/node0/distance", "10 20\n")
    folder.write("sys/devices/system/node/node1/distance", "20 10\n")
    frames = np.array([0, 32767, 65535, 65536, 98304, 131071, 131072], np.uint64)
    assert numa.frame_nodes(folder.host).of(frames).tolist() == [0, 0, 0, -1, 1, 1, -1]
    assert numa.node_meminfo(folder.host, 1) == {"MemTotal": 128 << 20, "MemFree": 4096}
    assert numa.node_distances(folder.host) == {0: {0: 10, 1: 20}, 1: {0: 20, 1: 10}}


def test_frames_belong_to_the_node_of_their_zone_where_there_are_no_blocks(folder: HostFolder) -> None:
    zones = "".join(
        f"Node {node}, zone   {zone}\n  pages free     1\n        spanned  {spanned}\n  start_pfn:           {first}\n"
        for node, zone, first, spanned in (
            (0, "DMA", 1, 4095),
            (0, "Normal", 4096, 4096),
            (1, "Normal", 8192, 64),
            (1, "Movable", 0, 0),
        )
    )
    folder.write("proc/zoneinfo", zones)
    frames = np.array([0, 1, 8191, 8192, 8255, 8256], np.uint64)
    assert numa.frame_nodes(folder.host).of(frames).tolist() == [-1, 0, 0, 1, 1, -1]


def test_kernel_options_are_found_for_the_running_release(folder: HostFolder) -> None:
    folder.write("proc/sys/kernel/osrelease", "6.1.0-test\n")
    assert read_kernel_config(folder.host).has("CONFIG_ZRAM") is None
    folder.write("boot/config-6.1.0-test", "CONFIG_ZRAM=m\n# CONFIG_DAMON is not set\nCONFIG_SWAP=y\n")
    config = read_kernel_config(folder.host)
    assert config.has("CONFIG_SWAP") is True
    assert config.is_module("CONFIG_ZRAM")
    assert config.missing("CONFIG_DAMON") == "the kernel is built without CONFIG_DAMON (/boot/config-6.1.0-test)"


def test_numbers_that_are_none_are_an_error_that_names_the_file(folder: HostFolder) -> None:
    path = folder.write("sys/x", "many\n")
    with pytest.raises(KernelCallError, match="read /sys/x: 'many' is no number") as caught:
        folder.host.read_int(path)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("mount", ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/mnt/a b"])
def test_cgroup_v2_is_found_wherever_it_is_mounted(folder: HostFolder, mount: str) -> None:
    path = folder.cgroup2(mount)
    folder.write("proc/self/mounts", f"cgroup2 {mount.replace(' ', chr(92) + '040')} cgroup2 rw 0 0\n")
    assert folder.host.cgroup2_root == path


def test_a_machine_without_cgroup_v2_says_how_to_mount_it(folder: HostFolder) -> None:
    folder.write("proc/self/mounts", "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n")
    with pytest.raises(Unavailable, match="mount -t cgroup2"):
        _ = folder.host.cgroup2_root


def test_writing_never_creates_a_kernel_file(folder: HostFolder) -> None:
    with pytest.raises(KernelCallError):
        folder.host.write(folder.host.path("sys/nothing"), "1")
    assert not (folder.root / "sys").exists()


def test_a_thread_is_near_a_node_for_as_long_as_it_wants_and_where_it_may_not_as_before() -> None:
    before = os.sched_getaffinity(0)
    one = {min(before)}
    with numa.near(one | {4095}):
        assert os.sched_getaffinity(0) == one
    assert os.sched_getaffinity(0) == before
    for nowhere in (frozenset[int](), {4095}):
        with numa.near(nowhere):
            assert os.sched_getaffinity(0) == before
