"""Fixtures of the interop tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from interop import nri, peers
from interop.nri import Release
from interop.peers import PeerUnavailable


@pytest.fixture(scope="session", params=peers.NRI_RELEASES)
def release(request: pytest.FixtureRequest) -> Release:
    """Each NRI release in turn."""
    try:
        return nri.release(request.param)
    except PeerUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the socket goes."""
    return tmp_path / "nri.sock"
