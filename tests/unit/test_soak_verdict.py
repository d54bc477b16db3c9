"""What a soak calls a leak."""

from __future__ import annotations

import numpy as np
import pytest

from soak.verdict import Sample, judge, theil_sen

MIB = 1 << 20
IDLE = Sample(0, 50 * MIB, 11, 5)


def run(minutes: float, mib_per_hour: float, *, noise_mib: float = 0.4, warm_up_mib: float = 0.0) -> list[Sample]:
    """A sample every 2 s."""
    rng = np.random.default_rng(3)
    times_s = np.arange(0, minutes * 60, 2.0)
    early = np.maximum(0, 0.2 - times_s / times_s[-1]) / 0.2
    memory = 60 + mib_per_hour * times_s / 3600 - warm_up_mib * early + rng.normal(0, noise_mib, len(times_s))
    return [Sample(at_s, int(size * MIB), 80, 5) for at_s, size in zip(times_s.tolist(), memory.tolist(), strict=True)]


@pytest.mark.parametrize("minutes", [2, 20, 60])
def test_memory_that_only_breathes_is_flat(minutes: int) -> None:
    verdict = judge(run(minutes, 0.0), (IDLE, IDLE))
    assert verdict.complaints == ()
    assert verdict.memory_mib == pytest.approx(60, abs=0.5)


def test_in_an_hour_more_than_a_mib_per_hour_shows() -> None:
    assert judge(run(60, 0.5), (IDLE, IDLE)).complaints == ()
    (complaint,) = judge(run(60, 2.0), (IDLE, IDLE)).complaints
    assert "memory grows by" in complaint


def test_in_two_minutes_a_leak_per_container_or_process_shows() -> None:
    """What reference cycles cost before they were cut: 7 MiB a minute."""
    assert judge(run(2, 400), (IDLE, IDLE)).complaints


def test_what_grows_only_in_the_beginning_is_no_leak() -> None:
    assert judge(run(60, 0.0, warm_up_mib=30), (IDLE, IDLE)).complaints == ()


def test_descriptors_and_threads_are_counted_without_containers() -> None:
    after = Sample(9, 50 * MIB, 12, 6)
    assert judge(run(2, 0), (IDLE, after)).complaints == (
        "1 file descriptors are left open, of 11 before",
        "1 threads are left, of 5 before",
    )


def test_the_slope_is_deaf_to_single_peaks() -> None:
    times = np.arange(100.0)
    values = 3 * times
    values[::10] += 500
    assert theil_sen(times, values) == pytest.approx(3, abs=0.2)
