"""From calls of the runtime to methods of the plugin: decoding, time limits, answers."""

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

from google.protobuf.message import DecodeError, Message

from nri_core.aio.rpc import Call, Handler, Services
from nri_core.api.adjust import Adjustment, Update
from nri_core.api.events import HANDLERS, EventMask
from nri_core.api.model import Container, Pod, container_from_message, pod_from_message
from nri_core.api.resources import resources_from_message
from nri_core.errors import (
    Code,
    ConnectionLost,
    LocalProtocolError,
    NriError,
    RemoteProtocolError,
    RpcError,
    SessionError,
)
from nri_core.pb import nri_pb2
from nri_core.plugin import Plugin, Rejected, Validation
from nri_core.session import Session, Step
from nri_core.ttrpc.connection import Kind

log = logging.getLogger("nri_core")

PLUGIN_SERVICE_NAME = "nri.pkg.api.v1alpha1.Plugin"
RUNTIME_SERVICE_NAME = "nri.pkg.api.v1alpha1.Runtime"
MARGIN_SHARE = 0.15
MARGIN_LEAST_S = 0.05
"""An answer is given this long before the runtime's limit: 15 % of it, at least 50 ms."""


@dataclass(eq=False)
class Handling:
    """One call of the runtime that a method of the plugin is working on."""

    answered: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[Any] | None = None

    def finished(self, _: asyncio.Task[Any]) -> None:
        """Let go of the task: its context refers to us, and a cycle would wait for the garbage collector."""
        self.task = None


handling: contextvars.ContextVar[Handling | None] = contextvars.ContextVar("handling", default=None)
"""What the code that runs was called for, also in tasks that it started."""

_POD_EVENTS = ("run_pod_sandbox", "post_update_pod_sandbox", "stop_pod_sandbox", "remove_pod_sandbox")
_CONTAINER_EVENTS = (
    "post_create_container",
    "start_container",
    "post_start_container",
    "post_update_container",
    "remove_container",
)


