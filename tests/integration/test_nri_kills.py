"""nri-memtierd killed with SIGKILL at random points: containers unchanged, nothing left, the next start adopts.

Twenty points; MEMTIER_KILLS for more or fewer, MEMTIER_SEED for other ones.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from support.cgroups import temporary_cgroup
from support.kill_storm import storm
from support.swap import temporary_zram_swap

KILLS = int(os.environ.get("MEMTIER_KILLS", "20"))
SEED = int(os.environ.get("MEMTIER_SEED", "7"))

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root"),
    pytest.mark.timeout(600 + 60 * KILLS),
]


@pytest.mark.parametrize("engine", ["in-process", "process"])
def test_killed_at_random_points_it_leaves_containers_alone_and_the_next_start_adopts(
    tmp_path: Path, engine: str
) -> None:
    """A tenth of the points with a process per container, whose engines outlive the program until the next start."""
    points = max(1, KILLS // 10) if engine == "process" else KILLS - max(1, KILLS // 10)
    with temporary_zram_swap(256 << 20), temporary_cgroup("kills") as cgroup:
        found = asyncio.run(storm(tmp_path, cgroup, points, engine=engine, seed=SEED))
        print(f"{engine}: {dict(found.kills)}, {found.adoptions} adopted, memory was out at {found.swapped_out} kills")
        assert found.complaints == []
        assert found.kills.total() == points
        assert found.adoptions >= 3
