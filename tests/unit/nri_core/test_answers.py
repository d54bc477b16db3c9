"""What a plugin returns or raises wrongly is in its own log, with hook, container and type; slips are warned about."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from nri_core import (
    Adjustment,
    Backoff,
    Container,
    LocalProtocolError,
    Plugin,
    Pod,
    Rejected,
    Resources,
    RpcError,
    Stub,
    Update,
)
from nri_core.errors import Code
from nri_core.lint import remarks
from nri_core.testing import FakeRuntime, PluginConnection

POD, CONTAINER = Pod("p1", "web", "default"), Container("c1", "p1", "main")
SUBJECT = "default/web:main (c1)"


class Returning(Plugin):
    """Gives what it was given."""

    name, index = "returning", "50"

    def __init__(self, value: Any) -> None:
        self.value = value

    def _give(self) -> Any:
        found = self.value() if callable(self.value) else self.value
        if isinstance(found, BaseException):  # made anew: a traceback would hold what belongs to the call
            raise found
        return found

    async def create_container(self, pod: Pod, container: Container) -> Any:
        return self._give()

    def update_container(self, pod: Pod, container: Container, resources: Any) -> Any:
        return self._give()

    async def stop_container(self, pod: Pod, container: Container) -> Any:
        return self._give()

    def start_container(self, pod: Pod, container: Container) -> Any:
        return self._give()

    async def validate_container_adjustment(self, validation: Any) -> Any:
        return self._give()


def scene(tmp_path: Path, plugin: Plugin, play: Callable[[PluginConnection], Awaitable[None]]) -> None:
    async def main() -> None:
        async with FakeRuntime(tmp_path / "nri.sock", request_timeout_s=60, registration_timeout_s=60) as runtime:
            stub = Stub(plugin, socket_path=runtime.path, backoff=Backoff(least_s=0.01))
            task = asyncio.create_task(stub.run())
            try:
                await play(await runtime.connected(120))
            finally:
                stub.stop()
                await asyncio.wait_for(task, 120)

    asyncio.run(main())


HOOKS: dict[str, Callable[[PluginConnection], Awaitable[Any]]] = {
    "create_container": lambda peer: peer.create_container(POD, CONTAINER),
    "update_container": lambda peer: peer.update_container(POD, CONTAINER),
    "stop_container": lambda peer: peer.stop_container(POD, CONTAINER),
    "start_container": lambda peer: peer.notify("StartContainer", POD, CONTAINER),
    "validate_container_adjustment": lambda peer: peer.validate(POD, CONTAINER),
}


async def _yielding() -> Any:
    """What `yield` makes of an async method by mistake."""
    yield Adjustment()


def _named(part: object) -> str:
    """The same in every process: what a function would be shown as has its address."""
    return str(getattr(part, "__name__", part))[:40]


UNSENDABLE = Resources(memory_limit_bytes=1 << 70)
WRONG = [
    ("create_container", "adjustment", "str"),
    ("create_container", {"x": 1}, "dict"),
    ("create_container", True, "bool"),
    ("create_container", [Adjustment()], "list"),
    ("create_container", Update("c2"), "Update"),
    ("create_container", (Adjustment(), [], 1), "a tuple of Adjustment, list, int"),
    ("create_container", (), "a tuple of nothing"),
    ("create_container", (Adjustment(), Update("c2")), "Update, not a list"),
    ("create_container", (Adjustment(), ["c2"]), "str in it"),
    ("create_container", lambda: Adjustment().limits(UNSENDABLE), "Adjustment that cannot be encoded"),
    ("create_container", lambda: Adjustment().annotation("k", "\ud800"), "Adjustment that cannot be encoded"),
    ("create_container", lambda: Adjustment().unified("cpu.weight", 10), "of type int"),  # type: ignore[arg-type]
    ("create_container", _yielding, "async_generator"),
    ("create_container", object, "object"),
    ("create_container", (None, [Update("c1")]), "use the adjustment"),
    ("update_container", Update("c2"), "Update, not a list"),
    ("update_container", "c2", "str"),
    ("update_container", {"c2": Update("c2")}, "dict with str in it"),
    ("update_container", [None], "NoneType in it"),
    ("update_container", 7, "int"),
    ("stop_container", [Update("c2", UNSENDABLE)], "Update that cannot be encoded"),
    ("stop_container", Update("c2"), "Update, not a list"),
    ("validate_container_adjustment", False, "bool"),
    ("validate_container_adjustment", "no", "str"),
    ("create_container", lambda: ValueError("boom"), "ValueError: boom"),
    ("create_container", lambda: RpcError(Code.NOT_FOUND, "no such class"), "no such class"),
    ("create_container", lambda: LocalProtocolError("our own"), "our own"),
    ("create_container", lambda: Rejected("not here"), "not here"),
    ("start_container", lambda: KeyError("k"), "KeyError: 'k'"),
    ("stop_container", lambda: asyncio.CancelledError(), "was cancelled"),
]


@pytest.mark.parametrize(("hook", "value", "words"), WRONG, ids=_named)
def test_what_fails_a_request_is_in_the_plugin_s_own_log(
    tmp_path: Path, hook: str, value: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nri_core")

    async def play(peer: PluginConnection) -> None:
        with pytest.raises(RpcError):
            await HOOKS[hook](peer)

    scene(tmp_path, Returning(value), play)
    [line] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert hook in line.getMessage()
    assert SUBJECT in line.getMessage()
    assert words in line.getMessage()


@pytest.mark.parametrize(
    ("hook", "value"),
    [
        ("create_container", None),
        ("create_container", Adjustment()),
        ("create_container", (None, None)),
        ("create_container", (Adjustment().env("A", "1"), (Update("c2"),))),
        ("update_container", ()),
        ("update_container", lambda: iter([Update("c2")])),
        ("stop_container", None),
        ("start_container", None),
        ("validate_container_adjustment", None),
        ("validate_container_adjustment", True),
    ],
    ids=_named,
)
def test_right_answers_are_not_logged(tmp_path: Path, hook: str, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def play(peer: PluginConnection) -> None:
        await HOOKS[hook](peer)

    scene(tmp_path, Returning(value), play)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_wrong_answer_to_synchronize_is_logged_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(Plugin):
        name, index = "wrong", "50"

        def synchronize(self, pods: Any, containers: Any) -> Any:
            return {"c1": "max"}

    async def main() -> None:
        async with FakeRuntime(tmp_path / "nri.sock", pods=[POD], containers=[CONTAINER]) as runtime:
            task = asyncio.create_task(Stub(Wrong(), socket_path=runtime.path, reconnect=False).run())
            with pytest.raises(Exception, match="closed the connection"):
                await asyncio.wait_for(task, 120)

    asyncio.run(main())
    assert "synchronize for 1 pods and 1 containers: synchronize returned dict with str in it, not an Update" in (
        caplog.text
    )


def test_an_answer_where_there_is_none_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`start_container` cannot adjust anything: its author should know."""

    async def play(peer: PluginConnection) -> None:
        for _ in range(3):
            await peer.notify("StartContainer", POD, CONTAINER)

    scene(tmp_path, Returning(Adjustment()), play)
    [line] = [record.getMessage() for record in caplog.records]
    assert line == f"start_container for {SUBJECT} returned Adjustment, which is not used: it has no answer"


