"""What runs in which process under `pytest -n 2`, as `make test` does it."""

from __future__ import annotations

from typing import Any

import pytest

OF_THE_NODE = "tests/integration/"
"""Swap, cgroups, guards and trackers of the machine are one for all: what changes them runs one by one."""

BESIDE = {f"{OF_THE_NODE}test_forecasters.py", f"{OF_THE_NODE}test_nri_program.py"}
"""Of these tests, those that touch nothing but files and children of their own."""


def scope_of(nodeid: str) -> str:
    """What runs in one process, one after the other: the tests of a file, and all of those that change the node."""
    file = nodeid.partition("::")[0]
    return OF_THE_NODE if file.startswith(OF_THE_NODE) and file not in BESIDE else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process is for the node's tests, which mostly wait, and the other for all that only computes.

    The largest scope comes first, so that the node's tests begin at once.
    """
    from xdist.scheduler import LoadFileScheduling

    scheduler = LoadFileScheduling(config, log)
    scheduler._split_scope = scope_of
    return scheduler
