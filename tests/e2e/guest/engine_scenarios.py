"""Scenarios of the engine in the test VM; each says its measurements as one JSON line."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
from saying import say
from scene import cgroup, main, meme, memtierd, swap_used, wait_for

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.hostfs.pagemap import Pagemap, pfns
from memtier_engine.model import PAGE_BYTES, Spans
from memtier_engine.trackers.idlepage import IdlePageTracker

OUT_TIMEOUT_S = 60.0
FOUND_S = 240.0
"""Where the time it takes is not what is looked at: an emulated machine may have little of the CPU."""
STAYS_S = 30


def swap_scenario(tracker: str, *, write: bool) -> None:
    """Cold out and hot kept; then frozen: all out; then thawed: hot back."""
    with meme(64, 20, write=write) as load, memtierd(tracker, pids=[load.pid]):
        took_s = wait_for(lambda: load.cold_out() >= 0.95, OUT_TIMEOUT_S)
        hot_worst = cold_least = None
        for _ in range(STAYS_S):
            hot, cold = load.hot_out(), load.cold_out()
            hot_worst = max(hot, hot_worst or 0.0)
            cold_least = min(cold, 1.0 if cold_least is None else cold_least)
            time.sleep(1)
        load.signal(signal.SIGSTOP)
        stopped_s = wait_for(lambda: load.hot_out() >= 0.95, OUT_TIMEOUT_S)
        load.signal(signal.SIGCONT)
        back_s = wait_for(lambda: load.hot_out() <= 0.02, OUT_TIMEOUT_S)
        say(
            kind=f"swap-{tracker}",
            cold_out_s=took_s,
            hot_out_worst=hot_worst,
            cold_out_least=cold_least,
            all_out_after_stop_s=stopped_s,
            hot_back_after_cont_s=back_s,
            cold_out_at_end=load.cold_out(),
        )


def two_cgroups() -> None:
    """Two daemons side by side, each on a cgroup of its own."""
    with (
        cgroup("e2e-a") as a,
        cgroup("e2e-b") as b,
        meme(48, 16, cgroup=a) as first,
        meme(48, 24, cgroup=b, cpu=1) as second,
        meme(24, 8) as bystander,
        memtierd("idlepage", cgroups=[a]),
        memtierd("idlepage", cgroups=[b], cpu=1),
    ):
        took_s = wait_for(lambda: min(first.cold_out(), second.cold_out()) >= 0.95, FOUND_S)
        time.sleep(10)
        say(
            kind="two-cgroups",
            took_s=took_s,
            cold_out=[first.cold_out(), second.cold_out()],
            hot_out=[first.hot_out(), second.hot_out()],
            bystander_out=[bystander.cold_out(), bystander.hot_out()],
        )


_TOUCHER = """
import ctypes, mmap, sys
pages = int(sys.argv[1])
area = mmap.mmap(-1, pages * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)
print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
for line in sys.stdin:
    kind, *numbers = line.split()
    for number in map(int, numbers):
        if kind == "w":
            area[number * 4096] = 1
        else:
            area[number * 4096]
    print("done", flush=True)
