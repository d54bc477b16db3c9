"""Runs a plugin: connect, register, serve, and again when the runtime comes back."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from nri_core.aio.claim import HINT, Claim
from nri_core.aio.dispatch import RUNTIME_SERVICE_NAME, Dispatcher
from nri_core.aio.hooks import handling
from nri_core.aio.rivals import RivalLook
from nri_core.aio.rpc import ClientEndpoint, ServerEndpoint
from nri_core.aio.transport import DEFAULT_SOCKET, Trunk, connect, inherited
from nri_core.api.adjust import Update, update_from_message
from nri_core.api.events import FROM_V0_10, pretty
from nri_core.driver import SLICE_TIMEOUT_S, Outcome
from nri_core.errors import (
    ConfigurationRefused,
    ConnectError,
    ConnectionLost,
    LocalProtocolError,
    NriError,
    PluginAlreadyRunning,
    RegistrationRefused,
    RemoteProtocolError,
    RpcError,
    SessionError,
)
from nri_core.lint import remarks
from nri_core.mux import MAX_PAYLOAD_BYTES, PLUGIN_SERVICE, RUNTIME_SERVICE
from nri_core.pb import nri_pb2
from nri_core.plugin import FailurePolicy, Plugin, identity
from nri_core.session import DEFAULT_REGISTRATION_TIMEOUT_S, DEFAULT_REQUEST_TIMEOUT_S, Session, State, Step
from nri_core.wire import decoded

log = logging.getLogger("nri_core")

NRI_VERSION = "v0.12.5"
"""The NRI release whose protocol this library speaks; told to runtimes."""


REGISTRATION_WAIT_S = 20.0
"""Longer than the runtime's own limit, 5 s: it takes plugins one at a time, and those before us count for us too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Waits between attempts to connect: doubling, with jitter."""

    least_s: float = 0.5
    most_s: float = 30.0
    healthy_s: float = 10.0
    """A connection that served for so long makes the waits short again. A shorter one does not: a runtime that takes
    the plugin and drops it at once would be asked several times a second, for ever."""

    def attempt_after(self, attempt: int, served_s: float) -> int:
        """Which attempt comes after a connection that served for `served_s` (0: it did not) ended."""
        return 0 if served_s >= self.healthy_s else attempt

    def wait_s(self, attempt: int, chance: float) -> float:
        """Seconds before `attempt` (from 0); `chance` in [0, 1) spreads many plugins of one node."""
        whole: float = min(self.most_s, self.least_s * 2.0 ** min(attempt, 20))
        return whole * (0.5 + chance / 2)


