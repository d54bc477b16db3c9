"""Events, adjustments, updates, the life of a session, and a plugin's identity."""

from __future__ import annotations

import pytest

from nri_core import Adjustment, Container, ContainerState, EventMask, Mount, Plugin, Pod, Resources, Update
from nri_core.api.events import FROM_V0_10, HANDLERS, UP_TO_V0_9, known_events, parse_events, pretty
from nri_core.api.model import container_from_message, container_to_message, pod_from_message, pod_to_message
from nri_core.errors import LocalProtocolError, RemoteProtocolError
from nri_core.pb import nri_pb2
from nri_core.plugin import identity
from nri_core.session import LIFE, Session, State, Step

POD = Pod("p1", "web", "default", annotations={"a": "b"}, labels={"l": "m"}, cgroup_parent="/kubepods", ips=("::1",))
CONTAINER = Container(
    "c1",
    "p1",
    "main",
    ContainerState.RUNNING,
    annotations={"x": "y"},
    args=("sh", "-c", "true"),
    env=("A=1",),
    mounts=(Mount("/data", "/srv", "bind", ("ro",)),),
    cgroups_path="/kubepods/c1",
    unified={"memory.high": "1"},
    memory_limit_bytes=0,
    pid=77,
)


def test_records_survive_the_wire() -> None:
    assert pod_from_message(nri_pb2.PodSandbox.FromString(pod_to_message(POD).SerializeToString())) == POD
    message = nri_pb2.Container.FromString(container_to_message(CONTAINER).SerializeToString())
    assert container_from_message(message) == CONTAINER
    assert container_from_message(message).raw == message


def test_a_state_of_a_newer_runtime_is_unknown() -> None:
    message = nri_pb2.Container.FromString(bytes.fromhex("2063"))  # field 4, state 99
    assert container_from_message(message).state is ContainerState.UNKNOWN


def test_an_adjustment_puts_removals_before_settings() -> None:
    message = (
        Adjustment()
        .annotation("keep", "1")
        .remove_annotation("gone")
        .remove_annotation("replaced")
        .annotation("replaced", "2")
        .remove_mount("/old")
        .mount(Mount("/new", "/src", "bind", ("rw",)))
        .remove_env("OLD")
        .env("NEW", "3")
        .command("sleep", "1")
        .unified("memory.swap.max", "max")
        .oom(0)
        .to_message()
    )
    assert dict(message.annotations) == {"-gone": "", "-replaced": "", "keep": "1", "replaced": "2"}
    assert [mount.destination for mount in message.mounts] == ["-/old", "/new"]
    assert [(each.key, each.value) for each in message.env] == [("-OLD", ""), ("NEW", "3")]
    assert list(message.args) == ["", "sleep", "1"]
    assert message.linux.resources.unified["memory.swap.max"] == "max"
    assert message.linux.HasField("oom_score_adj")


def test_the_last_value_of_a_key_holds_and_a_removal_withdraws_it() -> None:
    """A key claimed twice would be a conflict with oneself."""
    twice = Adjustment().annotation("k", "1").annotation("k", "2").env("E", "1").env("E", "2")
    twice = twice.mount(Mount("/m", "/a")).mount(Mount("/m", "/b"))
    message = twice.to_message()
    assert dict(message.annotations) == {"k": "2"}
    assert [each.value for each in message.env] == ["2"]
    assert [each.source for each in message.mounts] == ["/b"]
    assert dict(twice.remove_annotation("k").to_message().annotations) == {"-k": ""}


def test_builders_leave_the_object_they_were_called_on_alone() -> None:
    first = Adjustment().annotation("a", "1")
    first.annotation("b", "2")
    assert dict(first.to_message().annotations) == {"a": "1"}
    assert not Adjustment()
    assert first


@pytest.mark.parametrize("key", ["", "-k"])
def test_a_key_that_would_mean_a_removal_is_refused(key: str) -> None:
    with pytest.raises(LocalProtocolError, match="remove_"):
        Adjustment().annotation(key, "v")
    with pytest.raises(LocalProtocolError):
        Adjustment().unified(key, "v")


def test_zero_is_a_value_and_none_is_an_absence() -> None:
    update = Update("c1").limits(Resources(memory_limit_bytes=0, cpu_quota_us=-1)).unified("memory.high", "max")
    linux = update.to_message().linux.resources
    assert linux.memory.HasField("limit")
    assert not linux.cpu.HasField("shares")
    assert linux.cpu.quota.value == -1
    assert dict(linux.unified) == {"memory.high": "max"}