"""


class Toucher:
    """A process that touches the pages it is told to."""

    def __init__(self, pages: int) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", _TOUCHER, str(pages)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stdout is not None
        self.address = int(self.popen.stdout.readline())
        self.process = process_id(Host(), self.popen.pid)
        start = np.array([self.address], np.uint64)
        self.spans = Spans(start, start + np.uint64(pages * PAGE_BYTES))

    def touch(self, pages: list[int], kind: str = "r") -> None:
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.write(" ".join([kind, *map(str, pages)]) + "\n")
        self.popen.stdin.flush()
        assert self.popen.stdout.readline() == "done\n"

    def seen_by(self, tracker: IdlePageTracker) -> set[int]:
        found: set[int] = set()
        for chunk in tracker.scan(self.process, self.spans):
            found |= set((np.flatnonzero(chunk.accessed) + (chunk.start - self.address) // PAGE_BYTES).tolist())
        return found

    def words(self) -> set[int]:
        with Pagemap(Host(), self.popen.pid) as pagemap:
            words = pagemap.read(self.address, int(self.spans.ends[0]))
        return set((pfns(words) >> np.uint64(6)).tolist())

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()


def shared_words() -> None:
    """Two processes whose frames share words of the bitmap, two trackers: each sees its own accesses only."""
    pages, rounds, wrong = 600, 25, 0
    seed = int(os.environ.get("SEED", "1"))
    chance = random.Random(seed)
    a, b = Toucher(pages), Toucher(pages)
    try:
        # Grown in turn, a page at a time, so that the frames of both lie side by side.
        for page in range(pages):
            a.touch([page], "w")
            b.touch([page], "w")
        shared = len(a.words() & b.words())
        of_a, of_b = IdlePageTracker(Host()), IdlePageTracker(Host())
        a.seen_by(of_a)
        b.seen_by(of_b)
        for _ in range(rounds):
            mine = chance.sample(range(pages), chance.randrange(0, 40))
            others = chance.sample(range(pages), chance.randrange(0, 40))
            a.touch(mine)
            b.touch(others)
            # Either order, and B's tracker sometimes twice in A's one window.
            if chance.random() < 0.5:
                b.seen_by(of_b)
                b.touch(others)
            seen_a, seen_b = a.seen_by(of_a), b.seen_by(of_b)
            wrong += (seen_a != set(mine)) + (seen_b != set(others))
        say(kind="shared-words", seed=seed, shared_words=shared, rounds=rounds, wrong=wrong)
    finally:
        a.close()
        b.close()


_CHURN = """
import mmap, os, random, sys, time
random.seed(3)
end = time.monotonic() + float(sys.argv[1])
held = []
while time.monotonic() < end:
    pid = os.fork()
    if pid == 0:
        if random.random() < 0.3:
            os.execv("/bin/true", ["true"])
        time.sleep(random.random() * 2)
        os._exit(0)
    held.append(mmap.mmap(-1, random.randrange(1, 64) * 65536))
    held[-1][:8] = b"churning"
    if len(held) > 10:
        held.pop(random.randrange(len(held))).close()
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    time.sleep(0.05)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
print("churned", flush=True)
"""


def churn() -> None:
    """Processes fork, exec, exit, grow and shrink next to a steady one in the same cgroup."""
    with (
        cgroup("e2e-churn") as group,
        meme(48, 16, cgroup=group) as steady,
        memtierd("idlepage", cgroups=[group]) as daemon,
    ):
        churner = subprocess.Popen(
            [sys.executable, "-c", _CHURN, "25"],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: (group / "cgroup.procs").write_text("0") and None,
        )
        took_s = wait_for(lambda: steady.cold_out() >= 0.95, FOUND_S)
        output, _ = churner.communicate(timeout=120)
        say(
            kind="churn",
            took_s=took_s,
            churner=[churner.returncode, output.strip()],
            hot_out=steady.hot_out(),
            daemon_alive=daemon.poll() is None,
        )


_CHECKER = """
import mmap, sys, zlib
area = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
import random
block = random.Random(5).randbytes(1 << 20)
for at in range(0, 64 << 20, 1 << 20):
    area[at:at + (1 << 20)] = block[at >> 20:] + block[:at >> 20]
print(zlib.crc32(area), flush=True)
for _ in sys.stdin:
    print(zlib.crc32(area), flush=True)
"""


def killed_engine() -> None:
    """kill -9 of the daemon in the middle of moving: the workload finds all its data."""
    checker = subprocess.Popen(
        [sys.executable, "-c", _CHECKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert checker.stdin is not None
    assert checker.stdout is not None
    before = checker.stdout.readline().strip()
    with memtierd("idlepage", pids=[checker.pid]) as daemon:
        started_s = wait_for(lambda: swap_used() > 4 << 20, FOUND_S)
        daemon.kill()
        daemon.wait()
        used = swap_used()
    checker.stdin.write("again\n")
    checker.stdin.flush()
    after = checker.stdout.readline().strip()
    say(
        kind="killed-engine",
        started_s=started_s,
        swap_used_at_kill=used,
        before=before,
        after=after,
        alive=checker.poll() is None,
    )
    checker.kill()
    checker.wait()


main(
    {
        "swap-idlepage": lambda: swap_scenario("idlepage", write=False),
        "swap-softdirty": lambda: swap_scenario("softdirty", write=True),
        "two-cgroups": two_cgroups,
        "shared-words": shared_words,
        "churn": churn,
        "killed-engine": killed_engine,
    }
)
