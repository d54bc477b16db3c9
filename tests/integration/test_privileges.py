"""Every tracker and mover works with exactly the capabilities that the table lists, and says which one it lacks."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.probe import probe
from memtier_engine.trackers.registry import why_not
from support.swap import temporary_zram_swap
from support.trials import Trials, complaints, judge, trials

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")


@pytest.fixture(scope="module")
def scene() -> Iterator[Trials]:
    with temporary_zram_swap(256 << 20), trials() as made:
        yield made


@pytest.mark.parametrize(
    "tracker", ["bpf", "bpf-sampled", "finder", "idlepage", "refs", "softdirty", "stub", "userfault"]
)
def test_a_tracker_needs_exactly_what_the_table_says_and_names_what_is_missing(scene: Trials, tracker: str) -> None:
    """On the memory of another user's process, but for userfault, which only knows its own."""
    why = why_not(tracker, Host())
    if why is not None:
        pytest.skip(f"tracker {tracker} does not work on this kernel ({why[0]}): `make e2e` tries it in the test VM")
    assert complaints(tracker, judge(scene, tracker)) == []


@pytest.mark.parametrize("mover", ["page-out", "move-pages"])
def test_a_mover_needs_exactly_what_the_table_says_and_names_what_is_missing(scene: Trials, mover: str) -> None:
    if mover == "page-out" and not probe(Host(), ["process-madvise"]).works("process-madvise"):
        pytest.skip("needs process_madvise: Linux 5.10 and later")
    assert complaints(mover, judge(scene, mover)) == []
