"""Large libraries, imported when they are needed and with what our programs do not use left out.

For programs only: a library has no business with the environment, nor with which of loguru's messages are wanted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loguru import Logger

_waiting: list[Callable[[], None]] = []


def before_use(prepare: Callable[[], None]) -> None:
    """Call `prepare` before anything of the engine is imported, or a message is written; never if neither happens."""
    _waiting[:] = [prepare]


def ready() -> None:
    """Import what all of the engine needs, and what has waited for it. Called before its first import."""
    import_numpy()
    import_loguru()
    _prepare()


def logger() -> Logger:
    """Where messages go, configured."""
    import_loguru()
    _prepare()
    from loguru import logger

    return logger


def _prepare() -> None:
    while _waiting:
        _waiting.pop()()


def import_numpy() -> None:
    """numpy without threads of its linear algebra, which we do not use: they take as long to start as numpy does.

    OpenBLAS reads the environment when it is loaded. What our children get is as it was.
    """
    if "numpy" in sys.modules or _ONE_THREAD in os.environ:
        import_module("numpy")
        return
    os.environ[_ONE_THREAD] = "1"
    try:
        import_module("numpy")
    finally:
        del os.environ[_ONE_THREAD]


_ONE_THREAD = "OPENBLAS_NUM_THREADS"


def import_loguru() -> None:
    """loguru without asyncio, which it wants for sinks that are coroutines, and which takes ssl: 6 MiB.

    In its place stands a module, as long as the import lasts, that becomes asyncio when anything of it is used.
    """
    if "loguru" in sys.modules or "asyncio" in sys.modules:
        import_module("loguru")
        return
    sys.modules["asyncio"] = _Later("asyncio")
    try:
        import_module("loguru")
    finally:
        if isinstance(sys.modules.get("asyncio"), _Later):
            del sys.modules["asyncio"]


class _Later(ModuleType):
    """Stands for a module until something of it is used."""

    def get_running_loop(self) -> Any:
        """Of asyncio: loguru takes the function when it is imported, and calls it for coroutines only."""
        return self.__getattr__("get_running_loop")()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for these
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)
