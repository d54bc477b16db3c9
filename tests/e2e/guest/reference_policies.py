"""The reference's scenarios for its policies, on arrays of 32 MiB instead of 1 GiB, with half of its times.

Each prints its measurements as JSON; the thresholds are in tests/e2e/test_reference_policies.py.
"""

from __future__ import annotations

import signal
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from reference_scene import MIB, UNGUARDED, Daemon, Load, block, places, process_places, setting, share_on, together
from scene import cgroup, main, wait_for

HUGE = "/sys/kernel/mm/transparent_hugepage"
FOUND_S = 60.0
ARRAY_MIB, HOT_MIB = 32, 10  # 1024 and 300 in the reference
PAGED = "pagesinregion: 512\nmaxcountperregion: 1\nscanintervalms: 2000\n"

Job = Callable[[], Mapping[str, Any]]


def policy(name: str, keys: str, tracker: str, tracker_config: str, watcher: str, bandwidth: int = 100) -> str:
    """A configuration file."""
    lines = [
        *(keys.strip().splitlines()),
        "intervalms: 2000",
        f"pidwatcher: {watcher}",
        f"tracker: {block(tracker, tracker_config)}",
        f"mover: {{intervalms: 20, bandwidth: {bandwidth}}}",
    ]
    return f"{UNGUARDED}policy:\n  name: {name}\n  config: |\n" + "".join(f"    {line}\n" for line in lines)


def pids(*loads: Load) -> str:
    return block("pidlist", f"pids: {[load.pid for load in loads]}")


def moving(
    name: str, keys: str, tracker: str, config: str, *, write: bool, huge: bool = False, cpu: int = 0
) -> dict[str, Any]:
    """Cold to node 3, hot to node 1; stopped: all to node 3; going on: hot back to node 1; stopped again."""
    with (
        Load(ARRAY_MIB, HOT_MIB, write=write, cpu=cpu, huge=huge) as load,
        Daemon(policy(name, keys, tracker, config, pids(load), 200), cpu=cpu),
    ):
        return phases(load, hot_node=1, cold_node=3)


def swapping(name: str, keys: str, tracker: str, config: str, *, write: bool, cpu: int = 1) -> dict[str, Any]:
    """Cold to swap and hot kept; stopped: all out; going on: hot back; stopped again."""
    with (
        Load(ARRAY_MIB, HOT_MIB, write=write, cpu=cpu) as load,
        Daemon(policy(name, keys, tracker, config, pids(load)), cpu=cpu) as daemon,
    ):
        found = phases(load, hot_node=None, cold_node=-1)
        found["status"] = daemon.ask(f"swap -status -pid {load.pid}")
        found["moved_gib"] = [
            float(line.split(",")[4])
            for line in daemon.ask("stats -t process_madvise -f csv").splitlines()
            if line.startswith(f"{load.pid},")
        ]
        return found


def phases(load: Load, *, hot_node: int | None, cold_node: int) -> dict[str, Any]:
    """Seconds that each phase took (None: not within the time), and what there was at the end of the first."""

    def apart() -> bool:
        hot_in_place = share_on(cold_node, load, "hot") <= 0.05
        if hot_node is not None:
            hot_in_place = share_on(hot_node, load, "hot") >= 0.95
        return hot_in_place and share_on(cold_node, load, "cold") >= 0.88

    def all_cold() -> bool:
        return share_on(cold_node, load) >= 0.95

    found: dict[str, Any] = {"apart_s": wait_for(apart, FOUND_S)}
    time.sleep(4)  # it stays so
    found["hot"], found["cold"] = places(load.pid, load.hot), places(load.pid, load.cold)
    for name, number, reached in (
        ("stopped", signal.SIGSTOP, all_cold),
        ("going_on", signal.SIGCONT, apart),
        ("stopped_again", signal.SIGSTOP, all_cold),
    ):
        load.signal(number)
        found[f"{name}_s"] = wait_for(reached, FOUND_S)
    return found


