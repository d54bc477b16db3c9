"""What scenarios in the guest say arrives whole at the test on the host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.vm import VmResult

GUEST = Path(__file__).parents[1] / "e2e" / "guest"
SIDE_BY_SIDE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from saying import say

sys.setswitchinterval(1e-6)
with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda number: say(kind="number", number=number), range(4000)))
"""


def test_scenarios_side_by_side_do_not_write_into_each_other_s_lines() -> None:
    said = subprocess.run(
        [sys.executable, "-c", SIDE_BY_SIDE], cwd=GUEST, capture_output=True, text=True, check=True, timeout=60
    )
    records = VmResult(status=0, output=said.stdout, seconds=0.0).records()
    assert sorted(each["number"] for each in records) == list(range(4000))


def test_a_record_that_cannot_be_read_is_an_error_and_not_left_out() -> None:
    spoilt = VmResult(status=0, output='{"kind": "a"}{"kind": "b"}\n\n', seconds=0.0)
    with pytest.raises(AssertionError, match="cannot be read"):
        spoilt.records()


def test_free_text_is_no_record() -> None:
    mixed = VmResult(status=0, output='{braces}\ntext\n{"kind": "a"}\n', seconds=0.0)
    assert mixed.records() == [{"kind": "a"}]
