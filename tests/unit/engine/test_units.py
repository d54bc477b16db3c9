"""Durations, sizes, rates and percents: one grammar each, and for any other text an error that says what is taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from memtier_engine.errors import ConfigError
from memtier_engine.units import INT64_MAX, Durations, Percents, Rates, Sizes, parse_share

GO = Durations(days=False, signed=True)
"""What time.ParseDuration takes."""
EVERYTHING = (
    Durations().nanoseconds,
    Durations(above_zero=True).nanoseconds,
    Durations(bare="ns", whole=True).nanoseconds,
    Durations(bare="s", signed=True, loose=True).nanoseconds,
    GO.nanoseconds,
    Sizes().to_bytes,
    Sizes(signed=True, whole=True, any_case=False, blanks=False).to_bytes,
    Sizes(i=False, b=False).to_bytes,
    Rates().mib_per_s,
    Rates(bare="MiB/s").mib_per_s,
    Percents().percent,
    Percents(bare=True, per_minute=True, above_zero=True, most=100).percent,
)
_MINUTE, _HOUR = 60 * 10**9, 3600 * 10**9


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("0", 0),
        ("-0", 0),
        ("+0", 0),
        ("+5s", 5 * 10**9),
        ("-5s", -5 * 10**9),
        ("5.s", 5 * 10**9),
        (".5s", 5 * 10**8),
        ("1.0040s", 1004 * 10**6),
        ("100.00100s", 100_001 * 10**6),
        ("10ns", 10),
        ("11us", 11_000),
        ("12µs", 12_000),
        ("12μs", 12_000),
        ("13ms", 13 * 10**6),
        ("16h", 16 * _HOUR),
        ("3h30m", 3 * _HOUR + 30 * _MINUTE),
        ("10.5s4m", 4 * _MINUTE + 10_500 * 10**6),
        ("-2m3.4s", -2 * _MINUTE - 3_400 * 10**6),
        ("1h2m3s4ms5us6ns", _HOUR + 2 * _MINUTE + 3_004_005_006),
        ("39h9m14.425s", 39 * _HOUR + 9 * _MINUTE + 14_425 * 10**6),
        ("9007199254740993ns", 9007199254740993),
        ("9223372036854775807ns", INT64_MAX),
        ("9223372036854775.807us", INT64_MAX),
        ("-9223372036854775808ns", -INT64_MAX - 1),
        ("0.3333333333333333333h", 20 * _MINUTE),
        ("0.100000000000000000000h", 6 * _MINUTE),
        ("0.830103483285477580700h", 49 * _MINUTE + 48_372_539_827),
    ],
)
def test_durations_are_those_of_go(text: str, nanoseconds: int) -> None:
    """The vectors of Go's own test."""
    assert GO.nanoseconds(text) == nanoseconds


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "3",
            "-",
            "s",
            ".",
            "-.",
            ".s",
            "+.s",
            "1d",
            "1 s",
            "1e3s",
            "1s ns",
            "1S",
            "--1s",
            "1h-1m",
            "nan",
            "1_0s",
        ),
        *("\x85\x85", "hello \uffff world", "9223372036854775808ns", "-9223372036854775809ns", "3000000h", "٣s"),
        *("9223372036854775.808us", "9223372036854ms775us808ns", f"{'0' * 64}1s"),
    ],
)
def test_what_go_refuses_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GO.nanoseconds(text, key_path="grace")
    assert caught.value.key_path == "grace"
    assert caught.value.hint == "write it like 500ms, 10s, 5m or 1m30s"


