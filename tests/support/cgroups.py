"""A cgroup of the test's own in the machine's cgroup2 tree."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from memtier_engine.errors import MemtierError
from memtier_engine.hostfs.host import Host
from support.waiting import until


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
        with suppress(OSError):
            (path / "cgroup.kill").write_text("1")
        until(lambda: removed(path), f"{path} could not be removed")


def removed(path: Path) -> bool:
    """Remove a cgroup, and those in it; False if the kernel still has to do with what was in one of them."""
    try:
        for inner in sorted(path.rglob("*/"), reverse=True):
            inner.rmdir()
        path.rmdir()
    except OSError:
        return not path.exists()
    return True