def test_a_rejection_is_told_without_alarm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nri_core")

    async def play(peer: PluginConnection) -> None:
        assert await peer.validate(POD, CONTAINER) == "not here"

    scene(tmp_path, Returning(lambda: Rejected("not here")), play)
    [line] = [record for record in caplog.records if "validate" in record.getMessage()]
    assert line.levelno == logging.INFO
    assert line.getMessage() == f"validate_container_adjustment for {SUBJECT}: rejected: not here"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Adjustment().unified("cpu.weight", 10),  # type: ignore[arg-type]
        lambda: Update("c").unified("memory.high", 1.5),  # type: ignore[arg-type]
        lambda: Adjustment().annotation("k", None),  # type: ignore[arg-type]
        lambda: Adjustment().env(b"A", "1"),  # type: ignore[arg-type]
        lambda: Adjustment().sysctl("k", 1),  # type: ignore[arg-type]
        lambda: Adjustment().oom("5"),  # type: ignore[arg-type]
        lambda: Resources(unified={"k": 1}),  # type: ignore[dict-item]
        lambda: Resources(memory_limit_bytes="1G"),  # type: ignore[arg-type]
        lambda: Resources(cpuset_cpus=3),  # type: ignore[arg-type]
        lambda: Resources(hugepage_limits={"2MB": "1"}),  # type: ignore[dict-item]
        lambda: Resources(pids_limit=True),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_where_it_is_made(make: Callable[[], object]) -> None:
    """With the key and the type; protobuf would only say "bad argument type for built-in operation"."""
    with pytest.raises(LocalProtocolError, match=r"of type (int|float|NoneType|bytes|str|bool) \(give it as"):
        make()