class Dispatcher:
    """Serves the Plugin service for one connection."""

    def __init__(
        self, plugin: Plugin, session: Session, executor: ThreadPoolExecutor, fatal: Callable[[NriError], None]
    ) -> None:
        """`fatal`: called with what makes the connection useless."""
        self._fatal = fatal
        self._plugin = plugin
        self._session = session
        self._executor = executor
        self._running: set[asyncio.Task[Any]] = set()
        self.synchronized: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def services(self) -> Services:
        """Every method of the service: a runtime must never see UNIMPLEMENTED, or it falls back to older calls."""
        handlers: dict[str, Handler] = {
            "Configure": self._configure,
            "Synchronize": self._synchronize,
            "Shutdown": self._shutdown,
            "StateChange": self._state_change,
            "CreateContainer": self._create_container,
            "UpdateContainer": self._update_container,
            "StopContainer": self._stop_container,
            "UpdatePodSandbox": self._update_pod_sandbox,
            "ValidateContainerAdjustment": self._validate,
        }
        for method in (*_POD_EVENTS, *_CONTAINER_EVENTS):
            name = "".join(part.title() for part in method.split("_"))
            handlers[name] = self._notification(method, name)
        return {PLUGIN_SERVICE_NAME: {name: (Kind.UNARY, self._guarded(handler)) for name, handler in handlers.items()}}

    def _guarded(self, handler: Handler) -> Handler:
        async def handle(call: Call) -> bytes | None:
            try:
                return await handler(call)
            except (RemoteProtocolError, SessionError) as error:
                asyncio.get_running_loop().call_soon(self._fatal, error)  # after the answer is out
                raise

        return handle

    async def _configure(self, call: Call) -> bytes:
        request = _decode(nri_pb2.ConfigureRequest(), call)
        wanted = self._plugin.events()
        events = self._session.configured(request, wanted, self._plugin.required)
        missing = self._session.missing_events(wanted)
        if missing:
            log.warning("%s %s does not know the events %s", request.runtime_name, request.runtime_version, missing)
        await self._run("configure", call, self._plugin.configure, request.config, self._session.runtime)
        return nri_pb2.ConfigureResponse(events=int(events)).SerializeToString()

    async def _synchronize(self, call: Call) -> bytes:
        began_s, limit_s = time.monotonic(), self._limit_s(call)
        try:
            answer = await self._synchronize_in_time(call)
        finally:
            if limit_s is not None and time.monotonic() - began_s > limit_s:
                # Older runtimes now leave the connection open, and never send an event.
                late = ConnectionLost(
                    f"Synchronize took longer than the runtime's limit of {limit_s:g} s",
                    hint="an async method must not block the event loop",
                )
                asyncio.get_running_loop().call_soon(self._fatal, late)
        return answer

    async def _synchronize_in_time(self, call: Call) -> bytes:
        request = _decode(nri_pb2.SynchronizeRequest(), call)
        everything = self._session.synchronized(request)
        if everything is None:
            return nri_pb2.SynchronizeResponse(more=True).SerializeToString()
        pods = [pod_from_message(pod) for pod in everything[0]]
        containers = [container_from_message(container) for container in everything[1]]
        updates = await self._run("synchronize", call, self._plugin.synchronize, pods, containers)
        if not self.synchronized.done():
            self.synchronized.set_result(None)
        return nri_pb2.SynchronizeResponse(update=_updates(updates)).SerializeToString()

    async def _shutdown(self, call: Call) -> bytes:
        log.info("the runtime says it is shutting down")
        return b""

    async def _state_change(self, call: Call) -> bytes:
        event = _decode(nri_pb2.StateChangeEvent(), call)
        method = HANDLERS.get(EventMask(1 << (event.event - 1))) if 0 < event.event <= len(HANDLERS) else None
        if method in _POD_EVENTS:
            await self._notify(method, call, pod_from_message(event.pod))
        elif method in _CONTAINER_EVENTS:
            await self._notify(method, call, pod_from_message(event.pod), container_from_message(event.container))
        return b""  # also for events that nobody here knows

    def _notification(self, method: str, name: str) -> Handler:
        kind: Callable[[], Any] = getattr(nri_pb2, f"{name}Request")
        with_container = method in _CONTAINER_EVENTS

        async def handle(call: Call) -> bytes:
            request = _decode(kind(), call)
            arguments: list[Pod | Container] = [pod_from_message(request.pod)]
            if with_container:
                arguments.append(container_from_message(request.container))
            await self._notify(method, call, *arguments)
            return b""

        return handle

    async def _notify(self, method: str, call: Call, *arguments: Pod | Container) -> None:
        self._session.step(Step.EVENT)
        await self._run(method, call, getattr(self._plugin, method), *arguments)

    async def _create_container(self, call: Call) -> bytes:
        request = _decode(nri_pb2.CreateContainerRequest(), call)
        self._session.step(Step.EVENT)
        pod, container = pod_from_message(request.pod), container_from_message(request.container)
        found = await self._run("create_container", call, self._plugin.create_container, pod, container)
        adjustment, updates = found if isinstance(found, tuple) else (found, ())
        response = nri_pb2.CreateContainerResponse()
        if adjustment is not None:
            if not isinstance(adjustment, Adjustment):
                raise TypeError(f"create_container returned {type(adjustment).__name__}, not an Adjustment")
            if adjustment:
                response.adjust.CopyFrom(adjustment.to_message())
        for update in updates:
            if update.container_id == container.id:
                raise LocalProtocolError(
                    f"an update of the container under creation, {container.id}", hint="use the adjustment"
                )
        response.update.extend(_updates(updates))
        return response.SerializeToString()

    async def _update_container(self, call: Call) -> bytes:
        request = _decode(nri_pb2.UpdateContainerRequest(), call)
        self._session.step(Step.EVENT)
        pod, container = pod_from_message(request.pod), container_from_message(request.container)
        wanted = resources_from_message(request.linux_resources)
        updates = await self._run("update_container", call, self._plugin.update_container, pod, container, wanted)
        return nri_pb2.UpdateContainerResponse(update=_updates(updates)).SerializeToString()

    async def _stop_container(self, call: Call) -> bytes:
        request = _decode(nri_pb2.StopContainerRequest(), call)
        self._session.step(Step.EVENT)
        pod, container = pod_from_message(request.pod), container_from_message(request.container)
        updates = await self._run("stop_container", call, self._plugin.stop_container, pod, container)
        return nri_pb2.StopContainerResponse(update=_updates(updates)).SerializeToString()

    async def _update_pod_sandbox(self, call: Call) -> bytes:
        request = _decode(nri_pb2.UpdatePodSandboxRequest(), call)
        self._session.step(Step.EVENT)
        overhead = resources_from_message(request.overhead_linux_resources)
        resources = resources_from_message(request.linux_resources)
        pod = pod_from_message(request.pod)
        await self._run("update_pod_sandbox", call, self._plugin.update_pod_sandbox, pod, overhead, resources)
        return b""

    async def _validate(self, call: Call) -> bytes:
        request = _decode(nri_pb2.ValidateContainerAdjustmentRequest(), call)
        self._session.step(Step.EVENT)
        pod, container = pod_from_message(request.pod), container_from_message(request.container)
        response = nri_pb2.ValidateContainerAdjustmentResponse()
        try:
            validation = Validation(pod, container, request)
            await self._run(
                "validate_container_adjustment",
                call,
                self._plugin.validate_container_adjustment,
                validation,
                late=Rejected("the validating plugin did not decide in time"),  # fails closed, as runtimes do
            )
        except Rejected as rejected:
            response.reject, response.reason = True, str(rejected) or "rejected"
        return response.SerializeToString()

    async def _run(
        self, name: str, call: Call, method: Callable[..., Any], *arguments: Any, late: Exception | None = None
    ) -> Any:
        """The method's result; if it takes too long, None or `late` raised, while it runs on."""
        if getattr(method, "__func__", None) is getattr(Plugin, name):
            return None  # not overridden: no need for a thread to do nothing
        limit_s = self._limit_s(call)
        current = Handling()
        task = current.task = asyncio.ensure_future(self._invoke(method, arguments, current))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        task.add_done_callback(current.finished)
        wait_s = None if limit_s is None else max(0.0, limit_s - max(MARGIN_LEAST_S, MARGIN_SHARE * limit_s))
        began_s = time.monotonic()
        try:
            done, _ = await asyncio.wait({task}, timeout=wait_s)
        finally:
            current.answered.set()
        if done:
            if task.cancelled():
                raise RpcError(Code.CANCELED, f"{name} was cancelled")
            error = task.exception()
            if error is not None and not isinstance(error, NriError | Rejected):
                log.error("%s failed", name, exc_info=error)
            return task.result()
        seconds = time.monotonic() - began_s
        log.error("%s takes longer than %.2f s: answered without it, before the runtime drops us", name, seconds)
        task.add_done_callback(lambda task: _report_late(name, began_s, task))
        try:
            self._plugin.late(name, seconds)
        except Exception:
            log.exception("late() failed")
        if late is not None:
            raise late
        return None

    def _limit_s(self, call: Call) -> float | None:
        if call.timeout_s is not None:
            return call.timeout_s
        return self._session.runtime.request_timeout_s if self._session.runtime is not None else None

    async def _invoke(self, method: Callable[..., Any], arguments: Sequence[Any], current: Handling) -> Any:
        handling.set(current)  # this task's own context
        if inspect.iscoroutinefunction(method):
            return await method(*arguments)
        context = contextvars.copy_context()
        found = await asyncio.get_running_loop().run_in_executor(
            self._executor, lambda: context.run(method, *arguments)
        )
        return await found if inspect.isawaitable(found) else found


def _report_late(name: str, began_s: float, task: asyncio.Task[Any]) -> None:
    seconds = time.monotonic() - began_s
    if task.cancelled():
        return
    error = task.exception()
    outcome = "its result is lost" if error is None else f"it failed: {error}"
    log.warning("%s came to its end after %.2f s; %s", name, seconds, outcome)


def _decode(message: Any, call: Call) -> Any:
    assert isinstance(message, Message)
    try:
        message.ParseFromString(call.head.payload)
    except DecodeError as error:
        raise RpcError(Code.INTERNAL, f"ttrpc: error unmarshalling payload: {error}") from None
    return message


def _updates(updates: Sequence[Update] | None) -> list[nri_pb2.ContainerUpdate]:
    return [update.to_message() for update in updates or ()]
