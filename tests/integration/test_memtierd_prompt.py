"""`memtierd -prompt` on a real process: its commands do what they say to memory that the test knows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.model import PAGE_BYTES
from memtier_engine.trackers.registry import why_not
from support.prompt import PROMPT, Daemon, memtierd
from support.swap import temporary_zram_swap
from support.toucher import Toucher, toucher
from support.waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")
PAGES = 2048
LEFT_IN_BATCHES = min(PAGES // 4, 32 * (os.cpu_count() or 1))
"""Pages touched last lie in per-CPU batches, up to 31 on each CPU the process was on: they cannot be paged out yet."""


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toucher]:
    """8 MiB of anonymous memory, all of it written."""
    with toucher("anonymous", PAGES, tmp_path_factory.mktemp("toucher")) as load:
        load.write(range(PAGES))
        yield load


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[Daemon]:
    with memtierd() as daemon:
        yield daemon


def mapping(child: Toucher) -> str:
    """Where the memory of the test is, as the prompt writes it."""
    return f"{child.address:x}-{child.address + PAGES * PAGE_BYTES:x} ({PAGES * PAGE_BYTES} B)"


def wanted(child: Toucher) -> str:
    return f"{child.address:x}+{PAGES * PAGE_BYTES >> 10}k"


def swapped_pages(child: Toucher) -> int:
    spans = child.spans
    with Pagemap(Host(), child.process.pid) as pagemap:
        return pagemap.swapped_bytes(spans.starts, spans.ends) // PAGE_BYTES


def test_address_ranges_are_selected_split_and_filtered(shared_daemon: Daemon, child: Toucher) -> None:
    pid = child.process.pid
    lines = shared_daemon.ask(f"arange -pid {pid} -ls").splitlines()
    assert mapping(child) in lines
    assert lines[-1] == f"selected address ranges: {len(lines) - 1}"
    assert shared_daemon.ask("arange -min-length 2048 -ls") == f"{mapping(child)}\nselected address ranges: 1\n"
    lines = shared_daemon.ask("arange -split-length 512 -ls").splitlines()
    assert lines[0] == f"{child.address:x}-{child.address + (512 << 12):x} (2097152 B)"
    assert lines[-1] == "selected address ranges: 4"
    assert shared_daemon.ask("arange -pid 99999999").startswith("error selecting aranges for pid 99999999: ")
    # What `pages` has looked at is selected for `arange` too.
    shared_daemon.ask(f"pages -pid {pid} -ranges {child.address:x}+64k")
    assert shared_daemon.ask("arange -ls").splitlines() == [
        f"{child.address:x}-{child.address + (64 << 10):x} (65536 B)",
        "selected address ranges: 1",
    ]


def test_pages_are_selected_and_counted_by_node(shared_daemon: Daemon, child: Toucher) -> None:
    pid = child.process.pid
    lines = shared_daemon.ask(f"pages -pid {pid} -ranges {wanted(child)}").splitlines()
    assert lines[0] == f"searching for address ranges of pid {pid}"
    assert re.fullmatch(r"found \d+ address ranges", lines[1])
    assert lines[2:] == [
        "using 1 address ranges",
        f"aranges = <1 address ranges of pid {pid}>",
        f"pages = <{PAGES} pages of pid {pid}>",
    ]
    shown = shared_daemon.ask("pages").splitlines()
    assert shown[0] == f"pages of pid {pid}"
    counts = {line.split(": ")[0]: int(line.split(": ")[1]) for line in shown[1:]}
    assert sum(counts.values()) == PAGES
    on_none = shared_daemon.ask(f"pages -pid {pid} -ranges {wanted(child)} -node 77")
    assert f"pages = <{PAGES} pages of pid {pid}>" in on_none  # counted before the node is looked at
    assert shared_daemon.ask("pages") == f"pages of pid {pid}\n"


def test_ranges_and_pagemap_bits_are_shown(shared_daemon: Daemon, child: Toucher) -> None:
    pid = child.process.pid
    assert shared_daemon.ask(f"pages -pid {pid} -ranges {wanted(child)} -pr 5").splitlines()[-1] == mapping(child)
    lines = shared_daemon.ask(f"pages -pid {pid} -ranges {wanted(child)} -pm 2").splitlines()
    assert lines[-3] == "bits: softdirty, exclusive, uffd_wp, file, swap, present"
    found = re.fullmatch(rf"{child.address:x}: bits: [01]10001 pfn: (\d+)", lines[-2])
    assert found
    assert lines[-1].startswith(f"{child.address + PAGE_BYTES:x}: bits: ")
    flags = shared_daemon.ask(f"pages -pk {found[1]}").splitlines()
    assert len(flags) == 27
    values = dict(line.split() for line in flags)
    assert (values["ANON"], values["MMAP"], values["BUDDY"]) == ("1", "1", "0")
    assert flags[0][:14] == f"{'LOCKED':<13} "


def test_attributes_that_contradict_or_do_not_exist_are_told(shared_daemon: Daemon, child: Toucher) -> None:
    line = f"pages -pid {child.process.pid} -attrs "
    shown = shared_daemon.ask(line + "InHeap").splitlines()
    assert shown[-2].startswith("aranges = <")  # they are looked at last
    assert shown[-1].startswith('invalid -attrs: unknown page attribute "InHeap"')
    assert "contradict" in shared_daemon.ask(line + "Dirty,NotDirty")
    none = ["using 0 address ranges", "no address ranges from which to find pages"]
    for command in ("pages", "swap"):
        assert shared_daemon.ask(f"{command} -pid {child.process.pid} -ranges 0").splitlines()[-2:] == none
        wrong = shared_daemon.ask(f"{command} -pid 99999999").splitlines()[-1]
        assert wrong.startswith("error reading address ranges of process 99999999: ")


def test_the_selected_pages_are_moved_and_the_statistics_say_so(shared_daemon: Daemon, child: Toucher) -> None:
    pid = child.process.pid
    shared_daemon.ask(f"pages -pid {pid} -ranges {wanted(child)}")
    assert shared_daemon.ask('mover -config \'{"IntervalMs": 10, "Bandwidth": 400}\' -pages-to 0 -wait') == (
        "mover wait received: AllDone\n"
    )
    assert shared_daemon.ask("pages") == f"pages of pid {pid}\nnode 0: {PAGES}\n"
    table = shared_daemon.ask("stats -t move_pages -f csv").splitlines()
    row = next(line for line in table if line.startswith(f"{pid},")).split(",")
    assert row[2:4] == [str(PAGES), str(PAGES)]
    assert row[5] == "0:0.008"
    assert shared_daemon.ask(f"stats -lm {pid}").startswith(f"move_pages(pid={pid}, pagecount=")
    assert " mover.AddTask\n" in shared_daemon.ask("stats -t events")


def test_a_node_that_does_not_exist_is_an_error_in_the_log_and_the_mover_goes_on(
    shared_daemon: Daemon, child: Toucher
) -> None:
    shared_daemon.ask(f"pages -pid {child.process.pid} -ranges {wanted(child)}")
    assert shared_daemon.ask("mover -pages-to 77 -wait") == "mover wait received: AllDone\n"
    assert shared_daemon.ask("mover -tasks") == ""
    assert re.search(r"^ +1 .* move_pages\(\.\.\.\) error: no such device$", shared_daemon.ask("stats -t events"), re.M)


def test_a_finder_reports_at_once(shared_daemon: Daemon, child: Toucher) -> None:
    pid = child.process.pid
    shown = shared_daemon.ask(f"tracker -create finder -config '{{\"ReportAccesses\": 42}}' -start {pid} -counters")
    assert shown.startswith(
        "tracker created\ntracker configured successfully\ntracker started\na=42 r=0 w=0 AddrRanges"
    )
    assert f"a=42 r=0 w=0 AddrRanges{{pid={pid} ranges={mapping(child)}}}\n" in shown
    assert mapping(child) in shared_daemon.ask("tracker -dump regions")
    assert shared_daemon.ask("tracker -dump") == "Usage: dump regions\n\n"
    assert '"ReportAccesses":42' in shared_daemon.ask("tracker -config-dump")


def test_a_tracker_counts_what_is_touched(shared_daemon: Daemon, child: Toucher) -> None:
    """Whatever tracker works here: a page touched again shows in the counters and in the recorded scans."""
    name = next(name for name in ("idlepage", "bpf", "softdirty", "refs") if why_not(name, Host()) is None)
    pid = child.process.pid
    shared_daemon.ask(f"tracker -create {name} -config '{{\"ScanIntervalMs\": 100}}' -start {pid}")
    assert shared_daemon.ask("tracker -dump raw start") == "raw access events recording started\n\n"

    def touched(line: str) -> str:
        child.write(range(0, PAGES, 16))
        return shared_daemon.ask(line)

    def accesses() -> int:
        found = re.findall(rf"^a=(\d+) r=0 w=(\d+) .*=({child.address:x})-", touched("tracker -counters"), re.M)
        return sum(int(a) + int(w) for a, w, _ in found)

    until(lambda: accesses() > 3)
    recorded = shared_daemon.ask("tracker -dump raw new")
    header, *rows = recorded.strip("\n").splitlines()
    assert header == "          timestamp       pid             addr    pages     accs   writes"
    assert any(re.fullmatch(rf" *\d{{19}} {pid:8d} {child.address:16x} +\d+ +\d+ +\d+", row) for row in rows)
    # Neighbours of the same heat are one range.
    ranges = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", shared_daemon.ask("tracker -heat"), re.M)
    assert any(int(start, 16) <= child.address < int(end, 16) for start, end in ranges)
    assert shared_daemon.ask("tracker -stop -reset") == "tracker counters reset\n"
    assert all(line.startswith("a=0 r=0 w=0 ") for line in shared_daemon.ask("tracker -counters").splitlines())
    assert "error: not recording" in shared_daemon.ask("tracker -dump raw stop") + shared_daemon.ask(
        "tracker -dump raw new"
    )
    assert f"{pid} " in shared_daemon.ask("stats -t memory_scans")


def test_a_watcher_tells_of_processes_and_a_tracker_can_listen(shared_daemon: Daemon, child: Toucher) -> None:
    pid = child.process.pid
    shown = shared_daemon.ask(f"pidwatcher -create pidlist -config '{{\"Pids\": [{pid}]}}' -listener log -poll")
    assert shown == f"pidwatcher created\npidwatcher configured successfully\npidwatcher: AddPids([{pid}])\n"
    assert shared_daemon.ask("pidwatcher -config-dump") == f'{{"Pids":[{pid}]}}\n'
    assert shared_daemon.ask("pidwatcher -poll") == f"pidwatcher: AddPids([{pid}])\n"
    shared_daemon.ask("tracker -create finder -config '{\"ReportAccesses\": 7}'")
    shared_daemon.ask("pidwatcher -listener tracker -poll")
    assert f"a=7 r=0 w=0 AddrRanges{{pid={pid} ranges={mapping(child)}}}" in shared_daemon.ask("tracker -counters")


def test_a_started_watcher_tells_of_new_processes_and_of_those_that_end(shared_daemon: Daemon) -> None:
    program = Path(shutil.which("sleep") or "/bin/sleep").resolve()
    config = f"{{source: {{name: proc, config: {{}}}}, filters: [{{procexeregexp: ^{program}$}}]}}"
    shared_daemon.ask(f"pidwatcher -create filter -config '{config}' -listener log -start")
    sleeper = subprocess.Popen(["sleep", "1000"])
    try:
        until(lambda: f"{sleeper.pid}" in shared_daemon.ask("pidwatcher -dump"))
    finally:
        sleeper.kill()
        sleeper.wait()
    until(lambda: f"{sleeper.pid}" not in shared_daemon.ask("pidwatcher -dump | tr -d '\\n'; echo"))
    shared_daemon.ask("pidwatcher -stop")


def test_a_configuration_can_come_from_a_file_and_errors_name_its_line(
    shared_daemon: Daemon, tmp_path: Path, child: Toucher
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text(f"# a list\npids: [{child.process.pid}]\n")
    bad.write_text("scanintervalms: 100\npagesinregion: 0\n")
    assert shared_daemon.ask(f"pidwatcher -create pidlist -config-file {good}") == (
        f'pidwatcher created\npidwatcher configured successfully from "{good}"\n'
    )
    assert shared_daemon.ask(f"tracker -create refs -config-file {bad}").startswith(
        f"tracker created\ntracker configuration error: {bad}:2: tracker.config.pagesinregion: 0 is out of range"
    )
    assert shared_daemon.ask("tracker -config-file /nonexistent/x") == (
        'reading file "/nonexistent/x" failed: No such file or directory\n'
    )


def test_memory_is_swapped_out_and_in(shared_daemon: Daemon, child: Toucher) -> None:
    pid, line = child.process.pid, f"swap -pid {child.process.pid} -ranges {wanted(child)}"
    half = f"{child.address:x}+{PAGES * PAGE_BYTES // 2 >> 10}k"
    with temporary_zram_swap(64 << 20):
        child.read(range(PAGES))
        assert shared_daemon.ask(f"swap -pid {pid} -ranges {half} -out") == "using 1 address ranges\n"
        assert PAGES // 2 - LEFT_IN_BATCHES <= swapped_pages(child) <= PAGES // 2
        shared_daemon.ask(f"{line} -out")
        out = swapped_pages(child)
        assert PAGES - LEFT_IN_BATCHES <= out <= PAGES
        percent = f"{100 * out / PAGES:.1f}"
        status = f"{pid} {out} / {PAGES} pages, {out * PAGE_BYTES >> 20} / 8 MB ({percent} %) swapped out"
        assert shared_daemon.ask(f"{line} -status").splitlines() == ["using 1 address ranges", status]
        used, *first, last = shared_daemon.ask(f"{line} -vaddrs").splitlines()
        assert (used, last) == ("using 1 address ranges", status)
        assert sum(int(re.findall(r"\((\d+) B\)", each)[0]) for each in first) == out * PAGE_BYTES
        advice = shared_daemon.ask("stats -t process_madvise -f csv")
        assert re.search(rf"^{pid},\d+,{PAGES + PAGES // 2},", advice, re.M)
        assert shared_daemon.ask(f"{line} -in") == "using 1 address ranges\n"
        assert swapped_pages(child) == 0


def test_the_mover_swaps_out_at_its_pace_and_can_be_held(shared_daemon: Daemon, child: Toucher) -> None:
    """Pause, see the task, remove it; then again, continue, and wait for the end."""
    line = f"swap -pids {child.process.pid} -ranges {wanted(child)} -out -mover"
    with temporary_zram_swap(64 << 20):
        shared_daemon.ask("mover -config 'bandwidth: 1' -start -wait")
        for _ in range(10):
            child.read(range(PAGES))
            shared_daemon.ask(line)
            assert shared_daemon.ask("mover -pause -wait") == "mover wait received: Paused\n"
            tasks = shared_daemon.ask("mover -tasks")
            if tasks and swapped_pages(child) < PAGES // 2:
                break
            # It took the test seconds to get here: too late to see the mover at work.
            shared_daemon.ask("mover -config 'bandwidth: 1000' -continue -wait")
            shared_daemon.ask("mover -config 'bandwidth: 1'")
        task = rf"MoverTask{{pid: {child.process.pid}, next: [0-9a-f]+, page: \d+ out of {PAGES}, dest: \[swap\]}}"
        assert re.fullmatch(rf"0        {task}\n", tasks)
        assert shared_daemon.ask("mover -remove-task 1") == "mover error: there is no task 1\n"
        assert shared_daemon.ask("mover -remove-task 0") == ""
        assert shared_daemon.ask("mover -tasks") == ""
        assert swapped_pages(child) < PAGES // 2
        shared_daemon.ask("mover -config 'bandwidth: 1000' -continue")
        shared_daemon.ask(line)
        assert shared_daemon.ask("mover -wait") == "mover wait received: AllDone\n"
        assert swapped_pages(child) >= PAGES - LEFT_IN_BATCHES
        shared_daemon.ask(f"swap -pid {child.process.pid} -in")


def test_cgroups_are_found_by_wildcards(shared_daemon: Daemon, child: Toucher) -> None:
    root = Host().cgroup2_root
    group = root / f"memtier-prompt-{os.getpid()}" / "inner"
    group.mkdir(parents=True)
    try:
        (group / "cgroup.procs").write_text(str(child.process.pid))
        pattern = f"{root}/memtier-prompt-{os.getpid()}*"
        shown = shared_daemon.ask(f"swap -pid-cgroups {pattern} -status")
        assert shown.startswith(f"pidwatcher: AddPids([{child.process.pid}])\n{child.process.pid} ")
        (root / "cgroup.procs").write_text(str(child.process.pid))
        assert "could not find any pids from cgroups [" in shared_daemon.ask(f"swap -pid-cgroups {pattern} -status")
    finally:
        (root / "cgroup.procs").write_text(str(child.process.pid))
        group.rmdir()
        group.parent.rmdir()


def test_a_policy_is_created_asked_and_stopped(shared_daemon: Daemon, child: Toucher) -> None:
    pid = child.process.pid
    config = (
        "{intervalms: 200, swapoutms: 3600000, pidwatcher: {name: pidlist, config: {pids: [" + str(pid) + "]}}, "
        "tracker: {name: refs, config: {scanintervalms: 200}}}"
    )
    assert shared_daemon.ask(f"policy -create age -config '{config}' -start") == "policy created\n"
    shown = shared_daemon.ask_until("policy -dump accessed 0,1h,0", f"{pid:8d}         0.000     3600.000")
    assert shown.startswith(
        "table: time since last access\n     pid lastaccs>=[s] lastaccs<[s]    pages   mem[G] pidmem[%]\n"
    )
    assert shared_daemon.ask("policy -dump accessed").startswith(
        "using limits from configuration: active 0 ms, idle 0 ms, swapout 3600000 ms\n"
    )
    assert shared_daemon.ask(f"policy -dump accessed 0,1s {pid},x") == 'invalid pid: "x"\n\n'
    assert shared_daemon.ask("policy -dump accessed 5x,1").startswith('invalid TIMESPEC "5x,1": ')
    assert shared_daemon.ask("policy -dump foo").startswith('unknown dump "foo"\nUsage: ')
    # Its tracker, watcher and mover are the current ones now: they tell, and are steered by the policy.
    shared_daemon.ask_until("tracker -counters", f"AddrRanges{{pid={pid} ranges={child.address:x}-")
    assert f"{pid}:" in shared_daemon.ask("pidwatcher -dump")
    assert 'belongs to policy "age"' in shared_daemon.ask(f"tracker -start {pid}")
    assert shared_daemon.ask("mover -tasks -wait") == "mover wait received: AllDone\n"
    assert "it belongs to the running policy" in shared_daemon.ask("mover -stop")
    assert '"SwapOutMs":3600000' in shared_daemon.ask("policy -config-dump")
    assert shared_daemon.ask("policy -start") == "start failed: already started\n"
    assert shared_daemon.ask("policy -config 'intervalms: 0'").startswith("config failed: line 1: policy.config.")
    assert shared_daemon.ask("policy -stop") == "policy stopped\n"
    # What it saw last is still there.
    assert f"{pid:8d}         0.000     3600.000" in shared_daemon.ask("policy -dump accessed 0,1h,0")
    assert shared_daemon.ask("policy -start") == ""
    shared_daemon.ask_until("policy -dump accessed 0,1h,0", f"{pid:8d} ")
    assert shared_daemon.ask("policy -stop") == "policy stopped\n"


def test_another_policy_ends_the_one_before(shared_daemon: Daemon) -> None:
    """Else two would move the same memory, one of them out of reach."""
    threads = f"/proc/{shared_daemon.popen.pid}/task"
    before = len(os.listdir(threads))
    for _ in range(10):
        assert shared_daemon.ask("policy -create stub -start") == "policy created\n"
    until(lambda: len(os.listdir(threads)) <= before + 1)  # the kernel lists a thread a moment longer than it is joined
    assert shared_daemon.ask("policy -create age -config 'x: 1'").startswith("policy created\nconfig failed: ")
    assert shared_daemon.ask("policy -start") == "start failed: already started\n"  # still the stub
    assert shared_daemon.ask("policy -stop") == "policy stopped\n"
    until(lambda: len(os.listdir(threads)) <= before)


def test_heat_is_looked_into(shared_daemon: Daemon, child: Toucher) -> None:
    pid = child.process.pid
    config = (
        "{intervalms: 200, heatmap: {heatmax: 0.5, heatclasses: 4}, heatnumas: {3: [0]}, "
        "pidwatcher: {name: pidlist, config: {pids: [" + str(pid) + "]}}, "
        "tracker: {name: refs, config: {scanintervalms: 200}}}"
    )
    shared_daemon.ask(f"policy -create heat -config '{config}' -start")
    shown = shared_daemon.ask_until("policy -dump heatmap", f"pid: {pid}: 0 {{")
    assert re.search(
        rf"^pid: {pid}: \d+ {{{child.address:x}-[0-9a-f]+\(512\),\d\.\d{{6}},\d{{19}},\d+\.\d{{6}}s}} \(class [0-3]\)$",
        shown,
        re.M,
    )
    assert re.search(rf"^{pid:8d}  +0\.\d{{4}}$", shared_daemon.ask("policy -dump heatgram"), re.M)
    assert len(re.findall(rf"^{pid:8d} +\d ", shared_daemon.ask("policy -dump heatgram 2"), re.M)) == 2
    numa = shared_daemon.ask("policy -dump numa").splitlines()
    assert numa[0] == "node      pid pageData numaUsed numaSize"
    assert re.fullmatch(rf"   0 {pid:8d} +\d+M +\d+M       0M", numa[1])
    assert shared_daemon.ask("policy -dump forecast") == "no forecaster\n\n"
    assert shared_daemon.ask("policy -dump") == "dump <forecast [PARAMS]|heatmap|heatgram [CLASSES]|numa>\n\n"
    shared_daemon.ask("policy -stop")
    assert f"pid: {pid}: 0 {{" in shared_daemon.ask("policy -dump heatmap")
    assert re.search(rf"^{pid:8d}  +0\.\d{{4}}$", shared_daemon.ask("policy -dump heatgram"), re.M)


def test_a_finder_of_a_policy_counts_the_same_however_often_it_looked(shared_daemon: Daemon, child: Toucher) -> None:
    pid = child.process.pid
    config = (
        "{intervalms: 50, swapoutms: 3600000, pidwatcher: {name: pidlist, config: {pids: [" + str(pid) + "]}}, "
        "tracker: {name: finder, config: {regionsupdatems: 50, reportaccesses: 3}}}"
    )
    shared_daemon.ask(f"policy -create age -config '{config}' -start")
    assert shared_daemon.ask("tracker -config-dump").startswith('{"RegionsUpdateMs":50,"ReportAccesses":3,')
    assert shared_daemon.ask("pidwatcher -config-dump") == f'{{"Pids":[{pid}]}}\n'

    def scans() -> int:
        found = re.search(rf"^{pid},(\d+),", shared_daemon.ask("stats -t memory_scans -f csv"), re.M)
        return int(found[1]) if found else 0

    before = scans()
    until(lambda: scans() >= before + 3)
    row = f"a=3 r=0 w=0 AddrRanges{{pid={pid} ranges={mapping(child)}}}\n"
    shown = shared_daemon.ask("tracker -counters")
    assert row in shown
    assert {line.split(" r=")[0] for line in shown.splitlines()} == {"a=3"}
    assert mapping(child) in shared_daemon.ask("tracker -dump regions")
    shared_daemon.ask("policy -stop")


def test_routines_run_commands_of_the_prompt(shared_daemon: Daemon) -> None:
    config = '{"IntervalMs": 50, "IntervalCommand": ["stats", "-t", "events"], "IntervalCommandRunner": "memtier"}'
    config = config.replace("stats", "nop").replace(', "-t", "events"', "")
    assert shared_daemon.ask(f"routines -create statactions -config '{config}' -start -dump") == (
        'routine 0 created, started using it\nroutine "statactions": running=true\n'
    )
    shared_daemon.ask_until("stats -t events", " RoutineStatActions.command.memtier: nop... status: 0")
    assert shared_daemon.ask("routines -stop -dump") == 'routine 0 stopped\nroutine "statactions": running=false\n'
    assert shared_daemon.ask("routines -start") == ""
    assert shared_daemon.ask("routines -start") == "start failed: already started\n"
    assert shared_daemon.ask("routines -stop") == "routine 0 stopped\n"


def test_a_process_that_ends_is_an_error_line_and_not_the_end(shared_daemon: Daemon, tmp_path: Path) -> None:
    """The reference crashes when a process goes between two steps of `pages`."""
    with toucher("anonymous", 64, tmp_path) as gone:
        gone.write(range(64))
        pid = gone.process.pid
        shared_daemon.ask(f"pages -pid {pid}")
        shared_daemon.ask(f"arange -pid {pid}")
        shared_daemon.ask(f"tracker -create refs -config 'scanintervalms: 50' -start {pid}")
    assert "pages error: " in shared_daemon.ask("pages")
    assert shared_daemon.ask("mover -pages-to 0 -wait") == "mover wait received: AllDone\n"
    for line in (f"pages -pid {pid}", f"swap -pid {pid} -status", f"arange -pid {pid}"):
        assert "error" in shared_daemon.ask(line)
    shared_daemon.ask_until("tracker -counters", "no counter entries")
    assert "memory.events" not in shared_daemon.ask("nop")


def test_lines_that_are_wrong_end_nothing(shared_daemon: Daemon) -> None:
    lines = ["foo", "nop 'x", "pages -x", "pages -pid x", "policy -create nix", "time -sleep -1", "tracker -dump raw"]
    for line in lines:
        shared_daemon.ask(line)
    assert shared_daemon.ask("nop") == ""


def test_the_shared_session_ends_with_q_and_0(shared_daemon: Daemon) -> None:
    shared_daemon.tell("q")
    shared_daemon.reader.until("quit.\n")
    status, errors = shared_daemon.end()
    assert status == 0
    assert "Traceback" not in errors
    assert PROMPT not in errors
