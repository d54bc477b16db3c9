"""For all tests: no verdict hangs on how fast the machine is, nor on what a test before it left behind."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("memtier", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.register_profile("search", settings.get_profile("memtier"), derandomize=False, max_examples=2000)
# A run tries the same cases as the one before: what a change broke shows with the change. For new ones there is
# `make test PYTEST_ARGS=--hypothesis-profile=search`; what it finds becomes an @example.
settings.load_profile("memtier")

for _number, _default in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGTERM, signal.SIG_DFL),
):
    # Whoever runs the tests in the background of a shell, or under nohup, has them ignored, and so would our programs.
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _default)

pytest_plugins = ["support.sharing"]

_LOGGERS = ("", "nri_core")
"""Whose level and handlers the programs set."""


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    yield
    for logger, (level, handlers, propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = propagate
