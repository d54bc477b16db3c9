"""Guards on a folder dressed as a machine: what the readers make of the kernel's files, and what follows."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest

from memtier_engine.guards.base import GuardState, Reading, Thresholds
from memtier_engine.guards.config import GuardsConfig
from memtier_engine.guards.guardset import Context, GuardSet, Verdict, first_bytes
from memtier_engine.guards.processes import FactsReader
from memtier_engine.guards.readers import IN_RAM, NodeReader, PressureReader
from memtier_engine.guards.skip import ProcessFacts, SkipRules
from memtier_engine.hostfs.host import Host
from memtier_engine.model import PAGE_BYTES, MoveTask, ProcessId
from support.fakes import PROCESS, pages_of, spans
from support.hostfolder import HostFolder

MIB = 1 << 20


def pressure(avg10: float, total_us: int = 0) -> str:
    return f"some avg10={avg10:.2f} avg60=0.00 avg300=0.00 total={total_us}\n"


def swaps(*areas: tuple[str, str, int, int]) -> str:
    """(path, kind, size, used) in KiB."""
    rows = [f"{path}\t{kind}\t{size}\t{used}\t-2\n" for path, kind, size, used in areas]
    return "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n" + "".join(rows)


def block_stat(write_sectors: int) -> str:
    return f"1 0 8 0 5 0 {write_sectors} 0 0 0 0\n"


@pytest.fixture
def machine(tmp_path: Path) -> HostFolder:
    folder = HostFolder(tmp_path)
    folder.write("proc/pressure/memory", pressure(0))
    folder.write("proc/pressure/io", pressure(0))
    folder.write("proc/swaps", swaps(("/dev/vdb", "partition", 1000, 100)))
    folder.write("proc/meminfo", "MemTotal: 1000 kB\n")
    folder.write("sys/class/block/vdb/stat", block_stat(0))
    return folder


def guards(machine: HostFolder, *cgroups: Path, **settings: object) -> GuardSet:
    config = GuardsConfig(start_grace_s=0, **settings)  # type: ignore[arg-type]
    return GuardSet(config, host=machine.host, cgroups=cgroups)


def state(verdict: Verdict, name: str) -> GuardState:
    return next(each for each in verdict.states if each.name == name)


def closed(verdict: Verdict) -> list[str]:
    return [each.name for each in verdict.states if not each.open]


def test_a_machine_in_good_health_lets_everything_move(machine: HostFolder) -> None:
    verdict = guards(machine).check(0)
    assert verdict.move_allowed
    assert verdict.reasons == ()
    assert state(verdict, "swap-fill").value == 10


def test_a_kernel_without_any_of_it_switches_guards_off_and_each_says_why(tmp_path: Path) -> None:
    verdict = guards(HostFolder(tmp_path)).check(0)
    assert verdict.move_allowed
    off = {each.name: each.reason for each in verdict.states if not each.active}
    assert "CONFIG_PSI" in off["psi-memory-node"]
    assert off["swap-fill"] == off["swap-writes"] == off["compression"] == "no swap area is in use"
    assert off["psi-memory-cgroup"] == off["protection"] == "the engine's target is no cgroup"


def test_memory_pressure_on_the_node_stops_demotions_of_every_kind(machine: HostFolder) -> None:
    machine.write("proc/pressure/memory", pressure(12))
    verdict = guards(machine).check(0)
    assert closed(verdict) == ["psi-memory-node"]
    assert "/proc/pressure/memory" in verdict.reasons[0]
    allowed = [
        verdict.allows(task)
        for task in (
            MoveTask(PROCESS, spans((0, 1))),
            MoveTask(PROCESS, spans((0, 1)), 1, "idle"),
            MoveTask(PROCESS, spans((0, 1)), 0, "active"),
        )
    ]
    assert allowed == [False, False, True]


def test_io_pressure_stops_only_paging_out(machine: HostFolder) -> None:
    machine.write("proc/pressure/io", pressure(60))
    verdict = guards(machine).check(0)
    assert closed(verdict) == ["psi-io-node"]
    assert verdict.allows(MoveTask(PROCESS, spans((0, 1)), 1, "idle"))
    assert not verdict.allows(MoveTask(PROCESS, spans((0, 1))))


def test_io_pressure_does_not_matter_where_swap_is_ram(machine: HostFolder) -> None:
    machine.write("proc/pressure/io", pressure(60))
    machine.write("proc/swaps", swaps(("/dev/zram0", "partition", 1000, 10)))
    machine.write("sys/block/zram0/mm_stat", "0 0 0 0 0 0 0 0 0\n")
    verdict = guards(machine).check(0)
    assert verdict.move_allowed
    assert state(verdict, "psi-io-node").reason == IN_RAM


def test_a_sudden_stall_closes_before_the_average_shows_it(machine: HostFolder) -> None:
    """Totals are exact at each read: 150 ms of stall in one second is past 10 %."""
    guard_set = guards(machine)
    assert guard_set.check(0).move_allowed
    machine.write("proc/pressure/memory", pressure(1.5, total_us=150_000))
    verdict = guard_set.check(1.0)
    assert closed(verdict) == ["psi-memory-node"]
    assert guard_set.check(11.5).move_allowed


def test_a_second_of_disk_work_closes_only_where_it_is_nearly_all_waiting(machine: HostFolder) -> None:
    """Any build does half a second of that; 10-second averages still count from 50 %."""
    guard_set = guards(machine)
    guard_set.check(0)
    machine.write("proc/pressure/io", pressure(6, total_us=600_000))
    assert guard_set.check(1.0).move_allowed
    machine.write("proc/pressure/io", pressure(15, total_us=1_550_000))
    assert closed(guard_set.check(2.0)) == ["psi-io-node"]


def test_files_are_read_at_most_twice_a_second(machine: HostFolder) -> None:
    guard_set = guards(machine)
    guard_set.check(0)
    machine.write("proc/pressure/memory", pressure(50))
    assert guard_set.check(0.4).move_allowed
    assert not guard_set.check(0.5).move_allowed


def test_full_swap_stops_paging_out_and_room_lets_it_go_on(machine: HostFolder) -> None:
    guard_set = guards(machine)
    fills = [(0, 900), (60, 870), (120, 840)]
    states = []
    for now_s, used in fills:
        machine.write("proc/swaps", swaps(("/dev/vdb", "partition", 1000, used)))
        states.append(guard_set.check(now_s).swap_allowed)
    assert states == [False, False, True]


def test_a_removed_swap_device_switches_the_guard_off_in_mid_work(machine: HostFolder) -> None:
    guard_set = guards(machine)
    machine.write("proc/swaps", swaps(("/dev/vdb", "partition", 1000, 950)))
    assert not guard_set.check(0).swap_allowed
    machine.write("proc/swaps", swaps())
    verdict = guard_set.check(60)
    assert verdict.swap_allowed
    assert state(verdict, "swap-fill").reason == "no swap area is in use"


def test_the_days_budget_of_swap_writes_counts_what_the_device_wrote(machine: HostFolder) -> None:
    """Since the first look: 1 MiB budget, 2048 sectors of 512 bytes."""
    machine.write("sys/class/block/vdb/stat", block_stat(5_000_000))
    guard_set = guards(machine, swap_writes_bytes_per_day=MIB)
    assert guard_set.check(0).move_allowed
    machine.write("sys/class/block/vdb/stat", block_stat(5_000_000 + 2047))
    assert guard_set.check(3600).move_allowed
    machine.write("sys/class/block/vdb/stat", block_stat(5_000_000 + 2048))
    assert closed(guard_set.check(7200)) == ["swap-writes"]
    assert closed(guard_set.check(24 * 3600)) == ["swap-writes"]
    assert guard_set.check(34 * 3600).move_allowed


def test_a_program_that_starts_anew_counts_what_was_written_since_boot(machine: HostFolder) -> None:
    """Else one that is restarted every hour would have no limit. Up for two days: half of it was today's."""
    machine.write("sys/class/block/vdb/stat", block_stat(4 * 2048))
    machine.write("proc/uptime", f"{2 * 24 * 3600}.00 1000.00\n")
    guard_set = guards(machine, swap_writes_bytes_per_day=2 * MIB)
    assert closed(guard_set.check(0)) == ["swap-writes"]
    assert guard_set.check(12 * 3600).move_allowed


