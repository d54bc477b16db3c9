"""One test VM for all end-to-end tests of the same shape; it is booted on first use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.vm import VmSession


@pytest.fixture(scope="session")
def vm() -> Iterator[VmSession]:
    """A guest that stays up between the tests."""
    with VmSession() as session:
        yield session
