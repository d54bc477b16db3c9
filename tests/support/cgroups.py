"""A cgroup of the test's own in the machine's cgroup2 tree."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from memtier_engine.errors import MemtierError
from memtier_engine.hostfs.host import Host


@contextmanager
def temporary_cgroup(name: str) -> Iterator[Path]:
    """A new cgroup; whatever is in it at the end is killed, then it is removed."""
    try:
        path = Host().cgroup2_root / f"memtier-test-{name}-{os.getpid()}"
        path.mkdir()
    except (MemtierError, OSError) as error:
        pytest.skip(f"needs a mounted cgroup2 tree and root: {error}")
    try:
        yield path
    finally:
        for _ in range(200):
            with suppress(OSError):
                (path / "cgroup.kill").write_text("1")
            with suppress(OSError):
                path.rmdir()
                break
            time.sleep(0.02)  # the kernel reaps in its own time
        assert not path.exists(), f"{path} could not be removed"
