"""What signals ask of nri-memtierd, from its first line to its last: SIGTERM and SIGINT to end, SIGHUP to reload.

Imports nothing that takes time: until `listen` the kernel's default holds, which ends the program.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT)


class Orders:
    """The signals of the program. One for the process, in the main thread."""

    def __init__(self) -> None:
        self.end = False
        """Somebody asked to end."""
        self._reload = False
        self._on_end: Callable[[], object] | None = None
        self._on_reload: Callable[[], object] | None = None
        self._starting = False

    def listen(self) -> None:
        """From now on it is ours to say what signals do: as yet, an order to end ends the process at once, with 0.

        Not by an exception: a signal comes anywhere, in a finalizer too, which swallows it, and between taking a lock
        and noting that it is taken, which is then never given back. A SIGHUP that is ignored, as nohup does, stays so.
        """
        self._starting = True
        for number in (*ENDING, signal.SIGHUP):
            if number in ENDING or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def serve(self, on_end: Callable[[], object], on_reload: Callable[[], object]) -> None:
        """The program serves: tell it from now on, also of what came before.

        Both are called in the main thread between any two of its steps: they only tell an event loop.
        """
        self._on_end, self._on_reload = on_end, on_reload
        self._starting = False
        if self._reload:
            on_reload()
        if self.end:
            on_end()

    def hold(self) -> None:
        """Something is touched from now on: an order waits until somebody serves, and takes it back."""
        self._starting = False

    def end_now(self) -> None:
        """As if a signal had asked for it. From any thread."""
        self.end = True
        if self._on_end is not None:
            self._on_end()

    def served(self) -> None:
        """The event loop has ended: nobody is told any more."""
        self._on_end = self._on_reload = None

    def close(self) -> None:
        """The last step: nothing but SIGKILL disturbs the interpreter on its way out."""
        for number in (*ENDING, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._reload = True
            if self._on_reload is not None:
                self._on_reload()
            return
        self.end = True
        if self._on_end is not None:
            self._on_end()
        elif self._starting:
            os._exit(0)
