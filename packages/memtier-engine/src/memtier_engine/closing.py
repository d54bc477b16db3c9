"""What everything that holds a kernel resource has in common: `with`, and closing twice does no harm."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self


class Closing:
    """A context manager that closes itself."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back. Safe to call twice."""
        raise NotImplementedError


class OpenFile(Closing):
    """Holds one file descriptor."""

    _fd = -1

    def fileno(self) -> int:
        """The file descriptor; -1 once closed."""
        return self._fd

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
