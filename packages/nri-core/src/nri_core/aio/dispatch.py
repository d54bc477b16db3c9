"""From calls of the runtime to methods of the plugin: decoding, time limits, answers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from nri_core.aio.hooks import Handling as Handling
from nri_core.aio.hooks import Hooks
from nri_core.aio.records import Records
from nri_core.aio.rpc import Call, Handler, Services
from nri_core.api import answers
from nri_core.api.events import HANDLERS, EventMask
from nri_core.api.model import (
    Allowance,
    Container,
    Pod,
    container_from_bytes,
    container_from_message,
    pod_from_bytes,
    pod_from_message,
)
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
from nri_core.wire import M, TooManyParts, decoded

log = logging.getLogger("nri_core")

PLUGIN_SERVICE_NAME = "nri.pkg.api.v1alpha1.Plugin"
RUNTIME_SERVICE_NAME = "nri.pkg.api.v1alpha1.Runtime"

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
        self,
        plugin: Plugin,
        session: Session,
        executor: ThreadPoolExecutor,
        fatal: Callable[[NriError], None],
        name: str = "",
    ) -> None:
        """`fatal`: called with what makes the connection useless. `name`: `NN-name` of the plugin."""
        self._fatal = fatal
        self._plugin = plugin
        self._name = name
        self._session = session
        self._hooks = Hooks(plugin, session, executor)
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

    async def close(self) -> None:
        """The connection has ended: see `Hooks.close`."""
        await self._hooks.close()

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
        self._hooks.nothing(
            "configure",
            request.runtime_name,
            await self._hooks.run("configure", call, request.runtime_name, request.config, self._session.runtime),
        )
        response = nri_pb2.ConfigureResponse(events=int(events))
        if self._plugin.failure_policy is not None:
            response.failure_policy.CopyFrom(self._plugin.failure_policy.to_message())
        return response.SerializeToString()

    async def _synchronize(self, call: Call) -> bytes:
        limit_s = self._hooks.limit_s(call)
        try:
            answer = await self._synchronize_in_time(call)
        finally:
            if limit_s is not None and time.monotonic() - call.arrived_s > limit_s:
                # Older runtimes now leave the connection open, and never send an event.
                late = ConnectionLost(
                    f"Synchronize took longer than the runtime's limit of {limit_s:g} s",
                    hint="an async method must not block the event loop",
                )
                asyncio.get_running_loop().call_soon(self._fatal, late)
        return answer

    async def _synchronize_in_time(self, call: Call) -> bytes:
        try:
            everything = self._session.synchronized_bytes(call.head.payload)
        except ValueError as error:
            raise _undecodable(error) from None
        if everything is None:
            return nri_pb2.SynchronizeResponse(more=True).SerializeToString()
        allowance = Allowance()
        subject = f"{len(everything[0])} pods and {len(everything[1])} containers"
        pods = Records("pods", everything[0], lambda data: pod_from_bytes(data, allowance))
        containers = Records("containers", everything[1], lambda data: container_from_bytes(data, allowance))
        found = await self._hooks.run("synchronize", call, subject, pods, containers)
        response = nri_pb2.SynchronizeResponse()
        with _logged("synchronize", subject):
            response.update.extend(answers.updates("synchronize", found))
        if not self.synchronized.done():
            self.synchronized.set_result(None)
        return response.SerializeToString()

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
            container = container_from_message(request.container) if with_container else None
            await self._notify(method, call, pod_from_message(request.pod), container)
            return b""

        return handle

    async def _notify(self, method: str, call: Call, pod: Pod, container: Container | None = None) -> None:
        arguments = (pod,) if container is None else (pod, container)
        subject = subject_of(pod, container)
        self._hooks.nothing(method, subject, await self._event(method, call, subject, *arguments))

    async def _event(self, hook: str, call: Call, subject: str, *arguments: Any) -> Any:
        """Run the method of an event."""
        self._session.step(Step.EVENT)
        late: Exception | None = None
        if hook == "validate_container_adjustment":
            late = Rejected("the validating plugin did not decide in time")  # fails closed, as runtimes do
        elif self._plugin.failure_policy is not None and self._plugin.failure_policy.fail_request:
            # The runtime would fail the request, and so do we; not by its time limit, which could drop us too.
            late = RpcError(Code.ABORTED, f"{hook} of plugin {self._name} did not answer in time")
        return await self._hooks.run(hook, call, subject, *arguments, late=late)

    async def _create_container(self, call: Call) -> bytes:
        request = _decode(nri_pb2.CreateContainerRequest(), call)
        pod, container = pod_from_message(request.pod), container_from_message(request.container)
        subject = subject_of(pod, container)
        found = await self._event("create_container", call, subject, pod, container)
        with _logged("create_container", subject):
            return answers.creation(found, container.id).SerializeToString()

    async def _update_container(self, call: Call) -> bytes:
        request = _decode(nri_pb2.UpdateContainerRequest(), call)
        pod, container = pod_from_message(request.pod), container_from_message(request.container)
        wanted = resources_from_message(request.linux_resources)
        subject = subject_of(pod, container)
        found = await self._event("update_container", call, subject, pod, container, wanted)
        with _logged("update_container", subject):
            updates = answers.updates("update_container", found)
        return nri_pb2.UpdateContainerResponse(update=updates).SerializeToString()

    async def _stop_container(self, call: Call) -> bytes:
        request = _decode(nri_pb2.StopContainerRequest(), call)
        pod, container = pod_from_message(request.pod), container_from_message(request.container)
        subject = subject_of(pod, container)
        found = await self._event("stop_container", call, subject, pod, container)
        with _logged("stop_container", subject):
            updates = answers.updates("stop_container", found)
        return nri_pb2.StopContainerResponse(update=updates).SerializeToString()

    async def _update_pod_sandbox(self, call: Call) -> bytes:
        request = _decode(nri_pb2.UpdatePodSandboxRequest(), call)
        overhead = resources_from_message(request.overhead_linux_resources)
        resources = resources_from_message(request.linux_resources)
        pod = pod_from_message(request.pod)
        found = await self._event("update_pod_sandbox", call, subject_of(pod), pod, overhead, resources)
        self._hooks.nothing("update_pod_sandbox", subject_of(pod), found)
        return b""

    async def _validate(self, call: Call) -> bytes:
        request = _decode(nri_pb2.ValidateContainerAdjustmentRequest(), call)
        pod, container = pod_from_message(request.pod), container_from_message(request.container)
        response = nri_pb2.ValidateContainerAdjustmentResponse()
        hook, subject = "validate_container_adjustment", subject_of(pod, container)
        try:
            found = await self._event(hook, call, subject, Validation(pod, container, request))
            with _logged(hook, subject):
                if found is not None and found is not True:  # False was hardly meant as a yes
                    raise answers.WrongAnswer(f"{hook} returned {answers.described(found)}: raise Rejected to refuse")
        except Rejected as rejected:
            response.reject, response.reason = True, str(rejected) or "rejected"
        return response.SerializeToString()


def subject_of(pod: Pod, container: Container | None = None) -> str:
    """`namespace/pod` or `namespace/pod:container (id)`, for messages."""
    name = f"{pod.namespace}/{pod.name}"
    return name if container is None else f"{name}:{container.name} ({container.id})"


@contextmanager
def _logged(hook: str, subject: str) -> Iterator[None]:
    """What a method returned wrongly fails the request: its author must find it in the plugin's own log too."""
    try:
        yield
    except (answers.WrongAnswer, LocalProtocolError) as error:
        log.error("%s for %s: %s", hook, subject, error)
        raise


def _decode(message: M, call: Call) -> M:
    try:
        return decoded(message, call.head.payload)
    except TooManyParts as error:
        raise RpcError(Code.RESOURCE_EXHAUSTED, str(error)) from None
    except ValueError as error:
        raise _undecodable(error) from None


def _undecodable(error: ValueError) -> RpcError:
    return RpcError(Code.INTERNAL, f"ttrpc: error unmarshalling payload: {error}")
