"""For tests of the engine on imitated kernels."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_call_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches shrink where the kernel takes long for one. An imitated kernel does when the test's process is put aside
    in the middle of a call; tests of the shrinking say themselves how long each took."""
    for module in ("mover.mover", "reclaim.reclaimer"):
        monkeypatch.setattr(f"memtier_engine.{module}.CALL_TARGET_S", 1e6)
