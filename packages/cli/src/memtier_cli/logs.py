"""Log messages: the only place where loguru is configured."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import TextIO

from loguru import logger

LIBRARIES = ("memtier_engine",)


def configure(
    *, debug: bool = False, trace: bool = False, sink: TextIO | str | None = None, as_json: bool = False
) -> None:
    """Messages of the programs and of both libraries to `sink` (default: standard error).

    Lines have no time stamp: `LEVEL: message`, as the reference writes them; `as_json` gives one object per line.
    """
    logger.remove()
    level = "TRACE" if trace else "DEBUG" if debug else "INFO"
    target = sys.stderr if sink is None else sink
    if as_json:
        logger.add(target, level=level, serialize=True)
    else:
        logger.add(target, level=level, format=_line, colorize=False)
    for library in LIBRARIES:
        import_module(library)  # it disables itself when it is imported: that must not come after
        logger.enable(library)
    # nri_core, which depends on nothing but protobuf, writes to the standard library's loggers.
    standard = logging.getLogger("nri_core")
    standard.handlers[:] = [_ToLoguru()]
    standard.setLevel(logging.DEBUG if debug else logging.INFO)
    standard.propagate = False


class _ToLoguru(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        logger.opt(exception=record.exc_info).log(record.levelname, "{}", record.getMessage())


def _line(record: object) -> str:
    level: str = record["level"].name  # type: ignore[index]
    return f"{ {'WARNING': 'WARN'}.get(level, level) }: {{message}}\n{{exception}}"
