"""Log messages: the only place where loguru is configured."""

from __future__ import annotations

import json
import logging
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from loguru import logger

from memtier_cli.logqueue import LogQueue

if TYPE_CHECKING:
    from loguru import Message, Record

LIBRARIES = ("memtier_engine",)
_CONTROLS = {number: repr(chr(number))[1:-1] for number in (*range(32), 127) if chr(number) != "\t"}
"""Names of pods and their annotations are in messages: none of them begins a line of its own."""


def configure(*, debug: bool = False, trace: bool = False, sink: TextIO | str | None = None) -> None:
    """Messages of the programs and of both libraries to `sink` (default: standard error).

    Lines have no time stamp: `LEVEL: message`, as the reference writes them.
    """
    logger.remove()
    level = "TRACE" if trace else "DEBUG" if debug else "INFO"
    logger.add(sys.stderr if sink is None else sink, level=level, format=_line, colorize=False)
    _enable_libraries(debug)


def configure_daemon(queue: LogQueue, *, debug: bool = False, trace: bool = False, as_json: bool = False) -> None:
    """All messages of the process into `queue`: `TIME LEVEL: NAMESPACE/POD:CONTAINER: message`, or objects.

    Whose engine a message is about stands in loguru's context: `container`, `engine`. A message with `node` is about
    the whole node: engines that find out the same say it once, as long as its `state` does not change.
    """
    logger.remove()
    level = "TRACE" if trace else "DEBUG" if debug else "INFO"
    as_text = json_line if as_json else text_line
    logger.add(_ToQueue(queue, as_text), level=level, format="{message}", backtrace=False, diagnose=False)
    _enable_libraries(debug)
    root = logging.getLogger()  # asyncio's, and what libraries that we do not know say
    root.handlers[:] = [_ToLoguru()]
    root.setLevel(logging.WARNING)
    sys.excepthook = _unhandled
    threading.excepthook = _unhandled_in_thread
    sys.unraisablehook = _unraisable


def text_line(record: Record) -> str:
    """A line for people."""
    level = record["level"].name
    container = record["extra"].get("container")
    message = record["message"].translate(_CONTROLS)
    whose = f"{container}: " if container else ""
    return f"{_time(record)} { {'WARNING': 'WARN'}.get(level, level) }: {whose}{message}\n{_exception(record)}"


def json_line(record: Record) -> str:
    """One flat object: time, level, message, and what is known about it, such as container and engine."""
    level = record["level"].name
    found: dict[str, Any] = {
        **record["extra"],
        "time": _time(record),
        "level": {"WARNING": "WARN"}.get(level, level),
        "message": record["message"],
    }
    if text := _exception(record):
        found["exception"] = text
    return json.dumps(found, default=str) + "\n"


class _ToQueue:
    def __init__(self, queue: LogQueue, as_text: Callable[[Record], str]) -> None:
        self._queue = queue
        self._as_text = as_text
        self._of_node: dict[str, str] = {}

    def __call__(self, message: Message) -> None:
        record = message.record
        if (node := record["extra"].get("node")) is not None:
            state = str(record["extra"].get("state", record["message"]))
            if self._of_node.get(node) == state:
                return
            self._of_node[node] = state
            record["extra"] = {key: value for key, value in record["extra"].items() if key not in _OF_AN_ENGINE}
        self._queue.put(self._as_text(record))


_OF_AN_ENGINE = ("container", "engine", "state")


class _ToLoguru(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelname if record.levelname in _LEVELS else "WARNING"
        logger.opt(exception=record.exc_info).log(level, "{}", record.getMessage())


_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def _enable_libraries(debug: bool) -> None:
    for library in LIBRARIES:
        import_module(library)  # it disables itself when it is imported: that must not come after
        logger.enable(library)
    # nri_core, which depends on nothing but protobuf, writes to the standard library's loggers.
    standard = logging.getLogger("nri_core")
    standard.handlers[:] = [_ToLoguru()]
    standard.setLevel(logging.DEBUG if debug else logging.INFO)
    standard.propagate = False


def _line(record: object) -> str:
    level: str = record["level"].name  # type: ignore[index]
    return f"{ {'WARNING': 'WARN'}.get(level, level) }: {{message}}\n{{exception}}"


def _time(record: Record) -> str:
    return datetime.fromtimestamp(record["time"].timestamp(), UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def _exception(record: Record) -> str:
    found = record["exception"]
    return "" if found is None else "".join(traceback.format_exception(found.type, found.value, found.traceback))


def _unhandled(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logger.opt(exception=(kind, error, trace)).critical("a defect ends the program")


def _unhandled_in_thread(found: threading.ExceptHookArgs) -> None:
    if found.exc_type is not SystemExit and found.exc_value is not None:
        name = found.thread.name if found.thread is not None else "unknown"
        logger.opt(exception=found.exc_value).critical("a defect ends thread {}", name)


def _unraisable(found: sys.UnraisableHookArgs) -> None:
    what = found.err_msg or "an exception that nobody sees"
    logger.opt(exception=found.exc_value).error("{}: {!r}", what, found.object)