def test_swap_files_are_counted_by_the_kernels_own_counter(machine: HostFolder) -> None:
    machine.write("proc/swaps", swaps(("/swapfile", "file", 1000, 0)))
    machine.write("proc/vmstat", "nr_free_pages 5\npswpin 3\npswpout 100\n")
    guard_set = guards(machine)
    guard_set.check(0)
    machine.write("proc/vmstat", "nr_free_pages 5\npswpin 3\npswpout 356\n")
    assert state(guard_set.check(1), "swap-writes").value == pytest.approx(1 / 1024)


def unmeasured(machine: HostFolder) -> GuardSet:
    """The guards of an engine that moved memory and does not know what it takes: the node's sizes count."""
    guard_set = guards(machine)
    guard_set.stored(64 * MIB, None, 0)
    return guard_set


def test_memory_that_does_not_compress_is_not_paged_out_to_zram(machine: HostFolder) -> None:
    machine.write("proc/swaps", swaps(("/dev/zram0", "partition", 1 << 20, 10)))
    machine.write("sys/block/zram0/mm_stat", f"{100 * MIB} {95 * MIB} {96 * MIB} 0 0 0 0 0 0\n")
    verdict = unmeasured(machine).check(0)
    assert closed(verdict) == ["compression"]
    assert state(verdict, "compression").value == pytest.approx(100 / 96)


