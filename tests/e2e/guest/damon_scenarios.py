"""Tracker damon on a kernel whose kdamonds nobody else uses; each scenario says its measurements as one JSON line."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from reference_policies import pids, policy
from reference_scene import Daemon, Load, places, setting, share_on
from saying import say
from scene import main, wait_for

from memtier_engine.errors import MemtierError, TrackerUnavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id, read_mappings
from memtier_engine.model import PAGE_BYTES, ProcessId, Spans
from memtier_engine.trackers.damon import DamonConfig, DamonTracker

KDAMONDS = Path("/sys/kernel/mm/damon/admin/kdamonds")
ROUND_MS = 15
"""Pause of a load: its hot pages are touched within each sample."""
FOUND_S = 120.0


@contextmanager
def other_work() -> Iterator[None]:
    """A second process that wakes up on the loads' CPU again and again: an emulated CPU keeps its TLB until another
    process runs, and an access through a stale entry leaves no trace for DAMON."""
    code = "import time\nwhile True: time.sleep(0.01)"
    other = subprocess.Popen(["taskset", "-c", "0", sys.executable, "-S", "-E", "-c", code])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def state_of(number: int = 0) -> str | None:
    """None: there is no such kdamond. The kernel answers EBUSY while it does a command."""
    for _ in range(100):
        try:
            return (KDAMONDS / f"{number}/state").read_text().strip()
        except FileNotFoundError:
            return None
        except OSError:
            time.sleep(0.05)
    return None


def tracker(**options: object) -> DamonTracker:
    slow = DamonConfig(sample_us=40_000, aggregation_us=400_000, regions_min=10, regions_max=200)
    return DamonTracker(Host(), replace(slow, **options))  # type: ignore[arg-type]


def load(size_mib: int = 24, hot_mib: int = 8) -> Load:
    return Load(size_mib, hot_mib, write=True, pause_ms=ROUND_MS)


def touched(found: DamonTracker, process: ProcessId, of: Load) -> tuple[float, float]:
    """Shares of the hot and of the cold pages that one scan reports as touched."""
    counts = []
    chunks = [
        (part.start, part.accessed.copy())
        for chunk in found.scan(process, read_mappings(Host(), process.pid).tierable())
        for part in chunk.parts()
    ]
    for ranges in (of.hot, of.cold):
        seen = pages = 0
        for start, end in ranges:
            pages += (end - start) // PAGE_BYTES
            for first, accessed in chunks:
                low, high = (max(0, (at - first) // PAGE_BYTES) for at in (start, end))
                seen += int(np.count_nonzero(accessed[low:high]))
        counts.append(seen / pages)
    return counts[0], counts[1]


def watch_for(
    found: DamonTracker, loads: Sequence[Load], rounds: int, pause_s: float = 1.5, *, until_apart: bool = True
) -> list[tuple[float, float]]:
    """(hot share, cold share) of each load after some rounds; sooner when DAMON has told them apart."""
    shares: list[tuple[float, float]] = []
    for _ in range(rounds):
        time.sleep(pause_s)
        processes = [process_id(Host(), each.pid) for each in loads]
        found.watch(frozenset(processes))
        shares = [touched(found, process, each) for process, each in zip(processes, loads, strict=True)]
        if until_apart and all(hot >= 0.9 and cold <= 0.15 for hot, cold in shares):
            break
    return shares


def come_and_go() -> None:
    """Processes appear and exit: the ones that stay keep what is known of them, and nothing is switched off."""
    with ExitStack() as stack:
        stack.enter_context(other_work())
        steady = stack.enter_context(load())
        found = tracker()
        stack.callback(found.close)
        found.watch(frozenset({process_id(Host(), steady.pid)}))
        before = watch_for(found, [steady], 20)
        kdamond = (KDAMONDS / "0/pid").read_text()
        oldest_before = int(found.regions()[steady.pid].ages.max())
        with load(16, 8) as guest:
            joined = watch_for(found, [steady, guest], 1, 1.0, until_apart=False)[0]
            oldest_after = int(found.regions()[steady.pid].ages.max())
            during = watch_for(found, [steady, guest], 20)
        after = watch_for(found, [steady], 4)
        say(
            kind="come-and-go",
            before=before[0],
            oldest_before=oldest_before,
            joined=joined,
            oldest_after=oldest_after,
            during=during,
            after=after[0],
            same_thread=(KDAMONDS / "0/pid").read_text() == kdamond,
        )


def all_gone() -> None:
    """When the last process exits the kernel ends the kdamond; with the next process it is started again."""
    with other_work():
        found = tracker()
        errors: list[str] = []
        try:
            with load() as first:
                gone = process_id(Host(), first.pid)
                found.watch(frozenset({gone}))
                time.sleep(1)
            stopped_s = wait_for(lambda: state_of() == "off", 20)
            found.watch(frozenset({gone}))
            try:
                list(found.scan(gone, Spans.empty()))
            except MemtierError as error:
                errors.append(type(error).__name__)
            with load() as second:
                again = watch_for(found, [second], 20)
        finally:
            found.close()
    say(kind="all-gone", stopped_s=stopped_s, errors=errors, again=again[0])


def physical() -> None:
    """As on a kernel that can only watch physical memory: of huge pages, as an old node's small ones lie scattered."""
    huge = setting("/sys/kernel/mm/transparent_hugepage/enabled", "always")
    with huge, other_work(), Load(48, 24, write=True, pause_ms=ROUND_MS, huge=True) as one, Load(32, 0, huge=True):
        found = tracker(physical=True)
        try:
            operations = (KDAMONDS / "0/contexts/0/operations").read_text().strip()
            shares = watch_for(found, [one], 30, 2.0)
            found.watch(frozenset())
            off = state_of()
        finally:
            found.close()
    say(kind="physical", operations=operations, shares=shares[0], off=off)


