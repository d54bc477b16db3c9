"""Runs methods of the plugin for one connection: in the loop or in a thread, within the time limit, and every outcome
is either the call's answer or in the log."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from nri_core.aio.rpc import Call
from nri_core.errors import Code, RpcError
from nri_core.plugin import Plugin, Rejected
from nri_core.session import Session
from nri_core.wire import weight

log = logging.getLogger("nri_core")

MARGIN_SHARE = 0.15
MARGIN_LEAST_S = 0.05
"""An answer is given this long before the runtime's limit: 15 % of it, at least 50 ms."""
MAX_RUNNING = 1000
"""Methods at one time, late ones with them. Beyond, calls are answered as if the method were late."""
MAX_RUNNING_WEIGHT = 256 << 20
"""Of the messages that they work on, decoded, in bytes."""
CANCEL_S = 1.0
"""An async method has this long to end itself when its connection has ended."""


@dataclass(eq=False)
class Handling:
    """One call of the runtime that a method of the plugin is working on."""

    hook: str = ""
    subject: str = ""
    """Which container or pod it is about."""
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[Any] | None = None
    began_s: float = field(default_factory=time.monotonic)
    abandoned: bool = False
    """Nobody waits for the outcome any more: it goes to the log."""
    in_thread: bool = False
    """A thread is in the method: it cannot be cancelled."""

    def __str__(self) -> str:
        return f"{self.hook} for {self.subject}" if self.subject else self.hook

    def finished(self, task: asyncio.Task[Any]) -> None:
        """Let go of the task: its context refers to us, and a cycle would wait for the garbage collector."""
        self.task = None
        if self.abandoned:
            self.report(task)

    def report(self, task: asyncio.Task[Any]) -> None:
        """Log how a method ended that nobody waited for."""
        seconds = time.monotonic() - self.began_s
        if task.cancelled():
            log.info("%s was cancelled after %.2f s: its connection has ended", self, seconds)
            return
        error = task.exception()
        if error is None:
            log.warning("%s came to its end after %.2f s; its result is lost", self, seconds)
        else:
            log.warning("%s came to its end after %.2f s; it failed: %s", self, seconds, error, exc_info=error)


handling: contextvars.ContextVar[Handling | None] = contextvars.ContextVar("handling", default=None)
"""What the code that runs was called for, also in tasks that it started."""


class Hooks:
    """Runs methods of the plugin."""

    def __init__(self, plugin: Plugin, session: Session, executor: ThreadPoolExecutor) -> None:
        self._plugin = plugin
        self._session = session
        self._executor = executor
        self._running: dict[asyncio.Task[Any], Handling] = {}
        self._weight = 0
        self._warned: set[tuple[str, str]] = set()

    async def run(self, hook: str, call: Call, subject: str, *arguments: Any, late: Exception | None = None) -> Any:
        """The method's result; if it takes too long, None or `late` raised, while it runs on.

        Args:
            subject: the container or pod in question, for messages.
        """
        method = getattr(self._plugin, hook)
        if getattr(method, "__func__", None) is getattr(Plugin, hook):
            return None  # not overridden: no need for a thread to do nothing
        heavy = weight(call.head.payload) if hook != "synchronize" else 0  # not decoded
        if len(self._running) >= MAX_RUNNING or self._weight + heavy > MAX_RUNNING_WEIGHT:
            log.error("%s for %s is not called: %d methods are still running", hook, subject, len(self._running))
            return self._late(hook, 0.0, late)
        current = Handling(hook, subject)
        task = current.task = asyncio.ensure_future(self._invoke(method, arguments, current))
        self._running[task] = current
        self._weight += heavy
        task.add_done_callback(lambda task: self._ended(task, heavy))
        task.add_done_callback(current.finished)
        limit_s = self.limit_s(call)
        # From its arrival on: what was decoded before the method ran counts too.
        margin_s = 0.0 if limit_s is None else max(MARGIN_LEAST_S, MARGIN_SHARE * limit_s)
        wait_s = None if limit_s is None else max(0.0, call.arrived_s + limit_s - margin_s - time.monotonic())
        try:
            done, _ = await asyncio.wait({task}, timeout=wait_s)
        except asyncio.CancelledError:  # the connection has ended, or the call was answered otherwise
            current.abandoned = True
            if task.done():
                current.report(task)
            raise
        finally:
            current.answered.set()
        if done:
            return self._outcome(task, current)
        current.abandoned = True
        seconds = time.monotonic() - current.began_s
        log.error("%s takes longer than %.2f s: answered without it, before the runtime drops us", current, seconds)
        return self._late(hook, seconds, late)

    def nothing(self, hook: str, subject: str, found: object) -> None:
        """A method returned something that nobody asked for: say so once for each type."""
        if found is None or (hook, type(found).__name__) in self._warned:
            return
        self._warned.add((hook, type(found).__name__))
        log.warning("%s for %s returned %s, which is not used: it has no answer", hook, subject, type(found).__name__)

    async def close(self) -> None:
        """The connection has ended: async methods are cancelled, plain ones too unless they began; all are logged."""
        cancelled = []
        for task, current in self._running.items():
            current.abandoned = True
            if not current.in_thread and not task.done():
                task.cancel()
                cancelled.append(task)
        if cancelled:
            _, going_on = await asyncio.wait(cancelled, timeout=CANCEL_S)
            for task in going_on:
                log.warning("%s goes on although it was cancelled", self._running.get(task, "a method"))

    def limit_s(self, call: Call) -> float | None:
        """The runtime's time limit for a call; None: it has none."""
        if call.timeout_s is not None:
            return call.timeout_s
        return self._session.runtime.request_timeout_s if self._session.runtime is not None else None

    def _ended(self, task: asyncio.Task[Any], heavy: int) -> None:
        self._running.pop(task, None)
        self._weight -= heavy

    def _outcome(self, task: asyncio.Task[Any], current: Handling) -> Any:
        if task.cancelled():
            log.error("%s was cancelled", current)
            raise RpcError(Code.CANCELED, f"{current.hook} was cancelled")
        error = task.exception()
        if isinstance(error, Rejected) and current.hook == "validate_container_adjustment":
            log.info("%s: rejected: %s", current, error)
        elif isinstance(error, RpcError | Rejected):  # on purpose
            log.warning("%s failed: %s", current, error)
        elif error is not None:
            log.error("%s failed: %s: %s", current, type(error).__name__, error, exc_info=error)
        return task.result()

    def _late(self, hook: str, seconds: float, late: Exception | None) -> None:
        try:
            self._plugin.late(hook, seconds)
        except Exception:
            log.exception("late() failed")
        if late is not None:
            raise late

    async def _invoke(self, method: Callable[..., Any], arguments: Sequence[Any], current: Handling) -> Any:
        handling.set(current)  # this task's own context
        current.task = asyncio.current_task()  # an eager task runs before whoever made it has it
        if inspect.iscoroutinefunction(method):
            return await method(*arguments)
        context = contextvars.copy_context()

        def in_thread() -> Any:
            current.in_thread = True
            return context.run(method, *arguments)

        found = await asyncio.get_running_loop().run_in_executor(self._executor, in_thread)
        current.in_thread = False
        return await found if inspect.isawaitable(found) else found
