"""Errors say what to do where there is one thing to do."""

from __future__ import annotations

import errno

import pytest

from memtier_engine.errors import KernelCallError


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.EMFILE, "ulimit -n"), (errno.ENFILE, "fs/file-max"), (errno.EIO, None)]
)
def test_too_many_open_files_says_which_limit_to_raise(number: int, hint: str | None) -> None:
    failure = KernelCallError.from_errno("pidfd_open(pid=7)", number)
    assert failure.errno == number
    assert (hint or "[EIO]") in str(failure)
    assert (failure.hint is None) == (hint is None)
