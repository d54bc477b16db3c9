"""CreateContainer as a runtime sees it: our plugin against one on NRI's Go stub, under the same Go runtime side.

Each plugin is a process of its own with the same answer, `memory.swap.max` set to `max`. The rounds take turns, and
the quietest round of each counts: another program on the machine disturbs one round, not one plugin.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np

from bench.measure import ratio_line
from interop import nri, peers
from interop.nri import CONTAINER, POD, Release
from interop.peers import Peer, PeerUnavailable

ROUNDS = 7
CALLS = 1000
WARM_UP = 300
LIMIT = 3.0

OURS = """
import sys
from nri_core import Adjustment, Plugin, run

class Swap(Plugin):
    name, index = "ours", "30"

    async def create_container(self, pod, container):
        return Adjustment().unified("memory.swap.max", "max")

run(Swap(), socket_path=sys.argv[1])
"""
THEIRS = {
    "name": "theirs",
    "index": "30",
    "quiet": True,
    "adjust": {"linux": {"resources": {"unified": {"memory.swap.max": "max"}}}},
}


@contextlib.asynccontextmanager
async def runtime_with(
    release: Release, socket: Path, name: str, program: Path, *arguments: str
) -> AsyncIterator[Peer]:
    """A Go runtime with the one plugin, whose program is given."""
    async with nri.go_runtime(release, socket) as runtime, Peer(program, *arguments):
        await nri.in_list(runtime, f"30-{name}")
        yield runtime


async def round_us(runtime: Peer, calls: int) -> tuple[float, float]:
    """(median, 99th percentile) of the round trips, in microseconds."""
    request = {"pod": POD, "container": CONTAINER}
    answer = await runtime.do("bench", count=calls, request=request, wait_s=120)
    assert "error" not in answer, answer
    adjust = await nri.create(runtime)
    assert adjust["linux"]["resources"]["unified"] == {"memory.swap.max": "max"}, adjust
    median, high = np.percentile(answer["microseconds"], [50, 99])
    return float(median), float(high)


async def measure(release: Release) -> bool:
    """Run the rounds and print the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        a, b = Path(folder) / "a", Path(folder) / "b"
        async with (
            runtime_with(release, a, "ours", Path(sys.executable), "-c", OURS, str(a)) as ours,
            runtime_with(release, b, "theirs", release.program, "plugin", str(b), json.dumps(THEIRS)) as theirs,
        ):
            runtimes = (ours, theirs)
            for runtime in runtimes:
                await round_us(runtime, WARM_UP)
            rounds = [[await round_us(runtime, CALLS) for runtime in runtimes] for _ in range(ROUNDS)]
    best = np.min(np.array(rounds), axis=0)  # [ours, theirs] x [p50, p99]
    (our_p50, our_p99), (their_p50, their_p99) = best.tolist()
    held = ratio_line(
        f"CreateContainer p50, NRI {release.version}",
        f"{our_p50:.0f} us, Go stub {their_p50:.0f} us",
        our_p50 / their_p50,
        LIMIT,
    )
    return (
        ratio_line(
            f"CreateContainer p99, NRI {release.version}",
            f"{our_p99:.0f} us, Go stub {their_p99:.0f} us",
            our_p99 / their_p99,
            LIMIT,
        )
        and held
    )


def run() -> bool:
    """Against the newest NRI release. Without a Go toolchain there is nothing to compare with: that is said."""
    try:
        release = nri.release(peers.NEWEST_NRI)
    except PeerUnavailable as reason:
        print(f"CreateContainer against Go: not measured: {reason}")
        return True
    return asyncio.run(measure(release))
