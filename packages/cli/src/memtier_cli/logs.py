"""Log messages: the only place where loguru is configured."""

from __future__ import annotations

import json
import logging
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from loguru import logger

from memtier_cli.logqueue import LogQueue
from memtier_cli.logquota import LINES_MOST, LogQuota

if TYPE_CHECKING:
    from loguru import Message, Record

LIBRARIES = ("memtier_engine",)
_MEANING_SOMETHING = (
    *range(0x20),
    *range(0x7F, 0xA0),
    0x61C,
    0x200E,
    0x200F,
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
)
"""To terminals and viewers: controls, line ends, and what makes text run from right to left."""
_CONTROLS = {number: ascii(chr(number))[1:-1] for number in _MEANING_SOMETHING if chr(number) != "\t"}
"""Names of pods and their annotations are in messages: none of them begins a line of its own, nor moves a cursor."""


def configure(*, debug: bool = False, trace: bool = False, sink: TextIO | None = None) -> None:
    """Messages of the programs and of both libraries to `sink` (default: standard error).

    Lines have no time stamp: `LEVEL: message`, as the reference writes them. A sink that takes nothing, such as a file
    on a full disk, ends nothing.
    """
    logger.remove()
    level = "TRACE" if trace else "DEBUG" if debug else "INFO"
    logger.add(_Stream(sys.stderr if sink is None else sink), level=level, format=_line, colorize=False)
    _enable_libraries(debug)


def configure_daemon(queue: LogQueue, *, debug: bool = False, trace: bool = False, as_json: bool = False) -> None:
    """All messages of the process into `queue`: `TIME LEVEL: NAMESPACE/POD:CONTAINER: message`, or objects.

    Whose engine a message is about stands in loguru's context: `container`, `engine`. A message with `node` is about
    the whole node: engines that find out the same say it once, as long as its `state` does not change. About one
    container there are so many lines and no more (`LogQuota`), unless there are to be all.
    """
    logger.remove()
    level = "TRACE" if trace else "DEBUG" if debug else "INFO"
    as_text = json_line if as_json else text_line
    quota = None if debug or trace else LogQuota()
    logger.add(_ToQueue(queue, as_text, quota), level=level, format="{message}", backtrace=False, diagnose=False)
    _enable_libraries(debug)
    root = logging.getLogger()  # asyncio's, and what libraries that we do not know say
    root.handlers[:] = [_ToLoguru()]
    root.setLevel(logging.WARNING)
    sys.excepthook = _unhandled
    threading.excepthook = _unhandled_in_thread
    sys.unraisablehook = _unraisable


def configure_console(put: Callable[[str], None], *, level: str = "INFO", as_json: bool = False) -> None:
    """Messages of a command that a person runs to `put`, which may be called in any thread: lines with their time."""
    logger.remove()
    as_text = json_line if as_json else text_line

    def sink(message: Message) -> None:
        put(as_text(message.record))

    logger.add(sink, level=level, format="{message}", backtrace=False, diagnose=False)
    _enable_libraries(level == "DEBUG")


def text_line(record: Record) -> str:
    """A line for people."""
    level = record["level"].name
    container = record["extra"].get("container")
    whose = f"{container}: " if container else ""
    message = f"{whose}{record['message']}".translate(_CONTROLS)
    trace = "".join(f"  {line.translate(_CONTROLS)}\n" for line in _exception(record).split("\n") if line)
    return f"{_time(record)} { {'WARNING': 'WARN'}.get(level, level) }: {message}\n{trace}"


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


class _Stream:
    """A file that may be full or gone: that is said once on standard error, if that is another one, and once more
    after it has worked again. loguru by itself leaves a traceback there for each message."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._told = False

    def __call__(self, message: Message) -> None:
        try:
            self._stream.write(message)
            self._stream.flush()
            self._told = False
        except OSError as error:
            if not self._told and sys.stderr is not self._stream:
                self._told = True
                with suppress(OSError):
                    print(f"the log takes no more, messages are lost: {error.strerror}", file=sys.stderr, flush=True)


class _ToQueue:
    def __init__(self, queue: LogQueue, as_text: Callable[[Record], str], quota: LogQuota | None) -> None:
        self._queue = queue
        self._as_text = as_text
        self._quota = quota
        self._of_node: dict[str, str] = {}

    def __call__(self, message: Message) -> None:
        record = message.record
        if (node := record["extra"].get("node")) is not None:
            state = str(record["extra"].get("state", record["message"]))
            if self._of_node.get(node) == state:
                return
            self._of_node[node] = state
            record["extra"] = {key: value for key, value in record["extra"].items() if key not in _OF_AN_ENGINE}
        container = record["extra"].get("container")
        if self._quota is not None and container is not None:
            place = self._quota.place(str(container))
            if place.left_out:
                self._say(record, f"{place.left_out} lines about it were left out")
            if place.is_full:
                self._say(record, f"more than {LINES_MOST} lines about it: the next ones are left out for a while")
            if not place.wanted:
                return
        self._queue.put(self._as_text(record))

    def _say(self, record: Record, message: str) -> None:
        own = record.copy()
        own["message"], own["exception"] = message, None
        self._queue.put(self._as_text(own))


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
