"""memory.reclaim under a token bucket, on a fake cgroup that gives up what the test says."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from memtier_engine.errors import AccessDenied, KernelCallError, Unavailable
from memtier_engine.hostfs.cgroup import Cgroup
from memtier_engine.mover.mover import MoverConfig
from memtier_engine.reclaim.reclaimer import CgroupReclaimer
from support.hostfolder import HostFolder

MIB = 1 << 20


class Kernel:
    """Answers writes to memory.reclaim."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.machine = HostFolder(root)
        self.path = self.machine.cgroup("sys/fs/cgroup/a", memory_current=str(100 * MIB), memory_reclaim="")
        (self.path / "memory.swap.current").write_text("0")
        self.left = 100 * MIB
        """What can still be reclaimed."""
        self.failure: KernelCallError | None = None
        self.written: list[str] = []
        monkeypatch.setattr(Cgroup, "write", lambda cgroup, name, value: self._write(name, value))

    def _write(self, name: str, value: str) -> None:
        assert name == "memory.reclaim"
        self.written.append(value)
        if self.failure is not None:
            raise self.failure
        size = int(value.split()[0])
        taken = min(size, self.left)
        self.left -= taken
        for file, change in (("memory.current", -taken), ("memory.swap.current", taken)):
            path = self.path / file
            path.write_text(str(int(path.read_text()) + change))
        if taken < size:
            raise KernelCallError.from_errno("write memory.reclaim", errno.EAGAIN)

    def reclaimer(self, bandwidth_mib_per_s: float | None = None, swappiness: int | None = None) -> CgroupReclaimer:
        config = MoverConfig(bandwidth_mib_per_s=bandwidth_mib_per_s)
        return CgroupReclaimer(self.path, config, self.machine.host, now_s=0, swappiness=swappiness)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path, monkeypatch)


def test_all_that_is_asked_for_is_reclaimed_in_short_calls(kernel: Kernel) -> None:
    reclaimer = kernel.reclaimer()
    reclaimer.replace(50 * MIB)
    outcomes = []
    while reclaimer.wait_s() is not None:
        outcome = reclaimer.pump(0)
        assert outcome is not None
        outcomes.append(outcome)
    assert sum(outcome.reclaimed_bytes for outcome in outcomes) == 50 * MIB
    assert sum(outcome.swapped_bytes or 0 for outcome in outcomes) == 50 * MIB
    assert outcomes[0].requested_bytes == 2 * MIB
    assert len(outcomes) > 3


def test_the_rate_stays_within_the_limit(kernel: Kernel) -> None:
    reclaimer = kernel.reclaimer(bandwidth_mib_per_s=10)
    reclaimer.replace(100 * MIB)
    total = 0
    for step in range(300):
        outcome = reclaimer.pump(step * 0.01)
        total += outcome.reclaimed_bytes if outcome else 0
    assert 28 * MIB <= total <= 31 * MIB


def test_what_the_cgroup_cannot_give_is_given_up(kernel: Kernel) -> None:
    """The kernel says EAGAIN; after three calls without effect nothing is pending."""
    kernel.left = 3 * MIB
    reclaimer = kernel.reclaimer()
    reclaimer.replace(50 * MIB)
    errors = []
    while reclaimer.wait_s() is not None:
        outcome = reclaimer.pump(0)
        assert outcome is not None
        errors.append(outcome.error)
    assert kernel.left == 0
    assert "EAGAIN" in (errors[-1] or "")
    assert len(kernel.written) <= 6


def test_swappiness_is_passed_on(kernel: Kernel) -> None:
    reclaimer = kernel.reclaimer(swappiness=200)
    reclaimer.replace(MIB)
    reclaimer.pump(0)
    assert kernel.written == [f"{MIB} swappiness=200"]


def test_a_new_request_replaces_the_old_one(kernel: Kernel) -> None:
    reclaimer = kernel.reclaimer()
    reclaimer.replace(50 * MIB)
    reclaimer.replace(0)
    assert reclaimer.pump(0) is None
    assert reclaimer.wait_s() is None


def test_a_cgroup_that_is_removed_ends_it_quietly(kernel: Kernel) -> None:
    kernel.failure = KernelCallError.from_errno("write memory.reclaim", errno.ENODEV)
    reclaimer = kernel.reclaimer()
    reclaimer.replace(50 * MIB)
    for _ in range(3):
        reclaimer.pump(0)
    assert reclaimer.wait_s() is None


def test_what_no_retry_can_mend_is_raised(kernel: Kernel) -> None:
    kernel.failure = KernelCallError.from_errno("write memory.reclaim", errno.EACCES)
    reclaimer = kernel.reclaimer()
    reclaimer.replace(MIB)
    with pytest.raises(AccessDenied):
        reclaimer.pump(0)


def test_a_cgroup_without_memory_reclaim_says_what_it_needs(kernel: Kernel) -> None:
    (kernel.path / "memory.reclaim").unlink()
    with pytest.raises(Unavailable, match=r"Linux 5\.19"):
        kernel.reclaimer()
