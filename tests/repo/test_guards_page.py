"""docs/guards.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from memtier_engine.config.files import parse
from memtier_engine.config.guards import THRESHOLDS
from memtier_engine.guards.config import GuardsConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs/guards.md").read_text()


def number(text: str) -> float:
    return float(text.removesuffix("%"))


def test_every_guard_with_thresholds_is_in_the_table_with_its_own() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+ ?%?) \| ([\d.]+ ?%?) \| .* \|$", PAGE, re.M)
    default = GuardsConfig()
    documented = {key: (number(close), number(opens)) for key, close, opens in rows}
    assert documented == {
        key: (getattr(default, field).close_at, getattr(default, field).open_at) for key, field in THRESHOLDS.items()
    }


def test_the_other_defaults_are_those_of_the_page() -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \| ([^|]+) \| [^|]* \|$", PAGE, re.M))
    default = GuardsConfig()
    assert default.swap_writes_bytes_per_day == int(rows["swapwritesperday"].removesuffix("G")) << 30
    assert default.skip.rss_least_bytes == int(rows["skip.rssleast"].removesuffix("M")) << 20
    assert rows["protection"] == str(default.protection).lower()
    assert rows["skip.realtime"] == str(default.skip.realtime).lower()
    assert rows["skip.traced"] == str(default.skip.traced).lower()
    assert default.skip.names == ()
    assert default.start_grace_s is None


def test_the_example_is_a_configuration() -> None:
    [example] = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    guards = parse(example).guards
    assert guards.io_psi_node is None
    assert guards.refaults is not None
    assert (guards.refaults.close_at, guards.refaults.open_at) == (2, 1)
    assert guards.swap_writes_bytes_per_day == 200 << 30