def test_a_little_in_zram_says_nothing(machine: HostFolder) -> None:
    machine.write("proc/swaps", swaps(("/dev/zram0", "partition", 1 << 20, 10)))
    machine.write("sys/block/zram0/mm_stat", f"{10 * MIB} {10 * MIB} {10 * MIB} 0 0 0 0 0 0\n")
    verdict = unmeasured(machine).check(0)
    assert verdict.move_allowed
    assert "too little to tell" in state(verdict, "compression").reason


def test_the_worst_of_all_that_compress_counts(machine: HostFolder) -> None:
    """Ten to one in zswap does not hide what grows in zram."""
    machine.write("proc/swaps", swaps(("/dev/zram0", "partition", 1 << 20, 10)))
    machine.write("sys/block/zram0/mm_stat", f"{100 * MIB} {95 * MIB} {100 * MIB} 0 0 0 0 0 0\n")
    machine.write("proc/meminfo", f"MemTotal: 1 kB\nZswap: {100 << 10} kB\nZswapped: {1000 << 10} kB\n")
    verdict = unmeasured(machine).check(0)
    assert closed(verdict) == ["compression"]
    assert "zram0" in state(verdict, "compression").reason


def test_zswap_counts_by_meminfo(machine: HostFolder) -> None:
    machine.write("proc/meminfo", f"MemTotal: 1 kB\nZswap: {50 << 10} kB\nZswapped: {200 << 10} kB\n")
    assert state(unmeasured(machine).check(0), "compression").value == 4


RANDOM = f"{1000 * MIB} {1000 * MIB} {1000 * MIB} 0 0 0 0 0 0\n"