AGE_MOVE = "idledurationms: 4000\nidlenumas: [3]\nactivedurationms: 3000\nactivenumas: [1]"
HEAT = "heatnumas: {classes}\nheatmap: {{heatmax: 0.01, heatretention: 0, heatclasses: {count}}}"
HEAT_SWAP = HEAT.format(classes="{0: [-1]}", count=5)
HEAT_MOVE = HEAT.format(classes="{0: [3], 1: [1]}", count=2)
OFTEN = "pagesinregion: 512\nmaxcountperregion: 0\nscanintervalms: 1000\n"


def age() -> None:
    softdirty = "pagesinregion: 256\nmaxcountperregion: 0\nscanintervalms: 2000\n"
    together(
        {
            "age-move-softdirty": lambda: moving("age", AGE_MOVE, "softdirty", softdirty, write=True),
            "age-move-idlepage": lambda: moving("age", AGE_MOVE, "idlepage", PAGED, write=False),
            "age-swap-idlepage": lambda: swapping("age", "swapoutms: 4000", "idlepage", PAGED, write=False),
            "age-swap-softdirty": lambda: swapping("age", "swapoutms: 4000", "softdirty", softdirty, write=True),
        }
    )


def heat() -> None:
    # A huge page that the kernel puts together itself counts as written.
    with setting(f"{HUGE}/enabled", "always"), setting(f"{HUGE}/khugepaged/scan_sleep_millisecs", "3600000"):
        together(
            {
                "heat-move-idlepage": lambda: moving("heat", HEAT_MOVE, "idlepage", OFTEN, write=False, huge=True),
                "heat-move-softdirty": lambda: moving("heat", HEAT_MOVE, "softdirty", OFTEN, write=True),
                "heat-swap-idlepage": lambda: swapping("heat", HEAT_SWAP, "idlepage", OFTEN, write=False),
                "heat-swap-softdirty": lambda: swapping("heat", HEAT_SWAP, "softdirty", OFTEN, write=True),
            }
        )


def share_of(node: int, wanted: float, tracker: str, config: str, *, cpu: int) -> dict[str, Any]:
    """Ratio 0.3 to swap or 0.4 to a node, of a process that uses 2 of 32 MiB: the share reached, and after a while."""
    keys = f"ratio: {wanted}" + ("" if node < 0 else f"\nratiotargets: [{node}]")
    with (
        Load(ARRAY_MIB, 2, write=tracker == "softdirty", cpu=cpu) as load,
        Daemon(policy("ratio", keys, tracker, config, pids(load)), cpu=cpu),
    ):
        reached_s = wait_for(lambda: abs(process_places(load.pid).get(node, 0.0) - wanted) <= 0.05, FOUND_S)
        time.sleep(4)
        return {
            "reached_s": reached_s,
            "share": process_places(load.pid).get(node, 0.0),
            "hot": places(load.pid, load.hot),
        }


def everything_out() -> dict[str, Any]:
    """Ratio 1.0 with tracker finder on a cgroup: also of a process that comes later."""
    finder = "regionsupdatems: 500"
    with cgroup("e2e-ratio") as group, ExitStack() as stack:
        watcher = block("cgroups", f"intervalms: 500\ncgroups: [{group}]")
        first = stack.enter_context(Load(16, 0, cgroup=group, cpu=1))
        keys = "ratio: 1.0\nratiotargets: [-1]"
        stack.enter_context(Daemon(policy("ratio", keys, "finder", finder, watcher), cpu=1))
        first_s = wait_for(lambda: process_places(first.pid).get(-1, 0.0) >= 0.95, FOUND_S)
        second = stack.enter_context(Load(32, 0, cgroup=group, cpu=1))
        second_s = wait_for(lambda: process_places(second.pid).get(-1, 0.0) >= 0.95, FOUND_S)
        return {
            "first_s": first_s,
            "second_s": second_s,
            "shares": [process_places(each.pid).get(-1, 0.0) for each in (first, second)],
        }


