"""move_pages(2) as the mover uses it, on a kernel whose way of giving up is imitated (mm/migrate.c, do_pages_move)."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from memtier_engine.abi import syscalls
from memtier_engine.errors import KernelCallError
from memtier_engine.model import PAGE_BYTES, U64
from memtier_engine.mover.backends import ProcessHandle, move_to_node
from support.fakes import BASE, PROCESS, pages_of, spans

HANDLE = cast(ProcessHandle, SimpleNamespace(process=PROCESS, exited=lambda: False))


class Kernel:
    """100 pages on node 0. Held pages do not move; shared ones say EACCES; a full node has room for `room` pages."""

    def __init__(
        self, *, held: tuple[int, ...] = (), shared: tuple[int, ...] = (), absent: tuple[int, ...] = ()
    ) -> None:
        self.held, self.shared = set(held), set(shared)
        self.where: dict[int, int] = {page: 0 for page in range(100) if page not in absent}
        self.room = 1_000_000
        self.calls: list[list[int]] = []

    def __call__(self, pid: int, addresses: U64, node: int | None, **flags: Any) -> NDArray[np.int32]:
        pages = [(address - BASE) // PAGE_BYTES for address in addresses.tolist()]
        if node is None:
            return np.array([self.where.get(page, -errno.ENOENT) for page in pages], np.int32)
        self.calls.append(pages)
        status = np.full(len(pages), syscalls.NOT_TRIED, np.int32)
        batch: list[int] = []
        for index, page in enumerate(pages):
            if page in self.shared or page not in self.where:
                status[index] = -errno.EACCES if page in self.shared else -errno.ENOENT
                if not self._flush(pages, batch, node, status):
                    return status
                batch = []
            else:
                batch.append(index)
        self._flush(pages, batch, node, status)
        return status

    def _flush(self, pages: list[int], batch: list[int], node: int, status: NDArray[np.int32]) -> bool:
        failed = False
        for index in batch:
            if pages[index] in self.held:
                failed = True
            elif not self.room:
                raise KernelCallError.from_errno("move_pages", errno.ENOMEM)
            else:
                self.where[pages[index]] = node
                self.room -= 1
        if not failed:
            status[batch] = node
        return not failed


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(kernel: Kernel) -> Kernel:
        monkeypatch.setattr(syscalls, "move_pages", kernel)
        return kernel

    return use


def test_a_held_page_does_not_hide_that_its_neighbours_moved(patched: Any) -> None:
    """The kernel leaves the status of the whole batch unwritten."""
    patched(Kernel(held=(50,)))
    result = move_to_node(HANDLE, spans((0, 100)), 2)
    assert result.moved_bytes == 99 * PAGE_BYTES
    assert pages_of(result.stuck) == pages_of(result.busy) == [(50, 51)]
    assert result.page_errors == {errno.EAGAIN: 1}
    assert result.error is None


def test_what_comes_after_a_held_page_is_moved_all_the_same(patched: Any) -> None:
    """Pages that cannot move end a batch of the kernel: there it stops, and pages 11 to 99 were never tried."""
    kernel = patched(Kernel(held=(5,), shared=(10, 40)))
    result = move_to_node(HANDLE, spans((0, 100)), 2)
    assert result.moved_bytes == 97 * PAGE_BYTES
    assert pages_of(result.busy) == [(5, 6)]
    assert pages_of(result.stuck) == [(5, 6), (10, 11), (40, 41)]
    assert result.page_errors == {errno.EAGAIN: 1, errno.EACCES: 2}
    assert len(kernel.calls) <= 4


def test_only_held_pages_are_not_tried_over_and_over(patched: Any) -> None:
    kernel = patched(Kernel(held=tuple(range(100))))
    result = move_to_node(HANDLE, spans((0, 100)), 2)
    assert result.moved_bytes == 0
    assert pages_of(result.busy) == [(0, 100)]
    assert len(kernel.calls) == 1


def test_a_node_that_fills_up_ends_the_move_with_what_went(patched: Any) -> None:
    kernel = patched(Kernel())
    kernel.room = 30
    result = move_to_node(HANDLE, spans((0, 100)), 2)
    assert result.full
    assert result.error is not None
    assert "full" in result.error
    assert result.moved_bytes == 30 * PAGE_BYTES
    assert pages_of(result.stuck) == [(30, 100)]
    assert pages_of(result.busy) == []


def test_pages_that_are_absent_or_there_already_are_not_asked_for(patched: Any) -> None:
    kernel = patched(Kernel(absent=(3, 4)))
    kernel.where[7] = 2
    result = move_to_node(HANDLE, spans((0, 10)), 2)
    assert kernel.calls == [[0, 1, 2, 5, 6, 8, 9]]
    assert result.moved_bytes == 7 * PAGE_BYTES
    assert pages_of(result.stuck) == []


def test_other_refusals_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()

    def refuses(pid: int, addresses: U64, node: int | None, **flags: Any) -> NDArray[np.int32]:
        if node is not None:
            raise KernelCallError.from_errno("move_pages", errno.ENODEV)
        return kernel(pid, addresses, node)

    monkeypatch.setattr(syscalls, "move_pages", refuses)
    with pytest.raises(KernelCallError, match="ENODEV"):
        move_to_node(HANDLE, spans((0, 10)), 9)