def test_a_place_says_what_it_takes_of_the_grammar() -> None:
    assert Durations().nanoseconds("2d") == 48 * _HOUR
    assert Durations(bare="s").seconds("1.5") == 1.5
    loose = Durations(bare="s", signed=True, days=False, loose=True)
    assert [loose.seconds(text) for text in ("1 s", "1e3", "-1.5e-3 s", " 2h", "1m 30 s")] == [
        1,
        1000,
        -0.0015,
        7200,
        90,
    ]
    for text in ("1e999", "1e99999999999s", "inf", "infinity", "5d"):
        with pytest.raises(ConfigError):
            loose.seconds(text)
    for durations, text in (
        (Durations(), "-1s"),
        (Durations(above_zero=True), "0"),
        (Durations(above_zero=True), "0.1ns"),
        (Durations(whole=True), "1.5s"),
    ):
        with pytest.raises(ConfigError):
            durations.seconds(text)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("7", 7),
        ("7b", 7),
        ("10K", 10240),
        ("10KB", 10240),
        ("10 MB", 10 << 20),
        (" 1.5GiB ", 3 << 29),
        ("1.1k", 1126),
        (".5M", 1 << 19),
        ("2Ti", 2 << 40),
        ("1p", 1 << 50),
        ("7E", 7 << 60),
        ("9223372036854775807", INT64_MAX),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert Sizes().to_bytes(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    ["", "k", "1X", "i", "1i", "1iB", "-1", "+1", "1 i", "1kk", "1bk", "0x10", "1e3", "8E", "٣", "1\u212a", "9" * 65],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sizes().to_bytes(text)
    assert caught.value.hint == "a number and k, M, G or T, such as 512M"
    assert len(str(caught.value)) < 150


def test_a_place_says_which_sizes_it_takes() -> None:
    strict = Sizes(prefixes="kMG", any_case=False, i=False, b=False, signed=True, whole=True, blanks=False)
    assert [strict.to_bytes(text) for text in ("1k", "-2M", "+3G")] == [1024, -2 << 20, 3 << 30]
    for text in ("1K", "1m", "1T", "1ki", "1kB", "1.5M", "1 M"):
        with pytest.raises(ConfigError):
            strict.to_bytes(text)


def test_rates_are_in_bytes_per_second_and_above_0() -> None:
    rates = Rates()
    texts = ("50MiB/s", "512KiB/s", "2GiB/s", "1 MiB/s", "0.5MiB/s", "1048.576kB/s", "1.048576MB/s", "1.073741824GB/s")
    assert [rates.mib_per_s(text) for text in texts] == [50, 0.5, 2048, 1, 0.5, 1, 1, 1024]
    assert Rates(bare="MiB/s").mib_per_s("20") == 20
    for text in ("", "50", "50MiB", "0MiB/s", "-1MiB/s", "1  MiB/s", "1mib/s", "1e3MiB/s", "MiB/s"):
        with pytest.raises(ConfigError):
            rates.mib_per_s(text)


def test_percents_and_shares() -> None:
    assert [Percents(per_minute=True).percent(text) for text in ("5%", " 0.2 % / min", "12.5%")] == [5, 0.2, 12.5]
    assert Percents(bare=True).percent("5") == 5
    for text in ("5", "%", "-5%", "5%%", "5%/min", "nan%"):
        with pytest.raises(ConfigError):
            Percents().percent(text)
    assert [parse_share(text, 1000) for text in ("8%", "12.5 %", "100%", "0%", "2k")] == [80, 125, 1000, 0, 2048]
    with pytest.raises(ConfigError, match="or a size"):
        parse_share("100.1%", 1000)


def go_text(nanoseconds: int) -> str:
    """A duration as Go's Duration.String writes it: 1h2m3.5s, 1.5ms."""
    left, sign = abs(nanoseconds), "-" if nanoseconds < 0 else ""
    if 0 < left < 10**9:
        unit, unit_ns = ("ns", 1) if left < 10**3 else ("µs", 10**3) if left < 10**6 else ("ms", 10**6)
        return sign + decimal(left, unit_ns) + unit
    hours, left = divmod(left, _HOUR)
    minutes, left = divmod(left, _MINUTE)
    head = (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "")
    return f"{sign}{head}{decimal(left, 10**9)}s"


def decimal(value: int, unit: int) -> str:
    whole, rest = divmod(value, unit)
    digits = str(rest).zfill(len(str(unit)) - 1).rstrip("0") if rest else ""
    return f"{whole}.{digits}" if digits else str(whole)


def test_the_text_of_a_duration_is_go_s() -> None:
    vectors = (0, 1, 1100, 2_200_000, 3_300_000_000, 4 * _MINUTE + 5 * 10**9, 5 * _HOUR + 6 * _MINUTE + 7_001_000_000)
    assert [go_text(each) for each in vectors] == ["0s", "1ns", "1.1µs", "2.2ms", "3.3s", "4m5s", "5h6m7.001s"]


@given(st.integers(-INT64_MAX - 1, INT64_MAX))
def test_a_duration_that_go_writes_is_read_as_what_it_was(nanoseconds: int) -> None:
    assert GO.nanoseconds(go_text(nanoseconds)) == nanoseconds


@given(st.integers(0, INT64_MAX), st.sampled_from(["", "i", "B", "iB", "b"]), st.booleans())
def test_a_size_written_in_its_greatest_unit_is_read_as_what_it_was(size: int, ending: str, small: bool) -> None:
    power = 0
    while size and size % 1024 == 0 and power < 6:
        size, power = size // 1024, power + 1
    prefix = ("", *"KMGTPE")[power]
    text = f"{size}{prefix.lower() if small else prefix}{ending if prefix else ending.removeprefix('i')}"
    assert Sizes().to_bytes(text) == size * 1024**power


@given(st.integers(1, 10**12), st.integers(0, 6))
def test_a_rate_or_percent_in_decimal_is_read_as_the_nearest_float(value: int, decimals: int) -> None:
    text = decimal(value, 10**decimals)
    assert Rates().mib_per_s(f"{text}MiB/s") == float(text)
    assert Percents().percent(f"{text}%") == float(text)


@given(st.sampled_from(EVERYTHING), st.one_of(st.text(), st.text("0123456789.+-eE µμnumshdkKMGTiBb/%", max_size=80)))
@example(EVERYTHING[3], "1e99999999999999999999")
@example(EVERYTHING[3], "1e-99999999999999999999")
@example(EVERYTHING[5], "9" * 5000)
def test_any_text_is_a_number_or_an_error_with_what_may_be_written(read: Callable[[str], float], text: str) -> None:
    try:
        found: float | ConfigError = read(text)
    except ConfigError as failure:
        found = failure
    if isinstance(found, ConfigError):
        assert found.hint
        assert len(str(found)) < 500
    else:
        assert abs(found) < 1e80