def ratio() -> None:
    softdirty = "pagesinregion: 256\nmaxcountperregion: 0\nscanintervalms: 2000\n"
    together(
        {
            "ratio-swap-softdirty": lambda: share_of(-1, 0.3, "softdirty", softdirty, cpu=1),
            "ratio-swap-idlepage": lambda: share_of(-1, 0.3, "idlepage", PAGED, cpu=1),
            "ratio-swap-finder": everything_out,
            "ratio-move-softdirty": lambda: share_of(3, 0.4, "softdirty", softdirty, cpu=0),
            "ratio-move-idlepage": lambda: share_of(3, 0.4, "idlepage", PAGED, cpu=0),
        }
    )


def demote_cgroup() -> dict[str, Any]:
    """What one interval found idle goes to node 3, one way; stopped: everything."""
    with cgroup("e2e-demote") as group, Load(ARRAY_MIB, HOT_MIB, cgroup=group) as load:
        watcher = block("cgroups", f"intervalms: 1000\ncgroups: [{group}]")
        text = f"intervalms: 2000\nidlenumas: [3]\npidwatcher: {watcher}\nmover: {{intervalms: 20, bandwidth: 10000}}"
        with Daemon(f"{UNGUARDED}policy: {block('demote-idle', text)}"):
            cold_s = wait_for(lambda: share_on(3, load, "cold") >= 0.95, FOUND_S)
            time.sleep(3)
            hot = share_on(3, load, "hot")
            load.signal(signal.SIGSTOP)
            all_s = wait_for(lambda: share_on(3, load) >= 0.95, FOUND_S)
            load.signal(signal.SIGCONT)
            time.sleep(3)
            return {"cold_s": cold_s, "hot_share": hot, "all_s": all_s, "one_way": share_on(3, load)}


def demote_pages_of_interest() -> dict[str, Any]:
    """Only what the files name goes, and nothing while their writer has the lock."""
    import fcntl

    folder = Path("/tmp/poi")
    folder.mkdir()
    with Load(ARRAY_MIB, HOT_MIB) as load:
        text = f"intervalms: 2000\nidlenumas: [3]\npagesofinterestdir: {folder}\nmover: {{bandwidth: 10000}}"
        start, end = load.cold[0]
        middle = start + 8 * MIB  # 200 of 1024 in the reference

        def moved() -> float:
            return share_on(3, load) * ARRAY_MIB

        def write(first: int, last: int) -> None:
            (folder / f"{load.pid}.vab").write_bytes(struct.pack("<QQ", first, last))

        with Daemon(f"{UNGUARDED}policy: {block('demote-idle', text)}"), open(folder / "lock", "w") as lock:
            time.sleep(5)
            empty = moved()
            fcntl.flock(lock, fcntl.LOCK_EX)
            write(start, middle)
            time.sleep(4)
            locked = moved()
            fcntl.flock(lock, fcntl.LOCK_UN)
            some_s = wait_for(lambda: moved() >= 7.5, FOUND_S)
            time.sleep(2)
            some = moved()
            fcntl.flock(lock, fcntl.LOCK_EX)
            write(middle, end)
            fcntl.flock(lock, fcntl.LOCK_UN)
            rest_s = wait_for(lambda: moved() >= 0.95 * (end - start) / MIB, FOUND_S)
            return {
                "empty_mib": empty,
                "locked_mib": locked,
                "some_s": some_s,
                "some_mib": some,
                "rest_s": rest_s,
                "hot": places(load.pid, load.hot),
            }


def demote() -> None:
    with setting(f"{HUGE}/enabled", "never"):
        together({"demote-idle": demote_cgroup, "demote-idle-poi": demote_pages_of_interest})


if __name__ == "__main__":
    main({"age": age, "heat": heat, "ratio": ratio, "demote": demote})
