"""Two minutes of the soak on the machine itself; `make soak` is the hour."""

from __future__ import annotations

import os

import pytest

from soak.__main__ import report
from soak.churn import soak

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root"),
    pytest.mark.timeout(600),
]


def test_two_minutes_of_churn_leave_memory_flat_and_no_descriptor_or_thread_behind() -> None:
    assert report(soak(2.0)) == []
