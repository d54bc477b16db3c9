"""Durations, bandwidths, sizes and times as people write them."""

from __future__ import annotations

import click
import pytest

from memtier_cli.meme import BadValue, changes, size_bytes, time_ns
from memtier_cli.memtier.values import Bandwidth, Duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *[("500ms", 0.5), ("10s", 10), ("1.5m", 90), ("1h", 3600), ("2d", 172800), ("1m30s", 90)],
        *[("1 s", 1), ("5min", 300), ("1m 30s", 90), ("1 hour 30 minutes", 5400), ("10sec", 10), ("2 days", 172800)],
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "0s", "0", "1w", "nan", "1e3s", "50MB", "5 m in"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(click.BadParameter, match="write it like 500ms"):
        Duration().convert(text, None, None)


@pytest.mark.parametrize(("kind", "text"), [(Duration(), "60"), (Duration(), "1.5"), (Bandwidth(), "50")])
def test_a_number_alone_is_told_to_have_no_unit(kind: Duration | Bandwidth, text: str) -> None:
    with pytest.raises(click.BadParameter, match=f"{text}' has no unit; write it like"):
        kind.convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "mib_per_s"),
    [
        *[("50MiB/s", 50), ("512KiB/s", 0.5), ("2GiB/s", 2048), ("none", None), ("1 MiB/s", 1), ("NONE", None)],
        *[("50M", 50), ("50MiB", 50), ("50mib/s", 50), ("512k", 0.5), ("1GiBps", 1024)],
        *[("50MB", 50e6 / (1 << 20)), ("50 mb/s", 50e6 / (1 << 20)), ("512KB", 512e3 / (1 << 20))],
    ],
)
def test_bandwidths(text: str, mib_per_s: float | None) -> None:
    assert Bandwidth().convert(text, None, None) == (mib_per_s and pytest.approx(mib_per_s))


@pytest.mark.parametrize("text", ["", "0", "0MiB/s", "0MB", "-1MiB/s", "fast", "50Mb/s", "50Mib/s", "50m/min", "50B"])
def test_what_is_no_bandwidth_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(click.BadParameter, match="write it like 50MiB/s"):
        Bandwidth().convert(text, None, None)


def test_the_exerciser_s_sizes_times_and_changes() -> None:
    assert [size_bytes(text) for text in ("7", "1k", "2M", "1G", "-5k")] == [7, 1024, 2 << 20, 1 << 30, -5120]
    assert [time_ns(text) for text in ("7", "1us", "2ms", "3s", "1m", "1h")] == [
        7,
        1000,
        2 * 10**6,
        3 * 10**9,
        60 * 10**9,
        3600 * 10**9,
    ]
    assert changes("1/20s,-6/2m") == [(1, 20 * 10**9), (-6, 120 * 10**9)]
    for bad in ("1K", "x", "", "1.5M"):
        with pytest.raises(BadValue):
            size_bytes(bad)
    for bad in ("1d", "s", "1.5s"):
        with pytest.raises(BadValue):
            time_ns(bad)
    for bad in ("1", "x/2s", "1/"):
        with pytest.raises(BadValue):
            changes(bad)