class Stub:
    """Drives one plugin."""

    def __init__(
        self,
        plugin: Plugin,
        *,
        socket_path: str | os.PathLike[str] = DEFAULT_SOCKET,
        reconnect: bool = True,
        backoff: Backoff | None = None,
        registration_timeout_s: float = REGISTRATION_WAIT_S,
    ) -> None:
        """The plugin's name and index are settled here: see `nri_core.plugin.identity`.

        Raises:
            LocalProtocolError: the plugin has no well-formed name and index, its `events` has bits of no event, or its
                `failure_policy` is none.
        """
        self.plugin = plugin
        self.name, self.index = identity(plugin)
        unknown = (plugin.events() | plugin.required) & ~int(FROM_V0_10)
        if unknown:
            raise LocalProtocolError(
                f"events() of plugin {self.index}-{self.name} has bits of no event: {int(unknown):#x}",
                hint="combine members of EventMask",
            )
        if not isinstance(plugin.failure_policy, FailurePolicy | None):
            raise LocalProtocolError(
                f"failure_policy of plugin {self.index}-{self.name} is of type {type(plugin.failure_policy).__name__}",
                hint="give a FailurePolicy",
            )
        for remark in remarks(plugin):
            log.warning("plugin %s-%s: %s", self.index, self.name, remark)
        self.session = Session()
        plugin.stub = self
        self._path = socket_path
        self._reconnect = reconnect
        self._backoff = backoff or Backoff()
        self._registration_timeout_s = registration_timeout_s
        self._stopping = asyncio.Event()
        self._serving_since_s: float | None = None
        self._trunk: Trunk | None = None
        self._client: ClientEndpoint | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"nri-{self.name}")
        self._rivals = RivalLook()

    async def run(self) -> None:
        """Serve until `stop` is called; without `reconnect`, until the connection ends.

        A pre-launched plugin uses the socket it was given and returns when the runtime closes it.

        Raises:
            ConnectError: no connection could be made, and `reconnect` is off.
            SessionError: the runtime does not take this plugin; trying again would not help.
            ConnectionLost, RemoteProtocolError: the connection ended, and `reconnect` is off.
        """
        given = inherited()
        attempt = 0
        # Held until the end, also while there is no connection: what a plugin does to containers goes on meanwhile.
        claimed = Claim(self._path, self.index, self.name, self.plugin.exclusive)
        try:
            while not self._stopping.is_set():
                self._serving_since_s = None
                try:
                    if given is None or self.plugin.exclusive is not None:
                        claimed.take()
                        await self._refuse_rivals()
                    if given is not None:
                        await self._serve(given, pre_launched=True)
                    else:
                        await self._serve(await connect(self._path))
                except (SessionError, LocalProtocolError):
                    raise
                except NriError as error:
                    if self._stopping.is_set():
                        return
                    if given is not None and self.session.state is State.CLOSED:
                        log.info("%s; a pre-launched plugin ends with it", error)
                        return
                    if given is not None or not self._reconnect:
                        raise
                    attempt = self._backoff.attempt_after(attempt, self._served_s())
                    wait_s = self._backoff.wait_s(attempt, random.random())
                    attempt += 1
                    log.warning("%s; trying again in %.1f s", error, wait_s)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(wait_s):
                            await self._stopping.wait()
        finally:
            claimed.release()
            self._executor.shutdown(wait=False, cancel_futures=True)

    def _served_s(self) -> float:
        """How long the last connection served."""
        return 0.0 if self._serving_since_s is None else asyncio.get_running_loop().time() - self._serving_since_s

    async def _refuse_rivals(self) -> None:
        rival = await self._rivals.find(self._path, self.plugin.rivals)
        if rival is not None:
            raise PluginAlreadyRunning(f"{rival} is already connected to {self._path}", hint=HINT)

    def stop(self) -> None:
        """End `run` soon."""
        self._stopping.set()
        if self._trunk is not None:
            self._trunk.close()

    async def update_containers(self, updates: Sequence[Update], *, timeout_s: float | None = None) -> list[Update]:
        """Ask for changes of running containers; returns those that failed.

        The runtime cannot serve this while it waits for one of our methods. So a task that a method started waits
        here until the method was answered, and a method itself must not call this.

        Raises:
            LocalProtocolError: called within a method of the plugin, or not synchronized yet.
            RpcError, TimeoutError, ConnectionLost: see `ClientEndpoint.call`.
        """
        current = handling.get()
        if current is not None and not current.answered.is_set():
            if current.task is asyncio.current_task():
                raise LocalProtocolError(
                    "update_containers was called within a handler: the runtime waits for the handler, and would "
                    "wait for itself",
                    hint="return the updates from the handler, or start a task of its own for the call",
                )
            await current.answered.wait()
        self.session.step(Step.UPDATE)
        assert self._client is not None
        request = nri_pb2.UpdateContainersRequest(update=[update.to_message() for update in updates])
        limit_s = timeout_s
        if limit_s is None:
            limit_s = self.session.runtime.request_timeout_s if self.session.runtime else DEFAULT_REQUEST_TIMEOUT_S
        answer = await self._client.call(
            RUNTIME_SERVICE_NAME, "UpdateContainers", request.SerializeToString(), timeout_s=limit_s
        )
        response = nri_pb2.UpdateContainersResponse()
        try:
            decoded(response, answer)
        except ValueError as error:
            raise RemoteProtocolError(f"the answer to UpdateContainers cannot be decoded: {error}") from None
        return [update_from_message(update) for update in response.failed]

    async def update_in_slices(
        self, updates: Iterable[Update], *, at_once: int = 20, timeout_s: float = SLICE_TIMEOUT_S
    ) -> AsyncIterator[Outcome]:
        """Ask for many changes, a few at a time, and tell after each slice what the runtime has confirmed.

        For what an answer in the time limit has no room for: a runtime applies updates one after another, some
        10 ms each, and holds up pods meanwhile; so slices are small, and pods come in between them. `updates` may be
        a generator: a slice is taken from it when its turn comes.

        A slice that is refused, not answered or not to be encoded is an Outcome with an error; the next one follows.

        Raises:
            ConnectionLost: the connection ended; the rest was not asked for, the slice under way may be applied.
            LocalProtocolError: see `update_containers`.
        """
        rest = iter(updates)
        while asked := tuple(islice(rest, at_once)):
            try:
                failed = await self.update_containers(asked, timeout_s=timeout_s)
            except (RpcError, RemoteProtocolError, TimeoutError, TypeError, ValueError) as error:
                yield Outcome((), asked, error)
                continue
            refused = {update.container_id for update in failed}
            yield Outcome(
                tuple(update for update in asked if update.container_id not in refused),
                tuple(update for update in asked if update.container_id in refused),
                None,
            )

    async def _serve(self, sock: socket.socket, *, pre_launched: bool = False) -> None:
        """One connection, from registration to its end. Always raises, unless `stop` was called."""
        session = self.session = Session()
        trunk = self._trunk = Trunk()
        dispatcher = Dispatcher(self.plugin, session, self._executor, trunk.close, f"{self.index}-{self.name}")
        sends: dict[int, object] = {}
        # Runtimes before NRI v0.7 send a Synchronize of any size in one message.
        server = ServerEndpoint(
            dispatcher.services(),
            lambda frame: sends[PLUGIN_SERVICE](frame),  # type: ignore[operator]
            max_receive_bytes=MAX_PAYLOAD_BYTES,
        )
        client = self._client = ClientEndpoint(lambda frame: sends[RUNTIME_SERVICE](frame))  # type: ignore[operator]
        sends[PLUGIN_SERVICE] = trunk.attach(PLUGIN_SERVICE, server.feed)
        sends[RUNTIME_SERVICE] = trunk.attach(RUNTIME_SERVICE, client.feed)
        await trunk.start(sock)  # serving before registering: Configure may come before the answer
        error: NriError = ConnectionLost("stopped")
        try:
            closed = asyncio.ensure_future(trunk.wait_closed())
            closed.add_done_callback(lambda done: None if done.cancelled() else client.lose(done.result()))
            try:
                if self._stopping.is_set():  # while the connection was being made: there was nothing to close yet
                    trunk.close()
                else:
                    await self._begin(session, client, dispatcher, closed, pre_launched)
                error = await closed
            finally:
                closed.cancel()
        except NriError as failure:
            error = failure
        finally:
            trunk.close()
            lost = error if isinstance(error, ConnectionLost) else ConnectionLost(str(error))
            session.step(Step.CLOSE)
            client.lose(lost)
            server.lose(lost)
            await dispatcher.close()
            await self._tell_disconnected(None if self._stopping.is_set() else error)
        if not self._stopping.is_set():
            raise error

    async def _begin(
        self,
        session: Session,
        client: ClientEndpoint,
        dispatcher: Dispatcher,
        closed: asyncio.Future[NriError],
        pre_launched: bool,
    ) -> None:
        """Register, and wait until the runtime has configured and synchronized the plugin.

        A runtime can give a plugin up without closing the connection: then nothing would ever come.
        """
        session.step(Step.REGISTER)
        await self._register(client)
        runtime_s = session.runtime.request_timeout_s if session.runtime else DEFAULT_REQUEST_TIMEOUT_S
        wait_s = DEFAULT_REGISTRATION_TIMEOUT_S + 5 * runtime_s
        waited: set[asyncio.Future[Any]] = {dispatcher.synchronized, closed}
        await asyncio.wait(waited, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        runtime = session.runtime
        if not dispatcher.synchronized.done():
            if closed.done():
                raise self._dropped(session, closed.result())
            # Runtimes before NRI v0.7 do not synchronize what they launched themselves.
            if not pre_launched or runtime is None:
                raise ConnectionLost(f"registered, but not synchronized within {wait_s:g} s: the runtime gave us up")
        self._serving_since_s = asyncio.get_running_loop().time()
        if runtime is not None:
            log.info("connected to %s %s as %s-%s", runtime.name, runtime.version, self.index, self.name)

    async def _register(self, client: ClientEndpoint) -> None:
        request = nri_pb2.RegisterPluginRequest(plugin_name=self.name, plugin_idx=self.index, NRI_version=NRI_VERSION)
        payload = request.SerializeToString()
        limit_s = self._registration_timeout_s
        try:
            await client.call(RUNTIME_SERVICE_NAME, "RegisterPlugin", payload, timeout_s=limit_s)
        except RpcError as error:
            raise RegistrationRefused(
                f"the runtime does not take plugin {self.index}-{self.name}: {error.message}",
                hint="the index is two digits, the name letters, digits and _ . + -",
            ) from None
        except TimeoutError:
            raise ConnectionLost(
                f"no answer to the registration within {limit_s:g} s",
                hint="is it an NRI socket? on a busy node, raise plugin_registration_timeout of the runtime",
            ) from None
        except ConnectionLost as error:
            if error.hint is None:
                error.hint = "if this happens every time: is it an NRI socket? the runtime's log says more"
            raise

    def _dropped(self, session: Session, lost: NriError) -> NriError:
        """What to say of a connection that was closed between the registration and the end of Synchronize."""
        runtime = session.runtime
        if runtime is None or session.state is not State.CONFIGURED or not isinstance(lost, ConnectionLost):
            return lost
        # It may as well have restarted: worth another attempt if those are wanted.
        kind = ConnectionLost if self._reconnect else ConfigurationRefused
        return kind(
            f"{runtime.name} {runtime.version} closed the connection after the subscription to "
            f"{pretty(session.subscribed)}",
            hint="the runtime's log says why",
        )

    async def _tell_disconnected(self, error: BaseException | None) -> None:
        try:
            found = self.plugin.disconnected(error)
            if found is not None:
                await found
        except Exception:
            log.exception("disconnected() failed")


def run(plugin: Plugin, *, socket_path: str | os.PathLike[str] = DEFAULT_SOCKET, reconnect: bool = True) -> None:
    """Run a plugin until SIGINT or SIGTERM: the whole main program of most plugins.

    Raises:
        See `Stub` and `Stub.run`.
    """

    async def main() -> None:
        stub = Stub(plugin, socket_path=socket_path, reconnect=reconnect)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stub.stop)
        await stub.run()

    asyncio.run(main())


__all__ = ["Backoff", "ConnectError", "Outcome", "Stub", "run"]
