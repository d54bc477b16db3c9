"""What can go wrong before a guest command has a result of its own."""

from __future__ import annotations


class VmError(Exception):
    """The VM could not be built, booted or talked to. `hint` says what to do about it."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}; {hint}")
        self.hint = hint


class VmTimeout(VmError):
    """The guest did not answer in time and was killed. `output` is what the command had printed by then."""

    def __init__(self, message: str, *, output: bytes = b"") -> None:
        super().__init__(message)
        self.output = output