def test_numbers_of_other_libraries_are_numbers() -> None:
    np = pytest.importorskip("numpy")
    message = Update("c", Resources(memory_limit_bytes=np.int64(5))).to_message()
    assert message.linux.resources.memory.limit.value == 5


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("createContainer", "create_container"),
        ("CreateContainer", "create_container"),
        ("on_create_container", "create_container"),
        ("create_containers", "create_container"),
        ("creat_container", "create_container"),
        ("container_create", "create_container"),
        ("post_start", "post_start_container"),
        ("run_pod", "run_pod_sandbox"),
        ("handle_stop_container", "stop_container"),
        ("synchronise", "synchronize"),
        ("syncron" + "ize", "synchronize"),
        ("validate_container", "validate_container_adjustment"),
        ("onDisconnected", "disconnected"),
        ("configured", "configure"),
    ],
)
def test_a_method_that_is_nearly_one_of_a_plugin_s_is_warned_about(
    tmp_path: Path, name: str, meant: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It would never be called, and its author wait for events in vain."""
    kind = type("Mine", (Plugin,), {"name": "mine", "index": "10", name: lambda self: None})

    async def main() -> None:
        Stub(kind(), socket_path=tmp_path / "s")

    asyncio.run(main())
    assert caplog.messages == [f"plugin 10-mine: Mine.{name} is not called by any runtime: was {meant} meant?"]


def test_helpers_are_not_warned_about() -> None:
    class Fine(Plugin):
        tests_of_container = 3

        def create_container(self, pod: Pod, container: Container) -> None:
            return None

        def create_containers(self) -> None:
            """Beside the real one it is a name like any other."""

        def _start_container(self) -> None: ...
        def start_engine(self) -> None: ...
        def report(self) -> None: ...
        def find_container_cgroup(self) -> None: ...
        def settle(self) -> None: ...
        def use(self) -> None: ...
        def start_container_engine(self) -> None: ...

        @property
        def update_containers(self) -> list[str]:
            raise AssertionError("a property is not to be asked")

    assert remarks(Fine()) == []


def test_a_method_that_cannot_be_called_as_it_will_be_is_warned_about() -> None:
    class Wrong(Plugin):
        configure = None  # type: ignore[assignment]

        def create_container(self, container: Container) -> None: ...  # type: ignore[override]
        def stop_container(self, pod: Pod, container: Container, force: bool) -> None: ...  # type: ignore[override]
        def start_container(self, *arguments: Any) -> None: ...
        def late(self, method: str, seconds: float, more: int = 0) -> None: ...

    plugin = Wrong()
    plugin.remove_container = lambda pod, container: None  # type: ignore[method-assign]
    found = remarks(plugin)
    assert [line.split()[0] for line in found] == [
        "remove_container",
        "Wrong.create_container",
        "Wrong.stop_container",
        "Wrong.configure",
    ]
    assert "cannot be called with (pod, container)" in found[1]


def test_a_failure_policy_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    """Not when the runtime configures the plugin, and only the runtime is told."""

    class Wrong(Plugin):
        name, index = "wrong", "50"
        failure_policy = {"fail_request": True}  # type: ignore[assignment]

    async def main() -> None:
        with pytest.raises(LocalProtocolError, match=r"failure_policy of plugin 50-wrong is of type dict"):
            Stub(Wrong(), socket_path=tmp_path / "s")

    asyncio.run(main())