def test_what_others_stored_does_not_stop_an_engine_whose_own_memory_compresses(machine: HostFolder) -> None:
    """Neither before it has stored anything nor after."""
    machine.write("proc/swaps", swaps(("/dev/zram0", "partition", 1 << 20, 10)))
    machine.write("sys/block/zram0/mm_stat", RANDOM)
    good, bad = guards(machine), guards(machine)
    assert good.check(0).move_allowed
    for now_s in range(1, 21):
        good.stored(MIB, MIB // 3, now_s)
        bad.stored(MIB, MIB, now_s)
    assert closed(good.check(21)) == []
    verdict = bad.check(21)
    assert closed(verdict) == ["compression"]
    assert "its own pages" in verdict.reasons[0]


def test_guards_decide_anew_as_soon_as_something_could_close_one(
    machine: HostFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two batches nothing mostly does. How well they compress changes: no matter while it is good."""
    machine.write("proc/swaps", swaps(("/dev/zram0", "partition", 1 << 20, 10)))
    machine.write("sys/block/zram0/mm_stat", RANDOM)
    guard_set = guards(machine)
    decided: list[float] = []
    update = guard_set.guards[0].update

    def counting(readings: Mapping[str, Reading], now_s: float) -> GuardState:
        decided.append(now_s)
        return update(readings, now_s)

    monkeypatch.setattr(guard_set.guards[0], "update", counting)
    guard_set.stored(64 * MIB, 20 * MIB, 0)
    assert closed(guard_set.check(0)) == []
    for now_s in (0.1, 0.2, 0.3):
        guard_set.stored(MIB, MIB, now_s)
        assert closed(guard_set.check(now_s)) == []
    assert decided == [0], "nothing to decide"
    guard_set.stored(400 * MIB, 400 * MIB, 0.4)
    assert closed(guard_set.check(0.4)) == ["compression"]
    assert closed(guard_set.check(0.5)) == ["compression"]
    assert decided == [0, 0.4, 0.5], "while one is closed, time alone may open it"


def test_memory_that_does_not_compress_is_tried_again_ever_more_rarely(machine: HostFolder) -> None:
    """16 MiB tell. Within a day of random data a few such trials go out, and what compresses then goes out at once."""
    guard_set = guards(machine)
    out = 0
    trials: list[int] = []
    for now_s in range(0, 24 * 3600, 10):
        before, verdict = out, guard_set.check(now_s)
        if verdict.swap_allowed:
            guard_set.stored(8 * MIB, 8 * MIB, now_s)
            out += 8 * MIB
            if not trials or now_s - trials[-1] > 60:
                trials.append(now_s)
        assert out - before <= 8 * MIB
    assert 3 <= len(trials) <= 9
    waits = [after - before for before, after in pairwise(trials)]
    assert all(after > 1.5 * before for before, after in pairwise(waits))
    now_s = 24 * 3600
    while not guard_set.check(now_s).swap_allowed:
        now_s += 600
    guard_set.stored(64 * MIB, MIB, now_s)
    assert guard_set.check(now_s + 1).move_allowed


def test_a_little_of_its_own_says_nothing(machine: HostFolder) -> None:
    machine.write("proc/swaps", swaps(("/dev/zram0", "partition", 1 << 20, 10)))
    machine.write("sys/block/zram0/mm_stat", RANDOM)
    guard_set = guards(machine)
    guard_set.stored(15 * MIB, 15 * MIB, 0)
    verdict = guard_set.check(1)
    assert verdict.move_allowed
    assert "too little" in state(verdict, "compression").reason


def vmstat(**counts: int) -> str:
    return "".join(f"{name} {count}\n" for name, count in ({"nr_free_pages": 5, "pswpout": 0} | counts).items())


ROOM = "MemTotal: 1000 kB\nMemAvailable: 500 kB\n"


def test_stalls_of_a_cgroup_at_its_own_limit_do_not_close_the_nodes_guard(machine: HostFolder) -> None:
    """Half the memory is available and nobody reclaims from the node: the value is shown, and closes nothing."""
    machine.write("proc/meminfo", ROOM)
    machine.write("proc/vmstat", vmstat(allocstall_normal=7, pgscan_direct=100))
    guard_set = guards(machine)
    guard_set.check(0)
    machine.write("proc/pressure/memory", pressure(60, total_us=10_000_000))
    verdict = guard_set.check(5)
    assert verdict.move_allowed
    assert state(verdict, "psi-memory-node").value == 60


@pytest.mark.parametrize(
    ("counts", "memory"),
    [
        ({"allocstall_normal": 8, "pgscan_direct": 100}, ROOM),
        ({"allocstall_normal": 7, "pgscan_direct": 133}, ROOM),
        ({"allocstall_normal": 7, "pgscan_direct": 100}, "MemTotal: 1000 kB\nMemAvailable: 49 kB\n"),
        ({}, ROOM),
        ({"allocstall_normal": 7, "pgscan_direct": 100}, "MemTotal: 1000 kB\n"),
    ],
)
def test_stalls_of_a_node_that_is_short_close_it_and_so_do_those_of_which_it_cannot_be_told(
    machine: HostFolder, counts: dict[str, int], memory: str
) -> None:
    machine.write("proc/meminfo", ROOM)
    machine.write("proc/vmstat", vmstat(allocstall_normal=7, pgscan_direct=100))
    guard_set = guards(machine)
    guard_set.check(0)
    machine.write("proc/pressure/memory", pressure(60, total_us=10_000_000))
    machine.write("proc/vmstat", vmstat(**counts))
    machine.write("proc/meminfo", memory)
    assert closed(guard_set.check(5)) == ["psi-memory-node"]


def test_a_node_that_was_short_opens_again_when_it_is_not(machine: HostFolder) -> None:
    """The cgroup at its limit goes on stalling."""
    machine.write("proc/meminfo", ROOM)
    machine.write("proc/vmstat", vmstat(allocstall_normal=7))
    guard_set = guards(machine)
    guard_set.check(0)
    machine.write("proc/pressure/memory", pressure(60))
    machine.write("proc/vmstat", vmstat(allocstall_normal=9))
    assert not guard_set.check(5).move_allowed
    assert [guard_set.check(now_s).move_allowed for now_s in (10, 16, 26, 27)] == [False, False, True, True]


ZRAM = ("/dev/zram0", "partition", 1 << 20, 10)


def zram(machine: HostFolder, *, written_mib: int, backing: str | None = None, backing_mib: int = 0) -> None:
    machine.write("sys/class/block/zram0/stat", block_stat(written_mib * 2048))
    machine.write("sys/block/zram0/mm_stat", "0 0 0 0 0 0 0 0 0\n")
    if backing is not None:
        machine.write("sys/block/zram0/backing_dev", f"{backing}\n")
        machine.write("sys/block/zram0/bd_stat", f"    10     20  {backing_mib * 256}\n")


def written_mib(guard_set: GuardSet, now_s: float) -> float | None:
    value = state(guard_set.check(now_s), "swap-writes").value
    return None if value is None else value * 1024


def test_what_goes_to_zram_beside_a_file_is_not_written_to_the_file(machine: HostFolder) -> None:
    machine.write("proc/swaps", swaps(ZRAM, ("/swapfile", "file", 1000, 0)))
    machine.write("proc/vmstat", vmstat(pswpout=256 * 1000))
    zram(machine, written_mib=900)
    guard_set = guards(machine)
    guard_set.check(0)
    machine.write("proc/vmstat", vmstat(pswpout=256 * 1500))
    zram(machine, written_mib=1390)
    assert written_mib(guard_set, 1) == pytest.approx(10)


def test_since_boot_too_a_file_counts_without_what_went_to_zram(machine: HostFolder) -> None:
    machine.write("proc/uptime", f"{24 * 3600}.00 1000.00\n")
    machine.write("proc/swaps", swaps(ZRAM, ("/swapfile", "file", 1000, 0)))
    machine.write("proc/vmstat", vmstat(pswpout=256 * 1000))
    zram(machine, written_mib=900)
    assert written_mib(guards(machine), 0) == pytest.approx(100)


def test_several_files_and_a_partition_count_once(machine: HostFolder) -> None:
    files = [("/swap1", "file", 1000, 0), ("/swap2", "file", 1000, 0), ("/dev/vdb", "partition", 1000, 100)]
    machine.write("proc/swaps", swaps(*files))
    machine.write("proc/vmstat", vmstat(pswpout=0))
    guard_set = guards(machine)
    guard_set.check(0)
    machine.write("proc/vmstat", vmstat(pswpout=256 * 30))
    machine.write("sys/class/block/vdb/stat", block_stat(20 * 2048))
    assert written_mib(guard_set, 1) == pytest.approx(30)


def test_zram_with_a_disk_behind_it_counts_what_went_to_the_disk(machine: HostFolder) -> None:
    machine.write("proc/swaps", swaps(ZRAM))
    zram(machine, written_mib=0, backing="/dev/vdc")
    guard_set = guards(machine)
    guard_set.check(0)
    zram(machine, written_mib=500, backing="/dev/vdc", backing_mib=7)
    assert written_mib(guard_set, 1) == pytest.approx(7)


@pytest.mark.parametrize("backing", [None, "none"])
def test_zram_without_a_disk_behind_it_is_ram(machine: HostFolder, backing: str | None) -> None:
    machine.write("proc/swaps", swaps(ZRAM))
    zram(machine, written_mib=100, backing=backing)
    assert state(guards(machine).check(0), "swap-writes").reason == IN_RAM


def test_a_zram_that_is_removed_and_comes_back_empty_makes_no_writes(machine: HostFolder) -> None:
    machine.write("proc/swaps", swaps(ZRAM, ("/swapfile", "file", 1000, 0)))
    machine.write("proc/vmstat", vmstat(pswpout=256 * 1000))
    zram(machine, written_mib=1000)
    guard_set = guards(machine)
    guard_set.check(0)
    machine.write("proc/swaps", swaps(("/swapfile", "file", 1000, 0)))
    guard_set.check(1)
    machine.write("proc/swaps", swaps(ZRAM, ("/swapfile", "file", 1000, 0)))
    zram(machine, written_mib=3)
    machine.write("proc/vmstat", vmstat(pswpout=256 * 1003))
    assert written_mib(guard_set, 2) == pytest.approx(3)  # the interval in which it came is not told apart
    zram(machine, written_mib=103)
    machine.write("proc/vmstat", vmstat(pswpout=256 * 1103))
    assert written_mib(guard_set, 3) == pytest.approx(3)


def test_what_a_cgroup_is_guaranteed_is_shared_by_all_tasks_of_a_decision(machine: HostFolder) -> None:
    """2 MiB above its memory.low, for two processes together, whichever comes first."""
    path = machine.cgroup("sys/fs/cgroup/a", memory_current=str(10 * MIB), memory_min="0", memory_low=str(8 * MIB))
    guard_set = guards(machine, path)
    tasks = [MoveTask(ProcessId(pid, 1), spans((0, 384))) for pid in (1, 2, 3)]
    admitted = guard_set.admit(tasks, guard_set.check(0), 0)
    assert [each.spans.total_bytes for each in admitted] == [384 * PAGE_BYTES, 128 * PAGE_BYTES]


def test_refaults_of_the_last_minute_are_a_share_of_resident_memory(machine: HostFolder) -> None:
    guard_set = guards(machine)
    assert guard_set.check(0, Context(100 * MIB, 0)).move_allowed
    assert guard_set.check(10, Context(100 * MIB, 4 * MIB)).move_allowed
    verdict = guard_set.check(20, Context(100 * MIB, 5 * MIB))
    assert closed(verdict) == ["refaults"]
    assert not guard_set.check(21).move_allowed
    assert guard_set.check(90, Context(100 * MIB, 5 * MIB)).move_allowed


def test_a_few_pages_of_a_tiny_process_are_no_refault_rate(machine: HostFolder) -> None:
    guard_set = guards(machine)
    guard_set.check(0, Context(40 * PAGE_BYTES, 0))
    assert guard_set.check(10, Context(40 * PAGE_BYTES, 40 * PAGE_BYTES)).move_allowed


def test_what_the_cgroup_is_guaranteed_stays_with_it(machine: HostFolder) -> None:
    """memory.current 10 MiB of which memory.low guarantees 8: 2 MiB may go, at 8 none."""
    path = machine.cgroup("sys/fs/cgroup/a", memory_current=str(10 * MIB), memory_min="0", memory_low=str(8 * MIB))
    guard_set = guards(machine, path)
    verdict = guard_set.check(0)
    assert verdict.out_bytes_max == 2 * MIB
    task = MoveTask(PROCESS, spans((0, 5 * 256)))
    assert [each.spans.total_bytes for each in guard_set.admit([task], verdict, 0)] == [2 * MIB]
    machine.cgroup("sys/fs/cgroup/a", memory_current=str(8 * MIB), memory_min="0", memory_low=str(8 * MIB))
    verdict = guard_set.check(60)
    assert closed(verdict) == ["protection"]
    assert guard_set.admit([task], verdict, 60) == []


def test_a_cgroup_whose_memory_is_all_guaranteed_loses_nothing(machine: HostFolder) -> None:
    path = machine.cgroup("sys/fs/cgroup/a", memory_current=str(10 * MIB), memory_min="max", memory_low="0")
    assert closed(guards(machine, path).check(0)) == ["protection"]


def test_the_worst_of_several_cgroups_counts(machine: HostFolder) -> None:
    calm = machine.cgroup("sys/fs/cgroup/a", memory_pressure=pressure(0))
    busy = machine.cgroup("sys/fs/cgroup/b", memory_pressure=pressure(6))
    verdict = guards(machine, calm, busy).check(0)
    assert closed(verdict) == ["psi-memory-cgroup"]
    assert "/sys/fs/cgroup/b/memory.pressure" in verdict.reasons[0]


def test_a_cgroup_that_is_removed_leaves_its_guards_off(machine: HostFolder) -> None:
    path = machine.cgroup("sys/fs/cgroup/a", memory_pressure=pressure(6))
    guard_set = guards(machine, path)
    assert not guard_set.check(0).move_allowed
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    assert guard_set.check(60).move_allowed
    machine.cgroup("sys/fs/cgroup/a", memory_pressure=pressure(7))
    assert closed(guard_set.check(61)) == ["psi-memory-cgroup"]


def test_engines_share_the_nodes_reader(machine: HostFolder) -> None:
    config = GuardsConfig(start_grace_s=0)
    node = NodeReader(machine.host, config)
    sets = [GuardSet(config, host=machine.host, node=node) for _ in range(3)]
    machine.write("proc/pressure/memory", pressure(12))
    assert [closed(each.check(0)) for each in sets] == [["psi-memory-node"]] * 3


def test_without_a_configured_grace_it_is_two_scan_intervals(machine: HostFolder) -> None:
    guard_set = GuardSet(host=machine.host, scan_interval_s=3)
    assert [guard_set.check(now_s).move_allowed for now_s in (0, 5.9, 6)] == [False, False, True]


def status(rss_mib: float, **fields: object) -> str:
    lines = {"Name": "work", "Umask": "0022", "VmRSS": f"{int(rss_mib * 1024)} kB", "TracerPid": 0, "CoreDumping": 0}
    return "".join(f"{name}:\t{value}\n" for name, value in (lines | fields).items())


def thread_stat(policy: int) -> str:
    """Field 41 is the policy; the name holds what confuses a naive split."""
    return "4242 (a) b (c) " + " ".join(["S", *["0"] * 37, str(policy), "0"]) + "\n"


def test_facts_of_a_process_come_from_its_status_and_threads(machine: HostFolder) -> None:
    machine.write("proc/4242/status", status(10, Name="audio", TracerPid=9, CoreDumping=1))
    machine.write("proc/4242/task/4242/stat", thread_stat(0))
    machine.write("proc/4242/task/4243/stat", thread_stat(1))
    facts = FactsReader(machine.host).read(PROCESS, 0)
    assert facts == ProcessFacts("audio", 10 * MIB, 9, True, 1)


def test_a_process_that_is_gone_has_no_facts(machine: HostFolder) -> None:
    assert FactsReader(machine.host).read(PROCESS, 0) is None


def test_nothing_is_taken_from_a_skipped_process_and_the_reason_is_kept(machine: HostFolder) -> None:
    machine.write("proc/4242/status", status(100, TracerPid=9))
    guard_set = guards(machine)
    tasks = [MoveTask(PROCESS, spans((0, 10))), MoveTask(PROCESS, spans((20, 30)), 1, "idle")]
    promotion = MoveTask(PROCESS, spans((40, 50)), 0, "active")
    verdict = guard_set.check(0)
    assert guard_set.admit([*tasks, promotion], verdict, 0) == [promotion]
    assert guard_set.skipped == {PROCESS: "is traced by pid 9"}


def test_a_process_keeps_its_minimum(machine: HostFolder) -> None:
    """Of 5 MiB it may lose 1, over all its tasks together."""
    machine.write("proc/4242/status", status(5))
    guard_set = guards(machine, skip=SkipRules(rss_least_bytes=4 * MIB))
    tasks = [MoveTask(PROCESS, spans((0, 200))), MoveTask(PROCESS, spans((300, 400), (500, 600)))]
    admitted = guard_set.admit(tasks, guard_set.check(0), 0)
    assert [pages_of(task.spans) for task in admitted] == [[(0, 200)], [(300, 356)]]


@pytest.mark.parametrize(
    ("limit_pages", "expected"),
    [(0, []), (1, [(0, 1)]), (2, [(0, 2)]), (3, [(0, 2), (5, 6)]), (4, [(0, 2), (5, 7)]), (9, [(0, 2), (5, 7)])],
)
def test_the_first_bytes_of_spans_are_whole_pages(limit_pages: int, expected: list[tuple[int, int]]) -> None:
    assert pages_of(first_bytes(spans((0, 2), (5, 7)), limit_pages * PAGE_BYTES + 7)) == expected


def test_what_a_new_trigger_says_of_the_time_before_it_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FiringTrigger:
        def __init__(self, *_: object, **__: object) -> None: ...

        def wait(self, timeout_s: float) -> bool:
            return True

        def close(self) -> None: ...

    path = tmp_path / "memory.pressure"
    path.write_text("")  # no size, as a kernel's file
    monkeypatch.setattr("memtier_engine.guards.readers.PsiTrigger", FiringTrigger)
    monkeypatch.setattr("memtier_engine.guards.readers.read_pressure", lambda host, path: None)
    reader = PressureReader(Host(tmp_path), path, Thresholds(close_at=10, open_at=5), trigger=True)
    reader.read(100.0)
    assert reader.has_trigger
    assert [reader.poll(now_s) for now_s in (100.1, 101.9, 102.1)] == [False, False, True]
    reader.close()