def polite() -> None:
    """What others have set up is not touched; what we made is taken away; two of ours do not take the same one."""
    state: dict[str, object] = {"at_first": int((KDAMONDS / "nr_kdamonds").read_text())}
    found = tracker(create=2)
    state["made"] = int((KDAMONDS / "nr_kdamonds").read_text())
    second = tracker()
    state["numbers"] = [found._kdamond.number, second._kdamond.number]
    try:
        tracker()
    except TrackerUnavailable as error:
        state["third"] = str(error)
    found.close()
    state["while_second_lives"] = int((KDAMONDS / "nr_kdamonds").read_text())
    second.close()
    # Somebody else's: a context, and a kdamond that runs.
    (KDAMONDS / "nr_kdamonds").write_text("2")
    (KDAMONDS / "0/contexts/nr_contexts").write_text("1")
    (KDAMONDS / "0/contexts/0/operations").write_text("paddr")
    third = tracker()
    state["beside_another"] = third._kdamond.number
    try:
        tracker(kdamonds=(0,))
    except TrackerUnavailable as error:
        state["wanted_another_s"] = str(error)
    third.close()
    state["another_s_context"] = (KDAMONDS / "0/contexts/0/operations").read_text().strip()
    state["number_stays"] = int((KDAMONDS / "nr_kdamonds").read_text())
    (KDAMONDS / "nr_kdamonds").write_text("0")
    say(kind="polite", **state)


def killed() -> None:
    """A program that is killed leaves its kdamond behind; the error says how to get it back."""
    with Load(8, 4) as victim:
        daemon = Daemon(policy("age", "swapoutms: 60000", "damon", "samplingus: 5000", pids(victim)))
        started_s = wait_for(lambda: state_of() == "on", FOUND_S)
        daemon.process.kill()
        daemon.process.join()
        try:
            tracker().close()
            message = ""
        except TrackerUnavailable as error:
            message = str(error)
    wait_for(lambda: state_of() == "off", 20)
    (KDAMONDS / "nr_kdamonds").write_text("0")
    tracker().close()
    say(kind="killed", started_s=started_s, message=message)


REFERENCE = """\
connection: bpftrace
samplingus: 40000
aggregationus: 400000
regionsupdateus: 3000000
mintargetregions: 10
maxtargetregions: 200
filteraddressrangesizemax: 16777216
interface: 0
sysfsregionsmanager: 1
nrkdamonds: 8
kdamondslist: [3, 4, 5]
scanintervalms: 2000
"""


def heat() -> None:
    """Policy heat with the keys of the reference's test: the coldest class to node 3, the hottest to node 2."""
    keys = "heatnumas: {0: [3], 4: [2]}\nheatmap: {heatmax: 0.002, heatretention: 0.8, heatclasses: 5}"
    with other_work(), load() as one, Daemon(policy("heat", keys, "damon", REFERENCE, pids(one), 200)) as daemon:
        apart_s = wait_for(lambda: share_on(3, one, "cold") >= 0.8 and share_on(2, one, "hot") >= 0.8, FOUND_S)
        say(
            kind="damon-heat",
            apart_s=apart_s,
            hot=places(one.pid, one.hot),
            cold=places(one.pid, one.cold),
            kdamonds=int((KDAMONDS / "nr_kdamonds").read_text()),
            running=[number for number in range(8) if state_of(number) == "on"],
            heats=daemon.ask("policy -dump heatmap")[-2000:],
        )
    say(kind="damon-heat-end", kdamonds=int((KDAMONDS / "nr_kdamonds").read_text()))


def age() -> None:
    """Policy age by DAMON: cold memory to swap, hot memory stays."""
    keys = "samplingus: 40000\naggregationus: 400000\nmaxtargetregions: 200\nscanintervalms: 2000\n"
    with other_work(), load() as one, Daemon(policy("age", "swapoutms: 6000", "damon", keys, pids(one))):
        out_s = wait_for(lambda: share_on(-1, one, "cold") >= 0.85, FOUND_S)
        time.sleep(4)
        say(kind="damon-age", out_s=out_s, hot=places(one.pid, one.hot), cold=places(one.pid, one.cold))


if __name__ == "__main__":
    main(
        {
            "come-and-go": come_and_go,
            "all-gone": all_gone,
            "physical": physical,
            "polite": polite,
            "killed": killed,
            "damon-heat": heat,
            "damon-age": age,
        }
    )