@pytest.mark.parametrize(
    ("name", "version", "nri", "known"),
    [
        ("containerd", "v1.7.24", "", UP_TO_V0_9),
        ("containerd", "v2.1.6", "", UP_TO_V0_9),
        ("containerd", "v2.2.0", "", FROM_V0_10),
        ("v2", "v2.0.1", "", UP_TO_V0_9),
        ("containerd", "v2.0.0-10-gabcdef.m", "", UP_TO_V0_9),
        ("containerd", "v2.3.0", "v0.12.0", FROM_V0_10),
        ("containerd", "unreadable", "(devel)", UP_TO_V0_9),
        ("cri-o", "1.32.0", "", UP_TO_V0_9),
        ("cri-o", "1.33.1", "", EventMask(0x1FFF)),
        ("cri-o", "1.34.0", "", FROM_V0_10),
        ("something", "9.9", "", UP_TO_V0_9),
        ("something", "1.0", "v0.9.0", UP_TO_V0_9),
    ],
)
def test_only_events_that_the_runtime_knows_are_subscribed(name: str, version: str, nri: str, known: EventMask) -> None:
    assert known_events(name, version, nri) == known


def test_event_texts_are_read_and_written() -> None:
    assert parse_events("RunPodSandbox, createcontainer") == EventMask.RUN_POD_SANDBOX | EventMask.CREATE_CONTAINER
    assert parse_events("all") == FROM_V0_10
    assert parse_events("pod") == 0x1807
    assert EventMask.VALIDATE_CONTAINER_ADJUSTMENT in parse_events("container")
    assert pretty(0x4009) == "RunPodSandbox,CreateContainer,unknown(0x4000)"
    with pytest.raises(ValueError, match="no event"):
        parse_events("createcontaine")


def test_every_event_has_a_method_on_the_plugin() -> None:
    for method in HANDLERS.values():
        assert callable(getattr(Plugin, method))


def test_the_subscription_follows_what_is_overridden() -> None:
    class Mine(Plugin):
        def create_container(self, pod: Pod, container: Container) -> None:
            return None

        async def stop_container(self, pod: Pod, container: Container) -> None:
            return None

    assert Mine().events() == EventMask.CREATE_CONTAINER | EventMask.STOP_CONTAINER
    assert Plugin().events() == 0


def test_a_plugin_that_wants_nothing_does_not_ask_for_everything() -> None:
    """0 on the wire means all events."""
    session = Session()
    session.step(Step.REGISTER)
    assert session.configured(nri_pb2.ConfigureRequest(runtime_name="containerd"), EventMask(0)) != 0


def test_time_limits_that_an_old_runtime_does_not_tell_have_defaults() -> None:
    session = Session()
    session.step(Step.REGISTER)
    session.configured(nri_pb2.ConfigureRequest(), EventMask(0))
    assert session.runtime is not None
    assert (session.runtime.registration_timeout_s, session.runtime.request_timeout_s) == (5.0, 2.0)


def test_the_life_of_a_session_is_its_table() -> None:
    """Every step from every state: it leads where the table says, or is an error of whoever made it."""
    for state, steps in LIFE.items():
        for step in Step:
            session = Session()
            session.state = state
            if step is Step.CLOSE or step in steps:
                session.step(step)
                assert session.state is (State.CLOSED if step is Step.CLOSE else steps[step])
            else:
                ours = step in (Step.REGISTER, Step.UPDATE)
                with pytest.raises(LocalProtocolError if ours else RemoteProtocolError):
                    session.step(step)


def test_a_split_synchronize_is_collected_in_order() -> None:
    session = Session()
    session.step(Step.REGISTER)
    session.configured(nri_pb2.ConfigureRequest(), EventMask(0))
    for number in range(3):
        part = nri_pb2.SynchronizeRequest(pods=[nri_pb2.PodSandbox(id=str(number))], more=True)
        assert session.synchronized(part) is None
    last = nri_pb2.SynchronizeRequest(containers=[nri_pb2.Container(id="c")])
    everything = session.synchronized(last)
    assert everything is not None
    assert [pod.id for pod in everything[0]] == ["0", "1", "2"]
    assert [container.id for container in everything[1]] == ["c"]
    assert session.state is State.SERVING


def named(name: str | None, index: str | None) -> Plugin:
    plugin = Plugin()
    plugin.name, plugin.index = name, index
    return plugin


def test_identity_comes_from_the_plugin_the_environment_or_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NRI_PLUGIN_NAME", raising=False)
    monkeypatch.delenv("NRI_PLUGIN_IDX", raising=False)
    assert identity(named("a", "10"), argv0="/x/50-b") == ("a", "10")
    assert identity(named(None, "10"), argv0="/x/thing") == ("thing", "10")
    assert identity(named(None, None), argv0="/x/50-foo-bar") == ("foo-bar", "50")
    monkeypatch.setenv("NRI_PLUGIN_NAME", "env")
    monkeypatch.setenv("NRI_PLUGIN_IDX", "07")
    assert identity(named(None, None), argv0="/x/y") == ("env", "07")


@pytest.mark.parametrize(
    ("name", "index", "words"),
    [("a", "5", "two digits"), ("a", "100", "two digits"), ("a b", "50", "name"), ("a", None, "no index")],
)
def test_a_wrong_identity_is_told_with_what_to_do(
    name: str, index: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NRI_PLUGIN_IDX", raising=False)
    with pytest.raises(LocalProtocolError, match=words):
        identity(named(name, index), argv0="/x/program")
