"""What runs in which process under `pytest -n 2`, as `make test` does it."""

from __future__ import annotations

from typing import Any

import pytest

OF_THE_NODE = "tests/integration/"
"""Swap, cgroups, guards and trackers of the machine are one for all: what changes them runs one by one."""


def scope_of(nodeid: str) -> str:
    """What runs in one process, one after the other: the tests of a file, and all of those that change the node."""
    return OF_THE_NODE if nodeid.startswith(OF_THE_NODE) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process is for the node's tests, which mostly wait, and the other for all that only computes.

    The largest scope comes first, so that the node's tests begin at once.
    """
    from xdist.scheduler import LoadFileScheduling

    scheduler = LoadFileScheduling(config, log)
    scheduler._split_scope = scope_of
    return scheduler
