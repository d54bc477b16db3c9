"""Taskstats records of all versions, and why there may be none."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from pyroute2.netlink.taskstats import TStatsBase

from memtier_engine.errors import Unavailable
from memtier_engine.hostfs.taskstats import SwapInDelay, TaskStats, decode_swap_in
from support.hostfolder import HostFolder

RECORDED_16 = (
    "100000000000000000000000000000006800000000000000d2f4e60000000000"
    "0000000000000000000000000000000000080000000000002330450000000000"
)
"""The first 64 bytes of what Linux 6.18 said of a process that had 2048 pages read back from zram."""


def offset(fields: tuple[tuple[str, str], ...], name: str) -> int:
    """Where a field is in a C struct of these."""
    names = [each for each, _ in fields]
    formats = [form for _, form in fields]
    return struct.calcsize("".join(formats[: names.index(name)]) + "0Q")


@pytest.mark.parametrize(
    ("version", "fields"),
    [(8, TStatsBase.tstats_vB.fields), (14, TStatsBase.tstats_vB.fields), (15, TStatsBase.tstats_v15.fields)],
)
def test_the_delay_is_where_others_find_it_too(version: int, fields: tuple[tuple[str, str], ...]) -> None:
    record = bytearray(500)
    struct.pack_into("=H", record, 0, version)
    struct.pack_into("=Q", record, offset(fields, "swapin_count"), 1234)
    struct.pack_into("=Q", record, offset(fields, "swapin_delay_total"), 2_500_000_000)
    assert decode_swap_in(bytes(record)) == SwapInDelay(1234, 2.5)


def test_a_record_of_a_kernel_of_today_is_read() -> None:
    assert decode_swap_in(bytes.fromhex(RECORDED_16)) == SwapInDelay(2048, 0.004534307)


@pytest.mark.parametrize("record", [b"", b"\x10", bytes(40), struct.pack("=H", 15) + bytes(80)])
def test_a_record_that_is_too_short_is_refused(record: bytes) -> None:
    with pytest.raises(ValueError, match="taskstats record"):
        decode_swap_in(record)


def test_without_the_switch_it_says_which_kernel_has_it(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="task_delayacct") as raised:
        TaskStats(HostFolder(tmp_path).host)
    assert "CONFIG_TASK_DELAY_ACCT" in str(raised.value)


def test_switched_off_it_says_how_to_switch_it_on(tmp_path: Path) -> None:
    folder = HostFolder(tmp_path)
    folder.write("proc/sys/kernel/task_delayacct", "0\n")
    with pytest.raises(Unavailable, match=r"/proc/sys/kernel/task_delayacct is 0 \(sysctl kernel.task_delayacct=1"):
        TaskStats(folder.host)
