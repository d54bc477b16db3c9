"""`memtier`'s own words: what is misspelt gets a suggestion."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from memtier_cli.memtier.program import memtier


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["xcheck"], "no command is named 'xcheck': did you mean 'check'?"),
        (["rrun", "--pid", "1"], "no command is named 'rrun': did you mean 'run'?"),
        (["status"], "no command is named 'status': there are check, demo, run"),
        (["run", "--idle-afer", "1s"], "'--idle-after'"),
        (["run", "--idle-after", "60"], "'60' has no unit; write it like 500ms, 10s, 5m or 1m30s"),
        (["run"], "give one of --cgroup, --pid, --all and --config"),
        (["run", "--config", "x", "--bandwidth", "1M", "--tracker", "refs"], "leave out --bandwidth, --tracker"),
        (["run", "--all", "--pid", "1"], "give one of --cgroup, --pid, --all and --config"),
        (["run", "--pid", "1", "--quiet", "--verbose"], "give one of --quiet and --verbose"),
    ],
)
def test_wrong_usage_says_what_would_be_right(words: list[str], said: str) -> None:
    done = CliRunner().invoke(memtier, words)
    assert done.exit_code == 2
    assert said in done.output
