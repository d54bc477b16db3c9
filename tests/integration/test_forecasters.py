"""Heat forecasters with real children and files: the protocol, and children that misbehave."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from memtier_engine.errors import ConfigError, KernelCallError, MemtierError
from memtier_engine.forecasters.base import ForecastError, encode, parse
from memtier_engine.forecasters.chain import ChainForecaster
from memtier_engine.forecasters.stdio import StdioForecaster
from memtier_engine.forecasters.stub import StubForecaster
from memtier_engine.forecasters.trace import TraceForecaster
from memtier_engine.model import PAGE_BYTES, ProcessId
from memtier_engine.policies.heatmap import Heats
from support.waiting import WAIT_S

P, Q = ProcessId(11, 1), ProcessId(22, 1)
NOW_NS = 1_795_478_686_865_000_123

# Each child is a whole program: it reads lines of JSON and answers.
ECHO = """
import sys
for line in sys.stdin:
    sys.stdout.write(line); sys.stdout.flush()
"""
HALVE = """
import sys, json
for line in sys.stdin:
    heats = json.loads(line)
    for rows in heats.values():
        for row in rows:
            row["heat"] /= 2
    print(json.dumps(heats, indent=1), flush=True)
"""
ONCE = """
import sys
sys.stdout.write(sys.stdin.readline()); sys.stdout.flush()
"""


def heats(*heat: float) -> Heats:
    starts = np.arange(len(heat), dtype=np.uint64) * np.uint64(4 * PAGE_BYTES) + np.uint64(0x7000_0000_0000)
    times = np.full(len(heat), NOW_NS)
    return Heats(starts, starts + np.uint64(2 * PAGE_BYTES), np.array(heat, np.float64), times, times + 1)


def answering(text: str) -> str:
    return f"import sys\nfor line in sys.stdin:\n    sys.stdout.write({text!r}); sys.stdout.flush()\n"


def child(program: str, deadline_s: float = WAIT_S, **options: object) -> StdioForecaster:
    return StdioForecaster([sys.executable, "-S", "-c", program], deadline_s=deadline_s, **options)  # type: ignore[arg-type]


@pytest.fixture
def closing() -> Iterator[list[StdioForecaster]]:
    made: list[StdioForecaster] = []
    yield made
    for forecaster in made:
        forecaster.close()


def test_heats_survive_the_way_to_a_child_and_back_with_all_digits(closing: list[StdioForecaster]) -> None:
    forecaster = child(ECHO)
    closing.append(forecaster)
    given = {P: heats(1 / 3, 1e-9), Q: heats(0.0)}
    for _ in range(3):
        found = forecaster.forecast(given, NOW_NS)
        assert found is not None
        for process, own in given.items():
            back = found[process]
            for name in ("starts", "ends", "heat", "created_ns", "updated_ns"):
                assert np.array_equal(getattr(back, name), getattr(own, name)), name
    assert forecaster.starts == 1


def test_the_line_for_the_child_is_the_documented_one() -> None:
    text = encode({P: heats(0.25)})
    assert text.endswith(b"}\n")
    assert text.count(b"\n") == 1
    assert json.loads(text) == {
        "11": [{"addr": 0x7000_0000_0000, "length": 2, "heat": 0.25, "created": NOW_NS, "updated": NOW_NS + 1}]
    }


def test_a_child_may_answer_over_many_lines_and_many_megabytes(closing: list[StdioForecaster]) -> None:
    """More than fits into both pipes: reading and writing at the same time cannot lock up."""
    forecaster = child(HALVE)
    closing.append(forecaster)
    given = {P: heats(*np.linspace(0, 1, 20_000).tolist())}
    assert len(encode(given)) > 1_000_000
    found = forecaster.forecast(given, NOW_NS)
    assert found is not None
    assert np.allclose(found[P].heat, given[P].heat / 2)


def test_an_empty_object_is_a_forecast_without_heat_and_null_is_none(closing: list[StdioForecaster]) -> None:
    for text, expected in (("{}\n", {}), ("null\n", None)):
        forecaster = child(answering(text))
        closing.append(forecaster)
        assert forecaster.forecast({P: heats(1.0)}, NOW_NS) == expected


def test_keys_may_have_any_case_and_be_missing_and_unknown_pids_are_left_out() -> None:
    found = parse(b'{"11": [{"Addr": 8192, "LENGTH": 1, "Heat": 2}], "99": [{"addr": 0}]}', [P])
    assert found is not None
    assert list(found) == [P]
    assert (found[P].starts.tolist(), found[P].heat.tolist(), found[P].created_ns.tolist()) == ([8192], [2.0], [0])


def test_ranges_that_overlap_are_cut_and_out_of_order_ranges_sorted() -> None:
    found = parse(b'{"11": [{"addr": 8192, "length": 1, "heat": 2}, {"addr": 0, "length": 9, "heat": 1}]}', [P])
    assert found is not None
    assert found[P].starts.tolist() == [0, 8192]
    assert found[P].ends.tolist() == [8192, 12288]
    assert found[P].heat.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "7", '{"11": 5}', '{"11": [5]}', '{"11": [{"addr": -1}]}', '{"11": [{"heat": "x"}]}', "{", "NaN"),
        *('{"11": [{"heat": NaN}]}', '{"11": [{"length": 1e300}]}', "[" * 100_000),
    ],
)
def test_nonsense_is_an_error_and_never_a_crash(text: str) -> None:
    with pytest.raises(ForecastError):
        parse(text.encode(), [P])


def test_a_child_that_answers_nonsense_is_replaced(closing: list[StdioForecaster]) -> None:
    forecaster = child(answering("what?\n"))
    closing.append(forecaster)
    for starts in (1, 2):
        with pytest.raises(ForecastError, match="no JSON"):
            forecaster.forecast({P: heats(1.0)}, NOW_NS)
        assert forecaster.starts == starts


@pytest.mark.parametrize("program", ["import time; time.sleep(1000)", answering("{"), "while True: pass"])
def test_a_child_that_does_not_answer_in_time_is_killed(program: str, closing: list[StdioForecaster]) -> None:
    """Also when it does not even read: the round ends at its deadline and the next child starts afresh."""
    forecaster = child(program, deadline_s=0.3)
    closing.append(forecaster)
    pid = forecaster.pid
    with pytest.raises(ForecastError, match=r"no answer within 0\.3 s"):
        forecaster.forecast({P: heats(*[0.5] * 5000)}, NOW_NS)
    assert forecaster.pid is None
    assert not Path(f"/proc/{pid}").exists()


def test_a_child_that_exits_is_started_again_as_often_as_allowed(closing: list[StdioForecaster]) -> None:
    forecaster = child(ONCE, retry=1)
    closing.append(forecaster)
    given = {P: heats(0.5)}
    for _ in range(3):
        assert forecaster.forecast(given, NOW_NS) is not None
    assert forecaster.starts == 3
    hopeless = child("import sys; sys.exit(3)", retry=2)
    closing.append(hopeless)
    with pytest.raises(ForecastError, match="exited with status 3"):
        hopeless.forecast(given, NOW_NS)
    assert hopeless.starts == 3


def test_what_the_child_says_on_stderr_is_appended_to_the_file(tmp_path: Path, closing: list[StdioForecaster]) -> None:
    log = tmp_path / "child.log"
    log.write_text("before\n")
    forecaster = child("import sys; sys.stderr.write('hello\\n'); sys.stderr.flush()\n" + ECHO, stderr=f"file:{log}")
    closing.append(forecaster)
    forecaster.forecast({P: heats(0.5)}, NOW_NS)
    assert log.read_text() == "before\nhello\n"


@pytest.mark.parametrize(
    ("command", "options", "key"),
    [
        ([], {}, "command"),
        (["/nonexistent/forecaster"], {}, "command"),
        (["cat"], {"stderr": "syslog"}, "stderr"),
        (["cat"], {"stderr": "file:/nonexistent/x"}, "stderr"),
        (["cat"], {"retry": -1}, "retry"),
        (["cat"], {"deadline_s": 0}, "deadlinems"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(command: list[str], options: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        StdioForecaster(command, **options)  # type: ignore[arg-type]
    assert caught.value.key_path == key


def test_closing_ends_the_child(closing: list[StdioForecaster]) -> None:
    forecaster = child(ECHO)
    pid = forecaster.pid
    forecaster.close()
    forecaster.close()
    assert not Path(f"/proc/{pid}").exists()


def test_the_trace_file_has_a_table_per_round(tmp_path: Path) -> None:
    file = tmp_path / "heat.trace"
    trace = TraceForecaster(file)
    assert trace.forecast({Q: heats(0.5), P: heats(0.0)}, 5) is None
    hiding = TraceForecaster(file, hide_heat_zero=True)
    assert hiding.forecast({Q: heats(0.5), P: heats(0.0)}, 6) is None
    row = f"700000000000 {2 * PAGE_BYTES}"
    assert file.read_text().splitlines() == [
        "table: heat forecast 5 pid addr size heat created updated",
        f"11 {row} 0.000000000 {NOW_NS} {NOW_NS + 1}",
        f"22 {row} 0.500000000 {NOW_NS} {NOW_NS + 1}",
        "table: heat forecast 6 pid addr size heat created updated",
        f"22 {row} 0.500000000 {NOW_NS} {NOW_NS + 1}",
    ]
    trace.close()
    hiding.close()
    with pytest.raises(KernelCallError, match="No such file or directory"):
        TraceForecaster(tmp_path / "missing" / "x")


class Add:
    """Adds to every heat; or breaks."""

    name = "add"

    def __init__(self, amount: float | None) -> None:
        self.amount = amount
        self.closed = False

    def forecast(self, heats: Mapping[ProcessId, Heats], now_ns: int) -> Mapping[ProcessId, Heats] | None:
        if self.amount is None:
            raise MemtierError("broken")
        return {
            process: Heats(own.starts, own.ends, own.heat + self.amount, own.created_ns, own.updated_ns)
            for process, own in heats.items()
        }

    def close(self) -> None:
        self.closed = True


def test_a_chain_feeds_each_the_latest_result_and_passes_over_what_fails() -> None:
    events: list[str] = []
    links = (Add(1.0), Add(None), StubForecaster(), Add(2.0))
    chain = ChainForecaster(links, on_event=events.append)
    found = chain.forecast({P: heats(0.5)}, NOW_NS)
    assert found is not None
    assert found[P].heat.tolist() == [3.5]
    assert events == ["forecaster add error: broken"]
    chain.close()
    assert all(link.closed for link in links if isinstance(link, Add))


def test_a_chain_without_any_result_answers_with_its_input() -> None:
    given = {P: heats(0.5)}
    assert ChainForecaster([StubForecaster()]).forecast(given, NOW_NS) is given
