"""What paging out to a disk frees, in a v2 cgroup, beside others' memory in use. One JSON line each."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from saying import say
from scene import CGROUPS, cgroup, main, meme

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.hostfs.swapkind import in_words
from memtier_engine.model import MoveTask, Spans
from memtier_engine.mover.mover import Mover, MoverConfig

MIB = 1 << 20


def number(group: Path, name: str) -> int:
    return int((group / name).read_text())


def stat(group: Path, name: str) -> int:
    lines = (group / "memory.stat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def swap_cache() -> None:
    """64 MiB nobody uses are paged out; in the same cgroup another process uses 24 MiB and a file was read."""
    (CGROUPS / "cgroup.subtree_control").write_text("+memory")
    host = Host()
    with (
        cgroup("e2e-effects") as group,
        meme(64, 1, write=True, cgroup=group) as idle,
        meme(24, 24, write=True, cgroup=group) as busy,
    ):
        process = process_id(host, idle.pid)
        starts = np.array([start for start, _ in idle.cold], np.uint64)
        ends = np.array([end for _, end in idle.cold], np.uint64)
        mover = Mover(MoverConfig(bandwidth_mib_per_s=50), host, now_s=time.monotonic())
        before, file_before = number(group, "memory.current"), stat(group, "file ")
        mover.add(MoveTask(process, Spans(starts, ends)))
        moved = 0
        end_s = time.monotonic() + 60
        while time.monotonic() < end_s and (mover.has_work or mover.effects.not_yet_freed_bytes > MIB):
            moved += sum(outcome.moved_bytes for outcome in mover.pump(time.monotonic()))
            if not mover.has_work:
                end_s = min(end_s, time.monotonic() + 10)
            time.sleep(min(0.05, mover.wait_s() or 0.05))
        say(
            kind="swap-cache",
            swap=in_words(host),
            moved=moved,
            fell=before - number(group, "memory.current"),
            swap_cached=stat(group, "swapcached "),
            not_yet_freed=mover.effects.not_yet_freed_bytes,
            others_out=busy.hot_out(),
            file_fell=file_before - stat(group, "file "),
        )
        mover.close()


if __name__ == "__main__":
    main({"swap-cache": swap_cache})
