"""Forecaster `stdio`: a child process gets heats as a line of JSON and answers with one JSON value.

The child may be slow, silent, wordy or dead: a round has a deadline, and a child that missed it is killed, since
what it says later would be taken for the answer to another question.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence

from loguru import logger

from memtier_engine.errors import ConfigError
from memtier_engine.forecasters.base import ForecastError, decode, encode
from memtier_engine.model import ProcessId
from memtier_engine.policies.heatmap import Heats

ANSWER_BYTES_MAX = 256 << 20
_READ_BYTES = 1 << 18
_KILL_WAIT_S = 2.0


class StdioForecaster:
    """Supervises one child. Not thread-safe: the engine's thread owns it."""

    name = "stdio"

    def __init__(self, command: Sequence[str], *, stderr: str = "", retry: int = 0, deadline_s: float = 5.0) -> None:
        """Start the child.

        Args:
            command: program and arguments; no shell.
            stderr: "" to share ours, or `file:PATH` to append the child's there.
            retry: how often a child that exited is started again within one round.
            deadline_s: seconds for a whole round.
        Raises:
            ConfigError: it cannot be started, or an argument is wrong.
        """
        if not command:
            raise ConfigError("is empty", key_path="command", hint="a list of the program and its arguments")
        if stderr and not stderr.startswith("file:"):
            raise ConfigError(f"{stderr!r} is not known", key_path="stderr", hint="leave it out, or file:PATH")
        if retry < 0:
            raise ConfigError(f"value {retry}", key_path="retry", hint="use 0 or more")
        if deadline_s <= 0:
            raise ConfigError(f"value {deadline_s}", key_path="deadlinems", hint="use 1 or more; default 5000")
        self._command = list(command)
        self._stderr = stderr.removeprefix("file:")
        self._retry = retry
        self._deadline_s = deadline_s
        self._child: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self.starts = 0
        """How often a child was started."""
        try:
            self._start()
        except OSError as error:
            if self._stderr and error.filename == self._stderr:
                raise ConfigError(
                    f"cannot open {self._stderr!r}: {error.strerror}", key_path="stderr", hint="a file to append to"
                ) from None
            reason = f"cannot start {self._command[0]!r}: {error.strerror}"
            raise ConfigError(reason, key_path="command", hint="an executable file, found in PATH") from None

    @property
    def pid(self) -> int | None:
        """The child's pid; None while there is none."""
        return None if self._child is None else self._child.pid

    def forecast(self, heats: Mapping[ProcessId, Heats], now_ns: int) -> Mapping[ProcessId, Heats] | None:
        """Ask the child. `{}` is a forecast without any heat, null is none.

        Raises:
            ForecastError: it exited, answered nonsense, or did not answer in time.
        """
        question = encode(heats)
        end_s = time.monotonic() + self._deadline_s
        for attempt in range(self._retry + 1):
            try:
                if self._child is None or self._child.poll() is not None:
                    self._kill()
                    self._start()
                answer = self._exchange(question, end_s)
            except (BrokenPipeError, EOFError):
                status = self._kill()
                if attempt == self._retry:
                    raise ForecastError(f"{self._command[0]} exited with status {status}") from None
                logger.warning("forecaster {} exited with status {}, starting it again", self._command[0], status)
                continue
            except OSError as error:
                raise ForecastError(f"{error.filename or self._command[0]}: {error.strerror}") from None
            except ForecastError:
                self._kill()
                raise
            return decode(answer, heats.keys())
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        """End the child. Safe to call twice."""
        self._kill()

    def _start(self) -> None:
        self._rest = b""
        stderr = None
        if self._stderr:
            stderr = os.open(self._stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            self._child = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, bufsize=0
            )
        finally:
            if stderr is not None:
                os.close(stderr)
        assert self._child.stdin is not None
        os.set_blocking(self._child.stdin.fileno(), False)
        self.starts += 1

    def _exchange(self, question: bytes, end_s: float) -> object:
        """Write and read at the same time: a child may answer before it has read everything.

        Raises:
            BrokenPipeError, EOFError: the child closed its end.
            ForecastError: no answer in time, or too much of it.
        """
        assert self._child is not None
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        to_child, from_child = self._child.stdin.fileno(), self._child.stdout.fileno()
        unsent = memoryview(question)
        answer = _Answer(self._rest)
        poller = select.poll()
        poller.register(from_child, select.POLLIN)
        poller.register(to_child, select.POLLOUT)
        while True:
            left_s = end_s - time.monotonic()
            ready = dict(poller.poll(max(0.0, left_s) * 1000))
            if not ready and left_s <= 0:
                raise ForecastError(f"{self._command[0]}: no answer within {self._deadline_s:g} s")
            if from_child in ready:
                data = os.read(from_child, _READ_BYTES)
                if not data:
                    raise EOFError
                if answer.size + len(data) > ANSWER_BYTES_MAX:
                    raise ForecastError(f"{self._command[0]}: an answer of more than {ANSWER_BYTES_MAX} bytes")
                answer.add(data)
            if to_child in ready and unsent:
                unsent = unsent[os.write(to_child, unsent) :]
                if not unsent:
                    poller.unregister(to_child)
            if not unsent:
                found, value = answer.take()
                if found:
                    self._rest = answer.rest
                    return value

    def _kill(self) -> int | None:
        """End the child if there is one; its exit status."""
        child, self._child = self._child, None
        if child is None:
            return None
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        try:
            # A child that reads until the end of its input leaves by itself.
            return child.wait(0.05)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait(_KILL_WAIT_S)


class _Answer:
    """Bytes in, the first whole JSON value out."""

    def __init__(self, first: bytes) -> None:
        self._parts = [first] if first.strip() else []
        self.size = sum(map(len, self._parts))
        self._depth = sum(part.count(b"{") - part.count(b"}") for part in self._parts)
        self._new = bool(self._parts)
        self.rest = b""

    def add(self, data: bytes) -> None:
        self._parts.append(data)
        self.size += len(data)
        # Braces in keys would mislead the count, but pids have none: it only saves parsing half an answer.
        self._depth += data.count(b"{") - data.count(b"}")
        self._new = True

    def take(self) -> tuple[bool, object]:
        """(True, value) once a value is complete; `rest` is then what came after it."""
        if not self._new or self._depth > 0:
            return False, None
        self._new = False
        text = b"".join(self._parts).decode("utf-8", "replace").lstrip()
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except ValueError as error:
            complete = text.endswith("\n") and text.strip()
            if complete and self._depth == 0:
                raise ForecastError(f"the answer is no JSON: {error}") from None
            return False, None
        self.rest = text[end:].encode()
        return True, value
