"""The reference's scenarios beside its policies: mover, swap, pid watchers, routines, finder; and avoid-oom.

Each prints its measurements as JSON; the thresholds are in tests/e2e/test_reference_tools.py.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from reference_policies import PAGED, pids, policy
from reference_scene import MIB, UNGUARDED, Daemon, Load, block, places, share_on
from saying import say
from scene import cgroup, main, wait_for

from memtier_engine.abi import syscalls
from memtier_engine.config.files import parse
from memtier_engine.engine.runner import EngineThread
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.numa import node_meminfo
from memtier_engine.model import PAGE_BYTES, ProcessId
from memtier_engine.stats.observer import Observer
from memtier_engine.stats.recorder import Statistics

FOUND_S = 60.0


def mover() -> None:
    """A process's pages to each node in turn, at three speeds; paused and continued; and with held pages."""
    with Load(24, 0) as load, Daemon() as daemon:
        daemon.ask(f"pages -pid {load.pid}")
        runs = []
        for node, interval_ms, bandwidth in ((1, 10, 8), (2, 1000, 100000), (3, 20, 16), (0, 10, 200)):
            daemon.ask(f"mover -config '{{intervalms: {interval_ms}, bandwidth: {bandwidth}}}'")
            began_s = time.monotonic()
            daemon.ask(f"mover -pages-to {node}")
            answer = daemon.ask("mover -wait")
            seconds = time.monotonic() - began_s
            runs.append({"bandwidth": bandwidth, "seconds": seconds, "share": share_on(node, load), "answer": answer})
        daemon.ask("mover -config 'bandwidth: 6'")
        daemon.ask("mover -pages-to 3")
        wait_for(lambda: share_on(3, load) > 0.1, FOUND_S)
        daemon.ask("mover -pause")
        time.sleep(0.5)
        paused = share_on(3, load)
        tasks = daemon.ask("mover -tasks")
        time.sleep(2)
        still = share_on(3, load)
        daemon.ask("mover -continue")
        done_s = wait_for(lambda: share_on(3, load) >= 0.999, FOUND_S)
        daemon.ask("mover -wait")
        left = daemon.ask("mover -tasks")
        say(kind="mover", runs=runs, paused=paused, still=still, tasks=tasks, continued_s=done_s, left=left)


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def held_pages() -> None:
    """Pages that a pipe holds cannot be taken from where they are: all others move, and these when they are free."""
    pages = 2000
    area = mmap.mmap(-1, pages * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    memoryview(area)[::PAGE_BYTES] = b"1" * pages
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    held = (300, 301, 1500)
    ends = []
    for page in held:
        reader, writer = os.pipe()
        iovec = _Iovec(start + page * PAGE_BYTES, PAGE_BYTES)
        given = ctypes.CDLL(None, use_errno=True).vmsplice(writer, ctypes.byref(iovec), ctypes.c_ulong(1), 0)
        assert given == PAGE_BYTES, ctypes.get_errno()
        ends.append(reader)
    addresses = np.uint64(start) + np.arange(pages, dtype=np.uint64) * np.uint64(PAGE_BYTES)

    def on_node(node: int) -> list[int]:
        return np.flatnonzero(syscalls.move_pages(0, addresses, None) == node).tolist()

    with Daemon() as daemon:
        daemon.ask(f"pages -pid {os.getpid()} -ranges {start:x}-{start + pages * PAGE_BYTES:x}")
        daemon.ask("mover -pages-to 2")
        daemon.ask("mover -wait")
        moved = len(on_node(2))
        stayed = sorted(set(range(pages)) - set(on_node(2)))
        table = daemon.ask("stats -t move_pages_errors -f csv")
        counted = daemon.ask("stats -t move_pages -f csv")
        for reader in ends:
            os.read(reader, PAGE_BYTES)
        daemon.ask("mover -pages-to 2")
        daemon.ask("mover -wait")
        say(
            kind="held-pages",
            moved=moved,
            stayed=stayed,
            held=held,
            errors=table,
            counted=counted,
            in_the_end=len(on_node(2)),
        )


def swapped_mb(daemon: Daemon, pid: int) -> float:
    """As `swap -status` says."""
    found = re.search(rf"^{pid} .* ([0-9]+) / [0-9]+ MB", daemon.ask(f"swap -status -pid {pid}"), re.M)
    assert found is not None
    return float(found[1])


def swap() -> None:
    """Out through the mover at two speeds, in again, and out at once; then several processes named in three ways."""
    size_mib, hot_mib = 24, 10  # 50 and 22 in the reference
    rounds = []
    with cgroup("e2e-swap") as group, ExitStack() as stack:
        loads = [stack.enter_context(Load(size_mib, hot_mib, write=True, cpu=1)) for _ in range(3)]
        (group / "cgroup.procs").write_text(str(loads[2].pid))
        daemon = stack.enter_context(Daemon(cpu=1))
        first = loads[0]
        for interval_ms, bandwidth in ((10, 8), (1000, 16)):
            daemon.ask(f"mover -config '{{intervalms: {interval_ms}, bandwidth: {bandwidth}}}'")
            began_s = time.monotonic()
            daemon.ask(f"swap -out -mover -pid {first.pid}")
            daemon.ask("mover -wait")
            seconds = time.monotonic() - began_s
            out = swapped_mb(daemon, first.pid)
            daemon.ask(f"swap -in -pid {first.pid}")
            back = swapped_mb(daemon, first.pid)
            daemon.ask(f"swap -out -pid {first.pid}")
            time.sleep(1)  # what is in use comes back
            at_once = swapped_mb(daemon, first.pid)
            daemon.ask(f"swap -in -pid {first.pid}")
            rounds.append({"bandwidth": bandwidth, "seconds": seconds, "out": out, "in": back, "at_once": at_once})
        daemon.ask("mover -config 'bandwidth: 50'")
        daemon.ask(f"swap -out -mover -pids {loads[0].pid} -pid {loads[1].pid} -pid-cgroups {group}")
        daemon.ask("mover -wait")
        each = [swapped_mb(daemon, load.pid) for load in loads]
        say(kind="swap", size_mib=size_mib, hot_mib=hot_mib, rounds=rounds, each=each)


MULTI = f"trackers: [{block('idlepage', PAGED)}, {block('softdirty', PAGED)}]"


@contextmanager
def running(text: str, *observers: Observer, events: bool = False) -> Iterator[None]:
    """The engine of a configuration, in a thread."""
    thread = EngineThread(parse(text).build(observers=observers, events=events))
    thread.start()
    try:
        yield
    finally:
        if not thread.stop():
            say(kind="problem", text="an engine did not stop within 30 s")


def watchers() -> None:
    """Four ways to say which processes, each with age and with heat on two trackers: all three are scanned."""
    with ExitStack() as stack:
        groups = [stack.enter_context(cgroup(f"e2e-meme{number}")) for number in range(3)]
        loads = [stack.enter_context(Load(6, 2, write=True, cgroup=group)) for group in groups]
        wanted = {load.pid for load in loads}
        named = "procexeregexp: '.*/python3[.0-9]*$', minvmrsskb: 6000"
        by_cgroup = block("cgroups", f"intervalms: 1000\ncgroups: {[str(group) for group in groups]}")

        def filtered(source: str, pattern: str) -> str:
            return block("filter", f"source: {source}\nfilters: [{{{pattern}}}]")

        every = block("proc", "intervalms: 1000")
        watched = {
            "pidlist": pids(*loads),
            "cgroups": by_cgroup,
            "filter-proc": filtered(every, named),
            "filter-cgroups": filtered(by_cgroup, named),
            "filter-none": filtered(every, "procexeregexp: '.*/non-existent$'"),
        }
        counted: dict[str, Statistics] = {}
        # Nothing is to be moved here: where an engine would put it is not the question.
        rules = {"age": "idledurationms: 3600000\nidlenumas: [3]", "heat": "heatmap: {heatclasses: 5}"}

        def seen(kind: str) -> set[int]:
            return set(counted[kind].scans)

        # One after the other: an address space has one observer at a time.
        took_s: float | None = 0.0
        for kind, watcher in watched.items():
            for name, keys in rules.items():
                own, key = Statistics(), f"{kind} {name}"
                counted[key] = own
                with running(policy(name, keys, "multi", MULTI, watcher), own):
                    if "none" in kind:
                        time.sleep(5)
                        continue
                    each_s = wait_for(lambda: seen(key) >= wanted, FOUND_S)  # noqa: B023
                    took_s = None if took_s is None or each_s is None else max(took_s, each_s)
        positive = [kind for kind in counted if "none" not in kind]
        say(
            kind="watchers",
            took_s=took_s,
            missing={kind: len(wanted - seen(kind)) for kind in positive},
            exactly={kind: seen(kind) == wanted for kind in positive if "proc" not in kind},
            none=sum(len(seen(kind)) for kind in counted if "none" in kind),
            scanned=[
                min(counted[kind].scans[pid].scans for pid in wanted) for kind in positive if seen(kind) >= wanted
            ],
        )


class Arrivals(Observer):
    """When each process was seen first, and seen to be gone."""

    def __init__(self) -> None:
        self.appeared_s: dict[int, float] = {}
        self.gone_s: dict[int, float] = {}

    def appeared(self, process: ProcessId) -> None:
        self.appeared_s[process.pid] = time.monotonic()

    def forgotten(self, process: ProcessId) -> None:
        self.gone_s[process.pid] = time.monotonic()


def events() -> None:
    """The engine hears of processes from the kernel: it polls and scans once an hour only."""
    hour = 3_600_000
    arrivals = Arrivals()
    source = block("proc", f"intervalms: {hour}")
    watcher = block("filter", f"source: {source}\nfilters: [{{procexeregexp: '/busybox$'}}]")
    text = f"intervalms: {hour}\nidledurationms: {hour}\nidlenumas: [3]\npidwatcher: {watcher}\n"
    text += f"tracker: {block('idlepage', f'scanintervalms: {hour}')}\n"
    seen_s, gone_s = [], []
    with running(f"policy: {block('age', text)}", arrivals, events=True):
        time.sleep(2)
        for _ in range(15):
            began_s = time.monotonic()
            child = subprocess.Popen(["/bin/busybox", "sleep", "60"])
            started_s = time.monotonic() - began_s
            wait_for_it(child.pid, arrivals.appeared_s)
            seen_s.append(arrivals.appeared_s[child.pid] - began_s - started_s)
            child.kill()
            child.wait()
            ended_s = time.monotonic()
            wait_for_it(child.pid, arrivals.gone_s)
            gone_s.append(arrivals.gone_s[child.pid] - ended_s)
    say(kind="events", seen_ms=sorted(1000 * each for each in seen_s), gone_ms=sorted(1000 * each for each in gone_s))


def wait_for_it(pid: int, when: dict[int, float]) -> None:
    deadline_s = time.monotonic() + 20
    while pid not in when:
        assert time.monotonic() < deadline_s, f"process {pid} was not noticed within 20 s"
        time.sleep(0.005)


def routines() -> None:
    """Programs, commands and lines of the prompt at intervals, timestamps around them, and one per MiB paged out."""
    program = f"{sys.executable} -S -c \"print('a line')\" >> /tmp/e2e-lines"
    config = {
        "exec": f'intervalms: 500\nintervalcommand: ["sh", "-c", {json.dumps(program)}]',
        "memtier": 'intervalms: 200\nintervalcommand: ["stats", "-t", "events"]\nintervalcommandrunner: memtier',
        "prompt": 'intervalms: 500\nintervalcommand: ["stats -t events"]\nintervalcommandrunner: memtier-prompt\n'
        'timestamp: "before: epochs: unix.s|unix.milli|duration.micro ansic rfc850\\n"\n'
        'timestampafter: "after: unix.nano\\n"',
    }
    found: dict[str, Any] = {}
    for name, text in config.items():
        with Daemon(f"allowprograms: true\npolicy: {{name: stub}}\nroutines: [{block('statactions', text)}]") as daemon:
            time.sleep(5)
            found[name] = daemon.ask("stats -t events")
        found[f"{name}_output"] = "".join(daemon.output)
    with Load(24, 4, cpu=1) as load:
        actions = (
            'intervalms: 200\npageoutmb: 4\npageoutcommand: ["stats -t events"]\npageoutcommandrunner: memtier-prompt\n'
        )
        text = policy("age", "swapoutms: 4000", "idlepage", PAGED, pids(load), bandwidth=4)
        with Daemon(f"{text}routines: [{block('statactions', actions)}]", cpu=1) as daemon:
            wait_for(lambda: share_on(-1, load, "cold") >= 0.95, FOUND_S)
            found["pageout"] = daemon.ask("stats -t events -f csv")
            found["pageout_mib"] = 24 * share_on(-1, load)
    say(kind="routines", lines=len(Path("/tmp/e2e-lines").read_text().splitlines()), **found)


def finder() -> None:
    """Ranges by pagemap bits: everything, what is in memory, and what was paged out."""
    with Load(16, 0) as load, Daemon() as daemon:
        start, end = load.cold[0]
        out_start, out_end = start + 4 * MIB, start + 8 * MIB
        daemon.ask(f"swap -out -pid {load.pid} -ranges {out_start:x}-{out_end:x}")
        answers = {}
        for name, bits in (
            ("all", '"ReportAccesses":42'),
            ("absent", '"ReportAccesses":0,"PagemapBitPresent":false'),
            ("present", '"ReportAccesses":0,"PagemapBitPresent":true'),
            ("softdirty", '"ReportAccesses":0,"PagemapBitSoftDirty":true'),
        ):
            daemon.ask("tracker -create finder -config '{" + bits + "}'")
            daemon.ask(f"tracker -start {load.pid}")
            answers[name] = daemon.ask("tracker -counters")
        say(
            kind="finder",
            array=[f"{start:x}", f"{end:x}"],
            out=[f"{out_start:x}", f"{out_end:x}"],
            swapped=places(load.pid, [(out_start, out_end)]).get(-1, 0.0),
            answers=answers,
        )


def available(node: int) -> float:
    """Of the node's memory, the part that is free or can be freed without paging out."""
    info = node_meminfo(Host(), node)
    room = info["MemFree"] + info.get("SReclaimable", 0) + int(info.get("Inactive(file)", 0) * 0.8)
    return room / info["MemTotal"]


def avoid_oom() -> None:
    """A node is filled by a process that must stay there and one that need not: the latter moves, nobody is killed.

    It begins below 25 % available memory and ends at 35 %.
    """
    root = Path("/sys/fs/cgroup/e2e-avoidoom")
    with cgroup("e2e-avoidoom"), ExitStack() as stack:
        Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+cpuset +memory")
        (root / "cgroup.subtree_control").write_text("+cpuset +memory")
        bound = stack.enter_context(cgroup("e2e-avoidoom/wide"))
        (bound / "cpuset.mems").write_text("2-3")
        tight = stack.enter_context(cgroup("e2e-avoidoom/tight"))
        (tight / "cpuset.mems").write_text("3")
        text = "intervalms: 1000\nstartfreeingmemory: 25%\nstopfreeingmemory: 35%\n"
        text += f"cgroups: [/sys/fs/cgroup/e2e-missing, {root}]\nmover: {{intervalms: 100, bandwidth: 100}}"
        kills = oom_kills()
        wide = stack.enter_context(Filler(bound))
        narrow = stack.enter_context(Filler(tight))
        total_mib = node_meminfo(Host(), 3)["MemTotal"] >> 20
        found: dict[str, Any] = {"total_mib": total_mib}
        wide.take(int(total_mib * 0.55), node=3)
        narrow.take(int(total_mib * 0.25), node=3)  # it must stay on node 3
        found["pressed"] = available(3)
        with Daemon(f"{UNGUARDED}policy: {block('avoid-oom', text)}") as daemon:
            found["relieved_s"] = wait_for(lambda: available(3) >= 0.33, FOUND_S)
            time.sleep(2)
            found["relieved"] = [available(2), available(3)]
            # Held, as what is taken slowly is moved while it is taken, and then there is no point of least memory.
            os.kill(daemon.process.pid or 0, signal.SIGSTOP)
            narrow.take(int(total_mib * 0.2), node=3)
            found["pressed_again"] = available(3)
            os.kill(daemon.process.pid or 0, signal.SIGCONT)
            found["again_s"] = wait_for(lambda: available(3) >= 0.33, FOUND_S)
            found["again"] = [available(2), available(3)]
            found["dump"] = daemon.ask("policy -dump")
        found["kills"] = oom_kills() - kills
        found["alive"] = [wide.alive(), narrow.alive()]
        say(kind="avoid-oom", **found)


def oom_kills() -> int:
    """Of the whole machine, since boot."""
    found = re.search(r"^oom_kill ([0-9]+)$", Path("/proc/vmstat").read_text(), re.M)
    return int(found[1]) if found else 0


_FILLER = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None, use_errno=True)
held = []
print("ready", flush=True)
for line in sys.stdin:
    size, node = map(int, line.split())
    area = mmap.mmap(-1, size << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    libc.syscall(ctypes.c_long(238), ctypes.c_long(1), ctypes.byref(ctypes.c_ulong(1 << node)), ctypes.c_ulong(64))
    memoryview(area)[::4096] = b"1" * (size << 8)
    libc.syscall(ctypes.c_long(238), ctypes.c_long(0), None, ctypes.c_ulong(0))
    held.append(area)
    print("taken", flush=True)
"""


class Filler:
    """A process that takes memory when told, from a node that it prefers. The system call's number is x86-64's."""

    def __init__(self, group: Path) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _FILLER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._popen.stdout is not None
        self._popen.stdout.readline()
        (group / "cgroup.procs").write_text(str(self._popen.pid))

    def take(self, mib: int, node: int) -> None:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(f"{mib} {node}\n")
        self._popen.stdin.flush()
        assert self._popen.stdout.readline() == "taken\n", "it was killed"

    def alive(self) -> bool:
        return self._popen.poll() is None

    def __enter__(self) -> Filler:
        return self

    def __exit__(self, *exc: object) -> None:
        self._popen.kill()
        self._popen.wait()


if __name__ == "__main__":
    main(
        {
            "mover": mover,
            "held-pages": held_pages,
            "swap": swap,
            "watchers": watchers,
            "events": events,
            "routines": routines,
            "finder": finder,
            "avoid-oom": avoid_oom,
        }
    )
